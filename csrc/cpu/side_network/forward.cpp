#include "side_network.h"

#include <memory>

#include "walk.h"

namespace crossan_fast::side_network {
namespace {

// One thread's memory for the forward walk.
template <class T>
class ForwardWalk {
 public:
  ForwardWalk(const Plan<T>& plan, int64_t block)
      : plan_(plan),
        inputs_(plan, block),
        products_(plan.in_pairs),
        z_(block * plan.structure.rank),
        a_(block * plan.structure.rank),
        low_(plan.cross_down.empty() ? 0 : block * plan.structure.rank) {
    const Structure& s = plan.structure;
    for (const Tower& tower : s.towers) h_.emplace_back(block * padded<T>(s.width(tower)));
    if (s.cross == Cross::side)
      for (int64_t width : s.widths) {
        copies_.emplace_back(block * padded<T>(width));
        before_.push_back(copies_.back().data());
      }
  }

  void run(int64_t first, int64_t count, const Tensors& outputs, const Tensors& saved) {
    const Structure& s = plan_.structure;
    for (int64_t l = 0; l < s.levels; ++l) {
      for (size_t m = 0; l > 0 && m < copies_.size(); ++m)
        std::copy_n(h_[m].data(), count * padded<T>(s.widths[m]), copies_[m].data());
      inputs_.read(l, first, count, before_);
      // Item by item, so that its states serve every tower from L1. h holds x until the tower's products are done.
      for (int64_t i = 0; i < count; ++i)
        for (size_t t = 0; t < s.towers.size(); ++t) {
          const int64_t width = s.width(s.towers[t]);
          T* h = h_[t].data() + i * padded<T>(width);
          mix<T>(width, l > 0 ? h : nullptr, plan_.keeps(t, l), inputs_.terms(t), inputs_.rows(t, i),
                 inputs_.weights(t), h);
        }
      for (size_t t = 0; t < s.towers.size(); ++t) run_tower(t, l, first, count, outputs, saved);
    }
    products_.end();
  }

 private:
  void run_tower(size_t t, int64_t l, int64_t first, int64_t count, const Tensors& outputs, const Tensors& saved) {
    const Structure& s = plan_.structure;
    const Tower& tower = s.towers[t];
    const int64_t width = s.width(tower), row = padded<T>(width), rank = s.rank;
    T* h = h_[t].data();
    inputs_.add_projected(t, h, [&](int) { return low_.data(); });
    products_.weigh(count, rank, width, h, row, plan_.down[t], l, z_.data(), rank, Into::overwrite,
                    plan_.weights.down_bias[t] + l * rank);
    plan_.zero_absent(tower, first, count, z_.data(), rank, rank);
    for (int64_t i = 0; i < count; ++i)
      convert_to(saved.type, z_.data() + i * rank,
                 static_cast<char*>(saved.data[t]) + ((first + i) * s.levels + l) * rank * bytes_of(saved.type), rank);
    activate(s.activation(), count * rank, z_.data(), a_.data());
    products_.weigh(count, width, rank, a_.data(), rank, plan_.up[t], l, h, row, Into::add,
                    plan_.weights.up_bias[t] + l * width);
    plan_.zero_absent(tower, first, count, h, row, width);
    if (l + 1 == s.levels)
      for (int64_t i = 0; i < count; ++i)
        convert_to(outputs.type, h + i * row,
                   static_cast<char*>(outputs.data[t]) + (first + i) * width * bytes_of(outputs.type), width);
  }

  const Plan<T>& plan_;
  LevelInputs<T> inputs_;
  Products<T> products_;
  Buffer<T> z_, a_, low_;          // [block, rank] each
  std::vector<Buffer<T>> h_;       // per tower [block, D]
  std::vector<Buffer<T>> copies_;  // per modality's tower, its h of the level before (cross = side)
  std::vector<T*> before_;
};

}  // namespace

template <class T>
void forward(const Structure& structure, const Inputs& inputs, const Weights<const T*>& weights, const Tensors& outputs,
             const Tensors& saved) {
  const Blocks blocks(structure.items);
  if (blocks.count == 0) return;
  const Plan<T> plan(structure, inputs, weights, outputs.type, false);
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

}  // namespace crossan_fast::side_network
