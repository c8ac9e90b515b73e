// CUDA backward: the gradient of every level in one launch, as a gather. Knows no torch.
#include "launch.h"

#include "geometry.h"

namespace roialign::cuda {
namespace {

// A block owns tiles of cells of one map's gradient. For each it gathers the RoIs that touch the tile, in their order,
// adds Wy^T * G * Wx to sums in registers and writes each cell once: no atomics, no zero fill, no cast pass, and the
// order of every sum follows from the boxes alone.
//
//        x →        a RoI of 3 x 3 bins and the tiles that gather it
//    y   ┌───┬───┬───┐
//    ↓   │ ┌┈┼┬┈┬┼┐  │    A thread owns kSpread cells along one axis, the spread axis, at one cell of the other, the
//        ├─┼┈┼┼┈┼┼┤──┤    fold axis. For every bin along the spread axis it folds the few bins that its own cell
//        │ ├┈┼┼┈┼┼┤  │    touches into one value per channel, and spreads that over its cells.
//        ├─┴┈┼┴┈┴┼┘──┤
//        └───┴───┴───┘                     channels_last         NCHW
//                          spread axis     x                     y
//                          fold axis       y, 8 cells            x, 16 cells: a warp writes rows of 64 bytes
//                          channels        kVec, 16 bytes        kVec, a plane apart
//
//   blockIdx.x → level, image and every n-th of its tiles: neighbours go to different blocks, so that an object under
//                hundreds of proposals is spread over many
//   blockIdx.y → its turn among the blocks that share these tiles
//   thread     → one of kGroups groups of two warps; in it a cell of the fold axis and kVec channels of a slice
//
// Blocks take ordinary tiles in turn, and the groups of a block its slices of channels. A tile under more than kHotRoIs
// RoIs would keep one block busy long after the rest are done: all blocks work on it, each on slices of its own, each
// group on a quarter of the RoIs, and the quarters are added in order.
constexpr int kGroups = 4;
constexpr int kGroupThreads = 2 * kWarp;
constexpr int kThreads = kGroups * kGroupThreads;
constexpr int kHotRoIs = 32;
constexpr int kTurns = 4;     // blocks that share tiles
constexpr int kInFlight = 2;  // bins that a thread loads at a time: a cell rarely touches more

constexpr int kTileBins = 8;     // bins per side that the weights are held of at a time
constexpr int kCapacity = 1024;  // RoIs of an image and level that a block keeps in mind; more take rounds

// Half the cells where a thread owns 8 channels: 64 sums would leave room for 8 warps on a multiprocessor, not 16.
template <bool kChannelsLast, int kVec>
struct Shape {
  static constexpr int kSpread = kVec > 4 ? 4 : 8;
  static constexpr int kFold = kChannelsLast ? 8 : 16;
  static constexpr int kTileY = kChannelsLast ? kFold : kSpread;
  static constexpr int kTileX = kChannelsLast ? kSpread : kFold;
  static constexpr int kLanes = kGroupThreads / kFold;  // threads of a group that share a cell
  static constexpr int kSlice = kLanes * kVec;          // channels
};

// RoIs that the weights are held of at a time: a thread for each of their bins along each axis, half of the threads
// for doubles.
template <typename acc_t>
constexpr int kBatch = kThreads / (2 * kTileBins) * sizeof(float) / sizeof(acc_t);

// The tiles of a block: first, first + step, ... of the `count` tiles of an image's level.
struct Share {
  int level, image;
  int first, step, count;
};

template <typename Shape, typename Params>
__host__ __device__ int64_t num_tiles(const Params& params, int level) {
  const auto& map = params.levels[level];
  constexpr int kY = Shape::kTileY, kX = Shape::kTileX;
  return int64_t((map.height + kY - 1) / kY) * ((map.width + kX - 1) / kX);
}

// Shares that a level of an image is cut into. Every block looks at every box once for its share, so a share grows
// with the number of boxes; up to 1024 of them it has two tiles for each of its kTurns blocks.
template <typename Shape, typename Params>
__host__ __device__ int64_t num_shares(const Params& params, int level) {
  const int64_t per_turn = params.num_rois / 512;
  const int64_t tiles = kTurns * (per_turn < 1 ? 1 : per_turn > 16 ? 16 : per_turn);
  return (num_tiles<Shape>(params, level) + tiles - 1) / tiles;
}

template <typename Shape, typename Params>
__device__ Share find_share(const Params& params, int64_t index) {
  int level = 0;
  int64_t shares = num_shares<Shape>(params, 0);
  while (index >= shares * params.num_images) {
    index -= shares * params.num_images;
    shares = num_shares<Shape>(params, ++level);
  }
  return {level, static_cast<int>(index / shares), static_cast<int>(index % shares), static_cast<int>(shares),
          static_cast<int>(num_tiles<Shape>(params, level))};
}

// Tiles of kTileY x kTileX cells that a RoI may touch, saturated at the largest number: that errs towards more.
struct Bounds {
  unsigned short first_y, last_y, first_x, last_x;
};

__device__ inline unsigned short saturated(int64_t tile) {
  return static_cast<unsigned short>(min(tile, int64_t(65535)));
}

// Weights of a batch of RoIs: of bins in cells of the tile.
template <typename acc_t, typename Shape>
struct Weights {
  acc_t fold[kBatch<acc_t>][kTileBins][Shape::kFold];
  acc_t spread[kBatch<acc_t>][kTileBins][Shape::kSpread];
};

// What a block keeps in shared memory.
template <typename acc_t, typename Shape, int kVec>
struct Shared {
  // RoIs of the share's image and level, in order; a grid has fewer than 2^31. Then the positions among them of those
  // that touch the tile.
  int roi[kCapacity];
  Bounds bounds[kCapacity];
  unsigned short near[kCapacity];
  int kept_by_warp[kThreads / kWarp];
  unsigned char spread_bins[kBatch<acc_t>];  // a bit for each bin that touches the tile
  unsigned char fold_begin[kBatch<acc_t>][Shape::kFold], fold_end[kBatch<acc_t>][Shape::kFold];
  union {
    Weights<acc_t, Shape> weights;
    acc_t partial[kGroups - 1][kGroupThreads][kVec];  // a cell of every thread, for the sum over groups
  };
  // Sums of the first group between rounds of RoIs: in registers they would be live while boxes are read.
  acc_t rounds[Shape::kSpread][kVec][kGroupThreads];
};

// Calls put(position) in the threads that keep something, with positions size, size + 1, ... in the order of threads.
// All threads of the block call it together. Returns the new size.
template <typename Put>
__device__ int append(int (&kept_by_warp)[kThreads / kWarp], int size, bool keep, Put&& put) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const unsigned int votes = __ballot_sync(kWholeWarp, keep);
  if (lane == 0) {
    kept_by_warp[warp] = __popc(votes);
  }
  if (!__syncthreads_or(keep)) {
    return size;
  }
  int position = size + __popc(votes & ((1u << lane) - 1));
  for (int w = 0; w < kThreads / kWarp; ++w) {
    position += w < warp ? kept_by_warp[w] : 0;
    size += kept_by_warp[w];
  }
  if (keep) {
    put(position);
  }
  __syncthreads();
  return size;
}

template <typename Params, bool kChannelsLast, int kVec>
class Gather {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  using Shape = cuda::Shape<kChannelsLast, kVec>;
  using Shared = cuda::Shared<acc_t, Shape, kVec>;
  static constexpr int kSpread = Shape::kSpread, kFold = Shape::kFold, kY = Shape::kTileY, kX = Shape::kTileX;

