// The streaming softmax that in_batch_loss and full_loss are made of.
#pragma once

#include <cstdint>
#include <vector>

namespace crossan_fast {

template <class T>
struct SoftmaxLoss {
  int64_t width, columns;               // d, and the number of candidate items
  const T* users;                       // [B·S, d]
  const T* items;                       // [columns, d]
  const std::vector<int64_t>& rows;     // of users, those with a target, ascending
  const std::vector<int64_t>& targets;  // of each such row, its column
  // For the in-batch loss, null for the full one: what is added to each column's score as a negative, and as a target;
  // and the columns of each row's own sequence, which are no negatives: slots [B, S + 1] with S rows a sequence.
  const T* negative;
  const T* positive;
  const int64_t* slots;
  int64_t places;  // S + 1
};

// The mean over rows; lse [B·S] is written where a row has a target.
template <class T>
T softmax_loss(const SoftmaxLoss<T>& loss, T* lse);

// Writes all of grad_items [columns, d], and of grad_users the rows that have a target.
template <class T>
void softmax_loss_backward(const SoftmaxLoss<T>& loss, T grad, const T* lse, T* grad_users, T* grad_items);

}  // namespace crossan_fast
