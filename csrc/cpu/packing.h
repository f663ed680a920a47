// Weights laid out for `multiply`, once a call.
#pragma once

#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace crossan_fast {

enum class As { plain, transposed };

// B of W [count][rows, columns], each packed in panels for `multiply`: W itself, or Wᵀ. There once `tasks` have run.
template <class T>
class PackedWeights {
 public:
  PackedWeights(Tasks& tasks, const T* weight, int64_t count, int64_t rows, int64_t columns, As as)
      : depth_(as == As::plain ? rows : columns) {
    const int64_t width = as == As::plain ? columns : rows;
    const int64_t row = as == As::plain ? columns : 1, column = as == As::plain ? 1 : columns;
    const int64_t panels = (width + kPanel<T> - 1) / kPanel<T>;
    each_ = packed_size<T>(depth_, width);
    memory_ = Buffer<T>(count * each_);
    for (int64_t which = 0; which < count; ++which)
      tasks.add([=, depth = depth_, from = weight + which * rows * columns, to = memory_.data() + which * each_] {
        for (int64_t panel = 0; panel < panels; ++panel)
          pack_panel(from, row, column, depth, panel * kPanel<T>, width, to + panel * depth * kPanel<T>);
      });
  }
  RightSide<T> operator[](int64_t which) const { return packed(memory_.data() + which * each_, depth_); }

 private:
  int64_t depth_, each_;
  Buffer<T> memory_;
};

}  // namespace crossan_fast
