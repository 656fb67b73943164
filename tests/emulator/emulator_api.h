// Interface of the emulator: what device code (emulator.h) and the test libraries call.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <source_location>
#include <string>

namespace pytbptt::emulator {

using SourceLocation = std::source_location;

// Blocks of a cooperative launch that fit on the emulated GPU.
constexpr std::int64_t max_coresident_blocks = 64;

// Set-up of a launch.
// Order in which blocks and threads run. 0: first to last, 1: last to first, otherwise: seed of a random order.
void set_schedule(unsigned schedule);
// Whether the GPU has WGMMA.
void set_wgmma_support(bool supported);
bool supports_wgmma();
// Registers global memory. Kernels may access registered memory only.
void add_buffer(const void* data, std::size_t bytes, bool writable);
void clear_buffers();

// Launches, and the first error since `clear_error` (empty: none).
void run_grid(std::int64_t blocks, bool cooperative, int threads, int shared_bytes,
              const std::function<void()>& kernel);
const std::string& error();
void clear_error();
// Records the error and ends the calling thread and its launch.
[[noreturn]] void fail(const std::string& message, const SourceLocation& location);

// Index of the calling thread in its block, and of its block in the grid.
int thread();
int block();

// Barriers, and operations that a warp or a warpgroup executes together: all threads pass an argument, `perform` is
// called once with all of them.
void sync_threads(const SourceLocation& location);
void sync_warp(const SourceLocation& location);
void sync_warpgroup(const SourceLocation& location);
void warp_collective(const char* name, void* argument, void (*perform)(void** arguments),
                     const SourceLocation& location);
void warpgroup_collective(const char* name, void* argument, void (*perform)(void** arguments),
                          const SourceLocation& location);

// Flags in global memory.
void store_release(std::uint32_t* flag, std::uint32_t value, const SourceLocation& location);
void wait_at_least(const std::uint32_t* flag, std::uint32_t value, const SourceLocation& location);

// Memory accesses, each checked before it is made.
void check_global(const void* data, std::size_t bytes, bool write, const SourceLocation& location);
void check_shared(const void* data, std::size_t bytes, bool write, const SourceLocation& location);
char* shared_memory(int first_byte, std::size_t bytes);
std::size_t shared_offset(const void* data);  // in bytes from the start of the block's shared memory
void zero_memory(void* data, std::size_t bytes);

// cp.async.
void issue_async_copy(void* to, const void* from, int bytes, int valid, const SourceLocation& location);
void complete_async_copies(const SourceLocation& location);

// WGMMA.
// Records that a WGMMA reads 16 bytes of shared memory asynchronously.
void track_async_operand(const void* data, const SourceLocation& location);
// Buffer for the accumulator of one thread of the calling warpgroup, copied to `accumulator` by `warpgroup_wait`.
float* pending_accumulator(int thread_of_warpgroup, float* accumulator, int count);
void fence_async_shared();
void warpgroup_arrive();
void warpgroup_commit_batch();
void warpgroup_wait(int groups, const SourceLocation& location);

}  // namespace pytbptt::emulator
