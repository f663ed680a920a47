// What forward and backward of the sequence encoder share: the real places as packed rows, what is kept of them,
// and LayerNorm and attention over a few of them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/functions.h"
#include "cpu/rows.h"
#include "sequence_encoder.h"

namespace crossan_fast::sequence_encoder {

// The real places of a batch in order, and how they are cut: a function of the mask alone, so that results do not
// depend on threads.
struct Packing {
  struct Range {
    int64_t first, count;
  };
  std::vector<int64_t> place;    // b·S + s of each row
  std::vector<Range> sequences;  // rows of each user that has any
  std::vector<Range> blocks;     // sequences of each block
  std::vector<Range> rows;       // rows of each block

  Packing(const Sizes& sizes, const bool* mask) {
    constexpr int64_t kBlock = 24;  // four tiles of rows: enough to reuse weights in L1, and many blocks a batch
    for (int64_t b = 0; b < sizes.batch; ++b) {
      const auto first = static_cast<int64_t>(place.size());
      for (int64_t p = b * sizes.places; p < (b + 1) * sizes.places; ++p)
        if (mask[p]) place.push_back(p);
      const int64_t count = static_cast<int64_t>(place.size()) - first;
      if (count == 0) continue;
      if (rows.empty() || rows.back().count >= kBlock) {
        blocks.push_back({static_cast<int64_t>(sequences.size()), 0});
        rows.push_back({first, 0});
      }
      sequences.push_back({first, count});
      blocks.back().count += 1;
      rows.back().count += count;
    }
  }

  int64_t total() const { return static_cast<int64_t>(place.size()); }
  int64_t longest_block() const {
    int64_t longest = 0;
    for (const Range& range : rows) longest = std::max(longest, range.count);
    return longest;
  }
};

// Rows a line longer than they are wide, so that a column's elements do not share a few sets of the L1 cache. The
// same for every type: the Python side counts these numbers too.
inline int64_t stride_of(int64_t width) { return width + 16; }

template <class T>
struct Matrix {
  T* data;
  int64_t stride;
  T* operator[](int64_t row) const { return data + row * stride; }
  Matrix from(int64_t row) const { return {data + row * stride, stride}; }
};

// What the forward leaves of each row; T is const in the backward.
template <class T>
struct Kept {
  struct Layer {
    Matrix<T> qkv;                        // [3d]
    Matrix<T> lse;                        // [heads], log of the sum of exp of the scores
    Matrix<T> mixed;                      // [d], attention before its last product
    Matrix<T> inner;                      // [f], after ReLU
    Matrix<T> attended, forwarded;        // [d], normalised, before gain and bias
    Matrix<T> attended_by, forwarded_by;  // [1], by what each was multiplied
  };
  Matrix<T> normed, normed_by, entered;  // normalised items + positions; what enters the first block
  std::vector<Layer> layers;

  Kept(const Sizes& s, int64_t rows, T* data) {
    const auto take = [&](int64_t stride) {
      const Matrix<T> matrix{data, stride};
      if (data) data += rows * stride;
      width_ += stride;
      return matrix;
    };
    const int64_t wide = stride_of(s.width);
    normed = take(wide);
    entered = take(wide);
    for (int64_t l = 0; l < s.layers; ++l) {
      Layer layer;
      layer.qkv = take(stride_of(3 * s.width));
      layer.mixed = take(wide);
      layer.attended = take(wide);
      layer.inner = take(stride_of(s.inner));
      layer.forwarded = take(wide);
      layer.lse = take(s.heads);
      layer.attended_by = take(1);
      layer.forwarded_by = take(1);
      layers.push_back(layer);
    }
    normed_by = take(1);
  }

  int64_t width() const { return width_; }

 private:
  int64_t width_ = 0;
};

// Query, key and value of each block as one matrix [3d, d]: one product instead of three narrow ones.
template <class T>
class Joined {
 public:
  Joined(const Sizes& s, const std::vector<Layer<const T*>>& layers)
      : each_(s.width * s.width), memory_(3 * each_ * s.layers) {
    T* to = memory_.data();
    for (const auto& layer : layers)
      for (const T* from : {layer.query, layer.key, layer.value}) to = std::copy_n(from, each_, to);
  }
  const T* operator[](int64_t layer) const { return memory_.data() + 3 * each_ * layer; }

