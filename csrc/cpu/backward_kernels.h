// Bodies of the CPU backward. Part of for_each_target.h: stands in the namespace of an instruction set.

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
    return sums;
  }

  void finish(scalar_t* grad, int64_t count) {
    if constexpr (!std::is_same_v<scalar_t, acc_t>) {
      int64_t i = 0;
      for (; i + kLanes<acc_t> <= count; i += kLanes<acc_t>) {
        store<acc_t>(grad + i, load<acc_t>(buffer_.data() + i));
      }
      store<acc_t>(grad + i, load<acc_t>(buffer_.data() + i, static_cast<int>(count - i)), static_cast<int>(count - i));
    }
  }

 private:
  std::vector<acc_t> buffer_;
};

// The x pass of a RoI as shuffles: the adjoint of the forward's. Lane i of the window over the RoI's cells is a sum
// over `depth` bins of a lane of a row of bins times a weight. A row of bins is one vector with a zero lane after its
// last bin, which lanes without a tap take: 0 times a bin could be NaN.
template <typename acc_t>
struct Window {
  int chunks = 0;  // 0: no window, taps go one by one
  int depth = 0;
  int64_t start = 0;                                       // of the window, from the start of a row of the map
  std::vector<typename VectorOf<acc_t>::index_t> indices;  // [depth, chunks * lanes]
  std::vector<acc_t> weights;                              // [depth, chunks * lanes]
};

// A RoI from the cells' side: which bins feed each.
template <typename acc_t>
struct RoICells {
  Taps<acc_t> y, x;
  Window<acc_t> window;

  void prefetch_tables() const {
    prefetch(window.indices.data(), window.indices.size());
    prefetch(window.weights.data(), window.weights.size());
    prefetch(y.taps.data(), y.taps.size());
  }
};

constexpr int kMaxChunks = 4;
constexpr int kRows = 4;  // rows of bins that are spread at a time

template <typename acc_t>
Window<acc_t> make_window(const RoICells<acc_t>& cells, int num_bins, int height, int width) {
  constexpr int kL = kLanes<acc_t>;
  Window<acc_t> window;
  const int chunks = (cells.x.width() + kL - 1) / kL;
  if (!kHasShuffle || cells.x.taps.empty() || cells.y.taps.empty() || chunks > kMaxChunks || num_bins >= kL) {
    return window;
  }
  if (!place_window(cells.y, cells.x, {height, width, width}, kL, chunks * kL, window.start)) {
    return window;
  }
  window.chunks = chunks;
  for (int i = 0; i < cells.x.width(); ++i) {
    window.depth = std::max(window.depth, cells.x.offsets[i + 1] - cells.x.offsets[i]);
  }
  window.indices.assign(size_t(window.depth) * chunks * kL, num_bins);
  window.weights.assign(window.indices.size(), acc_t(0));
  for (int i = 0; i < cells.x.width(); ++i) {
    const int64_t lane = cells.x.first + i - window.start;
    for (int t = cells.x.offsets[i]; t < cells.x.offsets[i + 1]; ++t) {
      const size_t at = size_t(t - cells.x.offsets[i]) * chunks * kL + lane;
      window.indices[at] = cells.x.taps[t].index;
      window.weights[at] = cells.x.taps[t].weight;
    }
  }
  return window;
}

