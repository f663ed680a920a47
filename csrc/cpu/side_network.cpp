#include "side_network.h"

#include <memory>

#include "side_network_walk.h"

namespace crossan_fast::side {
namespace {

// One thread's memory for the forward walk.
template <class T>
class ForwardWalk {
 public:
  ForwardWalk(const Plan<T>& plan, int64_t block)
      : plan_(plan),
        states_(plan, block),
        z_(block * plan.structure.rank),
        a_(block * plan.structure.rank),
        low_(plan.cross_down.empty() ? 0 : block * plan.structure.rank),
        narrow_(plan.pair_weight.empty() ? 0 : block * padded<T>(plan.widest)) {
    const Structure& s = plan.structure;
    for (const Tower& tower : s.towers) h_.emplace_back(block * padded<T>(s.width(tower)));
    if (s.cross == Cross::side)
      for (int64_t width : s.widths) before_.emplace_back(block * padded<T>(width));
  }

  void run(int64_t first, int64_t count, const Tensors& outputs, const Tensors& saved) {
    const Structure& s = plan_.structure;
    for (int64_t l = 0; l < s.levels; ++l) {
      states_.read(l, first, count);
      for (size_t m = 0; l > 0 && m < before_.size(); ++m)
        std::copy_n(h_[m].data(), count * padded<T>(s.widths[m]), before_[m].data());
      for (size_t t = 0; t < s.towers.size(); ++t) {
        const Tower& tower = s.towers[t];
        const int64_t width = s.width(tower), row = padded<T>(width), rank = s.rank;
        T* h = h_[t].data();
        if (tower.second < 0)
          enter_single(t, l, count);
        else
          enter_pair(t, l, first, count);
        // h holds x here, and the level's output after the two products.
        multiply<T>(count, rank, width, h, row, 1, plan_.down[t][l], z_.data(), rank, Into::overwrite,
                    plan_.weights.down_bias[t] + l * rank);
        plan_.zero_absent(tower, first, count, z_.data(), rank, rank);
        for (int64_t i = 0; i < count; ++i)
          convert_to(saved.type, z_.data() + i * rank,
                     static_cast<char*>(saved.data[t]) + ((first + i) * s.levels + l) * rank * bytes_of(saved.type),
                     rank);
        activate(s.activation, count * rank, z_.data(), a_.data());
        multiply<T>(count, width, rank, a_.data(), rank, 1, plan_.up[t][l], h, row, Into::add,
                    plan_.weights.up_bias[t] + l * width);
        plan_.zero_absent(tower, first, count, h, row, width);
        if (l + 1 == s.levels)
          for (int64_t i = 0; i < count; ++i)
            convert_to(outputs.type, h + i * row,
                       static_cast<char*>(outputs.data[t]) + (first + i) * width * bytes_of(outputs.type), width);
      }
    }
  }

 private:
  // h ← x = μ c + (1 − μ) h + Σ tanh(ν) T(s)
  void enter_single(size_t t, int64_t l, int64_t count) {
    const Structure& s = plan_.structure;
    const size_t own = static_cast<size_t>(s.towers[t].first);
    const int64_t width = s.widths[own], row = padded<T>(width);
    const bool from_towers = s.cross == Cross::side;
    const T mu = plan_.mu[t][l];
    weight_.assign(1, mu);
    sources_.assign(1, nullptr);
    const bool any = !from_towers || l > 0;  // the towers' h before the first level is zero
    for (const auto& c : plan_.incoming[t])
      if (any && c.projection < 0) {
        weight_.push_back(c.gate[l]);
        sources_.push_back(nullptr);
      }
    for (int64_t i = 0; i < count; ++i) {
      sources_[0] = states_.row(own, i);
      size_t j = 1;
      for (const auto& c : plan_.incoming[t])
        if (any && c.projection < 0)
          sources_[j++] = from_towers ? before_[c.from].data() + i * row : states_.row(c.from, i);
      T* h = h_[t].data() + i * row;
      mix<T>(width, l > 0 ? h : nullptr, T(1) - mu, static_cast<int>(j), sources_.data(), weight_.data(), h);
    }
    for (const auto& c : plan_.incoming[t]) {
      if (!any || c.projection < 0) continue;
      const int64_t from = s.widths[c.from];
      multiply<T>(count, s.rank, from, from_towers ? before_[c.from].data() : states_.matrix(c.from),
                  padded<T>(from), 1, plan_.cross_down[c.projection][0], low_.data(), s.rank, Into::overwrite);
      for (int64_t i = 0; i < count * s.rank; ++i) low_.data()[i] *= c.gate[l];
      multiply<T>(count, width, s.rank, low_.data(), s.rank, 1, plan_.cross_up[c.projection][0], h_[t].data(), row,
                  Into::add);
    }
  }

  // h ← x = h + μ c[a] + (1 − μ) c[b], the wider of the two narrowed
  void enter_pair(size_t t, int64_t l, int64_t first, int64_t count) {
    const Structure& s = plan_.structure;
    const Tower& tower = s.towers[t];
    const int64_t width = s.width(tower), row = padded<T>(width);
    const int which = plan_.narrowing[t];
    const int wide = which < 0 ? -1 : s.wide(tower);
    if (wide >= 0) {
      multiply<T>(count, width, s.widths[wide], states_.matrix(wide), padded<T>(s.widths[wide]), 1,
                  plan_.pair_weight[which][l], narrow_.data(), row, Into::overwrite,
                  plan_.weights.pair_bias[which] + l * width);
      plan_.zero_absent({wide, -1}, first, count, narrow_.data(), row, width);
    }
    const T mu = plan_.mu[t][l];
    const T weight[2] = {mu, T(1) - mu};
    for (int64_t i = 0; i < count; ++i) {
      const T* source[2];
      for (int k = 0; k < 2; ++k) {
        const int m = k == 0 ? tower.first : tower.second;
        source[k] = m == wide ? narrow_.data() + i * row : states_.row(m, i);
      }
      T* h = h_[t].data() + i * row;
      mix<T>(width, l > 0 ? h : nullptr, T(1), 2, source, weight, h);
    }
  }

  const Plan<T>& plan_;
  BlockStates<T> states_;
  Buffer<T> z_, a_, low_, narrow_;  // [block, rank] each; the narrowed states [block, D]
  std::vector<Buffer<T>> h_;        // per tower [block, D]
  std::vector<Buffer<T>> before_;   // per modality's tower, its h of the level before (cross = side)
  std::vector<const T*> sources_;
  std::vector<T> weight_;
};

}  // namespace

template <class T>
void forward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights,
             const Tensors& outputs, const Tensors& saved) {
  const Blocks blocks(structure.items);
  if (blocks.count == 0) return;
  const Plan<T> plan(structure, inputs, weights, false);
  const int64_t workers = workers_for(blocks.count);
  std::vector<std::unique_ptr<ForwardWalk<T>>> walks;
  for (int64_t w = 0; w < workers; ++w) walks.push_back(std::make_unique<ForwardWalk<T>>(plan, blocks.size));
  run_tasks(workers, blocks.count, [&](int64_t w, int64_t b) {
    walks[static_cast<size_t>(w)]->run(blocks.first(b), blocks.length(b), outputs, saved);
  });
}

template void forward<float>(const Structure&, const Inputs&, const Weights<const float*>&, const Tensors&,
                             const Tensors&);
template void forward<double>(const Structure&, const Inputs&, const Weights<const double*>&, const Tensors&,
                              const Tensors&);

}  // namespace crossan_fast::side