 public:
  __device__ Gather(const Params& params, Shared& shared)
      : params_(params), shared_(shared), share_(find_share<Shape>(params, blockIdx.x)) {}

  __device__ void run() {
    const int tiles_x = (params_.levels[share_.level].width + kX - 1) / kX;
    const int num_slices = (params_.num_channels + Shape::kSlice - 1) / Shape::kSlice;
    bool is_whole = false;  // one list serves all tiles and slices: nearly always
    int turn = 0;
    for (int tile = share_.first; tile < share_.count; tile += share_.step, ++turn) {
      tile_y_ = tile / tiles_x;
      tile_x_ = tile % tiles_x;
      has_weights_ = false;
      bool is_begun = false, is_mine = true;
      for (int slice = 0; slice < num_slices && is_mine;) {
        int64_t next = 0;
        do {
          const int64_t first = next;
          if (!is_whole) {
            next = list_rois(first);
            is_whole = first == 0 && next >= params_.num_rois;
          }
          if (!is_whole || !is_begun) {
            num_near_ = list_near();
          }
          if (!is_begun) {
            is_begun = true;
            is_hot_ = !is_whole || num_near_ > kHotRoIs;
            is_mine = is_hot_ || turn % gridDim.y == blockIdx.y;
            slice = is_hot_ ? blockIdx.y : 0;
          }
          if (!is_mine || slice >= num_slices) {
            break;
          }
          channel_ = (slice + (is_hot_ ? 0 : group())) * Shape::kSlice + channel_lane() * kVec;
          acc_t sums[kSpread][kVec] = {};
          add_near(num_near_, sums);
          if (is_hot_) {
            add_groups(sums);
          }
          if (!is_whole) {
            add_rounds(sums, first == 0);
          }
          const bool is_last = is_whole || next >= params_.num_rois;
          if (is_last && channel_ < params_.num_channels && (!is_hot_ || group() == 0)) {
            write(sums);
          }
        } while (!is_whole && next < params_.num_rois);
        slice += is_hot_ ? gridDim.y : kGroups;
      }
    }
  }

