// CPU matching: the ground truth that overlaps each box the most, without the matrix of all overlaps. Knows no torch.
#include "match.h"

#include "dispatch.h"

#include <algorithm>
#include <type_traits>

namespace roialign::cpu {
namespace {

// Boxes by column, few enough to stay in L1 while all ground truth passes over them, many per instruction.
template <typename box_t>
struct Block {
  static constexpr int kSize = 256;
  // As wide as a coordinate, so that a lane that holds an overlap holds its index too.
  using index_t = std::conditional_t<sizeof(box_t) == 4, int32_t, int64_t>;

  box_t x1[kSize] = {}, y1[kSize] = {}, x2[kSize] = {}, y2[kSize] = {}, area[kSize] = {};
  box_t overlap[kSize];
  index_t best[kSize];

  [[gnu::always_inline]] void load(const box_t* boxes, int64_t count) {
    for (int64_t box = 0; box < count; ++box, boxes += 4) {
      x1[box] = boxes[0];
      y1[box] = boxes[1];
      x2[box] = boxes[2];
      y2[box] = boxes[3];
      area[box] = (boxes[2] - boxes[0]) * (boxes[3] - boxes[1]);
    }
    std::fill_n(overlap, kSize, box_t(-1));
    std::fill_n(best, kSize, index_t(0));
  }

  // Operations and their order are those of torchvision's box_iou, and the file is compiled without contraction, so
  // that the quotient has the same bits. A NaN in a box makes its area NaN, and so the quotient, whatever min and max
  // do with it.
  [[gnu::always_inline]] void compare(const box_t* truth, index_t index) {
    const box_t left = truth[0], top = truth[1], right = truth[2], bottom = truth[3];
    const box_t own_area = (right - left) * (bottom - top);
    for (int box = 0; box < kSize; ++box) {
      const box_t width = std::max(box_t(0), std::min(right, x2[box]) - std::max(left, x1[box]));
      const box_t height = std::max(box_t(0), std::min(bottom, y2[box]) - std::max(top, y1[box]));
      const box_t intersection = width * height;
      const box_t quotient = intersection / (own_area + area[box] - intersection);
      // The first NaN wins, as in torch.max. The operators are those of bits, because branches are not vectorised.
      const bool better = (quotient > overlap[box]) | ((quotient != quotient) & (overlap[box] == overlap[box]));
      overlap[box] = better ? quotient : overlap[box];
      best[box] = better ? index : best[box];
    }
  }
};

// Inlined, so that it is compiled for the instruction set of its caller.
template <typename box_t>
[[gnu::always_inline]] inline void match_blocks(const MatchParams<box_t>& params) {
  using block_t = Block<box_t>;
  block_t block;
  for (int64_t start = 0; start < params.num_boxes; start += block_t::kSize) {
    const int64_t count = std::min<int64_t>(block_t::kSize, params.num_boxes - start);
    block.load(params.boxes + start * 4, count);
    for (int64_t truth = 0; truth < params.num_ground_truth; ++truth) {
      block.compare(params.ground_truth + truth * 4, static_cast<typename block_t::index_t>(truth));
    }
    std::copy_n(block.overlap, count, params.overlap + start);
    std::copy_n(block.best, count, params.best + start);
  }
}

#ifdef ROIALIGN_HAS_TARGETS
// Not one of for_each_target.h's namespaces: those contract products and sums.
template <typename box_t>
[[gnu::target("avx2")]] void match_blocks_avx2(const MatchParams<box_t>& params) {
  match_blocks(params);
}
#endif

}  // namespace

template <typename box_t>
void match(const MatchParams<box_t>& params) {
#ifdef ROIALIGN_HAS_TARGETS
  if (current_target >= kAvx2) {
    return match_blocks_avx2(params);
  }
#endif
  match_blocks(params);
}

template void match(const MatchParams<float>&);
template void match(const MatchParams<double>&);

}  // namespace roialign::cpu
