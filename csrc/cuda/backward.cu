// CUDA backward: the gradient of every level in one launch, as a gather. Knows no torch.
#include "launch.h"

#include "geometry.h"

namespace roialign::cuda {
namespace {

// A block owns a tile of cells of one map's gradient and a slice of its channels. It walks the RoIs in order, keeps
// those that touch the tile, adds Wy^T * G * Wx to sums in registers and writes each cell once: no atomics, no zero
// fill, no cast pass, and the order of every sum is the order of the RoIs.
//
//        x →        a RoI of 3 x 3 bins and the tiles that keep it
//    y   ┌───┬───┬───┐
//    ↓   │ ┌┈┼┬┈┬┼┐  │
//        ├─┼┈┼┼┈┼┼┤──┤      A tile of kTileY x kTileX cells sees the RoI through two small matrices,
//        │ ├┈┼┼┈┼┼┤  │      the weight of each bin row in each cell row, and of columns likewise.
//        ├─┴┈┼┴┈┴┼┘──┤
//        └───┴───┴───┘
constexpr int kTileY = 8;
constexpr int kTileX = 8;
constexpr int kTileBins = 8;  // bins per side that the matrices hold at a time

// Weights of up to kTileBins bins in the cells of a tile along one axis.
template <typename acc_t, int kCells>
struct TileWeights {
  acc_t weight[kTileBins][kCells];

  // Thread `bin` < kTileBins writes the weights of bin first_bin + bin in cells first_cell + [0, kCells).
  __device__ void fill(const Axis<acc_t>& axis, int first_bin, int bin, int first_cell) {
    for (int i = 0; i < kCells; ++i) {
      weight[bin][i] = acc_t(0);
    }
    if (first_bin + bin < axis.num_bins) {
      const Range samples = samples_near(axis, first_bin + bin, first_cell, first_cell + kCells - 1);
      for_each_tap(axis, first_bin + bin, samples, [&](int cell, acc_t tap) {
        if (cell >= first_cell && cell < first_cell + kCells) {
          weight[bin][cell - first_cell] += tap;
        }
      });
    }
  }
};

// The tile of a block: `index` counts the tiles of all levels, finest first, image by image.
struct Tile {
  int image, level, y, x;
};

template <typename Params>
__host__ __device__ int64_t num_tiles(const Params& params, int level) {
  const auto& map = params.levels[level];
  return int64_t((map.height + kTileY - 1) / kTileY) * ((map.width + kTileX - 1) / kTileX) * params.num_images;
}

template <typename Params>
__device__ Tile find_tile(const Params& params, int64_t index) {
  int level = 0;
  for (; level + 1 < params.rule.num_levels && index >= num_tiles(params, level); ++level) {
    index -= num_tiles(params, level);
  }
  const int tiles_y = (params.levels[level].height + kTileY - 1) / kTileY;
  const int tiles_x = (params.levels[level].width + kTileX - 1) / kTileX;
  return {static_cast<int>(index / tiles_x / tiles_y), level, static_cast<int>(index / tiles_x % tiles_y) * kTileY,
          static_cast<int>(index % tiles_x) * kTileX};
}

template <typename acc_t>
__device__ bool touches(const RoI<acc_t>& roi, const Tile& tile) {
  if (roi.level != tile.level || roi.image != tile.image) {
    return false;
  }
  const Range y = cells_near(roi.y), x = cells_near(roi.x);
  return y.begin < tile.y + kTileY && y.end > tile.y && x.begin < tile.x + kTileX && x.end > tile.x;
}

constexpr int kThreads = kWarp * kTileY;

// Calls add(index of the RoI, first bin row, first bin column, weights along y, along x) for the RoIs that touch the
// tile, in their order, for all their bins a tile of kTileBins² at a time. All kThreads of the block call it
// together. The weights belong to `add` until it returns.
template <typename Params, typename Add>
__device__ void for_each_roi(const Params& params, const Tile& tile, int thread, Add&& add) {
  using acc_t = typename Params::acc_t;
  __shared__ int64_t kept[kThreads];
  __shared__ int kept_by_warp[kThreads / kWarp];
  __shared__ TileWeights<acc_t, kTileY> weights_y;
  __shared__ TileWeights<acc_t, kTileX> weights_x;
  const int warp = thread / kWarp, lane = thread % kWarp;
  for (int64_t first = 0; first < params.num_rois; first += kThreads) {
    // Every thread looks at one RoI; those that touch the tile are packed without changing their order.
    const int64_t candidate = first + thread;
    const bool keep = candidate < params.num_rois && touches(roi_at(params, candidate), tile);
    const unsigned int votes = __ballot_sync(0xffffffffu, keep);
    if (lane == 0) {
      kept_by_warp[warp] = __popc(votes);
    }
    __syncthreads();
    int before = 0, num_kept = 0;
    for (int w = 0; w < kThreads / kWarp; ++w) {
      before += w < warp ? kept_by_warp[w] : 0;
      num_kept += kept_by_warp[w];
    }
    if (keep) {
      kept[before + __popc(votes & ((1u << lane) - 1))] = candidate;
    }
    __syncthreads();
    for (int i = 0; i < num_kept; ++i) {
      for (int first_p = 0; first_p < params.bins_y; first_p += kTileBins) {
        for (int first_q = 0; first_q < params.bins_x; first_q += kTileBins) {
          // An axis each for the first two warps, so that the two do not diverge.
          if (warp < 2 && lane < kTileBins) {
            const RoI<acc_t> roi = roi_at(params, kept[i]);
            if (warp == 0) {
              weights_y.fill(roi.y, first_p, lane, tile.y);
            } else {
              weights_x.fill(roi.x, first_q, lane, tile.x);
            }
          }
          __syncthreads();
          add(kept[i], first_p, first_q, weights_y, weights_x);
          __syncthreads();
        }
      }
    }
  }
}

//   blockIdx.x → tile                                  blockIdx.y → slice of kVec * 32 channels
//   threadIdx.x → kVec neighbouring channels           threadIdx.y → row of the tile's cells
template <typename Params, int kVec>
__global__ void __launch_bounds__(kThreads, 1) roi_align_backward_channels_last_kernel(Params params) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  using Channels = Vec<scalar_t, kVec>;
  const Tile tile = find_tile(params, blockIdx.x);
  const auto& level = params.levels[tile.level];
  const int y = tile.y + threadIdx.y;
  const int channel = (blockIdx.y * kWarp + threadIdx.x) * kVec;
  const bool is_owner = y < level.height && channel < params.num_channels;