 private:
  const Params& params_;
  Shared& shared_;
  const Share share_;
  int tile_y_, tile_x_;  // in tiles
  int channel_;          // the first of this thread
  int list_size_, num_near_;
  bool is_hot_;
  bool has_weights_;  // of all RoIs near the tile

  // Neighbouring threads own what lies side by side in memory.
  __device__ static int group() { return threadIdx.x / kGroupThreads; }
  __device__ static int fold_cell() {
    return kChannelsLast ? threadIdx.x % kGroupThreads / Shape::kLanes : threadIdx.x % kFold;
  }
  __device__ static int channel_lane() {
    return kChannelsLast ? threadIdx.x % Shape::kLanes : threadIdx.x % kGroupThreads / kFold;
  }

  // Lists the RoIs of the share's image and level, from row `first` on and until the list is full. Returns the row at
  // which it ended.
  __device__ int64_t list_rois(int64_t first) {
    using box_t = typename Params::box_t;
    int size = 0;
    int64_t next = first;
    for (; next < params_.num_rois && size <= kCapacity - kThreads; next += kThreads) {
      const int64_t row = next + threadIdx.x;
      bool keep = false;
      Bounds bounds;
      // Most rows are of another image, and end after one load.
      if (row < params_.num_rois && std::trunc(params_.boxes[row * 5]) == box_t(share_.image)) {
        const RoI<acc_t> roi = roi_at(params_, row);
        keep = roi.level == share_.level;
        if (keep) {
          const Range y = cells_near(roi.y), x = cells_near(roi.x);
          keep = y.begin < y.end && x.begin < x.end;
          bounds = {saturated(y.begin / kY), saturated((y.end - 1) / kY), saturated(x.begin / kX),
                    saturated((x.end - 1) / kX)};
        }
      }
      size = append(shared_.kept_by_warp, size, keep, [&](int position) {
        shared_.roi[position] = static_cast<int>(row);
        shared_.bounds[position] = bounds;
      });
    }
    list_size_ = size;
    return next;
  }

