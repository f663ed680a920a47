// The backward with h itself: see coupled.h.
#include <memory>

#include "coupled.h"
#include "cpu/turns.h"
#include "level_inputs.h"
#include "other_widths.h"
#include "sums.h"

namespace crossan_fast::side_network::coupled {
namespace {

template <class T>
class BackwardWalk {
 public:
  BackwardWalk(const Plan<T>& plan, const Weighed<T>& weighed, Sums<T>& sums, Turns& turns, int64_t block)
      : plan_(plan),
        s_(plan.structure),
        weighed_(weighed),
        sums_(sums),
        grads_(sums.grads),
        turns_(turns),
        inputs_(plan, block, plan.widest),
        products_(plan.in_pairs),
        other_widths_(plan, sums.grads, block),
        z_(block * s_.rank),
        slope_(block * s_.rank),
        level_step_(block * s_.rank),
        ge_(block * s_.embedding) {
    for (const Tower& tower : s_.towers) {
      const int64_t size = block * padded<T>(s_.width(tower));
      a_.emplace_back(s_.levels * level_step_);
      dz_.emplace_back(s_.levels * level_step_);
      g_.emplace_back(size);
      x_.emplace_back(size);
      next_.emplace_back(size);
      history_.emplace_back(s_.levels * size);
      history_step_.push_back(size);
    }
    before_.resize(s_.towers.size());
    dots_.assign(s_.towers.size(), std::vector<double>(s_.widths.size() + 2));
    weight_.resize(s_.widths.size() + 1);
    source_.resize(s_.widths.size() + 1);
  }

  void run(int64_t block, int64_t first, int64_t count, const Kept& in) {
    block_ = block;
    first_ = first;
    count_ = count;
    step_ = 0;
    in_ = &in;
    for (int64_t l = 0; l < s_.levels; ++l) recompute(l);
    for (size_t t = 0; t < s_.towers.size(); ++t) head_back(t);
    for (int64_t l = s_.levels; l-- > 0;) level_back(l);
    products_.end();
    turns_.wait(block_, step_);
    other_widths_.add_shared(block_ > 0);
    turns_.pass(block_, step_++);
  }

 private:
  // g = ge · W_head, and the head's own gradients, from the last h.
  void head_back(size_t t) {
    const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width), d = s_.embedding;
    for (int64_t i = 0; i < count_; ++i)
      convert_from(in_->type, in_->embedding(s_, first_ + i, t), ge_.data() + i * d, d, T(1));
    plan_.zero_absent(s_.towers[t], first_, count_, ge_.data(), d, d);
    products_.weigh(count_, width, d, ge_.data(), d, weighed_.head[t], {0}, g_[t].data(), row, Into::overwrite);
    turns_.wait(block_, step_);
    products_.correlate(d, width, count_, ge_.data(), d, history_[t].data() + (s_.levels - 1) * history_step_[t], row,
                        grads_.head_weight[t], width, first_into());
    sum_rows(count_, d, ge_.data(), d, block_ > 0, grads_.head_bias[t]);
    turns_.pass(block_, step_++);
  }

  // h of the towers before level l; null at the first, where it is zero.
  const std::vector<T*>& h_before(int64_t l) {
    for (size_t t = 0; t < before_.size(); ++t)
      before_[t] = l == 0 ? nullptr : history_[t].data() + (l - 1) * history_step_[t];
    return before_;
  }

  T* a(size_t t, int64_t l) const { return a_[t].data() + l * level_step_; }
  T* dz(size_t t, int64_t l) const { return dz_[t].data() + l * level_step_; }

  // z of a level of the block into z_, [count, r].
  void read_bottleneck(size_t t, int64_t l) {
    for (int64_t i = 0; i < count_; ++i)
      convert_from(in_->type, in_->bottleneck(s_, first_ + i, t, l), z_.data() + i * s_.rank, s_.rank, T(1));
  }

