// rank_of_target and topk_scores against the definition, on scores that many items share.
#include <algorithm>
#include <cmath>
#include <utility>

#include "driver.h"

namespace crossan_fast::arm {
namespace {

constexpr int64_t kBatch = 70, kWidth = 24, kHistory = 5, kBest = 13;

struct Call {
  Tensor users, items, targets, exclude;
};

// Multiples of an eighth: their products and sums are exact, so that ties are, and the order of a sum is no matter.
Tensor eighths(Draw& draw, at::IntArrayRef shape, at::ScalarType type) {
  const Tensor tensor(shape, at::kFloat);
  for (int64_t i = 0; i < tensor.numel(); ++i)
    tensor.mutable_data_ptr<float>()[i] = static_cast<float>(draw.below(17) - 8) / 8;
  return tensor.to(type);
}

Call call_of(int64_t catalogue, at::ScalarType type) {
  Draw draw(16);
  const Tensor users = eighths(draw, {kBatch, kWidth}, type), items = eighths(draw, {catalogue + 1, kWidth}, type);
  return {users, items, draw.ids({kBatch}, 1, catalogue + 1), draw.ids({kBatch, kHistory}, 0, catalogue + 1)};
}

// Every score of a user, rounded as the op's type is; −inf where excluded.
std::vector<double> scores_of(const Call& call, int64_t user) {
  const Tensor users = call.users.to(at::kDouble), items = call.items.to(at::kDouble);
  const Tensor scores({items.size(0) - 1}, at::kDouble);
  for (int64_t id = 1; id < items.size(0); ++id) {
    double& sum = scores.mutable_data_ptr<double>()[id - 1] = 0;
    for (int64_t d = 0; d < kWidth; ++d)
      sum += users.const_data_ptr<double>()[user * kWidth + d] * items.const_data_ptr<double>()[id * kWidth + d];
  }
  const Tensor rounded = scores.to(call.users.scalar_type()).to(at::kDouble);
  std::vector<double> all(rounded.const_data_ptr<double>(), rounded.const_data_ptr<double>() + rounded.numel());
  for (int64_t h = 0; h < kHistory; ++h)
    if (const int64_t id = call.exclude.const_data_ptr<int64_t>()[user * kHistory + h]; id > 0)
      all[static_cast<size_t>(id - 1)] = -INFINITY;
  return all;
}

Outputs by_definition(const Call& call) {
  const Tensor ranks({kBatch}, at::kLong), scores({kBatch, kBest}, at::kDouble), ids({kBatch, kBest}, at::kLong);
  for (int64_t b = 0; b < kBatch; ++b) {
    const auto all = scores_of(call, b);
    const double bar = all[static_cast<size_t>(call.targets.const_data_ptr<int64_t>()[b] - 1)];
    ranks.mutable_data_ptr<int64_t>()[b] =
        std::count_if(all.begin(), all.end(), [&](double score) { return score >= bar; });
    std::vector<std::pair<double, int64_t>> order;  // −score, id
    for (size_t i = 0; i < all.size(); ++i) order.emplace_back(-all[i], static_cast<int64_t>(i) + 1);
    std::sort(order.begin(), order.end());
    for (int64_t k = 0; k < kBest; ++k) {
      const bool found = k < static_cast<int64_t>(order.size()) && order[static_cast<size_t>(k)].first < INFINITY;
      scores.mutable_data_ptr<double>()[b * kBest + k] = found ? -order[static_cast<size_t>(k)].first : -INFINITY;
      ids.mutable_data_ptr<int64_t>()[b * kBest + k] = found ? order[static_cast<size_t>(k)].second : 0;
    }
  }
  return {{"ranks", ranks}, {"scores", scores}, {"ids", ids}};
}

}  // namespace

void judge_ranking() {
  for (const auto type : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf})
    for (const int64_t catalogue : {9, 301, 8200}) {  // fewer than asked for; one segment; two
      if (catalogue > 1000 && type != at::kFloat) continue;
      judge(c10::str("ranking ", catalogue, " items, ", type), 0, [&](at::ScalarType as) -> Outputs {
        const Call call = call_of(catalogue, type);
        if (as == at::kDouble) return by_definition(call);
        const auto [scores, ids] = border::topk_scores(call.users, call.items, kBest, call.exclude);
        return {{"ranks", border::rank_of_target(call.users, call.items, call.targets, call.exclude)},
                {"scores", scores},
                {"ids", ids}};
      });
    }
}

}  // namespace crossan_fast::arm
