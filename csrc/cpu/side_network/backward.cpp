// The backward of side_network, from the bottlenecks' pre-activations z alone.
//
// A block first goes back through the activations: dz_p = act'(z_p) · Σ_{l>p} G_lpᵀ dz_l, with dz_L the gradient of e.
// Its sums Σ dz_l a_pᵀ, r × r, become what W_up and the links need once a call (sums.h). Then a slice of D at a time it
// goes down the levels with dx, which the gates' gradients alone need,
//
//     dx_l = W_lᵀ dz_l + κ_{l+1,l} dx_{l+1},
//
// and up again with u, to add Σ dz_l u_lᵀ to the gradient of W_l.
//
// Weight gradients are added step by step in the order of blocks (`Turns`), so no thread holds a copy of them but of
// what all levels share.
#include <memory>

#include "cpu/turns.h"
#include "level_inputs.h"
#include "links.h"
#include "other_widths.h"
#include "side_network.h"
#include "sums.h"

namespace crossan_fast::side_network {
namespace {

// W_l as it stands, and the links.
template <class T>
struct Weighed {
  std::vector<LevelWeights<T>> down, head;          // per tower
  std::vector<std::vector<LevelWeights<T>>> links;  // per tower and p
};

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
        slice_(plan.slice(block)),
        inputs_(plan, block, slice_),
        products_(plan.in_pairs),
        other_widths_(plan, sums.grads, block),
        row_(padded<T>(s_.levels * s_.rank + s_.embedding)),
        z_(block * s_.rank),
        slope_(block * s_.rank),
        a_(block * row_) {
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      dz_.emplace_back(block * row_);
      x_.emplace_back(block * stride(t));
    }
    dots_.assign(s_.towers.size(), std::vector<GateDots<T>>(static_cast<size_t>(s_.levels)));
  }

  void run(int64_t block, int64_t first, int64_t count, const Kept& in) {
    block_ = block;
    first_ = first;
    count_ = count;
    step_ = 0;
    for (size_t t = 0; t < s_.towers.size(); ++t) through_activations(t, in);
    for (auto& levels : dots_)
      for (auto& dots : levels) dots.clear();
    for (int64_t d = 0; d < plan_.widest; d += slice_) {
      const Slice slice{d, std::min(slice_, plan_.widest - d)};
      for (int64_t l = s_.levels; l-- > 0;) down_to(l, slice);
      for (int64_t l = 0; l < s_.levels; ++l) up_to(l, slice);
      for (size_t t = 0; t < s_.towers.size(); ++t) add_weight(t, s_.levels, slice);
    }
    products_.end();
    add_gates_and_shared();
  }

 private:
  int64_t width(size_t t) const { return s_.width(s_.towers[t]); }
  int64_t stride(size_t t) const { return padded<T>(std::min(slice_, width(t))); }
  Into first_into() const { return block_ > 0 ? Into::add : Into::overwrite; }
  T* dz(size_t t, int64_t l) const { return dz_[t].data() + l * s_.rank; }

  // dz of all levels from the gradient of e, and the sums of its products with a.
  void through_activations(size_t t, const Kept& in) {
    const int64_t rank = s_.rank, levels = s_.levels;
    for (int64_t i = 0; i < count_; ++i)
      convert_from(in.type, in.embedding(s_, first_ + i, t), dz(t, levels) + i * row_, s_.embedding, T(1));
    plan_.zero_absent(s_.towers[t], first_, count_, dz(t, levels), row_, s_.embedding);
    std::vector<double> bottleneck(static_cast<size_t>(levels));
    for (int64_t p = levels; p-- > 0;) {
      products_.weigh(count_, rank, (levels - 1 - p) * rank + s_.embedding, dz(t, p + 1), row_, weighed_.links[t][p],
                      {0}, dz(t, p), row_, Into::overwrite);
      for (int64_t i = 0; i < count_; ++i) bottleneck[p] += back(t, p, i, in);
    }

    turns_.wait(block_, step_);
    for (int64_t l = 0; l <= levels; ++l) {
      const int64_t rows = l < levels ? rank : s_.embedding;
      if (l > 0)
        products_.correlate(rows, l * rank, count_, dz(t, l), row_, a_.data(), row_, sums_.products[t][l], l * rank,
                            first_into());
      sum_rows(count_, rows, dz(t, l), row_, block_ > 0,
               l < levels ? grads_.down_bias[t] + l * rank : grads_.head_bias[t]);
      if (l < levels) sums_.bottleneck[t][l] += bottleneck[l];
    }
    turns_.pass(block_, step_++);
  }

