// Runs the blocks of a launch, and chooses the thread that runs next.
#include "emulator_state.h"

#include <iterator>

namespace pytbptt::emulator {

Gpu gpu;

namespace {

void thread_main() {
  (*gpu.kernel)();
  Thread& self = current_thread();
  if (!self.copies.empty()) {
    fail("the thread ends with copies that it never waited for", SourceLocation::current());
  }
  if (!self.accumulators.empty()) {
    fail("the thread ends with WGMMAs that it never waited for", SourceLocation::current());
  }
  self.done = true;
  --gpu.unfinished;
  set_runnable(gpu.current, false);
  switch_to_scheduler();
}

void prepare_thread(Thread& thread) {
  prepare_fiber(thread, &thread_main);
  thread.done = false;
  thread.waiting_for = nullptr;
  thread.copies.clear();
  thread.accumulators.clear();
  thread.operands.clear();
  thread.committed_groups = 0;
  thread.wgmma_fenced = false;
  thread.async_fences = 0;
  thread.clock.clear();
}

void prepare_block(Block& block, std::int64_t index, int threads) {
  block.index = index;
  block.epoch = 1;
  block.barrier = {};
  for (Rendezvous& operation : block.warpgroup_operations) operation = {};
  for (Rendezvous& barrier : block.warpgroup_barriers) barrier = {};
  std::fill(std::begin(block.warpgroup_epoch), std::end(block.warpgroup_epoch), 1);
  for (int warp = 0; warp < threads / warp_size; ++warp) {
    block.warp_operations[warp] = {};
    block.warp_epoch[warp] = 1;
  }
  // Uninitialised shared memory: all ones is NaN in every floating-point type.
  block.shared_storage.assign(gpu.shared_bytes + 1024, static_cast<char>(0xff));
  auto address = reinterpret_cast<std::uintptr_t>(block.shared_storage.data());
  block.shared = reinterpret_cast<char*>((address + 1023) / 1024 * 1024);
  block.shared_shadow.assign(gpu.shared_bytes / granule, {});
}

int next_runnable_thread() {
  const int words = static_cast<int>(gpu.runnable.size());
  if (gpu.schedule == 1) {
    for (int word = words - 1; word >= 0; --word) {
      if (gpu.runnable[word] != 0) return 64 * word + 63 - __builtin_clzll(gpu.runnable[word]);
    }
    return no_thread;
  }
  const int start = gpu.schedule == 0 ? 0 : static_cast<int>(gpu.random() % gpu.resident_threads);
  for (int step = 0; step <= words; ++step) {
    const int word = (start / 64 + step) % words;
    std::uint64_t bits = gpu.runnable[word];
    if (step == 0) bits &= ~std::uint64_t{0} << (start % 64);
    if (bits != 0) return 64 * word + __builtin_ctzll(bits);
  }
  return no_thread;
}

// Runs resident blocks until all threads have ended or one has failed.
void run_blocks(const std::vector<std::int64_t>& indices, bool cooperative, int threads) {
  gpu.threads_per_block = threads;
  gpu.resident_threads = gpu.unfinished = static_cast<int>(indices.size()) * threads;
  gpu.blocks.resize(indices.size());
  gpu.threads.resize(std::max<std::size_t>(gpu.threads.size(), gpu.resident_threads));
  gpu.runnable.assign((gpu.resident_threads + 63) / 64, 0);
  for (std::size_t i = 0; i < indices.size(); ++i) prepare_block(gpu.blocks[i], indices[i], threads);
  for (int i = 0; i < gpu.resident_threads; ++i) {
    prepare_thread(gpu.threads[i]);
    if (cooperative) gpu.threads[i].clock.assign(indices.size(), 0);
    set_runnable(i, true);
  }
  while (gpu.unfinished > 0) {
    gpu.current = next_runnable_thread();
    if (gpu.current == no_thread) {
      gpu.error = describe_deadlock();
      return;
    }
    switch_to_current_thread();
    if (!gpu.error.empty()) return;
  }
}

}  // namespace

void set_schedule(unsigned schedule) {
  gpu.schedule = schedule;
  gpu.random.seed(schedule);
}

void set_wgmma_support(bool supported) {
  gpu.supports_wgmma = supported;
}

bool supports_wgmma() {
  return gpu.supports_wgmma;
}

void run_grid(std::int64_t blocks, bool cooperative, int threads, int shared_bytes,
              const std::function<void()>& kernel) {
  if (!gpu.error.empty()) return;
  if (threads % warp_size != 0 || threads > max_threads) {
    gpu.error = "a block of " + std::to_string(threads) + " threads";
    return;
  }
  if (shared_bytes % 16 != 0 || shared_bytes > 227 * 1024) {
    gpu.error = std::to_string(shared_bytes) + " bytes of shared memory";
    return;
  }
  gpu.kernel = &kernel;
  gpu.shared_bytes = static_cast<std::size_t>(shared_bytes);
  gpu.flags.clear();
  for (Buffer& buffer : gpu.buffers) {
    if (buffer.writable) buffer.shadow.assign((buffer.end - buffer.begin + granule - 1) / granule, {});
  }
  std::vector<std::int64_t> order(blocks);
  for (std::int64_t i = 0; i < blocks; ++i) order[i] = i;
  if (cooperative) {
    run_blocks(order, true, threads);
    return release_stacks();
  }
  if (gpu.schedule == 1) std::reverse(order.begin(), order.end());
  if (gpu.schedule > 1) std::shuffle(order.begin(), order.end(), gpu.random);
  for (const std::int64_t block : order) {
    run_blocks({block}, false, threads);
    if (!gpu.error.empty()) return;
  }
}

void set_runnable(int thread, bool runnable) {
  const std::uint64_t bit = std::uint64_t{1} << (thread % 64);
  std::uint64_t& word = gpu.runnable[thread / 64];
  word = runnable ? word | bit : word & ~bit;
}

void wait_for(const char* what, const SourceLocation& location) {
  Thread& self = current_thread();
  self.waiting_for = what;
  self.location = location;
  set_runnable(gpu.current, false);
  switch_to_scheduler();
}

int thread() {
  return thread_in_block();
}

int block() {
  return static_cast<int>(current_block().index);
}

}  // namespace pytbptt::emulator
