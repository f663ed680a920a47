// in_batch_loss and full_loss: their border, and which rows and columns each gives to the streaming softmax.

#include "bridge.h"
#include "library.h"
#include "softmax_loss.h"

namespace crossan_fast::library {
namespace {

void check_embeddings(const char* name, const Tensor& tensor, int64_t dims, at::ScalarType type) {
  check_device(name, tensor, at::kCPU);
  check_type(name, tensor, {type});
  TORCH_CHECK_VALUE(tensor.dim() == dims && tensor.size(-1) > 0, name, ": expected ", dims,
                    " dimensions, the last not empty, got ", described(tensor));
}

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
    const SoftmaxLoss<T> loss{width,   columns, own_users.const_data_ptr<T>(), own_items.const_data_ptr<T>(),
                              rows,    targets, negative.data(),               positive.data(),
                              place,   sequence + 1};
    return run(loss, zero);
  });
}

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
    const SoftmaxLoss<T> loss{width,   items.size(0) - 1, own_users.const_data_ptr<T>(),
                              own_items.const_data_ptr<T>() + width,
                              rows,    columns,           nullptr,
                              nullptr, nullptr,           0};
    return run(loss, zero);
  });
}

template <class T>
Pair forward(const SoftmaxLoss<T>& loss, at::IntArrayRef rows) {
  constexpr at::ScalarType type = kScalarType<T>;
  Tensor value = empty({}, type), lse = zeros(rows, type);
  *value.template mutable_data_ptr<T>() = softmax_loss(loss, lse.template mutable_data_ptr<T>());
  return {value, lse};
}

template <class T>
Pair backward(const SoftmaxLoss<T>& loss, const Tensor& grad, const Tensor& lse, const Tensor& users,
              const Tensor& items, int64_t skipped) {
  constexpr at::ScalarType type = kScalarType<T>;
  check_device("grad_loss", grad, at::kCPU);
  check_device("lse", lse, at::kCPU);
  TORCH_CHECK_VALUE(grad.numel() == 1, "grad_loss: expected a scalar, got ", described(grad));
  check_shape("lse", lse, users.sizes().slice(0, static_cast<size_t>(users.dim() - 1)));
  const Tensor own = in_type<T>(lse), scale = in_type<T>(grad);
  Tensor grad_users = empty(users.sizes(), type), grad_items = empty(items.sizes(), type);
  T* user = grad_users.template mutable_data_ptr<T>();
  T* item = grad_items.template mutable_data_ptr<T>();
  int64_t next = 0;  // what the kernel leaves out: rows without a target, the padding item of the full loss
  for (const int64_t row : loss.rows) {
    std::fill(user + next * loss.width, user + row * loss.width, T(0));
    next = row + 1;
  }
  std::fill(user + next * loss.width, user + grad_users.numel(), T(0));
  std::fill_n(item, skipped * loss.width, T(0));
  softmax_loss_backward(loss, *scale.template const_data_ptr<T>(), own.template const_data_ptr<T>(), user,
                        item + skipped * loss.width);
  return {grad_users.to(users.scalar_type()), grad_items.to(items.scalar_type())};
}

}  // namespace

Pair in_batch_loss(const Tensor& users, const Tensor& items, const Tensor& slots, const Tensor& counts,
                   const Tensor& log_popularity) {
  return with_in_batch(users, items, slots, counts, log_popularity, [&](const auto& loss, auto) {
    return forward(loss, {users.size(0), users.size(1)});
  });
}

Pair in_batch_loss_backward(const Tensor& grad, const Tensor& lse, const Tensor& users, const Tensor& items,
                            const Tensor& slots, const Tensor& counts, const Tensor& log_popularity) {
  return with_in_batch(users, items, slots, counts, log_popularity, [&](const auto& loss, auto) {
    return backward(loss, grad, lse, users, items, 0);
  });
}

Pair full_loss(const Tensor& users, const Tensor& items, const Tensor& targets) {
  return with_full(users, items, targets, [&](const auto& loss, auto) { return forward(loss, {users.size(0)}); });
}

Pair full_loss_backward(const Tensor& grad, const Tensor& lse, const Tensor& users, const Tensor& items,
                        const Tensor& targets) {
  return with_full(users, items, targets,
                   [&](const auto& loss, auto) { return backward(loss, grad, lse, users, items, 1); });
}


}  // namespace crossan_fast::library
