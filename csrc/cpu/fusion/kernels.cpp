#include "fusion.h"

#include <cmath>
#include <limits>
#include <memory>

#include "cpu/functions.h"
#include "cpu/packing.h"
#include "cpu/turns.h"

namespace crossan_fast::fusion {
namespace {

constexpr int64_t kBlock = 10 * kRowsPerTile;

// What the router makes of one item's logits.
template <class T>
struct Routing {
  std::vector<T> probability, share;  // over present experts; over those that run
  std::vector<char> runs, assigned;   // assigned: what the load balance counts
  std::vector<char> exists;

  explicit Routing(int64_t modalities)
      : probability(static_cast<size_t>(modalities)),
        share(probability.size()),
        runs(probability.size()),
        assigned(probability.size()),
        exists(probability.size()) {}

  void route(const T* logits, const bool* present, int64_t top_k) {
    for (size_t m = 0; m < exists.size(); ++m) exists[m] = !present || present[m];
    softmax(logits, exists, probability);
    choose(std::max<int64_t>(1, top_k), assigned);
    runs = top_k > 0 ? assigned : exists;
    if (top_k > 0)
      softmax(logits, runs, share);
    else
      share = probability;
  }

 private:
  static void softmax(const T* logits, const std::vector<char>& keep, std::vector<T>& out) {
    T top = -std::numeric_limits<T>::infinity(), sum = 0;
    for (size_t m = 0; m < keep.size(); ++m)
      if (keep[m]) top = std::max(top, logits[m]);
    for (size_t m = 0; m < keep.size(); ++m) sum += out[m] = keep[m] ? std::exp(logits[m] - top) : T(0);
    for (size_t m = 0; m < keep.size(); ++m)
      if (keep[m]) out[m] /= sum;
  }

  // The k most probable of those that exist; ties go to the modality that comes first.
  void choose(int64_t k, std::vector<char>& chosen) const {
    std::fill(chosen.begin(), chosen.end(), char(0));
    for (int64_t turn = 0; turn < k; ++turn) {
      size_t best = exists.size();
      for (size_t m = 0; m < exists.size(); ++m)
        if (exists[m] && !chosen[m] && (best == exists.size() || probability[m] > probability[best])) best = m;
      if (best < exists.size()) chosen[best] = 1;
    }
  }
};

// dL/dlogits += p ⊙ (g − ⟨p, g⟩)
template <class T>
void softmax_backward(const std::vector<T>& p, const T* g, T* grad_logits) {
  T mean = 0;
  for (size_t m = 0; m < p.size(); ++m) mean += p[m] * g[m];
  for (size_t m = 0; m < p.size(); ++m) grad_logits[m] += p[m] * (g[m] - mean);
}

// What an item counts for in the balance: nothing where it has no modality.
double weight_of(const Inputs& inputs, int64_t modalities, int64_t item) {
  const bool* here = inputs.present ? inputs.present + item * modalities : nullptr;
  if (here && std::none_of(here, here + modalities, [](bool exists) { return exists; })) return 0;
  return inputs.counts ? static_cast<double>(inputs.counts[item]) : 1.0;
}

template <class T>
struct Plan {
  const Sizes& sizes;
  const Inputs& inputs;
  const Weights<const T*>& weights;
  Tasks tasks;
  PackedWeights<T> w1, w2;

  Plan(const Sizes& s, const Inputs& in, const Weights<const T*>& w)
      : sizes(s),
        inputs(in),
        weights(w),
        w1(tasks, w.w1, s.modalities, s.expansion, s.width, As::transposed),
        w2(tasks, w.w2, s.modalities, s.width, s.expansion, As::transposed) {
    tasks.run();
  }
};

// One thread's block of items.
template <class T>
class Block {
 public:
  explicit Block(const Plan<T>& plan)
      : plan_(plan),
        s_(plan.sizes),
        e_(kBlock * s_.modalities * s_.width),
        de_(kBlock * s_.modalities * s_.width),
        own_(kBlock * s_.width),
        x_(kBlock * s_.width),
        dx_(kBlock * s_.width),
        out_(kBlock * s_.width),
        z_(kBlock * s_.expansion),
        a_(kBlock * s_.expansion),
        slope_(kBlock * s_.expansion),
        dz_(kBlock * s_.expansion),
        dshare_(kBlock * s_.modalities),
        dlogits_(kBlock * s_.modalities),
        routings_(kBlock, Routing<T>(s_.modalities)) {
    chosen_.reserve(kBlock);
    router_rows_.resize(static_cast<size_t>(s_.modalities));
  }

