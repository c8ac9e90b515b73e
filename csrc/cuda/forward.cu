// CUDA forward: level choice, sampling and pooling of every RoI in one launch. Knows no torch.
#include "launch.h"

#include "geometry.h"

#include <climits>

namespace roialign::cuda {
namespace {

// A block owns a tile of the bins of one RoI and a slice of its channels. Taps depend on the RoI alone, so one warp
// merges them once into shared memory and then the block only streams channels; a thread per output element would
// merge them C * P * Q times.
//
//   blockIdx.x → RoI      blockIdx.y → slice of channels      blockIdx.z → tile of bins, row by row
//
//     x taps of bin q: 3 columns     A bin is the weighted sum of the cells where its rows and columns cross:
//            ↓ ↓ ↓                   9 loads here instead of the 16 of its 2 x 2 samples. The tables below hold
//     ───────┼─┼─┼────               both axes of all bins of the tile.
//   y taps → ┼─┼─┼────
//   of bin p ┼─┼─┼────
//     ───────┼─┼─┼────
constexpr int kTileBins = 8;  // bins per side of a tile, at most

// Samples of a bin that the tables take at a time. Adaptive sampling of proposals averages 3 per bin side, so one
// round is the rule; a box the size of the map takes as many rounds as it needs.
constexpr int kRoundSamples = 8;

// Offsets have 64 bits, or 32 where those hold every cell of the maps: then one instruction makes an address of the sum
// of two offsets, not four.
template <typename acc_t, typename offset_t>
struct alignas(sizeof(offset_t) + sizeof(acc_t) > 8 ? 16 : 8) Tap {
  offset_t offset;  // of the cell in its map, along the axis: words
  acc_t weight;
};

// The taps of the bins of a tile along one axis, and the first and last cell among them.
template <typename acc_t, typename offset_t>
struct TapTable {
  Tap<acc_t, offset_t> tap[kTileBins][2 * kRoundSamples];
  int count[kTileBins];
  int first, last;
  Axis<acc_t> axis;
  int64_t stride;  // from cell to cell: words
};

// Bins per side of a tile where `bins` are cut into tiles as even as can be: 14 bins are two tiles of 7.
__host__ __device__ constexpr int tile_bins(int bins, int tiles) { return (bins + tiles - 1) / tiles; }
__host__ __device__ constexpr int num_tiles(int bins) { return (bins + kTileBins - 1) / kTileBins; }

// What a block works on. `y` and `x` are the tables of the first round, filled by lanes 0-7 and 8-15 of warp 0.
// A word is kWord neighbouring values, which one load moves.
template <typename acc_t, typename offset_t_, int kWord_>
struct Tile {
  using offset_t = offset_t_;
  using Table = TapTable<acc_t, offset_t>;
  static constexpr int kWord = kWord_;

  Table y, x;
  int level, image;  // of the RoI
};

// Fills the tables, and keeps them: one round is nearly always all there is. One per thread, the tile shared.
template <typename Params, typename Tile>
class Taps {
  using acc_t = typename Params::acc_t;

 public:
  int first_p, first_q;  // of the tile
  int rows, columns;     // of bins in the tile

  // All threads of the block call it together, and so with the rest.
  __device__ Taps(const Params& params, Tile& tile, int thread) : tile_(tile), thread_(thread) {
    const int tiles_x = num_tiles(params.bins_x), tiles_y = gridDim.z / tiles_x;
    const int tile_y = tile_bins(params.bins_y, tiles_y), tile_x = tile_bins(params.bins_x, tiles_x);
    first_p = blockIdx.z / tiles_x * tile_y;
    first_q = blockIdx.z % tiles_x * tile_x;
    rows = min(tile_y, params.bins_y - first_p);
    columns = min(tile_x, params.bins_x - first_q);
    bool has_more = false;
    if (thread_ < kWarp) {
      const RoI<acc_t> roi = roi_at(params, blockIdx.x);
      if (thread_ == 0) {
        tile_.level = roi.level;
        tile_.image = roi.image;
        tile_.y.axis = roi.y;
        tile_.x.axis = roi.x;
        tile_.y.stride = roi.level < 0 ? 0 : params.levels[roi.level].stride_h / Tile::kWord;
        tile_.x.stride = roi.level < 0 ? 0 : params.levels[roi.level].stride_w / Tile::kWord;
      }
      __syncwarp();
      has_more = roi.level >= 0 && fill(0);
    }
    is_whole_ = !__syncthreads_or(has_more);
  }

