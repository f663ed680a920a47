// The borders of the ops: each checks every argument, then hands pointers to the kernels. Defined in each op's file,
// or in border.cpp of its folder; registered in library.cpp, which alone pays for the headers of torch's registration.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>
#include <vector>

namespace crossan_fast::border {

using at::Tensor;
using at::TensorList;
using OptionalTensor = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;

// at::empty and at::zeros on the CPU, compiled once.
Tensor empty(at::IntArrayRef shape, at::ScalarType type);
Tensor zeros(at::IntArrayRef shape, at::ScalarType type);

std::vector<Tensor> side_network(TensorList states, TensorList scales, const OptionalTensor& ids,
                                 const OptionalTensor& present, TensorList weights, at::IntArrayRef widths,
                                 at::IntArrayRef sources, c10::string_view cross, c10::string_view activation,
                                 double temperature, c10::string_view cross_projection, at::ScalarType dtype);
std::vector<Tensor> side_network_backward(const Tensor& grad_embeddings, const Tensor& saved, const Tensor& links,
                                          TensorList states, TensorList scales, const OptionalTensor& ids,
                                          const OptionalTensor& present, TensorList weights, at::IntArrayRef widths,
                                          at::IntArrayRef sources, c10::string_view cross, c10::string_view activation,
                                          double temperature, c10::string_view cross_projection, at::ScalarType dtype);

std::vector<Tensor> fusion(const Tensor& embeddings, TensorList weights, const OptionalTensor& present,
                           std::optional<int64_t> top_k, const OptionalTensor& counts, at::ScalarType dtype);
std::vector<Tensor> fusion_backward(const Tensor& grad_items, const Tensor& grad_probability, const Tensor& logits,
                                    const Tensor& embeddings, TensorList weights, const OptionalTensor& present,
                                    std::optional<int64_t> top_k, const OptionalTensor& counts, at::ScalarType dtype);

// users [B, S, d], zeros at padding, and what the backward needs: [B·S, kept_width], or no rows where nothing does.
Pair sequence_encoder(const Tensor& items, const Tensor& mask, TensorList weights, int64_t heads, double eps,
                      double dropout, const OptionalTensor& seed, bool keep, at::ScalarType dtype);
std::vector<Tensor> sequence_encoder_backward(const Tensor& grad_users, const Tensor& kept, const Tensor& items,
                                              const Tensor& mask, TensorList weights, int64_t heads, double eps,
                                              double dropout, const OptionalTensor& seed, at::ScalarType dtype);

Pair in_batch_loss(const Tensor& users, const Tensor& items, const Tensor& slots, const Tensor& counts,
                   const Tensor& log_popularity);
Pair in_batch_loss_backward(const Tensor& grad, const Tensor& lse, const Tensor& users, const Tensor& items,
                            const Tensor& slots, const Tensor& counts, const Tensor& log_popularity);
Pair full_loss(const Tensor& users, const Tensor& items, const Tensor& targets);
Pair full_loss_backward(const Tensor& grad, const Tensor& lse, const Tensor& users, const Tensor& items,
                        const Tensor& targets);

Tensor rank_of_target(const Tensor& users, const Tensor& items, const Tensor& targets, const OptionalTensor& exclude);
Pair topk_scores(const Tensor& users, const Tensor& items, int64_t k, const OptionalTensor& exclude);
std::tuple<Tensor, Tensor, Tensor> deduplicate(const Tensor& item_ids, std::optional<int64_t> capacity);

}  // namespace crossan_fast::border
