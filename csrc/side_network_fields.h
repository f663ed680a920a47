// The static fields of side_network's schema, as every library takes them (see side_network_schema.h).
#pragma once

#include <cstdint>
#include <vector>

namespace crossan_fast::side_network {

enum class Cross { none, backbone, side };

struct Tower {
  int first;   // its modality
  int second;  // the other modality of a pair, or −1
};

struct Fields {
  std::vector<int64_t> widths;  // of the modalities
  std::vector<Tower> towers;    // the modalities' own, in order, then pairs
  Cross cross;
  bool relu;
  double temperature;
};

}  // namespace crossan_fast::side_network