  // Calls pool() with the tables of every pair of rounds: once, as a rule, and without another barrier.
  template <typename Pool>
  __device__ void for_each_round(Pool&& pool) {
    if (is_whole_) {
      pool();
      return;
    }
    int round_y = 0, round_x = 0;
    for (bool more_y = true; more_y;) {
      const bool has_more = thread_ < kWarp && fill(thread_ < kTileBins ? round_y : round_x);
      more_y = __syncthreads_or(has_more && thread_ < kTileBins);
      const bool more_x = __syncthreads_or(has_more && thread_ >= kTileBins);
      pool();
      __syncthreads();
      round_x = more_x ? round_x + 1 : 0;
      round_y += !more_x;
      more_y |= more_x;
    }
  }

 private:
  Tile& tile_;
  int thread_;
  bool is_whole_;

  // Thread `bin` of either axis writes the taps that samples of round `round` give its bin. Returns whether the bin
  // has samples left for another round.
  __device__ bool fill(int round) {
    const int bin = thread_ % kTileBins;
    const bool is_y = thread_ < kTileBins;
    if (thread_ >= 2 * kTileBins) {
      return false;
    }
    // Half a warp for two axes: the lanes differ in what they fill, not in what they execute.
    typename Tile::Table& table = is_y ? tile_.y : tile_.x;
    const Axis<acc_t> axis = table.axis;
    int count = 0, first = INT_MAX, last = -1;
    bool has_more = false;
    if (bin < (is_y ? rows : columns)) {
      const int of_roi = (is_y ? first_p : first_q) + bin;
      Range samples = samples_near(axis, of_roi, 0, axis.size - 1);
      // Rounds of a long range start where the one before ended; nothing overflows, a range is at most a map long.
      samples.begin = min(samples.begin + round * kRoundSamples, samples.end);
      has_more = samples.end - samples.begin > kRoundSamples;
      samples.end = min(samples.begin + kRoundSamples, samples.end);
      for_each_tap(axis, of_roi, samples, [&](int cell, acc_t weight) {
        table.tap[bin][count] = {static_cast<typename Tile::offset_t>(cell * table.stride), weight};
        ++count;
        first = min(first, cell);
        last = cell;
      });
    }
    table.count[bin] = count;
    const unsigned int lanes = ((1u << kTileBins) - 1) << (is_y ? 0 : kTileBins);
    for (int step = 1; step < kTileBins; step *= 2) {
      first = min(first, __shfl_xor_sync(lanes, first, step, kTileBins));
      last = max(last, __shfl_xor_sync(lanes, last, step, kTileBins));
    }
    if (bin == 0) {
      table.first = first;
      table.last = last;
    }
    return has_more;
  }
};

// What the bins of a row that pools from nowhere are set to.
template <typename acc_t>
__device__ acc_t value_without_map(int level) {
  return level == kInvalidRow ? acc_t(NAN) : acc_t(0);
}

// channels_last:  threadIdx.x → kVec neighbouring channels, one load per tap      threadIdx.y → column of bins
//
// A warp walks down its column, one bin at a time: kVec sums in registers, so that many warps fit and their loads
// hide each other's latency. It reads 32 * kVec neighbouring channels of a cell at once, kInFlight cells at a time.
// Neighbouring bins read few cells twice, and those from the cache.
constexpr int kInFlight = 4;

// Calls body() with a constant of the value of `count`, 1 to kInFlight: loads of a known number need no predicates.
template <typename Body>
__device__ void with_count(int count, const Body& body) {
  static_assert(kInFlight == 4);
  switch (count) {
    case 1:
      return body(std::integral_constant<int, 1>());
    case 2:
      return body(std::integral_constant<int, 2>());
    case 3:
      return body(std::integral_constant<int, 3>());
    default:
      return body(std::integral_constant<int, kInFlight>());
  }
}

template <typename Params, int kVec, typename offset_t>
__global__ void __launch_bounds__(kWarp* kTileBins, kBlocks<typename Params::acc_t>)
    roi_align_forward_channels_last_kernel(Params params) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  using word_t = Word<sizeof(scalar_t) * kVec>;
  using Tile = cuda::Tile<acc_t, offset_t, kVec>;
  __shared__ Tile tile;
  Taps<Params, Tile> taps(params, tile, threadIdx.y * kWarp + threadIdx.x);
  const int q = threadIdx.y;
  const int channel = (blockIdx.y * kWarp + threadIdx.x) * kVec;
  const bool is_owner = channel < params.num_channels && q < taps.columns;
  const bool has_map = tile.level >= 0;
  const auto& level = params.levels[has_map ? tile.level : 0];
  const auto* map = reinterpret_cast<const word_t*>(level.map + (has_map ? tile.image : 0) * level.stride_n + channel);
  scalar_t* bin =
      params.pooled +
      ((int64_t(blockIdx.x) * params.bins_y + taps.first_p) * params.bins_x + taps.first_q + q) * params.num_channels +
      channel;

