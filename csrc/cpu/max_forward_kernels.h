// Body of the CPU forward of max pooling. Part of for_each_target.h: stands in the namespace of an instruction set.

#include "channel_vectors.h"
#include "lines.h"

template <typename acc_t>
inline void store_some_winners(int32_t* data, const Indices<acc_t>& winners, int count) {
  typedef int32_t Stored __attribute__((vector_size(kLanes<acc_t> * sizeof(int32_t))));
  const Stored stored = __builtin_convertvector(winners, Stored);
  if (count == kLanes<acc_t>) {
    std::memcpy(data, &stored, sizeof(stored));
  } else {
    std::memcpy(data, &stored, count * sizeof(int32_t));
  }
}

// The greatest samples of a bin so far, and which they are.
template <typename acc_t>
struct Greatest {
  Vector<acc_t> value;
  Indices<acc_t> winner;

  void start() {
    value = Vector<acc_t>{} - std::numeric_limits<acc_t>::infinity();
    winner = Indices<acc_t>{};  // the first sample, if all are this small
  }

  // A later sample wins if it is greater, or the first NaN.
  void take(const Vector<acc_t>& sample, int index) {
    const auto wins = (sample > value) | ((sample != sample) & (value == value));
    value = wins ? sample : value;
    winner = wins ? Indices<acc_t>{} + index : winner;
  }
};

// The greatest samples of a row of bins: greatest[bin][vector]. `map` is at the first channel.
template <bool kChannelsLast, int kVectors, typename acc_t, typename scalar_t>
inline void pool_row(const SampleGrid<acc_t>& grid, const LinePlan& plan, int p, const FeatureLevel<scalar_t>& level,
                     const scalar_t* map, int lanes, acc_t* line, Greatest<acc_t>* greatest) {
  constexpr int kL = kLanes<acc_t>;
  const auto& bin_y = grid.y.bins[p];
  // Samples that are not in the table lie outside the map; the first of them in y-then-x order stands for all.
  const auto take_outside = [&](int q) {
    for (int v = 0; v < kVectors; ++v) {
      greatest[q * kVectors + v].take(Vector<acc_t>{}, -1);
    }
  };
  const int bins_x = grid.x.axis->num_bins;
  for (int q = 0; q < bins_x; ++q) {
    for (int v = 0; v < kVectors; ++v) {
      greatest[q * kVectors + v].start();
    }
    if (bin_y.range.begin > 0 || grid.x.bins[q].range.begin > 0) {
      take_outside(q);
    }
  }
  for (int i = 0; i < bin_y.size(); ++i) {
    const Sample<acc_t>& y = grid.y.samples[bin_y.offset + i];
    if (y.low >= 0) {
      read_line<kChannelsLast, kVectors>(grid.columns, plan, level, map + y.low * level.stride_h, acc_t(1) - y.fraction,
                                         y.fraction, lanes, line);
    }
    for (int q = 0; q < bins_x; ++q) {
      const auto& bin_x = grid.x.bins[q];
      for (int j = 0; j < bin_x.size(); ++j) {
        const Sample<acc_t>& x = grid.x.samples[bin_x.offset + j];
        const bool is_on_map = y.low >= 0 && x.low >= 0;
        const acc_t* left = line + plan.offset_of<kVectors, acc_t>(grid.places[bin_x.offset + j]);
        for (int v = 0; v < kVectors; ++v, left += kL) {
          const Vector<acc_t> value = is_on_map ? read_sample<kVectors>(x, left) : Vector<acc_t>{};
          greatest[q * kVectors + v].take(value, i * bin_x.size() + j);
        }
      }
      if (bin_x.range.end < grid.x.axis->num_samples) {
        take_outside(q);
      }
    }
  }
  for (int q = 0; bin_y.range.end < grid.y.axis->num_samples && q < bins_x; ++q) {
    take_outside(q);
  }
}