  // Of one item: a, dz from da where it stands, and ⟨da, a⟩ − ⟨dz, z⟩.
  double back(size_t t, int64_t p, int64_t i, const Kept& in) {
    const int64_t rank = s_.rank;
    T *z = z_.data(), *slope = slope_.data(), *a = a_.data() + i * row_ + p * rank, *da = dz(t, p) + i * row_;
    convert_from(in.type, in.bottleneck(s_, first_ + i, t, p), z, rank, T(1));
    activate_both(s_.activation(), rank, z, a, slope);
    for (int64_t k = 0; k < rank; ++k) z[k] = a[k] - slope[k] * z[k];
    const double sum = static_cast<double>(dot(rank, da, z));
    for (int64_t k = 0; k < rank; ++k) da[k] *= slope[k];
    return sum;
  }

  // dx of the level in a slice, where x_ holds that of the level above, and what the gates' gradients take of it.
  void down_to(int64_t l, Slice slice) {
    inputs_.announce(products_.ahead, l, first_, count_, slice);
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      const int64_t columns = slice.of(width(t));
      if (columns == 0) continue;
      T* dx = x_[t].data();
      const bool last = l + 1 == s_.levels;
      if (last)
        products_.weigh(count_, columns, s_.embedding, dz(t, s_.levels), row_, weighed_.head[t], {0, 0, slice.first},
                        dx, stride(t), Into::overwrite, nullptr, T(1), weighed_.down[t].soon({l, 0, slice.first}));
      products_.weigh(count_, columns, s_.rank, dz(t, l), row_, weighed_.down[t], {l, 0, slice.first}, dx, stride(t),
                      Into::add, nullptr, last ? T(1) : plan_.keeps(t, l + 1), after(t, l, slice));
    }
    inputs_.read(l, first_, count_, slice);
    // Item by item, so that its states serve every tower from L1.
    for (int64_t i = 0; i < count_; ++i)
      for (size_t t = 0; t < s_.towers.size(); ++t)
        if (const int64_t columns = slice.of(width(t)))
          dots_[t][static_cast<size_t>(l)].add(columns, x_[t].data() + i * stride(t), inputs_.terms(t),
                                               inputs_.rows(t, i));
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      dots_[t][static_cast<size_t>(l)].gather();
      input_back(t, l);
    }
  }

  // The weights that go back after tower t's of level l: u, which comes after level 0, wants none.
  RightSide<T> after(size_t t, int64_t l, Slice slice) const {
    if (++t == s_.towers.size()) {
      t = 0;
      --l;
    }
    if (l < 0 || slice.of(width(t)) == 0) return {};
    return l + 1 == s_.levels ? weighed_.head[t].soon({0, 0, slice.first}) : weighed_.down[t].soon({l, 0, slice.first});
  }

  // u of the level in a slice, where x_ holds that of the level before, and its products with dz.
  void up_to(int64_t l, Slice slice) {
    inputs_.read(l, first_, count_, slice);
    inputs_.mix_rows(slice, [&](size_t t, int64_t i) {
      T* u = x_[t].data() + i * stride(t);
      return std::pair<const T*, T*>(l > 0 ? u : nullptr, u);
    });
    const bool last = l + 1 == s_.levels;
    inputs_.announce(products_.ahead, last ? l : l + 1, first_, count_, last ? plan_.after(slice) : slice);
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      inputs_.add_projected(t, x_[t].data(), [&](int p) { return other_widths_.low(p); });
      add_weight(t, l, slice);
    }
  }

  // Σ dz_l u_lᵀ into the gradient of W_l.
  void add_weight(size_t t, int64_t l, Slice slice) {
    const int64_t columns = slice.of(width(t)), rank = s_.rank;
    if (columns == 0) return;
    T* to = l < s_.levels ? grads_.down_weight[t] + l * rank * width(t) : grads_.head_weight[t];
    turns_.wait(block_, step_);
    products_.correlate(l < s_.levels ? rank : s_.embedding, columns, count_, dz(t, l), row_, x_[t].data(), stride(t),
                        to + slice.first, width(t), first_into());
    turns_.pass(block_, step_++);
  }

  // What the inputs of other widths get from dx: their slice is all of D.
  void input_back(size_t t, int64_t l) {
    if (!other_widths_.any()) return;
    inputs_.project(t, [&](int p) { return other_widths_.low(p); });
    other_widths_.projected_back(inputs_, t, l, count_, x_[t].data(), stride(t));
    if (plan_.narrowing[t] < 0) return;
    turns_.wait(block_, step_);
    other_widths_.narrowed_back(inputs_, t, l, first_, count_, x_[t].data(), stride(t), block_ > 0);
    turns_.pass(block_, step_++);
  }

  // Sums that the levels or slices share are built per block, or those of two blocks would meet in any order.
  void add_gates_and_shared() {
    turns_.wait(block_, step_);
    for (size_t t = 0; t < s_.towers.size(); ++t)
      for (int64_t l = 0; l < s_.levels; ++l) {
        const GateDots<T>& dots = dots_[t][static_cast<size_t>(l)];
        const bool pair = s_.towers[t].second >= 0;
        sums_.mu[t][l] += dots.sum(0) - (pair ? dots.sum(1) : 0.0);
        if (pair) continue;
        int term = 1;
        for (const auto& c : plan_.incoming[t])
          sums_.cross[c.pair][l] += c.projection < 0 ? dots.sum(term++) : other_widths_.dot_of(c.pair, l);
      }
    other_widths_.add_shared(block_ > 0);
    turns_.pass(block_, step_++);
  }

  const Plan<T>& plan_;
  const Structure& s_;
  const Weighed<T>& weighed_;
  Sums<T>& sums_;
  const Weights<T*>& grads_;
  Turns& turns_;
  int64_t slice_;
  LevelInputs<T> inputs_;
  Products<T> products_;
  OtherWidths<T> other_widths_;
  int64_t row_;
  Buffer<T> z_, slope_, a_;                     // [block, r] or less; a of one tower [block, L·r], in rows of row_
  std::vector<Buffer<T>> dz_;                   // per tower [block, L·r + d]
  std::vector<Buffer<T>> x_;                    // per tower [block, slice]: dx, then u
  std::vector<std::vector<GateDots<T>>> dots_;  // [tower][level]
  int64_t block_ = 0, first_ = 0, count_ = 0, step_ = 0;
};

}  // namespace

