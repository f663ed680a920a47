// Additions into shared sums in a fixed order, without a copy of the sums per thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

namespace crossan_fast {

// Blocks walk the same steps; block b may add in step s once block b − 1 has. Every sum is thus built in the order
// of blocks, whatever the threads, and the blocks in flight follow each other like cars in a tunnel. Blocks must be
// claimed in ascending order by threads that run each to its end: the lowest one unfinished never waits.
class Turns {
 public:
  explicit Turns(int64_t blocks) : done_(new Line[static_cast<size_t>(blocks)]) {}

  void wait(int64_t block, int64_t step) const {
    if (block == 0) return;
    const auto& before = done_[static_cast<size_t>(block - 1)].steps;
    for (int spins = 0; before.load(std::memory_order_acquire) <= step; ++spins)
      if (spins > 1000) std::this_thread::yield();
  }
  void pass(int64_t block, int64_t step) {
    done_[static_cast<size_t>(block)].steps.store(step + 1, std::memory_order_release);
  }

 private:
  struct alignas(64) Line {
    std::atomic<int64_t> steps{0};
  };
  std::unique_ptr<Line[]> done_;
};

}  // namespace crossan_fast
