// The RoIs of a call in the order in which the maps are walked, without their taps. Knows no torch.
#pragma once

#include "geometry.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

namespace roialign::cpu {

// RoIs by the map they lie on, and there from top to bottom, so that neighbours in the order share cache lines. Those
// of map m, of image m / levels and level m % levels, are order[offsets[m]] .. order[offsets[m + 1] - 1]; rows that
// pool from nowhere follow the last.
template <typename acc_t>
struct PlacedRoIs {
  std::vector<RoI<acc_t>> rois;  // [K]
  std::vector<int64_t> order;    // [K]
  std::vector<int64_t> offsets;  // [N * L + 1]
};

template <typename Params>
PlacedRoIs<typename Params::acc_t> place(const Params& params) {
  PlacedRoIs<typename Params::acc_t> placed;
  const int64_t num_levels = params.rule.num_levels, num_maps = params.num_images * num_levels;
  std::vector<std::tuple<int64_t, int, int, int64_t>> keys;  // map, top, left, row
  placed.offsets.assign(num_maps + 1, 0);
  for (int64_t k = 0; k < params.num_rois; ++k) {
    const auto roi = roi_at(params, k);
    placed.rois.push_back(roi);
    if (roi.level >= 0) {
      const int64_t map = roi.image * num_levels + roi.level;
      keys.emplace_back(map, cells_near(roi.y).begin, cells_near(roi.x).begin, k);
      ++placed.offsets[map + 1];
    } else {
      keys.emplace_back(num_maps, 0, 0, k);
    }
  }
  std::sort(keys.begin(), keys.end());
  for (const auto& key : keys) {
    placed.order.push_back(std::get<3>(key));
  }
  std::partial_sum(placed.offsets.begin(), placed.offsets.end(), placed.offsets.begin());
  return placed;
}

// The gradient of a RoI's edges, in cells.
template <typename acc_t>
struct EdgeTotals {
  acc_t near_y = 0, far_y = 0, near_x = 0, far_x = 0;
};

// Where the channels of a row of `pooled` lie: element (c, bin) of row k at (k * C * bins) + c * channel + bin * bin.
struct PooledStrides {
  int64_t row, channel, bin;
};

template <typename Params>
PooledStrides pooled_strides(const Params& params) {
  const int64_t bins = int64_t(params.bins_y) * params.bins_x, channels = params.num_channels;
  return params.channels_last ? PooledStrides{bins * channels, 1, channels} : PooledStrides{bins * channels, bins, 1};
}

}  // namespace roialign::cpu
