// Bodies of the CPU kernels of the boxes. Part of for_each_target.h: stands in the namespace of an instruction set.

#include "channel_vectors.h"

constexpr int kPlanes = 32;  // of NCHW maps that pass over the RoIs together; 16 are 1.07 times as slow

// Adds what kVectors vectors of channels, the last `lanes` wide, give to the gradient of the edges, in cells. Inlined, it
// runs out of registers: channels_last takes 1.2 times as long on AVX2, 1.5 times on the baseline.
template <bool kChannelsLast, int kVectors, typename Params, typename acc_t, typename scalar_t>
__attribute__((noinline)) void add_edges(const Params& params, const EdgeTaps<acc_t>& taps_y,
                                         const EdgeTaps<acc_t>& taps_x, const FeatureLevel<scalar_t>& level,
                                         const scalar_t* map, const scalar_t* grad, int lanes, EdgeSums<acc_t>& sums) {
  constexpr int kL = kLanes<acc_t>;
  const PooledStrides strides = pooled_strides(params);
  for (int p = 0; p < params.bins_y; ++p) {
    for (int q = 0; q < params.bins_x; ++q) {
      const int end_y = taps_y.offsets[p + 1], begin_x = taps_x.offsets[q], end_x = taps_x.offsets[q + 1];
      // A bin that reads nothing passes nothing back, not even a NaN.
      if (taps_y.offsets[p] == end_y || begin_x == end_x) {
        continue;
      }
      EdgeSums<acc_t> bins[kVectors];
      for (int i = taps_y.offsets[p]; i < end_y; ++i) {
        const EdgeTap<acc_t>& y = taps_y.taps[i];
        const scalar_t* line = map + y.cell * level.stride_h;
        Vector<acc_t> value[kVectors] = {}, near[kVectors] = {}, far[kVectors] = {};
        for (int j = begin_x; j < end_x; ++j) {
          const EdgeTap<acc_t>& x = taps_x.taps[j];
          const scalar_t* cells = line + x.cell * level.stride_w;
          for (int v = 0; v < kVectors; ++v, cells += kL * level.stride_c) {
            const Vector<acc_t> cell = load_channels<kChannelsLast, acc_t>(cells, level.stride_c, lanes);
            value[v] += x.weight * cell;
            near[v] += x.near * cell;
            far[v] += x.far * cell;
          }
        }
        for (int v = 0; v < kVectors; ++v) {
          bins[v].near_y += y.near * value[v];
          bins[v].far_y += y.far * value[v];
          bins[v].near_x += y.weight * near[v];
          bins[v].far_x += y.weight * far[v];
        }
      }
      const scalar_t* grad_bin = grad + (int64_t(p) * params.bins_x + q) * strides.bin;
      for (int v = 0; v < kVectors; ++v, grad_bin += kL * strides.channel) {
        const Vector<acc_t> weight = load_channels<kChannelsLast, acc_t>(grad_bin, strides.channel, lanes);
        sums.near_y += weight * bins[v].near_y;
        sums.far_y += weight * bins[v].far_y;
        sums.near_x += weight * bins[v].near_x;
        sums.far_x += weight * bins[v].far_x;
      }
    }
  }
}

template <bool kChannelsLast, typename Params>
void sum_box_gradients(const Params& params, const PlacedRoIs<typename Params::acc_t>& placed,
                       const ParallelFor& parallel_for) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  const PooledStrides strides = pooled_strides(params);
  const int64_t block_size = channels_in_block<kChannelsLast>(params, kPlanes);
  const auto run = [&](int64_t k, int64_t first, int64_t last) {
    thread_local EdgeTaps<acc_t> taps_y, taps_x;
    const auto& roi = placed.rois[k];
    taps_y.make(roi.y);
    taps_x.make(roi.x);
    const auto& level = params.levels[roi.level];
    EdgeSums<acc_t> sums;
    for_each_vector<acc_t, 2>(first, last, [&](auto vectors, int64_t c, int lanes) {
      const scalar_t* map = level.map + roi.image * level.stride_n + c * level.stride_c;
      const scalar_t* grad = params.pooled + k * strides.row + c * strides.channel;
      add_edges<kChannelsLast, vectors()>(params, taps_y, taps_x, level, map, grad, lanes, sums);
    });
    return total(sums);
  };
  sum_edges<kChannelsLast>(params, placed, block_size, params.motion, parallel_for, run);
}

