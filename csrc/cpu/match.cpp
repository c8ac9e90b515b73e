// CPU matching: the ground truth that overlaps each box the most, without the matrix of all overlaps. Knows no torch.
#include "match.h"

#include "overlap.h"

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
    for (int64_t row = 0; row < count; ++row) {
      const Box<box_t> box = box_of(boxes + row * 4);
      x1[row] = box.x1;
      y1[row] = box.y1;
      x2[row] = box.x2;
      y2[row] = box.y2;
      area[row] = box.area;
    }
    std::fill_n(overlap, kSize, box_t(-1));
    std::fill_n(best, kSize, index_t(0));
  }

  [[gnu::always_inline]] void compare(const Box<box_t>& truth, index_t index) {
    for (int box = 0; box < kSize; ++box) {
      const box_t quotient = roialign::overlap(truth, Box<box_t>{x1[box], y1[box], x2[box], y2[box], area[box]});
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
      block.compare(box_of(params.ground_truth + truth * 4), static_cast<typename block_t::index_t>(truth));
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