  for (int p = 0; p < taps.rows; ++p, bin += int64_t(params.bins_x) * params.num_channels) {
    acc_t sums[kVec];
#pragma unroll
    for (int v = 0; v < kVec; ++v) {
      sums[v] = value_without_map<acc_t>(tile.level);
    }
    const auto pool = [&] {
      const int count_y = is_owner ? tile.y.count[p] : 0, count_x = tile.x.count[q];
      for (int j = 0; j < count_x; j += kInFlight) {
        with_count(min(count_x - j, kInFlight), [&](auto constant) {
          constexpr int kCount = decltype(constant)::value;
          offset_t columns[kCount];
          acc_t weights[kCount];
#pragma unroll
          for (int u = 0; u < kCount; ++u) {
            columns[u] = tile.x.tap[q][j + u].offset;
            weights[u] = tile.x.tap[q][j + u].weight;
          }
#pragma unroll 1
          for (int i = 0; i < count_y; ++i) {
            const auto [row, weight_y] = tile.y.tap[p][i];
            word_t cells[kCount];
#pragma unroll
            for (int u = 0; u < kCount; ++u) {
              cells[u] = __ldg(map + (row + columns[u]));
            }
#pragma unroll
            for (int u = 0; u < kCount; ++u) {
              const acc_t weight = weight_y * weights[u];
              const auto cell = values_of<scalar_t>(cells[u]);
#pragma unroll
              for (int v = 0; v < kVec; ++v) {
                sums[v] += weight * static_cast<acc_t>(cell.value[v]);
              }
            }
          }
        });
      }
    };
    if (has_map) {
      taps.for_each_round(pool);
    }
    if (is_owner) {
      Vec<scalar_t, kVec> values;
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        values.value[v] = static_cast<scalar_t>(sums[v]);
      }
      store<kVec>(bin, values);
    }
  }
}

// NCHW:  warp → channels of the slice, one at a time or, where the RoI is narrow, two side by side
//        lane → column of the map in the first pass, column and row of bins in the second
//
//     map, rows of the RoI                 shared memory, a line per bin row           bins
//     x→  ▒▒▒▒▒▒▒▒▒▒▒▒      y pass                              x pass
//         ▒▒▒▒▒▒▒▒▒▒▒▒   ──────────→   p = 0  ▒▒▒▒▒▒▒▒▒▒▒▒   ──────────→   ▒▒▒
//         ▒▒▒▒▒▒▒▒▒▒▒▒   in registers  p = 1  ▒▒▒▒▒▒▒▒▒▒▒▒   lanes (p, q)  ▒▒▒
//
// A load is a piece of a map's row: lane = bin instead would gather from as many rows as a warp has bins, and load
// 50 to 100 cells for the 20 of a row. Of proposals 45 % are no wider than 16 cells and 89 % no wider than 32; what is
// wider takes windows of 32 columns.
constexpr int kWarps = 8;
constexpr int kSlice = 64;                   // channels of a block: 8 for each warp, to outweigh filling the tables
constexpr int kMaxPack = 2;                  // channels side by side in a warp
constexpr int kBinRows = kWarp / kTileBins;  // rows of bins that a warp finishes at a time

