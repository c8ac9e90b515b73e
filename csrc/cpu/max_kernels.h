// Body of the CPU forward of max pooling. Part of for_each_target.h: stands in the namespace of an instruction set.

#include "channel_vectors.h"

// The greatest samples of one bin so far, and which they are.
template <typename acc_t, int kVectors>
struct Greatest {
  Vector<acc_t> value[kVectors];
  Indices<acc_t> winner[kVectors];

  Greatest() {
    for (int v = 0; v < kVectors; ++v) {
      value[v] = Vector<acc_t>{} - std::numeric_limits<acc_t>::infinity();
      winner[v] = Indices<acc_t>{};  // the first sample, if all are this small
    }
  }

  // A later sample wins if it is greater, or the first NaN.
  void take(int v, const Vector<acc_t>& sample, int index) {
    const auto wins = (sample > value[v]) | ((sample != sample) & (value[v] == value[v]));
    value[v] = wins ? sample : value[v];
    winner[v] = wins ? Indices<acc_t>{} + index : winner[v];
  }

  void take_outside() {
    for (int v = 0; v < kVectors; ++v) {
      take(v, Vector<acc_t>{}, -1);
    }
  }
};

// What a row of samples reads of one column of cells.
template <bool kChannelsLast, typename acc_t, int kVectors>
struct Column {
  int cell = -1;
  Vector<acc_t> value[kVectors];

  // `line` is the row above the samples. A cell without a share is not read, whatever stands in it.
  template <typename scalar_t>
  void load(int column, const Sample<acc_t>& y, const scalar_t* line, const FeatureLevel<scalar_t>& level, int lanes) {
    const scalar_t* cells = line + column * level.stride_w;
    cell = column;
    for (int v = 0; v < kVectors; ++v, cells += kLanes<acc_t> * level.stride_c) {
      value[v] = (acc_t(1) - y.fraction) * load_channels<kChannelsLast, acc_t>(cells, level.stride_c, lanes);
      if (y.fraction != acc_t(0)) {
        value[v] += y.fraction * load_channels<kChannelsLast, acc_t>(cells + level.stride_h, level.stride_c, lanes);
      }
    }
  }
};

// One bin of kVectors vectors of channels, the last `lanes` wide. `map` is at the first channel.
template <bool kChannelsLast, int kVectors, typename acc_t, typename scalar_t>
inline Greatest<acc_t, kVectors> greatest_of_bin(const SampleGrid<acc_t>& grid, int p, int q,
                                                 const FeatureLevel<scalar_t>& level, const scalar_t* map, int lanes) {
  constexpr int kL = kLanes<acc_t>;
  const auto &bin_y = grid.y.bins[p], &bin_x = grid.x.bins[q];
  Greatest<acc_t, kVectors> greatest;
  // Samples that are not in the table lie outside the map; the first of them in y-then-x order stands for all.
  if (bin_y.range.begin > 0 || bin_x.range.begin > 0) {
    greatest.take_outside();
  }
  int index = 0;
  for (int i = 0; i < bin_y.size(); ++i) {
    const Sample<acc_t>& y = grid.y.samples[bin_y.offset + i];
    const scalar_t* line = map + y.low * level.stride_h;
    Column<kChannelsLast, acc_t, kVectors> left, right;
    for (int j = 0; j < bin_x.size(); ++j, ++index) {
      const Sample<acc_t>& x = grid.x.samples[bin_x.offset + j];
      Vector<acc_t> sums[kVectors] = {};
      if (y.low >= 0 && x.low >= 0) {
        // Neighbouring samples share columns: two are kept, blended between their rows.
        if (left.cell != x.low) {
          right.cell == x.low ? static_cast<void>(left = right) : left.load(x.low, y, line, level, lanes);
        }
        const bool has_right = x.fraction != acc_t(0);
        if (has_right && right.cell != x.low + 1) {
          right.load(x.low + 1, y, line, level, lanes);
        }
        for (int v = 0; v < kVectors; ++v) {
          sums[v] = (acc_t(1) - x.fraction) * left.value[v];
          if (has_right) {
            sums[v] += x.fraction * right.value[v];
          }
        }
      }
      for (int v = 0; v < kVectors; ++v) {
        greatest.take(v, sums[v], index);
      }
    }
    if (bin_x.range.end < grid.x.axis->num_samples) {
      greatest.take_outside();
    }
  }
  if (bin_y.range.end < grid.y.axis->num_samples) {
    greatest.take_outside();
  }
  return greatest;
}

template <bool kChannelsLast, typename Params>
void pool_greatest(const Params& params, const PlacedRoIs<typename Params::acc_t>& placed,
                   const ParallelFor& parallel_for) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  constexpr int kL = kLanes<acc_t>;
  const PooledStrides strides = pooled_strides(params);
  const int64_t block_size = channels_in_block<kChannelsLast>(params);
  for_each_block<kChannelsLast>(params, placed, parallel_for, [&](int64_t k, int64_t block) {
    thread_local SampleGrid<acc_t> grid;
    const auto& roi = placed.rois[k];
    const int64_t begin = block * block_size, end = std::min<int64_t>(begin + block_size, params.num_channels);
    if (roi.level < 0) {
      const int64_t first = k * strides.row + (kChannelsLast ? 0 : begin * strides.channel);
      const int64_t count = (end - begin) * params.bins_y * params.bins_x;
      std::fill_n(params.pooled + first, count, scalar_t(0));
      std::fill_n(params.argmax + first, count, -1);
      return;
    }
    grid.make(roi);
    const auto& level = params.levels[roi.level];
    for_each_vector<acc_t, 2>(begin, end, [&](auto vectors, int64_t c, int lanes) {
      const scalar_t* map = level.map + roi.image * level.stride_n + c * level.stride_c;
      int64_t bin = k * strides.row + c * strides.channel;
      for (int p = 0; p < params.bins_y; ++p) {
        for (int q = 0; q < params.bins_x; ++q, bin += strides.bin) {
          const auto greatest = greatest_of_bin<kChannelsLast, vectors()>(grid, p, q, level, map, lanes);
          for (int v = 0; v < vectors(); ++v) {
            const int64_t first = bin + v * kL * strides.channel;
            store_channels<kChannelsLast, acc_t>(params.pooled + first, greatest.value[v], strides.channel, lanes);
            for (int i = 0; i < lanes; ++i) {
              params.argmax[first + i * strides.channel] = static_cast<int32_t>(greatest.winner[v][i]);
            }
          }
        }
      }
    });
  });
}
