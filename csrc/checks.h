// What the operators demand of their arguments; messages say who, what was expected and what came. Knows torch.
#pragma once

#include "geometry.h"

#include <ATen/core/Tensor.h>

#include <cmath>
#include <limits>
#include <optional>
#include <string>

namespace roialign {

using at::Tensor;
using at::TensorList;

constexpr int64_t kMaxInt = std::numeric_limits<int>::max();

inline const char* name_of_call(int64_t num_levels) { return num_levels == 1 ? "roi_align" : "multiscale_roi_align"; }

inline std::string name_of_map(int64_t num_levels, int64_t level) {
  return num_levels == 1 ? "`input`" : "`features[" + std::to_string(level) + "]`";
}

inline std::string name_of_dtype(const Tensor& tensor) {
  return std::string(c10::getDtypeNames(tensor.scalar_type()).first);
}

inline std::string name_of_shape(const Tensor& tensor) { return "(" + c10::Join(", ", tensor.sizes()) + ")"; }

inline void check_float(const char* who, const std::string& name, const Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  TORCH_CHECK_TYPE(dtype == at::kHalf || dtype == at::kBFloat16 || dtype == at::kFloat || dtype == at::kDouble, who,
                   ": ", name, " must be float16, bfloat16, float32 or float64, got ", name_of_dtype(tensor));
}

inline int check_int(const char* who, const char* what, int64_t value, int64_t low, int64_t high) {
  TORCH_CHECK_VALUE(value >= low && value <= high, who, ": ", what, " must be from ", low, " to ", high, ", got ",
                    value);
  return static_cast<int>(value);
}

inline double check_positive(const char* who, const char* what, double value) {
  TORCH_CHECK_VALUE(std::isfinite(value) && value > 0, who, ": ", what, " must be positive and finite, got ", value);
  return value;
}

inline void check_boxes(const char* who, const Tensor& boxes, int64_t columns, at::Device device) {
  check_float(who, "`boxes`", boxes);
  TORCH_CHECK_VALUE(boxes.dim() == 2 && boxes.size(1) == columns, who, ": `boxes` must have shape (K, ", columns,
                    "), got ", name_of_shape(boxes));
  TORCH_CHECK_VALUE(boxes.device() == device, who, ": `boxes` must be on ", device, ", got ", boxes.device());
}

inline void check_integers(const char* who, const char* name, const Tensor& tensor) {
  TORCH_CHECK_TYPE(at::isIntegralType(tensor.scalar_type(), /*includeBool=*/false), who, ": ", name,
                   " must be integers, got ", name_of_dtype(tensor));
}

inline void check_per_box(const char* who, const char* name, const Tensor& tensor, const Tensor& boxes) {
  TORCH_CHECK_VALUE(tensor.dim() == 1 && tensor.size(0) == boxes.size(0), who, ": ", name, " must have shape (",
                    boxes.size(0), ",), one per box, got ", name_of_shape(tensor));
  TORCH_CHECK_VALUE(tensor.device() == boxes.device(), who, ": ", name, " must be on ", boxes.device(), ", got ",
                    tensor.device());
}

inline void check_levels(const char* who, const std::optional<Tensor>& levels, const Tensor& boxes) {
  if (levels.has_value()) {
    check_integers(who, "`levels`", *levels);
    check_per_box(who, "`levels`", *levels, boxes);
  }
}

inline void check_features(const char* who, TensorList features) {
  const int64_t num_levels = static_cast<int64_t>(features.size());
  check_int(who, "levels of `features`", num_levels, 1, kMaxLevels);
  const Tensor& first = features[0];
  for (int64_t l = 0; l < num_levels; ++l) {
    const Tensor& map = features[l];
    const std::string name = name_of_map(num_levels, l);
    check_float(who, name, map);
    TORCH_CHECK_VALUE(map.dim() == 4, who, ": ", name, " must have shape (N, C, H, W), got ", name_of_shape(map));
    TORCH_CHECK_VALUE(map.scalar_type() == first.scalar_type(), who, ": ", name, " must be ", name_of_dtype(first),
                      " as `features[0]` is, got ", name_of_dtype(map));
    TORCH_CHECK_VALUE(map.device() == first.device(), who, ": ", name, " must be on ", first.device(),
                      " as `features[0]` is, got ", map.device());
    TORCH_CHECK_VALUE(map.size(0) == first.size(0) && map.size(1) == first.size(1), who, ": ", name,
                      " must have the images and channels of `features[0]`, (", first.size(0), ", ", first.size(1),
                      "), got (", map.size(0), ", ", map.size(1), ")");
  }
}

inline void check_maps(const char* who, at::IntArrayRef map_sizes, int64_t num_rois) {
  for (size_t i = 0; i < map_sizes.size(); ++i) {
    check_int(who, i % 2 == 0 ? "height of a map" : "width of a map", map_sizes[i], 0, kMaxInt);
    TORCH_CHECK_VALUE(map_sizes[i] > 0 || num_rois == 0, who, ": ",
                      name_of_map(static_cast<int64_t>(map_sizes.size() / 2), static_cast<int64_t>(i / 2)),
                      " must have cells to pool ", num_rois, " boxes from, got ", i % 2 == 0 ? "height" : "width",
                      " 0");
  }
}

inline void check_pooled(const char* who, const char* name, const Tensor& pooled, const Tensor& boxes) {
  check_boxes(who, boxes, 5, boxes.device());
  TORCH_CHECK_VALUE(pooled.dim() == 4 && pooled.size(0) == boxes.size(0), who, ": ", name, " must have shape (",
                    boxes.size(0), ", C, P, Q), got ", name_of_shape(pooled));
  TORCH_CHECK_VALUE(pooled.device() == boxes.device(), who, ": ", name, " must be on ", boxes.device(), ", got ",
                    pooled.device());
}

inline void check_grad_of(const char* who, const Tensor& grad_output, const Tensor& boxes, TensorList features) {
  check_pooled(who, "`grad_output`", grad_output, boxes);
  TORCH_CHECK_VALUE(grad_output.size(1) == features[0].size(1), who, ": `grad_output` must have the ",
                    features[0].size(1), " channels of the features, got ", name_of_shape(grad_output));
  TORCH_CHECK_TYPE(grad_output.scalar_type() == features[0].scalar_type(), who, ": `grad_output` must be ",
                   name_of_dtype(features[0]), " as the features are, got ", name_of_dtype(grad_output));
}

inline void check_argmax(const char* who, const Tensor& argmax, const Tensor& boxes, int64_t num_channels) {
  TORCH_CHECK_TYPE(argmax.scalar_type() == at::kInt, who, ": `argmax` must be int32, got ", name_of_dtype(argmax));
  check_pooled(who, "`argmax`", argmax, boxes);
  TORCH_CHECK_VALUE(argmax.size(1) == num_channels, who, ": `argmax` must have ", num_channels, " channels, got ",
                    name_of_shape(argmax));
}

inline void check_same_bins(const char* who, const Tensor& grad_output, const Tensor& argmax) {
  TORCH_CHECK_VALUE(grad_output.sizes() == argmax.sizes(), who, ": `argmax` must have the shape of `grad_output`, ",
                    name_of_shape(grad_output), ", got ", name_of_shape(argmax));
}

// The samples of a bin are counted in int32 wherever max pooling names one of them.
inline void check_samples_count(const char* who, at::IntArrayRef map_sizes, int64_t sampling_ratio) {
  constexpr int64_t kMaxFixed = 1 << 15;
  TORCH_CHECK_VALUE(sampling_ratio <= kMaxFixed, who, ": `sampling_ratio` must be at most ", kMaxFixed,
                    " for max pooling, got ", sampling_ratio);
  for (size_t i = 0; i < map_sizes.size(); i += 2) {
    // Adaptive samples lie over half a cell apart, see samples_near().
    const double samples = (2.0 * map_sizes[i] + 9) * (2.0 * map_sizes[i + 1] + 9);
    TORCH_CHECK_VALUE(sampling_ratio > 0 || samples < kMaxInt, who,
                      ": a map must have less than 2^29 cells for adaptive max pooling, got ", map_sizes[i], " x ",
                      map_sizes[i + 1]);
  }
}

inline void check_scales(const char* who, at::ArrayRef<double> scales, int64_t num_levels) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(scales.size()) == 2 * num_levels, who,
                    ": `spatial_scales` must have one scale for each of ", num_levels, " levels, got ",
                    scales.size() / 2);
  for (const double scale : scales) {
    check_positive(who, "`spatial_scales`", scale);
  }
}

