// Weights laid out for `multiply`, once a call.
#pragma once

#include "gemm.h"
#include "parallel.h"
#include "rows.h"

namespace crossan_fast {

// B = Wᵀ of W [count][rows, columns], each packed in panels for `multiply`.
template <class T>
class PackedTransposes {
 public:
  PackedTransposes(const T* weight, int64_t count, int64_t rows, int64_t columns)
      : depth_(columns), each_(packed_size<T>(columns, rows)), memory_(count * each_) {
    const int64_t panels = (rows + kPanel<T> - 1) / kPanel<T>;
    run_tasks(workers_for(count * panels), count * panels, [&](int64_t, int64_t i) {
      const int64_t which = i / panels, panel = i % panels;
      pack_panel(weight + which * rows * columns, int64_t(1), columns, columns, panel * kPanel<T>, rows,
                 memory_.data() + which * each_ + panel * columns * kPanel<T>);
    });
  }
  RightSide<T> operator[](int64_t which) const { return packed(memory_.data() + which * each_, depth_); }

 private:
  int64_t depth_, each_;
  Buffer<T> memory_;
};

}  // namespace crossan_fast
