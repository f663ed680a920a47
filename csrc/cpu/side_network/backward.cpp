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
        row_(padded<T>(s_.levels * s_.rank + s_.embedding)),
        z_(block * s_.rank),
        slope_(block * s_.rank),
        a_(block * row_) {
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      dz_.emplace_back(block * row_);
      x_.emplace_back(block * stride(t));
    }
    for (size_t p = 0; p < plan.cross_down.size(); ++p) {
      low_.emplace_back(block * s_.rank);
      d_low_.emplace_back(block * s_.rank);
    }
    for (size_t m = 0; m < s_.widths.size(); ++m)
      for (const auto& c : plan.incoming[m])
        if (c.projection >= 0) {
          d_down_.push_back({Buffer<T>(s_.rank * s_.widths[c.from]), s_.rank * s_.widths[c.from]});
          d_up_.push_back({Buffer<T>(s_.widths[m] * s_.rank), s_.widths[m] * s_.rank});
        }
    dots_.assign(s_.towers.size(), std::vector<GateDots<T>>(static_cast<size_t>(s_.levels)));
    projected_dots_ = sums.cross;
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
                        dx, stride(t), Into::overwrite);
      products_.weigh(count_, columns, s_.rank, dz(t, l), row_, weighed_.down[t], {l, 0, slice.first}, dx, stride(t),
                      Into::add, nullptr, last ? T(1) : plan_.keeps(t, l + 1));
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

  // u of the level in a slice, where x_ holds that of the level before, and its products with dz.
  void up_to(int64_t l, Slice slice) {
    inputs_.read(l, first_, count_, slice);
    for (int64_t i = 0; i < count_; ++i)
      for (size_t t = 0; t < s_.towers.size(); ++t) {
        T* u = x_[t].data() + i * stride(t);
        if (const int64_t columns = slice.of(width(t)))
          mix<T>(columns, l > 0 ? u : nullptr, plan_.keeps(t, l), inputs_.terms(t), inputs_.rows(t, i),
                 inputs_.weights(t), u);
      }
    const bool last = l + 1 == s_.levels;
    inputs_.announce(products_.ahead, last ? l : l + 1, first_, count_, last ? plan_.after(slice) : slice);
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      inputs_.add_projected(t, x_[t].data(), [&](int p) { return low_[p].data(); });
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
    if (plan_.cross_down.empty() && plan_.narrowing[t] < 0) return;
    inputs_.project(t, [&](int p) { return low_[p].data(); });
    projected_back(t, l, x_[t].data());
    narrowed_back(t, l, x_[t].data());
  }

  // Gradients of T and its gate where widths differ; x = … + low up, low = gate · s down.
  void projected_back(size_t t, int64_t l, const T* dx) {
    if (s_.towers[t].second >= 0) return;
    const int64_t rank = s_.rank;
    for (const auto& c : plan_.incoming[t]) {
      if (c.projection < 0) continue;
      const Into into = l + 1 < s_.levels ? Into::add : Into::overwrite;
      const int64_t from = s_.widths[c.from];
      const RightSide<T> rows = plain(inputs_.matrix(c.from), padded<T>(from));
      T* d_low = d_low_[c.projection].data();
      multiply<T>(width(t), rank, count_, dx, 1, stride(t), plain(low_[c.projection].data(), rank),
                  d_up_[c.projection].first.data(), rank, into);
      multiply<T>(count_, rank, width(t), dx, stride(t), 1, plain(plan_.weights.cross_up[c.projection], rank), d_low,
                  rank, Into::overwrite);
      // ⟨d_low, s down⟩ with s down computed anew: dividing `low` by a gate near zero would lose it.
      multiply<T>(count_, rank, from, rows.data, rows.row, 1, plan_.cross_down[c.projection][0], z_.data(), rank,
                  Into::overwrite);
      projected_dots_[static_cast<size_t>(c.pair)][l] = static_cast<double>(dot(count_ * rank, d_low, z_.data()));
      for (int64_t i = 0; i < count_ * rank; ++i) d_low[i] *= c.gate[l];
      multiply<T>(rank, from, count_, d_low, 1, rank, rows, d_down_[c.projection].first.data(), from, into);
    }
  }

  void narrowed_back(size_t t, int64_t l, const T* dx) {
    const int which = plan_.narrowing[t];
    if (which < 0) return;
    const int wide = s_.wide(s_.towers[t]);
    const int64_t own = width(t), from = s_.widths[wide];
    const T weight = wide == s_.towers[t].first ? plan_.mu[t][l] : T(1) - plan_.mu[t][l];
    for (int64_t i = 0; i < count_; ++i)  // the narrowed rows have served their turn; the gradient takes their place
      mix<T>(own, dx + i * stride(t), weight, 0, nullptr, nullptr, inputs_.narrowed(t) + i * stride(t));
    plan_.zero_absent({wide, -1}, first_, count_, inputs_.narrowed(t), stride(t), own);
    turns_.wait(block_, step_);
    multiply<T>(own, from, count_, inputs_.narrowed(t), 1, stride(t), plain(inputs_.matrix(wide), padded<T>(from)),
                grads_.pair_weight[which] + l * own * from, from, first_into());
    sum_rows(count_, own, inputs_.narrowed(t), stride(t), block_ > 0, grads_.pair_bias[which] + l * own);
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
          sums_.cross[c.pair][l] +=
              c.projection < 0 ? dots.sum(term++) : projected_dots_[static_cast<size_t>(c.pair)][l];
      }
    for (size_t p = 0; p < d_down_.size(); ++p) {
      add_shared(d_down_[p], grads_.cross_down[p]);
      add_shared(d_up_[p], grads_.cross_up[p]);
    }
    turns_.pass(block_, step_++);
  }

  void add_shared(const std::pair<Buffer<T>, int64_t>& sum, T* to) const {
    const T* from = sum.first.data();
    for (int64_t i = 0; i < sum.second; ++i) to[i] = block_ > 0 ? to[i] + from[i] : from[i];
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
  int64_t row_;
  Buffer<T> z_, slope_, a_;             // [block, r] or less; a of one tower [block, L·r], in rows of row_
  std::vector<Buffer<T>> dz_;           // per tower [block, L·r + d]
  std::vector<Buffer<T>> x_;            // per tower [block, slice]: dx, then u
  std::vector<Buffer<T>> low_, d_low_;  // per projected pair [block, rank]
  std::vector<std::pair<Buffer<T>, int64_t>> d_down_, d_up_;  // likewise, the block's gradients and their sizes
  std::vector<std::vector<GateDots<T>>> dots_;                // [tower][level]
  typename Sums<T>::PerLevel projected_dots_;                 // as Sums::cross, of the pairs of unequal widths
  int64_t block_ = 0, first_ = 0, count_ = 0, step_ = 0;
};

}  // namespace

template <class T>
void backward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights, const Kept& in,
              const T* products, const Weights<T*>& grads) {
  if (structure.cross == Cross::side) return coupled::backward(structure, inputs, weights, in, grads);
  Tasks tasks;
  const Plan<T> plan(tasks, structure, inputs, weights, in.type);
  Sums<T> sums(structure, grads);
  {
    const Weighed<T> weighed{plan.across(tasks, weights.down_weight, structure.levels, structure.rank, As::plain),
                             plan.across(tasks, weights.head_weight, 1, structure.embedding, As::plain),
                             backward_links(tasks, plan, products)};
    tasks.run();
    const Blocks blocks(structure.items, kBlock);
    Turns turns(blocks.count);
    const int64_t workers = workers_for(blocks.count);
    std::vector<std::unique_ptr<BackwardWalk<T>>> walks;
    for (int64_t w = 0; w < workers; ++w)
      walks.push_back(std::make_unique<BackwardWalk<T>>(plan, weighed, sums, turns, blocks.size));
    run_tasks(workers, blocks.count, [&](int64_t w, int64_t b) {
      walks[static_cast<size_t>(w)]->run(b, blocks.first(b), blocks.length(b), in);
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