// The level of the finest map, where the rule fits the scales.
inline int check_rule_fits(const char* who, at::ArrayRef<double> scales) {
  constexpr double kTolerance = 1e-6;
  const double finest = -std::log2(scales[0]);
  for (size_t l = 0; l < scales.size() / 2; ++l) {
    const double level = -std::log2(scales[2 * l]);
    TORCH_CHECK_VALUE(scales[2 * l] == scales[2 * l + 1] && std::abs(level - std::round(level)) < kTolerance &&
                          std::abs(level - finest - static_cast<double>(l)) < kTolerance,
                      who, ": `spatial_scales` must be consecutive powers of two, finest first, for the FPN rule to ",
                      "choose levels, got (", scales[2 * l], ", ", scales[2 * l + 1], ") at level ", l,
                      " after a finest scale of ", scales[0], "; pass `levels=` to choose them yourself");
  }
  return static_cast<int>(std::lround(finest));
}

inline LevelRule check_rule(const char* who, int64_t num_levels, int64_t k_min, int64_t canonical_level,
                            double canonical_scale, double eps) {
  constexpr int64_t kMaxLevel = 1024;  // scales of doubles end there
  return {check_int(who, "`num_levels`", num_levels, 1, kMaxLevel),
          check_int(who, "`k_min`", k_min, -kMaxLevel, kMaxLevel),
          check_int(who, "`canonical_level`", canonical_level, -kMaxLevel, kMaxLevel),
          check_positive(who, "`canonical_scale`", canonical_scale), eps};
}

// On a CPU a row can be looked at before any work; on CUDA that would wait for the device, and the kernel answers
// such a row with NaN.
template <typename box_t>
void check_rows(const char* who, const Tensor& boxes, const std::optional<Tensor>& levels, int64_t num_images,
                int64_t num_levels) {
  const box_t* rows = boxes.const_data_ptr<box_t>();
  const int64_t* roi_levels = levels.has_value() ? levels->const_data_ptr<int64_t>() : nullptr;
  for (int64_t k = 0; k < boxes.size(0); ++k) {
    const int64_t level = roi_levels != nullptr ? roi_levels[k] : 0;
    const box_t image = std::trunc(rows[k * 5]);
    if (level == kEmptyRow || image == box_t(-1) || std::isnan(image)) {
      continue;
    }
    TORCH_CHECK_INDEX(image >= 0 && image < static_cast<box_t>(num_images), who, ": row ", k,
                      " of `boxes` must name one of ", num_images, " images, or -1 for padding, got image ",
                      rows[k * 5]);
    TORCH_CHECK_INDEX(level >= 0 && level < num_levels, who, ": row ", k, " of `levels` must name one of ", num_levels,
                      " levels, or -1 for padding, got ", level);
  }
}

}  // namespace roialign
