// The streaming softmax that both losses are made of; one lane of a vector is one row (a user at a position).
//
// A tile holds the logits of kTileItems items for a block of kBlockRows rows, items down, rows across: maxima and
// sums go straight down the lanes, and neither operand of any product has to be copied or transposed but the block's
// users. Memory is a tile a thread.
#include "streaming_softmax.h"

#include <cmath>
#include <limits>

#include "functions.h"
#include "gemm.h"
#include "parallel.h"
#include "rows.h"
#include "turns.h"

namespace crossan_fast {
namespace {

constexpr int64_t kBlockRows = 64;
constexpr int64_t kTileItems = 240;

template <class T>
class SoftmaxBlock {
 public:
  explicit SoftmaxBlock(const SoftmaxLoss<T>& loss)
      : loss_(loss),
        users_(kBlockRows * loss.width),
        packed_(packed_size<T>(loss.width, kBlockRows)),
        tile_(kTileItems * kBlockRows),
        grad_(kBlockRows * loss.width) {}

  void start(int64_t block) {
    first_ = block * kBlockRows;
    count_ = std::min<int64_t>(kBlockRows, static_cast<int64_t>(loss_.rows.size()) - first_);
    const int64_t d = loss_.width;
    for (int64_t i = 0; i < kBlockRows; ++i) {
      T* to = users_.data() + i * d;
      target_score_[i] = 0;
      if (i >= count_) {
        std::fill_n(to, d, T(0));
        continue;
      }
      std::copy_n(loss_.users + row(i) * d, d, to);
      if (loss_.positive) target_score_[i] = dot(d, to, loss_.items + target(i) * d) + loss_.positive[target(i)];
    }
    for (int64_t j = 0; j < kBlockRows; j += kPanel<T>)
      pack_panel(users_.data(), int64_t(1), d, d, j, kBlockRows, packed_.data() + j * d);
  }

  // Log-sum-exps into lse [B·S]; returns the sum of the block's losses.
  double forward(T* lse) {
    T maximum[kBlockRows], sum[kBlockRows];
    std::fill_n(maximum, kBlockRows, -std::numeric_limits<T>::infinity());
    std::fill_n(sum, kBlockRows, T(0));
    for (int64_t c = 0; c < loss_.columns; c += kTileItems) {
      const int64_t height = score(c);
      T top[kBlockRows], shift[kBlockRows];
      std::copy_n(maximum, kBlockRows, top);
      for (int64_t u = 0; u < height; ++u) {
        T* s = tile_.data() + u * kBlockRows;
        const T add = correction(c + u);
        for (int64_t i = 0; i < kBlockRows; ++i) {
          s[i] += add;
          top[i] = s[i] > top[i] ? s[i] : top[i];
        }
      }
      for (int64_t i = 0; i < kBlockRows; ++i) {
        shift[i] = top[i] == -std::numeric_limits<T>::infinity() ? T(0) : top[i];
        sum[i] *= fast_exp(maximum[i] - shift[i]);
        maximum[i] = top[i];
      }
      Vec<T> part[kVectors] = {};  // a tile's sum by itself: one long sum would lose digits of the gradients
      for (int64_t u = 0; u < height; ++u) {
        const T* s = tile_.data() + u * kBlockRows;
        Vec<T> x[kVectors];
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) x[v] = load<Vec<T>>(s + v * kLane) - load<Vec<T>>(shift + v * kLane);
        exp_of_lanes(x);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) part[v] += x[v];
      }
      for (int v = 0; v < kVectors; ++v) store(sum + v * kLane, load<Vec<T>>(sum + v * kLane) + part[v]);
    }
    double total = 0;
    for (int64_t i = 0; i < count_; ++i) {
      if (loss_.slots) {  // the target is no negative; it comes in here, once
        const T top = std::max(maximum[i], target_score_[i]);
        sum[i] = sum[i] * std::exp(maximum[i] - top) + std::exp(target_score_[i] - top);
        maximum[i] = top;
      }
      const T rest = std::log(sum[i]);
      lse[row(i)] = maximum[i] + rest;
      total += (static_cast<double>(maximum[i]) - static_cast<double>(target_score_[i])) + static_cast<double>(rest);
    }
    return total;
  }

