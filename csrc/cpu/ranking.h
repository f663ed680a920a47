// Scores of the catalogue against a block of users, for topk_scores and rank_of_target: items down, users across.
//
// Every score is the same sum in the same order wherever it is formed, so equal embeddings tie exactly.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "gemm.h"
#include "parallel.h"
#include "rows.h"
#include "simd.h"

namespace crossan_fast {

inline constexpr int64_t kUsers = 64;       // across: whole panels for every type and instruction set
inline constexpr int64_t kTileHeight = 96;  // items down: a tile stays in L1
inline constexpr int64_t kSegment = 8192;   // items of one task, so that a single user's ranking has tasks too

template <class T>
struct Ranking {
  int64_t batch, width, catalogue;  // B, d, I
  const T* users;                   // [B, d]
  const T* items;                   // [I, d]: item id 1 first
  Stored rounding;                  // scores are rounded to this type, as the reference's are
  const int64_t* exclude;           // [B, H] or null
  int64_t history;

  int64_t groups() const { return (batch + kUsers - 1) / kUsers; }
  int64_t segments() const { return std::max<int64_t>(1, (catalogue + kSegment - 1) / kSegment); }
};

template <class T>
void round_scores(Stored type, T* scores, int64_t count) {
  if (type == Stored::bf16)
    for (int64_t i = 0; i < count; ++i) scores[i] = static_cast<T>(from_bf16(to_bf16(static_cast<float>(scores[i]))));
  if (type == Stored::f16)
    for (int64_t i = 0; i < count; ++i) scores[i] = static_cast<T>(from_f16(to_f16(static_cast<float>(scores[i]))));
}

// One thread's view of a group of users.
template <class T>
class ScoreBlock {
 public:
  explicit ScoreBlock(const Ranking<T>& ranking)
      : ranking_(ranking),
        users_(kUsers * ranking.width),
        packed_(packed_size<T>(ranking.width, kUsers)),
        tile_(kTileHeight * kUsers) {}

  int64_t first() const { return first_; }
  int64_t count() const { return count_; }
  const T* tile() const { return tile_.data(); }

  void start(int64_t group) {
    if (group == group_) return;
    group_ = group;
    first_ = group * kUsers;
    count_ = std::min(kUsers, ranking_.batch - first_);
    const int64_t d = ranking_.width;
    std::copy_n(ranking_.users + first_ * d, count_ * d, users_.data());
    std::fill_n(users_.data() + count_ * d, (kUsers - count_) * d, T(0));
    for (int64_t j = 0; j < kUsers; j += kPanel<T>)
      pack_panel(users_.data(), int64_t(1), d, d, j, kUsers, packed_.data() + j * d);
  }

  // tile[j, i] = ⟨items[start + j], users[i]⟩
  void score(int64_t start, int64_t height) {
    const int64_t d = ranking_.width;
    multiply<T>(height, kUsers, d, ranking_.items + start * d, d, 1, packed(packed_.data(), d), tile_.data(), kUsers,
                Into::overwrite);
    round_scores(ranking_.rounding, tile_.data(), height * kUsers);
  }

  // The same for one item and all users of the group, bit for bit.
  void score_one(int64_t item, T* scores) const {
    const int64_t d = ranking_.width;
    multiply<T>(1, kUsers, d, ranking_.items + item * d, d, 1, packed(packed_.data(), d), scores, kUsers,
                Into::overwrite);
    round_scores(ranking_.rounding, scores, kUsers);
  }

  // Ids excluded for user i, ascending, each once, within the catalogue.
  std::vector<int64_t> excluded(int64_t i) const {
    std::vector<int64_t> ids;
    for (int64_t h = 0; h < ranking_.history; ++h) {
      const int64_t id = ranking_.exclude[(first_ + i) * ranking_.history + h];
      if (id >= 1 && id <= ranking_.catalogue) ids.push_back(id);
    }
    std::sort(ids.begin(), ids.end());
    ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
    return ids;
  }

 private:
  const Ranking<T>& ranking_;
  Buffer<T> users_, packed_, tile_;
  int64_t group_ = -1, first_ = 0, count_ = 0;
};

}  // namespace crossan_fast
