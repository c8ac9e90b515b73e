// Bodies of the CPU gradients of max pooling. Part of for_each_target.h: stands in the namespace of an instruction set.

#include "channel_vectors.h"
#include "lines.h"

template <typename acc_t>
inline Indices<acc_t> load_some_winners(const int32_t* data, int count) {
  typedef int32_t Stored __attribute__((vector_size(kLanes<acc_t> * sizeof(int32_t))));
  Stored stored = {};
  if (count == kLanes<acc_t>) {
    std::memcpy(&stored, data, sizeof(stored));
  } else {
    std::memcpy(&stored, data, count * sizeof(int32_t));
  }
  return __builtin_convertvector(stored, Indices<acc_t>);
}

// The gradient and the winners of a RoI's bins, [bin][vector].
template <typename acc_t>
class Bins {
 public:
  Vector<acc_t>* grads;
  Indices<acc_t>* winners;

  template <bool kChannelsLast, int kVectors, typename scalar_t>
  void read(const scalar_t* grad, const int32_t* argmax, int num_bins, const PooledStrides& strides, int lanes) {
    grads = grad_scratch_.resize(size_t(num_bins) * kVectors);
    winners = winner_scratch_.resize(size_t(num_bins) * kVectors);
    read<kChannelsLast, kVectors>(grad, num_bins, strides, lanes, load_some<acc_t, scalar_t>, grads);
    read<kChannelsLast, kVectors>(argmax, num_bins, strides, lanes, load_some_winners<acc_t>, winners);
  }

 private:
  // From where they lie in `pooled` or `argmax`; load_bins(data, count) reads neighbours.
  template <bool kChannelsLast, int kVectors, typename T, typename Load, typename V>
  static void read(const T* data, int num_bins, const PooledStrides& strides, int lanes, const Load& load_bins,
                   V* bins) {
    constexpr int kL = kLanes<acc_t>;
    if constexpr (kChannelsLast) {
      for (int bin = 0; bin < num_bins; ++bin, data += strides.bin) {
        for (int v = 0; v < kVectors; ++v) {
          *bins++ = load_bins(data + v * kL, lanes);
        }
      }
    } else {
      for (int begin = 0; begin < num_bins; begin += kL) {
        const int count = std::min(kL, num_bins - begin);
        for (int v = 0; v < kVectors; ++v) {
          V block[kL] = {};
          for (int c = 0; c < kL; ++c) {
            if (c < lanes) {
              block[c] = load_bins(data + (v * kL + c) * strides.channel + begin, count);
            }
          }
          transpose(block);
          for (int i = 0; i < kL; ++i) {
            if (i < count) {
              bins[(begin + i) * kVectors + v] = block[i];
            }
          }
        }
      }
    }
  }

  Scratch<Vector<acc_t>> grad_scratch_;
  Scratch<Indices<acc_t>> winner_scratch_;
};

// Adds kVectors vectors of channels of a RoI to the gradient of its map, the last of them `lanes` wide. A sample of
// which a channel is not the winner adds 0 to it, even where the bin's gradient is NaN.
template <bool kChannelsLast, int kVectors, typename acc_t>
inline void add_samples(const SampleGrid<acc_t>& grid, const LinePlan& plan, const FeatureLevel<acc_t>& level,
                        acc_t* map, const Bins<acc_t>& bins, int lanes, Scratch<acc_t>& line_scratch) {
  constexpr int kL = kLanes<acc_t>;
  const int bins_x = grid.x.axis->num_bins;
  const size_t line_size = size_t(plan.width) * kVectors * kL;
  acc_t* line = line_scratch.resize(line_size);
  for (int p = 0; p < grid.y.axis->num_bins; ++p) {
    const auto& bin_y = grid.y.bins[p];
    for (int i = 0; i < bin_y.size(); ++i) {
      const Sample<acc_t>& y = grid.y.samples[bin_y.offset + i];
      if (y.low < 0) {
        continue;
      }
      std::fill_n(line, line_size, acc_t(0));
      for (int q = 0; q < bins_x; ++q) {
        const auto& bin_x = grid.x.bins[q];
        const Vector<acc_t>* bin_grads = bins.grads + (p * bins_x + q) * kVectors;
        const Indices<acc_t>* bin_winners = bins.winners + (p * bins_x + q) * kVectors;
        for (int j = 0; j < bin_x.size(); ++j) {
          const Sample<acc_t>& x = grid.x.samples[bin_x.offset + j];
          if (x.low < 0) {
            continue;
          }
          const int index = i * bin_x.size() + j;
          acc_t* left = line + plan.offset_of<kVectors, acc_t>(grid.places[bin_x.offset + j]);
          for (int v = 0; v < kVectors; ++v, left += kL) {
            const Vector<acc_t> won = bin_winners[v] == index ? bin_grads[v] : Vector<acc_t>{};
            store<acc_t>(left, load<acc_t>(left) + (acc_t(1) - x.fraction) * won);
            if (x.fraction != acc_t(0)) {
              acc_t* right = left + kVectors * kL;
              store<acc_t>(right, load<acc_t>(right) + x.fraction * won);
            }
          }
        }
      }
      add_line<kChannelsLast, kVectors>(grid.columns, plan, level, map + y.low * level.stride_h, acc_t(1) - y.fraction,
                                        y.fraction, lanes, line);
    }
  }
}