  // Lists those of them that touch the tile.
  __device__ int list_near() {
    const unsigned short y = saturated(tile_y_), x = saturated(tile_x_);
    int size = 0;
    for (int first = 0; first < list_size_; first += kThreads) {
      const int position = first + threadIdx.x;
      const Bounds bounds = shared_.bounds[min(position, list_size_ - 1)];
      const bool keep = position < list_size_ && bounds.first_y <= y && y <= bounds.last_y && bounds.first_x <= x &&
                        x <= bounds.last_x;
      size = append(shared_.kept_by_warp, size, keep,
                    [&](int to) { shared_.near[to] = static_cast<unsigned short>(position); });
    }
    return size;
  }

  // Row of `boxes` of the RoI at a place in the list of near ones.
  __device__ int64_t row_of(int near) const { return shared_.roi[shared_.near[near]]; }

  // Adds what the near RoIs contribute, a batch of them and a tile of their bins at a time.
  __device__ void add_near(int num_near, acc_t (&sums)[kSpread][kVec]) {
    const bool is_one_batch =
        num_near <= kBatch<acc_t> && params_.bins_y <= kTileBins && params_.bins_x <= kTileBins && !is_hot_;
    for (int first = 0; first < num_near; first += kBatch<acc_t>) {
      const int batch = min(kBatch<acc_t>, num_near - first);
      for (int first_p = 0; first_p < params_.bins_y; first_p += kTileBins) {
        for (int first_q = 0; first_q < params_.bins_x; first_q += kTileBins) {
          if (!has_weights_) {
            __syncthreads();
            weigh(first, batch, first_p, first_q);
            __syncthreads();
            find_folds(batch);
            __syncthreads();
            has_weights_ = is_one_batch;
          }
          for (int i = is_hot_ ? group() : 0; i < batch; i += is_hot_ ? kGroups : 1) {
            add(i, row_of(first + i), first_p, first_q, sums);
          }
        }
      }
    }
  }

  // Thread (RoI, axis, bin) writes the weights of the bin in the cells of the tile.
  __device__ void weigh(int first, int batch, int first_p, int first_q) {
    const int i = threadIdx.x / (2 * kTileBins), bin = threadIdx.x % kTileBins;
    const bool is_y = threadIdx.x / kTileBins % 2 == 0, is_spread = is_y != kChannelsLast;
    bool touches = false;
    if (i < batch) {
      const int cells = is_y ? kY : kX;
      const int first_cell = is_y ? tile_y_ * kY : tile_x_ * kX;
      const int of_roi = (is_y ? first_p : first_q) + bin;
      acc_t* weight = is_spread ? shared_.weights.spread[i][bin] : shared_.weights.fold[i][bin];
#pragma unroll 1
      for (int cell = 0; cell < cells; ++cell) {
        weight[cell] = acc_t(0);
      }
      const Axis<acc_t> axis = axis_at(params_, row_of(first + i), share_.level, is_y);
      if (of_roi < axis.num_bins) {
        const Range samples = samples_near(axis, of_roi, first_cell, first_cell + cells - 1);
        for_each_tap(axis, of_roi, samples, [&](int cell, acc_t tap) {
          if (cell >= first_cell && cell < first_cell + cells) {
            weight[cell - first_cell] += tap;
            touches = true;
          }
        });
      }
    }
    const unsigned int votes = __ballot_sync(kWholeWarp, touches);
    if (i < batch && is_spread && bin == 0) {
      shared_.spread_bins[i] = static_cast<unsigned char>(votes >> (threadIdx.x % kWarp));
    }
  }

