// Reads the static fields of side_network's schema, for every library; each adds limits of its own.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/string_view.h>

#include "side_network_fields.h"

namespace crossan_fast::side_network {

inline Fields read_fields(at::IntArrayRef widths, at::IntArrayRef sources, c10::string_view cross,
                          c10::string_view activation, double temperature, c10::string_view cross_projection) {
  TORCH_CHECK_VALUE(!widths.empty(), "widths: expected at least one modality");
  for (const int64_t width : widths) TORCH_CHECK_VALUE(width > 0, "widths: expected positive, got ", widths);
  const auto modalities = static_cast<int64_t>(widths.size());
  TORCH_CHECK_VALUE(sources.size() % 2 == 0 && static_cast<int64_t>(sources.size()) >= 2 * modalities,
                    "sources: expected two numbers a tower and a tower a modality, got ", sources);
  Fields fields{widths.vec(), {}, Cross::none, activation == "relu", temperature, cross_projection == "low_rank"};
  for (size_t t = 0; t < sources.size() / 2; ++t) {
    const int64_t a = sources[2 * t], b = sources[2 * t + 1];
    const bool own = static_cast<int64_t>(t) < modalities;
    TORCH_CHECK_VALUE(
        own ? a == static_cast<int64_t>(t) && b == -1 : a >= 0 && a < modalities && b >= 0 && b < modalities && a != b,
        "sources: tower ", t, " cannot read modalities (", a, ", ", b, ")");
    fields.towers.push_back({static_cast<int>(a), static_cast<int>(b)});
  }
  TORCH_CHECK_VALUE(cross == "none" || cross == "backbone" || cross == "side",
                    "cross: expected none, backbone or side, got '", cross, "'");
  if (cross != "none") fields.cross = cross == "side" ? Cross::side : Cross::backbone;
  TORCH_CHECK_VALUE(activation == "gelu" || activation == "relu", "activation: expected gelu or relu, got '",
                    activation, "'");
  TORCH_CHECK_VALUE(temperature > 0, "temperature: expected a positive number, got ", temperature);
  TORCH_CHECK_VALUE(cross_projection == "identity" || cross_projection == "low_rank",
                    "cross_projection: expected identity or low_rank, got '", cross_projection, "'");
  return fields;
}

}  // namespace crossan_fast::side_network
