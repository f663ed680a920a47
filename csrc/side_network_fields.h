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
  bool low_rank;  // T is a pair of matrices for every cross pair

  // Whether what tower m gets from modality n goes through T's pair of matrices; elsewhere T is the identity.
  bool projected(int m, int n) const { return low_rank || widths[m] != widths[n]; }
};

}  // namespace crossan_fast::side_network
