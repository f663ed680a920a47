// Thin matrix products of one block of items, small enough to stay in the core's own caches.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "simd.h"

namespace crossan_fast {

inline constexpr int kRowsPerTile = 6;

template <class T>
inline constexpr int64_t kPanel = kVectorsPerPanel * kLanes<T, Vec<T>>;  // columns of B walked at a time

// B of a product, [K, N]. `panel` is the distance from one panel of kPanel columns to the next: kPanel where B is
// plain row-major with `row` its row stride, K·kPanel where it was packed by `pack`.
template <class T>
struct RightSide {
  const T* data = nullptr;
  int64_t row = 0;
  int64_t panel = 0;
};

template <class T>
RightSide<T> plain(const T* data, int64_t row) {
  return {data, row, kPanel<T>};
}

template <class T>
RightSide<T> packed(const T* data, int64_t depth) {
  return {data, kPanel<T>, depth * kPanel<T>};
}

template <class T>
int64_t packed_size(int64_t depth, int64_t columns) {
  return depth * ((columns + kPanel<T> - 1) / kPanel<T>)*kPanel<T>;
}

// One panel of B [K, N] given by two strides: panel[k, j] = B[k, first + j], zeros beyond N.
template <class T>
void pack_panel(const T* b, int64_t row, int64_t column, int64_t depth, int64_t first, int64_t columns, T* panel);

enum class Into { overwrite, add };

// Rows that will be read next, fetched a line a step while products keep the core busy: a burst would fill the core's
// few fill buffers and hold up what it stands before.
class Ahead {
 public:
  static constexpr int64_t kPiece = 8;  // lines

  void clear() {
    rows_.clear();
    row_ = 0;
    at_ = 0;
  }
  void add(const char* row, int64_t bytes) {
    if (bytes > 0) rows_.push_back({row, bytes});
  }
  // Where the next kPiece lines begin, the last of which may lie beyond their row; null after the last row.
  const char* piece() {
    if (row_ >= rows_.size()) return nullptr;
    const auto [row, bytes] = rows_[row_];
    const char* from = row + at_;
    at_ += kPiece * 64;
    if (at_ >= bytes) {
      at_ = 0;
      ++row_;
    }
    return from;
  }

 private:
  std::vector<std::pair<const char*, int64_t>> rows_;
  size_t row_ = 0;
  int64_t at_ = 0;
};

// C[M, N] = (keep · C +) bias[N] + A[M, K] · B[K, N]; A by two strides, C row-major with `c_row`. The order of every
// sum depends on K alone, so results repeat bit for bit however the rows are cut. `then` is the right side of what
// will be multiplied next, whose first rows are fetched meanwhile.
template <class T>
void multiply(int64_t rows, int64_t columns, int64_t depth, const T* a, int64_t a_row, int64_t a_column, RightSide<T> b,
              T* c, int64_t c_row, Into into, const T* bias = nullptr, T keep = T(1), Ahead* ahead = nullptr,
              RightSide<T> then = {});

}  // namespace crossan_fast
