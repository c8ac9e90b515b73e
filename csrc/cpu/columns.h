// The columns of a map that a RoI reads, and memory for what it reads of them. Knows no torch.
#pragma once

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

namespace roialign::cpu {

struct Columns {
  std::vector<int> cells;  // ascending

  Columns() = default;

  // In any order and more than once. Where few cells lie between them, `fill_gaps` makes columns of those too: up to as
  // many as there are columns. None, or five times as many, take up to 1.1 and 1.3 times as long.
  Columns(std::vector<int> cells_, bool fill_gaps) : cells(std::move(cells_)) {
    std::sort(cells.begin(), cells.end());
    cells.erase(std::unique(cells.begin(), cells.end()), cells.end());
    if (fill_gaps && !cells.empty() && width() <= 2 * count()) {
      const int first = cells.front();
      cells.resize(width());
      std::iota(cells.begin(), cells.end(), first);
    }
  }

  int count() const { return static_cast<int>(cells.size()); }
  int width() const { return cells.back() - cells.front() + 1; }  // from the first to the last
  bool have_gaps() const { return width() > count(); }
  int index_of(int cell) const {
    return static_cast<int>(std::lower_bound(cells.begin(), cells.end(), cell) - cells.begin());
  }
};

// Memory for vectors, aligned so that none lies in two cache lines.
template <typename T>
class Scratch {
 public:
  T* resize(size_t count) {
    constexpr size_t kAlignment = 64;
    size_t bytes = (count * sizeof(T) + kAlignment);
    storage_.resize(std::max(storage_.size(), bytes));
    void* data = storage_.data();
    return static_cast<T*>(std::align(kAlignment, count * sizeof(T), data, bytes));
  }

 private:
  std::vector<char> storage_;
};

}  // namespace roialign::cpu
