// primitives.h on the emulator.
#pragma once

#include "cuda/numeric.h"

namespace crossan_fast {

constexpr bool kHopper = true;

inline void named_barrier(int id, int threads) {
  shim::Fiber& fiber = *shim::machine.current;
  shim::meet(fiber.block->named[id], threads, fiber.thread % threads, nullptr, [](auto&) {});
}

inline void trap_unless(bool condition) {
  if (!condition) throw std::logic_error("trap");
}

inline void sync_warp() {
  shim::Fiber& fiber = *shim::machine.current;
  shim::meet(fiber.block->warps[fiber.thread / 32], 32, fiber.thread % 32, nullptr, [](auto&) {});
}

namespace shim {

struct MatrixLane {
  uint32_t* registers;
  unsigned char* row;
};

// Element (row, column) of tile t is in the 16-bit half column % 2 of register t of lane 4·row + column / 2.
inline void move_matrices(uint32_t* registers, void* row, bool trans, bool store) {
  MatrixLane own = {registers, static_cast<unsigned char*>(row)};
  warp_collective(own, [=](MatrixLane** lanes) {
    for (int lane = 0; lane < 32; ++lane)
      if (reinterpret_cast<uintptr_t>(lanes[lane]->row) % 16) throw std::logic_error("misaligned matrix row");
    for (int tile = 0; tile < 4; ++tile)
      for (int i = 0; i < 8; ++i)
        for (int j = 0; j < 8; ++j) {
          int row_of = trans ? j : i, column_of = trans ? i : j;
          unsigned char* memory = lanes[8 * tile + row_of]->row + 2 * column_of;
          auto* half = reinterpret_cast<unsigned char*>(&lanes[4 * i + j / 2]->registers[tile]) + 2 * (j % 2);
          std::memcpy(store ? memory : half, store ? half : memory, 2);
        }
  });
}

}  // namespace shim

inline void ldmatrix_x4(uint32_t (&tiles)[4], const void* row) {
  shim::move_matrices(tiles, const_cast<void*>(row), false, false);
}
inline void ldmatrix_x4_trans(uint32_t (&tiles)[4], const void* row) {
  shim::move_matrices(tiles, const_cast<void*>(row), true, false);
}
inline void stmatrix_x4_trans(void* row, const uint32_t (&tiles)[4]) {
  shim::move_matrices(const_cast<uint32_t*>(tiles), row, true, true);
}

template <class T>
void mma_16x8x16(float* acc, const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Lane {
    float* acc;
    const uint32_t* a;
    uint32_t b[2];
  } own = {acc, a, {b0, b1}};
  shim::warp_collective(own, [](Lane** lanes) {
    auto half = [](uint32_t pair, int which) { return which ? high_half<T>(pair) : low_half<T>(pair); };
    float left[16][16], right[16][8];
    for (int lane = 0; lane < 32; ++lane)
      for (int reg = 0; reg < 4; ++reg)
        for (int h = 0; h < 2; ++h) {
          int row = lane / 4 + 8 * (reg % 2), k = 2 * (lane % 4) + h + 8 * (reg / 2);
          left[row][k] = half(lanes[lane]->a[reg], h);
          if (reg < 2) right[2 * (lane % 4) + h + 8 * reg][lane / 4] = half(lanes[lane]->b[reg], h);
        }
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        int row = lane / 4 + 8 * (i / 2), column = 2 * (lane % 4) + i % 2;
        float sum = lanes[lane]->acc[i];
        for (int k = 0; k < 16; ++k) sum += left[row][k] * right[k][column];
        lanes[lane]->acc[i] = sum;
      }
  });
}

inline void copy_async_16(void* target, const void* source, bool valid = true) {
  shim::Copy copy = {target, valid ? source : nullptr, 16};
  if (reinterpret_cast<uintptr_t>(target) % 16) throw std::logic_error("misaligned asynchronous copy");
  // Half of the copies land at once, which a buffer that is still being read does not survive.
  if (shim::machine.draw(2))
    copy.source ? std::memcpy(target, source, 16) : std::memset(target, 0, 16);
  else
    shim::machine.current->copy_groups.back().push_back(copy);
}
inline void copy_async_commit() { shim::machine.current->copy_groups.emplace_back(); }
template <int kPending>
void copy_async_wait() {
  auto& groups = shim::machine.current->copy_groups;  // the last is open
  while (groups.size() > kPending + 1) {
    for (const shim::Copy& copy : groups.front())
      copy.source ? std::memcpy(copy.target, copy.source, copy.bytes) : std::memset(copy.target, 0, copy.bytes);
    groups.erase(groups.begin());
  }
}

inline void prefetch(const void*) {}

inline float shuffle_xor(float value, int mask) {
  struct Lane {
    float given, received;
  } own = {value, 0};
  shim::warp_collective(own, [=](Lane** lanes) {
    for (int lane = 0; lane < 32; ++lane) lanes[lane]->received = lanes[lane ^ mask]->given;
  });
  return own.received;
}

inline unsigned cluster_rank() { return shim::machine.current->block->rank; }

inline void cluster_sync() {
  shim::Fiber& fiber = *shim::machine.current;
  auto all = static_cast<unsigned>(shim::machine.fibers.size());
  shim::meet(shim::machine.cluster, all, fiber.block->rank * blockDim.x + fiber.thread, nullptr, [](auto&) {});
}

namespace shim {

// Fits in the 8 bytes of the device's barrier; the generation's parity is the phase's.
struct Mbarrier {
  uint32_t generation;
  uint8_t pending, arrivals;
  int16_t units;  // of 16 bytes announced and not yet copied; below zero while copies run ahead

