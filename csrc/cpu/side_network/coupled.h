// side_network with h itself: where towers take each other's of the level before (cross = side), since what an item's
// modalities lack would make every κ its own, and where towers are narrow (`walks_with_h`). On its way back a block has
// x, from h kept after each level.
#pragma once

#include <vector>

#include "plan.h"
#include "side_network.h"

namespace crossan_fast::side_network::coupled {

inline constexpr int64_t kItems = 10 * kRowsPerTile;  // of a block at most: all of D of every tower's h is at hand

// Weights as right sides: W_down and the head transposed in the forward, as they stand in the backward.
template <class T>
struct Weighed {
  std::vector<LevelWeights<T>> down, head, up, up_plain;  // per tower; up: W_upᵀ, up_plain: W_up, of the backward

  Weighed(Tasks& tasks, const Plan<T>& plan, bool backward) {
    const Structure& s = plan.structure;
    const As as = backward ? As::plain : As::transposed;
    down = plan.across(tasks, plan.weights.down_weight, s.levels, s.rank, as);
    head = plan.across(tasks, plan.weights.head_weight, 1, s.embedding, as);
    for (size_t t = 0; t < s.towers.size(); ++t) {
      const int64_t width = s.width(s.towers[t]);
      const T* weight = plan.weights.up_weight[t];
      up.emplace_back(tasks, weight, s.levels, width, s.rank, As::transposed, plan.in_pairs);
      if (backward) up_plain.emplace_back(tasks, weight, s.levels, width, s.rank, As::plain, plan.in_pairs);
    }
  }
};

}  // namespace crossan_fast::side_network::coupled
