// CPU forward, out = Wy * F * Wx^T for every RoI and channel: a pass along y makes one row of a RoI for a row of
// bins, a pass along x reduces it to bins. Knows no torch.
#include "taps.h"

namespace roialign::cpu {
namespace {

// NCHW. A piece of work is a block of channels and a run of RoIs: the block's planes stay in cache while the RoIs
// pass over them, and rows are vectors along x.
template <typename Params>
void pool_planes(const Params& params, const std::vector<RoITaps<typename Params::acc_t>>& rois,
                 const ParallelFor& parallel_for) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  constexpr int kChannels = 4;
  constexpr int64_t kRois = 256;
  const int64_t num_runs = (params.num_rois + kRois - 1) / kRois;
  const int64_t num_blocks = (params.num_channels + kChannels - 1) / kChannels;
  const int64_t bins = int64_t(params.bins_y) * params.bins_x;

  // Row of the RoI for bin row `bin`, from the cells of `plane` that its taps read.
  const auto make_row = [](const auto& roi, int bin, const scalar_t* plane, int64_t stride_h, acc_t* row) {
    const int width = roi.x.num_cells();
    std::fill_n(row, width, acc_t(0));
    for (int t = roi.y.offsets[bin]; t < roi.y.offsets[bin + 1]; ++t) {
      const acc_t weight = roi.y.taps[t].weight;
      const scalar_t* line = plane + roi.y.cells[roi.y.taps[t].cell] * stride_h;
      if (roi.x.contiguous) {
        line += roi.x.cells[0];
        for (int i = 0; i < width; ++i) {
          row[i] += weight * static_cast<acc_t>(line[i]);
        }
      } else {
        for (int i = 0; i < width; ++i) {
          row[i] += weight * static_cast<acc_t>(line[roi.x.cells[i]]);
        }
      }
    }
  };

  parallel_for(num_blocks * num_runs, 1, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> row;
    for (int64_t piece = begin; piece < end; ++piece) {
      const int first_channel = static_cast<int>(piece / num_runs) * kChannels;
      const int last_channel = std::min(first_channel + kChannels, params.num_channels);
      const int64_t first_roi = piece % num_runs * kRois;
      const int64_t last_roi = std::min(first_roi + kRois, params.num_rois);
      for (int64_t k = first_roi; k < last_roi; ++k) {
        const auto& roi = rois[k];
        scalar_t* out = params.pooled + (k * params.num_channels + first_channel) * bins;
        if (roi.level < 0) {
          std::fill_n(out, (last_channel - first_channel) * bins, scalar_t(0));
          continue;
        }
        const auto& level = params.levels[roi.level];
        row.resize(roi.x.num_cells());
        for (int c = first_channel; c < last_channel; ++c) {
          const scalar_t* plane = level.map + roi.image * level.stride_n + c * level.stride_c;
          for (int p = 0; p < params.bins_y; ++p) {
            make_row(roi, p, plane, level.stride_h, row.data());
            for (int q = 0; q < params.bins_x; ++q) {
              acc_t sum = 0;
              for (int t = roi.x.offsets[q]; t < roi.x.offsets[q + 1]; ++t) {
                sum += roi.x.taps[t].weight * row[roi.x.taps[t].cell];
              }
              *out++ = static_cast<scalar_t>(sum);
            }
          }
        }
      }
    }
  });
}

// channels_last. A piece of work is a run of RoIs; every loop over channels is a vector.
template <typename Params>
void pool_channels(const Params& params, const std::vector<RoITaps<typename Params::acc_t>>& rois,
                   const ParallelFor& parallel_for) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  constexpr int kChannels = 128;  // a row of a RoI, this deep, stays in cache
  constexpr int64_t kRois = 4;
  parallel_for(params.num_rois, kRois, [&](int64_t begin, int64_t end) {
    std::vector<acc_t> row;  // [cells, depth]
    for (int64_t k = begin; k < end; ++k) {
      const auto& roi = rois[k];
      scalar_t* out = params.pooled + k * params.bins_y * params.bins_x * params.num_channels;
      if (roi.level < 0) {
        std::fill_n(out, int64_t(params.bins_y) * params.bins_x * params.num_channels, scalar_t(0));
        continue;
      }
      const auto& level = params.levels[roi.level];
      const int width = roi.x.num_cells();
      for (int first_channel = 0; first_channel < params.num_channels; first_channel += kChannels) {
        const int depth = std::min(kChannels, params.num_channels - first_channel);
        const scalar_t* map = level.map + roi.image * level.stride_n + first_channel;
        row.resize(int64_t(width) * depth);
        for (int p = 0; p < params.bins_y; ++p) {
          std::fill(row.begin(), row.end(), acc_t(0));
          for (int t = roi.y.offsets[p]; t < roi.y.offsets[p + 1]; ++t) {
            const acc_t weight = roi.y.taps[t].weight;
            const scalar_t* line = map + roi.y.cells[roi.y.taps[t].cell] * level.stride_h;
            for (int i = 0; i < width; ++i) {
              const scalar_t* cell = line + roi.x.cells[i] * level.stride_w;
              acc_t* sums = row.data() + int64_t(i) * depth;
              for (int c = 0; c < depth; ++c) {
                sums[c] += weight * static_cast<acc_t>(cell[c]);
              }
            }
          }
          for (int q = 0; q < params.bins_x; ++q) {
            acc_t sums[kChannels] = {};
            for (int t = roi.x.offsets[q]; t < roi.x.offsets[q + 1]; ++t) {
              const acc_t weight = roi.x.taps[t].weight;
              const acc_t* cell = row.data() + int64_t(roi.x.taps[t].cell) * depth;
              for (int c = 0; c < depth; ++c) {
                sums[c] += weight * cell[c];
              }
            }
            scalar_t* bin = out + (int64_t(p) * params.bins_x + q) * params.num_channels + first_channel;
            for (int c = 0; c < depth; ++c) {
              bin[c] = static_cast<scalar_t>(sums[c]);
            }
          }
        }
      }
    }
  });
}

}  // namespace

template <typename scalar_t, typename box_t>
void roi_align_forward(const RoIAlignParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  const auto rois = merge_taps_of_rois(params, parallel_for);
  if (params.channels_last) {
    pool_channels(params, rois, parallel_for);
  } else {
    pool_planes(params, rois, parallel_for);
  }
}

template <typename box_t>
void assign_levels(const AssignLevelsParams<box_t>& params) {
  for (int64_t k = 0; k < params.num_boxes; ++k) {
    const box_t* box = params.boxes + k * 4;
    params.levels[k] = level_of(params.rule, box[0], box[1], box[2], box[3]);
  }
}

template void assign_levels(const AssignLevelsParams<float>&);
template void assign_levels(const AssignLevelsParams<double>&);

#define ROIALIGN_INSTANTIATE(scalar_t, box_t) \
  template void roi_align_forward(const RoIAlignParams<scalar_t, box_t>&, const ParallelFor&);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cpu
