// cp.async copies and WGMMAs in flight: their results appear only when they are waited for.
#include "emulator_state.h"

#include <cmath>
#include <cstring>

namespace pytbptt::emulator {
namespace {

void mark_in_flight(Block& block, const AsyncCopy& copy, bool in_flight) {
  const std::size_t first = shared_granule(block, copy.to);
  for (std::size_t i = first; i < first + copy.bytes / granule; ++i) block.shared_shadow[i].in_flight = in_flight;
}

}  // namespace

void issue_async_copy(void* to, const void* from, int bytes, int valid, const SourceLocation& location) {
  if (valid < 0 || valid > bytes)
    fail("a copy: found " + std::to_string(valid) + " valid bytes, expected 0 to " + std::to_string(bytes), location);
  if (reinterpret_cast<std::uintptr_t>(from) % bytes != 0)
    fail("a copy from a misaligned address, expected a multiple of " + std::to_string(bytes), location);
  // No race check of the source: it is an input, or was written by an earlier launch.
  if (valid > 0 && find_buffer(from, valid) == nullptr) fail("copies from outside every buffer", location);
  check_shared(to, bytes, true, location);
  const AsyncCopy copy{static_cast<char*>(to), static_cast<const char*>(from), bytes, valid};
  mark_in_flight(current_block(), copy, true);
  current_thread().copies.push_back(copy);
}

void complete_async_copies(const SourceLocation& location) {
  std::vector<AsyncCopy>& copies = current_thread().copies;
  for (const AsyncCopy& copy : copies) {
    mark_in_flight(current_block(), copy, false);
    check_shared(copy.to, copy.bytes, true, location);
    std::memset(copy.to, 0, copy.bytes);
    std::memcpy(copy.to, copy.from, copy.valid);
  }
  copies.clear();
}

void track_async_operand(const void* data, const SourceLocation& location) {
  const Block& block = current_block();
  const std::size_t first = shared_granule(block, data);
  for (std::size_t i = first; i < first + 16 / granule; ++i) {
    const Access& write = block.shared_shadow[i].write;
    if (write.thread == no_thread) continue;
    if (gpu.threads[first_thread_of_block() + write.thread].async_fences == write.async_fences) {
      fail("a WGMMA reads what thread " + std::to_string(write.thread) + " wrote, with no fence_async_shared between",
           location);
    }
  }
  Thread& self = current_thread();
  self.operands.push_back({data, {}, self.committed_groups, location});
  std::memcpy(self.operands.back().bytes, data, 16);
}

float* pending_accumulator(int thread_of_warpgroup, float* accumulator, int count) {
  Thread& owner = gpu.threads[gpu.current / warpgroup_size * warpgroup_size + thread_of_warpgroup];
  for (PendingAccumulator& pending : owner.accumulators) {
    if (pending.to != accumulator) continue;
    pending.group = owner.committed_groups;
    return pending.values.data();
  }
  owner.accumulators.push_back({accumulator, {accumulator, accumulator + count}, owner.committed_groups});
  std::fill(accumulator, accumulator + count, std::nanf(""));
  return owner.accumulators.back().values.data();
}

void fence_async_shared() {
  ++current_thread().async_fences;
}

void warpgroup_arrive() {
  current_thread().wgmma_fenced = true;
}

void warpgroup_commit_batch() {
  ++current_thread().committed_groups;
}

void warpgroup_wait(int groups, const SourceLocation& location) {
  Thread& self = current_thread();
  self.wgmma_fenced = false;
  const auto is_done = [&](const auto& pending) { return pending.group < self.committed_groups - groups; };
  for (const AsyncOperand& operand : self.operands) {
    if (is_done(operand) && std::memcmp(operand.data, operand.bytes, 16) != 0) {
      fail(
          "an operand of the WGMMA at " + describe_location(operand.location) + " was written before it was waited for",
          location);
    }
  }
  for (const PendingAccumulator& pending : self.accumulators) {
    if (is_done(pending)) std::copy(pending.values.begin(), pending.values.end(), pending.to);
  }
  self.operands.erase(std::remove_if(self.operands.begin(), self.operands.end(), is_done), self.operands.end());
  self.accumulators.erase(std::remove_if(self.accumulators.begin(), self.accumulators.end(), is_done),
                          self.accumulators.end());
}

}  // namespace pytbptt::emulator