  // sums: per modality assignments and weighted probabilities, then the weight.
  void forward(int64_t first, int64_t count, Stored type, void* items, T* logits, double* sums) {
    const int64_t joined = s_.modalities * s_.width;
    read_embeddings(first, count);
    for (int64_t i = 0; i < count; ++i) {
      const T* row = e_.data() + i * joined;
      T* own = logits + (first + i) * s_.modalities;
      for (int64_t m = 0; m < s_.modalities; ++m)
        own[m] = dot(joined, row, plan_.weights.router_weight + m * joined) + plan_.weights.router_bias[m];
    }
    route(first, count, logits);
    for (int64_t i = 0; i < count; ++i) {
      const double weight = weight_of(plan_.inputs, s_.modalities, first + i);
      for (int64_t m = 0; m < s_.modalities; ++m) {
        if (routings_[i].assigned[m]) sums[m] += weight;
        sums[s_.modalities + m] += weight * static_cast<double>(routings_[i].probability[m]);
      }
      sums[2 * s_.modalities] += weight;
    }
    std::fill_n(out_.data(), count * s_.width, T(0));
    for (int64_t m = 0; m < s_.modalities; ++m) {
      run_expert(m, count, false);
      for (size_t j = 0; j < chosen_.size(); ++j) {
        const T share = routings_[chosen_[j]].share[m];
        T* to = out_.data() + chosen_[j] * s_.width;
        for (int64_t k = 0; k < s_.width; ++k) to[k] += share * x_.data()[static_cast<int64_t>(j) * s_.width + k];
      }
    }
    convert_to(type, out_.data(), static_cast<char*>(items) + first * s_.width * bytes_of(type), count * s_.width);
  }

  // Through the experts and the router, to the gradient of the embeddings.
  void backward(int64_t block, int64_t first, int64_t count, Stored type, const void* grad_items,
                const T* grad_probability, double total, const T* logits, void* grad_embeddings,
                const Weights<T*>& grads, Turns& turns) {
    const int64_t joined = s_.modalities * s_.width, d = s_.width, f = s_.expansion;
    const bool add = block > 0;
    const Into into = add ? Into::add : Into::overwrite;
    int64_t step = 0;
    read_embeddings(first, count);
    T* de = de_.data();
    convert_from(type, static_cast<const char*>(grad_items) + first * d * bytes_of(type), out_.data(), count * d, T(1));
    route(first, count, logits);
    std::fill_n(de, count * joined, T(0));
    std::fill_n(dshare_.data(), count * s_.modalities, T(0));
    for (int64_t m = 0; m < s_.modalities; ++m) {
      run_expert(m, count, true);
      const auto rows = static_cast<int64_t>(chosen_.size());
      for (int64_t j = 0; j < rows; ++j) {
        const int64_t i = chosen_[j];
        const T* g = out_.data() + i * d;
        dshare_.data()[i * s_.modalities + m] = dot(d, g, x_.data() + j * d);
        for (int64_t k = 0; k < d; ++k) dx_.data()[j * d + k] = routings_[i].share[m] * g[k];
      }
      multiply<T>(rows, f, d, dx_.data(), d, 1, plain(plan_.weights.w2 + m * d * f, f), dz_.data(), f, Into::overwrite);
      for (int64_t k = 0; k < rows * f; ++k) dz_.data()[k] *= slope_.data()[k];
      turns.wait(block, step);
      multiply<T>(d, f, rows, dx_.data(), 1, d, plain(a_.data(), f), grads.w2 + m * d * f, f, into);
      multiply<T>(f, d, rows, dz_.data(), 1, f, plain(own_.data(), d), grads.w1 + m * f * d, d, into);
      sum_rows(rows, d, dx_.data(), d, add, grads.b2 + m * d);
      sum_rows(rows, f, dz_.data(), f, add, grads.b1 + m * f);
      turns.pass(block, step++);
      multiply<T>(rows, d, f, dz_.data(), f, 1, plain(plan_.weights.w1 + m * f * d, d), dx_.data(), d, Into::add);
      for (int64_t j = 0; j < rows; ++j) std::copy_n(dx_.data() + j * d, d, de + chosen_[j] * joined + m * d);
    }
    router_back(first, count, grad_probability, total, de);
    turns.wait(block, step);
    multiply<T>(s_.modalities, joined, count, dlogits_.data(), 1, s_.modalities, plain(e_.data(), joined),
                grads.router_weight, joined, into);
    sum_rows(count, s_.modalities, dlogits_.data(), s_.modalities, add, grads.router_bias);
    turns.pass(block, step);
    const Stored own = plan_.inputs.type;
    convert_to(own, de, static_cast<char*>(grad_embeddings) + first * joined * bytes_of(own), count * joined);
  }

