// State of the emulated GPU, and the functions that the parts of the emulator share.
#pragma once
#include "common/cuda/device/device.h"

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#pragma GCC visibility push(hidden)

namespace pytbptt::emulator {

using device::warp_size;
constexpr int max_threads = 1024, warpgroup_size = 4 * warp_size;
constexpr int max_warps = max_threads / warp_size, max_warpgroups = max_threads / warpgroup_size;
constexpr int no_thread = -1, multiple_threads = -2, no_block = -1;
constexpr std::size_t granule = 2;  // bytes of memory per shadow element

// clock[b]: accesses of block b in epochs below this happen before the owner's next access. A block's epoch counts its
// barriers. For cooperative launches; empty for others, whose blocks are never ordered.
using VectorClock = std::vector<unsigned>;

struct AsyncCopy {
  char* to;
  const char* from;
  int bytes, valid;
};

// Accumulator of WGMMAs in flight, and the group of the last one that adds to it.
struct PendingAccumulator {
  float* to;
  std::vector<float> values;
  int group;
};

// What a WGMMA in flight reads of shared memory.
struct AsyncOperand {
  const void* data;
  char bytes[16];
  int group;
  SourceLocation location;
};

struct Thread {
  void* stack = nullptr;          // lowest byte of its memory, which begins with a guard page
  void* stack_pointer = nullptr;  // while another thread runs
  bool done = true;
  const char* waiting_for = nullptr;
  SourceLocation location;  // where it waits
  std::vector<AsyncCopy> copies;
  std::vector<PendingAccumulator> accumulators;
  std::vector<AsyncOperand> operands;
  int committed_groups = 0;   // of WGMMAs
  bool wgmma_fenced = false;  // since the last warpgroup_wait
  unsigned async_fences = 0;  // calls of fence_async_shared
  VectorClock clock;
};

// Threads that have arrived at a barrier or at a collective operation.
struct Rendezvous {
  int arrived = 0;
  const char* name = nullptr;
  SourceLocation location;
  void* arguments[warpgroup_size] = {};
};

// The last write, or the last reads, of a granule of shared memory: multiple_threads where reads are by several
// threads, warps or warpgroups.
struct Access {
  int thread = no_thread, warp = no_thread, warpgroup = no_thread;
  unsigned block_epoch = 0, warpgroup_epoch = 0, warp_epoch = 0;
  unsigned async_fences = 0;  // that the thread had called
};

struct SharedShadow {
  Access write, read;
  bool in_flight = false;  // destination of an unfinished copy
};

// The last write of a granule of global memory in this launch, and the last read by each block since.
struct BlockRead {
  std::int64_t block;
  unsigned epoch;
};
struct GlobalShadow {
  std::int64_t written_by = no_block;
  int thread = no_thread;
  unsigned epoch = 0;
  std::vector<BlockRead> reads;
};

struct Buffer {
  std::uintptr_t begin, end;
  bool writable;
  std::vector<GlobalShadow> shadow;
};

struct Block {
  std::int64_t index = 0;
  Rendezvous barrier, warp_operations[max_warps];
  Rendezvous warpgroup_operations[max_warpgroups], warpgroup_barriers[max_warpgroups];
  unsigned epoch = 0, warpgroup_epoch[max_warpgroups] = {}, warp_epoch[max_warps] = {};
  std::vector<char> shared_storage;
  char* shared = nullptr;
  std::vector<SharedShadow> shared_shadow;
};

// A value that a flag was set to in this launch, and what happens before whatever acquires it.
struct Release {
  std::uint32_t value;
  VectorClock clock;
};

struct Gpu {
  unsigned schedule = 0;
  bool supports_wgmma = false;
  std::mt19937 random;
  std::vector<Buffer> buffers;
  std::string error;

  // Of the launch.
  const std::function<void()>* kernel = nullptr;
  std::size_t shared_bytes = 0;
  std::map<const std::uint32_t*, std::vector<Release>> flags;

  // Resident blocks and their threads, block by block; `threads` may have more, left by an earlier launch.
  std::vector<Block> blocks;
  std::vector<Thread> threads;
  int threads_per_block = 0, resident_threads = 0;
  int current = 0, unfinished = 0;      // thread that runs, and number of those that have not ended
  std::vector<std::uint64_t> runnable;  // one bit per thread
};
extern Gpu gpu;

inline Thread& current_thread() {
  return gpu.threads[gpu.current];
}
inline Block& current_block() {
  return gpu.blocks[gpu.current / gpu.threads_per_block];
}
inline int thread_in_block() {
  return gpu.current % gpu.threads_per_block;
}
inline int first_thread_of_block() {
  return gpu.current / gpu.threads_per_block * gpu.threads_per_block;
}
inline std::size_t shared_granule(const Block& block, const void* data) {
  return (static_cast<const char*>(data) - block.shared) / granule;
}

// fibers.cpp
void prepare_fiber(Thread& thread, void (*entry)());
void switch_to_current_thread();
void switch_to_scheduler();
void release_stacks();

// scheduler.cpp
void set_runnable(int thread, bool runnable);
void wait_for(const char* what, const SourceLocation& location);

// synchronization.cpp
extern const char* const flag_wait;
void merge(VectorClock& into, const VectorClock& from);

// memory.cpp
Buffer* find_buffer(const void* data, std::size_t bytes);

// race_detector.cpp
void check_global_race(Buffer& buffer, const void* data, std::size_t bytes, bool write, const SourceLocation& location);

// error_report.cpp
std::string describe_location(const SourceLocation& location);
std::string describe_deadlock();

}  // namespace pytbptt::emulator

#pragma GCC visibility pop