  // h before level l + 1, from h before level l.
  void recompute(int64_t l) {
    inputs_.read(l, first_, count_, {0, plan_.widest}, &h_before(l));
    inputs_.mix_rows({0, plan_.widest}, [&](size_t t, int64_t i) {
      const int64_t at = i * padded<T>(s_.width(s_.towers[t]));
      T* after = history_[t].data() + l * history_step_[t] + at;
      return std::pair<const T*, T*>(l == 0 ? nullptr : before_[t] + at, after);
    });
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width), rank = s_.rank;
      T* after = history_[t].data() + l * history_step_[t];
      inputs_.add_projected(t, after, [&](int p) { return other_widths_.low(p); });
      read_bottleneck(t, l);
      activate(s_.activation(), count_ * rank, z_.data(), a(t, l));
      products_.weigh(count_, width, rank, a(t, l), rank, weighed_.up[t], {l}, after, row, Into::add,
                      plan_.weights.up_bias[t] + l * width);
      plan_.zero_absent(s_.towers[t], first_, count_, after, row, width);
    }
  }

  void level_back(int64_t l) {
    for (size_t t = 0; t < s_.towers.size(); ++t) back_to_x(t, l);
    inputs_.read(l, first_, count_, {0, plan_.widest}, &h_before(l));
    for (auto& dots : dots_) std::fill(dots.begin(), dots.end(), 0.0);
    // Item by item, so that its states serve every tower from L1.
    for (int64_t i = 0; i < count_; ++i)
      for (size_t t = 0; t < s_.towers.size(); ++t) {
        const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width);
        T* g = g_[t].data() + i * row;
        mix_backward<T>(width, g, l == 0 ? nullptr : before_[t] + i * row, plan_.keeps(t, l), inputs_.terms(t),
                        inputs_.rows(t, i), inputs_.weights(t), x_[t].data() + i * row, dots_[t].data());
      }
    for (size_t t = 0; t < s_.towers.size(); ++t) add_input_grads(t, l);
    exchange(l);
  }

  Into first_into() const { return block_ > 0 ? Into::add : Into::overwrite; }

  void add_down_weight(size_t t, int64_t l) {
    const int64_t width = s_.width(s_.towers[t]), rank = s_.rank;
    products_.correlate(rank, width, count_, dz(t, l), rank, x_[t].data(), padded<T>(width),
                        grads_.down_weight[t] + l * rank * width, width, first_into());
  }

  // g: from the gradient of tower t's h to that of its x.
  void back_to_x(size_t t, int64_t l) {
    const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width), rank = s_.rank;
    T* g = g_[t].data();
    T* dz = this->dz(t, l);
    T* a = this->a(t, l);
    products_.weigh(count_, rank, width, g, row, weighed_.up_plain[t], {l}, dz, rank, Into::overwrite);
    read_bottleneck(t, l);
    activate_both(s_.activation(), count_ * rank, z_.data(), a, slope_.data());
    const double bottleneck = bottleneck_back(dz, a);

    turns_.wait(block_, step_);
    products_.correlate(width, rank, count_, g, row, a, rank, grads_.up_weight[t] + l * width * rank, rank,
                        first_into());
    sum_rows(count_, width, g, row, block_ > 0, grads_.up_bias[t] + l * width);
    sum_rows(count_, rank, dz, rank, block_ > 0, grads_.down_bias[t] + l * rank);
    sums_.bottleneck[t][l] += bottleneck;
    turns_.pass(block_, step_++);

    products_.weigh(count_, width, rank, dz, rank, weighed_.down[t], {l}, g, row, Into::add);
  }

  // dz from da, and the sum over items of ⟨da, a⟩ − ⟨dz, z⟩.
  double bottleneck_back(T* dz, const T* a) {
    T* z = z_.data();
    const T* slope = slope_.data();
    const int64_t size = count_ * s_.rank;
    for (int64_t k = 0; k < size; ++k) z[k] = a[k] - slope[k] * z[k];
    double sum = 0;
    for (int64_t k = 0; k < size; k += s_.rank) sum += static_cast<double>(dot(s_.rank, dz + k, z + k));
    for (int64_t k = 0; k < size; ++k) dz[k] *= slope[k];
    return sum;
  }

  // Everything that takes x or its gradient g.
  void add_input_grads(size_t t, int64_t l) {
    const Tower& tower = s_.towers[t];
    const int64_t row = padded<T>(s_.width(tower));
    const int terms = inputs_.terms(t);
    T* g = g_[t].data();
    inputs_.add_projected(t, x_[t].data(), [&](int p) { return other_widths_.low(p); });
    other_widths_.projected_back(inputs_, t, l, count_, g, row);

    turns_.wait(block_, step_);
    add_down_weight(t, l);
    sums_.mu[t][l] += dots_[t][0] - (tower.second >= 0 ? dots_[t][1] : dots_[t][terms]);
    if (tower.second < 0)
      for (int j = 1; j < terms; ++j) sums_.cross[inputs_.pair(t, j)][l] += dots_[t][j];
    for (const auto& c : plan_.incoming[t])
      if (c.projection >= 0) sums_.cross[c.pair][l] += other_widths_.dot_of(c.pair, l);
    other_widths_.narrowed_back(inputs_, t, l, first_, count_, g, row, block_ > 0);
    turns_.pass(block_, step_++);
  }

  // What each tower's h before level l gets from its x; with cross = side from all towers' x.
  void exchange(int64_t l) {
    if (l == 0) return;  // h before it is zero
    const size_t modalities = s_.cross == Cross::side ? s_.widths.size() : 0;
    for (size_t n = 0; n < s_.towers.size(); ++n) {
      if (s_.towers[n].second >= 0) continue;  // keeps all of h
      const int64_t width = s_.width(s_.towers[n]), row = padded<T>(width);
      for (int64_t i = 0; i < count_; ++i) {
        int terms = 0;
        for (size_t m = 0; m < modalities; ++m)
          for (const auto& c : plan_.incoming[m])
            if (c.from == static_cast<int>(n) && c.projection < 0) {
              weight_[terms] = c.gate[l];
              source_[terms++] = g_[m].data() + i * row;
            }
        mix<T>(width, g_[n].data() + i * row, plan_.keeps(n, l), terms, source_.data(), weight_.data(),
               next_[n].data() + i * row);
      }
      for (size_t m = 0; m < modalities; ++m)
        for (const auto& c : plan_.incoming[m])
          if (c.from == static_cast<int>(n) && c.projection >= 0)
            multiply<T>(count_, width, s_.rank, other_widths_.d_low(c.projection), s_.rank, 1,
                        plain(plan_.weights.cross_down[c.projection], width), next_[n].data(), row, Into::add);
      plan_.zero_absent(s_.towers[n], first_, count_, next_[n].data(), row, width);
    }
    for (size_t n = 0; n < s_.towers.size(); ++n)
      if (s_.towers[n].second < 0) std::swap(g_[n], next_[n]);
  }

  const Plan<T>& plan_;
  const Structure& s_;
  const Weighed<T>& weighed_;
  Sums<T>& sums_;
  const Weights<T*>& grads_;
  Turns& turns_;
  LevelInputs<T> inputs_;
  Products<T> products_;
  OtherWidths<T> other_widths_;
  Buffer<T> z_, slope_;  // [block, r]
  int64_t level_step_;
  Buffer<T> ge_;                    // [block, d]
  std::vector<Buffer<T>> a_, dz_;   // per tower [L][block, r]
  std::vector<Buffer<T>> g_, x_;    // per tower [block, D]: the gradient of its h, then of its x; x
  std::vector<Buffer<T>> next_;     // likewise, the gradient of h of the level before
  std::vector<Buffer<T>> history_;  // per tower [L][block, D]: h after each level
  std::vector<int64_t> history_step_;
  std::vector<T*> before_;
  std::vector<std::vector<double>> dots_;  // per tower: ⟨g, row⟩ of its terms, then of h
  std::vector<T> weight_;
  std::vector<const T*> source_;
  const Kept* in_ = nullptr;
  int64_t block_ = 0, first_ = 0, count_ = 0, step_ = 0;
};

}  // namespace

template <class T>
void backward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights, const Kept& in,
              const Weights<T*>& grads) {
  Tasks tasks;
  const Plan<T> plan(tasks, structure, inputs, weights, in.type);
  const Weighed<T> weighed(tasks, plan, true);
  tasks.run();
  Sums<T> sums(structure, grads);
  const Blocks blocks(structure.items, kItems);
  Turns turns(blocks.count);
  const int64_t workers = workers_for(blocks.count);
  std::vector<std::unique_ptr<BackwardWalk<T>>> walks;
  for (int64_t w = 0; w < workers; ++w)
    walks.push_back(std::make_unique<BackwardWalk<T>>(plan, weighed, sums, turns, blocks.size));
  run_tasks(workers, blocks.count, [&](int64_t w, int64_t b) {
    turns.guard([&] { walks[static_cast<size_t>(w)]->run(b, blocks.first(b), blocks.length(b), in); });
  });
  finish_gates(plan, sums);
}

template void backward(const Structure&, const Inputs&, const Weights<const float*>&, const Kept&,
                       const Weights<float*>&);
template void backward(const Structure&, const Inputs&, const Weights<const double*>&, const Kept&,
                       const Weights<double*>&);

}  // namespace crossan_fast::side_network::coupled
