// CPU max pooling: the gradients of the maps and of the boxes, from the winners. Knows no torch.
#include "sample_grid.h"

#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace roialign::cpu {
namespace {

// Adds channels of a RoI to the gradient of its map, winner by winner.
template <typename acc_t, typename scalar_t>
void add_by_winner(const SampleGrid<acc_t>& grid, const FeatureLevel<acc_t>& level, int64_t num_channels,
                   const scalar_t* grad, const int32_t* argmax, const PooledStrides& strides) {
  const int bins_x = grid.x.axis->num_bins, num_bins = grid.y.axis->num_bins * bins_x;
  for (int bin = 0; bin < num_bins; ++bin) {
    for (int64_t c = 0; c < num_channels; ++c) {
      const int64_t i = bin * strides.bin + c * strides.channel;
      acc_t* map = level.map + c * level.stride_c;
      grid.at(bin / bins_x, bin % bins_x, argmax[i], [&](int y, int x) {
        for_each_cell(grid.y.samples[y], grid.x.samples[x], [&](int row, int column, acc_t weight) {
          map[row * level.stride_h + column * level.stride_w] += weight * static_cast<acc_t>(grad[i]);
        });
      });
    }
  }
}

// The gradient of a RoI's edges over channels, winner by winner.
template <typename acc_t, typename scalar_t>
EdgeTotals<acc_t> edges_by_winner(const SampleGrid<acc_t>& grid, const FeatureLevel<scalar_t>& level,
                                  const scalar_t* map, int64_t num_channels, const scalar_t* grad,
                                  const int32_t* argmax, const PooledStrides& strides) {
  const int bins_x = grid.x.axis->num_bins, num_bins = grid.y.axis->num_bins * bins_x;
  EdgeTotals<acc_t> edges;
  for (int64_t c = 0; c < num_channels; ++c, map += level.stride_c) {
    for (int bin = 0; bin < num_bins; ++bin) {
      const int64_t i = bin * strides.bin + c * strides.channel;
      grid.at(bin / bins_x, bin % bins_x, argmax[i], [&](int sample_y, int sample_x) {
        const Sample<acc_t>&y = grid.y.samples[sample_y], &x = grid.x.samples[sample_x];
        const auto cell = [&](int dy, int dx) {
          return static_cast<acc_t>(map[(y.low + dy) * level.stride_h + (x.low + dx) * level.stride_w]);
        };
        const acc_t bin_grad = static_cast<acc_t>(grad[i]);
        const Slopes<acc_t> slopes = slopes_at(y, x, cell);
        const acc_t share_y = grid.y.far_shares[sample_y], share_x = grid.x.far_shares[sample_x];
        edges.far_y += bin_grad * slopes.y * share_y;
        edges.near_y += bin_grad * slopes.y * (acc_t(1) - share_y);
        edges.far_x += bin_grad * slopes.x * share_x;
        edges.near_x += bin_grad * slopes.x * (acc_t(1) - share_x);
      });
    }
  }
  return edges;
}

}  // namespace
}  // namespace roialign::cpu

#define ROIALIGN_KERNELS "max_backward_kernels.h"
#include "for_each_target.h"

namespace roialign::cpu {

template <typename scalar_t, typename box_t>
void roi_max_backward(const MaxParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  const auto placed = place(params);
  const auto grids = make_grids(params, placed, parallel_for);
  if (params.channels_last) {
    ROIALIGN_DISPATCH(add_winners<true>(params, placed, grids, parallel_for));
  } else {
    ROIALIGN_DISPATCH(add_winners<false>(params, placed, grids, parallel_for));
  }
}

template <typename scalar_t, typename box_t>
void roi_max_backward_boxes(const MaxParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  const auto placed = place(params);
  const auto grids = make_grids(params, placed, parallel_for);
  if (params.channels_last) {
    ROIALIGN_DISPATCH(sum_winners<true>(params, placed, grids, parallel_for));
  } else {
    ROIALIGN_DISPATCH(sum_winners<false>(params, placed, grids, parallel_for));
  }
}

#define ROIALIGN_INSTANTIATE(scalar_t, box_t)                                            \
  template void roi_max_backward(const MaxParams<scalar_t, box_t>&, const ParallelFor&); \
  template void roi_max_backward_boxes(const MaxParams<scalar_t, box_t>&, const ParallelFor&);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cpu
