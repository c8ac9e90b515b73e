// The RoIs of a call with their taps merged, made once and read by every channel. Knows no torch.
#pragma once

#include "geometry.h"
#include "kernels.h"

#include <algorithm>
#include <vector>

namespace roialign::cpu {

template <typename acc_t>
struct Tap {
  int cell;  // index into AxisTaps::cells
  acc_t weight;
};

// One axis of a RoI as a sparse matrix: bin b is the sum of taps [offsets[b], offsets[b + 1]).
template <typename acc_t>
struct AxisTaps {
  std::vector<int> offsets;  // [bins + 1]
  std::vector<Tap<acc_t>> taps;
  std::vector<int> cells;   // map cells that the taps read, ascending
  bool contiguous = false;  // the cells are neighbours: cells[i] = cells[0] + i

  int num_cells() const { return static_cast<int>(cells.size()); }
};

template <typename acc_t>
AxisTaps<acc_t> merge_taps(const Axis<acc_t>& axis) {
  AxisTaps<acc_t> result;
  result.offsets.reserve(axis.num_bins + 1);
  result.offsets.push_back(0);
  int first = axis.size, last = -1;
  for (int bin = 0; bin < axis.num_bins; ++bin) {
    for_each_tap(axis, bin, samples_near(axis, bin, 0, axis.size - 1), [&](int cell, acc_t weight) {
      result.taps.push_back({cell, weight});
      first = std::min(first, cell);
      last = std::max(last, cell);
    });
    result.offsets.push_back(static_cast<int>(result.taps.size()));
  }
  // Few samples in a large RoI leave gaps between their cells. Where gaps would outweigh the cells, only the cells
  // that are read are listed; else the whole stretch is, so that loops along it run over neighbours.
  const int stretch = last - first + 1;
  result.contiguous = stretch <= 2 * static_cast<int>(result.taps.size());
  if (result.contiguous) {
    result.cells.resize(std::max(stretch, 0));
    for (int i = 0; i < stretch; ++i) {
      result.cells[i] = first + i;
    }
    for (auto& tap : result.taps) {
      tap.cell -= first;
    }
  } else {
    for (const auto& tap : result.taps) {
      result.cells.push_back(tap.cell);
    }
    std::sort(result.cells.begin(), result.cells.end());
    result.cells.erase(std::unique(result.cells.begin(), result.cells.end()), result.cells.end());
    for (auto& tap : result.taps) {
      tap.cell =
          static_cast<int>(std::lower_bound(result.cells.begin(), result.cells.end(), tap.cell) - result.cells.begin());
    }
  }
  return result;
}

// A row of `boxes`, ready to pool: an empty row has no map and no taps.
template <typename acc_t>
struct RoITaps {
  int image = 0;
  int level = kEmptyRow;
  AxisTaps<acc_t> y, x;
};

template <typename Params>
std::vector<RoITaps<typename Params::acc_t>> merge_taps_of_rois(const Params& params, const ParallelFor& parallel_for) {
  constexpr int64_t kGrain = 64;
  std::vector<RoITaps<typename Params::acc_t>> rois(params.num_rois);
  parallel_for(params.num_rois, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const auto roi = roi_at(params, k);
      if (roi.level >= 0) {
        rois[k] = {roi.image, roi.level, merge_taps(roi.y), merge_taps(roi.x)};
      }
    }
  });
  return rois;
}

}  // namespace roialign::cpu
