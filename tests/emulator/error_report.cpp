// The error of a launch, and what its message says of threads and source lines.
#include "emulator_state.h"

namespace pytbptt::emulator {
namespace {

std::string describe_thread() {
  return "thread " + std::to_string(thread_in_block()) + " of block " + std::to_string(current_block().index);
}

}  // namespace

std::string describe_location(const SourceLocation& location) {
  const std::string file = location.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(location.line());
}

// What the threads wait for, once for all threads of a block that wait at the same line.
std::string describe_deadlock() {
  std::string message = "deadlock: no thread can run";
  std::vector<std::string> seen;
  for (int i = 0; i < gpu.resident_threads; ++i) {
    const Thread& thread = gpu.threads[i];
    const std::string block = std::to_string(gpu.blocks[i / gpu.threads_per_block].index);
    const std::string state =
        thread.done ? "ended"
                    : std::string("waiting for ") + thread.waiting_for + " at " + describe_location(thread.location);
    if (std::find(seen.begin(), seen.end(), block + state) != seen.end()) continue;
    seen.push_back(block + state);
    message +=
        "; thread " + std::to_string(i % gpu.threads_per_block) + " of block " + block + " and those like it: " + state;
  }
  return message;
}

const std::string& error() {
  return gpu.error;
}

void clear_error() {
  gpu.error.clear();
}

void fail(const std::string& message, const SourceLocation& location) {
  if (gpu.error.empty()) gpu.error = message + " (" + describe_thread() + ", " + describe_location(location) + ")";
  switch_to_scheduler();
  __builtin_unreachable();  // a thread that failed is not resumed
}

}  // namespace pytbptt::emulator
