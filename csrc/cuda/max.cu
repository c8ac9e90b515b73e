// CUDA max pooling: the forward, which keeps the winner of each bin, and what reads the winners. Knows no torch.
#include "items.h"

namespace roialign::cuda {
namespace {

// The samples of a bin that a winner counts: those near the map, row by row.
struct BinSamples {
  Range y, x;

  template <typename acc_t>
  __device__ BinSamples(const RoI<acc_t>& roi, int p, int q)
      : y(samples_near(roi.y, p, 0, roi.y.size - 1)), x(samples_near(roi.x, q, 0, roi.x.size - 1)) {}
};

// A winner's place. Anything may stand in a tensor of winners that someone hands to the operator.
template <typename acc_t>
struct Winner {
  bool is_on_map;
  int sample_y, sample_x;
  Sample<acc_t> y, x;

  __device__ Winner(const RoI<acc_t>& roi, int p, int q, const BinSamples& samples, int winner) : is_on_map(false) {
    const int columns = samples.x.end - samples.x.begin;
    if (winner >= 0 && winner < int64_t(samples.y.end - samples.y.begin) * columns) {
      sample_y = samples.y.begin + winner / columns;
      sample_x = samples.x.begin + winner % columns;
      y = sample_at(roi.y, p, sample_y);
      x = sample_at(roi.x, q, sample_x);
      is_on_map = y.low >= 0 && x.low >= 0;
    }
  }

  // Calls tap(row, column, weight) for the cells that have a share.
  template <typename Tap>
  __device__ void for_each_cell(const Tap& tap) const {
    for (int dy = 0; dy <= (y.fraction != acc_t(0)); ++dy) {
      const acc_t weight_y = dy == 0 ? acc_t(1) - y.fraction : y.fraction;
      for (int dx = 0; dx <= (x.fraction != acc_t(0)); ++dx) {
        tap(y.low + dy, x.low + dx, weight_y * (dx == 0 ? acc_t(1) - x.fraction : x.fraction));
      }
    }
  }
};

// A later sample wins if it is greater, or the first NaN.
template <typename acc_t>
__device__ bool beats(acc_t sample, acc_t greatest) {
  return sample > greatest || (sample != sample && greatest == greatest);
}

//   blockIdx.x → RoI      blockIdx.y → slice of kItemThreads items      thread → item
//
// A thread walks the samples of its bin in order and places each once for its kVec channels.
template <typename Params, bool kChannelsLast, int kVec>
__global__ void __launch_bounds__(kItemThreads, 1) roi_max_forward_kernel(Params params) {
  using acc_t = typename Params::acc_t;
  const RoI<acc_t> roi = roi_at(params, blockIdx.x);
  const int64_t row = blockIdx.x * row_size(params);
  for (int64_t index = int64_t(blockIdx.y) * kItemThreads + threadIdx.x; index < num_items<kVec>(params);
       index += int64_t(gridDim.y) * kItemThreads) {
    const Item<kChannelsLast, kVec> item(params, index);
    acc_t greatest[kVec];
    int winner[kVec];
    const auto take = [&](int v, acc_t sample, int which) {
      if (beats(sample, greatest[v])) {
        greatest[v] = sample;
        winner[v] = which;
      }
    };
    const auto take_outside = [&] {
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        take(v, acc_t(0), -1);
      }
    };
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      greatest[v] = roi.level >= 0 ? -acc_t(INFINITY) : roi.level == kInvalidRow ? acc_t(NAN) : acc_t(0);
      winner[v] = roi.level >= 0 ? 0 : -1;  // the first sample, if all are this small
    }
    if (roi.level >= 0) {
      const auto& level = params.levels[roi.level];
      const auto* map = level.map + roi.image * level.stride_n + item.channel * level.stride_c;
      const BinSamples samples(roi, item.p, item.q);
      // Samples that are not near the map read 0; the first of them in y-then-x order stands for all.
      if (samples.y.begin > 0 || samples.x.begin > 0) {
        take_outside();
      }
      int which = 0;
      for (int i = samples.y.begin; i < samples.y.end; ++i) {
        const Sample<acc_t> y = sample_at(roi.y, item.p, i);
        for (int j = samples.x.begin; j < samples.x.end; ++j, ++which) {
          const Sample<acc_t> x = sample_at(roi.x, item.q, j);
          acc_t sums[kVec] = {};
          if (y.low >= 0 && x.low >= 0) {
#pragma unroll
            for (int corner = 0; corner < 4; ++corner) {
              const int dy = corner / 2, dx = corner % 2;
              // A cell without a share is not read, whatever stands in it.
              if ((dy == 0 || y.fraction != acc_t(0)) && (dx == 0 || x.fraction != acc_t(0))) {
                const acc_t weight =
                    (dy == 0 ? acc_t(1) - y.fraction : y.fraction) * (dx == 0 ? acc_t(1) - x.fraction : x.fraction);
                acc_t cell[kVec];
                item.load(map + (y.low + dy) * level.stride_h + (x.low + dx) * level.stride_w, level.stride_c, cell);
#pragma unroll
                for (int v = 0; v < kVec; ++v) {
                  sums[v] += weight * cell[v];
                }
              }
            }
          }
#pragma unroll
          for (int v = 0; v < kVec; ++v) {
            take(v, sums[v], which);
          }
        }
        if (samples.x.end < roi.x.num_samples) {
          take_outside();
        }
      }
      if (samples.y.end < roi.y.num_samples) {
        take_outside();
      }
    }
    item.store(params.pooled + row + item.offset, greatest);
    item.store(params.argmax + row + item.offset, winner);
  }
}

