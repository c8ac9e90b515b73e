// The contract between host and kernels: what a kernel is told, and nothing of how it was asked. Knows no torch.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

// The types the kernels are built for: X(type of the features, type of the boxes).
#define ROIALIGN_FOR_EACH_TYPE(X) \
  X(c10::Half, float)             \
  X(c10::Half, double)            \
  X(c10::BFloat16, float)         \
  X(c10::BFloat16, double)        \
  X(float, float)                 \
  X(float, double)                \
  X(double, float)                \
  X(double, double)

namespace roialign {

constexpr int kMaxLevels = 8;

// Which level of the pyramid a box belongs to: equation 1 of "Feature Pyramid Networks" (Lin et al., 2017).
struct LevelRule {
  int num_levels;
  int k_min;               // level of the finest map, -log2 of its scale
  int canonical_level;     // level of a box of canonical size, k0
  double canonical_scale;  // image pixels
  double eps;              // keeps a box of exactly canonical size on its own level
};

// One map of the pyramid. The forward reads `map` as features, the backward writes it as their gradient.
template <typename scalar_t>
struct FeatureLevel {
  scalar_t* map;                                   // [N, C, H, W]
  int64_t stride_n, stride_c, stride_h, stride_w;  // elements
  int height, width;
  double scale_y, scale_x;  // map cells per image pixel
};

// What is pooled and how, without the data.
struct Pooling {
  LevelRule rule;
  int64_t num_rois;    // K
  int num_images;      // N
  int num_channels;    // C
  int bins_y, bins_x;  // P, Q
  int sampling_ratio;  // samples per bin side; 0: adaptive
  bool aligned;        // pixel centres are shifted by half a cell
  bool channels_last;  // of `pooled` and of every level: the channel stride is 1, else the column stride is
};

// Everything a kernel is told, passed by value as its one argument.
template <typename scalar_t_, typename box_t_>
struct RoIAlignParams : Pooling {
  using scalar_t = scalar_t_;  // stored
  using box_t = box_t_;        // float or double
  using acc_t = std::conditional_t<std::is_same_v<scalar_t, double> || std::is_same_v<box_t, double>, double,
                                   float>;  // computed

  FeatureLevel<scalar_t> levels[kMaxLevels];  // finest first
  const box_t* boxes;                         // [K, 5]: image, x1, y1, x2, y2 in image pixels
  const int64_t* roi_levels;                  // [K], or null: the level rule decides
  scalar_t* pooled;                           // [K, C, P, Q], or [K, P, Q, C] in channels_last: output or its gradient
};

// Average pooling and where its boxes go.
template <typename scalar_t, typename box_t>
struct BoxMotionParams : RoIAlignParams<scalar_t, box_t> {
  box_t* motion;  // [K, 5], columns of `boxes`: their gradient, or the tangents along which pooling is differentiated
};

// Max pooling. A winner is the index of a sample among those of its bin that are near the map, row by row; -1: a
// sample further out, which reads 0.
template <typename scalar_t, typename box_t>
struct MaxParams : RoIAlignParams<scalar_t, box_t> {
  int32_t* argmax;    // in the shape and layout of `pooled`
  box_t* grad_boxes;  // [K, 5], or null where the gradient of the boxes is not asked for
};

// The level rule on its own.
template <typename box_t_>
struct AssignLevelsParams {
  using box_t = box_t_;  // float or double

  const box_t* boxes;  // [K, 4]: x1, y1, x2, y2 in image pixels
  int64_t* levels;     // [K]
  LevelRule rule;
  int64_t num_boxes;  // K
};

// Greedy suppression of boxes that follow each other group after group, in each the best score first.
template <typename box_t>
struct NmsParams {
  const box_t* boxes;            // [K, 4]: x1, y1, x2, y2
  const int64_t* groups;         // [K], ascending; or null: one group
  int64_t num_boxes;             // K
  box_t limit;                   // a kept box drops those of its group whose overlap with it is above
  bool* keep;                    // [K]
  unsigned long long* progress;  // what the warps of a CUDA device tell each other; zeros at first
};

}  // namespace roialign
