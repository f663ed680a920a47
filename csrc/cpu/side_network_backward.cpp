// The backward of side_network, from the bottlenecks' pre-activations z alone.
//
// A block first walks forward again without the down-projections, keeping h before each level; then back, where a
// level's x is the same weighted sum of h and states. Weight gradients are added level by level in the order of
// blocks (`Turns`), so no thread holds a copy of them.
#include <memory>

#include "side_network.h"
#include "side_network_walk.h"
#include "turns.h"

namespace crossan_fast::side {
namespace {

// Sums of the gates' gradients over items, in double: [tower or pair][level].
struct GateSums {
  std::vector<std::vector<double>> mu, cross;
};

template <class T>
class BackwardWalk {
 public:
  BackwardWalk(const Plan<T>& plan, const Weights<T*>& grads, GateSums& gates, Turns& turns, int64_t block)
      : plan_(plan),
        s_(plan.structure),
        grads_(grads),
        gates_(gates),
        turns_(turns),
        states_(plan, block),
        z_(block * s_.rank),
        a_(block * s_.rank),
        dz_(block * s_.rank),
        x_(block * padded<T>(plan.widest)),
        narrow_(plan.pair_weight.empty() ? 0 : block * padded<T>(plan.widest)) {
    for (const Tower& tower : s_.towers) {
      const int64_t size = block * padded<T>(s_.width(tower));
      g_.emplace_back(size);
      if (s_.cross == Cross::side) next_.emplace_back(size);
      history_.emplace_back((s_.levels - 1) * size);
      history_step_.push_back(size);
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
    weight_.resize(s_.widths.size() + 1);
    source_.resize(s_.widths.size() + 1);
    pair_.resize(s_.widths.size() + 1);
    dots_.resize(s_.widths.size() + 2);
  }

  void run(int64_t block, int64_t first, int64_t count, const Tensors& grad_outputs, const Tensors& saved) {
    block_ = block;
    first_ = first;
    count_ = count;
    step_ = 0;
    saved_ = &saved;
    for (int64_t l = 0; l + 1 < s_.levels; ++l) recompute(l);
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width);
      for (int64_t i = 0; i < count; ++i)
        convert_from(grad_outputs.type,
                     static_cast<const char*>(grad_outputs.data[t]) +
                         (first + i) * width * bytes_of(grad_outputs.type),
                     g_[t].data() + i * row, width, T(1));
      plan_.zero_absent(s_.towers[t], first, count, g_[t].data(), row, width);
    }
    for (int64_t l = s_.levels; l-- > 0;) {
      states_.read(l, first, count);
      for (size_t t = 0; t < s_.towers.size(); ++t) level_back(t, l);
      if (s_.cross == Cross::side) exchange(l);
    }
    if (d_down_.empty()) return;
    turns_.wait(block_, step_);
    for (size_t p = 0; p < d_down_.size(); ++p) {
      add_shared(d_down_[p], grads_.cross_down[p]);
      add_shared(d_up_[p], grads_.cross_up[p]);
    }
    turns_.pass(block_, step_++);
  }

 private:
  // h of a tower before level l; null at the first, where it is zero.
  T* h_before(size_t t, int64_t l) { return l == 0 ? nullptr : history_[t].data() + (l - 1) * history_step_[t]; }

  const T* cross_rows(int from, int64_t l, int64_t i) {  // s[n, l] of one item; the caller has l > 0 for `side`
    if (s_.cross == Cross::side) return h_before(from, l) + i * padded<T>(s_.widths[from]);
    return states_.row(from, i);
  }
  const T* cross_matrix(int from, int64_t l) {
    return s_.cross == Cross::side ? h_before(from, l) : states_.matrix(from);
  }

  void read_bottleneck(size_t t, int64_t l) {
    for (int64_t i = 0; i < count_; ++i)
      convert_from(saved_->type,
                   static_cast<const char*>(saved_->data[t]) +
                       ((first_ + i) * s_.levels + l) * s_.rank * bytes_of(saved_->type),
                   z_.data() + i * s_.rank, s_.rank, T(1));
    activate(s_.activation, count_ * s_.rank, z_.data(), a_.data());
  }

  // The terms of x that are plain rows: fills weight_ and pair_ for a level, source_ for an item.
  int list_terms(size_t t, int64_t l) {
    const Tower& tower = s_.towers[t];
    const T mu = plan_.mu[t][l];
    weight_[0] = mu;
    if (tower.second >= 0) {
      weight_[1] = T(1) - mu;
      return 2;
    }
    int terms = 1;
    if (crosses(l))
      for (const auto& c : plan_.incoming[t])
        if (c.projection < 0) {
          weight_[terms] = c.gate[l];
          pair_[terms++] = c.pair;
        }
    return terms;
  }
  bool crosses(int64_t l) const { return s_.cross == Cross::backbone || l > 0; }