//   blockIdx.x → RoI      blockIdx.y → slice of kItemThreads items      thread → item, a bin of one channel
template <typename Params, bool kChannelsLast>
__global__ void __launch_bounds__(kItemThreads, 1) roi_max_gather_kernel(Params params) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  const RoI<acc_t> roi = roi_at(params, blockIdx.x);
  const int64_t row = blockIdx.x * row_size(params);
  for (int64_t index = int64_t(blockIdx.y) * kItemThreads + threadIdx.x; index < num_items<1>(params);
       index += int64_t(gridDim.y) * kItemThreads) {
    const Item<kChannelsLast, 1> item(params, index);
    acc_t sum = roi.level == kInvalidRow ? acc_t(NAN) : acc_t(0);
    if (roi.level >= 0) {
      const auto& level = params.levels[roi.level];
      const scalar_t* map = level.map + roi.image * level.stride_n + item.channel * level.stride_c;
      const Winner<acc_t> winner(roi, item.p, item.q, BinSamples(roi, item.p, item.q),
                                 params.argmax[row + item.offset]);
      if (winner.is_on_map) {
        winner.for_each_cell([&](int y, int x, acc_t weight) {
          sum += weight * static_cast<acc_t>(map[y * level.stride_h + x * level.stride_w]);
        });
      }
    }
    params.pooled[row + item.offset] = static_cast<scalar_t>(sum);
  }
}

//   blockIdx.x → RoI      thread → every kItemThreads-th item of it, a bin of one channel
template <typename Params, bool kChannelsLast>
__global__ void __launch_bounds__(kItemThreads, 1) roi_max_backward_boxes_kernel(Params params) {
  using acc_t = typename Params::acc_t;
  const RoI<acc_t> roi = roi_at(params, blockIdx.x);
  auto* grad_box = params.grad_boxes + int64_t(blockIdx.x) * 5;
  if (roi.level < 0) {
    write_no_box_gradient(grad_box);
    return;
  }
  const auto& level = params.levels[roi.level];
  const int64_t row = blockIdx.x * row_size(params);
  EdgeSums<acc_t> sums;
  for (int64_t index = threadIdx.x; index < num_items<1>(params); index += kItemThreads) {
    const Item<kChannelsLast, 1> item(params, index);
    const auto* map = level.map + roi.image * level.stride_n + item.channel * level.stride_c;
    const Winner<acc_t> winner(roi, item.p, item.q, BinSamples(roi, item.p, item.q), params.argmax[row + item.offset]);
    if (winner.is_on_map) {
      const acc_t grad = static_cast<acc_t>(params.pooled[row + item.offset]);
      const Slopes<acc_t> slopes = slopes_at(winner.y, winner.x, [&](int dy, int dx) {
        return static_cast<acc_t>(map[(winner.y.low + dy) * level.stride_h + (winner.x.low + dx) * level.stride_w]);
      });
      sums.add(grad * slopes.y, share_of_far_edge(roi.y, item.p, winner.sample_y), grad * slopes.x,
               share_of_far_edge(roi.x, item.q, winner.sample_x));
    }
  }
  write_box_gradient(sums, level, grad_box);
}

