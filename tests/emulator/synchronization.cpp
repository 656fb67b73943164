// Barriers, warp and warpgroup collectives, and flags: which threads wait, and what happens before what.
#include "emulator_state.h"

#include <cstring>

namespace pytbptt::emulator {

const char* const flag_wait = "a flag";

namespace {

// Arrives at a rendezvous of `expected` threads; true for the last one, which resets it.
bool arrive(Rendezvous& rendezvous, int expected, const char* name, const SourceLocation& location) {
  if (rendezvous.arrived == 0) {
    rendezvous.name = name;
    rendezvous.location = location;
  } else if (std::strcmp(rendezvous.name, name) != 0 || rendezvous.location.line() != location.line() ||
             std::strcmp(rendezvous.location.file_name(), location.file_name()) != 0) {
    fail(std::string(name) + " diverges: other threads are at " + rendezvous.name + " in " +
             describe_location(rendezvous.location),
         location);
  }
  if (++rendezvous.arrived < expected) return false;
  rendezvous.arrived = 0;
  return true;
}

// Resumes threads of the current block, from thread `first` of the block on.
void resume(int first, int count) {
  first += first_thread_of_block();
  for (int i = first; i < first + count; ++i) set_runnable(i, true);
}

// The same after a barrier: each thread acquires the clocks of all.
void resume_merged(int first, int count) {
  const int begin = first + first_thread_of_block();
  VectorClock& merged = gpu.threads[begin].clock;
  for (int i = begin; i < begin + count; ++i) merge(merged, gpu.threads[i].clock);
  for (int i = begin + 1; i < begin + count; ++i) gpu.threads[i].clock = merged;
  resume(first, count);
}

}  // namespace

void merge(VectorClock& into, const VectorClock& from) {
  for (std::size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

void sync_threads(const SourceLocation& location) {
  Block& block = current_block();
  if (!arrive(block.barrier, gpu.threads_per_block, "sync_threads", location)) {
    return wait_for("sync_threads", location);
  }
  ++block.epoch;
  resume_merged(0, gpu.threads_per_block);
}

void sync_warp(const SourceLocation& location) {
  Block& block = current_block();
  const int warp = thread_in_block() / warp_size;
  if (!arrive(block.warp_operations[warp], warp_size, "sync_warp", location)) return wait_for("sync_warp", location);
  ++block.warp_epoch[warp];
  resume_merged(warp * warp_size, warp_size);
}

void sync_warpgroup(const SourceLocation& location) {
  Block& block = current_block();
  const int warpgroup = thread_in_block() / warpgroup_size;
  if (!arrive(block.warpgroup_barriers[warpgroup], warpgroup_size, "sync_warpgroup", location)) {
    return wait_for("sync_warpgroup", location);
  }
  ++block.warpgroup_epoch[warpgroup];
  resume_merged(warpgroup * warpgroup_size, warpgroup_size);
}

void warp_collective(const char* name, void* argument, void (*perform)(void** arguments),
                     const SourceLocation& location) {
  const int self = thread_in_block(), warp = self / warp_size;
  Rendezvous& rendezvous = current_block().warp_operations[warp];
  rendezvous.arguments[self % warp_size] = argument;
  if (!arrive(rendezvous, warp_size, name, location)) return wait_for(name, location);
  perform(rendezvous.arguments);
  resume(warp * warp_size, warp_size);
}

void warpgroup_collective(const char* name, void* argument, void (*perform)(void** arguments),
                          const SourceLocation& location) {
  if (!gpu.supports_wgmma) fail(std::string(name) + " on a GPU without WGMMA", location);
  if (!current_thread().wgmma_fenced) fail(std::string(name) + " without a warpgroup_arrive before it", location);
  const int self = thread_in_block(), warpgroup = self / warpgroup_size;
  Rendezvous& rendezvous = current_block().warpgroup_operations[warpgroup];
  rendezvous.arguments[self % warpgroup_size] = argument;
  if (!arrive(rendezvous, warpgroup_size, name, location)) return wait_for(name, location);
  perform(rendezvous.arguments);
  resume(warpgroup * warpgroup_size, warpgroup_size);
}

void store_release(std::uint32_t* flag, std::uint32_t value, const SourceLocation& location) {
  const Buffer* const buffer = find_buffer(flag, sizeof(*flag));
  if (buffer == nullptr || !buffer->writable) fail("sets a flag outside every buffer", location);
  std::vector<Release>& releases = gpu.flags[flag];
  if (value <= *flag) fail("a flag goes from " + std::to_string(*flag) + " to " + std::to_string(value), location);
  VectorClock clock = current_thread().clock;
  if (!clock.empty()) clock[current_block().index] = current_block().epoch;
  if (!releases.empty()) merge(clock, releases.back().clock);
  releases.push_back({value, std::move(clock)});
  *flag = value;
  for (int i = 0; i < gpu.resident_threads; ++i) {
    const Thread& thread = gpu.threads[i];
    if (!thread.done && thread.waiting_for == flag_wait) set_runnable(i, true);
  }
}

void wait_at_least(const std::uint32_t* flag, std::uint32_t value, const SourceLocation& location) {
  if (find_buffer(flag, sizeof(*flag)) == nullptr) fail("waits for a flag outside every buffer", location);
  while (*flag < value) wait_for(flag_wait, location);
  Thread& self = current_thread();
  self.waiting_for = nullptr;
  // Acquires the smallest value that satisfies it, so that what is detected does not depend on the schedule.
  for (const Release& release : gpu.flags[flag]) {
    if (release.value < value) continue;
    merge(self.clock, release.clock);
    return;
  }
}

}  // namespace pytbptt::emulator
