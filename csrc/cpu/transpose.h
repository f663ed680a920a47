// A square of numbers, a vector's worth a side, turned in registers.
#pragma once

#include <utility>

#include "simd.h"

namespace crossan_fast {

// Half of every pair of rows changes places, by ever longer halves.
template <class T, int half>
inline void swap_halves(Vec<T>* rows) {
  constexpr int lanes = kLanes<T, Vec<T>>;
  if constexpr (half < lanes) {
    constexpr auto low = [](int i) { return i & half ? i - half + lanes : i; };
    constexpr auto high = [](int i) { return i & half ? i + lanes : i + half; };
    constexpr std::make_integer_sequence<int, lanes> all;
#pragma GCC unroll 16
    for (int i = 0; i < lanes; ++i) {
      if (i & half) continue;
      const Vec<T> a = rows[i], b = rows[i + half];
      rows[i] = shuffled<low>(a, b, all);
      rows[i + half] = shuffled<high>(a, b, all);
    }
    swap_halves<T, 2 * half>(rows);
  }
}

// to[k, j] = from[j, k] for a vector's worth of each.
template <class T>
inline void transpose_square(const T* from, int64_t from_row, T* to, int64_t to_row) {
  constexpr int lanes = kLanes<T, Vec<T>>;
  Vec<T> rows[lanes];
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) rows[i] = load<Vec<T>>(from + i * from_row);
  swap_halves<T, 1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < lanes; ++i) store(to + i * to_row, rows[i]);
}

}  // namespace crossan_fast