// One bin of kVectors vectors of channels as the RoI moves: of each tap, `near` holds how its weight changes.
template <bool kChannelsLast, int kVectors, typename acc_t, typename scalar_t>
inline void pool_moving_bin(const EdgeTaps<acc_t>& taps_y, const EdgeTaps<acc_t>& taps_x, int p, int q,
                            const FeatureLevel<scalar_t>& level, const scalar_t* map, scalar_t* bin, int64_t bin_stride,
                            int lanes) {
  constexpr int kL = kLanes<acc_t>;
  Vector<acc_t> sums[kVectors] = {};
  for (int i = taps_y.offsets[p]; i < taps_y.offsets[p + 1]; ++i) {
    const EdgeTap<acc_t>& y = taps_y.taps[i];
    for (int j = taps_x.offsets[q]; j < taps_x.offsets[q + 1]; ++j) {
      const EdgeTap<acc_t>& x = taps_x.taps[j];
      const acc_t weight = y.near * x.weight + y.weight * x.near;
      const scalar_t* cells = map + y.cell * level.stride_h + x.cell * level.stride_w;
      for (int v = 0; v < kVectors; ++v, cells += kL * level.stride_c) {
        sums[v] += weight * load_channels<kChannelsLast, acc_t>(cells, level.stride_c, lanes);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    store_channels<kChannelsLast, acc_t>(bin + v * kL * bin_stride, sums[v], bin_stride, lanes);
  }
}

// The derivative of pooling along tangents of the boxes.
template <bool kChannelsLast, typename Params>
void pool_tangents(const Params& params, const PlacedRoIs<typename Params::acc_t>& placed,
                   const ParallelFor& parallel_for) {
  using scalar_t = typename Params::scalar_t;
  using acc_t = typename Params::acc_t;
  const PooledStrides strides = pooled_strides(params);
  const int64_t block_size = channels_in_block<kChannelsLast>(params, kPlanes);
  for_each_block<kChannelsLast>(params, placed, block_size, parallel_for, [&](int64_t k, int64_t block) {
    thread_local EdgeTaps<acc_t> taps_y, taps_x;
    const auto& roi = placed.rois[k];
    const int64_t first = block * block_size, last = std::min<int64_t>(first + block_size, params.num_channels);
    scalar_t* pooled = params.pooled + k * strides.row;
    if (roi.level < 0) {
      std::fill_n(pooled + first * (kChannelsLast ? 0 : strides.channel),
                  (last - first) * params.bins_y * params.bins_x, scalar_t(0));
      return;
    }
    const auto& level = params.levels[roi.level];
    const auto* motion = params.motion + k * kNumColumns;
    taps_y.make(roi.y);
    taps_x.make(roi.x);
    taps_y.move(acc_t(motion[kY1]) * acc_t(level.scale_y), acc_t(motion[kY2]) * acc_t(level.scale_y));
    taps_x.move(acc_t(motion[kX1]) * acc_t(level.scale_x), acc_t(motion[kX2]) * acc_t(level.scale_x));
    for_each_vector<acc_t, 4>(first, last, [&](auto vectors, int64_t c, int lanes) {
      const scalar_t* map = level.map + roi.image * level.stride_n + c * level.stride_c;
      scalar_t* bin = pooled + c * strides.channel;
      for (int p = 0; p < params.bins_y; ++p) {
        for (int q = 0; q < params.bins_x; ++q, bin += strides.bin) {
          pool_moving_bin<kChannelsLast, vectors()>(taps_y, taps_x, p, q, level, map, bin, strides.channel, lanes);
        }
      }
    });
  });
}