  acc_t sums[kTileX][kVec] = {};
  for_each_roi(params, tile, threadIdx.y * kWarp + threadIdx.x,
               [&](int64_t roi, int first_p, int first_q, const auto& weights_y, const auto& weights_x) {
                 if (!is_owner) {
                   return;
                 }
                 const int rows = min(kTileBins, params.bins_y - first_p);
                 const int columns = min(kTileBins, params.bins_x - first_q);
                 for (int p = 0; p < rows; ++p) {
                   const acc_t weight_y = weights_y.weight[p][threadIdx.y];
                   if (weight_y == acc_t(0)) {
                     continue;
                   }
                   const int64_t row = (roi * params.bins_y + first_p + p) * params.bins_x + first_q;
                   for (int q = 0; q < columns; ++q) {
                     const Channels grad =
                         *reinterpret_cast<const Channels*>(params.pooled + (row + q) * params.num_channels + channel);
#pragma unroll
                     for (int x = 0; x < kTileX; ++x) {
                       const acc_t weight = weight_y * weights_x.weight[q][x];
                       if (weight != acc_t(0)) {
#pragma unroll
                         for (int v = 0; v < kVec; ++v) {
                           sums[x][v] += weight * static_cast<acc_t>(grad.value[v]);
                         }
                       }
                     }
                   }
                 }
               });
  if (is_owner) {
    scalar_t* line = level.map + tile.image * level.stride_n + y * level.stride_h + channel;
#pragma unroll
    for (int x = 0; x < kTileX; ++x) {
      if (tile.x + x < level.width) {
        Channels cell;
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          cell.value[v] = static_cast<scalar_t>(sums[x][v]);
        }
        *reinterpret_cast<Channels*>(line + (tile.x + x) * level.stride_w) = cell;
      }
    }
  }
}

