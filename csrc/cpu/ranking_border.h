// What the borders of topk_scores and rank_of_target share.
#pragma once

#include "border.h"
#include "library.h"
#include "ranking.h"

namespace crossan_fast::border {

// `run(ranking)` while the tensors behind it live.
template <class F>
auto with_ranking(const Tensor& users, const Tensor& items, const OptionalTensor& exclude, F&& run) {
  check_device("users", users, at::kCPU);
  check_device("items", items, at::kCPU);
  check_floating("users", users);
  check_type("items", items, {users.scalar_type()});
  TORCH_CHECK_VALUE(users.dim() == 2 && users.size(1) > 0, "users: expected [B, d], got ", described(users));
  TORCH_CHECK_VALUE(items.dim() == 2 && items.size(0) > 0 && items.size(1) == users.size(1), "items: expected [I + 1, ",
                    users.size(1), "], got ", described(items));
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

}  // namespace crossan_fast::border
