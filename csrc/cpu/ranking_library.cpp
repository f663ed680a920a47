// The border of topk_scores, rank_of_target and deduplicate.
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>

#include "bridge.h"
#include "ranking.h"

namespace crossan_fast {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// `run(ranking)` while the tensors behind it live.
template <class F>
auto with_ranking(const Tensor& users, const Tensor& items, const OptionalTensor& exclude, F&& run) {
  check_device("users", users, at::kCPU);
  check_device("items", items, at::kCPU);
  check_floating("users", users);
  check_type("items", items, {users.scalar_type()});
  TORCH_CHECK_VALUE(users.dim() == 2 && users.size(1) > 0, "users: expected [B, d], got ", described(users));
  TORCH_CHECK_VALUE(items.dim() == 2 && items.size(0) > 0 && items.size(1) == users.size(1),
                    "items: expected [I + 1, ", users.size(1), "], got ", described(items));
  Tensor excluded;
  if (exclude) {
    check_device("exclude", *exclude, at::kCPU);
    check_type("exclude", *exclude, {at::kLong});
    TORCH_CHECK_VALUE(exclude->dim() == 2 && exclude->size(0) == users.size(0), "exclude: expected [", users.size(0),
                      ", H], got ", described(*exclude));
    excluded = exclude->contiguous();
  }
  return in_compute_type(users.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Tensor own_users = in_type<T>(users), own_items = in_type<T>(items);
    const Ranking<T> ranking{users.size(0),
                             users.size(1),
                             items.size(0) - 1,
                             own_users.const_data_ptr<T>(),
                             own_items.const_data_ptr<T>() + users.size(1),
                             stored_type(users.scalar_type()),
                             exclude ? excluded.const_data_ptr<int64_t>() : nullptr,
                             exclude ? excluded.size(1) : 0};
    return run(ranking, zero);
  });
}

Tensor rank(const Tensor& users, const Tensor& items, const Tensor& targets, const OptionalTensor& exclude) {
  return with_ranking(users, items, exclude, [&](const auto& ranking, auto) {
    check_device("targets", targets, at::kCPU);
    check_shape("targets", targets, {users.size(0)});
    const Tensor ids = checked_ids("targets", targets, 1, items.size(0));
    Tensor ranks = at::empty({users.size(0)}, at::TensorOptions().dtype(at::kLong));
    rank_of_target(ranking, ids.const_data_ptr<int64_t>(), ranks.mutable_data_ptr<int64_t>());
    return ranks;
  });
}

std::tuple<Tensor, Tensor> topk(const Tensor& users, const Tensor& items, int64_t k, const OptionalTensor& exclude) {
  TORCH_CHECK_VALUE(k >= 1, "k: expected at least 1, got ", k);
  return with_ranking(users, items, exclude, [&](const auto& ranking, auto zero) {
    using T = decltype(zero);
    Tensor scores = at::empty({users.size(0), k}, at::TensorOptions().dtype(kScalarType<T>));
    Tensor ids = at::empty({users.size(0), k}, at::TensorOptions().dtype(at::kLong));
    topk_scores(ranking, k, scores.template mutable_data_ptr<T>(), ids.mutable_data_ptr<int64_t>());
    return std::tuple(scores.to(users.scalar_type()), ids);
  });
}

std::tuple<Tensor, Tensor, Tensor> deduplicate(const Tensor& item_ids, std::optional<int64_t> capacity) {
  check_device("item_ids", item_ids, at::kCPU);
  check_type("item_ids", item_ids, {at::kLong, at::kInt});
  const Tensor places = item_ids.to(at::kLong).contiguous();
  const int64_t count = places.numel();
  const int64_t* place = places.const_data_ptr<int64_t>();
  std::vector<int64_t> distinct(place, place + count);
  distinct.push_back(0);
  std::sort(distinct.begin(), distinct.end());
  distinct.erase(std::unique(distinct.begin(), distinct.end()), distinct.end());
  const auto needed = static_cast<int64_t>(distinct.size());
  TORCH_CHECK_VALUE(distinct.front() == 0, "item_ids: expected ids of at least 0, got ", distinct.front());
  TORCH_CHECK_VALUE(!capacity || needed <= *capacity, "capacity: ", needed, " slots needed (padding included), got ",
                    *capacity);
  const auto options = at::TensorOptions().dtype(at::kLong);
  const int64_t size = capacity.value_or(needed);
  Tensor ids = at::empty({size}, options), slots = at::empty(item_ids.sizes(), options);
  Tensor counts = at::empty({size}, options);
  int64_t* id = ids.mutable_data_ptr<int64_t>();
  int64_t* slot = slots.mutable_data_ptr<int64_t>();
  int64_t* times = counts.mutable_data_ptr<int64_t>();
  std::fill(std::copy(distinct.begin(), distinct.end(), id), id + size, 0);
  std::fill_n(times, size, 0);
  for (int64_t i = 0; i < count; ++i) {
    slot[i] = std::lower_bound(distinct.begin(), distinct.end(), place[i]) - distinct.begin();
    ++times[slot[i]];
  }
  times[0] = 0;
  return {ids, slots, counts};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(crossan_fast_cpp, library) {
  library.def("rank_of_target(Tensor users, Tensor items, Tensor targets, Tensor? exclude) -> Tensor");
  library.def("topk_scores(Tensor users, Tensor items, int k, Tensor? exclude) -> (Tensor, Tensor)");
  library.def("deduplicate(Tensor item_ids, int? capacity) -> (Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(crossan_fast_cpp, CPU, library) {
  library.impl("rank_of_target", rank);
  library.impl("topk_scores", topk);
  library.impl("deduplicate", deduplicate);
}

}  // namespace crossan_fast
