// CPU forward, out = Wy * F * Wx^T for every RoI and channel. Knows no torch.
#include "taps.h"

#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ROIALIGN_KERNELS "forward_kernels.h"
#include "for_each_target.h"

namespace roialign::cpu {

template <typename scalar_t, typename box_t>
void roi_align_forward(const RoIAlignParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  const auto rois = merge_taps(params, parallel_for);
  const auto order = sort_by_map(params, rois);
  if (params.channels_last) {
    ROIALIGN_DISPATCH(pool_channels(params, rois, order, parallel_for));
  } else {
    ROIALIGN_DISPATCH(pool_planes(params, rois, order, parallel_for));
  }
}

const char* capability() { return kTargetNames[current_target]; }

bool set_capability(const char* name) {
  const Target target = target_of(name);
  current_target = target;
  return std::strcmp(kTargetNames[target], name) == 0;
}

template <typename box_t>
void assign_levels(const AssignLevelsParams<box_t>& params) {
  for (int64_t k = 0; k < params.num_boxes; ++k) {
    const box_t* box = params.boxes + k * 4;
    params.levels[k] = level_of(params.rule, box[0], box[1], box[2], box[3]);
  }
}

template void assign_levels(const AssignLevelsParams<float>&);
template void assign_levels(const AssignLevelsParams<double>&);

#define ROIALIGN_INSTANTIATE(scalar_t, box_t) \
  template void roi_align_forward(const RoIAlignParams<scalar_t, box_t>&, const ParallelFor&);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cpu