// Adds a few channels of a RoI through its window. The x pass takes the channels one by one and spreads a few rows of
// bins over the window at a time, so that the shuffles' indices and weights are loaded once for all of them. The y pass
// takes the channels together, so that a tap's address and weight are worked out once and the cells of several planes
// are on their way from memory at a time.
template <int kChannels, int kChunks, typename scalar_t, typename acc_t>
inline void add_rows(const RoICells<acc_t>& cells, acc_t* planes, int64_t num_cells, int64_t width,
                     const scalar_t* grad_bins, const scalar_t* grad_end, int bins_y, int bins_x, const acc_t* is_bin,
                     acc_t* spread) {
  constexpr int kL = kLanes<acc_t>;
  const Window<acc_t>& window = cells.window;
  const Vector<acc_t> zero = {};
  const auto mask = load<acc_t>(is_bin) != zero;
  const int64_t spread_channel = int64_t(bins_y + kRows) * kChunks * kL;
  for (int c = 0; c < kChannels; ++c) {
    for (int first_p = 0; first_p < bins_y; first_p += kRows) {
      Vector<acc_t> rows[kRows];
      for (int i = 0; i < kRows; ++i) {
        const scalar_t* row = grad_bins + (int64_t(c) * bins_y + first_p + i) * bins_x;
        if (first_p + i >= bins_y) {
          rows[i] = zero;
        } else {
          rows[i] = row + kL <= grad_end ? load<acc_t>(row) : load<acc_t>(row, bins_x);
          rows[i] = mask ? rows[i] : zero;
        }
      }
      for (int v = 0; v < kChunks; ++v) {
        Vector<acc_t> sums[kRows] = {};
        for (int d = 0; d < window.depth; ++d) {
          const size_t at = (size_t(d) * kChunks + v) * kL;
          Indices<acc_t> lanes;
          std::memcpy(&lanes, window.indices.data() + at, sizeof(lanes));
          const Vector<acc_t> weight = load<acc_t>(window.weights.data() + at);
          for (int i = 0; i < kRows; ++i) {
            sums[i] += weight * shuffle<acc_t, 1>(&rows[i], lanes);
          }
        }
        for (int i = 0; i < kRows; ++i) {
          store<acc_t>(spread + c * spread_channel + (int64_t(first_p + i) * kChunks + v) * kL, sums[i]);
        }
      }
    }
  }
  const int* offsets = cells.y.offsets.data();
  const Tap<acc_t>* taps = cells.y.taps.data();
  acc_t* line = planes + cells.y.first * width + window.start;
  for (int y = 0; y < cells.y.width(); ++y, line += width) {
    if (offsets[y] == offsets[y + 1]) {
      continue;
    }
    for (int v = 0; v < kChunks; ++v) {
      Vector<acc_t> sums[kChannels];
      for (int c = 0; c < kChannels; ++c) {
        sums[c] = load<acc_t>(line + c * num_cells + v * kL);
      }
      for (int t = offsets[y]; t < offsets[y + 1]; ++t) {
        const acc_t* row = spread + (int64_t(taps[t].index) * kChunks + v) * kL;
        for (int c = 0; c < kChannels; ++c) {
          sums[c] += taps[t].weight * load<acc_t>(row + c * spread_channel);
        }
      }
      for (int c = 0; c < kChannels; ++c) {
        store<acc_t>(line + c * num_cells + v * kL, sums[c]);
      }
    }
  }
}

template <int kChannels, typename scalar_t, typename acc_t>
void add_window(const RoICells<acc_t>& cells, acc_t* planes, int64_t num_cells, int64_t width,
                const scalar_t* grad_bins, const scalar_t* grad_end, int bins_y, int bins_x, const acc_t* is_bin,
                acc_t* spread) {
  with_constant(cells.window.chunks, [&](auto chunks) {
    add_rows<kChannels, chunks()>(cells, planes, num_cells, width, grad_bins, grad_end, bins_y, bins_x, is_bin, spread);
  });
}

// The cells of a plane that a RoI and its window lie before.
template <typename acc_t>
int64_t end_of(const RoICells<acc_t>& cells, int64_t width) {
  const int64_t last_row = cells.y.last * width;
  return std::max(last_row + width, last_row + cells.window.start + cells.window.chunks * kLanes<acc_t>);
}