  void settle() {
    if (pending == 0 && units == 0) ++generation, pending = arrivals;
  }
};
static_assert(sizeof(Mbarrier) == 8);

inline Mbarrier& mbarrier_in(unsigned rank, const void* own) {
  size_t offset = static_cast<const unsigned char*>(own) - machine.current->block->shared;
  return *reinterpret_cast<Mbarrier*>(machine.blocks.at(rank).shared + offset);
}

inline void arrive(Mbarrier& barrier) {
  if (barrier.pending == 0) throw std::logic_error("more arrivals at an mbarrier than it expects");
  --barrier.pending;
  barrier.settle();
}

}  // namespace shim

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  auto count = static_cast<uint8_t>(arrivals);
  shim::mbarrier_in(cluster_rank(), barrier) = {0, count, count, 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive_expect(uint64_t* barrier, int bytes) {
  shim::Mbarrier& own = shim::mbarrier_in(cluster_rank(), barrier);
  own.units = static_cast<int16_t>(own.units + bytes / 16);
  shim::arrive(own);
}
inline void mbarrier_arrive_at(uint64_t* barrier, unsigned rank) { shim::arrive(shim::mbarrier_in(rank, barrier)); }
inline void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  shim::Mbarrier& own = shim::mbarrier_in(cluster_rank(), barrier);
  if ((own.generation & 1) == parity) shim::wait_while(&own.generation, own.generation);
}

inline void bulk_copy_multicast(void* target, const void* source, int bytes, uint64_t* barrier, uint16_t blocks) {
  if (bytes % 16 || reinterpret_cast<uintptr_t>(source) % 16 || reinterpret_cast<uintptr_t>(target) % 16)
    throw std::logic_error("misaligned bulk copy");
  size_t offset = static_cast<unsigned char*>(target) - shim::machine.current->block->shared;
  for (unsigned rank = 0; rank < shim::machine.blocks.size(); ++rank) {
    if (!(blocks >> rank & 1)) continue;
    shim::Mbarrier* announced = &shim::mbarrier_in(rank, barrier);
    unsigned char* there = shim::machine.blocks[rank].shared + offset;
    shim::machine.in_flight.push_back([=] {
      std::memcpy(there, source, bytes);
      announced->units = static_cast<int16_t>(announced->units - bytes / 16);
      announced->settle();
    });
  }
}

inline void fence_async_proxy() {}

inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared_memory());
}

inline void wgmma_fence() {}
inline void wgmma_commit() {}

namespace shim {

// Element k of row (M or N) `row` of a swizzled operand with rows of 128 bytes (layout 1: bits 7–9 of an address
// are added to bits 4–6) or 64 (layout 2: bits 7–8 to bits 4–5); transposed, memory's rows are k.
template <class T>
float operand_element(uint64_t operand, bool transposed, int row, int k) {
  uint64_t layout = operand >> 62, row_bytes = layout == 1 ? 128 : 64, mask = layout == 1 ? 7 : 3;
  if (layout != 1 && layout != 2) throw std::logic_error("wgmma operand: not a layout that is emulated");
  int line = transposed ? k : row, column = transposed ? row : k;
  if (transposed && 2u * column >= row_bytes) throw std::logic_error("wgmma operand: wider than its rows");
  uint64_t start = (operand & 0x3FFF) << 4, group = (operand >> 32 & 0x3FFF) << 4;
  if (start % (8 * row_bytes) >= row_bytes) throw std::logic_error("wgmma operand: starts within a group");
  uint64_t address = start + line / 8 * group + line % 8 * row_bytes + 2 * column;
  T element;
  std::memcpy(&element, shared_memory() + (address ^ (address >> 7 & mask) << 4), 2);
  return to_float(element);
}

// What `wgmma_64x32x16` asked for, done when it is waited for: as late as a device may.
template <class T>
void run_products(std::vector<void*>& warpgroup) {
  size_t count = static_cast<Fiber*>(warpgroup[0])->products.size();
  for (size_t index = 0; index < count; ++index) {
    const Product& first = static_cast<Fiber*>(warpgroup[0])->products[index];
    float left[64][16], right[32][16];
    for (int k = 0; k < 16; ++k) {
      for (int row = 0; row < 64; ++row) left[row][k] = operand_element<T>(first.a, first.trans_a, row, k);
      for (int row = 0; row < 32; ++row) right[row][k] = operand_element<T>(first.b, first.trans_b, row, k);
    }
    for (int thread = 0; thread < 128; ++thread) {
      const Product& own = static_cast<Fiber*>(warpgroup[thread])->products.at(index);
      if (own.a != first.a || own.b != first.b) throw std::logic_error("wgmma: lanes disagree on operands");
      for (int i = 0; i < 16; ++i) {
        int row = thread / 32 * 16 + thread % 32 / 4 + i % 4 / 2 * 8;
        int column = i / 4 * 8 + thread % 4 * 2 + i % 2;
        for (int k = 0; k < 16; ++k) own.acc[i] += left[row][k] * right[column][k];
      }
    }
  }
  for (void* fiber : warpgroup) static_cast<Fiber*>(fiber)->products.clear();
}

}  // namespace shim

template <class T, bool kTransA = false, bool kTransB = false>
void wgmma_64x32x16(float (&acc)[16], uint64_t a, uint64_t b) {
  shim::Fiber& fiber = *shim::machine.current;
  fiber.products.push_back({acc, a, b, kTransA, kTransB});
  fiber.run_products = shim::run_products<T>;
}

template <class... Accumulators>
void wgmma_wait(Accumulators&...) {
  shim::Fiber& fiber = *shim::machine.current;
  shim::meet(fiber.block->warpgroups[fiber.thread / 128], 128, fiber.thread % 128, &fiber,
             [&](std::vector<void*>& warpgroup) {
               if (!fiber.products.empty()) fiber.run_products(warpgroup);
             });
}

}  // namespace crossan_fast
