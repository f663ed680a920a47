// What the borders of in_batch_loss and full_loss share; each gives its own rows and columns to the streaming softmax.
#pragma once

#include "border.h"
#include "library.h"
#include "streaming_softmax.h"

namespace crossan_fast::border {

inline void check_embeddings(const char* name, const Tensor& tensor, int64_t dims, at::ScalarType type) {
  check_device(name, tensor, at::kCPU);
  check_type(name, tensor, {type});
  TORCH_CHECK_VALUE(tensor.dim() == dims && tensor.size(-1) > 0, name, ": expected ", dims,
                    " dimensions, the last not empty, got ", described(tensor));
}

template <class T>
Pair loss_forward(const SoftmaxLoss<T>& loss, at::IntArrayRef rows) {
  constexpr at::ScalarType type = kScalarType<T>;
  Tensor value = empty({}, type), lse = zeros(rows, type);
  *value.template mutable_data_ptr<T>() = softmax_loss(loss, lse.template mutable_data_ptr<T>());
  return {value, lse};
}

template <class T>
Pair loss_backward(const SoftmaxLoss<T>& loss, const Tensor& grad, const Tensor& lse, const Tensor& users,
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

}  // namespace crossan_fast::border
