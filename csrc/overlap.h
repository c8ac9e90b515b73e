// Intersection over union, once, for host and device. Knows no torch.
#pragma once

#include "geometry.h"

namespace roialign {

template <typename box_t>
struct Box {
  box_t x1, y1, x2, y2, area;
};

// A box from its four numbers.
template <typename box_t>
ROIALIGN_HOST_DEVICE Box<box_t> box_of(const box_t* corners) {
  const box_t x1 = corners[0], y1 = corners[1], x2 = corners[2], y2 = corners[3];
  return {x1, y1, x2, y2, product(x2 - x1, y2 - y1)};
}

template <typename box_t>
ROIALIGN_HOST_DEVICE box_t smaller(box_t a, box_t b) {
  return b < a ? b : a;
}

template <typename box_t>
ROIALIGN_HOST_DEVICE box_t larger(box_t a, box_t b) {
  return a < b ? b : a;
}

// Operations and their order are those of torchvision's kernels, each rounded on its own, so that the quotient has the
// same bits. A NaN in a box makes its area NaN, and so the quotient, whatever smaller() and larger() do with it.
template <typename box_t>
ROIALIGN_HOST_DEVICE box_t overlap(const Box<box_t>& one, const Box<box_t>& other) {
  const box_t width = larger(box_t(0), smaller(one.x2, other.x2) - larger(one.x1, other.x1));
  const box_t height = larger(box_t(0), smaller(one.y2, other.y2) - larger(one.y1, other.y1));
  const box_t intersection = product(width, height);
  return intersection / (one.area + other.area - intersection);
}

}  // namespace roialign
