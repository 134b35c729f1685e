// Runs CUDA kernels on the CPU, one fiber per CUDA thread: deterministic for a seed, and strict
// where hardware is lenient.
//
// What it catches: results that depend on the thread order (run several seeds), reads of unwritten
// shared memory (it is poisoned), writes past it (guard bytes), and barriers, mbarriers or warp
// collectives that some thread does not reach. What it does not do: partial warp masks, static
// __shared__ arrays, timing, memory reordering within a thread.
#pragma once
#include <cuda_bf16.h>  // CUDA's headers come before the macros below, which would break them
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#undef __launch_bounds__
#undef __global__
#undef __device__
#undef __host__
#define __launch_bounds__(...)
#define __global__
#define __device__
#define __host__

namespace simt {

// Blocks run together up to this many threads, as on one multiprocessor; the other blocks of the
// grid come after them. A kernel whose blocks wait for each other needs a grid that fits.
constexpr int kResidentThreads = 2048;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kGuardBytes = 64, kSharedAlignment = 1024;
constexpr unsigned char kPoison = 0xCB;

enum class State { ready, at_block_barrier, at_part_barrier, at_warp_barrier, at_mbarrier, done };

// What one lane shows the others in a warp collective.
struct Registers {
  uint32_t word[8];
};
// cp.async of one thread that nothing has waited for yet: the bytes arrive when a wait covers the
// copy's group, or (eager) at once.
struct AsyncCopy {
  void* to;
  const void* from;
  int bytes, from_bytes;  // bytes beyond from_bytes arrive as 0

  void arrive() const {
    std::memset(to, 0, size_t(bytes));
    if (from_bytes) std::memcpy(to, from, size_t(from_bytes));
  }
};

// An mbarrier object, in its 8 bytes of shared memory: a phase ends when all arrivals and all
// announced bytes have come.
struct MBarrier {
  int16_t expected, pending;  // arrivals of a phase, and those still to come
  int32_t bytes : 31;         // announced and not arrived, or (negative) the other way round
  uint32_t phase : 1;
};
// Copies that end by telling an mbarrier: with so many bytes (cp.async.bulk), or with an
// arrival (0 bytes; cp.async).
struct Flight {
  std::vector<AsyncCopy> copies;
  MBarrier* barrier;
  int bytes;
};

struct Fiber;
struct Warp {
  std::vector<Fiber*> lanes;
  std::vector<Fiber*> ready;  // in an eager run
  size_t waiting = 0;         // lanes at the warp's barrier
  // a few registers per lane, double-buffered so that one barrier per exchange is enough
  Registers slots[2][32];
  int phase[32] = {};  // which buffer each lane used last
};
struct Block {
  uint3 idx;
  unsigned char* shared;  // dynamic shared memory, kSharedAlignment, and a guard zone behind it
  std::vector<Warp> warps;
  std::vector<Flight> flights;  // that have not landed
  size_t threads = 0, at_barrier = 0, at_part = 0;
  std::vector<Fiber*> watching;  // at an mbarrier
};
struct Fiber {
  // __builtin_setjmp buffer: several times faster than swapcontext, which calls the kernel
  void* registers[5];
  ucontext_t start;  // used once, to get onto the fiber's own stack
  bool started = false;
  State state = State::done;
  uint3 tid;
  int lane;
  Block* block;
  Warp* warp;
  std::vector<std::vector<AsyncCopy>> groups;  // committed groups, the oldest first
  std::vector<AsyncCopy> open_group;
  // wgmma that nothing has waited for: groups, the open one last
  std::vector<std::vector<std::function<void()>>> products;
  const MBarrier* barrier;  // at_mbarrier: waits for the end of this phase of it
  uint32_t phase;
};

// Read at every switch, where a call that finds them would cost as much as the switch.
#define ANYBIT_SIMT_NEAR [[gnu::tls_model("initial-exec")]]
ANYBIT_SIMT_NEAR inline thread_local Fiber* me = nullptr;
ANYBIT_SIMT_NEAR inline thread_local void* scheduler_registers[5];
#undef ANYBIT_SIMT_NEAR
inline thread_local std::vector<Fiber*> awake;  // whose barriers were released in this round
inline thread_local dim3 grid_dim, block_dim;
inline thread_local std::function<void()> body;
// asynchronous copies arrive at once, and one warp runs as far ahead as it can
inline thread_local bool eager = false;
inline thread_local std::string failure;  // first exception thrown inside a kernel

[[gnu::noinline]] inline void jump(void** to) { __builtin_longjmp(to, 1); }
[[gnu::noinline]] inline void to_scheduler() {
  if (!__builtin_setjmp(me->registers)) jump(scheduler_registers);
}
[[gnu::noinline]] inline void to_fiber(Fiber* fiber) {
  me = fiber;
  if (__builtin_setjmp(scheduler_registers)) return;
  if (fiber->started) jump(fiber->registers);
  fiber->started = true;
  setcontext(&fiber->start);
}

// Main of every fiber; after its thread is done it waits here until it is given another one.
inline void entry() {
  for (;;) {
    try {
      body();
    } catch (const std::exception& error) {
      if (failure.empty()) failure = error.what();
    }
    me->state = State::done;
    to_scheduler();
  }
}

// Fibers with their stacks, and the shared memory of blocks, kept for later launches of this OS
// thread: fresh pages cost more than what most kernels compute.
class Pool {
 public:
  std::vector<std::vector<unsigned char>> shared;  // of each resident block