//   blockIdx.x → tile                                  blockIdx.y → slice of kChannels * kChannelRows channels
//   threadIdx.x → cell of the tile, row by row         threadIdx.y → kChannels channels
//
// Neighbouring threads write neighbouring cells. A thread keeps kChannels channels of its cell in registers.
constexpr int kChannels = 8;
constexpr int kChannelRows = kThreads / (kTileY * kTileX);

template <typename Params>
__global__ void __launch_bounds__(kThreads, 1) roi_align_backward_kernel(Params params) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  const Tile tile = find_tile(params, blockIdx.x);
  const auto& level = params.levels[tile.level];
  const int tile_y = threadIdx.x / kTileX, tile_x = threadIdx.x % kTileX;
  const int first_channel = (blockIdx.y * kChannelRows + threadIdx.y) * kChannels;
  const int num_channels = min(kChannels, params.num_channels - first_channel);  // <= 0: nothing to own
  const bool is_owner = tile.y + tile_y < level.height && tile.x + tile_x < level.width;
  const int64_t bins = int64_t(params.bins_y) * params.bins_x;

  acc_t sums[kChannels] = {};
  for_each_roi(params, tile, threadIdx.y * kTileY * kTileX + threadIdx.x,
               [&](int64_t roi, int first_p, int first_q, const auto& weights_y, const auto& weights_x) {
                 if (!is_owner) {
                   return;
                 }
                 const int rows = min(kTileBins, params.bins_y - first_p);
                 const int columns = min(kTileBins, params.bins_x - first_q);
                 const scalar_t* grad = params.pooled + (roi * params.num_channels + first_channel) * bins;
                 for (int p = 0; p < rows; ++p) {
                   const acc_t weight_y = weights_y.weight[p][tile_y];
                   if (weight_y == acc_t(0)) {
                     continue;
                   }
                   for (int q = 0; q < columns; ++q) {
                     const acc_t weight = weight_y * weights_x.weight[q][tile_x];
                     if (weight == acc_t(0)) {
                       continue;
                     }
                     const scalar_t* bin = grad + int64_t(first_p + p) * params.bins_x + first_q + q;
#pragma unroll
                     for (int c = 0; c < kChannels; ++c) {
                       if (c < num_channels) {
                         sums[c] += weight * static_cast<acc_t>(bin[c * bins]);
                       }
                     }
                   }
                 }
               });
  if (is_owner) {
    scalar_t* cell = level.map + tile.image * level.stride_n + first_channel * level.stride_c +
                     (tile.y + tile_y) * level.stride_h + tile.x + tile_x;
#pragma unroll
    for (int c = 0; c < kChannels; ++c) {
      if (c < num_channels) {
        cell[c * level.stride_c] = static_cast<scalar_t>(sums[c]);
      }
    }
  }
}

template <typename Params, int kVec>
cudaError_t launch_channels_last(const Params& params, unsigned int tiles, cudaStream_t stream) {
  const unsigned int slices = (params.num_channels + kWarp * kVec - 1) / (kWarp * kVec);
  return launch(roi_align_backward_channels_last_kernel<Params, kVec>, dim3(tiles, slices), dim3(kWarp, kTileY), stream,
                params);
}

}  // namespace

template <typename scalar_t, typename box_t>
cudaError_t roi_align_backward(const RoIAlignParams<scalar_t, box_t>& params, cudaStream_t stream) {
  using Params = RoIAlignParams<scalar_t, box_t>;
  constexpr int kVec = 16 / sizeof(scalar_t);
  int64_t tiles = 0;
  for (int level = 0; level < params.rule.num_levels; ++level) {
    tiles += num_tiles(params, level);
  }
  const unsigned int grid_x = static_cast<unsigned int>(tiles);
  if (params.channels_last) {
    return can_vectorize<scalar_t, kVec>(params) ? launch_channels_last<Params, kVec>(params, grid_x, stream)
                                                 : launch_channels_last<Params, 1>(params, grid_x, stream);
  }
  constexpr int kSlice = kChannels * kChannelRows;
  const unsigned int slices = (params.num_channels + kSlice - 1) / kSlice;
  return launch(roi_align_backward_kernel<Params>, dim3(grid_x, slices), dim3(kTileY * kTileX, kChannelRows), stream,
                params);
}

#define ROIALIGN_INSTANTIATE(scalar_t, box_t) \
  template cudaError_t roi_align_backward(const RoIAlignParams<scalar_t, box_t>&, cudaStream_t);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cuda