 private:
  int64_t each_;
  Buffer<T> memory_;
};

// Sites of dropout: 0 after the first norm, then three a block.
struct Sites {
  uint32_t attention, attended, forwarded;
  explicit Sites(int64_t layer)
      : attention(static_cast<uint32_t>(3 * layer + 1)), attended(attention + 1), forwarded(attention + 2) {}
};

template <class T>
T sum(int64_t width, const T* x) {
  constexpr int lanes = kLanes<T, Vec<T>>;
  Vec<T> sums[2] = {};
  int64_t d = 0;
  for (; d + 2 * lanes <= width; d += 2 * lanes) {
    sums[0] += load<Vec<T>>(x + d);
    sums[1] += load<Vec<T>>(x + d + lanes);
  }
  T rest = 0;
  for (; d < width; ++d) rest += x[d];
  return sum_of_lanes<T>(sums[0] + sums[1]) + rest;
}

// x ← (x − mean) / √(variance + eps); returns 1 / √(variance + eps).
template <class T>
T normalise(int64_t width, T eps, T* x) {
  const T mean = sum(width, x) / static_cast<T>(width);
  for (int64_t c = 0; c < width; ++c) x[c] -= mean;
  const T by = T(1) / std::sqrt(dot(width, x, x) / static_cast<T>(width) + eps);
  for (int64_t c = 0; c < width; ++c) x[c] *= by;
  return by;
}

// y = gain · x + bias
template <class T>
void affine(int64_t width, const T* __restrict x, const T* __restrict gain, const T* __restrict bias, T* __restrict y) {
  for (int64_t c = 0; c < width; ++c) y[c] = x[c] * gain[c] + bias[c];
}

template <class T>
void relu(int64_t width, T* x) {
  for (int64_t c = 0; c < width; ++c) x[c] = x[c] <= T(0) ? T(0) : x[c];  // and NaN stays
}

// dz of z, where y = gain · normalise(z) + bias; adds to the gradients of gain and bias. `dz` may not be `dy`.
template <class T>
void normalise_backward(int64_t width, const T* __restrict normed, T by, const T* __restrict gain,
                        const T* __restrict dy, T* __restrict dz, T* __restrict grad_gain, T* __restrict grad_bias) {
  for (int64_t c = 0; c < width; ++c) {
    dz[c] = dy[c] * gain[c];
    grad_gain[c] += dy[c] * normed[c];
    grad_bias[c] += dy[c];
  }
  const T mean = sum(width, dz) / static_cast<T>(width);
  const T slope = dot(width, dz, normed) / static_cast<T>(width);
  for (int64_t c = 0; c < width; ++c) dz[c] = by * (dz[c] - mean - slope * normed[c]);
}

// to += weight · x
template <class T>
inline void add_scaled(int64_t width, T weight, const T* x, T* to) {
  constexpr int lanes = kLanes<T, Vec<T>>;
  int64_t c = 0;
  for (; c + lanes <= width; c += lanes) store(to + c, load<Vec<T>>(to + c) + weight * load<Vec<T>>(x + c));
  for (; c < width; ++c) to[c] += weight * x[c];
}

// Causal attention of one sequence, all heads; a thread has one.
template <class T>
class Attention {
 public:
  Attention(const Sizes& sizes, const Dropout& dropout)
      : s_(sizes),
        dropout_(dropout),
        scale_(T(1) / std::sqrt(static_cast<T>(sizes.head_width()))),
        p_(whole(sizes.places)),
        dp_(sizes.places),
        factors_(sizes.places * sizes.heads) {}