  void point_terms(size_t t, int64_t l, int64_t i) {
    const Tower& tower = s_.towers[t];
    if (tower.second >= 0) {
      const int wide = plan_.narrowing[t] < 0 ? -1 : s_.wide(tower);
      const int64_t row = padded<T>(s_.width(tower));
      source_[0] = tower.first == wide ? narrow_.data() + i * row : states_.row(tower.first, i);
      source_[1] = tower.second == wide ? narrow_.data() + i * row : states_.row(tower.second, i);
      return;
    }
    source_[0] = states_.row(tower.first, i);
    int terms = 1;
    if (crosses(l))
      for (const auto& c : plan_.incoming[t])
        if (c.projection < 0) source_[terms++] = cross_rows(c.from, l, i);
  }

  // The terms of x that are products: `low` ← gate · s down, kept for the gradients; x += low up.
  void add_projected(size_t t, int64_t l, T* x, int64_t row) {
    if (s_.towers[t].second >= 0 || !crosses(l)) return;
    const int64_t width = s_.width(s_.towers[t]);
    for (const auto& c : plan_.incoming[t]) {
      if (c.projection < 0) continue;
      const int64_t from = s_.widths[c.from];
      T* low = low_[c.projection].data();
      multiply<T>(count_, s_.rank, from, cross_matrix(c.from, l), padded<T>(from), 1,
                  plan_.cross_down[c.projection][0], low, s_.rank, Into::overwrite);
      for (int64_t i = 0; i < count_ * s_.rank; ++i) low[i] *= c.gate[l];
      multiply<T>(count_, width, s_.rank, low, s_.rank, 1, plan_.cross_up[c.projection][0], x, row, Into::add);
    }
  }

  void narrow(size_t t, int64_t l) {
    const int which = plan_.narrowing[t];
    if (which < 0) return;
    const int wide = s_.wide(s_.towers[t]);
    const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width);
    multiply<T>(count_, width, s_.widths[wide], states_.matrix(wide), padded<T>(s_.widths[wide]), 1,
                plan_.pair_weight[which][l], narrow_.data(), row, Into::overwrite,
                plan_.weights.pair_bias[which] + l * width);
    plan_.zero_absent({wide, -1}, first_, count_, narrow_.data(), row, width);
  }

  T keeps(size_t t, int64_t l) const { return s_.towers[t].second >= 0 ? T(1) : T(1) - plan_.mu[t][l]; }

