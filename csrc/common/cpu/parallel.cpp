#include "common/cpu/parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <thread>

#include "common/tensors.h"

namespace pytbptt::cpu {
namespace {

std::atomic<bool> threads_run_concurrently{false};

// parallel_for over [0, places): calls body(begin, count) once per thread. All chunks but the last have the same size.
// Rethrows an exception from a worker.
void on_threads(int places, const std::function<void(int, int)>& body) {
  std::exception_ptr thrown;
  std::mutex one_at_a_time;
  torch::stable::parallel_for(0, places, /*grain_size=*/1, [&](std::int64_t begin, std::int64_t end) {
    try {
      body(static_cast<int>(begin), static_cast<int>(end - begin));
    } catch (...) {
      const std::lock_guard<std::mutex> guard(one_at_a_time);
      thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

struct Free {
  std::align_val_t alignment;
  void operator()(void* memory) const { ::operator delete(memory, alignment); }
};

// In huge pages where possible: packed weights are read completely in every step, and 4 KiB pages would exceed the TLB.
std::unique_ptr<void, Free> allocate(std::size_t bytes) {
  constexpr std::size_t line = 64, large_page = std::size_t{1} << 21;
  const std::size_t alignment = bytes < large_page ? line : large_page;
  const std::size_t size = (bytes + alignment - 1) / alignment * alignment;
  const std::align_val_t aligned{alignment};
  std::unique_ptr<void, Free> memory(::operator new(size, aligned), Free{aligned});
#if defined(MADV_HUGEPAGE)
  if (alignment == large_page) madvise(memory.get(), size, MADV_HUGEPAGE);  // only a hint
#endif
  return memory;
}

struct Held {
  std::unique_ptr<void, Free> memory{nullptr, Free{}};
  std::int64_t bytes = 0;
};
thread_local Held held;

}  // namespace

int thread_count() {
  return static_cast<int>(torch::stable::get_num_threads());
}

void set_threads_run_concurrently(bool they_do) {
  threads_run_concurrently = they_do;
}

void run_tasks(std::int64_t tasks, const std::function<void(std::int64_t)>& task) {
  const int threads = static_cast<int>(std::min<std::int64_t>(thread_count(), tasks));
  std::atomic<std::int64_t> next{0};
  const auto take = [&] {
    for (std::int64_t index = next.fetch_add(1, std::memory_order_relaxed); index < tasks;
         index = next.fetch_add(1, std::memory_order_relaxed)) {
      task(index);
    }
  };
  if (threads <= 1) return take();
  on_threads(threads, [&](int, int) { take(); });
}

void run_team(int most, const std::function<void(int, int)>& member) {
  if (most <= 1 || !threads_run_concurrently) return member(0, 1);
  std::atomic<int> of_first{0};  // chunk size, which the first thread publishes
  on_threads(most, [&](int begin, int count) {
    if (begin == 0) of_first.store(count, std::memory_order_release);
    int each;
    while ((each = of_first.load(std::memory_order_acquire)) == 0) std::this_thread::yield();
    member(begin / each, (most + each - 1) / each);
  });
}

Workspace::Workspace(std::int64_t bytes) {
  if (bytes > held.bytes) {
    held = {};  // free before allocating the larger one
    held.memory = allocate(static_cast<std::size_t>(bytes));
    held.bytes = bytes;
  }
  data_ = held.memory.get();
}

Workspace::~Workspace() {
  if (held.bytes > kept_workspace) held = {};
}

}  // namespace pytbptt::cpu
