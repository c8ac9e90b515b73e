// The samples of max pooling's RoIs, and the way from a winner to its sample. Knows no torch.
#pragma once

#include "columns.h"
#include "placed_rois.h"
#include "taps.h"

namespace roialign::cpu {

// The samples of every bin along one axis, but for those too far from the map to read it.
template <typename acc_t>
struct SampleTable {
  // Those of one bin: samples [range.begin, range.end), the first of them at samples[offset].
  struct Bin {
    Range range;
    int offset;
    double share;  // of one sample in size()
    int size() const { return range.end - range.begin; }
  };
  const Axis<acc_t>* axis = nullptr;
  std::vector<Bin> bins;
  std::vector<Sample<acc_t>> samples;
  std::vector<acc_t> far_shares;  // [samples]: how far each moves with the far edge of the RoI

  // Inlined into a kernel that fuses multiplications with additions, it would place samples an ulp elsewhere than the
  // rest of the code does.
  __attribute__((noinline)) void make(const Axis<acc_t>& axis_) {
    axis = &axis_;
    for (int bin = 0; bin < axis->num_bins; ++bin) {
      const Range range = samples_near(*axis, bin, 0, axis->size - 1);
      bins.push_back({range, static_cast<int>(samples.size()), 1.0 / std::max(range.end - range.begin, 1)});
      for (int i = range.begin; i < range.end; ++i) {
        samples.push_back(sample_at(*axis, bin, i));
        far_shares.push_back(share_of_far_edge(*axis, bin, i));
      }
    }
  }
};

// Both axes of a RoI, and the way from a winner to its samples.
template <typename acc_t>
struct SampleGrid {
  SampleTable<acc_t> y, x;
  Columns columns;          // that samples read
  std::vector<int> places;  // [x.samples]: of their cells `low` among the columns; the right neighbours follow them
  // To look at every sample for a vector of channels at a time takes longer than to look up the winner of each channel
  // where a bin has many.
  bool has_few_samples = false;

  void make(const RoI<acc_t>& roi, bool fill_gaps) {
    constexpr int kFewSamples = 32;  // they take equally long at some 28 in NCHW, at some 55 in channels_last
    y.make(roi.y);
    x.make(roi.x);
    has_few_samples = int64_t(largest_bin(y)) * largest_bin(x) <= kFewSamples;
    std::vector<int> cells;
    for (const Sample<acc_t>& sample : x.samples) {
      if (sample.low >= 0) {
        cells.push_back(sample.low);
        if (sample.fraction != acc_t(0) || sample.moves) {
          cells.push_back(sample.low + 1);
        }
      }
    }
    columns = Columns(std::move(cells), fill_gaps);
    for (const Sample<acc_t>& sample : x.samples) {
      places.push_back(columns.index_of(sample.low));
    }
  }

  // Calls read(index of the sample along y, index of that along x) for a winner of bin (p, q), if it is one and lies
  // on the map.
  template <typename Read>
  void at(int p, int q, int winner, const Read& read) const {
    const auto &bin_y = y.bins[p], &bin_x = x.bins[q];
    // Anything may stand in a tensor of winners that someone hands to the operator.
    if (winner < 0 || winner >= int64_t(bin_y.size()) * bin_x.size()) {
      return;
    }
    // A division of integers would be the most of this; half a sample from the next integer this one is exact.
    const int i = static_cast<int>((winner + 0.5) * bin_x.share), j = winner - i * bin_x.size();
    if (y.samples[bin_y.offset + i].low >= 0 && x.samples[bin_x.offset + j].low >= 0) {
      read(bin_y.offset + i, bin_x.offset + j);
    }
  }

 private:
  static int largest_bin(const SampleTable<acc_t>& table) {
    int size = 0;
    for (const auto& bin : table.bins) {
      size = std::max(size, bin.size());
    }
    return size;
  }
};

// Of every RoI, made once and read by every channel.
template <typename Params>
std::vector<SampleGrid<typename Params::acc_t>> make_grids(const Params& params,
                                                           const PlacedRoIs<typename Params::acc_t>& placed,
                                                           const ParallelFor& parallel_for) {
  constexpr int64_t kGrain = 64;
  std::vector<SampleGrid<typename Params::acc_t>> grids(params.num_rois);
  parallel_for(params.num_rois, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (placed.rois[k].level >= 0) {
        grids[k].make(placed.rois[k], !params.channels_last);
      }
    }
  });
  return grids;
}

// The four cells around a sample; a cell without a share is not read, whatever stands in it.
template <typename acc_t, typename Tap>
inline void for_each_cell(const Sample<acc_t>& y, const Sample<acc_t>& x, const Tap& tap) {
  for (int i = 0; i <= (y.fraction != acc_t(0)); ++i) {
    const acc_t weight_y = i == 0 ? acc_t(1) - y.fraction : y.fraction;
    for (int j = 0; j <= (x.fraction != acc_t(0)); ++j) {
      tap(y.low + i, x.low + j, weight_y * (j == 0 ? acc_t(1) - x.fraction : x.fraction));
    }
  }
}

}  // namespace roialign::cpu
