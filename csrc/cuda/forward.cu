// CUDA forward: level choice, sampling and pooling of every RoI in one launch. Knows no torch.
#include "launch.h"

#include "geometry.h"

namespace roialign::cuda {
namespace {

// A block owns a tile of the bins of one RoI and a slice of its channels. Taps depend on the RoI alone, so the block
// merges them once into shared memory and then only streams channels; a thread per output element would merge them
// C * P * Q times.
constexpr int kTileBins = 8;  // bins per side of a tile: all of a 7x7 output, four tiles of a 14x14 one

// Samples of a bin that the tables take at a time. Adaptive sampling of proposals averages 3 per bin side, so one
// round is the rule; a box the size of the map takes as many rounds as it needs.
constexpr int kRoundSamples = 8;

// The taps of up to kTileBins bins along one axis.
template <typename acc_t>
struct TapTable {
  int count[kTileBins];
  int cell[kTileBins][2 * kRoundSamples];
  acc_t weight[kTileBins][2 * kRoundSamples];
};

// Thread `bin` < kTileBins writes the taps that samples of round `round` give bin first_bin + bin. Returns whether
// the thread's bin has samples left for another round.
template <typename acc_t>
__device__ bool fill_taps(TapTable<acc_t>& table, const Axis<acc_t>& axis, int first_bin, int bin, int round) {
  int count = 0;
  bool more = false;
  if (first_bin + bin < axis.num_bins) {
    Range samples = samples_near(axis, first_bin + bin, 0, axis.size - 1);
    // Rounds of a long range start where the one before ended; nothing overflows, a range is at most a map long.
    samples.begin = min(samples.begin + round * kRoundSamples, samples.end);
    more = samples.end - samples.begin > kRoundSamples;
    samples.end = min(samples.begin + kRoundSamples, samples.end);
    for_each_tap(axis, first_bin + bin, samples, [&](int cell, acc_t weight) {
      table.cell[bin][count] = cell;
      table.weight[bin][count] = weight;
      ++count;
    });
  }
  table.count[bin] = count;
  return more;
}

// Calls pool(taps_y, taps_x) with the block's tables, once for every pair of rounds: once, as a rule. All threads of
// the block call it together. The tables belong to `pool` until it returns.
template <typename acc_t, typename Pool>
__device__ void for_each_round(const RoI<acc_t>& roi, int first_p, int first_q, int thread, Pool&& pool) {
  __shared__ TapTable<acc_t> taps_y, taps_x;
  bool more_y = true;
  for (int round_y = 0; more_y; ++round_y) {
    more_y = __syncthreads_or(thread < kTileBins && fill_taps(taps_y, roi.y, first_p, thread, round_y));
    bool more_x = true;
    for (int round_x = 0; more_x; ++round_x) {
      more_x = __syncthreads_or(thread < kTileBins && fill_taps(taps_x, roi.x, first_q, thread, round_x));
      pool(taps_y, taps_x);
      __syncthreads();
    }
  }
}

// What the bins of a row that pools from nowhere are set to.
template <typename acc_t>
__device__ acc_t value_without_map(int level) {
  return level == kInvalidRow ? acc_t(NAN) : acc_t(0);
}

//   blockIdx.x → RoI      blockIdx.y → slice of kVec * 32 channels      blockIdx.z → tile of kTileBins² bins
//   threadIdx.x → kVec neighbouring channels, one load per tap          threadIdx.y → row of the tile's bins
//
// A thread keeps its row of bins in registers. A warp reads 32 * kVec neighbouring channels of a cell at once.
constexpr int kWarp = 32;

template <typename Params, int kVec>
__global__ void __launch_bounds__(kWarp* kTileBins, 1) roi_align_forward_channels_last_kernel(Params params) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  using Channels = Vec<scalar_t, kVec>;
  const int tiles_x = (params.bins_x + kTileBins - 1) / kTileBins;
  const int first_p = blockIdx.z / tiles_x * kTileBins, first_q = blockIdx.z % tiles_x * kTileBins;
  const int channel = (blockIdx.y * kWarp + threadIdx.x) * kVec;
  const int p = first_p + threadIdx.y;
  const bool is_owner = channel < params.num_channels && p < params.bins_y;
  const RoI<acc_t> roi = roi_at(params, blockIdx.x);