 private:
  void read_embeddings(int64_t first, int64_t count) {
    const int64_t joined = s_.modalities * s_.width;
    const Stored type = plan_.inputs.type;
    convert_from(type, static_cast<const char*>(plan_.inputs.embeddings) + first * joined * bytes_of(type), e_.data(),
                 count * joined, T(1));
    for (int64_t i = 0; i < count; ++i) zero_absent(first + i, e_.data() + i * joined);
  }

  void zero_absent(int64_t item, T* joined) const {
    if (!plan_.inputs.present) return;
    for (int64_t m = 0; m < s_.modalities; ++m)
      if (!plan_.inputs.present[item * s_.modalities + m]) std::fill_n(joined + m * s_.width, s_.width, T(0));
  }

  void route(int64_t first, int64_t count, const T* logits) {
    for (int64_t i = 0; i < count; ++i) {
      const bool* present = plan_.inputs.present ? plan_.inputs.present + (first + i) * s_.modalities : nullptr;
      routings_[i].route(logits + (first + i) * s_.modalities, present, s_.top_k);
    }
  }

  // own = e of the items that chose expert m (chosen_), z and a its inner values, x = E_m(own); for the backward slope,
  // the derivative of a by z, too.
  void run_expert(int64_t m, int64_t count, bool backward) {
    const int64_t joined = s_.modalities * s_.width, d = s_.width, f = s_.expansion;
    chosen_.clear();
    for (int64_t i = 0; i < count; ++i)
      if (routings_[i].runs[m]) {
        std::copy_n(e_.data() + i * joined + m * d, d, own_.data() + static_cast<int64_t>(chosen_.size()) * d);
        chosen_.push_back(i);
      }
    const auto rows = static_cast<int64_t>(chosen_.size());
    multiply<T>(rows, f, d, own_.data(), d, 1, plan_.w1[m], z_.data(), f, Into::overwrite, plan_.weights.b1 + m * f);
    if (backward)
      activate_both(Activation::gelu, rows * f, z_.data(), a_.data(), slope_.data());
    else
      activate(Activation::gelu, rows * f, z_.data(), a_.data());
    std::copy_n(own_.data(), rows * d, x_.data());
    multiply<T>(rows, d, f, a_.data(), f, 1, plan_.w2[m], x_.data(), d, Into::add, plan_.weights.b2 + m * d);
  }

  // dlogits from the shares and from the balance; de += dlogits W_r, nothing where a modality is absent.
  void router_back(int64_t first, int64_t count, const T* grad_probability, double total, T* grad_e) {
    const int64_t joined = s_.modalities * s_.width;
    std::vector<T>& balance = balance_;
    balance.resize(static_cast<size_t>(s_.modalities));
    for (int64_t m = 0; m < s_.modalities; ++m) router_rows_[m] = plan_.weights.router_weight + m * joined;
    for (int64_t i = 0; i < count; ++i) {
      T* dlogits = dlogits_.data() + i * s_.modalities;
      std::fill_n(dlogits, s_.modalities, T(0));
      softmax_backward(routings_[i].share, dshare_.data() + i * s_.modalities, dlogits);
      const double weight = weight_of(plan_.inputs, s_.modalities, first + i) / total;
      for (int64_t m = 0; m < s_.modalities; ++m) balance[m] = static_cast<T>(weight) * grad_probability[m];
      softmax_backward(routings_[i].probability, balance.data(), dlogits);
      T* de = grad_e + i * joined;
      mix<T>(joined, de, T(1), static_cast<int>(s_.modalities), router_rows_.data(), dlogits, de);
      zero_absent(first + i, de);
    }
  }