// The same for channels [0, num_channels) of a map; `grad` and `argmax` are at the first.
template <bool kChannelsLast, typename acc_t, typename scalar_t>
void add_roi(const SampleGrid<acc_t>& grid, const FeatureLevel<acc_t>& sums, int64_t num_channels, const scalar_t* grad,
             const int32_t* argmax, const PooledStrides& strides) {
  thread_local Bins<acc_t> bins;
  thread_local Scratch<acc_t> line_scratch;
  if (!grid.has_few_samples) {
    return add_by_winner(grid, sums, num_channels, grad, argmax, strides);
  }
  const int num_bins = grid.y.axis->num_bins * grid.x.axis->num_bins;
  const LinePlan plan = plan_lines<kChannelsLast, acc_t>(grid.columns, sums.width);
  for_each_vector<acc_t, kVectorsAtATime<kChannelsLast, acc_t>>(
      0, num_channels, [&](auto vectors, int64_t c, int lanes) {
        const int64_t i = c * strides.channel;
        bins.template read<kChannelsLast, vectors()>(grad + i, argmax + i, num_bins, strides, lanes);
        add_samples<kChannelsLast, vectors()>(grid, plan, sums, sums.map + c * sums.stride_c, bins, lanes,
                                              line_scratch);
      });
}

// The gradient of some channels of one map: summed in place where it is stored as it is computed, else in a buffer.
template <bool kChannelsLast, typename scalar_t, typename acc_t>
class OwnedChannels {
  static constexpr bool kInPlace = std::is_same_v<scalar_t, acc_t>;

 public:
  FeatureLevel<acc_t> sums{};  // without its scales

  OwnedChannels(const FeatureLevel<scalar_t>& level, int64_t image, int64_t first_channel, int64_t num_channels,
                std::vector<acc_t>& buffer)
      : level_(level),
        grad_(level.map + image * level.stride_n + first_channel * level.stride_c),
        num_channels_(num_channels),
        num_cells_(int64_t(level.height) * level.width) {
    sums.height = level.height, sums.width = level.width;
    if constexpr (kInPlace) {
      sums.map = grad_;
      sums.stride_c = level.stride_c, sums.stride_h = level.stride_h, sums.stride_w = level.stride_w;
    } else {
      buffer.resize(num_channels * num_cells_);
      sums.map = buffer.data();
      sums.stride_c = kChannelsLast ? 1 : num_cells_;
      sums.stride_w = kChannelsLast ? num_channels : 1;
      sums.stride_h = sums.stride_w * level.width;
    }
    for_each_run([](scalar_t*, acc_t* sums, int64_t count) { std::fill_n(sums, count, acc_t(0)); });
  }

  void finish() {
    if constexpr (!kInPlace) {
      for_each_run([](scalar_t* grad, const acc_t* sums, int64_t count) {
        for_each_vector<acc_t, 1>(0, count, [&](auto, int64_t i, int lanes) {
          store_some<acc_t>(grad + i, load_some<acc_t>(sums + i, lanes), lanes);
        });
      });
    }
  }