// Stores a vector of channels of every bin, bin_of(index), to where they lie in `pooled` or `argmax`;
// store_bin(data, vector, count) writes neighbours.
template <bool kChannelsLast, typename acc_t, typename T, typename BinOf, typename Store>
inline void write_bins(T* data, int num_bins, const PooledStrides& strides, int lanes, const BinOf& bin_of,
                       const Store& store_bin) {
  constexpr int kL = kLanes<acc_t>;
  if constexpr (kChannelsLast) {
    for (int bin = 0; bin < num_bins; ++bin) {
      store_bin(data + bin * strides.bin, bin_of(bin), lanes);
    }
  } else {
    for (int begin = 0; begin < num_bins; begin += kL) {
      const int count = std::min(kL, num_bins - begin);
      std::decay_t<decltype(bin_of(0))> block[kL] = {};
      for (int i = 0; i < kL; ++i) {
        if (i < count) {
          block[i] = bin_of(begin + i);
        }
      }
      transpose(block);
      for (int c = 0; c < kL; ++c) {
        if (c < lanes) {
          store_bin(data + c * strides.channel + begin, block[c], count);
        }
      }
    }
  }
}

template <bool kChannelsLast, typename Params>
void pool_greatest(const Params& params, const PlacedRoIs<typename Params::acc_t>& placed,
                   const std::vector<SampleGrid<typename Params::acc_t>>& grids, const ParallelFor& parallel_for) {
  using acc_t = typename Params::acc_t;
  using scalar_t = typename Params::scalar_t;
  constexpr int kL = kLanes<acc_t>;
  const PooledStrides strides = pooled_strides(params);
  const int num_bins = params.bins_y * params.bins_x;
  const int64_t block_size = channels_in_block<kChannelsLast>(params, kPlanes);
  for_each_block<kChannelsLast>(params, placed, block_size, parallel_for, [&](int64_t k, int64_t block) {
    thread_local Scratch<acc_t> line_scratch;
    thread_local Scratch<Greatest<acc_t>> greatest_scratch;
    const auto& roi = placed.rois[k];
    const int64_t begin = block * block_size, end = std::min<int64_t>(begin + block_size, params.num_channels);
    if (roi.level < 0) {
      const int64_t first = k * strides.row + begin * strides.channel;
      std::fill_n(params.pooled + first, (end - begin) * num_bins, scalar_t(0));
      std::fill_n(params.argmax + first, (end - begin) * num_bins, -1);
      return;
    }
    const SampleGrid<acc_t>& grid = grids[k];
    const auto& level = params.levels[roi.level];
    const LinePlan plan = plan_lines<kChannelsLast, acc_t>(grid.columns, level.width);
    for_each_vector<acc_t, kVectorsAtATime<kChannelsLast, acc_t>>(begin, end, [&](auto vectors, int64_t c, int lanes) {
      acc_t* line = line_scratch.resize(size_t(plan.width) * vectors() * kL);
      Greatest<acc_t>* greatest = greatest_scratch.resize(size_t(num_bins) * vectors());
      const scalar_t* map = level.map + roi.image * level.stride_n + c * level.stride_c;
      for (int p = 0; p < params.bins_y; ++p) {
        pool_row<kChannelsLast, vectors()>(grid, plan, p, level, map, lanes, line,
                                           greatest + p * params.bins_x * vectors());
      }
      for (int v = 0; v < vectors(); ++v) {
        const int64_t first = k * strides.row + (c + v * kL) * strides.channel;
        write_bins<kChannelsLast, acc_t>(
            params.pooled + first, num_bins, strides, lanes,
            [&](int bin) { return greatest[bin * vectors() + v].value; }, store_some<acc_t, scalar_t>);
        write_bins<kChannelsLast, acc_t>(
            params.argmax + first, num_bins, strides, lanes,
            [&](int bin) { return greatest[bin * vectors() + v].winner; }, store_some_winners<acc_t>);
      }
    });
  });
}
