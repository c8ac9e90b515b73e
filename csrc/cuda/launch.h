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

namespace roialign::cuda {

// Kernels started so far, so that "one launch" can be tested.
inline std::atomic<int64_t> launch_count{0};

#if defined(__CUDACC__) || defined(ROIALIGN_EXT_EMULATED)

template <typename Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, dim3 block, cudaStream_t stream, const Params& params) {
  ++launch_count;
#ifdef ROIALIGN_EXT_EMULATED
  (void)stream;
  return emulation::launch(kernel, grid, block, params);
#else
  kernel<<<grid, block, 0, stream>>>(params);
  return cudaGetLastError();
#endif
}

#endif  // a compiler of kernels

// Kernels say __launch_bounds__(threads, 1): left to choose the blocks per multiprocessor itself, ptxas 13.0 spills
// in 10 of 50 to fit more.

// Neighbouring values that a thread loads and stores at once.
template <typename scalar_t, int kVec>
struct alignas(sizeof(scalar_t) * kVec) Vec {
  scalar_t value[kVec];
};

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

}  // namespace roialign::cuda
