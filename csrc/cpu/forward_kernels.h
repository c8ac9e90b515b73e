// Bodies of the CPU forward. Part of for_each_target.h: stands in the namespace of an instruction set.

// The x pass of a RoI as shuffles. The cells that its taps read are a window of a few vectors; lane i of a row of
// bins is a sum over `depth` taps of a lane of the window times a weight.
//
//   row of cells     | . 1 2 3 4 5 6 7 |       the window, `chunks` vectors wide
//   tap 0             [1 2 4 5]                a shuffle of it for each tap,
//   tap 1             [2 3 5 6]                one lane for each bin
//
// Where a row of cells fits one vector and two rows of bins fit another, two rows are made at once.
template <typename acc_t>
struct Window {
  int chunks = 0;  // 0: no window, taps go one by one
  int rows = 1;    // rows of bins in a vector
  int depth = 0;
  int64_t start = 0;                                       // of the window, from the start of a row of the map
  std::vector<typename VectorOf<acc_t>::index_t> indices;  // [blocks of bins, depth, lanes]
  std::vector<acc_t> weights;                              // [blocks of bins, depth, lanes]
  std::vector<int> empty_bins;                             // along a row, those without taps

  void prefetch_tables() const {
    prefetch(indices.data(), indices.size());
    prefetch(weights.data(), weights.size());
  }
};

constexpr int kMaxChunks = 4;

template <typename acc_t, typename Level>
Window<acc_t> make_window(const RoITaps<acc_t>& roi, const Level& level) {
  constexpr int kL = kLanes<acc_t>;
  Window<acc_t> window;
  const Taps<acc_t>& x = roi.x;
  const int num_bins = static_cast<int>(x.offsets.size()) - 1;
  const int chunks = (x.width() + kL - 1) / kL;
  if (!kHasShuffle || x.taps.empty() || roi.y.taps.empty() || chunks > kMaxChunks) {
    return window;
  }
  for (int bin = 0; bin < num_bins; ++bin) {
    const int depth = x.offsets[bin + 1] - x.offsets[bin];
    window.depth = std::max(window.depth, depth);
    if (depth == 0) {
      window.empty_bins.push_back(bin);
    }
  }
  if (!place_window(roi.y, x, {level.height, level.width, level.stride_h}, kL, chunks * kL, window.start)) {
    return window;
  }
  window.chunks = chunks;
  window.rows = chunks == 1 && 2 * num_bins <= kL ? 2 : 1;
  const int lanes = window.rows * num_bins;
  const int blocks = (lanes + kL - 1) / kL;
  window.indices.resize(int64_t(blocks) * window.depth * kL);
  window.weights.resize(window.indices.size());
  for (int lane = 0; lane < blocks * kL; ++lane) {
    const int row = std::min(lane / num_bins, window.rows - 1), bin = lane < lanes ? lane % num_bins : num_bins - 1;
    for (int d = 0; d < window.depth; ++d) {
      const size_t i = (size_t(lane / kL) * window.depth + d) * kL + lane % kL;
      // Past its own taps a bin repeats the first with weight 0: 0 times a cell of the map, not of what lies beside.
      const int t = x.offsets[bin] + d;
      const bool is_tap = t < x.offsets[bin + 1];
      const int of_window = std::min<int>(x.offsets[bin], x.taps.size() - 1);
      window.indices[i] = static_cast<typename VectorOf<acc_t>::index_t>(
          row * kL + x.taps[is_tap ? t : of_window].index - window.start);
      window.weights[i] = is_tap ? x.taps[t].weight : acc_t(0);
    }
  }
  return window;
}

// The cache lines of the maps that windows read, each once in a section: where the walk first gets to it.
template <typename scalar_t>
struct FirstReads {
  struct Line {
    const scalar_t* cells;  // of channel 0
    int64_t stride_c;
  };
  std::vector<Line> lines;
  std::vector<size_t> offsets;  // lines [offsets[i], offsets[i + 1]) are first read by the i-th RoI of the walk
};

