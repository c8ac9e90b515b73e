// CUDA kernels of the boxes of average pooling: their gradient, and the derivative of pooling along their tangents.
// Knows no torch.
#include "items.h"

namespace roialign::cuda {
namespace {

// Calls visit(slopes of kVec channels at the sample, sample along y, along x) for the samples of an item's bin that lie
// on the map. A thread places a sample once for its kVec channels and reads the four cells round it.
template <bool kChannelsLast, int kVec, typename acc_t, typename Level, typename Visit>
__device__ void for_each_slope(const RoI<acc_t>& roi, const Level& level, const Item<kChannelsLast, kVec>& item,
                               const Visit& visit) {
  const auto* map = level.map + roi.image * level.stride_n + item.channel * level.stride_c;
  const Range samples_y = samples_near(roi.y, item.p, 0, roi.y.size - 1);
  const Range samples_x = samples_near(roi.x, item.q, 0, roi.x.size - 1);
  for (int i = samples_y.begin; i < samples_y.end; ++i) {
    const Sample<acc_t> y = sample_at(roi.y, item.p, i);
    for (int j = samples_x.begin; y.low >= 0 && j < samples_x.end; ++j) {
      const Sample<acc_t> x = sample_at(roi.x, item.q, j);
      if (x.low < 0) {
        continue;
      }
      acc_t corner[2][2][kVec];
#pragma unroll
      for (int dy = 0; dy < 2; ++dy) {
#pragma unroll
        for (int dx = 0; dx < 2; ++dx) {
          // A coordinate that moves has a right neighbour, and so has one that reads it.
          const bool is_read = (dy == 0 || y.moves) && (dx == 0 || x.moves);
          if (is_read) {
            item.load(map + (y.low + dy) * level.stride_h + (x.low + dx) * level.stride_w, level.stride_c,
                      corner[dy][dx]);
          } else {
#pragma unroll
            for (int v = 0; v < kVec; ++v) {
              corner[dy][dx][v] = acc_t(0);
            }
          }
        }
      }
      Slopes<acc_t> slopes[kVec];
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        slopes[v] = slopes_at(y, x, [&](int dy, int dx) { return corner[dy][dx][v]; });
      }
      visit(slopes, i, j);
    }
  }
}

//   blockIdx.x → RoI      thread → every kItemThreads-th item of it
//
// A thread adds its items in their order, the block adds its threads in a fixed tree: the same bits on every run.
template <typename Params, bool kChannelsLast, int kVec>
__global__ void __launch_bounds__(kItemThreads, 1) roi_align_backward_boxes_kernel(Params params) {
  using acc_t = typename Params::acc_t;
  const RoI<acc_t> roi = roi_at(params, blockIdx.x);
  auto* grad_box = params.motion + int64_t(blockIdx.x) * 5;
  if (roi.level < 0) {
    write_no_box_gradient(grad_box);
    return;
  }
  const auto& level = params.levels[roi.level];
  const auto* grad_row = params.pooled + blockIdx.x * row_size(params);
  const acc_t share = acc_t(1) / acc_t(roi.y.num_samples) / acc_t(roi.x.num_samples);
  EdgeSums<acc_t> sums;
  for (int64_t index = threadIdx.x; index < num_items<kVec>(params); index += kItemThreads) {
    const Item<kChannelsLast, kVec> item(params, index);
    acc_t grad[kVec];
    item.load(grad_row + item.offset, item.stride, grad);
    for_each_slope(roi, level, item, [&](const auto& slopes, int sample_y, int sample_x) {
      acc_t grad_y = 0, grad_x = 0;
#pragma unroll
      for (int v = 0; v < kVec; ++v) {
        grad_y += grad[v] * slopes[v].y;
        grad_x += grad[v] * slopes[v].x;
      }
      sums.add(grad_y * share, share_of_far_edge(roi.y, item.p, sample_y), grad_x * share,
               share_of_far_edge(roi.x, item.q, sample_x));
    });
  }
  write_box_gradient(sums, level, grad_box);
}

//   blockIdx.x → RoI      blockIdx.y → slice of kItemThreads items      thread → item
template <typename Params, bool kChannelsLast, int kVec>
__global__ void __launch_bounds__(kItemThreads, 1) roi_align_tangent_kernel(Params params) {
  using acc_t = typename Params::acc_t;
  const RoI<acc_t> roi = roi_at(params, blockIdx.x);
  const auto* motion = params.motion + int64_t(blockIdx.x) * 5;
  auto* row = params.pooled + blockIdx.x * row_size(params);
  for (int64_t index = int64_t(blockIdx.y) * kItemThreads + threadIdx.x; index < num_items<kVec>(params);
       index += int64_t(gridDim.y) * kItemThreads) {
    const Item<kChannelsLast, kVec> item(params, index);
    acc_t sums[kVec] = {};
    if (roi.level >= 0) {
      const auto& level = params.levels[roi.level];
      const acc_t scale_y = acc_t(level.scale_y) / acc_t(roi.y.num_samples) / acc_t(roi.x.num_samples);
      const acc_t scale_x = acc_t(level.scale_x) / acc_t(roi.y.num_samples) / acc_t(roi.x.num_samples);
      for_each_slope(roi, level, item, [&](const auto& slopes, int sample_y, int sample_x) {
        const acc_t share_y = share_of_far_edge(roi.y, item.p, sample_y);
        const acc_t share_x = share_of_far_edge(roi.x, item.q, sample_x);
        const acc_t move_y = ((acc_t(1) - share_y) * acc_t(motion[2]) + share_y * acc_t(motion[4])) * scale_y;
        const acc_t move_x = ((acc_t(1) - share_x) * acc_t(motion[1]) + share_x * acc_t(motion[3])) * scale_x;
#pragma unroll
        for (int v = 0; v < kVec; ++v) {
          sums[v] += move_y * slopes[v].y + move_x * slopes[v].x;
        }
      });
    }
    item.store(row + item.offset, sums);
  }
}

}  // namespace

template <typename scalar_t, typename box_t>
cudaError_t roi_align_backward_boxes(const BoxMotionParams<scalar_t, box_t>& params, cudaStream_t stream) {
  using Params = BoxMotionParams<scalar_t, box_t>;
  return with_items(params, [&](auto channels_last, auto vec) {
    return launch(roi_align_backward_boxes_kernel<Params, channels_last(), vec()>,
                  dim3(static_cast<unsigned int>(params.num_rois)), dim3(kItemThreads), stream, params);
  });
}

template <typename scalar_t, typename box_t>
cudaError_t roi_align_tangent(const BoxMotionParams<scalar_t, box_t>& params, cudaStream_t stream) {
  using Params = BoxMotionParams<scalar_t, box_t>;
  return with_items(params, [&](auto channels_last, auto vec) {
    return launch(roi_align_tangent_kernel<Params, channels_last(), vec()>, grid_of_items<vec()>(params),
                  dim3(kItemThreads), stream, params);
  });
}

#define ROIALIGN_INSTANTIATE(scalar_t, box_t)                                                           \
  template cudaError_t roi_align_backward_boxes(const BoxMotionParams<scalar_t, box_t>&, cudaStream_t); \
  template cudaError_t roi_align_tangent(const BoxMotionParams<scalar_t, box_t>&, cudaStream_t);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cuda
