// CPU non-maximum suppression, greedy within groups of boxes. Knows no torch.
#include "nms.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <type_traits>
#include <vector>

namespace roialign::cpu {
namespace {

// The boxes of one group, best score first, by column, so that a kept box is compared with many others per instruction.
template <typename box_t>
struct Columns {
  // As wide as a coordinate: then results of comparisons are stored as they come.
  using flag_t = std::conditional_t<sizeof(box_t) == 4, int32_t, int64_t>;

  std::vector<box_t> x1, y1, x2, y2, area;
  std::vector<flag_t> dropped;

  void resize(size_t size) {
    for (auto* column : {&x1, &y1, &x2, &y2, &area}) {
      column->resize(size);
    }
    dropped.assign(size, 0);
  }

  void set(int64_t row, const box_t* box) {
    x1[row] = box[0];
    y1[row] = box[1];
    x2[row] = box[2];
    y2[row] = box[3];
    area[row] = (box[2] - box[0]) * (box[3] - box[1]);
  }

  // Drops all boxes after `row` that overlap it by more than the limit. Operations and their order are those of
  // torchvision's kernel, and the file is compiled without contraction, so that the quotient has the same bits.
  void drop_those_over(int64_t row, box_t limit) {
    const box_t left = x1[row], top = y1[row], right = x2[row], bottom = y2[row], own_area = area[row];
    const box_t *x1s = x1.data(), *y1s = y1.data(), *x2s = x2.data(), *y2s = y2.data(), *areas = area.data();
    flag_t* drops = dropped.data();
    const int64_t size = static_cast<int64_t>(dropped.size());
    for (int64_t other = row + 1; other < size; ++other) {
      const box_t width = std::max(box_t(0), std::min(right, x2s[other]) - std::max(left, x1s[other]));
      const box_t height = std::max(box_t(0), std::min(bottom, y2s[other]) - std::max(top, y1s[other]));
      const box_t intersection = width * height;
      drops[other] |= intersection / (own_area + areas[other] - intersection) > limit;
    }
  }
};

// `x > value` in double precision is `x > this` for every x of the type.
template <typename box_t>
box_t largest_not_above(double value) {
  const box_t rounded = static_cast<box_t>(value);
  return rounded > value ? std::nextafter(rounded, -std::numeric_limits<box_t>::infinity()) : rounded;
}

}  // namespace

template <typename box_t>
void nms(const NmsParams<box_t>& params) {
  const box_t limit = largest_not_above<box_t>(params.iou_threshold);
  std::vector<int64_t> places(params.num_boxes);  // in `order`, group after group, best score first
  std::iota(places.begin(), places.end(), 0);
  const auto group_of = [&](int64_t place) {
    return params.groups != nullptr ? params.groups[params.order[place]] : 0;
  };
  if (params.groups != nullptr) {
    std::stable_sort(places.begin(), places.end(),
                     [&](int64_t one, int64_t other) { return group_of(one) < group_of(other); });
  }

  Columns<box_t> columns;
  for (auto begin = places.begin(); begin != places.end();) {
    const auto end = std::find_if(begin, places.end(),
                                  [&, group = group_of(*begin)](int64_t place) { return group_of(place) != group; });
    const int64_t size = end - begin;
    columns.resize(size);
    for (int64_t row = 0; row < size; ++row) {
      columns.set(row, params.boxes + params.order[begin[row]] * 4);
    }
    for (int64_t row = 0; row < size; ++row) {
      const bool keep = columns.dropped[row] == 0;
      params.keep[begin[row]] = keep;
      if (keep) {
        columns.drop_those_over(row, limit);
      }
    }
    begin = end;
  }
}

template void nms(const NmsParams<float>&);
template void nms(const NmsParams<double>&);

}  // namespace roialign::cpu
