// CUDA kernel of non-maximum suppression, greedy within groups of boxes. Knows no torch.
#include "launch.h"

#include "overlap.h"

namespace roialign::cuda {
namespace {

// The kept rows of a turn, as others see them: a word of zero is a turn that is not over.
using Settled = unsigned long long;
constexpr Settled kIsOver = Settled(1) << kWarp;

// The rows of a turn, as bits, that do not lie before its row `first`.
__device__ unsigned int rows_from(int64_t first) {
  return first <= 0 ? kWholeWarp : first < kWarp ? kWholeWarp << first : 0;
}

template <typename box_t>
__device__ Box<box_t> box_at(const NmsParams<box_t>& params, int64_t row) {
  const auto corners = *reinterpret_cast<const Vec<box_t, 4>*>(params.boxes + min(row, params.num_boxes - 1) * 4);
  return box_of(corners.value);
}

template <typename box_t>
__device__ Box<box_t> of_lane(const Box<box_t>& box, int lane) {
  return {__shfl_sync(kWholeWarp, box.x1, lane), __shfl_sync(kWholeWarp, box.y1, lane),
          __shfl_sync(kWholeWarp, box.x2, lane), __shfl_sync(kWholeWarp, box.y2, lane),
          __shfl_sync(kWholeWarp, box.area, lane)};
}

template <typename box_t>
__device__ int64_t first_of_group(const NmsParams<box_t>& params, int64_t row) {
  int64_t low = 0, high = params.groups != nullptr ? row : 0;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (params.groups[middle] < params.groups[row]) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

// The kept rows of an earlier turn, once it is over. A word holds all there is to know, so that no other write has to
// be seen before it. Those far behind ask less often: thousands of warps wait for the same word.
__device__ unsigned int wait_for(const Settled* turn, int64_t num_turns_ahead) {
  Settled settled;
  while ((settled = *static_cast<const volatile Settled*>(turn)) == 0) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 700
    __nanosleep(static_cast<unsigned int>(32 * num_turns_ahead));
#endif
  }
  return static_cast<unsigned int>(settled);
}

// A block is a warp and owns 32 neighbouring rows, one a lane:
//
//   turn     0       1       2       3  …
//   rows   0…31   32…63   64…95      …         turn 2: kept rows of turns 0 and 1 drop rows of 64…95, as soon as they
//            └───────┴───────►                 are known; then these settle among themselves; then they are known
//
// A turn is a ticket that a warp draws when it starts, and no block's index: whoever it waits for has started before
// it, and so finishes, in whatever order blocks come. There is no matrix of pairs and nobody asks the host; a group may
// be as long as it likes, and all of them go on at once.
//
// The work is a comparison of each row with the kept ones before it in its group, 43 instructions of a warp for a kept
// row and 32 others (sm_90): 100,000 rows of one group, all kept, are 6.7 G. Turns of one group end one after another,
// so that its 3125 turns are a chain, in each step one word through the second-level cache and up to 32 comparisons.
template <typename box_t>
__global__ void __launch_bounds__(kWarp) nms_kernel(NmsParams<box_t> params) {
  const int lane = threadIdx.x;
  const int64_t turn = __shfl_sync(kWholeWarp, lane == 0 ? atomicAdd(params.progress, Settled(1)) : Settled(0), 0);
  Settled* const settled = params.progress + 1;

  const int64_t start = turn * kWarp, row = start + lane;
  const Box<box_t> box = box_at(params, row);
  bool keep = row < params.num_boxes;
  const int64_t first = keep ? first_of_group(params, row) : row;

  // Rows of this turn that drop the lane's, if they are kept. Nothing to wait for.
  unsigned int droppers = 0;
  for (int other = 0; other < kWarp; ++other) {
    droppers |= static_cast<unsigned int>(overlap(of_lane(box, other), box) > params.limit) << other;
  }
  droppers &= rows_from(first - start) & ((1u << lane) - 1);

  for (int64_t earlier = __shfl_sync(kWholeWarp, first, 0) / kWarp; earlier < turn; ++earlier) {
    if (!__any_sync(kWholeWarp, keep && first < start)) {
      break;  // nobody is left whom an earlier row could drop
    }
    const Box<box_t> boxes = box_at(params, earlier * kWarp + lane);
    const unsigned int rivals = rows_from(first - earlier * kWarp);
    for (unsigned int kept = wait_for(settled + earlier, turn - earlier); kept != 0; kept &= kept - 1) {
      const int other = __ffs(kept) - 1;
      const bool drops = overlap(of_lane(boxes, other), box) > params.limit;
      keep = keep && !(drops && (rivals >> other & 1));
    }
  }

  // A row stays if no row that stays drops it. That has one solution: a row is right as soon as all above it are, so the
  // first n are after n steps, and after as many as the longest chain of drops, about five in practice, all are.
  unsigned int kept = __ballot_sync(kWholeWarp, keep), before;
  do {
    before = kept;
    kept = __ballot_sync(kWholeWarp, keep && (droppers & before) == 0);
  } while (kept != before);

  if (lane == 0) {
    *static_cast<volatile Settled*>(settled + turn) = kIsOver | kept;
  }
  if (row < params.num_boxes) {
    params.keep[row] = kept >> lane & 1;
  }
}

}  // namespace

template <typename box_t>
cudaError_t nms(const NmsParams<box_t>& params, cudaStream_t stream) {
  const int64_t num_turns = nms_progress_size(params.num_boxes) - 1;
  return launch(nms_kernel<box_t>, dim3(static_cast<unsigned int>(num_turns)), dim3(kWarp), stream, params);
}

template cudaError_t nms(const NmsParams<float>&, cudaStream_t);
template cudaError_t nms(const NmsParams<double>&, cudaStream_t);

}  // namespace roialign::cuda