// Adds one channel of a RoI without a window: rows of cells where they have no gaps, else tap by tap.
template <typename scalar_t, typename acc_t>
void add_taps(const RoITaps<acc_t>& roi, acc_t* plane, int64_t width, const scalar_t* grad_bins, int bins_y, int bins_x,
              std::vector<acc_t>& row) {
  const auto spread_x = [&](int q, acc_t grad, acc_t* cells, int first) {
    for (int t = roi.x.offsets[q]; t < roi.x.offsets[q + 1]; ++t) {
      cells[roi.x.taps[t].index - first] += roi.x.taps[t].weight * grad;
    }
  };
  const bool has_gaps = roi.x.has_gaps();
  const int row_width = std::max(roi.x.width(), 0);
  for (int p = 0; p < bins_y; ++p, grad_bins += bins_x) {
    const Tap<acc_t>* begin = roi.y.taps.data() + roi.y.offsets[p];
    const Tap<acc_t>* end = roi.y.taps.data() + roi.y.offsets[p + 1];
    if (has_gaps) {
      for (const Tap<acc_t>* tap = begin; tap != end; ++tap) {
        for (int q = 0; q < bins_x; ++q) {
          spread_x(q, tap->weight * static_cast<acc_t>(grad_bins[q]), plane + tap->index * width, 0);
        }
      }
      continue;
    }
    row.assign(row_width, acc_t(0));
    for (int q = 0; q < bins_x; ++q) {
      spread_x(q, static_cast<acc_t>(grad_bins[q]), row.data(), roi.x.first);
    }
    for (const Tap<acc_t>* tap = begin; tap != end; ++tap) {
      acc_t* cells = plane + tap->index * width + roi.x.first;
      for (int i = 0; i < row_width; ++i) {
        cells[i] += tap->weight * row[i];
      }
    }
  }
}

template <typename Params>
std::vector<RoICells<typename Params::acc_t>> cells_of_rois(const Params& params,
                                                            const std::vector<RoITaps<typename Params::acc_t>>& rois,
                                                            const ParallelFor& parallel_for) {
  constexpr int64_t kGrain = 64;
  std::vector<RoICells<typename Params::acc_t>> result(rois.size());
  parallel_for(params.num_rois, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (rois[k].level >= 0) {
        const auto& level = params.levels[rois[k].level];
        result[k].y = taps_of_cells(rois[k].y);
        result[k].x = taps_of_cells(rois[k].x);
        if (!params.channels_last) {
          result[k].window = make_window(result[k], params.bins_x, level.height, level.width);
        }
      }
    }
  });
  return result;
}

