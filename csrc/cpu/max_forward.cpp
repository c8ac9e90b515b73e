// CPU max pooling: the forward, with a vector of channels at a time, and the maps read at its winners. Knows no torch.
#include "sample_grid.h"

#include <cstring>
#include <limits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define ROIALIGN_KERNELS "max_forward_kernels.h"
#include "for_each_target.h"

namespace roialign::cpu {

template <typename scalar_t, typename box_t>
void roi_max_forward(const MaxParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  const auto placed = place(params);
  const auto grids = make_grids(params, placed, parallel_for);
  if (params.channels_last) {
    ROIALIGN_DISPATCH(pool_greatest<true>(params, placed, grids, parallel_for));
  } else {
    ROIALIGN_DISPATCH(pool_greatest<false>(params, placed, grids, parallel_for));
  }
}

template <typename scalar_t, typename box_t>
void roi_max_gather(const MaxParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  using acc_t = typename MaxParams<scalar_t, box_t>::acc_t;
  const PooledStrides strides = pooled_strides(params);
  const auto placed = place(params);
  const auto grids = make_grids(params, placed, parallel_for);
  const auto run = [&](int64_t k) {
    const auto& roi = placed.rois[k];
    if (roi.level < 0) {
      std::fill_n(params.pooled + k * strides.row, strides.row, scalar_t(0));
      return;
    }
    const auto& level = params.levels[roi.level];
    const auto& grid = grids[k];
    for (int c = 0; c < params.num_channels; ++c) {
      const scalar_t* map = level.map + roi.image * level.stride_n + c * level.stride_c;
      int64_t i = k * strides.row + c * strides.channel;
      for (int p = 0; p < params.bins_y; ++p) {
        for (int q = 0; q < params.bins_x; ++q, i += strides.bin) {
          acc_t sum = 0;
          grid.at(p, q, params.argmax[i], [&](int y, int x) {
            for_each_cell(grid.y.samples[y], grid.x.samples[x], [&](int row, int column, acc_t weight) {
              sum += weight * static_cast<acc_t>(map[row * level.stride_h + column * level.stride_w]);
            });
          });
          params.pooled[i] = static_cast<scalar_t>(sum);
        }
      }
    }
  };
  parallel_for(params.num_rois, grain_of(num_bins_of(params), params.num_rois), [&](int64_t begin, int64_t end) {
    std::for_each(placed.order.begin() + begin, placed.order.begin() + end, run);
  });
}

#define ROIALIGN_INSTANTIATE(scalar_t, box_t)                                           \
  template void roi_max_forward(const MaxParams<scalar_t, box_t>&, const ParallelFor&); \
  template void roi_max_gather(const MaxParams<scalar_t, box_t>&, const ParallelFor&);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cpu
