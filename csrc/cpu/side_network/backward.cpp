// The backward of side_network, from the bottlenecks' pre-activations z alone.
//
// h is linear in the states and in a = act(z): let u walk like x, but without up-projections; then
//
//     x_l = u_l + Σ_{p<l} κ_lp (W_up,p a_p + b_up,p),    κ_lp the product of what levels p + 1 … l keep of h.
//
// A block first walks back, where nothing needs x: g goes from the gradient of h to that of x and on to the level
// before. Then it walks forward with u, which takes no product with the towers' own weights, and adds Σ dz_l u_lᵀ to
// the gradient of W_down and Σ dz_l a_pᵀ, r × r, to sums that become the rest of it once a call. The gates' ⟨dx, h⟩
// follow from other sums (side_network_sums.h).
//
// With cross = side, towers take each other's h, and κ would differ from item to item with what is present. There a
// block walks forward with h itself, keeps it before each level, and has x on its way back.
//
// Weight gradients are added level by level in the order of blocks (`Turns`), so no thread holds a copy of
// them but of what all levels share.
#include <memory>

#include "cpu/turns.h"
#include "side_network.h"
#include "sums.h"
#include "walk.h"

namespace crossan_fast::side_network {
namespace {

template <class T>
class BackwardWalk {
 public:
  BackwardWalk(const Plan<T>& plan, Sums<T>& sums, Turns& turns, int64_t block)
      : plan_(plan),
        s_(plan.structure),
        with_h_(s_.cross == Cross::side),
        sums_(sums),
        grads_(sums.grads),
        turns_(turns),
        inputs_(plan, block),
        products_(plan.in_pairs),
        z_(block * s_.rank),
        slope_(block * s_.rank),
        level_step_(block * s_.rank) {
    for (const Tower& tower : s_.towers) {
      const int64_t size = block * padded<T>(s_.width(tower));
      a_.emplace_back(s_.levels * level_step_);
      dz_.emplace_back(s_.levels * level_step_);
      g_.emplace_back(size);
      x_.emplace_back(size);
      if (!with_h_) continue;
      next_.emplace_back(size);
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
    saved_ = &saved;
    for (int64_t l = 0; with_h_ && l + 1 < s_.levels; ++l) recompute(l);
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width);
      for (int64_t i = 0; i < count; ++i)
        convert_from(grad_outputs.type,
                     static_cast<const char*>(grad_outputs.data[t]) + (first + i) * width * bytes_of(grad_outputs.type),
                     g_[t].data() + i * row, width, T(1));
      plan_.zero_absent(s_.towers[t], first, count, g_[t].data(), row, width);
    }
    for (int64_t l = s_.levels; l-- > 0;) level_back(l);
    for (int64_t l = 0; !with_h_ && l < s_.levels; ++l) level_forward(l);
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
  // h of the towers before level l, where it is kept; null at the first, where it is zero.
  const std::vector<T*>& h_before(int64_t l) {
    for (size_t t = 0; t < before_.size(); ++t)
      before_[t] = !with_h_ || l == 0 ? nullptr : history_[t].data() + (l - 1) * history_step_[t];
    return before_;
  }

  T* a(size_t t, int64_t l) const { return a_[t].data() + l * level_step_; }
  T* dz(size_t t, int64_t l) const { return dz_[t].data() + l * level_step_; }

  // z of a level of the block into z_, [count, r].
  void read_bottleneck(size_t t, int64_t l) {
    for (int64_t i = 0; i < count_; ++i)
      convert_from(
          saved_->type,
          static_cast<const char*>(saved_->data[t]) + ((first_ + i) * s_.levels + l) * s_.rank * bytes_of(saved_->type),
          z_.data() + i * s_.rank, s_.rank, T(1));
  }