  // h before level l + 1, from h before level l.
  void recompute(int64_t l) {
    states_.read(l, first_, count_);
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      const Tower& tower = s_.towers[t];
      const int64_t width = s_.width(tower), row = padded<T>(width);
      const T* h = h_before(t, l);
      T* after = h_before(t, l + 1);
      narrow(t, l);
      const int terms = list_terms(t, l);
      for (int64_t i = 0; i < count_; ++i) {
        point_terms(t, l, i);
        mix<T>(width, h ? h + i * row : nullptr, keeps(t, l), terms, source_.data(), weight_.data(),
               after + i * row);
      }
      add_projected(t, l, after, row);
      read_bottleneck(t, l);
      multiply<T>(count_, width, s_.rank, a_.data(), s_.rank, 1, plan_.up[t][l], after, row, Into::add,
                  plan_.weights.up_bias[t] + l * width);
      plan_.zero_absent(tower, first_, count_, after, row, width);
    }
  }

  void level_back(size_t t, int64_t l) {
    const Tower& tower = s_.towers[t];
    const int64_t width = s_.width(tower), row = padded<T>(width), rank = s_.rank;
    const bool add = block_ > 0;
    const Into into = add ? Into::add : Into::overwrite;
    T* g = g_[t].data();
    read_bottleneck(t, l);
    multiply<T>(count_, rank, width, g, row, 1, plain(plan_.weights.up_weight[t] + l * width * rank, rank),
                dz_.data(), rank, Into::overwrite);
    activate_backward(s_.activation, count_ * rank, z_.data(), dz_.data());

    turns_.wait(block_, step_);
    multiply<T>(width, rank, count_, g, 1, row, plain(a_.data(), rank), grads_.up_weight[t] + l * width * rank, rank,
                into);
    sum_rows(count_, width, g, row, add, grads_.up_bias[t] + l * width);
    sum_rows(count_, rank, dz_.data(), rank, add, grads_.down_bias[t] + l * rank);
    turns_.pass(block_, step_++);

    multiply<T>(count_, width, rank, dz_.data(), rank, 1,
                plain(plan_.weights.down_weight[t] + l * rank * width, width), g, row, Into::add);
    // g is the gradient of x from here on.
    narrow(t, l);
    const int terms = list_terms(t, l);
    const bool shared = s_.cross == Cross::side || plan_.narrowing[t] >= 0 || !plan_.cross_down.empty();
    const T scale = shared ? T(1) : keeps(t, l);
    std::fill(dots_.begin(), dots_.end(), 0.0);
    const T* h = h_before(t, l);
    for (int64_t i = 0; i < count_; ++i) {
      point_terms(t, l, i);
      mix_backward<T>(width, g + i * row, scale, h ? h + i * row : nullptr, keeps(t, l), terms, source_.data(),
                      weight_.data(), x_.data() + i * row, dots_.data());
    }
    add_projected(t, l, x_.data(), row);

    turns_.wait(block_, step_);
    multiply<T>(rank, width, count_, dz_.data(), 1, rank, plain(x_.data(), row),
                grads_.down_weight[t] + l * rank * width, width, into);
    gates_.mu[t][l] += tower.second >= 0 ? dots_[0] - dots_[1] : dots_[0] - dots_[terms];
    if (tower.second < 0)
      for (int j = 1; j < terms; ++j) gates_.cross[pair_[j]][l] += dots_[j];
    if (shared) {
      projected_back(t, l, g, row);
      narrowed_back(t, l, g, row);
    }
    turns_.pass(block_, step_++);
    if (shared && s_.cross != Cross::side && tower.second < 0) {
      const T keep = keeps(t, l);
      for (int64_t i = 0; i < count_ * row; ++i) g[i] *= keep;
    }
  }

  // Gradients of T and its gate where widths differ; x = … + low up, low = gate · s down.
  void projected_back(size_t t, int64_t l, const T* dx, int64_t row) {
    if (s_.towers[t].second >= 0) return;
    const int64_t width = s_.width(s_.towers[t]), rank = s_.rank;
    for (const auto& c : plan_.incoming[t]) {
      if (c.projection < 0) continue;
      const bool add = l + 1 < s_.levels;
      const int64_t from = s_.widths[c.from];
      T* d_up = d_up_[c.projection].first.data();
      T* d_down = d_down_[c.projection].first.data();
      if (!crosses(l)) {
        if (!add) {
          std::fill_n(d_up, width * rank, T(0));
          std::fill_n(d_down, rank * from, T(0));
        }
        continue;
      }
      const T* low = low_[c.projection].data();
      T* d_low = d_low_[c.projection].data();
      multiply<T>(width, rank, count_, dx, 1, row, plain(low, rank), d_up, rank, add ? Into::add : Into::overwrite);
      multiply<T>(count_, rank, width, dx, row, 1, plain(plan_.weights.cross_up[c.projection], rank), d_low, rank,
                  Into::overwrite);
      // ⟨d_low, s down⟩ with s down computed anew: dividing `low` by a gate near zero would lose it.
      multiply<T>(count_, rank, from, cross_matrix(c.from, l), padded<T>(from), 1,
                  plan_.cross_down[c.projection][0], z_.data(), rank, Into::overwrite);
      gates_.cross[c.pair][l] += static_cast<double>(dot(count_ * rank, d_low, z_.data()));
      for (int64_t i = 0; i < count_ * rank; ++i) d_low[i] *= c.gate[l];
      multiply<T>(rank, from, count_, d_low, 1, rank, plain(cross_matrix(c.from, l), padded<T>(from)), d_down, from,
                  add ? Into::add : Into::overwrite);
    }
  }

  void narrowed_back(size_t t, int64_t l, const T* dx, int64_t row) {
    const int which = plan_.narrowing[t];
    if (which < 0) return;
    const int wide = s_.wide(s_.towers[t]);
    const int64_t width = s_.width(s_.towers[t]), from = s_.widths[wide];
    const T weight = wide == s_.towers[t].first ? plan_.mu[t][l] : T(1) - plan_.mu[t][l];
    for (int64_t i = 0; i < count_; ++i)  // narrow_ has served its turn and takes the gradient
      mix<T>(width, dx + i * row, weight, 0, nullptr, nullptr, narrow_.data() + i * row);
    plan_.zero_absent({wide, -1}, first_, count_, narrow_.data(), row, width);
    const bool add = block_ > 0;
    multiply<T>(width, from, count_, narrow_.data(), 1, row, plain(states_.matrix(wide), padded<T>(from)),
                grads_.pair_weight[which] + l * width * from, from, add ? Into::add : Into::overwrite);
    sum_rows(count_, width, narrow_.data(), row, add, grads_.pair_bias[which] + l * width);
  }

  // Sums that the levels share are built per block, or the levels of two blocks would meet in any order.
  void add_shared(const std::pair<Buffer<T>, int64_t>& sum, T* to) const {
    const T* from = sum.first.data();
    for (int64_t i = 0; i < sum.second; ++i) to[i] = block_ > 0 ? to[i] + from[i] : from[i];
  }

  // cross = side: what each tower's h before level l gets from all towers' x.
  void exchange(int64_t l) {
    const size_t modalities = s_.widths.size();
    for (size_t n = 0; n < modalities; ++n) {
      const int64_t width = s_.widths[n], row = padded<T>(width);
      for (int64_t i = 0; i < count_; ++i) {
        int terms = 0;
        for (size_t m = 0; l > 0 && m < modalities; ++m)
          for (const auto& c : plan_.incoming[m])
            if (c.from == static_cast<int>(n) && c.projection < 0) {
              weight_[terms] = c.gate[l];
              source_[terms++] = g_[m].data() + i * row;
            }
        mix<T>(width, g_[n].data() + i * row, keeps(n, l), terms, source_.data(), weight_.data(),
               next_[n].data() + i * row);
      }
      for (size_t m = 0; l > 0 && m < modalities; ++m)
        for (const auto& c : plan_.incoming[m])
          if (c.from == static_cast<int>(n) && c.projection >= 0)
            multiply<T>(count_, width, s_.rank, d_low_[c.projection].data(), s_.rank, 1,
                        plain(plan_.weights.cross_down[c.projection], width), next_[n].data(), row, Into::add);
      plan_.zero_absent(s_.towers[n], first_, count_, next_[n].data(), row, width);
    }
    for (size_t n = 0; n < modalities; ++n) std::swap(g_[n], next_[n]);
  }

  const Plan<T>& plan_;
  const Structure& s_;
  const Weights<T*>& grads_;
  GateSums& gates_;
  Turns& turns_;
  BlockStates<T> states_;
  Buffer<T> z_, a_, dz_;         // [block, rank]
  Buffer<T> x_, narrow_;         // [block, D]
  std::vector<Buffer<T>> g_;     // per tower [block, D]: the gradient of its h, then of its x
  std::vector<Buffer<T>> next_;  // likewise, of the level before (cross = side)
  std::vector<Buffer<T>> history_;
  std::vector<int64_t> history_step_;
  std::vector<Buffer<T>> low_, d_low_;  // per projected pair [block, rank]
  std::vector<std::pair<Buffer<T>, int64_t>> d_down_, d_up_;  // likewise, the block's gradients and their sizes
  std::vector<T> weight_;
  std::vector<const T*> source_;
  std::vector<int> pair_;
  std::vector<double> dots_;
  const Tensors* saved_ = nullptr;
  int64_t block_ = 0, first_ = 0, count_ = 0, step_ = 0;
};

