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
        inputs_(plan, block),
        products_(plan.in_pairs),
        z_(block * s_.levels * s_.rank) {
    for (const Tower& tower : s_.towers) {
      const int64_t size = block * padded<T>(s_.width(tower));
      a_.emplace_back(block * s_.levels * s_.rank);
      slope_.emplace_back(block * s_.levels * s_.rank);
      dz_.emplace_back(block * s_.rank);
      g_.emplace_back(size);
      x_.emplace_back(size);
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
    before_.resize(s_.towers.size());
    dots_.assign(s_.towers.size(), std::vector<double>(s_.widths.size() + 2));
    weight_.resize(s_.widths.size() + 1);
    source_.resize(s_.widths.size() + 1);
  }

  void run(int64_t block, int64_t first, int64_t count, const Tensors& grad_outputs, const Tensors& saved) {
    block_ = block;
    first_ = first;
    count_ = count;
    step_ = 0;
    for (size_t t = 0; t < s_.towers.size(); ++t) read_bottlenecks(t, saved);
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
    for (int64_t l = s_.levels; l-- > 0;) level_back(l);
    products_.end();
    if (d_down_.empty()) return;
    turns_.wait(block_, step_);
    for (size_t p = 0; p < d_down_.size(); ++p) {
      add_shared(d_down_[p], grads_.cross_down[p]);
      add_shared(d_up_[p], grads_.cross_up[p]);
    }
    turns_.pass(block_, step_++);
  }

 private:
  // h of the towers before level l; null at the first, where it is zero.
  const std::vector<T*>& h_before(int64_t l) {
    for (size_t t = 0; t < before_.size(); ++t)
      before_[t] = l == 0 ? nullptr : history_[t].data() + (l - 1) * history_step_[t];
    return before_;
  }

  // act(z) and its slope at all levels, [count, L·r].
  void read_bottlenecks(size_t t, const Tensors& saved) {
    const int64_t row = s_.levels * s_.rank;
    convert_from(saved.type, static_cast<const char*>(saved.data[t]) + first_ * row * bytes_of(saved.type), z_.data(),
                 count_ * row, T(1));
    activate_both(s_.activation, count_ * row, z_.data(), a_[t].data(), slope_[t].data());
  }

  // h before level l + 1, from h before level l.
  void recompute(int64_t l) {
    inputs_.read(l, first_, count_, h_before(l));
    for (int64_t i = 0; i < count_; ++i)
      for (size_t t = 0; t < s_.towers.size(); ++t) {
        const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width);
        T* after = history_[t].data() + l * history_step_[t] + i * row;
        mix<T>(width, l == 0 ? nullptr : before_[t] + i * row, plan_.keeps(t, l), inputs_.terms(t),
               inputs_.rows(t, i), inputs_.weights(t), after);
      }
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width), rank = s_.rank;
      T* after = history_[t].data() + l * history_step_[t];
      inputs_.add_projected(t, after, [&](int p) { return low_[p].data(); });
      products_.weigh(count_, width, rank, a_[t].data() + l * rank, s_.levels * rank, plan_.up[t], l, after, row,
                      Into::add, plan_.weights.up_bias[t] + l * width);
      plan_.zero_absent(s_.towers[t], first_, count_, after, row, width);
    }
  }

  void level_back(int64_t l) {
    for (size_t t = 0; t < s_.towers.size(); ++t) back_to_x(t, l);
    inputs_.read(l, first_, count_, h_before(l));
    for (auto& dots : dots_) std::fill(dots.begin(), dots.end(), 0.0);
    // Item by item, so that its states serve every tower from L1.
    for (int64_t i = 0; i < count_; ++i)
      for (size_t t = 0; t < s_.towers.size(); ++t) {
        const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width);
        mix_backward<T>(width, g_[t].data() + i * row, shares_x(t) ? T(1) : plan_.keeps(t, l),
                        l == 0 ? nullptr : before_[t] + i * row, plan_.keeps(t, l), inputs_.terms(t),
                        inputs_.rows(t, i), inputs_.weights(t), x_[t].data() + i * row, dots_[t].data());
      }
    for (size_t t = 0; t < s_.towers.size(); ++t) add_input_grads(t, l);
    if (s_.cross == Cross::side) exchange(l);
  }

  // Whether others than the tower's own h take the gradient of its x.
  bool shares_x(size_t t) const {
    return s_.cross == Cross::side || plan_.narrowing[t] >= 0 || !plan_.cross_down.empty();
  }

  // g: from the gradient of tower t's h to that of its x.
  void back_to_x(size_t t, int64_t l) {
    const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width), rank = s_.rank, wide = s_.levels * rank;
    const bool add = block_ > 0;
    T* g = g_[t].data();
    T* dz = dz_[t].data();
    const T* a = a_[t].data() + l * rank;
    const T* slope = slope_[t].data() + l * rank;
    products_.weigh(count_, rank, width, g, row, plan_.up_plain[t], l, dz, rank, Into::overwrite);
    for (int64_t i = 0; i < count_; ++i)
      for (int64_t k = 0; k < rank; ++k) dz[i * rank + k] *= slope[i * wide + k];

    turns_.wait(block_, step_);
    products_.correlate(width, rank, count_, g, row, a, wide, grads_.up_weight[t] + l * width * rank, rank,
                        add ? Into::add : Into::overwrite);
    sum_rows(count_, width, g, row, add, grads_.up_bias[t] + l * width);
    sum_rows(count_, rank, dz, rank, add, grads_.down_bias[t] + l * rank);
    turns_.pass(block_, step_++);

    products_.weigh(count_, width, rank, dz, rank, plan_.down_plain[t], l, g, row, Into::add);
  }

  // Everything that takes x or its gradient g.
  void add_input_grads(size_t t, int64_t l) {
    const Tower& tower = s_.towers[t];
    const int64_t width = s_.width(tower), row = padded<T>(width), rank = s_.rank;
    const int terms = inputs_.terms(t);
    T* g = g_[t].data();
    inputs_.add_projected(t, x_[t].data(), [&](int p) { return low_[p].data(); });

    turns_.wait(block_, step_);
    products_.correlate(rank, width, count_, dz_[t].data(), rank, x_[t].data(), row,
                        grads_.down_weight[t] + l * rank * width, width, block_ > 0 ? Into::add : Into::overwrite);
    gates_.mu[t][l] += tower.second >= 0 ? dots_[t][0] - dots_[t][1] : dots_[t][0] - dots_[t][terms];
    if (tower.second < 0)
      for (int j = 1; j < terms; ++j) gates_.cross[inputs_.pair(t, j)][l] += dots_[t][j];
    if (shares_x(t)) {
      projected_back(t, l, g, row);
      narrowed_back(t, l, g, row);
    }
    turns_.pass(block_, step_++);
    if (shares_x(t) && s_.cross != Cross::side && tower.second < 0) {
      const T keep = plan_.keeps(t, l);
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
      if (!plan_.crosses(l)) {
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
      multiply<T>(count_, rank, from, inputs_.cross_matrix(c.from), padded<T>(from), 1,
                  plan_.cross_down[c.projection][0], z_.data(), rank, Into::overwrite);
      gates_.cross[c.pair][l] += static_cast<double>(dot(count_ * rank, d_low, z_.data()));
      for (int64_t i = 0; i < count_ * rank; ++i) d_low[i] *= c.gate[l];
      multiply<T>(rank, from, count_, d_low, 1, rank, plain(inputs_.cross_matrix(c.from), padded<T>(from)), d_down,
                  from, add ? Into::add : Into::overwrite);
    }
  }

  void narrowed_back(size_t t, int64_t l, const T* dx, int64_t row) {
    const int which = plan_.narrowing[t];
    if (which < 0) return;
    const int wide = s_.wide(s_.towers[t]);
    const int64_t width = s_.width(s_.towers[t]), from = s_.widths[wide];
    const T weight = wide == s_.towers[t].first ? plan_.mu[t][l] : T(1) - plan_.mu[t][l];
    for (int64_t i = 0; i < count_; ++i)  // the narrowed rows have served their turn; the gradient takes their place
      mix<T>(width, dx + i * row, weight, 0, nullptr, nullptr, inputs_.narrowed(t) + i * row);
    plan_.zero_absent({wide, -1}, first_, count_, inputs_.narrowed(t), row, width);
    const bool add = block_ > 0;
    multiply<T>(width, from, count_, inputs_.narrowed(t), 1, row, plain(inputs_.matrix(wide), padded<T>(from)),
                grads_.pair_weight[which] + l * width * from, from, add ? Into::add : Into::overwrite);
    sum_rows(count_, width, inputs_.narrowed(t), row, add, grads_.pair_bias[which] + l * width);
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
        mix<T>(width, g_[n].data() + i * row, plan_.keeps(n, l), terms, source_.data(), weight_.data(),
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
  LevelInputs<T> inputs_;
  Products<T> products_;
  Buffer<T> z_;                         // [block, L·r]; then any [block, r]
  std::vector<Buffer<T>> a_, slope_;    // per tower [block, L·r]
  std::vector<Buffer<T>> dz_;           // per tower [block, r]
  std::vector<Buffer<T>> g_, x_;        // per tower [block, D]: the gradient of its h, then of its x; x
  std::vector<Buffer<T>> next_;         // likewise, the gradient of h of the level before (cross = side)
  std::vector<Buffer<T>> history_;      // per tower [L − 1][block, D]: h before each level but the first
  std::vector<int64_t> history_step_;
  std::vector<Buffer<T>> low_, d_low_;  // per projected pair [block, rank]
  std::vector<std::pair<Buffer<T>, int64_t>> d_down_, d_up_;  // likewise, the block's gradients and their sizes
  std::vector<T*> before_;
  std::vector<std::vector<double>> dots_;  // per tower: ⟨g, row⟩ of its terms, then of h
  std::vector<T> weight_;
  std::vector<const T*> source_;
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
  const Plan<T> plan(structure, inputs, weights, saved.type, true);
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
