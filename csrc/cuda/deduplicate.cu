// deduplicate: distinct ids of a batch in ascending order, with counts and the slot of every place, into a
// fixed capacity and without the host learning anything.
//
// An id and its place make one 64-bit key, so all keys differ and every order is stable:
//   1. blocks sort chunks of 2,048 keys in shared memory (bitonic);
//   2. a key's rank is its place in its own chunk plus, for every other chunk, the number of smaller keys;
//   3. one block walks the sorted keys and numbers the runs.
#include "interface.h"
#include "numeric.h"

namespace crossan_fast {
namespace {

constexpr int kThreads = 1024, kChunk = 2048, kPlaceBits = 24;
constexpr uint64_t kNoKey = ~0ull;
constexpr int64_t kMaxId = int64_t(1) << (64 - kPlaceBits - 1);

__device__ __forceinline__ int64_t key_id(uint64_t key) { return static_cast<int64_t>(key >> kPlaceBits); }
__device__ __forceinline__ int64_t key_place(uint64_t key) { return key & ((1ull << kPlaceBits) - 1); }

__global__ void __launch_bounds__(kThreads) sort_chunks(const void* item_ids, int wide, int64_t count, uint64_t* keys) {
  auto* chunk = reinterpret_cast<uint64_t*>(shared_memory());  // [kChunk]
  for (int i = threadIdx.x; i < kChunk; i += kThreads) {
    int64_t place = int64_t(blockIdx.x) * kChunk + i;
    uint64_t key = kNoKey;
    if (place < count) {
      int64_t id = load_id(item_ids, place, wide);
      if (id < 0 || id >= kMaxId) device_fail("item_ids: expected ids in [0, 2^39)", id);
      key = static_cast<uint64_t>(id) << kPlaceBits | static_cast<uint64_t>(place);
    }
    chunk[i] = key;
  }
  for (int size = 2; size <= kChunk; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      // Thread p compares the p-th pair of places that differ in the bit `stride` only.
      int low = 2 * threadIdx.x - (threadIdx.x & (stride - 1)), high = low + stride;
      bool ascending = (low & size) == 0;
      uint64_t a = chunk[low], b = chunk[high];
      if ((a > b) == ascending) chunk[low] = b, chunk[high] = a;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kChunk; i += kThreads) keys[int64_t(blockIdx.x) * kChunk + i] = chunk[i];
}

__global__ void __launch_bounds__(kThreads) merge_chunks(const uint64_t* keys, int64_t chunks, uint64_t* sorted) {
  int64_t index = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  uint64_t key = keys[index];
  if (key == kNoKey) return;
  int64_t own = index / kChunk, rank = index % kChunk;
  for (int64_t other = 0; other < chunks; ++other) {
    if (other == own) continue;
    int smaller = 0;  // lower bound among 2,048 keys, without a branch
#pragma unroll
    for (int step = kChunk / 2; step > 0; step /= 2)
      smaller += keys[other * kChunk + smaller + step - 1] < key ? step : 0;
    smaller += keys[other * kChunk + smaller] < key;
    rank += smaller;
  }
  sorted[rank] = key;
}

// Sum over the threads up to and including this one; `sums` holds a word per warp and one for the total.
__device__ int block_scan(int value, int* sums, int* total) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  auto* all = sums + 33;  // [kThreads]
  all[threadIdx.x] = value;
  __syncthreads();
  if (lane == 0) {
    int sum = 0;
    for (int i = 0; i < 32; ++i) all[warp * 32 + i] = sum += all[warp * 32 + i];
    sums[warp] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int sum = 0;
    for (int i = 0; i < kThreads / 32; ++i) {
      int here = sums[i];
      sums[i] = sum;
      sum += here;
    }
    sums[32] = sum;
  }
  __syncthreads();
  int result = sums[warp] + all[threadIdx.x];
  *total = sums[32];
  __syncthreads();
  return result;
}

__global__ void __launch_bounds__(kThreads)
    number_runs(const uint64_t* sorted, int64_t count, int64_t capacity, int64_t* ids, int64_t* slots, int64_t* counts,
                int32_t* starts) {
  auto* sums = reinterpret_cast<int*>(shared_memory());  // [33 + kThreads]
  int64_t distinct = 0;                                  // the same in every thread
  for (int64_t base = 0; base < count; base += kThreads) {
    int64_t index = base + threadIdx.x;
    bool valid = index < count;
    int64_t id = valid ? key_id(sorted[index]) : 0;
    bool first = id != 0 && (index == 0 || key_id(sorted[index - 1]) != id);
    int found;
    int64_t slot = distinct + block_scan(first, sums, &found);
    distinct += found;
    if (slot >= capacity) {
      if (first) device_fail("capacity: more distinct ids than it has slots; one needed slot is", slot);
      slot = 0;
      first = false;
    }
    if (first) ids[slot] = id, starts[slot] = static_cast<int32_t>(index);
    if (valid) slots[key_place(sorted[index])] = id == 0 ? 0 : slot;
  }
  __syncthreads();
  for (int64_t slot = threadIdx.x; slot < capacity; slot += kThreads) {
    bool used = slot > 0 && slot <= distinct;
    if (!used) ids[slot] = 0;
    counts[slot] = used ? (slot < distinct ? starts[slot + 1] : count) - starts[slot] : 0;
  }
}

}  // namespace
}  // namespace crossan_fast

using namespace crossan_fast;

extern "C" size_t crossan_deduplicate_workspace(int64_t count, int64_t capacity) {
  int64_t chunks = (count + kChunk - 1) / kChunk;
  return chunks * kChunk * 2 * sizeof(uint64_t) + (capacity + 1) * sizeof(int32_t);
}

extern "C" int crossan_deduplicate(const void* item_ids, int wide, int64_t count, int64_t capacity, int64_t* ids,
                                   int64_t* slots, int64_t* counts, void* workspace, void* stream) {
  if (count < 0 || capacity < 1) return kCrossanBadSize;
  if (count >= int64_t(1) << kPlaceBits) return kCrossanTooLarge;
  int64_t chunks = (count + kChunk - 1) / kChunk;
  auto* keys = static_cast<uint64_t*>(workspace);
  uint64_t* sorted = chunks > 1 ? keys + chunks * kChunk : keys;
  auto* starts = reinterpret_cast<int32_t*>(keys + 2 * chunks * kChunk);
  if (int error =
          launch(sort_chunks, chunks, kThreads, kChunk * sizeof(uint64_t), stream, 1, item_ids, wide, count, keys))
    return error;
  if (chunks > 1)
    if (int error = launch(merge_chunks, chunks * (kChunk / kThreads), kThreads, 0, stream, 1, keys, chunks, sorted))
      return error;
  return launch(number_runs, 1, kThreads, (33 + kThreads) * sizeof(int), stream, 1, sorted, count, capacity, ids, slots,
                counts, starts);
}