  acc_t sums[kTileBins][kVec];
#pragma unroll
  for (int q = 0; q < kTileBins; ++q) {
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      sums[q][v] = value_without_map<acc_t>(roi.level);
    }
  }
  if (roi.level >= 0) {
    const auto& level = params.levels[roi.level];
    const scalar_t* map = level.map + roi.image * level.stride_n + channel;
    for_each_round(
        roi, first_p, first_q, threadIdx.y * kWarp + threadIdx.x, [&](const auto& taps_y, const auto& taps_x) {
          if (!is_owner) {
            return;
          }
          for (int i = 0; i < taps_y.count[threadIdx.y]; ++i) {
            const scalar_t* line = map + taps_y.cell[threadIdx.y][i] * level.stride_h;
            const acc_t weight_y = taps_y.weight[threadIdx.y][i];
#pragma unroll
            for (int q = 0; q < kTileBins; ++q) {
              for (int j = 0; j < taps_x.count[q]; ++j) {
                const Channels cell = *reinterpret_cast<const Channels*>(line + taps_x.cell[q][j] * level.stride_w);
                const acc_t weight = weight_y * taps_x.weight[q][j];
#pragma unroll
                for (int v = 0; v < kVec; ++v) {
                  sums[q][v] += weight * static_cast<acc_t>(cell.value[v]);
                }
              }
            }
          }
        });
  }
  if (is_owner) {
    scalar_t* bins = params.pooled + ((int64_t(blockIdx.x) * params.bins_y + p) * params.bins_x) * params.num_channels;
#pragma unroll
    for (int q = 0; q < kTileBins; ++q) {
      if (first_q + q < params.bins_x) {
        Channels bin;
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          bin.value[v] = static_cast<scalar_t>(sums[q][v]);
        }
        *reinterpret_cast<Channels*>(bins + int64_t(first_q + q) * params.num_channels + channel) = bin;
      }
    }
  }
}

//   blockIdx.x → RoI      blockIdx.y → slice of kChannels * 4 channels      blockIdx.z → tile of kTileBins² bins
//   threadIdx.x → bin of the tile, row by row                               threadIdx.y → kChannels channels
//
// Neighbouring threads own neighbouring bins and read the same rows. A thread keeps kChannels channels of its bin
// in registers, so that a tap is looked up once for all of them.
constexpr int kChannels = 8;
constexpr int kChannelRows = 4;

template <typename Params>
__global__ void __launch_bounds__(kTileBins * kTileBins * kChannelRows, 1) roi_align_forward_kernel(Params params) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  const int tiles_x = (params.bins_x + kTileBins - 1) / kTileBins;
  const int first_p = blockIdx.z / tiles_x * kTileBins, first_q = blockIdx.z % tiles_x * kTileBins;
  const int tile_p = threadIdx.x / kTileBins, tile_q = threadIdx.x % kTileBins;
  const int p = first_p + tile_p, q = first_q + tile_q;
  const int first_channel = (blockIdx.y * kChannelRows + threadIdx.y) * kChannels;
  const int num_channels = min(kChannels, params.num_channels - first_channel);  // <= 0: nothing to own
  const bool is_owner = p < params.bins_y && q < params.bins_x;
  const RoI<acc_t> roi = roi_at(params, blockIdx.x);

  acc_t sums[kChannels];