  ~Pool() { clear(); }
  std::vector<Fiber>& fibers(size_t count) {
    if (fibers_.size() < count) {
      clear();
      fibers_.resize(count);
      constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
      void* stacks = mmap(nullptr, kStackBytes * count, PROT_READ | PROT_WRITE, kFlags, -1, 0);
      if (stacks == MAP_FAILED) {
        fibers_.clear();
        throw std::runtime_error("simt: no memory for " + std::to_string(count) + " fiber stacks");
      }
      stacks_ = static_cast<char*>(stacks);
      for (size_t i = 0; i < count; ++i) {
        getcontext(&fibers_[i].start);
        fibers_[i].start.uc_stack.ss_sp = stacks_ + kStackBytes * i;
        fibers_[i].start.uc_stack.ss_size = kStackBytes;
        fibers_[i].start.uc_link = nullptr;
        makecontext(&fibers_[i].start, entry, 0);
      }
    }
    return fibers_;
  }
  void clear() {  // also after a deadlock, when fibers hang in the middle of a kernel
    if (stacks_) munmap(stacks_, kStackBytes * fibers_.size());
    stacks_ = nullptr;
    fibers_.clear();
  }

 private:
  std::vector<Fiber> fibers_;
  char* stacks_ = nullptr;
};
inline thread_local Pool pool;

inline void wait_as(State state) {
  me->state = state;
  to_scheduler();
}
inline void wake(Fiber* fiber) {
  fiber->state = State::ready;
  awake.push_back(fiber);
}
// The thread that a barrier waited for wakes all of them, itself included; they go on in the next
// round.
inline void sync_warp() {
  Warp& warp = *me->warp;
  me->state = State::at_warp_barrier;
  if (++warp.waiting == warp.lanes.size()) {
    warp.waiting = 0;
    for (Fiber* fiber : warp.lanes) wake(fiber);
  }
  to_scheduler();
}
inline void release(Block& block, State from) {
  for (Warp& warp : block.warps)
    for (Fiber* fiber : warp.lanes)
      if (fiber->state == from) wake(fiber);
}
inline void sync_block() {
  Block& block = *me->block;
  me->state = State::at_block_barrier;
  if (++block.at_barrier == block.threads) {
    block.at_barrier = 0;
    release(block, State::at_block_barrier);
  }
  to_scheduler();
}
inline void sync_part(size_t threads) {
  Block& block = *me->block;
  me->state = State::at_part_barrier;
  if (++block.at_part == threads) {
    block.at_part = 0;
    release(block, State::at_part_barrier);
  }
  to_scheduler();
}
inline void* shared_memory() { return me->block->shared; }

// Every lane of a full warp publishes `mine`; returns those of all 32 lanes, valid until the
// lane's next exchange but one.
inline const Registers* exchange(const Registers& mine) {
  Warp& warp = *me->warp;
  Registers* slots = warp.slots[warp.phase[me->lane] ^= 1];
  slots[me->lane] = mine;
  if (warp.lanes.size() != 32)
    throw std::runtime_error("simt: warp collective in a warp of fewer than 32 threads");
  sync_warp();
  return slots;
}

// ---- cp.async ----
inline void copy_async(void* to, const void* from, int bytes, int from_bytes) {
  me->open_group.push_back({to, from, bytes, from_bytes});
  if (eager) me->open_group.back().arrive();
}
inline void commit_copies() {
  me->groups.push_back(std::move(me->open_group));
  me->open_group.clear();
}
// Let all groups but the `pending` youngest arrive.
inline void wait_for_copies(size_t pending) {
  std::vector<std::vector<AsyncCopy>>& groups = me->groups;
  while (groups.size() > pending) {
    for (const AsyncCopy& copy : groups.front()) {
      if (!eager) copy.arrive();
    }
    groups.erase(groups.begin());
  }
}

// ---- mbarriers, and copies that they wait for ----
inline void settle(MBarrier& barrier) {
  if (barrier.pending || barrier.bytes) return;
  barrier.phase ^= 1, barrier.pending = barrier.expected;
}
inline void arrive(MBarrier& barrier) {
  if (barrier.pending <= 0)
    throw std::runtime_error("simt: more arrivals at an mbarrier than it was told to expect");
  --barrier.pending;
  settle(barrier);
}
inline void land(const Flight& flight) {
  for (const AsyncCopy& copy : flight.copies) copy.arrive();
  if (!flight.bytes) return arrive(*flight.barrier);
  flight.barrier->bytes -= flight.bytes;
  settle(*flight.barrier);
}
// An eager copy lands at once, any other when no thread can go on without it.
inline void take_off(Flight flight) {
  if (eager) land(flight);
  else me->block->flights.push_back(std::move(flight));
}
inline void copy_bulk(void* to, const void* from, int bytes, MBarrier* barrier) {
  if (bytes <= 0 ||
      (uintptr_t(bytes) | reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16)
    throw std::runtime_error("simt: cp.async.bulk of " + std::to_string(bytes) +
                             " bytes: size and addresses must be multiples of 16");
  take_off({{{to, from, bytes, bytes}}, barrier, bytes});
}
// All copies that this thread has begun end with one arrival.
inline void arrive_after_copies(MBarrier* barrier) {
  commit_copies();
  Flight flight{{}, barrier, 0};
  for (const std::vector<AsyncCopy>& group : me->groups)
    if (!eager) flight.copies.insert(flight.copies.end(), group.begin(), group.end());
  me->groups.clear();
  take_off(std::move(flight));
}
inline void wait_for_phase(const MBarrier* barrier, uint32_t phase) {
  if (barrier->phase != phase) return;
  me->barrier = barrier, me->phase = phase;
  me->block->watching.push_back(me);
  wait_as(State::at_mbarrier);
}
// Let the copy arrive that was begun first, or any. Returns whether there was one.
inline bool land_one(std::vector<Block>& blocks, std::mt19937* random) {
  for (Block& block : blocks) {
    if (block.flights.empty()) continue;
    const size_t i = random ? (*random)() % block.flights.size() : 0;
    land(block.flights[i]);
    block.flights.erase(block.flights.begin() + long(i));
    return true;
  }
  return false;
}

inline std::string text(const uint3& v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

// Wake the threads whose phase of an mbarrier has ended.
inline void wake_watching(std::vector<Block>& blocks) {
  for (Block& block : blocks) {
    std::vector<Fiber*>& all = block.watching;
    const auto waits = [](const Fiber* fiber) { return fiber->barrier->phase == fiber->phase; };
    const auto ended = std::stable_partition(all.begin(), all.end(), waits);
    std::for_each(ended, all.end(), wake);
    all.erase(ended, all.end());
  }
}

// Run resident blocks to their end; `order` has all threads. Any order must give the same answer:
// each round takes the threads that are ready in another one. An eager run takes one warp a round
// and keeps its order for a while, so that warps get far apart.
inline void run_blocks(std::vector<Block>& blocks, const std::vector<Fiber*>& order,
                       std::mt19937* random) {
  std::vector<Fiber*> ready = order;
  std::vector<Warp*> warps;
  for (Block& block : blocks)
    for (Warp& warp : block.warps) warps.push_back(&warp);
  awake.clear();
  for (;;) {
    if (eager) {
      for (Fiber* fiber : ready) fiber->warp->ready.push_back(fiber);
      ready.clear();
      if ((*random)() % 64 == 0) {
        std::shuffle(warps.begin(), warps.end(), *random);
        for (Warp* warp : warps) std::shuffle(warp->lanes.begin(), warp->lanes.end(), *random);
      }
      const auto first = std::find_if(warps.begin(), warps.end(),
                                      [](const Warp* warp) { return !warp->ready.empty(); });
      if (first != warps.end()) ready.swap((*first)->ready);
    } else if (random) {
      std::shuffle(ready.begin(), ready.end(), *random);
    }
    const bool ran = !ready.empty();
    for (Fiber* fiber : ready) to_fiber(fiber);
    ready.clear();
    if (!failure.empty()) throw std::runtime_error(std::exchange(failure, {}));
    wake_watching(blocks);
    ready.swap(awake);
    if (ran || !ready.empty() || land_one(blocks, random)) continue;
    for (Fiber* fiber : order) {
      if (fiber->state == State::done) continue;
      const State state = fiber->state;
      const char* place = state == State::at_block_barrier  ? "__syncthreads"
                          : state == State::at_part_barrier ? "barrier.sync"
                          : state == State::at_mbarrier     ? "an mbarrier"
                                                            : "a warp collective";
      throw std::runtime_error("simt: deadlock, block " + text(fiber->block->idx) + " thread " +
                               text(fiber->tid) + " waits at " + place +
                               " that another thread never reaches");
    }
    return;
  }
}

inline Block make_block(size_t index, size_t shared_bytes, std::vector<unsigned char>& store) {
  Block block;
  const size_t x = index % grid_dim.x;
  const size_t y = index / grid_dim.x % grid_dim.y;
  const size_t z = index / grid_dim.x / grid_dim.y;
  block.idx = {unsigned(x), unsigned(y), unsigned(z)};
  store.assign(kSharedAlignment + shared_bytes + kGuardBytes, kPoison);
  block.shared = store.data() + -reinterpret_cast<uintptr_t>(store.data()) % kSharedAlignment;
  block.warps.resize((size_t(block_dim.x) * block_dim.y * block_dim.z + 31) / 32);
  return block;
}

// Give every thread of `blocks` a fiber; returns them in index order.
inline std::vector<Fiber*> assign_fibers(std::vector<Block>& blocks, std::vector<Fiber>& fibers) {
  std::vector<Fiber*> order;
  for (Block& block : blocks)
    for (unsigned t = 0; t < block_dim.x * block_dim.y * block_dim.z; ++t) {
      Fiber& fiber = fibers[order.size()];
      fiber.state = State::ready;
      fiber.tid = {t % block_dim.x, t / block_dim.x % block_dim.y, t / (block_dim.x * block_dim.y)};
      fiber.lane = int(t % 32);
      fiber.groups.clear(), fiber.open_group.clear(), fiber.products.clear();
      fiber.block = &block;
      ++block.threads;
      fiber.warp = &block.warps[t / 32];
      fiber.warp->lanes.push_back(&fiber);
      order.push_back(&fiber);
    }
  return order;
}

inline void check_guard(const Block& block, size_t shared_bytes) {
  for (size_t i = shared_bytes; i < shared_bytes + kGuardBytes; ++i)
    if (block.shared[i] != kPoison)
      throw std::runtime_error("simt: a thread of block " + text(block.idx) + " wrote past its " +
                               std::to_string(shared_bytes) + " bytes of shared memory");
}

// Whether the hardware would take this launch: sizes of sm_80 and later, shared memory of sm_90
// (smaller chips: config.h).
inline bool launchable(dim3 grid, dim3 block, size_t shared_bytes) {
  const size_t threads = size_t(block.x) * block.y * block.z;
  return threads >= 1 && threads <= 1024 && block.z <= 64 && grid.x >= 1 && grid.x <= 0x7fffffff &&
         grid.y >= 1 && grid.y <= 65535 && grid.z >= 1 && grid.z <= 65535 &&
         shared_bytes <= 227 << 10;
}

// Run `kernel_call` once per thread of the grid. seed 0 takes the threads in index order, other
// seeds shuffle blocks and threads; even ones let copies arrive early and warps run ahead, to catch
// memory that is used again too soon. Throws std::runtime_error on a deadlock, a shared memory
// overrun or an exception inside the kernel.
inline void launch(dim3 grid, dim3 block, size_t shared_bytes, unsigned seed,
                   std::function<void()> kernel_call) {
  const size_t block_threads = size_t(block.x) * block.y * block.z;
  const size_t n_blocks = size_t(grid.x) * grid.y * grid.z;
  const size_t resident = std::min(n_blocks, std::max<size_t>(1, kResidentThreads / block_threads));
  std::mt19937 random(seed);
  std::vector<size_t> block_order(n_blocks);
  std::iota(block_order.begin(), block_order.end(), size_t(0));
  if (seed) std::shuffle(block_order.begin(), block_order.end(), random);
  grid_dim = grid, block_dim = block, body = std::move(kernel_call);
  failure.clear();
  eager = seed && seed % 2 == 0;
  std::vector<Fiber>& fibers = pool.fibers(resident * block_threads);
  if (pool.shared.size() < resident) pool.shared.resize(resident);
  try {
    for (size_t first = 0; first < n_blocks; first += resident) {
      std::vector<Block> blocks;
      for (size_t i = first; i < std::min(first + resident, n_blocks); ++i)
        blocks.push_back(make_block(block_order[i], shared_bytes, pool.shared[i - first]));
      std::vector<Fiber*> order = assign_fibers(blocks, fibers);
      run_blocks(blocks, order, seed ? &random : nullptr);
      for (const Block& done : blocks) check_guard(done, shared_bytes);
    }
  } catch (...) {
    pool.clear();
    throw;
  }
}

}  // namespace simt

#include "core/sim/simt_builtins.h"
