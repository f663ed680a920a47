// Additions into shared sums in a fixed order, without a copy of the sums per thread.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <memory>
#include <thread>

namespace crossan_fast {

// Blocks walk the same steps; block b may add in step s once block b − 1 has. Every sum is thus built in the order
// of blocks, whatever the threads, and the blocks in flight follow each other like cars in a tunnel. Blocks must be
// claimed in ascending order by threads that run each to its end: the lowest one unfinished never waits. A block that
// throws never passes its turn on, so each runs in `guard`: those that wait for it, and all behind them, throw too.
class Turns {
 public:
  explicit Turns(int64_t blocks) : done_(new Line[static_cast<size_t>(blocks)]) {}

  void wait(int64_t block, int64_t step) const {
    if (block == 0) return;
    const auto& before = done_[static_cast<size_t>(block - 1)].steps;
    for (int spins = 0; before.load(std::memory_order_acquire) <= step; ++spins) {
      if (failed_.load(std::memory_order_acquire)) std::rethrow_exception(failure_);
      if (spins > 1000) std::this_thread::yield();
    }
  }
  void pass(int64_t block, int64_t step) {
    done_[static_cast<size_t>(block)].steps.store(step + 1, std::memory_order_release);
  }

  // All of a block's work. Of several that throw, the first one's exception is what everyone who waits throws.
  template <class F>
  void guard(const F& block) {
    try {
      block();
    } catch (...) {
      if (!claimed_.exchange(true)) {
        failure_ = std::current_exception();
        failed_.store(true, std::memory_order_release);
      }
      throw;
    }
  }

 private:
  struct alignas(64) Line {
    std::atomic<int64_t> steps{0};
  };
  std::unique_ptr<Line[]> done_;
  std::atomic<bool> claimed_{false}, failed_{false};
  std::exception_ptr failure_;
};

}  // namespace crossan_fast