// The backward is a gather: a block owns a tile of cells of one map's gradient and a slice of its channels, and each
// thread the sums of one channel, in a column of shared memory that no other thread touches. It walks the RoIs that
// touch the tile in order, and of each the bins that do, so there are no atomics and every cell is written once.
constexpr int kTile = 8;  // cells per side

// A thread for each; 17 KiB of sums either way.
template <typename acc_t>
constexpr int kTileChannels = 256 / sizeof(acc_t);

// `index` counts the tiles of all levels, finest first, image by image.
struct Tile {
  int image, level, y, x;
};

template <typename Level>
__host__ __device__ int64_t tiles_of_map(const Level& level) {
  return int64_t((level.height + kTile - 1) / kTile) * ((level.width + kTile - 1) / kTile);
}

template <typename Params>
__device__ Tile find_tile(const Params& params, int64_t index) {
  int level = 0;
  for (; level + 1 < params.rule.num_levels; ++level) {
    const int64_t tiles = tiles_of_map(params.levels[level]) * params.num_images;
    if (index < tiles) {
      break;
    }
    index -= tiles;
  }
  const int64_t tiles = tiles_of_map(params.levels[level]), tiles_x = (params.levels[level].width + kTile - 1) / kTile;
  return {static_cast<int>(index / tiles), level, static_cast<int>(index % tiles / tiles_x) * kTile,
          static_cast<int>(index % tiles % tiles_x) * kTile};
}

__device__ inline bool overlaps(Range cells, int tile) { return cells.begin < tile + kTile && cells.end > tile; }

//   blockIdx.x → tile      blockIdx.y → slice of kTileChannels channels      thread → channel
template <typename Params, bool kChannelsLast>
__global__ void __launch_bounds__(kTileChannels<typename Params::acc_t>, 1) roi_max_backward_kernel(Params params) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  constexpr int kChannels = kTileChannels<acc_t>, kWarp = 32;
  __shared__ acc_t sums[kTile * kTile][kChannels + 1];  // a bank to spare: read across channels and across cells
  __shared__ unsigned int votes[kChannels / kWarp];
  const Tile tile = find_tile(params, blockIdx.x);
  const auto& level = params.levels[tile.level];
  const int first_channel = blockIdx.y * kChannels, thread = threadIdx.x;
  const int channel = first_channel + thread;
  const int64_t bins = int64_t(params.bins_y) * params.bins_x;
  const int64_t channel_stride = kChannelsLast ? 1 : bins, bin_stride = kChannelsLast ? params.num_channels : 1;

  for (int cell = 0; cell < kTile * kTile; ++cell) {
    sums[cell][thread] = acc_t(0);
  }
  for (int64_t first = 0; first < params.num_rois; first += kChannels) {
    // Every thread looks at one RoI; the bits of the votes name those that touch the tile, in order.
    bool touches = false;
    if (first + thread < params.num_rois) {
      const RoI<acc_t> roi = roi_at(params, first + thread);
      touches = roi.level == tile.level && roi.image == tile.image && overlaps(cells_near(roi.y), tile.y) &&
                overlaps(cells_near(roi.x), tile.x);
    }
    const unsigned int ballot = __ballot_sync(0xffffffffu, touches);
    if (thread % kWarp == 0) {
      votes[thread / kWarp] = ballot;
    }
    __syncthreads();
    for (int warp = 0; warp < kChannels / kWarp; ++warp) {
      for (unsigned int left = votes[warp]; left != 0; left &= left - 1) {
        const int64_t k = first + warp * kWarp + __ffs(left) - 1;
        const RoI<acc_t> roi = roi_at(params, k);
        const int64_t row = k * row_size(params) + channel * channel_stride;
        for (int p = 0; p < params.bins_y; ++p) {
          if (!overlaps(cells_near(roi.y, p, p), tile.y)) {
            continue;
          }
          for (int q = 0; q < params.bins_x; ++q) {
            if (channel >= params.num_channels || !overlaps(cells_near(roi.x, q, q), tile.x)) {
              continue;
            }
            const int64_t bin = row + (int64_t(p) * params.bins_x + q) * bin_stride;
            const Winner<acc_t> winner(roi, p, q, BinSamples(roi, p, q), params.argmax[bin]);
            if (winner.is_on_map) {
              const acc_t grad = static_cast<acc_t>(params.pooled[bin]);
              winner.for_each_cell([&](int y, int x, acc_t weight) {
                const int tile_y = y - tile.y, tile_x = x - tile.x;
                if (tile_y >= 0 && tile_y < kTile && tile_x >= 0 && tile_x < kTile) {
                  sums[tile_y * kTile + tile_x][thread] += weight * grad;
                }
              });
            }
          }
        }
      }
    }
    __syncthreads();
  }

  // Neighbouring threads write neighbouring channels, or neighbouring cells of a row.
  for (int i = thread; i < kTile * kTile * kChannels; i += kChannels) {
    const int cell = kChannelsLast ? i / kChannels : i % (kTile * kTile);
    const int c = kChannelsLast ? i % kChannels : i / (kTile * kTile);
    const int y = tile.y + cell / kTile, x = tile.x + cell % kTile;
    if (y < level.height && x < level.width && first_channel + c < params.num_channels) {
      level.map[tile.image * level.stride_n + (first_channel + c) * level.stride_c + y * level.stride_h +
                x * level.stride_w] = static_cast<scalar_t>(sums[cell][c]);
    }
  }
}

}  // namespace

