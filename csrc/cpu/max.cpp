// CPU max pooling: the forward with a vector of channels at a time, and what reads its winners. Knows no torch.
#include "placed_rois.h"
#include "taps.h"

#include <array>
#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace roialign::cpu {
namespace {

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

  // Inlined into a kernel that fuses multiplications with additions, it would place samples an ulp elsewhere than the
  // rest of the code does.
  __attribute__((noinline)) void make(const Axis<acc_t>& axis_) {
    axis = &axis_;
    bins.clear();
    samples.clear();
    for (int bin = 0; bin < axis->num_bins; ++bin) {
      const Range range = samples_near(*axis, bin, 0, axis->size - 1);
      bins.push_back({range, static_cast<int>(samples.size()), 1.0 / std::max(range.end - range.begin, 1)});
      for (int i = range.begin; i < range.end; ++i) {
        samples.push_back(sample_at(*axis, bin, i));
      }
    }
  }
};

// Both axes of a RoI, and the way from a winner to its samples.
template <typename acc_t>
struct SampleGrid {
  SampleTable<acc_t> y, x;

  void make(const RoI<acc_t>& roi) {
    y.make(roi.y);
    x.make(roi.x);
  }

  // Calls read(sample along y, sample along x, index of the former, of the latter) for a winner of bin (p, q), if it
  // is one and lies on the map.
  template <typename Read>
  void at(int p, int q, int winner, const Read& read) const {
    const auto &bin_y = y.bins[p], &bin_x = x.bins[q];
    // Anything may stand in a tensor of winners that someone hands to the operator.
    if (winner < 0 || winner >= int64_t(bin_y.size()) * bin_x.size()) {
      return;
    }
    // A division of integers would be the most of this; half a sample from the next integer this one is exact.
    const int i = static_cast<int>((winner + 0.5) * bin_x.share), j = winner - i * bin_x.size();
    const Sample<acc_t>&sample_y = y.samples[bin_y.offset + i], &sample_x = x.samples[bin_x.offset + j];
    if (sample_y.low >= 0 && sample_x.low >= 0) {
      read(sample_y, sample_x, bin_y.range.begin + i, bin_x.range.begin + j);
    }
  }
};

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

}  // namespace
}  // namespace roialign::cpu

#define ROIALIGN_KERNELS "max_kernels.h"
#include "for_each_target.h"

namespace roialign::cpu {
namespace {

constexpr int64_t kRoIsAtATime = 8;

// The channels of every row of `boxes` with its samples: calls run(row, roi, samples), each once; without a map,
// run_empty(row).
template <typename Params, typename Run, typename RunEmpty>
void for_each_row(const Params& params, const ParallelFor& parallel_for, const Run& run, const RunEmpty& run_empty) {
  using acc_t = typename Params::acc_t;
  parallel_for(params.num_rois, std::max(kRoIsAtATime, grain_of(num_bins_of(params), params.num_rois)),
               [&](int64_t begin, int64_t end) {
                 SampleGrid<acc_t> grid;
                 for (int64_t k = begin; k < end; ++k) {
                   const auto roi = roi_at(params, k);
                   if (roi.level < 0) {
                     run_empty(k);
                   } else {
                     grid.make(roi);
                     run(k, roi, grid);
                   }
                 }
               });
}

// Sums of an owned part of a gradient, [channels of the part, H, W]: in place where it is stored as it is computed,
// else beside it.
template <typename Params>
class OwnedChannels {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  static constexpr bool kInPlace = std::is_same_v<scalar_t, acc_t>;

 public:
  int64_t stride_c, stride_h, stride_w;

  OwnedChannels(const FeatureLevel<scalar_t>& level, int64_t image, int64_t first_channel, int64_t num_channels,
                std::vector<acc_t>& buffer)
      : level_(level),
        grad_(level.map + image * level.stride_n + first_channel * level.stride_c),
        num_channels_(num_channels) {
    if constexpr (kInPlace) {
      sums_ = grad_;
      stride_c = level.stride_c, stride_h = level.stride_h, stride_w = level.stride_w;
    } else {
      buffer.resize(num_channels * level.height * level.width);
      sums_ = buffer.data();
      stride_c = 1, stride_w = num_channels, stride_h = stride_w * level.width;
    }
    for_each([](scalar_t&, acc_t& sum) { sum = acc_t(0); });
  }

