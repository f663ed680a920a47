// Operands of bf16 products: numbers rounded, and laid out in pairs of two that follow one another in depth.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iterator>

#include "transpose.h"

namespace crossan_fast {

inline constexpr int64_t kPairPanel = 64;  // columns of B walked at a time

inline int64_t even(int64_t depth) { return (depth + 1) / 2 * 2; }
inline int64_t pair_row(int64_t columns) { return (columns + 15) / 16 * 16; }  // oneDNN takes no other distance
inline int64_t pairs_size(int64_t depth, int64_t columns) { return even(depth) * pair_row(columns); }

using PairBits = uint32_t;
typedef PairBits PairVec __attribute__((vector_size(kVectorBytes)));
inline constexpr int64_t kPairLanes = kLanes<PairBits, PairVec>;

// pairs[j] = (first[j], second[j]) for j < count, `second` null for zeros.
inline void pair_up(const float* first, const float* second, int64_t count, uint16_t* pairs) {
  int64_t j = 0;
  for (; j + kPairLanes <= count; j += kPairLanes) {
    PairVec both = bf16_above<Vec<float>, PairVec>(load<Vec<float>>(first + j)) >> 16;
    if (second) both |= bf16_above<Vec<float>, PairVec>(load<Vec<float>>(second + j)) & 0xffff0000u;
    store(pairs + 2 * j, both);
  }
  for (; j < count; ++j) {
    pairs[2 * j] = to_bf16(first[j]);
    pairs[2 * j + 1] = second ? to_bf16(second[j]) : uint16_t{0};
  }
}

// to[k] = from[k] for k < count, zeros from there to an even one.
inline void round_row(const float* from, int64_t count, uint16_t* to) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  int64_t k = 0;
  for (; k + kPairLanes <= count; k += kPairLanes)
    store(to + k, __builtin_convertvector(bf16_above<Vec<float>, PairVec>(load<Vec<float>>(from + k)) >> 16, Half));
  for (; k < count; ++k) to[k] = to_bf16(from[k]);
  if (count % 2 != 0) to[count] = 0;
}

// to[k, j] = from[j, k] of a square of pairs.
inline void transpose_pairs(const uint16_t* from, int64_t from_row, uint16_t* to, int64_t to_row) {
  transpose_square(reinterpret_cast<const float*>(from), from_row / 2, reinterpret_cast<float*>(to), to_row / 2);
}

// Panels of B [K, N] given by two strides, one of which is 1: pairs[panel][k / 2][column][k % 2], zeros beyond K and N.
inline void pack_pairs(const float* b, int64_t row, int64_t column, int64_t depth, int64_t columns, uint16_t* pairs) {
  for (int64_t first = 0; first < columns; first += kPairPanel) {
    const int64_t count = std::min(kPairPanel, columns - first), across = 2 * pair_row(count);
    if (column == 1) {
      for (int64_t k = 0; k < depth; k += 2, pairs += across) {
        const float* from = b + k * row + first;
        pair_up(from, k + 1 < depth ? from + row : nullptr, count, pairs);
        std::fill(pairs + 2 * count, pairs + across, uint16_t{0});
      }
      continue;
    }
    constexpr int64_t side = kPairLanes;
    alignas(64) uint16_t square[2 * side * side];
    for (int64_t j = 0; j < pair_row(count); j += side)
      for (int64_t k = 0; k < depth; k += 2 * side) {
        const int64_t deep = std::min(2 * side, depth - k);
        const bool whole = deep == 2 * side && j + side <= count;
        if (!whole) std::fill(std::begin(square), std::end(square), uint16_t{0});
        for (int64_t i = 0; i < std::min(side, count - j); ++i)
          round_row(b + k * row + (first + j + i) * column, deep, square + 2 * i * side);
        uint16_t* to = pairs + k / 2 * across + 2 * j;
        if (whole) {
          transpose_pairs(square, 2 * side, to, across);
          continue;
        }
        for (int64_t p = 0; p < even(deep) / 2; ++p)
          for (int64_t i = 0; i < side; ++i)
            std::memcpy(to + p * across + 2 * i, square + 2 * (i * side + p), sizeof(PairBits));
      }
    pairs += even(depth) / 2 * across;
  }
}

// The rows of a left side A [M, K]: as long as a whole number of squares.
inline int64_t left_row_of(int64_t depth) { return (depth + 2 * kPairLanes - 1) / (2 * kPairLanes) * 2 * kPairLanes; }

// A given by two strides, one of which is 1, in rows of left_row_of(K): zeros from K to an even one.
inline void pack_left(int64_t rows, int64_t depth, const float* a, int64_t row, int64_t column, uint16_t* to) {
  const int64_t to_row = left_row_of(depth);
  if (column == 1) {
    for (int64_t i = 0; i < rows; ++i) round_row(a + i * row, depth, to + i * to_row);
    return;
  }
  constexpr int64_t side = kPairLanes;
  alignas(64) uint16_t square[2 * side * side];
  int64_t i = 0;
  for (; i + side <= rows; i += side)
    for (int64_t k = 0; k < depth; k += 2 * side) {
      for (int64_t p = 0; p < side; ++p) {
        const int64_t at = k + 2 * p;
        const float* from = a + i * row + at * column;
        if (at < depth)
          pair_up(from, at + 1 < depth ? from + column : nullptr, side, square + 2 * p * side);
        else
          std::fill_n(square + 2 * p * side, 2 * side, uint16_t{0});
      }
      transpose_pairs(square, 2 * side, to + i * to_row + k, to_row);
    }
  for (; i < rows; ++i) {
    for (int64_t k = 0; k < depth; ++k) to[i * to_row + k] = to_bf16(a[i * row + k * column]);
    if (depth % 2 != 0) to[i * to_row + depth] = 0;
  }
}

}  // namespace crossan_fast
