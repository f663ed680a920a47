// in_batch_loss's border, and the rows, columns and corrections that it gives to the streaming softmax.
#include <cmath>
#include <limits>

#include "streaming_loss.h"

namespace crossan_fast::border {
namespace {

// Runs with the loss of a batch, whose tensors outlive the call: `run(loss, T)`.
template <class F>
auto with_in_batch(const Tensor& users, const Tensor& items, const Tensor& slots, const Tensor& counts,
                   const Tensor& log_popularity, F&& run) {
  check_embeddings("users", users, 3, users.scalar_type());
  check_embeddings("items", items, 2, users.scalar_type());
  const int64_t batch = users.size(0), sequence = users.size(1), width = users.size(2), columns = items.size(0);
  check_shape("items", items, {columns, width});
  for (const auto& [name, tensor] : {std::pair("slots", slots), {"counts", counts}, {"log_popularity", log_popularity}})
    check_device(name, tensor, at::kCPU);
  check_shape("slots", slots, {batch, sequence + 1});
  check_shape("counts", counts, {columns});
  check_type("counts", counts, {at::kLong});
  check_shape("log_popularity", log_popularity, {columns});
  check_floating("log_popularity", log_popularity);
  const Tensor slot_ids = checked_ids("slots", slots, 0, columns);
  return in_compute_type(users.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Tensor own_users = in_type<T>(users), own_items = in_type<T>(items), popularity = in_type<T>(log_popularity);
    const Tensor own_counts = counts.contiguous();
    const int64_t* place = slot_ids.const_data_ptr<int64_t>();
    std::vector<int64_t> rows, targets;
    rows.reserve(static_cast<size_t>(batch * sequence));
    targets.reserve(rows.capacity());
    for (int64_t b = 0; b < batch; ++b)
      for (int64_t s = 0; s < sequence; ++s) {
        const int64_t* here = place + b * (sequence + 1) + s;
        if (here[0] == 0 || here[1] == 0) continue;
        rows.push_back(b * sequence + s);
        targets.push_back(here[1]);
      }
    std::vector<T> negative(static_cast<size_t>(columns)), positive(static_cast<size_t>(columns));
    for (int64_t u = 0; u < columns; ++u) {
      const int64_t n = own_counts.const_data_ptr<int64_t>()[u];
      const T correction = -popularity.const_data_ptr<T>()[u];
      positive[static_cast<size_t>(u)] = correction;
      negative[static_cast<size_t>(u)] =
          n > 1 ? correction + std::log(static_cast<T>(n))
                : (n == 1 ? correction : -std::numeric_limits<T>::infinity());  // most are 1
    }
    const SoftmaxLoss<T> loss{width,
                              columns,
                              own_users.const_data_ptr<T>(),
                              own_items.const_data_ptr<T>(),
                              rows,
                              targets,
                              negative.data(),
                              positive.data(),
                              place,
                              sequence + 1};
    return run(loss, zero);
  });
}

}  // namespace

Pair in_batch_loss(const Tensor& users, const Tensor& items, const Tensor& slots, const Tensor& counts,
                   const Tensor& log_popularity) {
  return with_in_batch(users, items, slots, counts, log_popularity,
                       [&](const auto& loss, auto) { return loss_forward(loss, {users.size(0), users.size(1)}); });
}

Pair in_batch_loss_backward(const Tensor& grad, const Tensor& lse, const Tensor& users, const Tensor& items,
                            const Tensor& slots, const Tensor& counts, const Tensor& log_popularity) {
  return with_in_batch(users, items, slots, counts, log_popularity,
                       [&](const auto& loss, auto) { return loss_backward(loss, grad, lse, users, items, 0); });
}

}  // namespace crossan_fast::border
