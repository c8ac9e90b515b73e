// A call of an operator: memory layout, checked arguments, and the params that a kernel gets. Knows torch.
#pragma once

#include "checks.h"
#include "memory.h"

#include <algorithm>
#include <optional>
#include <vector>

namespace roialign {

constexpr double kLevelEps = 1e-6;              // torchvision's
constexpr int64_t kMaxSamplingRatio = 1 << 24;  // sample indices stay exact in float32

// Layout: read off the strides once.

// A channel stride of 1 under a longer column stride. Where one channel or one cell makes the two layouts the same,
// the map counts as NCHW.
inline bool is_channels_last(const Tensor& map) { return map.stride(1) == 1 && map.stride(3) > 1; }

inline at::MemoryFormat memory_format(bool channels_last) {
  return channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
}

// The map itself where the kernels can read it: neighbouring channels (channels_last) or neighbouring columns (NCHW)
// lie next to each other, other strides are free. Else a copy.
inline Tensor in_layout(const Tensor& map, bool channels_last) {
  const int64_t dim = channels_last ? 1 : 3;
  if (map.stride(dim) == 1 || map.size(dim) == 1) {
    return map;
  }
  return map.contiguous(memory_format(channels_last));
}

// Half boxes are read as float32; boxes and levels are small, so a copy of either costs nothing that shows.
inline Tensor as_kernel_boxes(const Tensor& boxes) {
  return (boxes.scalar_type() == at::kDouble ? boxes : boxes.to(at::kFloat)).contiguous();
}

// One call of an operator, checked but for the tensors that differ between operators.
struct Call {
  Pooling pooling;
  at::ArrayRef<double> spatial_scales;  // [L, 2]: y, x
  Tensor boxes;                         // [K, 5] as the kernels read them
  std::optional<Tensor> levels;         // [K] int64

  Call(const char* who, const Tensor& boxes_, const std::optional<Tensor>& levels_, at::IntArrayRef map_sizes,
       int64_t num_images, int64_t num_channels, at::IntArrayRef output_size, at::ArrayRef<double> spatial_scales_,
       int64_t sampling_ratio, bool aligned, int64_t canonical_level, double canonical_scale, bool channels_last)
      : spatial_scales(spatial_scales_), boxes(as_kernel_boxes(boxes_)) {
    const int64_t num_levels = static_cast<int64_t>(map_sizes.size()) / 2;
    check_levels(who, levels_, boxes);
    check_maps(who, map_sizes, boxes.size(0));
    check_scales(who, spatial_scales, num_levels);
    const int k_min = num_levels == 1 || levels_.has_value() ? 0 : check_rule_fits(who, spatial_scales);
    pooling = {check_rule(who, num_levels, k_min, canonical_level, canonical_scale, kLevelEps),
               check_int(who, "rows of `boxes`", boxes.size(0), 0, kMaxInt),
               check_int(who, "images", num_images, 0, kMaxInt),
               check_int(who, "channels", num_channels, 0, kMaxInt),
               check_int(who, "`output_size`", output_size[0], 1, kMaxInt),
               check_int(who, "`output_size`", output_size[1], 1, kMaxInt),
               check_int(who, "`sampling_ratio`", std::max<int64_t>(sampling_ratio, 0), 0, kMaxSamplingRatio),
               aligned,
               channels_last};
    check_int(who, "the product of `output_size`", int64_t(pooling.bins_y) * pooling.bins_x, 1, kMaxInt);
    if (levels_.has_value()) {
      levels = levels_->to(at::kLong).contiguous();
    }
  }

  // Calls run(params), once; which of `maps` and `pooled` is read and which is written is the operator's to say.
  template <typename Run>
  void with_params(const std::vector<Tensor>& maps, const Tensor& pooled, const Run& run) const {
#define ROIALIGN_CASE(scalar_t, box_t)                                     \
  if (pooled.scalar_type() == c10::CppTypeToScalarType<scalar_t>::value && \
      boxes.scalar_type() == c10::CppTypeToScalarType<box_t>::value) {     \
    return run(params<scalar_t, box_t>(maps, pooled));                     \
  }
    ROIALIGN_FOR_EACH_TYPE(ROIALIGN_CASE)
#undef ROIALIGN_CASE
    TORCH_INTERNAL_ASSERT(false, "dtypes are checked before params are made");
  }

 private:
  template <typename scalar_t, typename box_t>
  RoIAlignParams<scalar_t, box_t> params(const std::vector<Tensor>& maps, const Tensor& pooled) const {
    RoIAlignParams<scalar_t, box_t> params{pooling};
    for (size_t l = 0; l < maps.size(); ++l) {
      const Tensor& map = maps[l];
      params.levels[l] = {static_cast<scalar_t*>(map.data_ptr()),
                          map.stride(0),
                          map.stride(1),
                          map.stride(2),
                          map.stride(3),
                          static_cast<int>(map.size(2)),
                          static_cast<int>(map.size(3)),
                          spatial_scales[2 * l],
                          spatial_scales[2 * l + 1]};
    }
    params.boxes = boxes.const_data_ptr<box_t>();
    params.roi_levels = levels.has_value() ? levels->const_data_ptr<int64_t>() : nullptr;
    params.pooled = static_cast<scalar_t*>(pooled.data_ptr());
    return params;
  }
};

}  // namespace roialign