  // Thread (RoI, cell of the fold axis) finds the bins that its cell touches.
  __device__ void find_folds(int batch) {
    const int i = threadIdx.x / kFold, cell = threadIdx.x % kFold;
    if (i < batch) {
      int begin = 0, end = 0;
      for (int bin = kTileBins - 1; bin >= 0; --bin) {
        if (shared_.weights.fold[i][bin][cell] != acc_t(0)) {
          begin = bin;
          end = max(end, bin + 1);
        }
      }
      shared_.fold_begin[i][cell] = static_cast<unsigned char>(begin);
      shared_.fold_end[i][cell] = static_cast<unsigned char>(end);
    }
  }

  // Adds what a tile of the bins of one RoI contributes to the thread's cells.
  __device__ void add(int i, int64_t row, int first_p, int first_q, acc_t (&sums)[kSpread][kVec]) const {
    const int cell = fold_cell();
    const int begin = shared_.fold_begin[i][cell], end = shared_.fold_end[i][cell];
    // A bin's channels are one word, or one each from as many planes; past the last plane the last one again.
    constexpr int kWordChannels = kChannelsLast ? kVec : 1, kWords = kVec / kWordChannels;
    const int last_word = kChannelsLast ? 0 : params_.num_channels - 1 - channel_;
    const unsigned int plane = kChannelsLast ? 0 : params_.bins_y * params_.bins_x;
    const int64_t channels = params_.num_channels, bins_x = params_.bins_x;
    const int64_t step_spread = kChannelsLast ? channels : bins_x, step_fold = kChannelsLast ? bins_x * channels : 1;
    const scalar_t* grad = params_.pooled + row * channels * params_.bins_y * bins_x +  // of the RoI's first bin
                           (kChannelsLast ? channel_ : channel_ * int64_t(plane)) +
                           (first_p * bins_x + first_q) * (kChannelsLast ? channels : 1);
    if (channel_ >= params_.num_channels || begin == end) {
      return;
    }
    for (unsigned int bins = shared_.spread_bins[i]; bins != 0; bins &= bins - 1) {
      const int bin = __ffs(bins) - 1;
      acc_t folded[kVec] = {};
      const scalar_t* folds = grad + bin * step_spread + begin * step_fold;
#pragma unroll 1
      for (int f = begin; f < end; f += kInFlight, folds += kInFlight * step_fold) {
        Word<sizeof(scalar_t) * kWordChannels> words[kInFlight][kWords];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          // Past the last bin the last one again: to branch round a load costs more.
          const scalar_t* values = folds + (f + u < end ? u * step_fold : 0);
#pragma unroll
          for (int w = 0; w < kWords; ++w) {
            words[u][w] = load<kWordChannels>(values + min(w, last_word) * plane);
          }
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          if (f + u < end) {
            const acc_t weight = shared_.weights.fold[i][f + u][cell];
#pragma unroll
            for (int v = 0; v < kVec; ++v) {
              const auto values = values_of<scalar_t>(words[u][v / kWordChannels]);
              folded[v] += weight * static_cast<acc_t>(values.value[v % kWordChannels]);
            }
          }
        }
      }
#pragma unroll
      for (int s = 0; s < kSpread; ++s) {
        const acc_t weight = shared_.weights.spread[i][bin][s];
        if (weight != acc_t(0)) {
#pragma unroll
          for (int v = 0; v < kVec; ++v) {
            sums[s][v] += weight * folded[v];
          }
        }
      }
    }
  }