template <typename Params, typename acc_t>
FirstReads<typename Params::scalar_t> first_reads(const Params& params, const std::vector<RoITaps<acc_t>>& rois,
                                                  const std::vector<Window<acc_t>>& windows, const RoIOrder& order,
                                                  int64_t rois_in_section) {
  using scalar_t = typename Params::scalar_t;
  constexpr int64_t kCells = 64 / sizeof(scalar_t);  // of a line
  FirstReads<scalar_t> reads;
  std::vector<std::vector<bool>> is_read(int64_t(params.num_images) * params.rule.num_levels);
  reads.offsets.push_back(0);
  for (int64_t i = 0; i < params.num_rois; ++i) {
    const int64_t k = order.rois[i];
    if (i % rois_in_section == 0) {
      for (auto& map : is_read) {
        map.clear();
      }
    }
    if (windows[k].chunks > 0) {
      const auto& level = params.levels[rois[k].level];
      auto& is_read_of_map = is_read[rois[k].image * params.rule.num_levels + rois[k].level];
      is_read_of_map.resize(((level.height - 1) * level.stride_h + level.width) / kCells + 1);
      for (const auto& tap : rois[k].y.taps) {
        const int64_t first = tap.index * level.stride_h + windows[k].start;
        const int64_t last = first + windows[k].chunks * kLanes<acc_t> - 1;
        for (int64_t line = first / kCells; line <= last / kCells; ++line) {
          if (!is_read_of_map[line]) {
            is_read_of_map[line] = true;
            reads.lines.push_back({level.map + rois[k].image * level.stride_n + line * kCells, level.stride_c});
          }
        }
      }
    }
    reads.offsets.push_back(reads.lines.size());
  }
  return reads;
}

// Asks for lines that the RoIs ahead of the walk will read, in a block of channels: one at a step, because of many at
// once the machine forgets most.
template <typename scalar_t>
class ReadAhead {
 public:
  // Of RoIs [first_roi, last_roi) of the walk.
  ReadAhead(const FirstReads<scalar_t>& reads, int64_t first_roi, int64_t last_roi, int first_channel, int num_channels)
      : reads_(reads), last_roi_(last_roi), first_channel_(first_channel), num_channels_(num_channels) {
    if (!reads_.offsets.empty()) {
      next_ = reads_.offsets[first_roi];
    }
  }

  // The walk is at its i-th RoI.
  void at(int64_t i) {
    constexpr int64_t kRoIs = 32;  // against 8, 2 % faster; 64 gain nothing
    if (!reads_.offsets.empty()) {
      end_ = reads_.offsets[std::min(i + kRoIs, last_roi_)];
    }
  }

  void step() {
    if (next_ < end_) {
      const auto [cells, stride_c] = reads_.lines[next_++];
      const scalar_t* line = cells + first_channel_ * stride_c;
      for (int c = 0; c < num_channels_; ++c, line += stride_c) {
        __builtin_prefetch(line);
      }
    }
  }

 private:
  const FirstReads<scalar_t>& reads_;
  const int64_t last_roi_;
  const int first_channel_, num_channels_;
  size_t next_ = 0, end_ = 0;
};

