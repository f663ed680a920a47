// Runs CUDA kernels on the host: every thread of a block (or cluster) is a fiber with its own stack, and
// barriers, warp collectives and asynchronous copies behave as on the device.
//
// It exists for tests, and is made to find mistakes rather than to be fast:
//  * shared memory starts as NaNs, and is followed by a canary that is checked when a block ends;
//  * fibers run in an order drawn from a seed, so that a missing barrier shows under some seed;
//  * asynchronous copies land as late or as early as their waits allow, again drawn from the seed;
//  * a wait that nothing can end is an error that says so, not a hang.
// What it can't show: whether the instructions behind primitives.h do what their emulation does.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

namespace crossan_fast::shim {

struct Index {
  unsigned x = 0;
};

inline Index threadIdx, blockIdx, blockDim, gridDim;

struct Copy {
  void* target;
  const void* source;  // null: zeros
  size_t bytes;
};

// Fibers of one warp (or group) that meet: the last to come runs the operation for all of them.
struct Meeting {
  unsigned expected = 0, arrived = 0, generation = 0;
  std::vector<void*> arguments;
};

struct Block;

// A warpgroup's matrix product that was issued and not yet waited for.
struct Product {
  float* acc;
  uint64_t a, b;
  bool trans_a, trans_b;
};

struct Fiber {
  ucontext_t context;
  Block* block = nullptr;
  unsigned thread = 0;
  bool done = false;
  const unsigned* wait_word = nullptr;  // asleep while *wait_word == wait_value
  unsigned wait_value = 0;
  std::vector<std::vector<Copy>> copy_groups = std::vector<std::vector<Copy>>(1);
  std::vector<Product> products;
  void (*run_products)(std::vector<void*>&) = nullptr;
};

struct Block {
  unsigned index = 0, rank = 0;
  unsigned char* shared = nullptr;
  std::vector<Meeting> warps;
  Meeting named[16], warpgroups[8];
};

constexpr size_t kCanary = 4096, kStack = 128 * 1024, kMaxShared = 227 * 1024;

struct Machine {
  ucontext_t scheduler;
  std::vector<Block> blocks;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<std::function<void()>> in_flight;  // bulk copies on their way
  Meeting cluster;
  Fiber* current = nullptr;
  std::function<void()> kernel;
  std::string failure;
  uint64_t random = 1;
  size_t shared_bytes = 0;

  unsigned draw(unsigned bound) {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return static_cast<unsigned>((random >> 20) % bound);
  }
};

inline Machine machine;
inline unsigned seed = 1;

inline void yield() { swapcontext(&machine.current->context, &machine.scheduler); }

inline void wait_while(const unsigned* word, unsigned value) {
  machine.current->wait_word = word;
  machine.current->wait_value = value;
  while (*word == value) yield();
  machine.current->wait_word = nullptr;
}

template <class Operation>
void meet(Meeting& meeting, unsigned expected, unsigned place, void* argument, Operation operation) {
  if (meeting.arrived == 0) meeting.expected = expected, meeting.arguments.assign(expected, nullptr);
  if (meeting.expected != expected || meeting.arguments.at(place) != nullptr)
    throw std::logic_error("threads meet at one barrier for different reasons");
  static char nothing;
  meeting.arguments[place] = argument ? argument : &nothing;
  if (++meeting.arrived == expected) {
    operation(meeting.arguments);
    meeting.arrived = 0;
    ++meeting.generation;
  } else {
    wait_while(&meeting.generation, meeting.generation);
  }
}

// All 32 lanes of the warp call this; `operation` sees the 32 arguments, in lane order, once.
template <class Argument, class Operation>
void warp_collective(Argument& argument, Operation operation) {
  Fiber& fiber = *machine.current;
  meet(fiber.block->warps[fiber.thread / 32], 32, fiber.thread % 32, &argument, [&](std::vector<void*>& all) {
    Argument* lanes[32];
    for (int lane = 0; lane < 32; ++lane) lanes[lane] = static_cast<Argument*>(all[lane]);
    operation(lanes);
  });
}

inline void fiber_main() {
  try {
    machine.kernel();
  } catch (const std::exception& error) {
    if (machine.failure.empty()) machine.failure = error.what();
  }
  machine.current->done = true;
  yield();
}

inline std::unique_ptr<Fiber> start_fiber(Block& block, unsigned thread, size_t slot) {
  static std::vector<std::unique_ptr<char[]>> stacks;
  if (stacks.size() <= slot) stacks.emplace_back(new char[kStack]);
  auto fiber = std::make_unique<Fiber>();
  fiber->block = &block;
  fiber->thread = thread;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = stacks[slot].get();
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, fiber_main, 0);
  return fiber;
}

