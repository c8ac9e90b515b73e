// CPU backward, grad_F += Wy^T * G * Wx for every RoI and channel. Each piece of work owns a part of the gradient,
// adds the RoIs that touch it in their order and writes every cell once: no atomics, no zero fill beforehand, the
// same bits whatever the number of threads. Knows no torch.
#include "taps.h"

namespace roialign::cpu {
namespace {

// The RoIs of each map in their order: those of map m, of image m / levels and level m % levels, are
// order[offsets[m] .. offsets[m + 1]).
struct RoIsByMap {
  std::vector<int64_t> offsets;
  std::vector<int64_t> order;
};

template <typename Params>
RoIsByMap sort_by_map(const Params& params, const std::vector<RoITaps<typename Params::acc_t>>& rois) {
  const int num_levels = params.rule.num_levels;
  RoIsByMap result;
  result.offsets.assign(int64_t(params.num_images) * num_levels + 1, 0);
  for (const auto& roi : rois) {
    if (roi.level >= 0) {
      ++result.offsets[int64_t(roi.image) * num_levels + roi.level + 1];
    }
  }
  for (size_t m = 1; m < result.offsets.size(); ++m) {
    result.offsets[m] += result.offsets[m - 1];
  }
  result.order.resize(result.offsets.back());
  std::vector<int64_t> next(result.offsets);
  for (size_t k = 0; k < rois.size(); ++k) {
    if (rois[k].level >= 0) {
      result.order[next[int64_t(rois[k].image) * num_levels + rois[k].level]++] = static_cast<int64_t>(k);
    }
  }
  return result;
}

// Sums of an owned part of a gradient: in place where it is stored as it is computed, else beside it.
template <typename scalar_t, typename acc_t>
class Accumulator {
 public:
  acc_t* start(scalar_t* grad, int64_t count) {
    acc_t* sums;
    if constexpr (std::is_same_v<scalar_t, acc_t>) {
      sums = grad;
    } else {
      buffer_.resize(count);
      sums = buffer_.data();
    }
    std::fill_n(sums, count, acc_t(0));
    return sums;
  }

  void finish(scalar_t* grad, int64_t count) {
    if constexpr (!std::is_same_v<scalar_t, acc_t>) {
      for (int64_t i = 0; i < count; ++i) {
        grad[i] = static_cast<scalar_t>(buffer_[i]);
      }
    }
  }

 private:
  std::vector<acc_t> buffer_;
};

// NCHW. A piece of work owns a channel of one map.
template <typename Params>
void gather_planes(const Params& params, const std::vector<RoITaps<typename Params::acc_t>>& rois,
                   const RoIsByMap& by_map, const ParallelFor& parallel_for) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  const int num_levels = params.rule.num_levels;
  const int64_t num_channels = params.num_channels;
  const int64_t bins = int64_t(params.bins_y) * params.bins_x;
  parallel_for(params.num_images * num_levels * num_channels, 1, [&](int64_t begin, int64_t end) {
    Accumulator<scalar_t, acc_t> accumulator;
    std::vector<acc_t> row;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t map = piece / num_channels, channel = piece % num_channels;
      const auto& level = params.levels[map % num_levels];
      scalar_t* grad = level.map + map / num_levels * level.stride_n + channel * level.stride_c;
      const int64_t num_cells = int64_t(level.height) * level.width;
      acc_t* plane = accumulator.start(grad, num_cells);
      for (int64_t i = by_map.offsets[map]; i < by_map.offsets[map + 1]; ++i) {
        const auto& roi = rois[by_map.order[i]];
        const scalar_t* grad_bins = params.pooled + (by_map.order[i] * num_channels + channel) * bins;
        const int width = roi.x.num_cells();
        row.resize(width);
        for (int p = 0; p < params.bins_y; ++p, grad_bins += params.bins_x) {
          std::fill(row.begin(), row.end(), acc_t(0));
          for (int q = 0; q < params.bins_x; ++q) {
            const acc_t grad_bin = static_cast<acc_t>(grad_bins[q]);
            for (int t = roi.x.offsets[q]; t < roi.x.offsets[q + 1]; ++t) {
              row[roi.x.taps[t].cell] += roi.x.taps[t].weight * grad_bin;
            }
          }
          for (int t = roi.y.offsets[p]; t < roi.y.offsets[p + 1]; ++t) {
            const acc_t weight = roi.y.taps[t].weight;
            acc_t* line = plane + int64_t(roi.y.cells[roi.y.taps[t].cell]) * level.width;
            if (roi.x.contiguous && width > 0) {
              line += roi.x.cells[0];
              for (int j = 0; j < width; ++j) {
                line[j] += weight * row[j];
              }
            } else {
              for (int j = 0; j < width; ++j) {
                line[roi.x.cells[j]] += weight * row[j];
              }
            }
          }
        }
      }
      accumulator.finish(grad, num_cells);
    }
  });
}

