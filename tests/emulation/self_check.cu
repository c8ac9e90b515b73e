// Small kernels with known answers, and small kernels that are wrong, to test cuda_emulation.h itself.
#include "cuda_emulation.h"

namespace roialign::cuda {
namespace {

struct Params {
  const float* in;
  float* out;
};

// A block of 256 threads sums in[256 * block ...] into out[block]; without barriers the sum is wrong.
template <bool kBarrier>
__global__ void __launch_bounds__(256) block_sum_kernel(Params params) {
  __shared__ float partial[256];
  partial[threadIdx.x] = __ldg(&params.in[blockIdx.x * 256 + threadIdx.x]);
  for (int step = 128; step > 0; step /= 2) {
    if (kBarrier) __syncthreads();
    if (threadIdx.x < step) partial[threadIdx.x] += partial[threadIdx.x + step];
  }
  if (threadIdx.x == 0) params.out[blockIdx.x] = partial[0];
}

// The lanes of a warp pass a value on through shared memory; without __syncwarp some read it before it is there.
template <bool kBarrier>
__global__ void neighbour_kernel(Params params) {
  __shared__ float slots[32];
  slots[threadIdx.x] = params.in[threadIdx.x];
  if (kBarrier) __syncwarp();
  params.out[threadIdx.x] = slots[(threadIdx.x + 1) % 32];
}

// Every collective once; one warp.
__global__ void collectives_kernel(Params params) {
  int lane = threadIdx.x, n = 0;
  float value = params.in[lane];
  auto put = [&](float result) { params.out[32 * n++ + lane] = result; };
  put(__shfl_sync(~0u, value, 3));
  put(__shfl_sync(~0u, value, 3, 8));
  put(__shfl_up_sync(~0u, value, 2));
  put(__shfl_down_sync(~0u, value, 2, 16));
  put(__shfl_xor_sync(~0u, value, 5));
  put(__popc(__ballot_sync(~0u, lane % 3 == 0) & ((1u << lane) - 1)));
  put(__any_sync(~0u, lane == 7) + 2 * __all_sync(~0u, lane != 7));
  put(__ffs(__match_any_sync(~0u, lane % 5)) - 1);
  // Two halves of a warp each on their own; the value of a lane outside the mask is undefined.
  if (lane < 16)
    put(__shfl_xor_sync(0xffffu, value, 1));
  else
    put(__shfl_sync(0xffff0000u, value, 0));
  put(__syncthreads_count(lane < 10) + 100 * __syncthreads_or(lane == 4) + 1000 * __syncthreads_and(lane == 4));
}

// Writes each thread's linear index where its own and its block's indices say.
__global__ void indices_kernel(Params params) {
  int block = blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z);
  int thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  int threads = blockDim.x * blockDim.y * blockDim.z;
  params.out[block * threads + thread] = block * threads + thread;
}

// Shared memory of either kind holds NaN at the start of every block.
__global__ void uninitialised_kernel(Params params) {
  __shared__ float fixed[4];
  float* dynamic = emulation::dynamic_shared<float>();
  params.out[blockIdx.x] = std::isnan(fixed[threadIdx.x]) && std::isnan(dynamic[threadIdx.x]);
  fixed[threadIdx.x] = dynamic[threadIdx.x] = 1;
}

__global__ void barrier_after_exit_kernel(Params) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}

__global__ void two_barriers_kernel(Params) {
  if (threadIdx.x < 32)
    __syncthreads();
  else
    __syncthreads();
}

__global__ void missing_lane_kernel(Params) {
  if (threadIdx.x != 9) __syncwarp();
}

__global__ void foreign_mask_kernel(Params) { __ballot_sync(0xffu, 1); }

// Reads one past the end of `in` or of shared memory, a misaligned vector, an index that is NaN: for the sanitizers.
__global__ void past_the_end_kernel(Params params) { params.out[0] = params.in[32 + threadIdx.x / 31]; }
__global__ void past_shared_kernel(Params params) {
  __shared__ float values[32];
  params.out[0] = values[threadIdx.x + 1];
}
__global__ void misaligned_kernel(Params params) {
  params.out[0] = reinterpret_cast<const float4*>(params.in + 1 + threadIdx.x * 0)->x;
}

__global__ void cast_of_nan_kernel(Params params) { params.out[0] = static_cast<int>(params.in[0]); }

}  // namespace
}  // namespace roialign::cuda

// Runs a kernel by name; returns what went wrong or null.
extern "C" __attribute__((visibility("default"))) const char* self_check(const char* name, const float* in,
                                                                         float* out) {
  using namespace roialign::cuda;
  static std::string message;
  struct {
    const char* name;
    void (*kernel)(Params);
    dim3 grid, block;
  } const checks[] = {
      {"block_sum", block_sum_kernel<true>, 64, 256},  {"block_sum_without_barrier", block_sum_kernel<false>, 64, 256},
      {"neighbour", neighbour_kernel<true>, 1, 32},    {"neighbour_without_barrier", neighbour_kernel<false>, 1, 32},
      {"collectives", collectives_kernel, 1, 32},      {"indices", indices_kernel, {3, 2, 2}, {5, 3, 2}},
      {"uninitialised", uninitialised_kernel, 100, 4}, {"barrier_after_exit", barrier_after_exit_kernel, 1, 64},
      {"two_barriers", two_barriers_kernel, 1, 64},    {"missing_lane", missing_lane_kernel, 1, 32},
      {"foreign_mask", foreign_mask_kernel, 1, 32},    {"past_the_end", past_the_end_kernel, 1, 32},
      {"past_shared", past_shared_kernel, 1, 32},      {"misaligned", misaligned_kernel, 1, 32},
      {"cast_of_nan", cast_of_nan_kernel, 1, 32},      {"too_large_a_block", indices_kernel, 1, 1056},
  };
  for (const auto& check : checks) {
    if (std::strcmp(check.name, name)) continue;
    try {
      cudaError_t error =
          emulation::launch(check.kernel, check.grid, check.block, nullptr, Params{in, out}, 4 * sizeof(float));
      return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
    } catch (const std::exception& failure) {
      return (message = failure.what()).c_str();
    }
  }
  return "no such check";
}