inline void run_cluster(unsigned first_block, unsigned cluster, unsigned threads) {
  static std::vector<std::unique_ptr<unsigned char[]>> memories;
  Machine& m = machine;
  m.blocks.assign(cluster, Block());
  m.in_flight.clear();
  m.cluster = Meeting();
  m.fibers.clear();
  for (unsigned rank = 0; rank < cluster; ++rank) {
    Block& block = m.blocks[rank];
    block.index = first_block + rank;
    block.rank = rank;
    if (memories.size() <= rank) memories.emplace_back(new unsigned char[kMaxShared + kCanary + 1024]);
    auto address = reinterpret_cast<uintptr_t>(memories[rank].get());
    block.shared = reinterpret_cast<unsigned char*>((address + 1023) / 1024 * 1024);
    std::memset(block.shared, 0xFF, m.shared_bytes + kCanary);
    block.warps.resize((threads + 31) / 32);
    for (unsigned thread = 0; thread < threads; ++thread) {
      m.fibers.push_back(start_fiber(block, thread, m.fibers.size()));
    }
  }
  std::vector<Fiber*> live;
  for (auto& fiber : m.fibers) live.push_back(fiber.get());
  while (!live.empty()) {
    // A rotation and a direction are enough disorder, and cheap.
    unsigned start = m.draw(live.size());
    bool backwards = m.draw(2), moved = false;
    for (size_t step = 0; step < live.size(); ++step) {
      size_t at = (start + (backwards ? live.size() - step : step)) % live.size();
      Fiber* fiber = live[at];
      if (fiber->wait_word && *fiber->wait_word == fiber->wait_value) continue;
      moved = true;
      m.current = fiber;
      threadIdx.x = fiber->thread;
      blockIdx.x = fiber->block->index;
      swapcontext(&m.scheduler, &fiber->context);
      if (!m.failure.empty()) throw std::runtime_error(m.failure);
    }
    live.erase(std::remove_if(live.begin(), live.end(), [](Fiber* f) { return f->done; }), live.end());
    if (!m.in_flight.empty() && (!moved || m.draw(4) == 0)) {
      size_t pick = m.draw(m.in_flight.size());
      m.in_flight[pick]();
      m.in_flight.erase(m.in_flight.begin() + pick);
    } else if (!moved && !live.empty()) {
      throw std::runtime_error("deadlock: every thread waits for a barrier that nothing can complete");
    }
  }
  if (!m.in_flight.empty()) throw std::runtime_error("a block ended before its bulk copies");
  for (Block& block : m.blocks)
    for (size_t i = 0; i < kCanary; ++i)
      if (block.shared[m.shared_bytes + i] != 0xFF)
        throw std::runtime_error("a block wrote past the end of its shared memory");
}

inline std::string last_failure;

}  // namespace crossan_fast::shim

namespace crossan_fast {

using shim::blockDim;
using shim::blockIdx;
using shim::gridDim;
using shim::threadIdx;

constexpr int kLaunchFailed = 719;  // cudaErrorLaunchFailure

inline unsigned char* shared_memory() { return shim::machine.current->block->shared; }

inline void device_fail(const char* message, long long value) {
  throw std::runtime_error(std::string(message) + " (got " + std::to_string(value) + ")");
}

inline void __syncthreads() {
  shim::Fiber& fiber = *shim::machine.current;
  shim::meet(fiber.block->named[0], blockDim.x, fiber.thread, nullptr, [](auto&) {});
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, size_t shared, void*, unsigned cluster,
           const Arguments&... arguments) {
  shim::Machine& m = shim::machine;
  m.failure.clear();
  m.shared_bytes = shared;
  m.random = 88172645463325252ull + 7919ull * shim::seed;
  m.kernel = [&] { kernel(static_cast<Parameters>(arguments)...); };
  blockDim.x = threads;
  gridDim.x = blocks;
  try {
    if (shared > shim::kMaxShared || threads > 1024 || threads % 32 || blocks % cluster)
      throw std::runtime_error("a launch that no device accepts");
    for (unsigned block = 0; block < blocks; block += cluster) shim::run_cluster(block, cluster, threads);
  } catch (const std::exception& error) {
    shim::last_failure = error.what();
    return kLaunchFailed;
  }
  return 0;
}

struct DeviceLimits {
  int architecture;
  int multiprocessors;
  int shared_per_block;
};

// The device the emulator stands for; tests change it.
inline DeviceLimits emulated_device = {90, 4, 227 * 1024};

inline DeviceLimits device_limits() { return emulated_device; }

inline const char* launch_error(int) { return shim::last_failure.c_str(); }

}  // namespace crossan_fast