// NCHW. A piece of work owns a few channels of one map. The RoIs pass over it from top to bottom, and cells are zeroed
// when the first of them gets there, so that zeros stay in cache until sums replace them.
template <typename Params>
void gather_planes(const Params& params, const std::vector<RoITaps<typename Params::acc_t>>& rois,
                   const RoIOrder& order, const ParallelFor& parallel_for) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  constexpr int kL = kLanes<acc_t>;
  constexpr int kChannels = 8;               // against 4, 1.15 times as fast; 16 gain nothing
  constexpr int64_t kBufferBytes = 3 << 20;  // of a thread's sums where they are not stored as computed
  const int num_levels = params.rule.num_levels;
  const int64_t num_channels = params.num_channels;
  const int64_t bins = int64_t(params.bins_y) * params.bins_x;
  const scalar_t* const grad_end = params.pooled + params.num_rois * num_channels * bins;
  const auto cells = cells_of_rois(params, rois, parallel_for);

  struct Piece {
    int64_t map, first_channel, last_channel;
  };
  std::vector<Piece> pieces;
  for (int64_t map = 0; map < int64_t(params.num_images) * num_levels; ++map) {
    const auto& level = params.levels[map % num_levels];
    const int64_t plane_bytes = std::max<int64_t>(int64_t(level.height) * level.width * sizeof(acc_t), 1);
    const int64_t step = std::is_same_v<scalar_t, acc_t>
                             ? kChannels
                             : std::min<int64_t>(std::max<int64_t>(kBufferBytes / plane_bytes, 1), kChannels);
    for (int64_t c = 0; c < num_channels; c += step) {
      pieces.push_back({map, c, std::min(c + step, num_channels)});
    }
  }

  const int64_t num_pieces = static_cast<int64_t>(pieces.size());
  parallel_for(
      num_pieces, grain_of(num_cells_of(params) + num_bins_of(params), num_pieces), [&](int64_t begin, int64_t end) {
        Accumulator<scalar_t, acc_t> accumulator;
        std::vector<acc_t> row, spread(int64_t(kChannels) * (params.bins_y + kRows) * kMaxChunks * kL), is_bin(kL);
        std::fill_n(is_bin.begin(), std::min(params.bins_x, kL), acc_t(1));
        for (int64_t i = begin; i < end; ++i) {
          const auto [map, first_channel, last_channel] = pieces[i];
          const auto& level = params.levels[map % num_levels];
          scalar_t* grad = level.map + map / num_levels * level.stride_n + first_channel * level.stride_c;
          const int64_t num_cells = int64_t(level.height) * level.width;
          acc_t* planes = accumulator.start(grad, num_cells * (last_channel - first_channel));
          const auto grad_bins_of = [&, first = first_channel](int64_t k) {
            return params.pooled + (k * num_channels + first) * bins;
          };
          int64_t num_zeroed = 0;
          const auto zero_until = [&](int64_t end) {
            for (int64_t c = first_channel; c < last_channel && num_zeroed < end; ++c) {
              std::fill(planes + (c - first_channel) * num_cells + num_zeroed,
                        planes + (c - first_channel) * num_cells + end, acc_t(0));
            }
            num_zeroed = std::max(num_zeroed, end);
          };
          for (int64_t j = order.offsets[map]; j < order.offsets[map + 1]; ++j) {
            const int64_t k = order.rois[j];
            const scalar_t* grad_bins = grad_bins_of(k);
            if (j + 1 < order.offsets[map + 1]) {  // in an order in which hardware sees no pattern
              cells[order.rois[j + 1]].prefetch_tables();
              prefetch(grad_bins_of(order.rois[j + 1]), (last_channel - first_channel) * bins);
            }
            acc_t* plane = planes;
            int64_t c = first_channel;
            zero_until(end_of(cells[k], level.width));
            if constexpr (kHasShuffle) {
              if (cells[k].window.chunks > 0) {
                if (last_channel - first_channel == kChannels) {
                  add_window<kChannels>(cells[k], plane, num_cells, level.width, grad_bins, grad_end, params.bins_y,
                                        params.bins_x, is_bin.data(), spread.data());
                  continue;
                }
                for (; c < last_channel; ++c, grad_bins += bins, plane += num_cells) {
                  add_window<1>(cells[k], plane, num_cells, level.width, grad_bins, grad_end, params.bins_y,
                                params.bins_x, is_bin.data(), spread.data());
                }
              }
            }
            for (; c < last_channel; ++c, grad_bins += bins, plane += num_cells) {
              add_taps(rois[k], plane, level.width, grad_bins, params.bins_y, params.bins_x, row);
            }
          }
          zero_until(num_cells);
          accumulator.finish(grad, num_cells * (last_channel - first_channel));
        }
      });
}