  // h before level l + 1, from h before level l.
  void recompute(int64_t l) {
    inputs_.read(l, first_, count_, h_before(l));
    for (int64_t i = 0; i < count_; ++i)
      for (size_t t = 0; t < s_.towers.size(); ++t) {
        const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width);
        T* after = history_[t].data() + l * history_step_[t] + i * row;
        mix<T>(width, l == 0 ? nullptr : before_[t] + i * row, plan_.keeps(t, l), inputs_.terms(t), inputs_.rows(t, i),
               inputs_.weights(t), after);
      }
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width), rank = s_.rank;
      T* after = history_[t].data() + l * history_step_[t];
      inputs_.add_projected(t, after, [&](int p) { return low_[p].data(); });
      read_bottleneck(t, l);
      activate(s_.activation(), count_ * rank, z_.data(), a(t, l));
      products_.weigh(count_, width, rank, a(t, l), rank, plan_.up[t], l, after, row, Into::add,
                      plan_.weights.up_bias[t] + l * width);
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
        T* g = g_[t].data() + i * row;
        const T scale = shares_x(t) ? T(1) : plan_.keeps(t, l);
        if (with_h_)
          mix_backward<T>(width, g, scale, l == 0 ? nullptr : before_[t] + i * row, plan_.keeps(t, l), inputs_.terms(t),
                          inputs_.rows(t, i), inputs_.weights(t), x_[t].data() + i * row, dots_[t].data());
        else
          dots_and_scale<T>(width, g, scale, inputs_.terms(t), inputs_.rows(t, i), dots_[t].data());
      }
    for (size_t t = 0; t < s_.towers.size(); ++t) add_input_grads(t, l);
    if (with_h_) exchange(l);
  }

  // u of the level, where x_ holds that of the level before, and the products with dz.
  void level_forward(int64_t l) {
    inputs_.read(l, first_, count_, before_);
    for (int64_t i = 0; i < count_; ++i)
      for (size_t t = 0; t < s_.towers.size(); ++t) {
        const int64_t width = s_.width(s_.towers[t]);
        T* u = x_[t].data() + i * padded<T>(width);
        mix<T>(width, l > 0 ? u : nullptr, plan_.keeps(t, l), inputs_.terms(t), inputs_.rows(t, i), inputs_.weights(t),
               u);
      }
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      const int64_t rank = s_.rank;
      inputs_.add_projected(t, x_[t].data(), [&](int p) { return low_[p].data(); });
      turns_.wait(block_, step_);
      add_down_weight(t, l);
      for (int64_t p = 0; p < l; ++p)
        products_.correlate(rank, rank, count_, dz(t, l), rank, a(t, p), rank, sums_.products[t][l] + p * rank,
                            l * rank, first_into());
      turns_.pass(block_, step_++);
    }
  }

  Into first_into() const { return block_ > 0 ? Into::add : Into::overwrite; }

  void add_down_weight(size_t t, int64_t l) {
    const int64_t width = s_.width(s_.towers[t]), rank = s_.rank;
    products_.correlate(rank, width, count_, dz(t, l), rank, x_[t].data(), padded<T>(width),
                        grads_.down_weight[t] + l * rank * width, width, first_into());
  }

  // Whether others than the tower's own h take the gradient of its x.
  bool shares_x(size_t t) const { return with_h_ || plan_.narrowing[t] >= 0 || !plan_.cross_down.empty(); }

  // g: from the gradient of tower t's h to that of its x.
  void back_to_x(size_t t, int64_t l) {
    const int64_t width = s_.width(s_.towers[t]), row = padded<T>(width), rank = s_.rank;
    T* g = g_[t].data();
    T* dz = this->dz(t, l);
    T* a = this->a(t, l);
    products_.weigh(count_, rank, width, g, row, plan_.up_plain[t], l, dz, rank, Into::overwrite);
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

    products_.weigh(count_, width, rank, dz, rank, plan_.down_plain[t], l, g, row, Into::add);
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
    const auto low = [&](int p) { return low_[p].data(); };
    if (with_h_)
      inputs_.add_projected(t, x_[t].data(), low);
    else
      inputs_.project(t, low);

    turns_.wait(block_, step_);
    if (with_h_) add_down_weight(t, l);
    sums_.mu[t][l] += dots_[t][0] - (tower.second >= 0 ? dots_[t][1] : with_h_ ? dots_[t][terms] : 0.0);
    if (tower.second < 0)
      for (int j = 1; j < terms; ++j) sums_.cross[inputs_.pair(t, j)][l] += dots_[t][j];
    if (shares_x(t)) {
      projected_back(t, l, g, row);
      narrowed_back(t, l, g, row);
    }
    turns_.pass(block_, step_++);
    if (shares_x(t) && !with_h_ && tower.second < 0) {
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
      sums_.cross[c.pair][l] += static_cast<double>(dot(count_ * rank, d_low, z_.data()));
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
  const bool with_h_;  // x itself rather than u, from h kept before each level
  Sums<T>& sums_;
  const Weights<T*>& grads_;
  Turns& turns_;
  LevelInputs<T> inputs_;
  Products<T> products_;
  Buffer<T> z_, slope_;  // [block, r]; z_ then any such
  int64_t level_step_;
  std::vector<Buffer<T>> a_, dz_;   // per tower [L][block, r]
  std::vector<Buffer<T>> g_, x_;    // per tower [block, D]: the gradient of its h, then of its x; x or u
  std::vector<Buffer<T>> next_;     // likewise, the gradient of h of the level before (with h)
  std::vector<Buffer<T>> history_;  // per tower [L − 1][block, D]: h before each level but the first (with h)
  std::vector<int64_t> history_step_;
  std::vector<Buffer<T>> low_, d_low_;                        // per projected pair [block, rank]
  std::vector<std::pair<Buffer<T>, int64_t>> d_down_, d_up_;  // likewise, the block's gradients and their sizes
  std::vector<T*> before_;
  std::vector<std::vector<double>> dots_;  // per tower: ⟨g, row⟩ of its terms, then of h
  std::vector<T> weight_;
  std::vector<const T*> source_;
  const Tensors* saved_ = nullptr;
  int64_t block_ = 0, first_ = 0, count_ = 0, step_ = 0;
};

}  // namespace

template <class T>
void backward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights,
              const Tensors& grad_outputs, const Tensors& saved, const Weights<T*>& grads) {
  const Blocks blocks(structure.items);
  const Plan<T> plan(structure, inputs, weights, saved.type, true);
  Sums<T> sums(structure, grads);
  Turns turns(blocks.count);
  const int64_t workers = workers_for(blocks.count);
  std::vector<std::unique_ptr<BackwardWalk<T>>> walks;
  for (int64_t w = 0; w < workers; ++w)
    walks.push_back(std::make_unique<BackwardWalk<T>>(plan, sums, turns, blocks.size));
  run_tasks(workers, blocks.count, [&](int64_t w, int64_t b) {
    walks[static_cast<size_t>(w)]->run(b, blocks.first(b), blocks.length(b), grad_outputs, saved);
  });
  finish_down(plan, sums);
  finish_gates(plan, sums);
}

template void backward<float>(const Structure&, const Inputs&, const Weights<const float*>&, const Tensors&,
                              const Tensors&, const Weights<float*>&);
template void backward<double>(const Structure&, const Inputs&, const Weights<const double*>&, const Tensors&,
                               const Tensors&, const Weights<double*>&);

}  // namespace crossan_fast::side_network