  const Plan<T>& plan_;
  const Sizes& s_;
  Buffer<T> e_, de_, own_, x_, dx_, out_, z_, a_, slope_, dz_, dshare_, dlogits_;
  std::vector<Routing<T>> routings_;
  std::vector<int64_t> chosen_;
  std::vector<const T*> router_rows_;
  std::vector<T> balance_;
};

int64_t blocks_of(const Sizes& sizes) { return (sizes.items + kBlock - 1) / kBlock; }

double atleast_tiny(double value) { return std::max(value, std::numeric_limits<double>::min()); }

}  // namespace

template <class T>
void forward(const Sizes& s, const Inputs& inputs, const Weights<const T*>& weights, Stored type, void* items,
             T* logits, T* assigned, T* probability) {
  const int64_t count = blocks_of(s), workers = workers_for(count), each = 2 * s.modalities + 1;
  const Plan<T> plan(s, inputs, weights);
  std::vector<Block<T>> blocks;
  for (int64_t w = 0; w < workers; ++w) blocks.emplace_back(plan);
  std::vector<double> sums(static_cast<size_t>(count * each));
  run_tasks(workers, count, [&](int64_t w, int64_t b) {
    blocks[static_cast<size_t>(w)].forward(b * kBlock, std::min(kBlock, s.items - b * kBlock), type, items, logits,
                                           sums.data() + b * each);
  });
  for (int64_t b = 1; b < count; ++b)
    for (int64_t j = 0; j < each; ++j) sums[static_cast<size_t>(j)] += sums[static_cast<size_t>(b * each + j)];
  sums.resize(static_cast<size_t>(each));
  double assignments = 0;
  for (int64_t m = 0; m < s.modalities; ++m) assignments += sums[static_cast<size_t>(m)];
  for (int64_t m = 0; m < s.modalities; ++m) {
    assigned[m] = static_cast<T>(sums[static_cast<size_t>(m)] / atleast_tiny(assignments));
    probability[m] = static_cast<T>(sums[static_cast<size_t>(s.modalities + m)] /
                                    atleast_tiny(sums[static_cast<size_t>(2 * s.modalities)]));
  }
}

template <class T>
void backward(const Sizes& s, const Inputs& inputs, const Weights<const T*>& weights, Stored type,
              const void* grad_items, const T* grad_probability, const T* logits, void* grad_embeddings,
              const Weights<T*>& grads) {
  const int64_t count = blocks_of(s), workers = workers_for(count);
  const Plan<T> plan(s, inputs, weights);
  std::vector<Block<T>> blocks;
  for (int64_t w = 0; w < workers; ++w) blocks.emplace_back(plan);
  double total = 0;
  for (int64_t i = 0; i < s.items; ++i) total += weight_of(inputs, s.modalities, i);
  Turns turns(count);
  run_tasks(workers, count, [&](int64_t w, int64_t b) {
    turns.guard([&] {
      blocks[static_cast<size_t>(w)].backward(b, b * kBlock, std::min(kBlock, s.items - b * kBlock), type, grad_items,
                                              grad_probability, atleast_tiny(total), logits, grad_embeddings, grads,
                                              turns);
    });
  });
}

#define INSTANTIATE(T)                                                                                            \
  template void forward<T>(const Sizes&, const Inputs&, const Weights<const T*>&, Stored, void*, T*, T*, T*);     \
  template void backward<T>(const Sizes&, const Inputs&, const Weights<const T*>&, Stored, const void*, const T*, \
                            const T*, void*, const Weights<T*>&);
INSTANTIATE(float)
INSTANTIATE(double)

}  // namespace crossan_fast::fusion