  // Adds the groups' sums in the order of groups, a cell of every thread at a time. The first group has the result.
  __device__ void add_groups(acc_t (&sums)[kSpread][kVec]) {
    const int thread = threadIdx.x % kGroupThreads;
#pragma unroll
    for (int s = 0; s < kSpread; ++s) {
      __syncthreads();
      if (group() > 0) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          shared_.partial[group() - 1][thread][v] = sums[s][v];
        }
      }
      __syncthreads();
      if (group() == 0) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          for (int other = 0; other < kGroups - 1; ++other) {
            sums[s][v] += shared_.partial[other][thread][v];
          }
        }
      }
    }
  }

  // Adds the sums of this round to those of the rounds before.
  __device__ void add_rounds(acc_t (&sums)[kSpread][kVec], bool is_first) {
    if (group() == 0) {
#pragma unroll
      for (int s = 0; s < kSpread; ++s) {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          acc_t& sum = shared_.rounds[s][v][threadIdx.x];
          sum = sums[s][v] = is_first ? sums[s][v] : sum + sums[s][v];
        }
      }
    }
  }

  __device__ void write(const acc_t (&sums)[kSpread][kVec]) const {
    const auto& level = params_.levels[share_.level];
    const int y = tile_y_ * kY + (kChannelsLast ? fold_cell() : 0),
              x = tile_x_ * kX + (kChannelsLast ? 0 : fold_cell());
    if (y >= level.height || x >= level.width) {
      return;
    }
    scalar_t* cell =
        level.map + share_.image * level.stride_n + channel_ * level.stride_c + y * level.stride_h + x * level.stride_w;
    const int cells = kChannelsLast ? level.width - x : level.height - y;
    const int64_t step = kChannelsLast ? level.stride_w : level.stride_h;
#pragma unroll
    for (int s = 0; s < kSpread; ++s) {
      if (s >= cells) {
        continue;
      }
      if constexpr (kChannelsLast) {
        Vec<scalar_t, kVec> values;
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          values.value[v] = static_cast<scalar_t>(sums[s][v]);
        }
        store<kVec>(cell + s * step, values);
      } else {
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          if (channel_ + v < params_.num_channels) {
            store<1>(cell + s * step + v * level.stride_c, Vec<scalar_t, 1>{static_cast<scalar_t>(sums[s][v])});
          }
        }
      }
    }
  }
};

template <typename Params, int kVec>
__global__ void __launch_bounds__(kThreads, kBlocks<typename Params::acc_t>)
    roi_align_backward_channels_last_kernel(Params params) {
  __shared__ Shared<typename Params::acc_t, Shape<true, kVec>, kVec> shared;
  Gather<Params, true, kVec>(params, shared).run();
}

template <typename Params, int kVec>
__global__ void __launch_bounds__(kThreads, kBlocks<typename Params::acc_t>) roi_align_backward_kernel(Params params) {
  __shared__ Shared<typename Params::acc_t, Shape<false, kVec>, kVec> shared;
  Gather<Params, false, kVec>(params, shared).run();
}

template <typename Shape, typename Params>
cudaError_t launch_backward(const Params& params, void (*kernel)(Params), cudaStream_t stream) {
  int64_t shares = 0;
  for (int level = 0; level < params.rule.num_levels; ++level) {
    shares += num_shares<Shape>(params, level) * params.num_images;
  }
  return launch(kernel, dim3(static_cast<unsigned int>(shares), kTurns), dim3(kThreads), stream, params);
}

}  // namespace

template <typename scalar_t, typename box_t>
cudaError_t roi_align_backward(const RoIAlignParams<scalar_t, box_t>& params, cudaStream_t stream) {
  using Params = RoIAlignParams<scalar_t, box_t>;
  constexpr int kVec = 16 / sizeof(scalar_t);
  if (!params.channels_last) {
    constexpr int kPlanes = 16 / sizeof(typename Params::acc_t);
    return launch_backward<Shape<false, kPlanes>>(params, roi_align_backward_kernel<Params, kPlanes>, stream);
  }
  return can_vectorize<scalar_t, kVec>(params)
             ? launch_backward<Shape<true, kVec>>(params, roi_align_backward_channels_last_kernel<Params, kVec>, stream)
             : launch_backward<Shape<true, 1>>(params, roi_align_backward_channels_last_kernel<Params, 1>, stream);
}

#define ROIALIGN_INSTANTIATE(scalar_t, box_t) \
  template cudaError_t roi_align_backward(const RoIAlignParams<scalar_t, box_t>&, cudaStream_t);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cuda