template <typename Params, typename offset_t>
__global__ void __launch_bounds__(kWarp* kWarps, sizeof(typename Params::acc_t) == 4 ? 3 : 1)
    roi_align_forward_kernel(Params params) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  using Tile = cuda::Tile<acc_t, offset_t, 1>;
  constexpr int kDeep = 8 / sizeof(acc_t);  // channels of a lane at a time: their loads overlap
  constexpr int kMaxLines = kDeep * kMaxPack * kTileBins;
  constexpr int kSums = kMaxLines / kBinRows;
  // A line holds `width` columns and one unused, which spreads the lines over the banks.
  __shared__ acc_t lines_of_warps[kWarps][kMaxLines * (kWarp / kMaxPack + 1)];
  __shared__ int64_t bins_of_line[kMaxLines];  // (channel, p) of a line → offset of its first bin
  __shared__ Tile tile;

  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  Taps<Params, Tile> taps(params, tile, thread);
  const bool has_map = tile.level >= 0;
  const auto& level = params.levels[has_map ? tile.level : 0];
  const int extent = has_map ? tile.x.last - tile.x.first + 1 : kWarp;
  const int width = extent <= kWarp / 2 ? kWarp / 2 : kWarp;
  const int pack = kWarp / width, channels = kDeep * pack;  // of a warp at a time
  const int64_t plane = int64_t(params.bins_y) * params.bins_x;
  if (thread < channels * taps.rows) {
    bins_of_line[thread] = thread / taps.rows * plane + (taps.first_p + thread % taps.rows) * int64_t(params.bins_x);
  }
  __syncthreads();

  const int first_channel = blockIdx.y * kSlice;
  const int end_channel = min(first_channel + kSlice, params.num_channels);
  const int q = lane % kTileBins;
  acc_t* lines = lines_of_warps[warp];
  for (int base = first_channel; base < end_channel; base += kWarps * channels) {
    const int channel = base + warp * channels;
    const int num_lines = min(channels, end_channel - channel) * taps.rows;  // <= 0: nothing for this warp
    acc_t sums[kSums];  // of bins (kBinRows * r + lane / kTileBins, q)
#pragma unroll
    for (int r = 0; r < kSums; ++r) {
      sums[r] = value_without_map<acc_t>(tile.level);
    }
    // The x pass over the columns from `first` on, of kPack channels side by side. Its loads are constant distances
    // apart and unguarded: what lies past num_lines goes into sums that nobody stores.
    const auto finish = [&](int first, auto constant) {
      constexpr int kPack = decltype(constant)::value, kWidth = kWarp / kPack;
      const acc_t* line = lines + lane / kTileBins * (kWidth + 1);
      const int count = tile.x.count[q];
#pragma unroll 1
      for (int j = 0; j < count; ++j) {
        const auto [offset, weight] = tile.x.tap[q][j];
        const int column = static_cast<int>(offset) - first;
        if (column < 0 || column >= kWidth) {
          continue;
        }
        const acc_t* cell = line + column;
#pragma unroll
        for (int r = 0; r < kSums * kPack / kMaxPack; ++r) {
          sums[r] += weight * cell[r * kBinRows * (kWidth + 1)];
        }
      }
    };
    const auto pool = [&] {
      if (num_lines <= 0) {
        return;
      }
      // Lanes past the RoI or the slice read what the last one does, and nobody reads their sums.
      const int own = min(channel + lane / width, end_channel - 1);
      const int64_t next = own + pack < end_channel ? pack * level.stride_c : 0;  // to the lane's second channel
      const scalar_t* first_plane = level.map + tile.image * level.stride_n + own * level.stride_c;
      const scalar_t* planes[kDeep];
#pragma unroll
      for (int d = 0; d < kDeep; ++d) {
        planes[d] = whole(first_plane + d * next);
      }
      for (int first = tile.x.first; first <= tile.x.last; first += width) {
        const offset_t column = min(first + lane % width, tile.x.last);
        acc_t* line = lines + lane / width * taps.rows * (width + 1) + lane % width;
        for (int p = 0; p < taps.rows; ++p, line += width + 1) {
          const int count = tile.y.count[p];
          acc_t line_sums[kDeep] = {};
          for (int i = 0; i < count; i += kInFlight) {
            with_count(min(count - i, kInFlight), [&](auto constant) {
              constexpr int kCount = decltype(constant)::value;
              Word<sizeof(scalar_t)> cells[kCount][kDeep];
#pragma unroll
              for (int u = 0; u < kCount; ++u) {
#pragma unroll
                for (int d = 0; d < kDeep; ++d) {
                  cells[u][d] = load<1>(planes[d] + (tile.y.tap[p][i + u].offset + column));
                }
              }
#pragma unroll
              for (int u = 0; u < kCount; ++u) {
#pragma unroll
                for (int d = 0; d < kDeep; ++d) {
                  line_sums[d] +=
                      tile.y.tap[p][i + u].weight * static_cast<acc_t>(values_of<scalar_t>(cells[u][d]).value[0]);
                }
              }
            });
          }
#pragma unroll
          for (int d = 0; d < kDeep; ++d) {
            line[d * pack * taps.rows * (width + 1)] = line_sums[d];
          }
        }
        __syncwarp();
        pack == 1 ? finish(first, std::integral_constant<int, 1>()) : finish(first, std::integral_constant<int, 2>());
        __syncwarp();
      }
    };
    if (has_map) {
      taps.for_each_round(pool);
    }
    scalar_t* bins = params.pooled + (int64_t(blockIdx.x) * params.num_channels + channel) * plane + taps.first_q + q;
#pragma unroll
    for (int r = 0; r < kSums; ++r) {
      const int line = r * kBinRows + lane / kTileBins;
      if (q < taps.columns && line < num_lines) {
        store<1>(bins + bins_of_line[line], Vec<scalar_t, 1>{static_cast<scalar_t>(sums[r])});
      }
    }
  }
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

