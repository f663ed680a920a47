// full_loss's border, and the rows and columns that it gives to the streaming softmax.
#include "streaming_loss.h"

namespace crossan_fast::border {
namespace {

template <class F>
auto with_full(const Tensor& users, const Tensor& items, const Tensor& targets, F&& run) {
  check_embeddings("users", users, 2, users.scalar_type());
  check_embeddings("items", items, 2, users.scalar_type());
  const int64_t count = users.size(0), width = users.size(1);
  check_shape("items", items, {items.size(0), width});
  TORCH_CHECK_VALUE(items.size(0) > 0, "items: expected a padding row, got ", described(items));
  check_device("targets", targets, at::kCPU);
  check_shape("targets", targets, {count});
  const Tensor ids = checked_ids("targets", targets, 0, items.size(0));
  return in_compute_type(users.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Tensor own_users = in_type<T>(users), own_items = in_type<T>(items);
    std::vector<int64_t> rows, columns;
    for (int64_t i = 0; i < count; ++i)
      if (const int64_t id = ids.const_data_ptr<int64_t>()[i]; id != 0) {
        rows.push_back(i);
        columns.push_back(id - 1);
      }
    const SoftmaxLoss<T> loss{width,
                              items.size(0) - 1,
                              own_users.const_data_ptr<T>(),
                              own_items.const_data_ptr<T>() + width,
                              rows,
                              columns,
                              nullptr,
                              nullptr,
                              nullptr,
                              0};
    return run(loss, zero);
  });
}

}  // namespace

Pair full_loss(const Tensor& users, const Tensor& items, const Tensor& targets) {
  return with_full(users, items, targets, [&](const auto& loss, auto) { return loss_forward(loss, {users.size(0)}); });
}

Pair full_loss_backward(const Tensor& grad, const Tensor& lse, const Tensor& users, const Tensor& items,
                        const Tensor& targets) {
  return with_full(users, items, targets,
                   [&](const auto& loss, auto) { return loss_backward(loss, grad, lse, users, items, 1); });
}

}  // namespace crossan_fast::border