 private:
  // Calls run(gradient, sums, count) for numbers that are neighbours in memory: planes, or the channels of a cell.
  template <typename Run>
  void for_each_run(const Run& run) {
    if constexpr (kChannelsLast) {
      for (int64_t i = 0; i < num_cells_; ++i) {
        run(grad_ + i * level_.stride_w, sums.map + i * sums.stride_w, num_channels_);
      }
    } else {
      run(grad_, sums.map, num_channels_ * num_cells_);
    }
  }

  const FeatureLevel<scalar_t>& level_;
  scalar_t* grad_;
  int64_t num_channels_, num_cells_;
};

// A piece of work owns a few channels of one map: it adds the RoIs in a fixed order and writes every cell once.
template <bool kChannelsLast, typename Params>
void add_winners(const Params& params, const PlacedRoIs<typename Params::acc_t>& placed,
                 const std::vector<SampleGrid<typename Params::acc_t>>& grids, const ParallelFor& parallel_for) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  constexpr int kL = kLanes<acc_t>;
  constexpr int64_t kBufferBytes = 6 << 20;  // of a thread's sums where they are not stored as computed
  const PooledStrides strides = pooled_strides(params);
  const int num_levels = params.rule.num_levels;
  // Neighbouring channels of channels_last maps share cache lines; planes of NCHW ones the cache.
  constexpr int64_t kMostChannels = kChannelsLast ? 64 : kPlanes;
  struct Piece {
    int64_t map, first_channel, last_channel;
  };
  std::vector<Piece> pieces;
  for (int64_t map = 0; map < int64_t(params.num_images) * num_levels; ++map) {
    const auto& level = params.levels[map % num_levels];
    const int64_t plane_bytes = int64_t(level.height) * level.width * sizeof(acc_t) + 1;
    int64_t step = kMostChannels;
    if constexpr (!std::is_same_v<scalar_t, acc_t>) {
      step = std::min(std::max<int64_t>(kBufferBytes / plane_bytes, 1), kMostChannels);
      step -= step > kL ? step % kL : 0;
    }
    for (int64_t c = 0; c < params.num_channels; c += step) {
      pieces.push_back({map, c, std::min<int64_t>(c + step, params.num_channels)});
    }
  }
  const int64_t num_pieces = static_cast<int64_t>(pieces.size());
  parallel_for(num_pieces, grain_of(num_cells_of(params) + num_bins_of(params), num_pieces),
               [&](int64_t begin, int64_t end) {
                 std::vector<acc_t> buffer;
                 for (int64_t piece = begin; piece < end; ++piece) {
                   const auto [map, first, last] = pieces[piece];
                   OwnedChannels<kChannelsLast, scalar_t, acc_t> owned(params.levels[map % num_levels],
                                                                       map / num_levels, first, last - first, buffer);
                   for (int64_t j = placed.offsets[map]; j < placed.offsets[map + 1]; ++j) {
                     const int64_t k = placed.order[j], first_bin = k * strides.row + first * strides.channel;
                     add_roi<kChannelsLast>(grids[k], owned.sums, last - first, params.pooled + first_bin,
                                            params.argmax + first_bin, strides);
                   }
                   owned.finish();
                 }
               });
}