// A few channels of a RoI through its window. The y pass takes the channels together, tap by tap: a tap's address and
// weight are worked out once, and the rows of several planes are on their way from memory at a time. The x pass takes
// the channels one by one and several vectors of bins together, so that a shuffle's indices and weights are loaded once
// for all of them. A vector of bins that is not full is stored whole where the next of its channel overwrite the rest.
template <int kChannels, int kRows, int kChunks, typename scalar_t, typename acc_t>
inline void pool_rows(const RoITaps<acc_t>& roi, const Window<acc_t>& window, const scalar_t* plane, int64_t stride_c,
                      int64_t stride_h, scalar_t* out, int bins_y, int bins_x, ReadAhead<scalar_t>& ahead) {
  constexpr int kL = kLanes<acc_t>;
  constexpr int kVectors = 4;
  constexpr int kGroup = kVectors * kRows;  // rows of bins
  const int* offsets = roi.y.offsets.data();
  const Tap<acc_t>* taps = roi.y.taps.data();
  const int num_bins = std::min(kRows, bins_y) * bins_x;
  for (int first_p = 0; first_p < bins_y; first_p += kGroup) {
    Vector<acc_t> cells[kChannels][kGroup * kChunks];
    for (int i = 0; i < kGroup; ++i) {
      const int p = std::min(first_p + i, bins_y), end = offsets[std::min(p + 1, bins_y)];
      for (int v = 0; v < kChunks; ++v) {
        ahead.step();
        Vector<acc_t> sums[kChannels] = {};
        for (int t = offsets[p]; t < end; ++t) {
          const scalar_t* row = plane + window.start + taps[t].index * stride_h + v * kL;
          for (int c = 0; c < kChannels; ++c) {
            sums[c] += taps[t].weight * load<acc_t>(row + c * stride_c);
          }
        }
        for (int c = 0; c < kChannels; ++c) {
          cells[c][i * kChunks + v] = sums[c];
        }
      }
    }
    for (int c = 0; c < kChannels; ++c) {
      scalar_t* channel = out + int64_t(c) * bins_y * bins_x;
      const auto* indices = window.indices.data();
      const acc_t* weights = window.weights.data();
      for (int bin = 0; bin < num_bins; bin += kL) {
        Vector<acc_t> bins[kVectors] = {};
        for (int d = 0; d < window.depth; ++d, indices += kL, weights += kL) {
          Indices<acc_t> lanes;
          std::memcpy(&lanes, indices, sizeof(lanes));
          const Vector<acc_t> weight = load<acc_t>(weights);
          for (int i = 0; i < kVectors; ++i) {
            bins[i] += weight * shuffle<acc_t, kRows * kChunks>(&cells[c][i * kRows * kChunks], lanes);
          }
        }
        for (int i = 0; i < kVectors; ++i) {
          const int p = first_p + i * kRows;
          const int valid = std::min(kL, std::min(kRows, bins_y - p) * bins_x - bin);
          const bool is_overwritten = num_bins <= kL && p * bins_x + kL <= bins_y * bins_x;
          if (valid == kL || is_overwritten) {
            store<acc_t>(channel + int64_t(p) * bins_x + bin, bins[i]);
          } else if (valid > 0) {
            store<acc_t>(channel + int64_t(p) * bins_x + bin, bins[i], valid);
          }
        }
      }
    }
  }
}

template <int kChannels, typename scalar_t, typename acc_t, typename Level>
void pool_window(const RoITaps<acc_t>& roi, const Window<acc_t>& window, const scalar_t* plane, const Level& level,
                 scalar_t* out, int bins_y, int bins_x, ReadAhead<scalar_t>& ahead) {
  const auto pool = [&](auto rows, auto chunks) {
    pool_rows<kChannels, rows(), chunks()>(roi, window, plane, level.stride_c, level.stride_h, out, bins_y, bins_x,
                                           ahead);
  };
  const std::integral_constant<int, 1> one;
  const std::integral_constant<int, 2> two;
  if (window.rows == 2) {
    pool(two, one);
  } else {
    with_constant(window.chunks, [&](auto chunks) { pool(one, chunks); });
  }
  // They got 0 times cells of others, which could be NaN.
  for (const int bin : window.empty_bins) {
    for (int64_t row = 0; row < int64_t(kChannels) * bins_y; ++row) {
      out[row * bins_x + bin] = scalar_t(0);
    }
  }
}

