// Vectors of channels, whichever way they lie. Part of for_each_target.h: follows vectors.h in the namespace of an
// instruction set.

// `count` neighbouring channels of a cell or a bin, `stride` elements apart where not channels_last.
template <bool kChannelsLast, typename acc_t, typename scalar_t>
inline Vector<acc_t> load_channels(const scalar_t* data, int64_t stride, int count) {
  constexpr int kL = kLanes<acc_t>;
  if constexpr (kChannelsLast) {
    return count == kL ? load<acc_t>(data) : load<acc_t>(data, count);
  } else {
    Vector<acc_t> result = {};
    if (count == kL) {
      for (int i = 0; i < kL; ++i) {
        result[i] = static_cast<acc_t>(data[i * stride]);
      }
    } else {
      for (int i = 0; i < count; ++i) {
        result[i] = static_cast<acc_t>(data[i * stride]);
      }
    }
    return result;
  }
}

template <bool kChannelsLast, typename acc_t, typename scalar_t>
inline void store_channels(scalar_t* data, const Vector<acc_t>& vector, int64_t stride, int count) {
  if constexpr (kChannelsLast) {
    count == kLanes<acc_t> ? store<acc_t>(data, vector) : store<acc_t>(data, vector, count);
  } else {
    for (int i = 0; i < count; ++i) {
      data[i * stride] = static_cast<scalar_t>(vector[i]);
    }
  }
}

// Channels that a piece of work takes at a time: all of channels_last maps, of NCHW ones only so many planes as share
// the cache while the RoIs pass over them.
template <bool kChannelsLast, typename Params>
int64_t channels_in_block(const Params& params) {
  return kChannelsLast ? std::max(params.num_channels, 1) : 32;
}

// Calls run(row, block of channels) for every row of `boxes` and every block, each once.
template <bool kChannelsLast, typename Params, typename Placed, typename Run>
void for_each_block(const Params& params, const Placed& placed, const ParallelFor& parallel_for, const Run& run) {
  const int64_t block = channels_in_block<kChannelsLast>(params), rois = kChannelsLast ? 1 : 64;
  const int64_t num_blocks = (params.num_channels + block - 1) / block;
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
