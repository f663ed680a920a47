// deduplicate, from its border to its end.
#include <algorithm>

#include "border.h"
#include "library.h"

namespace crossan_fast::border {
namespace {

// The distinct ids as a set of bits with the number of ids before each word: an id's slot is a count of bits.
class BitSet {
 public:
  BitSet(const int64_t* ids, int64_t count, int64_t largest) : bits_(largest / 64 + 1), before_(bits_.size()) {
    bits_[0] = 1;  // padding
    for (int64_t i = 0; i < count; ++i) bits_[ids[i] / 64] |= uint64_t{1} << (ids[i] % 64);
    for (size_t word = 0; word < bits_.size(); ++word) {
      before_[word] = size_;
      size_ += __builtin_popcountll(bits_[word]);
    }
  }
  int64_t size() const { return size_; }
  int64_t slot(int64_t id) const {
    return before_[id / 64] + __builtin_popcountll(bits_[id / 64] & ((uint64_t{1} << (id % 64)) - 1));
  }
  void list(int64_t* out) const {
    for (size_t word = 0; word < bits_.size(); ++word) {
      for (uint64_t rest = bits_[word]; rest != 0; rest &= rest - 1) {
        *out++ = static_cast<int64_t>(word) * 64 + __builtin_ctzll(rest);
      }
    }
  }

 private:
  std::vector<uint64_t> bits_;
  std::vector<int64_t> before_;
  int64_t size_ = 0;
};

// The same, sorted: for ids so large that the bits would be many more than the places.
class SortedSet {
 public:
  SortedSet(const int64_t* ids, int64_t count) : ids_(ids, ids + count) {
    ids_.push_back(0);
    std::sort(ids_.begin(), ids_.end());
    ids_.erase(std::unique(ids_.begin(), ids_.end()), ids_.end());
  }
  int64_t size() const { return static_cast<int64_t>(ids_.size()); }
  int64_t slot(int64_t id) const { return std::lower_bound(ids_.begin(), ids_.end(), id) - ids_.begin(); }
  void list(int64_t* out) const { std::copy(ids_.begin(), ids_.end(), out); }

 private:
  std::vector<int64_t> ids_;
};

template <typename Set>
std::tuple<Tensor, Tensor, Tensor> slots_of(const Set& distinct, const Tensor& places,
                                            std::optional<int64_t> capacity) {
  TORCH_CHECK_VALUE(!capacity || distinct.size() <= *capacity, "capacity: ", distinct.size(),
                    " slots needed (padding included), got ", *capacity);
  const int64_t size = capacity.value_or(distinct.size());
  Tensor ids = empty({size}, at::kLong), counts = empty({size}, at::kLong);
  Tensor slots = empty(places.sizes(), at::kLong);
  int64_t* id = ids.mutable_data_ptr<int64_t>();
  int64_t* slot = slots.mutable_data_ptr<int64_t>();
  int64_t* times = counts.mutable_data_ptr<int64_t>();
  distinct.list(id);
  std::fill(id + distinct.size(), id + size, 0);
  std::fill_n(times, size, 0);
  const int64_t* place = places.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < places.numel(); ++i) {
    slot[i] = distinct.slot(place[i]);
    ++times[slot[i]];
  }
  times[0] = 0;
  return {ids, slots, counts};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> deduplicate(const Tensor& item_ids, std::optional<int64_t> capacity) {
  check_device("item_ids", item_ids, at::kCPU);
  check_type("item_ids", item_ids, {at::kLong, at::kInt});
  const Tensor places = item_ids.to(at::kLong).contiguous();
  const int64_t count = places.numel();
  const int64_t* place = places.const_data_ptr<int64_t>();
  const auto [low, high] = std::minmax_element(place, place + count);
  const int64_t smallest = count == 0 ? 0 : *low, largest = count == 0 ? 0 : *high;
  TORCH_CHECK_VALUE(smallest >= 0, "item_ids: expected ids of at least 0, got ", smallest);
  // Sorting takes about as long as 64 words of bits for each place.
  if (largest / 64 <= 64 * (count + 64)) return slots_of(BitSet(place, count, largest), places, capacity);
  return slots_of(SortedSet(place, count), places, capacity);
}

}  // namespace crossan_fast::border