// Adds to the gradient of the edges of a RoI what kVectors vectors of channels give, the last of them `lanes` wide.
template <bool kChannelsLast, int kVectors, typename acc_t, typename scalar_t>
inline void add_slopes(const SampleGrid<acc_t>& grid, const LinePlan& plan, const FeatureLevel<scalar_t>& level,
                       const scalar_t* map, const Bins<acc_t>& bins, int lanes, Scratch<acc_t>& line_scratch,
                       EdgeSums<acc_t>& sums) {
  constexpr int kL = kLanes<acc_t>;
  const int bins_x = grid.x.axis->num_bins;
  const size_t line_size = size_t(plan.width) * kVectors * kL;
  acc_t *line = line_scratch.resize(2 * line_size), *slope_line = line + line_size;
  for (int p = 0; p < grid.y.axis->num_bins; ++p) {
    const auto& bin_y = grid.y.bins[p];
    for (int i = 0; i < bin_y.size(); ++i) {
      const Sample<acc_t>& y = grid.y.samples[bin_y.offset + i];
      if (y.low < 0) {
        continue;
      }
      const scalar_t* cells = map + y.low * level.stride_h;
      read_line<kChannelsLast, kVectors>(grid.columns, plan, level, cells, acc_t(1) - y.fraction, y.fraction, lanes,
                                         line);
      if (y.moves) {
        read_line<kChannelsLast, kVectors>(grid.columns, plan, level, cells, acc_t(-1), acc_t(1), lanes, slope_line);
      }
      Vector<acc_t> sum_y = {};
      for (int q = 0; q < bins_x; ++q) {
        const auto& bin_x = grid.x.bins[q];
        const int bin = (p * bins_x + q) * kVectors;
        for (int j = 0; j < bin_x.size(); ++j) {
          const Sample<acc_t>& x = grid.x.samples[bin_x.offset + j];
          if (x.low < 0) {
            continue;
          }
          int64_t left = plan.offset_of<kVectors, acc_t>(grid.places[bin_x.offset + j]);
          Vector<acc_t> sum_x = {};
          for (int v = 0; v < kVectors; ++v, left += kL) {
            // Chosen after the product: what stands in cells of a sample that did not win may be infinite.
            const auto has_won = bins.winners[bin + v] == i * bin_x.size() + j;
            const Vector<acc_t> zero = {}, grad = bins.grads[bin + v];
            const Vector<acc_t> change_y = grad * (y.moves ? read_sample<kVectors>(x, slope_line + left) : zero);
            const Vector<acc_t> change_x =
                grad * (x.moves ? load<acc_t>(line + left + kVectors * kL) - load<acc_t>(line + left) : zero);
            sum_y += has_won ? change_y : zero;
            sum_x += has_won ? change_x : zero;
          }
          const acc_t share = grid.x.far_shares[bin_x.offset + j];
          sums.far_x += share * sum_x;
          sums.near_x += (acc_t(1) - share) * sum_x;
        }
      }
      const acc_t share = grid.y.far_shares[bin_y.offset + i];
      sums.far_y += share * sum_y;
      sums.near_y += (acc_t(1) - share) * sum_y;
    }
  }
}

template <bool kChannelsLast, typename Params>
void sum_winners(const Params& params, const PlacedRoIs<typename Params::acc_t>& placed,
                 const std::vector<SampleGrid<typename Params::acc_t>>& grids, const ParallelFor& parallel_for) {
  using acc_t = typename Params::acc_t;
  const PooledStrides strides = pooled_strides(params);
  const auto run = [&](int64_t k, int64_t first, int64_t last) {
    thread_local Bins<acc_t> bins;
    thread_local Scratch<acc_t> line_scratch;
    const auto& roi = placed.rois[k];
    const SampleGrid<acc_t>& grid = grids[k];
    const auto& level = params.levels[roi.level];
    const auto* map = level.map + roi.image * level.stride_n + first * level.stride_c;
    const auto* grad = params.pooled + k * strides.row + first * strides.channel;
    const int32_t* argmax = params.argmax + k * strides.row + first * strides.channel;
    if (!grid.has_few_samples) {
      return edges_by_winner(grid, level, map, last - first, grad, argmax, strides);
    }
    const LinePlan plan = plan_lines<kChannelsLast, acc_t>(grid.columns, level.width);
    EdgeSums<acc_t> sums;
    for_each_vector<acc_t, kVectorsAtATime<kChannelsLast, acc_t>>(
        0, last - first, [&](auto vectors, int64_t c, int lanes) {
          const int64_t i = c * strides.channel;
          bins.template read<kChannelsLast, vectors()>(grad + i, argmax + i, params.bins_y * params.bins_x, strides,
                                                       lanes);
          add_slopes<kChannelsLast, vectors()>(grid, plan, level, map + c * level.stride_c, bins, lanes, line_scratch,
                                               sums);
        });
    return total(sums);
  };
  const int64_t block_size = channels_in_block<kChannelsLast>(params, kPlanes);
  sum_edges<kChannelsLast>(params, placed, block_size, params.grad_boxes, parallel_for, run);
}