  acc_t& sum(int64_t c, int y, int x) { return sums_[c * stride_c + y * stride_h + x * stride_w]; }

  void finish() {
    if constexpr (!kInPlace) {
      for_each([](scalar_t& grad, acc_t& sum) { grad = static_cast<scalar_t>(sum); });
    }
  }

 private:
  template <typename Run>
  void for_each(const Run& run) {
    const auto along_row = [&](int64_t c, int y, int x) {
      run(grad_[c * level_.stride_c + y * level_.stride_h + x * level_.stride_w], sum(c, y, x));
    };
    for (int64_t c = 0; level_.stride_c != 1 && c < num_channels_; ++c) {
      for (int y = 0; y < level_.height; ++y) {
        for (int x = 0; x < level_.width; ++x) {
          along_row(c, y, x);
        }
      }
    }
    for (int y = 0; level_.stride_c == 1 && y < level_.height; ++y) {
      for (int x = 0; x < level_.width; ++x) {
        for (int64_t c = 0; c < num_channels_; ++c) {
          along_row(c, y, x);
        }
      }
    }
  }

  const FeatureLevel<scalar_t>& level_;
  scalar_t* grad_;
  acc_t* sums_;
  int64_t num_channels_;
};

}  // namespace

template <typename scalar_t, typename box_t>
void roi_max_forward(const MaxParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  const auto placed = place(params);
  if (params.channels_last) {
    ROIALIGN_DISPATCH(pool_greatest<true>(params, placed, parallel_for));
  } else {
    ROIALIGN_DISPATCH(pool_greatest<false>(params, placed, parallel_for));
  }
}

template <typename scalar_t, typename box_t>
void roi_max_gather(const MaxParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  using acc_t = typename MaxParams<scalar_t, box_t>::acc_t;
  const PooledStrides strides = pooled_strides(params);
  const auto run = [&](int64_t k, const auto& roi, const auto& grid) {
    const auto& level = params.levels[roi.level];
    for (int c = 0; c < params.num_channels; ++c) {
      const scalar_t* map = level.map + roi.image * level.stride_n + c * level.stride_c;
      int64_t i = k * strides.row + c * strides.channel;
      for (int p = 0; p < params.bins_y; ++p) {
        for (int q = 0; q < params.bins_x; ++q, i += strides.bin) {
          acc_t sum = 0;
          grid.at(p, q, params.argmax[i], [&](const auto& y, const auto& x, int, int) {
            for_each_cell(y, x, [&](int row, int column, acc_t weight) {
              sum += weight * static_cast<acc_t>(map[row * level.stride_h + column * level.stride_w]);
            });
          });
          params.pooled[i] = static_cast<scalar_t>(sum);
        }
      }
    }
  };
  const auto run_empty = [&](int64_t k) { std::fill_n(params.pooled + k * strides.row, strides.row, scalar_t(0)); };
  for_each_row(params, parallel_for, run, run_empty);
}

// A piece of work owns a few channels of one map: it adds the RoIs in a fixed order and writes every cell once.
template <typename scalar_t, typename box_t>
void roi_max_backward(const MaxParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  using Params = MaxParams<scalar_t, box_t>;
  using acc_t = typename Params::acc_t;
  constexpr int64_t kBufferBytes = 4 << 20;
  const auto placed = place(params);
  const PooledStrides strides = pooled_strides(params);
  const int num_levels = params.rule.num_levels;
  // Neighbouring channels of channels_last maps share cache lines and the taps of a RoI; planes of NCHW ones the cache.
  const int64_t most_channels = params.channels_last ? 64 : 8;
  const bool in_place = std::is_same_v<scalar_t, acc_t>;
  struct Piece {
    int64_t map, first_channel, last_channel;
  };
  std::vector<Piece> pieces;
  for (int64_t map = 0; map < int64_t(params.num_images) * num_levels; ++map) {
    const auto& level = params.levels[map % num_levels];
    const int64_t plane_bytes = int64_t(level.height) * level.width * sizeof(acc_t) + 1;
    const int64_t step =
        in_place ? most_channels : std::min(std::max<int64_t>(kBufferBytes / plane_bytes, 1), most_channels);
    for (int64_t c = 0; c < params.num_channels; c += step) {
      pieces.push_back({map, c, std::min<int64_t>(c + step, params.num_channels)});
    }
  }
  const int64_t num_pieces = static_cast<int64_t>(pieces.size());
  parallel_for(
      num_pieces, grain_of(num_cells_of(params) + num_bins_of(params), num_pieces), [&](int64_t begin, int64_t end) {
        SampleGrid<acc_t> grid;
        std::vector<acc_t> buffer;
        for (int64_t piece = begin; piece < end; ++piece) {
          const auto [map, first, last] = pieces[piece];
          OwnedChannels<Params> owned(params.levels[map % num_levels], map / num_levels, first, last - first, buffer);
          for (int64_t j = placed.offsets[map]; j < placed.offsets[map + 1]; ++j) {
            const int64_t k = placed.order[j];
            grid.make(placed.rois[k]);
            for (int bin = 0; bin < params.bins_y * params.bins_x; ++bin) {
              for (int64_t c = first; c < last; ++c) {
                const int64_t i = k * strides.row + c * strides.channel + bin * strides.bin;
                const auto add = [&](const auto& y, const auto& x, int, int) {
                  const acc_t grad = static_cast<acc_t>(params.pooled[i]);
                  for_each_cell(y, x, [&](int row, int column, acc_t weight) {
                    owned.sum(c - first, row, column) += weight * grad;
                  });
                };
                grid.at(bin / params.bins_x, bin % params.bins_x, params.argmax[i], add);
              }
            }
          }
          owned.finish();
        }
      });
}

template <typename scalar_t, typename box_t>
void roi_max_backward_boxes(const MaxParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  using acc_t = typename MaxParams<scalar_t, box_t>::acc_t;
  const PooledStrides strides = pooled_strides(params);
  const auto run = [&](int64_t k, const auto& roi, const auto& grid) {
    const auto& level = params.levels[roi.level];
    acc_t near_y = 0, far_y = 0, near_x = 0, far_x = 0;
    for (int c = 0; c < params.num_channels; ++c) {
      const scalar_t* map = level.map + roi.image * level.stride_n + c * level.stride_c;
      int64_t i = k * strides.row + c * strides.channel;
      for (int p = 0; p < params.bins_y; ++p) {
        for (int q = 0; q < params.bins_x; ++q, i += strides.bin) {
          grid.at(p, q, params.argmax[i], [&](const auto& y, const auto& x, int sample_y, int sample_x) {
            const auto cell = [&](int dy, int dx) {
              return static_cast<acc_t>(map[(y.low + dy) * level.stride_h + (x.low + dx) * level.stride_w]);
            };
            const acc_t grad = static_cast<acc_t>(params.pooled[i]);
            const Slopes<acc_t> slopes = slopes_at(y, x, cell);
            const acc_t share_y = share_of_far_edge(roi.y, p, sample_y),
                        share_x = share_of_far_edge(roi.x, q, sample_x);
            far_y += grad * slopes.y * share_y;
            near_y += grad * slopes.y * (acc_t(1) - share_y);
            far_x += grad * slopes.x * share_x;
            near_x += grad * slopes.x * (acc_t(1) - share_x);
          });
        }
      }
    }
    const acc_t scale_y = acc_t(level.scale_y), scale_x = acc_t(level.scale_x);
    const std::array<acc_t, 5> columns{0, near_x * scale_x, near_y * scale_y, far_x * scale_x, far_y * scale_y};
    std::copy(columns.begin(), columns.end(), params.grad_boxes + k * columns.size());
  };
  for_each_row(params, parallel_for, run, [&](int64_t k) { std::fill_n(params.grad_boxes + k * 5, 5, box_t(0)); });
}

#define ROIALIGN_INSTANTIATE(scalar_t, box_t)                                            \
  template void roi_max_forward(const MaxParams<scalar_t, box_t>&, const ParallelFor&);  \
  template void roi_max_gather(const MaxParams<scalar_t, box_t>&, const ParallelFor&);   \
  template void roi_max_backward(const MaxParams<scalar_t, box_t>&, const ParallelFor&); \
  template void roi_max_backward_boxes(const MaxParams<scalar_t, box_t>&, const ParallelFor&);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cpu
