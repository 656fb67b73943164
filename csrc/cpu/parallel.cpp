#include "cpu/parallel.h"

#include <ATen/Config.h>
#include <ATen/Parallel.h>
#include <ATen/TensorIterator.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <sys/mman.h>

#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>
#include <thread>

namespace pytbptt::cpu {
namespace {

// Cuts [0, places) into one part for each of as many threads as the pool gives to this call, and calls
// body(begin, count) on each; all parts but the last are of one size. at::parallel_for is a template that does nothing
// in parallel unless this file is compiled with OpenMP; TensorIterator carries it compiled.
void on_threads(int places, const std::function<void(int, int)>& body) {
  const at::Tensor bytes = at::empty({places}, at::TensorOptions().dtype(at::kByte));
  const auto* base = static_cast<const char*>(bytes.const_data_ptr());
  at::TensorIterator iterator = at::TensorIterator::borrowing_nullary_op(bytes);
  iterator.for_each(
      [&](char** data, const std::int64_t* /*strides*/, std::int64_t count, std::int64_t /*outer, which is 1*/) {
        body(static_cast<int>(data[0] - base), static_cast<int>(count));
      },
      /*grain_size=*/1);
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
  on_threads(threads, [&](int, int) { take(); });
}

void run_team(int most, const std::function<void(int, int)>& member) {
  // Only OpenMP's threads are all there before any of them goes on: parts of another pool may have to wait for one
  // another's end.
  if (most <= 1 || !AT_PARALLEL_OPENMP) return member(0, 1);
  std::atomic<int> of_first{0};  // the places that the first thread got, and so all but the last
  on_threads(most, [&](int begin, int count) {
    if (begin == 0) of_first.store(count, std::memory_order_release);
    int each;
    while ((each = of_first.load(std::memory_order_acquire)) == 0) std::this_thread::yield();
    member(begin / each, (most + each - 1) / each);
  });
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
