// Vectors of channels, whichever way they lie. Part of for_each_target.h: follows vectors.h in the namespace of an
// instruction set.

// `count` neighbours, mostly a whole vector of them.
template <typename acc_t, typename scalar_t>
inline Vector<acc_t> load_some(const scalar_t* data, int count) {
  return count == kLanes<acc_t> ? load<acc_t>(data) : load<acc_t>(data, count);
}

template <typename acc_t, typename scalar_t>
inline void store_some(scalar_t* data, const Vector<acc_t>& vector, int count) {
  count == kLanes<acc_t> ? store<acc_t>(data, vector) : store<acc_t>(data, vector, count);
}

// `count` neighbouring channels of a cell or a bin, `stride` elements apart where not channels_last.
template <bool kChannelsLast, typename acc_t, typename scalar_t>
inline Vector<acc_t> load_channels(const scalar_t* data, int64_t stride, int count) {
  if constexpr (kChannelsLast) {
    return load_some<acc_t>(data, count);
  } else {
    if (count < kLanes<acc_t>) {
      acc_t lanes[kLanes<acc_t>] = {};
      for (int i = 0; i < count; ++i) {
        lanes[i] = static_cast<acc_t>(data[i * stride]);
      }
      return load<acc_t>(lanes);
    }
    // Through memory like the rest above, this would take 0.87 of the time on AVX-512 and 1.13 times as long on AVX2.
    Vector<acc_t> result = {};
    for (int i = 0; i < kLanes<acc_t>; ++i) {
      result[i] = static_cast<acc_t>(data[i * stride]);
    }
    return result;
  }
}

template <bool kChannelsLast, typename acc_t, typename scalar_t>
inline void store_channels(scalar_t* data, const Vector<acc_t>& vector, int64_t stride, int count) {
  if constexpr (kChannelsLast) {
    store_some<acc_t>(data, vector, count);
  } else {
    for (int i = 0; i < count; ++i) {
      data[i * stride] = static_cast<scalar_t>(vector[i]);
    }
  }
}

// Channels that a piece of work takes at a time: all of channels_last maps, of NCHW ones only so many planes as share
// the cache while the RoIs pass over them.
template <bool kChannelsLast, typename Params>
int64_t channels_in_block(const Params& params, int num_planes) {
  return kChannelsLast ? std::max(params.num_channels, 1) : num_planes;
}

// Calls run(row, block of channels) for every row of `boxes` and every block, each once.
template <bool kChannelsLast, typename Params, typename Placed, typename Run>
void for_each_block(const Params& params, const Placed& placed, int64_t block_size, const ParallelFor& parallel_for,
                    const Run& run) {
  const int64_t rois = kChannelsLast ? 1 : 64, num_blocks = (params.num_channels + block_size - 1) / block_size;
  const int64_t num_runs = (params.num_rois + rois - 1) / rois, num_pieces = num_blocks * num_runs;
  parallel_for(num_pieces, grain_of(num_bins_of(params), num_pieces), [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) {
      const int64_t first = piece % num_runs * rois;
      for (int64_t i = first; i < std::min(first + rois, params.num_rois); ++i) {
        run(placed.order[i], piece / num_runs);
      }
    }
  });
}

// Calls run(vectors, channel, lanes) over the channels [begin, end): several vectors at a time, then one by one, the
// last with fewer lanes.
template <typename acc_t, int kVectors, typename Run>
inline void for_each_vector(int64_t begin, int64_t end, const Run& run) {
  constexpr int kL = kLanes<acc_t>;
  for (; begin + kVectors * kL <= end; begin += kVectors * kL) {
    run(std::integral_constant<int, kVectors>(), begin, kL);
  }
  for (; begin < end; begin += kL) {
    run(std::integral_constant<int, 1>(), begin, static_cast<int>(std::min<int64_t>(kL, end - begin)));
  }
}

// Sums over channels of a RoI, one for each way its edges can move.
template <typename acc_t>
struct EdgeSums {
  Vector<acc_t> near_y = {}, far_y = {}, near_x = {}, far_x = {};
};

template <typename acc_t>
inline acc_t sum_of_lanes(const Vector<acc_t>& vector) {
  acc_t sum = 0;
  for (int i = 0; i < kLanes<acc_t>; ++i) {
    sum += vector[i];
  }
  return sum;
}

template <typename acc_t>
inline EdgeTotals<acc_t> total(const EdgeSums<acc_t>& sums) {
  return {sum_of_lanes<acc_t>(sums.near_y), sum_of_lanes<acc_t>(sums.far_y), sum_of_lanes<acc_t>(sums.near_x),
          sum_of_lanes<acc_t>(sums.far_x)};
}

// Fills the gradient of the boxes; run(row, first channel, last channel) returns the totals of a row on a map. A piece
// of work owns those of a few RoIs over a block of channels; the blocks are added at the end, in their order, so that
// the result has the same bits whatever the number of threads.
template <bool kChannelsLast, typename Params, typename Run>
void sum_edges(const Params& params, const PlacedRoIs<typename Params::acc_t>& placed, int64_t block_size,
               typename Params::box_t* grad_boxes, const ParallelFor& parallel_for, const Run& run) {
  using acc_t = typename Params::acc_t;
  const int64_t num_blocks = (params.num_channels + block_size - 1) / block_size;
  std::vector<EdgeTotals<acc_t>> partial(num_blocks * params.num_rois);
  for_each_block<kChannelsLast>(params, placed, block_size, parallel_for, [&](int64_t k, int64_t block) {
    if (placed.rois[k].level >= 0) {
      const int64_t first = block * block_size;
      partial[block * params.num_rois + k] = run(k, first, std::min<int64_t>(first + block_size, params.num_channels));
    }
  });
  for (int64_t k = 0; k < params.num_rois; ++k) {
    EdgeTotals<acc_t> sum;
    for (int64_t block = 0; block < num_blocks; ++block) {
      const EdgeTotals<acc_t>& edges = partial[block * params.num_rois + k];
      sum.near_y += edges.near_y, sum.far_y += edges.far_y, sum.near_x += edges.near_x, sum.far_x += edges.far_x;
    }
    const int level = std::max(placed.rois[k].level, 0);
    const acc_t scale_y = acc_t(params.levels[level].scale_y), scale_x = acc_t(params.levels[level].scale_x);
    const acc_t columns[] = {acc_t(0), sum.near_x * scale_x, sum.near_y * scale_y, sum.far_x * scale_x,
                             sum.far_y * scale_y};
    std::copy(std::begin(columns), std::end(columns), grad_boxes + k * std::size(columns));
  }
}