#pragma unroll
  for (int c = 0; c < kChannels; ++c) {
    sums[c] = value_without_map<acc_t>(roi.level);
  }
  if (roi.level >= 0) {
    const auto& level = params.levels[roi.level];
    const scalar_t* map = level.map + roi.image * level.stride_n + first_channel * level.stride_c;
    const int thread = threadIdx.y * kTileBins * kTileBins + threadIdx.x;
    for_each_round(roi, first_p, first_q, thread, [&](const auto& taps_y, const auto& taps_x) {
      if (!is_owner) {
        return;
      }
      for (int i = 0; i < taps_y.count[tile_p]; ++i) {
        const scalar_t* line = map + taps_y.cell[tile_p][i] * level.stride_h;
        const acc_t weight_y = taps_y.weight[tile_p][i];
        for (int j = 0; j < taps_x.count[tile_q]; ++j) {
          const scalar_t* cell = line + taps_x.cell[tile_q][j];
          const acc_t weight = weight_y * taps_x.weight[tile_q][j];
#pragma unroll
          for (int c = 0; c < kChannels; ++c) {
            if (c < num_channels) {
              sums[c] += weight * static_cast<acc_t>(cell[c * level.stride_c]);
            }
          }
        }
      }
    });
  }
  if (is_owner) {
    const int64_t bins = int64_t(params.bins_y) * params.bins_x;
    scalar_t* bin = params.pooled + (int64_t(blockIdx.x) * params.num_channels + first_channel) * bins +
                    int64_t(p) * params.bins_x + q;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c < num_channels) {
        bin[c * bins] = static_cast<scalar_t>(sums[c]);
      }
    }
  }
}

template <typename Params, int kVec>
cudaError_t launch_channels_last(const Params& params, unsigned int num_tiles, cudaStream_t stream) {
  const unsigned int slices = (params.num_channels + kWarp * kVec - 1) / (kWarp * kVec);
  return launch(roi_align_forward_channels_last_kernel<Params, kVec>,
                dim3(static_cast<unsigned int>(params.num_rois), slices, num_tiles), dim3(kWarp, kTileBins), stream,
                params);
}

//   thread → box
template <typename box_t>
__global__ void assign_levels_kernel(AssignLevelsParams<box_t> params) {
  const int64_t k = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  if (k < params.num_boxes) {
    const box_t* box = params.boxes + k * 4;
    params.levels[k] = level_of(params.rule, box[0], box[1], box[2], box[3]);
  }
}

}  // namespace

template <typename scalar_t, typename box_t>
cudaError_t roi_align_forward(const RoIAlignParams<scalar_t, box_t>& params, cudaStream_t stream) {
  using Params = RoIAlignParams<scalar_t, box_t>;
  constexpr int kVec = 16 / sizeof(scalar_t);
  const unsigned int num_tiles =
      ((params.bins_y + kTileBins - 1) / kTileBins) * ((params.bins_x + kTileBins - 1) / kTileBins);
  if (params.channels_last) {
    return can_vectorize<scalar_t, kVec>(params) ? launch_channels_last<Params, kVec>(params, num_tiles, stream)
                                                 : launch_channels_last<Params, 1>(params, num_tiles, stream);
  }
  constexpr int kSlice = kChannels * kChannelRows;
  const unsigned int slices = (params.num_channels + kSlice - 1) / kSlice;
  return launch(roi_align_forward_kernel<Params>, dim3(static_cast<unsigned int>(params.num_rois), slices, num_tiles),
                dim3(kTileBins * kTileBins, kChannelRows), stream, params);
}

template <typename box_t>
cudaError_t assign_levels(const AssignLevelsParams<box_t>& params, cudaStream_t stream) {
  constexpr int kThreads = 256;
  const unsigned int blocks = static_cast<unsigned int>((params.num_boxes + kThreads - 1) / kThreads);
  return launch(assign_levels_kernel<box_t>, dim3(blocks), dim3(kThreads), stream, params);
}

template cudaError_t assign_levels(const AssignLevelsParams<float>&, cudaStream_t);
template cudaError_t assign_levels(const AssignLevelsParams<double>&, cudaStream_t);

#define ROIALIGN_INSTANTIATE(scalar_t, box_t) \
  template cudaError_t roi_align_forward(const RoIAlignParams<scalar_t, box_t>&, cudaStream_t);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cuda