template <class T>
void backward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights, const Kept& in,
              const T* columns, const Weights<T*>& grads) {
  if (structure.walks_with_h()) return coupled::backward(structure, inputs, weights, in, grads);
  Tasks tasks;
  const Plan<T> plan(tasks, structure, inputs, weights, in.type);
  Sums<T> sums(structure, grads);
  {
    const Weighed<T> weighed{plan.across(tasks, weights.down_weight, structure.levels, structure.rank, As::plain),
                             plan.across(tasks, weights.head_weight, 1, structure.embedding, As::plain),
                             backward_links(tasks, plan, columns)};
    tasks.run();
    const Blocks blocks(structure.items, kBlock);
    Turns turns(blocks.count);
    const int64_t workers = workers_for(blocks.count);
    std::vector<std::unique_ptr<BackwardWalk<T>>> walks;
    for (int64_t w = 0; w < workers; ++w)
      walks.push_back(std::make_unique<BackwardWalk<T>>(plan, weighed, sums, turns, blocks.size));
    run_tasks(workers, blocks.count, [&](int64_t w, int64_t b) {
      turns.guard([&] { walks[static_cast<size_t>(w)]->run(b, blocks.first(b), blocks.length(b), in); });
    });
  }  // the walks' memory is given back before W_up's gradients take theirs
  finish_weights(plan, sums);
  finish_gates(plan, sums);
}

template void backward<float>(const Structure&, const Inputs&, const Weights<const float*>&, const Kept&, const float*,
                              const Weights<float*>&);
template void backward<double>(const Structure&, const Inputs&, const Weights<const double*>&, const Kept&,
                               const double*, const Weights<double*>&);

}  // namespace crossan_fast::side_network