  // Adds to grad_items [columns, d] in the order of blocks and writes the block's rows of grad_users.
  void backward(int64_t block, T scale, const T* lse, Turns& turns, T* grad_users, T* grad_items) {
    const int64_t d = loss_.width;
    T norm[kBlockRows];
    for (int64_t i = 0; i < kBlockRows; ++i) norm[i] = i < count_ ? lse[row(i)] : std::numeric_limits<T>::infinity();
    for (int64_t c = 0, step = 0; c < loss_.columns; c += kTileItems, ++step) {
      const int64_t height = score(c);
      for (int64_t u = 0; u < height; ++u) {
        T* s = tile_.data() + u * kBlockRows;
        const T add = correction(c + u);
        Vec<T> x[kVectors];  // logits to the bit as the forward has them: lse is large where they are, and a sum in
                             // another order would differ from it by a rounding of that size
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) x[v] = (load<Vec<T>>(s + v * kLane) + add) - load<Vec<T>>(norm + v * kLane);
        exp_of_lanes(x);
#pragma GCC unroll 8
        for (int v = 0; v < kVectors; ++v) store(s + v * kLane, scale * x[v]);
      }
      for (int64_t i = 0; i < count_; ++i) {
        const int64_t u = target(i) - c;
        if (u < 0 || u >= height) continue;
        tile_.data()[u * kBlockRows + i] = scale * std::expm1(target_score_[i] - norm[i]);
      }
      multiply<T>(count_, d, height, tile_.data(), 1, kBlockRows, plain(loss_.items + c * d, d), grad_.data(), d,
                  c == 0 ? Into::overwrite : Into::add);
      turns.wait(block, step);
      multiply<T>(height, d, kBlockRows, tile_.data(), kBlockRows, 1, plain(users_.data(), d), grad_items + c * d, d,
                  block == 0 ? Into::overwrite : Into::add);
      turns.pass(block, step);
    }
    for (int64_t i = 0; i < count_; ++i) std::copy_n(grad_.data() + i * d, d, grad_users + row(i) * d);
  }

 private:
  static constexpr int kLane = kLanes<T, Vec<T>>, kVectors = kBlockRows / kLane;

  int64_t row(int64_t i) const { return loss_.rows[static_cast<size_t>(first_ + i)]; }
  int64_t target(int64_t i) const { return loss_.targets[static_cast<size_t>(first_ + i)]; }

  // What a column's score is short of its logit as a negative.
  T correction(int64_t column) const { return loss_.negative ? loss_.negative[column] : T(0); }

  // tile[u, i]: the score of column c + u for row i; −inf where it is no negative of the row. In the full loss a target
  // is a column like others, and its score is the one that the sum holds: another product, rounded in another way,
  // would leave a row that its target decides with a loss and a gradient.
  int64_t score(int64_t c) {
    const int64_t height = std::min(kTileItems, loss_.columns - c), d = loss_.width;
    multiply<T>(height, kBlockRows, d, loss_.items + c * d, d, 1, packed(packed_.data(), d), tile_.data(), kBlockRows,
                Into::overwrite);
    if (!loss_.slots) {
      for (int64_t i = 0; i < count_; ++i)
        if (const int64_t u = target(i) - c; u >= 0 && u < height) target_score_[i] = tile_.data()[u * kBlockRows + i];
      return height;
    }
    const int64_t sequence = loss_.places - 1;
    for (int64_t i = 0, end; i < count_; i = end) {
      const int64_t b = row(i) / sequence;
      for (end = i + 1; end < count_ && row(end) / sequence == b; ++end) {
      }
      for (int64_t p = 0; p < loss_.places; ++p) {
        const int64_t u = loss_.slots[b * loss_.places + p] - c;
        if (u >= 0 && u < height)
          std::fill(tile_.data() + u * kBlockRows + i, tile_.data() + u * kBlockRows + end,
                    -std::numeric_limits<T>::infinity());
      }
    }
    return height;
  }

  const SoftmaxLoss<T>& loss_;
  Buffer<T> users_, packed_, tile_, grad_;
  T target_score_[kBlockRows];
  int64_t first_ = 0, count_ = 0;
};

template <class T>
int64_t blocks_of(const SoftmaxLoss<T>& loss) {
  return (static_cast<int64_t>(loss.rows.size()) + kBlockRows - 1) / kBlockRows;
}

}  // namespace

template <class T>
T softmax_loss(const SoftmaxLoss<T>& loss, T* lse) {
  const int64_t blocks = blocks_of(loss), workers = workers_for(blocks);
  std::vector<SoftmaxBlock<T>> own;
  for (int64_t w = 0; w < workers; ++w) own.emplace_back(loss);
  std::vector<double> sums(static_cast<size_t>(blocks));
  run_tasks(workers, blocks, [&](int64_t w, int64_t b) {
    own[static_cast<size_t>(w)].start(b);
    sums[static_cast<size_t>(b)] = own[static_cast<size_t>(w)].forward(lse);
  });
  double total = 0;
  for (const double sum : sums) total += sum;
  return static_cast<T>(total / static_cast<double>(std::max<size_t>(1, loss.rows.size())));
}

template <class T>
void softmax_loss_backward(const SoftmaxLoss<T>& loss, T grad, const T* lse, T* grad_users, T* grad_items) {
  const int64_t blocks = blocks_of(loss), workers = workers_for(blocks);
  std::vector<SoftmaxBlock<T>> own;
  for (int64_t w = 0; w < workers; ++w) own.emplace_back(loss);
  Turns turns(blocks);
  if (blocks == 0) std::fill_n(grad_items, loss.columns * loss.width, T(0));
  const T scale = grad / static_cast<T>(std::max<size_t>(1, loss.rows.size()));
  run_tasks(workers, blocks, [&](int64_t w, int64_t b) {
    turns.guard([&] {
      own[static_cast<size_t>(w)].start(b);
      own[static_cast<size_t>(w)].backward(b, scale, lse, turns, grad_users, grad_items);
    });
  });
}

template float softmax_loss<float>(const SoftmaxLoss<float>&, float*);
template double softmax_loss<double>(const SoftmaxLoss<double>&, double*);
template void softmax_loss_backward<float>(const SoftmaxLoss<float>&, float, const float*, float*, float*);
template void softmax_loss_backward<double>(const SoftmaxLoss<double>&, double, const double*, double*, double*);

}  // namespace crossan_fast