// Adds kVectors vectors of channels of a RoI to a row of cells, the last of them `tail` channels wide.
template <int kVectors, typename scalar_t, typename acc_t>
inline void add_row(const RoICells<acc_t>& cells, int y, acc_t* line, int64_t num_channels, const scalar_t* grad_bins,
                    int bins_x, int tail, acc_t* spread) {
  constexpr int kL = kLanes<acc_t>;
  const auto load_some = [tail](const auto* data) { return tail < kL ? load<acc_t>(data, tail) : load<acc_t>(data); };
  // The row of bins as this row of cells sees it.
  for (int q = 0; q < bins_x; ++q) {
    Vector<acc_t> sums[kVectors] = {};
    for (int t = cells.y.offsets[y]; t < cells.y.offsets[y + 1]; ++t) {
      const auto& tap = cells.y.taps[t];
      const scalar_t* bin = grad_bins + (int64_t(tap.index) * bins_x + q) * num_channels;
      for (int v = 0; v < kVectors; ++v) {
        sums[v] += tap.weight * load_some(bin + v * kL);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      store<acc_t>(spread + (int64_t(q) * kVectors + v) * kL, sums[v]);
    }
  }
  for (int x = 0; x < cells.x.width(); ++x) {
    if (cells.x.offsets[x] == cells.x.offsets[x + 1]) {
      continue;
    }
    acc_t* cell = line + (cells.x.first + x) * num_channels;
    Vector<acc_t> sums[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      sums[v] = load_some(cell + v * kL);
    }
    for (int t = cells.x.offsets[x]; t < cells.x.offsets[x + 1]; ++t) {
      const auto& tap = cells.x.taps[t];
      for (int v = 0; v < kVectors; ++v) {
        sums[v] += tap.weight * load<acc_t>(spread + (int64_t(tap.index) * kVectors + v) * kL);
      }
    }
    for (int v = 0; v < kVectors; ++v) {
      tail < kL ? store<acc_t>(cell + v * kL, sums[v], tail) : store<acc_t>(cell + v * kL, sums[v]);
    }
  }
}

// channels_last. A piece of work owns a row of one map with all its channels.
template <typename Params>
void gather_rows(const Params& params, const std::vector<RoITaps<typename Params::acc_t>>& rois, const RoIOrder& order,
                 const ParallelFor& parallel_for) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  constexpr int kL = kLanes<acc_t>;
  constexpr int kVectors = 4;
  const int num_levels = params.rule.num_levels;
  const int64_t num_channels = params.num_channels;
  const auto cells = cells_of_rois(params, rois, parallel_for);
  std::vector<std::pair<int64_t, int>> rows;  // map, row
  for (int64_t map = 0; map < int64_t(params.num_images) * num_levels; ++map) {
    for (int y = 0; y < params.levels[map % num_levels].height; ++y) {
      rows.emplace_back(map, y);
    }
  }
  const int64_t num_pieces = static_cast<int64_t>(rows.size());
  parallel_for(
      num_pieces, grain_of(num_cells_of(params) + num_bins_of(params), num_pieces), [&](int64_t begin, int64_t end) {
        Accumulator<scalar_t, acc_t> accumulator;
        std::vector<acc_t> spread(int64_t(params.bins_x) * kVectors * kL);
        for (int64_t piece = begin; piece < end; ++piece) {
          const auto [map, y] = rows[piece];
          const auto& level = params.levels[map % num_levels];
          scalar_t* grad = level.map + map / num_levels * level.stride_n + y * level.stride_h;
          acc_t* line = accumulator.start(grad, level.width * num_channels);
          std::fill_n(line, level.width * num_channels, acc_t(0));
          for (int64_t i = order.offsets[map]; i < order.offsets[map + 1]; ++i) {
            const int64_t k = order.rois[i];
            const int row = y - cells[k].y.first;
            if (row < 0) {
              break;  // the order is from top to bottom: neither this RoI nor any that follows reaches up here
            }
            if (row >= cells[k].y.width() || cells[k].y.offsets[row] == cells[k].y.offsets[row + 1]) {
              continue;
            }
            const scalar_t* grad_bins = params.pooled + k * params.bins_y * params.bins_x * num_channels;
            int64_t c = 0;
            for (; c + kVectors * kL <= num_channels; c += kVectors * kL) {
              add_row<kVectors>(cells[k], row, line + c, num_channels, grad_bins + c, params.bins_x, kL, spread.data());
            }
            for (; c < num_channels; c += kL) {
              add_row<1>(cells[k], row, line + c, num_channels, grad_bins + c, params.bins_x,
                         static_cast<int>(std::min<int64_t>(kL, num_channels - c)), spread.data());
            }
          }
          accumulator.finish(grad, level.width * num_channels);
        }
      });
}
