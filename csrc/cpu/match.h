// What the host asks of matching on a CPU. Knows no torch.
#pragma once

#include <cstdint>

namespace roialign::cpu {

template <typename box_t>
struct MatchParams {
  const box_t* ground_truth;  // [G, 4] x1, y1, x2, y2
  const box_t* boxes;         // [K, 4]
  int64_t num_ground_truth;   // at least one
  int64_t num_boxes;
  box_t* overlap;  // [K] out: the largest intersection over union with a ground truth, NaN if one is NaN
  int64_t* best;   // [K] out: the first ground truth with it
};

template <typename box_t>
void match(const MatchParams<box_t>& params);

}  // namespace roialign::cpu
