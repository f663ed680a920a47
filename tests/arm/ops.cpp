// fusion, sequence_encoder, the losses and deduplicate.
#include <cmath>

#include "driver.h"

namespace crossan_fast::arm {
namespace {

using Shape = std::vector<int64_t>;

double inverse_root(int64_t width) { return 1 / std::sqrt(static_cast<double>(width)); }

Outputs fusion(int64_t items, int64_t width, at::ScalarType stored, std::optional<int64_t> top_k, bool absent,
               at::ScalarType type) {
  constexpr int64_t modalities = 3;
  const int64_t inner = 2 * width + 1;
  Draw draw(11);
  const Tensor embeddings = draw.normals({items, modalities, width}, stored);
  std::optional<Tensor> present, counts;
  if (absent) {
    present = draw.flags({items, modalities}, 0.6);
    counts = draw.ids({items}, 0, 4);
  }
  const std::vector<Tensor> weights{
      draw.normals({modalities, modalities * width}, type, inverse_root(width)),
      draw.normals({modalities}, type, 0.1),
      draw.normals({modalities, inner, width}, type, inverse_root(width)),
      draw.normals({modalities, inner}, type, 0.1),
      draw.normals({modalities, width, inner}, type, inverse_root(inner)),
      draw.normals({modalities, width}, type, 0.1),
  };
  const auto out = border::fusion(embeddings, weights, present, top_k, counts, type);
  Outputs outputs{{"items", out[0]}, {"assigned", out[1]}, {"probability", out[2]}, {"logits", out[3]}};
  const Tensor grad = draw.normals({items, width}, type), balance = draw.normals({modalities}, type);
  const auto grads = border::fusion_backward(grad, balance, out[3], embeddings, weights, present, top_k, counts, type);
  const char* names[] = {"de", "drouter_weight", "drouter_bias", "dw1", "db1", "dw2", "db2"};
  for (size_t i = 0; i < grads.size(); ++i) outputs.push_back({names[i], grads[i]});
  outputs[6].like = 5;  // a softmax's gradients sum to nothing over experts, and here nearly so over items
  return outputs;
}

Outputs sequence_encoder(int64_t width, int64_t heads, int64_t inner, double dropout, at::ScalarType type) {
  constexpr int64_t batch = 9, places = 11, window = 13, layers = 2;
  Draw draw(12);
  const Tensor items = draw.normals({batch, places, width}, type), mask({batch, places}, at::kBool);
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t real = b == 0 ? places : draw.below(places + 1);  // at the end
    for (int64_t s = 0; s < places; ++s) mask.mutable_data_ptr<bool>()[b * places + s] = s >= places - real;
  }
  const Shape shapes[] = {{width, width}, {width, width}, {width, width}, {width, width}, {width}, {width},
                          {inner, width}, {inner},        {width, inner}, {width},        {width}, {width}};
  std::vector<Tensor> weights{draw.normals({window, width}, type), draw.normals({width}, type),
                              draw.normals({width}, type)};
  for (int64_t l = 0; l < layers; ++l)
    for (const Shape& shape : shapes)
      weights.push_back(draw.normals(shape, type, shape.size() == 2 ? inverse_root(shape[1]) : 1.0));
  const Tensor seed({}, at::kLong);
  *seed.mutable_data_ptr<int64_t>() = -77;
  const auto [users, kept] = border::sequence_encoder(items, mask, weights, heads, 1e-5, dropout, seed, true, type);
  const auto unkept = border::sequence_encoder(items, mask, weights, heads, 1e-5, dropout, seed, false, type);
  Outputs outputs{{"users", users}, {"users, nothing kept", std::get<0>(unkept)}};
  const auto grads = border::sequence_encoder_backward(draw.normals({batch, places, width}, type), kept, items, mask,
                                                       weights, heads, 1e-5, dropout, seed, type);
  for (size_t i = 0; i < grads.size(); ++i)
    outputs.push_back({i == 0 ? "ditems" : "dweights " + std::to_string(i - 1), grads[i]});
  return outputs;
}

Outputs in_batch_loss(int64_t batch, int64_t catalogue, int64_t width, at::ScalarType type) {
  constexpr int64_t places = 11;
  Draw draw(13);
  const auto [ids, slots, counts] = border::deduplicate(draw.ids({batch, places + 1}, 0, catalogue), {});
  const int64_t columns = ids.size(0);
  const Tensor users = draw.normals({batch, places, width}, type), items = draw.normals({columns, width}, type);
  const Tensor popularity = draw.normals({columns}, type), grad = draw.normals({}, type);
  const auto [loss, lse] = border::in_batch_loss(users, items, slots, counts, popularity);
  const auto [dusers, ditems] = border::in_batch_loss_backward(grad, lse, users, items, slots, counts, popularity);
  return {{"loss", loss}, {"lse", lse}, {"dusers", dusers}, {"ditems", ditems}};
}

Outputs full_loss(int64_t rows, int64_t catalogue, int64_t width, at::ScalarType type) {
  Draw draw(14);
  const Tensor users = draw.normals({rows, width}, type), items = draw.normals({catalogue + 1, width}, type);
  const Tensor targets = draw.ids({rows}, 0, catalogue + 1), grad = draw.normals({}, type);
  const auto [loss, lse] = border::full_loss(users, items, targets);
  const auto [dusers, ditems] = border::full_loss_backward(grad, lse, users, items, targets);
  return {{"loss", loss}, {"lse", lse}, {"dusers", dusers}, {"ditems", ditems}};
}

}  // namespace

