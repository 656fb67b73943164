// Threads of a block as fibers: their stacks, and the switch from one to another.
#include "emulator_state.h"

#include <sys/mman.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include <new>

#if !defined(__x86_64__)
#error "the emulator's fibers are written for x86-64"
#endif

// Saves the callee-saved registers on this stack and the stack pointer in *from, then continues on stack `to`.
extern "C" void pytbptt_switch_stack(void** from, void* to);
asm(R"(
.text
.type pytbptt_switch_stack, @function
pytbptt_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pytbptt_switch_stack, .-pytbptt_switch_stack
)");

namespace pytbptt::emulator {
namespace {

constexpr std::size_t stack_bytes = 256 * 1024, page = 4096;
void* scheduler_stack_pointer = nullptr;

void* allocate_stack() {
  void* const memory =
      mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  mprotect(memory, page, PROT_NONE);
  return memory;
}

}  // namespace

void prepare_fiber(Thread& thread, void (*entry)()) {
  if (thread.stack == nullptr) thread.stack = allocate_stack();
#ifdef __SANITIZE_ADDRESS__
  // A thread that an error ended in mid-function has left its variables poisoned.
  __asan_unpoison_memory_region(static_cast<char*>(thread.stack) + page, stack_bytes);
#endif
  // As pytbptt_switch_stack leaves a stack: six registers, the return address, and here no caller.
  auto** top = reinterpret_cast<void**>(static_cast<char*>(thread.stack) + page + stack_bytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(entry);
  std::fill(top - 8, top - 2, nullptr);
  thread.stack_pointer = top - 8;
}

void switch_to_current_thread() {
  pytbptt_switch_stack(&scheduler_stack_pointer, current_thread().stack_pointer);
}

void switch_to_scheduler() {
  pytbptt_switch_stack(&current_thread().stack_pointer, scheduler_stack_pointer);
}

// A stack takes two mappings, and vm.max_map_count limits those of a process: stacks that only a large cooperative
// launch needs are freed.
void release_stacks() {
  for (std::size_t i = max_threads; i < gpu.threads.size(); ++i) munmap(gpu.threads[i].stack, stack_bytes + page);
  gpu.threads.resize(std::min<std::size_t>(gpu.threads.size(), max_threads));
}

}  // namespace pytbptt::emulator
