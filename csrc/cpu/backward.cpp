// CPU backward, grad_F += Wy^T * G * Wx for every RoI and channel. Each piece of work owns a part of the gradient,
// adds the RoIs that touch it in a fixed order and writes every cell once: no atomics, no zero fill beforehand, the
// same bits whatever the number of threads. Knows no torch.
#include "taps.h"

#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ROIALIGN_KERNELS "backward_kernels.h"
#include "for_each_target.h"

namespace roialign::cpu {

template <typename scalar_t, typename box_t>
void roi_align_backward(const RoIAlignParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  const auto rois = merge_taps(params, parallel_for);
  const auto order = sort_by_map(params, rois);
  if (params.channels_last) {
    ROIALIGN_DISPATCH(gather_rows(params, rois, order, parallel_for));
  } else {
    ROIALIGN_DISPATCH(gather_planes(params, rois, order, parallel_for));
  }
}

#define ROIALIGN_INSTANTIATE(scalar_t, box_t) \
  template void roi_align_backward(const RoIAlignParams<scalar_t, box_t>&, const ParallelFor&);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cpu