// One channel of a RoI without a window: rows of cells where they have no gaps, else tap by tap.
template <typename scalar_t, typename acc_t>
void pool_taps(const RoITaps<acc_t>& roi, const scalar_t* plane, int64_t stride_h, scalar_t* out, int bins_y,
               int bins_x, std::vector<acc_t>& row) {
  const auto sum_x = [&](int q, const auto* cells, int first) {
    acc_t sum = 0;
    for (int t = roi.x.offsets[q]; t < roi.x.offsets[q + 1]; ++t) {
      sum += roi.x.taps[t].weight * static_cast<acc_t>(cells[roi.x.taps[t].index - first]);
    }
    return sum;
  };
  const bool has_gaps = roi.x.has_gaps();
  const int width = std::max(roi.x.width(), 0);
  row.resize(width);
  for (int p = 0; p < bins_y; ++p) {
    const Tap<acc_t>* begin = roi.y.taps.data() + roi.y.offsets[p];
    const Tap<acc_t>* end = roi.y.taps.data() + roi.y.offsets[p + 1];
    if (!has_gaps) {
      std::fill(row.begin(), row.end(), acc_t(0));
      for (const Tap<acc_t>* tap = begin; tap != end; ++tap) {
        const scalar_t* cells = plane + tap->index * stride_h + roi.x.first;
        for (int i = 0; i < width; ++i) {
          row[i] += tap->weight * static_cast<acc_t>(cells[i]);
        }
      }
    }
    for (int q = 0; q < bins_x; ++q) {
      acc_t sum = 0;
      if (has_gaps) {
        for (const Tap<acc_t>* tap = begin; tap != end; ++tap) {
          sum += tap->weight * sum_x(q, plane + tap->index * stride_h, 0);
        }
      } else {
        sum = sum_x(q, row.data(), roi.x.first);
      }
      *out++ = static_cast<scalar_t>(sum);
    }
  }
}

// NCHW. RoIs pass over the planes from top to bottom, an order of rows in which hardware sees no pattern, so what comes
// next is asked for while a row is made. A section of RoIs goes through all blocks of channels before the next, or tables
// would leave the cache between two blocks: 10,000 RoIs in one take 1.3 to 2.2 times as long. A piece of work is a block of
// channels and a section, or a part of one where blocks are few.
template <typename Params>
void pool_planes(const Params& params, const std::vector<RoITaps<typename Params::acc_t>>& rois, const RoIOrder& order,
                 const ParallelFor& parallel_for) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  constexpr int kChannels = 8;  // against 4, 1.17 times as fast; 16 gain another 1.00 to 1.09
  constexpr int64_t kManyBlocks = 16, kFewRois = 64, kManyRois = 1024;
  const auto pieces_of = [](int64_t count, int64_t most) { return (count + most - 1) / most; };
  const int64_t num_blocks = pieces_of(params.num_channels, kChannels);
  const int64_t num_sections = pieces_of(params.num_rois, kManyRois);
  const int64_t rois_in_section = pieces_of(params.num_rois, num_sections);
  const int64_t num_parts = num_blocks >= kManyBlocks ? 1 : pieces_of(rois_in_section, kFewRois);
  const int64_t rois_in_part = pieces_of(rois_in_section, num_parts);
  const int64_t bins = int64_t(params.bins_y) * params.bins_x;

  std::vector<Window<acc_t>> windows(rois.size());
  parallel_for(params.num_rois, kFewRois, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      if (rois[k].level >= 0) {
        windows[k] = make_window(rois[k], params.levels[rois[k].level]);
      }
    }
  });
  // Worth the making where many blocks take the same walk.
  const auto reads =
      num_blocks >= kManyBlocks ? first_reads(params, rois, windows, order, rois_in_section) : FirstReads<scalar_t>();

  const auto pool_piece = [&](int64_t piece, std::vector<acc_t>& row) {
    const int64_t section = piece / (num_blocks * num_parts), block = piece / num_parts % num_blocks;
    const int first_channel = static_cast<int>(block) * kChannels;
    const int num_channels = std::min(kChannels, params.num_channels - first_channel);
    const int64_t first_roi = section * rois_in_section + piece % num_parts * rois_in_part;
    const int64_t last_roi =
        std::min({first_roi + rois_in_part, (section + 1) * rois_in_section, int64_t(params.num_rois)});
    const auto out_of = [&](int64_t k) { return params.pooled + (k * params.num_channels + first_channel) * bins; };
    ReadAhead<scalar_t> ahead(reads, first_roi, last_roi, first_channel, num_channels);
    for (int64_t i = first_roi; i < last_roi; ++i) {
      const int64_t k = order.rois[i];
      const auto& roi = rois[k];
      scalar_t* out = out_of(k);
      ahead.at(i);
      if (i + 1 < last_roi) {
        windows[order.rois[i + 1]].prefetch_tables();
        prefetch(out_of(order.rois[i + 1]), num_channels * bins);
      }
      if (roi.level < 0) {
        std::fill_n(out, num_channels * bins, scalar_t(0));
        continue;
      }
      const auto& level = params.levels[roi.level];
      const scalar_t* plane = level.map + roi.image * level.stride_n + first_channel * level.stride_c;
      if constexpr (kHasShuffle) {
        if (windows[k].chunks > 0 && num_channels == kChannels) {
          pool_window<kChannels>(roi, windows[k], plane, level, out, params.bins_y, params.bins_x, ahead);
          continue;
        }
      }
      for (int c = 0; c < num_channels; ++c, out += bins, plane += level.stride_c) {
        if constexpr (kHasShuffle) {
          if (windows[k].chunks > 0) {
            pool_window<1>(roi, windows[k], plane, level, out, params.bins_y, params.bins_x, ahead);
            continue;
          }
        }
        pool_taps(roi, plane, level.stride_h, out, params.bins_y, params.bins_x, row);
      }
    }
  };
  const int64_t num_pieces = num_sections * num_blocks * num_parts;
  parallel_for(num_pieces, grain_of(num_bins_of(params), num_pieces), [&](int64_t begin, int64_t end) {
    std::vector<acc_t> row;
    for (int64_t piece = begin; piece < end; ++piece) {
      pool_piece(piece, row);
    }
  });
}