template <class T>
void finish_gates(const Plan<T>& plan, const GateSums& sums, const Weights<T*>& grads) {
  const Structure& s = plan.structure;
  for (size_t t = 0; t < s.towers.size(); ++t)
    for (int64_t l = 0; l < s.levels; ++l) {
      const double mu = 1.0 / (1.0 + std::exp(-static_cast<double>(plan.weights.gate[t][l]) / s.temperature));
      grads.gate[t][l] = static_cast<T>(sums.mu[t][l] * mu * (1 - mu) / s.temperature);
    }
  for (size_t p = 0; p < sums.cross.size(); ++p)
    for (int64_t l = 0; l < s.levels; ++l) {
      const double gate = std::tanh(static_cast<double>(plan.weights.cross_gate[p][l]));
      grads.cross_gate[p][l] = static_cast<T>(sums.cross[p][l] * (1 - gate * gate));
    }
}

}  // namespace

template <class T>
void backward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights,
              const Tensors& grad_outputs, const Tensors& saved, const Weights<T*>& grads) {
  const Blocks blocks(structure.items);
  const Plan<T> plan(structure, inputs, weights, true);
  const auto levels = static_cast<size_t>(structure.levels);
  GateSums gates{std::vector<std::vector<double>>(structure.towers.size(), std::vector<double>(levels)),
                 std::vector<std::vector<double>>(structure.cross_pairs().size(), std::vector<double>(levels))};
  Turns turns(blocks.count);
  const int64_t workers = workers_for(blocks.count);
  std::vector<std::unique_ptr<BackwardWalk<T>>> walks;
  for (int64_t w = 0; w < workers; ++w)
    walks.push_back(std::make_unique<BackwardWalk<T>>(plan, grads, gates, turns, blocks.size));
  run_tasks(workers, blocks.count, [&](int64_t w, int64_t b) {
    walks[static_cast<size_t>(w)]->run(b, blocks.first(b), blocks.length(b), grad_outputs, saved);
  });
  finish_gates(plan, gates, grads);
}

template void backward<float>(const Structure&, const Inputs&, const Weights<const float*>&, const Tensors&,
                              const Tensors&, const Weights<float*>&);
template void backward<double>(const Structure&, const Inputs&, const Weights<const double*>&, const Tensors&,
                               const Tensors&, const Weights<double*>&);

}  // namespace crossan_fast::side
