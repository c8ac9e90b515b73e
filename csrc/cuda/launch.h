// What the host calls on a CUDA device, and how a kernel is started. Knows no torch.
#pragma once

#include "params.h"

#ifdef ROIALIGN_EXT_EMULATED
#include "cuda_emulation.h"  // g++ stands in for nvcc: see tests/emulation
#else
#include <cuda_runtime.h>
#endif

#include <atomic>
#include <cstdint>
#include <cstring>

namespace roialign::cuda {

// Kernels started so far, so that "one launch" can be tested.
inline std::atomic<int64_t> launch_count{0};

#if defined(__CUDACC__) || defined(ROIALIGN_EXT_EMULATED)

template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, cudaStream_t stream, const Params& params) {
  ++launch_count;
#ifdef ROIALIGN_EXT_EMULATED
  return emulation::launch(kernel, grid, block, stream, params);
#else
  kernel<<<grid, block, 0, stream>>>(params);
  return cudaGetLastError();
#endif
}

#endif  // a compiler of kernels

// Neighbouring values that a thread loads and stores at once.
template <typename scalar_t, int kVec>
struct alignas(sizeof(scalar_t) * kVec) Vec {
  scalar_t value[kVec];
};

#if defined(__CUDACC__) || defined(ROIALIGN_EXT_EMULATED)

constexpr int kWarp = 32;
constexpr unsigned int kWholeWarp = 0xffffffffu;

// The integer that moves as many bytes in one instruction.
template <int kBytes>
using Word = std::conditional_t<
    kBytes == 16, uint4,
    std::conditional_t<kBytes == 8, uint2, std::conditional_t<kBytes == 4, unsigned int, unsigned short>>>;

// Reads what no thread of the launch writes. As integers: to keep halves apart in registers costs an instruction each.
template <int kVec, typename scalar_t>
__device__ Word<sizeof(scalar_t) * kVec> load(const scalar_t* address) {
  return __ldg(reinterpret_cast<const Word<sizeof(scalar_t) * kVec>*>(address));
}

// The pointer as one value. nvcc takes a pointer apart into a kernel argument and 64-bit offsets, which it then adds at
// every access: five instructions for an address instead of two.
template <typename scalar_t>
__device__ const scalar_t* whole(const scalar_t* pointer) {
#ifdef __CUDACC__
  asm("" : "+l"(pointer));
#endif
  return pointer;
}

template <typename scalar_t, typename word_t>
__device__ Vec<scalar_t, sizeof(word_t) / sizeof(scalar_t)> values_of(const word_t& word) {
  Vec<scalar_t, sizeof(word_t) / sizeof(scalar_t)> values;
  memcpy(&values, &word, sizeof(word));
  return values;
}

// Writes what this launch does not read again, so that it does not drive the maps out of the cache.
template <int kVec, typename scalar_t>
__device__ void store(scalar_t* address, const Vec<scalar_t, kVec>& values) {
  using word_t = Word<sizeof(scalar_t) * kVec>;
  word_t word;
  memcpy(&word, &values, sizeof(word));
  __stcs(reinterpret_cast<word_t*>(address), word);
}

// Blocks that a multiprocessor must be able to hold. Two leave the compiler room, and a block of seven warps then still
// fits three times; doubles take what they need, or they spill.
template <typename acc_t>
constexpr int kBlocks = sizeof(acc_t) == 4 ? 2 : 1;

#endif  // a compiler of kernels

// Whether channels_last maps and bins can be accessed kVec channels at a time, from their addresses and strides.
template <typename scalar_t, int kVec, typename Params>
bool can_vectorize(const Params& params) {
  const auto is_aligned = [](const scalar_t* data) {
    return reinterpret_cast<uintptr_t>(data) % sizeof(Vec<scalar_t, kVec>) == 0;
  };
  bool can = params.num_channels % kVec == 0 && is_aligned(params.pooled);
  for (int l = 0; l < params.rule.num_levels; ++l) {
    const auto& level = params.levels[l];
    can = can && is_aligned(level.map) && level.stride_n % kVec == 0 && level.stride_h % kVec == 0 &&
          level.stride_w % kVec == 0;
  }
  return can;
}

template <typename scalar_t, typename box_t>
cudaError_t roi_align_forward(const RoIAlignParams<scalar_t, box_t>& params, cudaStream_t stream);

template <typename scalar_t, typename box_t>
cudaError_t roi_align_backward(const RoIAlignParams<scalar_t, box_t>& params, cudaStream_t stream);

template <typename scalar_t, typename box_t>
cudaError_t roi_align_backward_boxes(const BoxMotionParams<scalar_t, box_t>& params, cudaStream_t stream);

template <typename scalar_t, typename box_t>
cudaError_t roi_align_tangent(const BoxMotionParams<scalar_t, box_t>& params, cudaStream_t stream);

template <typename scalar_t, typename box_t>
cudaError_t roi_max_forward(const MaxParams<scalar_t, box_t>& params, cudaStream_t stream);

template <typename scalar_t, typename box_t>
cudaError_t roi_max_gather(const MaxParams<scalar_t, box_t>& params, cudaStream_t stream);

template <typename scalar_t, typename box_t>
cudaError_t roi_max_backward(const MaxParams<scalar_t, box_t>& params, cudaStream_t stream);

template <typename scalar_t, typename box_t>
cudaError_t roi_max_backward_boxes(const MaxParams<scalar_t, box_t>& params, cudaStream_t stream);

template <typename box_t>
cudaError_t assign_levels(const AssignLevelsParams<box_t>& params, cudaStream_t stream);

template <typename box_t>
cudaError_t nms(const NmsParams<box_t>& params, cudaStream_t stream);

// Words of NmsParams::progress: one, and one for 32 rows each.
inline int64_t nms_progress_size(int64_t num_boxes) { return 1 + (num_boxes + 31) / 32; }

}  // namespace roialign::cuda
