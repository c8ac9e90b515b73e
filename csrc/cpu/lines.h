// Lines of cells. Part of for_each_target.h: follows channel_vectors.h in the namespace of an instruction set.
//
// A line is what a row of samples reads: some columns of a map, each blended between the two rows of cells around the
// samples, with kVectors vectors of channels side by side:
//
//   line[column][vector][lane]      vector and lane: channel
//
// So kernels take a vector of channels at a time in NCHW too: neighbouring cells of kLanes planes become a line, and the
// other way round, by transposing a block.

// Channels of NCHW maps that pass over the RoIs together; 32 make the forward 1.07 times as slow.
constexpr int kPlanes = 16;
// Of channels_last maps two are 1.2 to 1.3 times as slow, one is 1.4 to 1.6 times.
template <bool kChannelsLast, typename acc_t>
constexpr int kVectorsAtATime = kChannelsLast ? 4 : std::min(std::max(kPlanes / kLanes<acc_t>, 1), 4);

// Exchanges the lanes of `a` that have kStep in their index with those of `b` that do not.
template <int kStep, typename V, int... kLane>
inline void exchange(V& a, V& b, std::integer_sequence<int, kLane...>) {
  constexpr int kN = sizeof...(kLane);
  using Mask = Indices<std::decay_t<decltype(a[0])>>;
  const V low = __builtin_shuffle(a, b, Mask{(kLane & kStep ? kLane - kStep + kN : kLane)...});
  b = __builtin_shuffle(a, b, Mask{(kLane & kStep ? kLane + kN : kLane + kStep)...});
  a = low;
}

// Exchanges the blocks beside the diagonal, halves first.
template <int kStep, typename V, size_t kN>
inline void transpose_steps(V (&rows)[kN]) {
  if constexpr (kStep > 0) {
    for (int i = 0; i < static_cast<int>(kN); ++i) {
      if (!(i & kStep)) {
        exchange<kStep>(rows[i], rows[i + kStep], std::make_integer_sequence<int, kN>());
      }
    }
    transpose_steps<kStep / 2>(rows);
  }
}

// Lane j of row i becomes lane i of row j.
template <typename V, size_t kN>
inline void transpose(V (&rows)[kN]) {
#if defined(__GNUC__) && !defined(__clang__)
  transpose_steps<kN / 2>(rows);
#else
  for (size_t i = 0; i < kN; ++i) {
    for (size_t j = i + 1; j < kN; ++j) {
      const auto lane = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = lane;
    }
  }
#endif
}

// Where the lines of a RoI lie on its map: whole vectors of neighbouring cells of a row, or columns one by one.
struct LinePlan {
  int start = 0;   // first cell of the vectors
  int chunks = 0;  // 0: columns one by one
  int width = 0;   // columns of a line
  int shift = 0;   // from the index of a column to that of its place in a line

  // From the start of a line to a column.
  template <int kVectors, typename acc_t>
  int64_t offset_of(int column) const {
    return int64_t(column + shift) * kVectors * kLanes<acc_t>;
  }
};

template <bool kChannelsLast, typename acc_t>
inline LinePlan plan_lines(const Columns& columns, int map_width) {
  LinePlan plan;
  plan.width = columns.count();
  if (!kChannelsLast && columns.count() > 0 && !columns.have_gaps()) {
    plan.chunks = (columns.width() + kLanes<acc_t> - 1) / kLanes<acc_t>;
    plan.width = plan.chunks * kLanes<acc_t>;
    // Vectors must not reach over the end of a row: they step back where need be.
    plan.start = std::max(std::min(columns.cells.front(), map_width - plan.width), 0);
    plan.shift = columns.cells.front() - plan.start;
  }
  return plan;
}

// Calls run(kVectors * lanes channels of a column in the line, offset of its cell from the first) for columns that are
// visited one by one.
template <int kVectors, typename acc_t, typename Value, typename Run>
inline void for_each_column(const Columns& columns, Value* line, int64_t stride_w, const Run& run) {
  for (const int column : columns.cells) {
    run(line, column * stride_w);
    line += kVectors * kLanes<acc_t>;
  }
}