void judge_fusion() {
  for (const auto stored : {at::kFloat, at::kBFloat16, at::kHalf})
    for (const int64_t top_k : {0, 1, 2})
      for (const bool absent : {false, true}) {
        const int64_t items = absent ? 131 : 37, width = top_k == 1 ? 32 : 24;
        const auto k = top_k > 0 ? std::optional(top_k) : std::nullopt;
        judge(c10::str("fusion ", items, " items, ", stored, ", top_k ", top_k, absent ? ", some absent" : ""),
              3 * width + 2 * width + items,
              [&](at::ScalarType type) { return fusion(items, width, stored, k, absent, type); });
      }
}

void judge_sequence_encoder() {
  for (const auto& [width, heads] : {std::pair<int64_t, int64_t>{24, 3}, {70, 2}, {64, 4}})
    for (const double dropout : {0.0, 0.3})
      judge(c10::str("sequence_encoder width ", width, ", ", heads, " heads, dropout ", dropout),
            2 * (4 * width + 70 + 11) + 99,
            [&](at::ScalarType type) { return sequence_encoder(width, heads, 70, dropout, type); });
}

void judge_losses() {
  for (const auto& [batch, catalogue, width] : {std::tuple<int64_t, int64_t, int64_t>{4, 37, 24}, {37, 500, 70}}) {
    const int64_t depth = width + catalogue + batch * 11;
    judge(c10::str("in_batch_loss ", batch, " users, ", catalogue, " items, width ", width), depth,
          [&](at::ScalarType type) { return in_batch_loss(batch, catalogue, width, type); });
    judge(c10::str("full_loss ", batch * 11, " rows, ", catalogue, " items, width ", width), depth,
          [&](at::ScalarType type) { return full_loss(batch * 11, catalogue, width, type); });
  }
}

void judge_deduplicate() {
  for (const int64_t largest : {int64_t{40}, int64_t{5000}, int64_t{1} << 50}) {  // bits, bits, sorted
    judge(c10::str("deduplicate ids below ", largest), 0, [&](at::ScalarType type) {
      Draw draw(15);
      const Tensor places = draw.ids({37, 11}, 0, largest);
      const std::optional<int64_t> capacity = type == at::kDouble ? std::nullopt : std::optional<int64_t>(408);
      auto [ids, slots, counts] = border::deduplicate(places, capacity);
      // The second time without a capacity; and what ids and slots must give together.
      const Tensor again(places.sizes(), at::kLong), times({}, at::kLong);
      *times.mutable_data_ptr<int64_t>() = 0;
      for (int64_t i = 0; i < places.numel(); ++i)
        again.mutable_data_ptr<int64_t>()[i] = ids.const_data_ptr<int64_t>()[slots.const_data_ptr<int64_t>()[i]];
      for (int64_t i = 0; i < ids.numel(); ++i)
        *times.mutable_data_ptr<int64_t>() += counts.const_data_ptr<int64_t>()[i];
      return Outputs{{"slots", slots}, {"ids of slots", type == at::kDouble ? places : again}, {"places", times}};
    });
  }
}

}  // namespace crossan_fast::arm
