// What the host asks of suppression on a CPU. Knows no torch.
#pragma once

#include <cstdint>

namespace roialign::cpu {

template <typename box_t>
struct NmsParams {
  const box_t* boxes;     // [K, 4] x1, y1, x2, y2
  const int64_t* order;   // [K] indices of boxes, best score first
  const int64_t* groups;  // [K] of each box, or null for one group
  int64_t num_boxes;
  double iou_threshold;
  bool* keep;  // [K] out, along `order`: whether greedy suppression within its group keeps the box
};

template <typename box_t>
void nms(const NmsParams<box_t>& params);

}  // namespace roialign::cpu
