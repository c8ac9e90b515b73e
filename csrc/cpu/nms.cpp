// CPU non-maximum suppression, greedy within groups of boxes. Knows no torch.
#include "overlap.h"

#include "kernels.h"

#include <algorithm>
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

  void set(int64_t row, const Box<box_t>& box) {
    x1[row] = box.x1;
    y1[row] = box.y1;
    x2[row] = box.x2;
    y2[row] = box.y2;
    area[row] = box.area;
  }

  // Drops all boxes after `row` that overlap it by more than the limit.
  void drop_those_over(int64_t row, box_t limit) {
    const Box<box_t> box = {x1[row], y1[row], x2[row], y2[row], area[row]};
    const box_t *x1s = x1.data(), *y1s = y1.data(), *x2s = x2.data(), *y2s = y2.data(), *areas = area.data();
    flag_t* drops = dropped.data();
    const int64_t size = static_cast<int64_t>(dropped.size());
    for (int64_t other = row + 1; other < size; ++other) {
      drops[other] |= overlap(box, Box<box_t>{x1s[other], y1s[other], x2s[other], y2s[other], areas[other]}) > limit;
    }
  }
};

}  // namespace

template <typename box_t>
void nms(const NmsParams<box_t>& params) {
  Columns<box_t> columns;
  for (int64_t begin = 0; begin < params.num_boxes;) {
    int64_t end = params.num_boxes;
    if (params.groups != nullptr) {
      end = std::upper_bound(params.groups + begin, params.groups + end, params.groups[begin]) - params.groups;
    }
    columns.resize(end - begin);
    for (int64_t row = begin; row < end; ++row) {
      columns.set(row - begin, box_of(params.boxes + row * 4));
    }
    for (int64_t row = begin; row < end; ++row) {
      params.keep[row] = columns.dropped[row - begin] == 0;
      if (params.keep[row]) {
        columns.drop_those_over(row - begin, params.limit);
      }
    }
    begin = end;
  }
}

template void nms(const NmsParams<float>&);
template void nms(const NmsParams<double>&);

}  // namespace roialign::cpu