template <typename scalar_t, typename box_t>
cudaError_t roi_max_forward(const MaxParams<scalar_t, box_t>& params, cudaStream_t stream) {
  using Params = MaxParams<scalar_t, box_t>;
  return with_items(params, [&](auto channels_last, auto vec) {
    return launch(roi_max_forward_kernel<Params, channels_last(), vec()>, grid_of_items<vec()>(params),
                  dim3(kItemThreads), stream, params);
  });
}

template <typename scalar_t, typename box_t>
cudaError_t roi_max_gather(const MaxParams<scalar_t, box_t>& params, cudaStream_t stream) {
  using Params = MaxParams<scalar_t, box_t>;
  return launch(params.channels_last ? roi_max_gather_kernel<Params, true> : roi_max_gather_kernel<Params, false>,
                grid_of_items<1>(params), dim3(kItemThreads), stream, params);
}

template <typename scalar_t, typename box_t>
cudaError_t roi_max_backward(const MaxParams<scalar_t, box_t>& params, cudaStream_t stream) {
  using Params = MaxParams<scalar_t, box_t>;
  constexpr int kChannels = kTileChannels<typename Params::acc_t>;
  int64_t tiles = 0;
  for (int level = 0; level < params.rule.num_levels; ++level) {
    tiles += tiles_of_map(params.levels[level]) * params.num_images;
  }
  return launch(params.channels_last ? roi_max_backward_kernel<Params, true> : roi_max_backward_kernel<Params, false>,
                dim3(static_cast<unsigned int>(tiles), (params.num_channels + kChannels - 1) / kChannels),
                dim3(kChannels), stream, params);
}

template <typename scalar_t, typename box_t>
cudaError_t roi_max_backward_boxes(const MaxParams<scalar_t, box_t>& params, cudaStream_t stream) {
  using Params = MaxParams<scalar_t, box_t>;
  return launch(
      params.channels_last ? roi_max_backward_boxes_kernel<Params, true> : roi_max_backward_boxes_kernel<Params, false>,
      dim3(static_cast<unsigned int>(params.num_rois)), dim3(kItemThreads), stream, params);
}

#define ROIALIGN_INSTANTIATE(scalar_t, box_t)                                             \
  template cudaError_t roi_max_forward(const MaxParams<scalar_t, box_t>&, cudaStream_t);  \
  template cudaError_t roi_max_gather(const MaxParams<scalar_t, box_t>&, cudaStream_t);   \
  template cudaError_t roi_max_backward(const MaxParams<scalar_t, box_t>&, cudaStream_t); \
  template cudaError_t roi_max_backward_boxes(const MaxParams<scalar_t, box_t>&, cudaStream_t);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cuda