  // place: of each row, b·S + s.
  void forward(uint32_t site, int64_t count, const int64_t* place, Matrix<T> qkv, Matrix<T> lse, Matrix<T> mixed) {
    const int64_t d = s_.width, each = s_.head_width();
    T* p = p_.data();
    for (int64_t i = 0; i < count; ++i) {
      draw(site, place[i]);
      for (int64_t h = 0; h < s_.heads; ++h) {
        const T* q = qkv[i] + h * each;
        T top = -std::numeric_limits<T>::infinity();
        for (int64_t j = 0; j <= i; ++j) {
          p[j] = scale_ * dot(each, q, qkv[j] + d + h * each);
          top = std::max(top, p[j]);
        }
        exponentials(i + 1, top);
        const T total = sum(whole(i + 1), p), share = T(1) / total;
        lse[i][h] = top + std::log(total);
        keep(h, place, i, p);
        T* to = mixed[i] + h * each;
        std::fill_n(to, each, T(0));
        for (int64_t j = 0; j <= i; ++j) add_scaled(each, share * p[j], qkv[j] + 2 * d + h * each, to);
      }
    }
  }

  // grad: of `mixed`; grad_qkv is overwritten.
  void backward(uint32_t site, int64_t count, const int64_t* place, Matrix<const T> qkv, Matrix<const T> lse,
                Matrix<T> grad, Matrix<T> grad_qkv) {
    const int64_t d = s_.width, each = s_.head_width();
    T *p = p_.data(), *dp = dp_.data();
    for (int64_t i = 0; i < count; ++i) std::fill_n(grad_qkv[i], 3 * d, T(0));
    for (int64_t i = 0; i < count; ++i) {
      draw(site, place[i]);
      for (int64_t h = 0; h < s_.heads; ++h) {
        const T *q = qkv[i] + h * each, *g = grad[i] + h * each;
        for (int64_t j = 0; j <= i; ++j) {
          const T* k = qkv[j] + d + h * each;
          p[j] = scale_ * dot(each, q, k);
          dp[j] = dot(each, g, k + d);
        }
        exponentials(i + 1, lse[i][h]);
        // What dp_j have in common cancels only as nearly as p sums to one, and a mean is rounded to its own size: so
        // the first is taken off them all, and p, known but as nearly as lse, is divided by its own sum.
        const T share = T(1) / sum(whole(i + 1), p);
        for (int64_t j = 0; j <= i; ++j) p[j] *= share;
        keep(h, place, i, dp);
        const T common = dp[0];
        T mean = 0;
        for (int64_t j = 0; j <= i; ++j) {
          dp[j] -= common;
          mean += p[j] * dp[j];
        }
        for (int64_t j = 0; j <= i; ++j) dp[j] = scale_ * p[j] * (dp[j] - mean);
        keep(h, place, i, p);
        for (int64_t j = 0; j <= i; ++j) {
          T* dk = grad_qkv[j] + d + h * each;
          add_scaled(each, dp[j], qkv[j] + d + h * each, grad_qkv[i] + h * each);
          add_scaled(each, dp[j], q, dk);
          add_scaled(each, p[j], g, dk + d);
        }
      }
    }
  }

 private:
  static constexpr int64_t kWhole = kLanes<T, Vec<T>>;
  static int64_t whole(int64_t count) { return (count + kWhole - 1) / kWhole * kWhole; }

  // p ← exp(p − top), in whole vectors: beyond `count` zeros.
  void exponentials(int64_t count, T top) {
    T* p = p_.data();
    std::fill(p + count, p + whole(count), -std::numeric_limits<T>::infinity());
    for (int64_t j = 0; j < count; j += kWhole)
      for (int64_t lane = 0; lane < kWhole; ++lane) p[j + lane] = fast_exp(p[j + lane] - top);
  }

  void draw(uint32_t site, int64_t place) {
    if (dropout_.on()) dropout_.draw(site, place, s_.heads * s_.places, factors_.data());
  }

  // Column head·S + s of the place's mask belongs to the key at s.
  void keep(int64_t head, const int64_t* place, int64_t last, T* x) const {
    if (!dropout_.on()) return;
    const T* own = factors_.data() + head * s_.places;
    const int64_t start = place[0] / s_.places * s_.places;
    for (int64_t j = 0; j <= last; ++j) x[j] *= own[place[j] - start];
  }

  const Sizes& s_;
  const Dropout& dropout_;
  T scale_;
  Buffer<T> p_, dp_, factors_;
};

}  // namespace crossan_fast::sequence_encoder