// Makes a line: above * the row of cells at `cells` + below * the row after it, of which one without a share is not
// read, whatever stands in it. The last vector of channels has `lanes`.
template <bool kChannelsLast, int kVectors, typename acc_t, typename scalar_t>
inline void read_line(const Columns& columns, const LinePlan& plan, const FeatureLevel<scalar_t>& level,
                      const scalar_t* cells, acc_t above, acc_t below, int lanes, acc_t* line) {
  constexpr int kL = kLanes<acc_t>;
  const auto blend = [&](const auto& load_row) {
    Vector<acc_t> sum = above * load_row(cells);
    if (below != acc_t(0)) {
      sum += below * load_row(cells + level.stride_h);
    }
    return sum;
  };
  if (plan.chunks == 0) {
    for_each_column<kVectors, acc_t>(columns, line, level.stride_w, [&](acc_t* column, int64_t offset) {
      for (int v = 0; v < kVectors; ++v) {
        store<acc_t>(column + v * kL, blend([&](const scalar_t* row) {
                       return load_channels<kChannelsLast, acc_t>(row + offset + v * kL * level.stride_c,
                                                                  level.stride_c, lanes);
                     }));
      }
    });
    return;
  }
  for (int chunk = 0; chunk < plan.chunks; ++chunk, line += kL * kVectors * kL) {
    const int first = plan.start + chunk * kL, count = std::min(kL, level.width - first);
    for (int v = 0; v < kVectors; ++v) {
      Vector<acc_t> block[kL] = {};
      for (int c = 0; c < kL; ++c) {
        if (c < lanes) {
          block[c] = blend([&](const scalar_t* row) {
            return load_some<acc_t>(row + first + (v * kL + c) * level.stride_c, count);
          });
        }
      }
      transpose(block);
      for (int i = 0; i < kL; ++i) {
        store<acc_t>(line + (i * kVectors + v) * kL, block[i]);
      }
    }
  }
}

// What a sample reads of a line, from its left cell on: of kVectors vectors the first.
template <int kVectors, typename acc_t>
inline Vector<acc_t> read_sample(const Sample<acc_t>& x, const acc_t* left) {
  Vector<acc_t> sum = (acc_t(1) - x.fraction) * load<acc_t>(left);
  if (x.fraction != acc_t(0)) {
    sum += x.fraction * load<acc_t>(left + kVectors * kLanes<acc_t>);
  }
  return sum;
}

// The adjoint of read_line: adds a line to the two rows of cells that it was made of.
template <bool kChannelsLast, int kVectors, typename acc_t>
inline void add_line(const Columns& columns, const LinePlan& plan, const FeatureLevel<acc_t>& level, acc_t* cells,
                     acc_t above, acc_t below, int lanes, const acc_t* line) {
  constexpr int kL = kLanes<acc_t>;
  const auto add_rows = [&](acc_t* data, const Vector<acc_t>& sums, int count) {
    store_some<acc_t>(data, load_some<acc_t>(data, count) + above * sums, count);
    if (below != acc_t(0)) {
      data += level.stride_h;
      store_some<acc_t>(data, load_some<acc_t>(data, count) + below * sums, count);
    }
  };
  if (plan.chunks == 0) {
    for_each_column<kVectors, acc_t>(columns, line, level.stride_w, [&](const acc_t* column, int64_t offset) {
      for (int v = 0; v < kVectors; ++v) {
        const Vector<acc_t> sums = load<acc_t>(column + v * kL);
        if constexpr (kChannelsLast) {
          add_rows(cells + offset + v * kL, sums, lanes);
        } else {
          for (int c = 0; c < lanes; ++c) {
            acc_t* cell = cells + offset + (v * kL + c) * level.stride_c;
            cell[0] += above * sums[c];
            if (below != acc_t(0)) {
              cell[level.stride_h] += below * sums[c];
            }
          }
        }
      }
    });
    return;
  }
  for (int chunk = 0; chunk < plan.chunks; ++chunk, line += kL * kVectors * kL) {
    const int first = plan.start + chunk * kL, count = std::min(kL, level.width - first);
    for (int v = 0; v < kVectors; ++v) {
      Vector<acc_t> block[kL];
      for (int i = 0; i < kL; ++i) {
        block[i] = load<acc_t>(line + (i * kVectors + v) * kL);
      }
      transpose(block);
      for (int c = 0; c < kL; ++c) {
        if (c < lanes) {
          add_rows(cells + first + (v * kL + c) * level.stride_c, block[c], count);
        }
      }
    }
  }
}
