#include "cpu/parallel.h"

#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

namespace pytbptt::cpu {
namespace {

// Calls body(begin) on every thread of the pool that gets a part of [0, threads). at::parallel_for is a template that
// does nothing in parallel unless this file is compiled with OpenMP; TensorIterator carries it compiled.
void on_threads(int threads, const std::function<void(std::int64_t, std::int64_t)>& body) {
  const at::Tensor places = at::empty({threads}, at::TensorOptions().dtype(at::kByte));
  const auto* base = static_cast<const char*>(places.const_data_ptr());
  at::TensorIterator iterator = at::TensorIterator::borrowing_nullary_op(places);
  iterator.for_each([&](char** data, const std::int64_t* /*strides*/, std::int64_t count,
                        std::int64_t /*outer, which is 1*/) { body(data[0] - base, count); },
                    /*grain_size=*/1);
}

// Whether the pool gives each of `threads` places a thread of its own (OMP_THREAD_LIMIT may forbid it).
bool pool_grants(int threads) {
  static std::atomic<int> granted{0};  // the largest team seen; a smaller one is then granted too
  if (threads <= granted.load(std::memory_order_relaxed)) return true;
  std::atomic<int> parts{0};
  on_threads(threads, [&](std::int64_t, std::int64_t) { parts.fetch_add(1, std::memory_order_relaxed); });
  if (parts.load() != threads) return false;
  granted.store(threads, std::memory_order_relaxed);
  return true;
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// In large pages where the system has them and the buffer fills some: packed weights are read from end to end at every
// step, and are more small pages than a processor remembers the places of.
std::unique_ptr<void, Free> allocate(std::size_t bytes) {
  constexpr std::size_t line = 64, large_page = std::size_t{1} << 21;
  const std::size_t alignment = bytes < large_page ? line : large_page;
  const std::size_t size = (bytes + alignment - 1) / alignment * alignment;
  std::unique_ptr<void, Free> memory(std::aligned_alloc(alignment, size));
  if (memory == nullptr) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (alignment == large_page) madvise(memory.get(), size, MADV_HUGEPAGE);  // a wish: small pages work too
#endif
  return memory;
}

}  // namespace

int thread_count() {
  return at::in_parallel_region() ? 1 : at::get_num_threads();
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
  on_threads(threads, [&](std::int64_t, std::int64_t) { take(); });
}

void run_team(const std::function<void(int, int)>& member) {
  const int threads = thread_count();
  if (threads <= 1 || !pool_grants(threads)) return member(0, 1);
  on_threads(threads, [&](std::int64_t begin, std::int64_t) { member(static_cast<int>(begin), threads); });
}

void* thread_workspace(std::int64_t bytes) {
  thread_local std::unique_ptr<void, Free> memory;
  thread_local std::int64_t held = 0;
  if (bytes > held) {
    memory.reset();
    held = 0;
    memory = allocate(static_cast<std::size_t>(bytes));
    held = bytes;
  }
  return memory.get();
}

}  // namespace pytbptt::cpu