// channels_last. A piece of work owns a row of one map with all its channels; every loop over channels is a vector.
template <typename Params>
void gather_rows(const Params& params, const std::vector<RoITaps<typename Params::acc_t>>& rois,
                 const RoIsByMap& by_map, const ParallelFor& parallel_for) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  constexpr int kChannels = 128;
  const int num_levels = params.rule.num_levels;
  const int64_t num_channels = params.num_channels;
  std::vector<std::pair<int64_t, int>> rows;  // map, row
  for (int64_t map = 0; map < int64_t(params.num_images) * num_levels; ++map) {
    for (int y = 0; y < params.levels[map % num_levels].height; ++y) {
      rows.emplace_back(map, y);
    }
  }
  parallel_for(static_cast<int64_t>(rows.size()), 1, [&](int64_t begin, int64_t end) {
    Accumulator<scalar_t, acc_t> accumulator;
    for (int64_t piece = begin; piece < end; ++piece) {
      const auto [map, y] = rows[piece];
      const auto& level = params.levels[map % num_levels];
      scalar_t* grad = level.map + map / num_levels * level.stride_n + y * level.stride_h;
      acc_t* line = accumulator.start(grad, level.width * num_channels);
      for (int64_t i = by_map.offsets[map]; i < by_map.offsets[map + 1]; ++i) {
        const auto& roi = rois[by_map.order[i]];
        const auto& cells = roi.y.cells;
        const auto found = std::lower_bound(cells.begin(), cells.end(), y);
        if (found == cells.end() || *found != y) {
          continue;
        }
        const int cell = static_cast<int>(found - cells.begin());
        const scalar_t* grad_bins = params.pooled + by_map.order[i] * params.bins_y * params.bins_x * num_channels;
        for (int p = 0; p < params.bins_y; ++p) {
          acc_t weight_y = 0;
          for (int t = roi.y.offsets[p]; t < roi.y.offsets[p + 1]; ++t) {
            weight_y += roi.y.taps[t].cell == cell ? roi.y.taps[t].weight : acc_t(0);
          }
          if (weight_y == acc_t(0)) {
            continue;
          }
          for (int q = 0; q < params.bins_x; ++q) {
            const scalar_t* grad_bin = grad_bins + (int64_t(p) * params.bins_x + q) * num_channels;
            for (int64_t first = 0; first < num_channels; first += kChannels) {
              const int depth = static_cast<int>(std::min<int64_t>(kChannels, num_channels - first));
              acc_t scaled[kChannels];
              for (int c = 0; c < depth; ++c) {
                scaled[c] = weight_y * static_cast<acc_t>(grad_bin[first + c]);
              }
              for (int t = roi.x.offsets[q]; t < roi.x.offsets[q + 1]; ++t) {
                const acc_t weight_x = roi.x.taps[t].weight;
                acc_t* sums = line + roi.x.cells[roi.x.taps[t].cell] * num_channels + first;
                for (int c = 0; c < depth; ++c) {
                  sums[c] += weight_x * scaled[c];
                }
              }
            }
          }
        }
      }
      accumulator.finish(grad, level.width * num_channels);
    }
  });
}

}  // namespace

template <typename scalar_t, typename box_t>
void roi_align_backward(const RoIAlignParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  const auto rois = merge_taps_of_rois(params, parallel_for);
  const auto by_map = sort_by_map(params, rois);
  if (params.channels_last) {
    gather_rows(params, rois, by_map, parallel_for);
  } else {
    gather_planes(params, rois, by_map, parallel_for);
  }
}

#define ROIALIGN_INSTANTIATE(scalar_t, box_t) \
  template void roi_align_backward(const RoIAlignParams<scalar_t, box_t>&, const ParallelFor&);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cpu
