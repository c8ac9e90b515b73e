// The formula, once, for host and device: the level of a box, a box in map cells, the merged taps of an axis.
// Knows params.h; knows no torch and no device.
#pragma once

#include "params.h"

#include <cmath>
#include <cstdint>

#if defined(__CUDACC__) || defined(ROIALIGN_EXT_EMULATED)
#define ROIALIGN_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define ROIALIGN_HOST_DEVICE inline
#endif

namespace roialign {

// a * b, rounded on its own. nvcc would fuse it with the addition that follows, and a sample that lies within an
// ulp of the border would be outside on one device and inside on the other.
template <typename T>
ROIALIGN_HOST_DEVICE T product(T a, T b) {
#ifdef __CUDA_ARCH__
  if constexpr (std::is_same_v<T, float>) {
    return __fmul_rn(a, b);
  } else {
    return __dmul_rn(a, b);
  }
#else
  return a * b;
#endif
}

template <typename T>
ROIALIGN_HOST_DEVICE T clamp(T value, T low, T high) {
  return value < low ? low : value > high ? high : value;
}

// NaN and infinity are the two values whose difference with themselves is not zero.
template <typename T>
ROIALIGN_HOST_DEVICE bool is_finite(T value) {
  return value - value == T(0);
}

// What stands in place of a level for a row that pools from nowhere.
constexpr int kEmptyRow = -1;    // padding, or a box that no level takes: zeros, no gradient
constexpr int kInvalidRow = -2;  // names an image or a level that is not there: NaN, no gradient

// Level of a box as an index into the pyramid, or kEmptyRow where the area or a coordinate is not a number.
template <typename box_t>
ROIALIGN_HOST_DEVICE int level_of(const LevelRule& rule, box_t x1, box_t y1, box_t x2, box_t y2) {
  const box_t area = product(x2 - x1, y2 - y1);
  const box_t level = std::floor(box_t(rule.canonical_level) +
                                 std::log2(std::sqrt(area) / box_t(rule.canonical_scale)) + box_t(rule.eps));
  // The root of a negative area, of a box inverted along one axis, is NaN and so is its level.
  if (level != level || !is_finite(x1) || !is_finite(y1) || !is_finite(x2) || !is_finite(y2)) {
    return kEmptyRow;
  }
  const box_t k_min = box_t(rule.k_min);
  return static_cast<int>(clamp(level, k_min, k_min + box_t(rule.num_levels - 1)) - k_min);
}

// One axis of a RoI on its map. Average pooling is separable, borders included: a RoI is two of these.
template <typename acc_t>
struct Axis {
  acc_t start;      // low edge of the RoI, in cells
  acc_t bin_size;   // cells; negative where an inverted box is sampled mirrored
  int num_samples;  // per bin; 0: the RoI takes no sample and its bins are zero
  int num_bins;
  int size;         // cells of the map
  bool is_widened;  // a box narrower than a cell is sampled as wide as one: its far edge moves nothing
};

// A box asks for at most this many samples per bin side. Only adaptive sampling of a box of a billion cells gets
// there, and of its samples at most a map's width lies on the map.
constexpr int kMaxSamples = 1 << 30;

template <typename acc_t>
ROIALIGN_HOST_DEVICE Axis<acc_t> to_map(acc_t low, acc_t high, acc_t scale, bool aligned, int num_bins,
                                        int sampling_ratio, int size) {
  const acc_t offset = aligned ? acc_t(0.5) : acc_t(0);
  const acc_t start = product(low, scale) - offset;
  const acc_t box_length = product(high, scale) - offset - start;
  const bool is_widened = !aligned && box_length < acc_t(1);
  const acc_t length = is_widened ? acc_t(1) : box_length;
  Axis<acc_t> axis{start, acc_t(0), 0, num_bins, size, is_widened};
  if (!is_finite(start) || !is_finite(box_length)) {
    return axis;
  }
  axis.bin_size = length / acc_t(num_bins);
  // An adaptive RoI without extent, or inverted, takes no samples.
  axis.num_samples = sampling_ratio > 0
                         ? sampling_ratio
                         : static_cast<int>(clamp(std::ceil(axis.bin_size), acc_t(0), acc_t(kMaxSamples)));
  return axis;
}

// Position of a sample in cells, in the order of operations of torchvision's CPU kernel.
template <typename acc_t>
ROIALIGN_HOST_DEVICE acc_t sample_position(const Axis<acc_t>& axis, int bin, int sample) {
  return axis.start + product(acc_t(bin), axis.bin_size) +
         product(acc_t(sample) + acc_t(0.5), axis.bin_size) / acc_t(axis.num_samples);
}

// Positions beyond these see no cell; both ends themselves still do.
template <typename acc_t>
ROIALIGN_HOST_DEVICE bool is_on_map(const Axis<acc_t>& axis, acc_t position) {
  return position >= acc_t(-1) && position <= acc_t(axis.size);
}

// What a sample reads along an axis: cell `low`, and its right neighbour where that has a share.
template <typename acc_t>
struct Sample {
  int low;         // -1: the sample lies outside the map and reads nothing
  acc_t fraction;  // share of cell low + 1, which is on the map wherever this is not 0
  bool moves;      // the share grows as the sample moves right; false where it is clamped to the border
};

template <typename acc_t>
ROIALIGN_HOST_DEVICE Sample<acc_t> sample_on_map(const Axis<acc_t>& axis, acc_t position) {
  const acc_t last = acc_t(axis.size - 1);
  const acc_t on_cells = clamp(position, acc_t(0), last);
  const int low = static_cast<int>(on_cells);
  return {low, on_cells - acc_t(low), position >= acc_t(0) && position < last};
}

template <typename acc_t>
ROIALIGN_HOST_DEVICE Sample<acc_t> sample_at(const Axis<acc_t>& axis, int bin, int sample) {
  const acc_t position = sample_position(axis, bin, sample);
  return is_on_map(axis, position) ? sample_on_map(axis, position) : Sample<acc_t>{-1, acc_t(0), false};
}

// By how many cells a sample moves when the far edge of the RoI moves by one; the near edge moves it by the rest of
// one. The number of samples stays.
template <typename acc_t>
ROIALIGN_HOST_DEVICE acc_t share_of_far_edge(const Axis<acc_t>& axis, int bin, int sample) {
  const acc_t in_bin = (acc_t(sample) + acc_t(0.5)) / acc_t(axis.num_samples);
  return axis.is_widened ? acc_t(0) : (acc_t(bin) + in_bin) / acc_t(axis.num_bins);
}

// How a sample's value changes as it moves by one cell along either axis.
template <typename acc_t>
struct Slopes {
  acc_t y, x;
};

// The slopes at a sample on the map, whose neighbours are cell(rows below y.low, columns right of x.low). A cell
// without a share is not read.
template <typename acc_t, typename Cell>
ROIALIGN_HOST_DEVICE Slopes<acc_t> slopes_at(const Sample<acc_t>& y, const Sample<acc_t>& x, const Cell& cell) {
  const auto row = [&](int dy) {
    const acc_t left = (acc_t(1) - x.fraction) * cell(dy, 0);
    return x.fraction != acc_t(0) ? left + x.fraction * cell(dy, 1) : left;
  };
  const auto column = [&](int dx) {
    const acc_t above = (acc_t(1) - y.fraction) * cell(0, dx);
    return y.fraction != acc_t(0) ? above + y.fraction * cell(1, dx) : above;
  };
  return {y.moves ? row(1) - row(0) : acc_t(0), x.moves ? column(1) - column(0) : acc_t(0)};
}

struct Range {
  int begin, end;
};

// The samples of a bin that can touch cells [first, last], with a margin of two samples for rounding. This bounds
// the work of a RoI by the map, however large the box.
template <typename acc_t>
ROIALIGN_HOST_DEVICE Range samples_near(const Axis<acc_t>& axis, int bin, int first, int last) {
  constexpr int kFewSamples = 8;  // not worth two divisions
  const acc_t spacing = axis.bin_size / acc_t(axis.num_samples);
  if (axis.num_samples <= kFewSamples || !(spacing > acc_t(0))) {
    return {0, axis.num_samples};
  }
  const acc_t bin_start = axis.start + product(acc_t(bin), axis.bin_size);
  const acc_t low = (acc_t(first - 1) - bin_start) / spacing - acc_t(2.5);
  const acc_t high = (acc_t(last + 1) - bin_start) / spacing + acc_t(2.5);
  const acc_t all = acc_t(axis.num_samples);
  return {static_cast<int>(clamp(low, acc_t(0), all)), static_cast<int>(clamp(high, acc_t(0), all))};
}

// Calls tap(cell, weight) for the cells that samples [begin, end) of a bin read, in ascending order. Samples that
// share a cell are merged. The weights are those of the mean over all samples of the bin: samples outside the map
// add no tap and still count.
template <typename acc_t, typename Tap>
ROIALIGN_HOST_DEVICE void for_each_tap(const Axis<acc_t>& axis, int bin, Range samples, Tap&& tap) {
  const acc_t share = acc_t(1) / acc_t(axis.num_samples);
  const bool mirrored = axis.bin_size < acc_t(0);
  int cell = -1;                           // the cell that is gathering weight, and its right neighbour
  acc_t here = acc_t(0), next = acc_t(0);  // the weight gathered by each
  for (int i = samples.begin; i < samples.end; ++i) {
    const int sample = mirrored ? samples.begin + samples.end - 1 - i : i;
    const acc_t position = sample_position(axis, bin, sample);
    if (!is_on_map(axis, position)) {
      continue;
    }
    const auto [low, fraction, moves] = sample_on_map(axis, position);
    if (low != cell) {
      if (cell >= 0) {
        tap(cell, here * share);
      }
      if (low == cell + 1) {
        here = next;
      } else {
        if (next != acc_t(0)) {
          tap(cell + 1, next * share);
        }
        here = acc_t(0);
      }
      next = acc_t(0);
      cell = low;
    }
    here += acc_t(1) - fraction;
    next += fraction;
  }
  if (cell >= 0) {
    tap(cell, here * share);
  }
  if (next != acc_t(0)) {
    tap(cell + 1, next * share);
  }
}

// The cells that any sample of bins [first, last] can touch along an axis, one to spare on either side: positions are
// rounded one by one, so the outermost sample need not be the last.
template <typename acc_t>
ROIALIGN_HOST_DEVICE Range cells_near(const Axis<acc_t>& axis, int first_bin, int last_bin) {
  const acc_t a = sample_position(axis, first_bin, 0);
  const acc_t b = sample_position(axis, last_bin, axis.num_samples - 1);
  const acc_t low = (a < b ? a : b) - acc_t(1), high = (a < b ? b : a) + acc_t(3);
  return {static_cast<int>(clamp(low, acc_t(0), acc_t(axis.size))),
          static_cast<int>(clamp(high, acc_t(0), acc_t(axis.size)))};
}

// Those of the whole RoI.
template <typename acc_t>
ROIALIGN_HOST_DEVICE Range cells_near(const Axis<acc_t>& axis) {
  return cells_near(axis, 0, axis.num_bins - 1);
}

// Where a row of `boxes` pools from.
template <typename acc_t>
struct RoI {
  int image;
  int level;  // or kEmptyRow, kInvalidRow: then the rest means nothing
  Axis<acc_t> y, x;
};

// One axis of a row of `boxes` on the map of a level.
template <typename Params>
ROIALIGN_HOST_DEVICE Axis<typename Params::acc_t> axis_at(const Params& params, int64_t index, int level, bool is_y) {
  using acc_t = typename Params::acc_t;
  const auto* row = params.boxes + index * 5;
  const auto& map = params.levels[level];
  return to_map(acc_t(row[is_y ? 2 : 1]), acc_t(row[is_y ? 4 : 3]), acc_t(is_y ? map.scale_y : map.scale_x),
                params.aligned, is_y ? params.bins_y : params.bins_x, params.sampling_ratio,
                is_y ? map.height : map.width);
}

template <typename Params>
ROIALIGN_HOST_DEVICE RoI<typename Params::acc_t> roi_at(const Params& params, int64_t index) {
  using acc_t = typename Params::acc_t;
  using box_t = typename Params::box_t;
  const box_t* row = params.boxes + index * 5;
  const box_t image = std::trunc(row[0]), x1 = row[1], y1 = row[2], x2 = row[3], y2 = row[4];
  RoI<acc_t> roi{};
  roi.level = kEmptyRow;
  if (image == box_t(-1) || image != image) {
    return roi;
  }
  int64_t level = 0;
  if (params.roi_levels != nullptr) {
    level = params.roi_levels[index];
  } else if (params.rule.num_levels > 1) {
    level = level_of(params.rule, x1, y1, x2, y2);
  }
  // Written as "not inside", because every comparison with NaN is false.
  const bool has_image = image >= box_t(0) && image < box_t(params.num_images);
  if (level != kEmptyRow && (!has_image || level < 0 || level >= params.rule.num_levels)) {
    roi.level = kInvalidRow;
    return roi;
  }
  if (level == kEmptyRow) {
    return roi;
  }
  roi.y = axis_at(params, index, static_cast<int>(level), true);
  roi.x = axis_at(params, index, static_cast<int>(level), false);
  if (roi.y.num_samples > 0 && roi.x.num_samples > 0) {
    roi.image = static_cast<int>(image);
    roi.level = static_cast<int>(level);
  }
  return roi;
}

}  // namespace roialign
