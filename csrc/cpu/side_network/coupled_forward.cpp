// The forward with h itself: see coupled.h.
#include "coupled.h"

#include <memory>

#include "level_inputs.h"

namespace crossan_fast::side_network::coupled {
namespace {

// One thread's memory for the forward walk.
template <class T>
class ForwardWalk {
 public:
  ForwardWalk(const Plan<T>& plan, const Weighed<T>& weighed, int64_t block)
      : plan_(plan),
        weighed_(weighed),
        inputs_(plan, block, plan.widest),
        products_(plan.in_pairs),
        z_(block * plan.structure.rank),
        a_(block * plan.structure.rank),
        low_(plan.cross_down.empty() ? 0 : block * plan.structure.rank) {
    const Structure& s = plan.structure;
    for (const Tower& tower : s.towers) h_.emplace_back(block * padded<T>(s.width(tower)));
    for (size_t m = 0; s.cross == Cross::side && m < s.widths.size(); ++m) {
      copies_.emplace_back(block * padded<T>(s.widths[m]));
      before_.push_back(copies_.back().data());
    }
    e_ = Buffer<T>(block * s.embedding);
  }

  void run(int64_t first, int64_t count, const Kept& out) {
    const Structure& s = plan_.structure;
    for (int64_t l = 0; l < s.levels; ++l) {
      for (size_t m = 0; l > 0 && m < copies_.size(); ++m)
        std::copy_n(h_[m].data(), count * padded<T>(s.widths[m]), copies_[m].data());
      inputs_.read(l, first, count, {0, plan_.widest}, &before_);
      // h holds x until the tower's products are done.
      inputs_.mix_rows({0, plan_.widest}, [&](size_t t, int64_t i) {
        T* h = h_[t].data() + i * padded<T>(s.width(s.towers[t]));
        return std::pair<const T*, T*>(l > 0 ? h : nullptr, h);
      });
      for (size_t t = 0; t < s.towers.size(); ++t) run_tower(t, l, first, count, out);
    }
    for (size_t t = 0; t < s.towers.size(); ++t) head(t, first, count, out);
    products_.end();
  }

 private:
  void run_tower(size_t t, int64_t l, int64_t first, int64_t count, const Kept& out) {
    const Structure& s = plan_.structure;
    const Tower& tower = s.towers[t];
    const int64_t width = s.width(tower), row = padded<T>(width), rank = s.rank;
    T* h = h_[t].data();
    inputs_.add_projected(t, h, [&](int) { return low_.data(); });
    products_.weigh(count, rank, width, h, row, weighed_.down[t], {l}, z_.data(), rank, Into::overwrite,
                    plan_.weights.down_bias[t] + l * rank);
    plan_.zero_absent(tower, first, count, z_.data(), rank, rank);
    for (int64_t i = 0; i < count; ++i)
      convert_to(out.type, z_.data() + i * rank, out.bottleneck(s, first + i, t, l), rank);
    activate(s.activation(), count * rank, z_.data(), a_.data());
    products_.weigh(count, width, rank, a_.data(), rank, weighed_.up[t], {l}, h, row, Into::add,
                    plan_.weights.up_bias[t] + l * width);
    plan_.zero_absent(tower, first, count, h, row, width);
  }

  void head(size_t t, int64_t first, int64_t count, const Kept& out) {
    const Structure& s = plan_.structure;
    const int64_t width = s.width(s.towers[t]);
    products_.weigh(count, s.embedding, width, h_[t].data(), padded<T>(width), weighed_.head[t], {0}, e_.data(),
                    s.embedding, Into::overwrite, plan_.weights.head_bias[t]);
    plan_.zero_absent(s.towers[t], first, count, e_.data(), s.embedding, s.embedding);
    for (int64_t i = 0; i < count; ++i)
      convert_to(out.type, e_.data() + i * s.embedding, out.embedding(s, first + i, t), s.embedding);
  }

  const Plan<T>& plan_;
  const Weighed<T>& weighed_;
  LevelInputs<T> inputs_;
  Products<T> products_;
  Buffer<T> z_, a_, low_, e_;      // [block, rank] each; [block, d]
  std::vector<Buffer<T>> h_;       // per tower [block, D]
  std::vector<Buffer<T>> copies_;  // per modality's tower, its h of the level before; where others take it
  std::vector<T*> before_;
};

}  // namespace

template <class T>
void forward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights, const Kept& out) {
  Tasks tasks;
  const Plan<T> plan(tasks, structure, inputs, weights, out.type);
  const Weighed<T> weighed(tasks, plan, false);
  tasks.run();
  const Blocks blocks(structure.items, kItems);
  const int64_t workers = workers_for(blocks.count);
  std::vector<std::unique_ptr<ForwardWalk<T>>> walks;
  for (int64_t w = 0; w < workers; ++w) walks.push_back(std::make_unique<ForwardWalk<T>>(plan, weighed, blocks.size));
  run_tasks(workers, blocks.count,
            [&](int64_t w, int64_t b) { walks[static_cast<size_t>(w)]->run(blocks.first(b), blocks.length(b), out); });
}

template void forward(const Structure&, const Inputs&, const Weights<const float*>&, const Kept&);
template void forward(const Structure&, const Inputs&, const Weights<const double*>&, const Kept&);

}  // namespace crossan_fast::side_network::coupled