// One bin of kVectors vectors of channels, the last of them `tail` channels wide.
template <int kVectors, typename scalar_t, typename acc_t, typename Level>
inline void pool_bin(const RoITaps<acc_t>& roi, int p, int q, const Level& level, const scalar_t* map, scalar_t* bin,
                     int tail) {
  constexpr int kL = kLanes<acc_t>;
  Vector<acc_t> sums[kVectors] = {};
  for (int i = roi.y.offsets[p]; i < roi.y.offsets[p + 1]; ++i) {
    const scalar_t* row = map + roi.y.taps[i].index * level.stride_h;
    for (int j = roi.x.offsets[q]; j < roi.x.offsets[q + 1]; ++j) {
      const scalar_t* cell = row + roi.x.taps[j].index * level.stride_w;
      const acc_t weight = roi.y.taps[i].weight * roi.x.taps[j].weight;
      for (int v = 0; v < kVectors; ++v) {
        sums[v] += weight * (tail < kL ? load<acc_t>(cell + v * kL, tail) : load<acc_t>(cell + v * kL));
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    tail < kL ? store<acc_t>(bin + v * kL, sums[v], tail) : store<acc_t>(bin + v * kL, sums[v]);
  }
}

// channels_last. A piece of work is a run of RoIs; a bin's channels are vectors that stay in registers until they
// are stored once.
template <typename Params>
void pool_channels(const Params& params, const std::vector<RoITaps<typename Params::acc_t>>& rois,
                   const RoIOrder& order, const ParallelFor& parallel_for) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  constexpr int kL = kLanes<acc_t>;
  constexpr int kVectors = 8;
  const int64_t num_channels = params.num_channels;
  parallel_for(params.num_rois, grain_of(num_bins_of(params), params.num_rois), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t k = order.rois[i];
      const auto& roi = rois[k];
      scalar_t* bin = params.pooled + k * params.bins_y * params.bins_x * num_channels;
      if (roi.level < 0) {
        std::fill_n(bin, int64_t(params.bins_y) * params.bins_x * num_channels, scalar_t(0));
        continue;
      }
      const auto& level = params.levels[roi.level];
      const scalar_t* map = level.map + roi.image * level.stride_n;
      for (int p = 0; p < params.bins_y; ++p) {
        for (int q = 0; q < params.bins_x; ++q, bin += num_channels) {
          int64_t c = 0;
          for (; c + kVectors * kL <= num_channels; c += kVectors * kL) {
            pool_bin<kVectors>(roi, p, q, level, map + c, bin + c, kL);
          }
          for (; c < num_channels; c += kL) {
            pool_bin<1>(roi, p, q, level, map + c, bin + c, static_cast<int>(std::min<int64_t>(kL, num_channels - c)));
          }
        }
      }
    }
  });
}
