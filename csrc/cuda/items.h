// How the threads of a block share the bins and channels of a RoI, and how a block adds up what they find. Knows no
// torch.
#pragma once

#include "launch.h"

#include "geometry.h"

namespace roialign::cuda {

// An item is a bin and kVec neighbouring channels of it. Items follow each other as they lie in memory: channels_last
// threads own neighbouring channels of a bin and load kVec of them at once, others neighbouring bins of a channel.
template <bool kChannelsLast, int kVec>
struct Item {
  int p, q;
  int channel, num_channels;
  int64_t offset;  // of its first channel in the row of `pooled`
  int64_t stride;  // from channel to channel there

  template <typename Params>
  __device__ Item(const Params& params, int64_t index) {
    const int64_t bins = int64_t(params.bins_y) * params.bins_x, groups = (params.num_channels + kVec - 1) / kVec;
    const int64_t bin = kChannelsLast ? index / groups : index % bins;
    channel = static_cast<int>(kChannelsLast ? index % groups : index / bins) * kVec;
    num_channels = min(kVec, params.num_channels - channel);
    p = static_cast<int>(bin / params.bins_x);
    q = static_cast<int>(bin % params.bins_x);
    offset = kChannelsLast ? bin * params.num_channels + channel : channel * bins + bin;
    stride = kChannelsLast ? 1 : bins;
  }

  // Its channels of a cell or a bin, `stride_c` elements apart; zeros past the last channel.
  template <typename acc_t, typename scalar_t>
  __device__ void load(const scalar_t* data, int64_t stride_c, acc_t (&values)[kVec]) const {
    if constexpr (kChannelsLast) {
      const auto loaded = *reinterpret_cast<const Vec<scalar_t, kVec>*>(data);
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        values[v] = static_cast<acc_t>(loaded.value[v]);
      }
    } else {
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        values[v] = v < num_channels ? static_cast<acc_t>(data[v * stride_c]) : acc_t(0);
      }
    }
  }

  template <typename acc_t, typename scalar_t>
  __device__ void store(scalar_t* data, const acc_t (&values)[kVec]) const {
    if constexpr (kChannelsLast) {
      Vec<scalar_t, kVec> stored;
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        stored.value[v] = static_cast<scalar_t>(values[v]);
      }
      *reinterpret_cast<Vec<scalar_t, kVec>*>(data) = stored;
    } else {
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        if (v < num_channels) {
          data[v * stride] = static_cast<scalar_t>(values[v]);
        }
      }
    }
  }
};

template <int kVec, typename Params>
__host__ __device__ int64_t num_items(const Params& params) {
  return int64_t(params.bins_y) * params.bins_x * ((params.num_channels + kVec - 1) / kVec);
}

// A row of `pooled` from its start.
template <typename Params>
__host__ __device__ int64_t row_size(const Params& params) {
  return int64_t(params.bins_y) * params.bins_x * params.num_channels;
}

constexpr int kItemThreads = 256;
constexpr int kItemChannels = 4;  // of an NCHW item: a sample is placed once for all of them

// Calls start(kernel's channels_last, kernel's kVec) with constants that fit the layout.
template <typename Params, typename Start>
cudaError_t with_items(const Params& params, const Start& start) {
  using scalar_t = typename Params::scalar_t;
  constexpr int kVec = 16 / sizeof(scalar_t);
  if (!params.channels_last) {
    return start(std::false_type(), std::integral_constant<int, kItemChannels>());
  }
  return can_vectorize<scalar_t, kVec>(params) ? start(std::true_type(), std::integral_constant<int, kVec>())
                                               : start(std::true_type(), std::integral_constant<int, 1>());
}

// blockIdx.x → RoI, blockIdx.y → slice of its items; a slice may be walked more than once.
template <int kVec, typename Params>
dim3 grid_of_items(const Params& params) {
  constexpr int64_t kMaxSlices = 65535;
  const int64_t slices = (num_items<kVec>(params) + kItemThreads - 1) / kItemThreads;
  return dim3(static_cast<unsigned int>(params.num_rois),
              static_cast<unsigned int>(slices < kMaxSlices ? slices : kMaxSlices));
}

// The gradient of the edges of a RoI, in cells, as the threads of a block find it.
template <typename acc_t>
struct EdgeSums {
  acc_t near_y = 0, far_y = 0, near_x = 0, far_x = 0;

  __device__ void add(acc_t grad_y, acc_t share_y, acc_t grad_x, acc_t share_x) {
    near_y += grad_y * (acc_t(1) - share_y);
    far_y += grad_y * share_y;
    near_x += grad_x * (acc_t(1) - share_x);
    far_x += grad_x * share_x;
  }
};

// The sum of all kItemThreads of a block, in an order that does not depend on when they run; in thread 0.
template <typename acc_t>
__device__ acc_t sum_of_block(acc_t value) {
  constexpr int kWarp = 32;
  __shared__ acc_t sums[kItemThreads / kWarp];
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_down_sync(0xffffffffu, value, distance);
  }
  if (threadIdx.x % kWarp == 0) {
    sums[threadIdx.x / kWarp] = value;
  }
  __syncthreads();
  acc_t sum = 0;
  for (int warp = 0; threadIdx.x == 0 && warp < kItemThreads / kWarp; ++warp) {
    sum += sums[warp];
  }
  __syncthreads();
  return sum;
}

// Writes the gradient of the block's box; all threads call it together.
template <typename acc_t, typename box_t, typename Level>
__device__ void write_box_gradient(const EdgeSums<acc_t>& sums, const Level& level, box_t* grad_box) {
  const acc_t near_x = sum_of_block(sums.near_x) * acc_t(level.scale_x);
  const acc_t near_y = sum_of_block(sums.near_y) * acc_t(level.scale_y);
  const acc_t far_x = sum_of_block(sums.far_x) * acc_t(level.scale_x);
  const acc_t far_y = sum_of_block(sums.far_y) * acc_t(level.scale_y);
  if (threadIdx.x == 0) {
    grad_box[0] = box_t(0);
    grad_box[1] = static_cast<box_t>(near_x);
    grad_box[2] = static_cast<box_t>(near_y);
    grad_box[3] = static_cast<box_t>(far_x);
    grad_box[4] = static_cast<box_t>(far_y);
  }
}

template <typename box_t>
__device__ void write_no_box_gradient(box_t* grad_box) {
  if (threadIdx.x < 5) {
    grad_box[threadIdx.x] = box_t(0);
  }
}

}  // namespace roialign::cuda