// A grid of RoIs, slices and tiles. Where RoIs are too few to occupy a GPU every row of bins is a tile.
constexpr int64_t kFewBlocks = 512;  // four for each multiprocessor of a large GPU

template <typename Params>
dim3 grid_of(const Params& params, int channels_per_slice) {
  const int64_t slices = (params.num_channels + channels_per_slice - 1) / channels_per_slice;
  const int64_t tiles_x = num_tiles(params.bins_x);
  int64_t tiles_y = num_tiles(params.bins_y);
  if (params.num_rois * slices * tiles_y * tiles_x < kFewBlocks && params.bins_y * tiles_x < kFewBlocks) {
    tiles_y = params.bins_y;
  }
  return dim3(static_cast<unsigned int>(params.num_rois), static_cast<unsigned int>(slices),
              static_cast<unsigned int>(tiles_y * tiles_x));
}

// Whether 32 bits hold the offset of every cell in its map, in words of kWord values.
template <int kWord, typename Params>
bool has_short_offsets(const Params& params) {
  bool has = true;
  for (int l = 0; l < params.rule.num_levels; ++l) {
    const auto& level = params.levels[l];
    has = has && ((level.height - 1) * level.stride_h + (level.width - 1) * level.stride_w) / kWord <= UINT32_MAX;
  }
  return has;
}

template <typename Params, int kVec, typename offset_t>
cudaError_t launch_channels_last(const Params& params, cudaStream_t stream) {
  const unsigned int columns = tile_bins(params.bins_x, num_tiles(params.bins_x));
  return launch(roi_align_forward_channels_last_kernel<Params, kVec, offset_t>, grid_of(params, kWarp * kVec),
                dim3(kWarp, columns), stream, params);
}

}  // namespace

template <typename scalar_t, typename box_t>
cudaError_t roi_align_forward(const RoIAlignParams<scalar_t, box_t>& params, cudaStream_t stream) {
  using Params = RoIAlignParams<scalar_t, box_t>;
  constexpr int kVec = 16 / sizeof(scalar_t);
  if (params.channels_last) {
    return can_vectorize<scalar_t, kVec>(params) && has_short_offsets<kVec>(params)
               ? launch_channels_last<Params, kVec, unsigned int>(params, stream)
               : launch_channels_last<Params, 1, int64_t>(params, stream);
  }
  return launch(has_short_offsets<1>(params) ? roi_align_forward_kernel<Params, unsigned int>
                                             : roi_align_forward_kernel<Params, int64_t>,
                grid_of(params, kSlice), dim3(kWarp * kWarps), stream, params);
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
