// The forward of side_network. A block of items walks a slice of D through all levels at a time, with u in the core's
// cache, and adds W_l u_l up; then the activations, level by level, take the links' r × r products.
#include <memory>

#include "level_inputs.h"
#include "links.h"
#include "side_network.h"

namespace crossan_fast::side_network {
namespace {

template <class T>
struct Weighed {
  std::vector<LevelWeights<T>> down, head;  // per tower, W_lᵀ
};

// One thread's memory for the walk.
template <class T>
class ForwardWalk {
 public:
  ForwardWalk(const Plan<T>& plan, const Weighed<T>& weighed, const ForwardLinks<T>& links, int64_t block)
      : plan_(plan),
        s_(plan.structure),
        weighed_(weighed),
        links_(links),
        slice_(plan.slice(block)),
        inputs_(plan, block, slice_),
        products_(plan.in_pairs),
        row_(padded<T>(s_.levels * s_.rank + s_.embedding)),
        a_(block * row_),
        low_(plan.cross_down.empty() ? 0 : block * s_.rank) {
    for (size_t t = 0; t < s_.towers.size(); ++t) {
      z_.emplace_back(block * row_);
      u_.emplace_back(block * stride(t));
    }
  }

  void run(int64_t first, int64_t count, const Kept& out) {
    first_ = first;
    count_ = count;
    for (int64_t d = 0; d < plan_.widest; d += slice_) walk({d, std::min(slice_, plan_.widest - d)});
    for (size_t t = 0; t < s_.towers.size(); ++t) link(t, out);
    products_.end();
  }

 private:
  int64_t width(size_t t) const { return s_.width(s_.towers[t]); }
  int64_t stride(size_t t) const { return padded<T>(std::min(slice_, width(t))); }

  // z_l += W_l u_l over a slice, for all levels and the head.
  void walk(Slice slice) {
    const Into into = slice.first == 0 ? Into::overwrite : Into::add;
    const Slice next = plan_.after(slice);
    for (int64_t l = 0; l < s_.levels; ++l) {
      inputs_.read(l, first_, count_, slice);
      inputs_.mix_rows(slice, [&](size_t t, int64_t i) {
        T* u = u_[t].data() + i * stride(t);
        return std::pair<const T*, T*>(l > 0 ? u : nullptr, u);
      });
      const bool last = l + 1 == s_.levels;
      inputs_.announce(products_.ahead, last ? 0 : l + 1, first_, count_, last ? next : slice);
      for (size_t t = 0; t < s_.towers.size(); ++t) {
        inputs_.add_projected(t, u_[t].data(), [&](int) { return low_.data(); });
        if (const int64_t columns = slice.of(width(t)))
          products_.weigh(count_, s_.rank, columns, u_[t].data(), stride(t), weighed_.down[t], {l, slice.first},
                          z_[t].data() + l * s_.rank, row_, into, nullptr, T(1), after(t, l, slice));
      }
    }
    for (size_t t = 0; t < s_.towers.size(); ++t)
      if (const int64_t columns = slice.of(width(t)))
        products_.weigh(count_, s_.embedding, columns, u_[t].data(), stride(t), weighed_.head[t], {0, slice.first},
                        z_[t].data() + s_.levels * s_.rank, row_, into, nullptr, T(1), after(t, s_.levels, slice));
  }

  // The weights that the walk wants after tower t's of level l, level L being the head's.
  RightSide<T> after(size_t t, int64_t l, Slice slice) const {
    if (++t == s_.towers.size()) {
      t = 0;
      if (++l > s_.levels) {
        l = 0;
        slice = plan_.after(slice);
      }
    }
    if (slice.of(width(t)) == 0) return {};
    return l < s_.levels ? weighed_.down[t].soon({l, slice.first}) : weighed_.head[t].soon({0, slice.first});
  }

  // From W_l u_l to z_l, level by level, and to e.
  void link(size_t t, const Kept& out) {
    const int64_t rank = s_.rank;
    for (int64_t l = 0; l <= s_.levels; ++l) {
      T* z = z_[t].data() + l * rank;
      const int64_t columns = l < s_.levels ? rank : s_.embedding;
      if (l == 0)
        for (int64_t i = 0; i < count_; ++i)
          for (int64_t k = 0; k < columns; ++k) z[i * row_ + k] += links_.bias(t, l)[k];
      else
        products_.weigh(count_, columns, l * rank, a_.data(), row_, links_(t, l), {0}, z, row_, Into::add,
                        links_.bias(t, l));
      plan_.zero_absent(s_.towers[t], first_, count_, z, row_, columns);
      for (int64_t i = 0; i < count_; ++i) {
        char* to = l < s_.levels ? out.bottleneck(s_, first_ + i, t, l) : out.embedding(s_, first_ + i, t);
        convert_to(out.type, z + i * row_, to, columns);
        if (l < s_.levels) activate(s_.activation(), rank, z + i * row_, a_.data() + i * row_ + l * rank);
      }
    }
  }

  const Plan<T>& plan_;
  const Structure& s_;
  const Weighed<T>& weighed_;
  const ForwardLinks<T>& links_;
  int64_t slice_;
  LevelInputs<T> inputs_;
  Products<T> products_;
  int64_t row_;
  Buffer<T> a_, low_;         // [block, L·r] of one tower; [block, r]
  std::vector<Buffer<T>> z_;  // per tower [block, L·r + d], in rows of row_
  std::vector<Buffer<T>> u_;  // per tower [block, slice]
  int64_t first_ = 0, count_ = 0;
};

}  // namespace

template <class T>
void forward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights, const Kept& out,
             T* columns) {
  if (structure.walks_with_h()) return coupled::forward(structure, inputs, weights, out);
  Tasks tasks;
  const Plan<T> plan(tasks, structure, inputs, weights, out.type);
  const Weighed<T> weighed{plan.across(tasks, weights.down_weight, structure.levels, structure.rank, As::transposed),
                           plan.across(tasks, weights.head_weight, 1, structure.embedding, As::transposed)};
  ForwardLinks<T> links(tasks, plan, columns);
  tasks.run();
  links.lay_out(tasks);
  tasks.run();

  const Blocks blocks(structure.items, kBlock);
  const int64_t workers = workers_for(blocks.count);
  std::vector<std::unique_ptr<ForwardWalk<T>>> walks;
  for (int64_t w = 0; w < workers; ++w)
    walks.push_back(std::make_unique<ForwardWalk<T>>(plan, weighed, links, blocks.size));
  run_tasks(workers, blocks.count,
            [&](int64_t w, int64_t b) { walks[static_cast<size_t>(w)]->run(blocks.first(b), blocks.length(b), out); });
}

template void forward<float>(const Structure&, const Inputs&, const Weights<const float*>&, const Kept&, float*);
template void forward<double>(const Structure&, const Inputs&, const Weights<const double*>&, const Kept&, double*);

}  // namespace crossan_fast::side_network
