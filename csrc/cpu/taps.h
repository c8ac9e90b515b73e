// The RoIs of a call with their taps merged, made once and read by every channel. Knows no torch.
#pragma once

#include "geometry.h"
#include "kernels.h"

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

namespace roialign::cpu {

// Pieces to hand out at a time, `num_pieces` making `num_values` in all: fewer values than this are made sooner than a
// second thread wakes up.
inline int64_t grain_of(int64_t num_values, int64_t num_pieces) {
  constexpr int64_t kValuesPerThread = 32768;
  return std::max<int64_t>(kValuesPerThread * num_pieces / std::max<int64_t>(num_values, 1), 1);
}

template <typename Params>
int64_t num_bins_of(const Params& params) {
  return params.num_rois * params.num_channels * params.bins_y * params.bins_x;
}

// Cells of all maps, channels included.
template <typename Params>
int64_t num_cells_of(const Params& params) {
  int64_t cells = 0;
  for (int l = 0; l < params.rule.num_levels; ++l) {
    cells += int64_t(params.levels[l].height) * params.levels[l].width;
  }
  return cells * params.num_images * params.num_channels;
}

template <typename acc_t>
struct Tap {
  int index;  // of the cell a bin reads, or of the bin a cell feeds
  acc_t weight;
};

// A sparse matrix along one axis: row i is the sum of taps [offsets[i], offsets[i + 1]).
template <typename acc_t>
struct Taps {
  std::vector<int> offsets;
  std::vector<Tap<acc_t>> taps;
  int first = 0, last = -1;  // cells: every tap lies on one of [first, last]

  int width() const { return last - first + 1; }
  // Few samples in a large RoI leave gaps between their cells. It is then cheaper to visit the taps one by one than
  // to make whole rows.
  bool has_gaps() const { return width() > 2 * static_cast<int>(taps.size()); }
};

// One row for every bin, indices of cells.
template <typename acc_t>
Taps<acc_t> taps_of_bins(const Axis<acc_t>& axis) {
  Taps<acc_t> result;
  result.first = axis.size;
  result.offsets.reserve(axis.num_bins + 1);
  result.offsets.push_back(0);
  for (int bin = 0; bin < axis.num_bins; ++bin) {
    for_each_tap(axis, bin, samples_near(axis, bin, 0, axis.size - 1), [&](int cell, acc_t weight) {
      result.taps.push_back({cell, weight});
      result.first = std::min(result.first, cell);
      result.last = std::max(result.last, cell);
    });
    result.offsets.push_back(static_cast<int>(result.taps.size()));
  }
  return result;
}

// The same matrix by its columns: one row for every cell of [first, last], indices of bins.
template <typename acc_t>
Taps<acc_t> taps_of_cells(const Taps<acc_t>& bins) {
  Taps<acc_t> result;
  result.first = bins.first;
  result.last = bins.last;
  result.offsets.assign(std::max(bins.width(), 0) + 1, 0);
  for (const auto& tap : bins.taps) {
    ++result.offsets[tap.index - bins.first + 1];
  }
  std::partial_sum(result.offsets.begin(), result.offsets.end(), result.offsets.begin());
  result.taps.resize(bins.taps.size());
  std::vector<int> next(result.offsets);
  for (size_t bin = 0; bin + 1 < bins.offsets.size(); ++bin) {
    for (int t = bins.offsets[bin]; t < bins.offsets[bin + 1]; ++t) {
      const auto& tap = bins.taps[t];
      result.taps[next[tap.index - bins.first]++] = {static_cast<int>(bin), tap.weight};
    }
  }
  return result;
}

// A row of `boxes`, ready to pool: an empty row has no map and no taps.
template <typename acc_t>
struct RoITaps {
  int image = 0;
  int level = kEmptyRow;
  Taps<acc_t> y, x;
};

// A plane of cells: rows `stride_h` elements apart.
struct Plane {
  int height, width;
  int64_t stride_h;
};

// Where a window of `width` cells, read as vectors of `lanes`, begins to cover the taps of both axes: `start` is its
// first column. Vectors lie within cache lines where the cells can be had so, and never reach over the end of the plane:
// the window steps back where need be. Returns false if the plane is too small to hold it.
template <typename acc_t>
bool place_window(const Taps<acc_t>& y, const Taps<acc_t>& x, const Plane& plane, int lanes, int width,
                  int64_t& start) {
  const int in_lines = x.first / lanes * lanes;
  const int first = x.last < in_lines + width ? in_lines : x.first;
  const int64_t end = y.last * plane.stride_h + first + width,
                end_of_plane = (plane.height - 1) * plane.stride_h + plane.width;
  start = first - std::max<int64_t>(end - end_of_plane, 0);
  return y.first * plane.stride_h + start >= 0;
}

template <typename Params>
std::vector<RoITaps<typename Params::acc_t>> merge_taps(const Params& params, const ParallelFor& parallel_for) {
  constexpr int64_t kGrain = 64;
  std::vector<RoITaps<typename Params::acc_t>> rois(params.num_rois);
  parallel_for(params.num_rois, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const auto roi = roi_at(params, k);
      if (roi.level >= 0) {
        rois[k] = {roi.image, roi.level, taps_of_bins(roi.y), taps_of_bins(roi.x)};
      }
    }
  });
  return rois;
}

// The RoIs by the map they lie on, and there from top to bottom, so that neighbours in the order share cache lines.
// Those of map m, of image m / levels and level m % levels, are rois[offsets[m]] .. rois[offsets[m + 1] - 1]; empty
// rows follow the last.
struct RoIOrder {
  std::vector<int64_t> rois;     // [K]
  std::vector<int64_t> offsets;  // [N * L + 1]
};

template <typename Params>
RoIOrder sort_by_map(const Params& params, const std::vector<RoITaps<typename Params::acc_t>>& rois) {
  const int64_t num_levels = params.rule.num_levels, num_maps = params.num_images * num_levels;
  const auto map_of = [&](const auto& roi) { return roi.level < 0 ? num_maps : roi.image * num_levels + roi.level; };
  RoIOrder order;
  order.rois.resize(rois.size());
  std::iota(order.rois.begin(), order.rois.end(), 0);
  std::sort(order.rois.begin(), order.rois.end(), [&](int64_t a, int64_t b) {
    const auto key = [&](int64_t k) { return std::make_tuple(map_of(rois[k]), rois[k].y.first, rois[k].x.first, k); };
    return key(a) < key(b);
  });
  order.offsets.assign(num_maps + 1, 0);
  for (const auto& roi : rois) {
    if (roi.level >= 0) {
      ++order.offsets[map_of(roi) + 1];
    }
  }
  std::partial_sum(order.offsets.begin(), order.offsets.end(), order.offsets.begin());
  return order;
}

}  // namespace roialign::cpu
