// CPU kernels of the boxes of average pooling: their gradient, and the derivative of pooling along their tangents.
// Both read the maps once, tap by tap, with a vector of channels at a time. Knows no torch.
#include "placed_rois.h"
#include "taps.h"

#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace roialign::cpu {
namespace {

// A cell that a bin reads along an axis: its weight in the mean, and how that changes as an edge of the RoI moves by
// one cell.
template <typename acc_t>
struct EdgeTap {
  int cell;
  acc_t weight, near, far;
};

// The taps of bin b are taps[offsets[b]] .. taps[offsets[b + 1] - 1].
template <typename acc_t>
struct EdgeTaps {
  std::vector<int> offsets;
  std::vector<EdgeTap<acc_t>> taps;

  // Inlined into a kernel that fuses multiplications with additions, it would place samples an ulp elsewhere than the
  // rest of the code does.
  __attribute__((noinline)) void make(const Axis<acc_t>& axis) {
    const acc_t share = acc_t(1) / acc_t(axis.num_samples);
    offsets.assign(1, 0);
    taps.clear();
    for (int bin = 0; bin < axis.num_bins; ++bin) {
      const Range samples = samples_near(axis, bin, 0, axis.size - 1);
      for (int i = samples.begin; i < samples.end; ++i) {
        const Sample<acc_t> sample = sample_at(axis, bin, i);
        if (sample.low < 0) {
          continue;
        }
        const acc_t far = sample.moves ? share * share_of_far_edge(axis, bin, i) : acc_t(0);
        const acc_t near = sample.moves ? share - far : acc_t(0);
        add({sample.low, (acc_t(1) - sample.fraction) * share, -near, -far});
        if (sample.fraction != acc_t(0) || sample.moves) {
          add({sample.low + 1, sample.fraction * share, near, far});
        }
      }
      offsets.push_back(static_cast<int>(taps.size()));
    }
  }

  // Leaves in `near` how a weight changes as both edges move at these speeds.
  void move(acc_t near, acc_t far) {
    for (EdgeTap<acc_t>& tap : taps) {
      tap.near = near * tap.near + far * tap.far;
    }
  }

 private:
  // Samples that follow each other share cells: the last few taps of the bin are looked through for this one's.
  void add(const EdgeTap<acc_t>& tap) {
    constexpr int kLookBack = 3;
    const int first = std::max(offsets.back(), static_cast<int>(taps.size()) - kLookBack);
    for (int i = static_cast<int>(taps.size()) - 1; i >= first; --i) {
      if (taps[i].cell == tap.cell) {
        taps[i].weight += tap.weight;
        taps[i].near += tap.near;
        taps[i].far += tap.far;
        return;
      }
    }
    taps.push_back(tap);
  }
};

// Columns of `boxes`.
enum Column { kImage, kX1, kY1, kX2, kY2, kNumColumns };

}  // namespace
}  // namespace roialign::cpu

#define ROIALIGN_KERNELS "boxes_kernels.h"
#include "for_each_target.h"

namespace roialign::cpu {

template <typename scalar_t, typename box_t>
void roi_align_backward_boxes(const BoxMotionParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  const auto placed = place(params);
  if (params.channels_last) {
    ROIALIGN_DISPATCH(sum_box_gradients<true>(params, placed, parallel_for));
  } else {
    ROIALIGN_DISPATCH(sum_box_gradients<false>(params, placed, parallel_for));
  }
}

template <typename scalar_t, typename box_t>
void roi_align_tangent(const BoxMotionParams<scalar_t, box_t>& params, const ParallelFor& parallel_for) {
  const auto placed = place(params);
  if (params.channels_last) {
    ROIALIGN_DISPATCH(pool_tangents<true>(params, placed, parallel_for));
  } else {
    ROIALIGN_DISPATCH(pool_tangents<false>(params, placed, parallel_for));
  }
}

#define ROIALIGN_INSTANTIATE(scalar_t, box_t)                                                          \
  template void roi_align_backward_boxes(const BoxMotionParams<scalar_t, box_t>&, const ParallelFor&); \
  template void roi_align_tangent(const BoxMotionParams<scalar_t, box_t>&, const ParallelFor&);
ROIALIGN_FOR_EACH_TYPE(ROIALIGN_INSTANTIATE)

}  // namespace roialign::cpu
