// Data races: two accesses to the same memory that no barrier or flag orders, found by shadow memory and vector clocks.
#include "emulator_state.h"

namespace pytbptt::emulator {
namespace {

// Two accesses to shared memory are ordered if a block barrier lies between them, or a barrier of a warp or warpgroup
// that both threads belong to.
bool ordered(const Access& earlier, const Block& block, int thread) {
  const int warp = thread / warp_size, warpgroup = thread / warpgroup_size;
  return earlier.thread == no_thread || earlier.thread == thread || earlier.block_epoch != block.epoch ||
         (earlier.warpgroup == warpgroup && earlier.warpgroup_epoch != block.warpgroup_epoch[warpgroup]) ||
         (earlier.warp == warp && earlier.warp_epoch != block.warp_epoch[warp]);
}

// Records an access by the current thread; `add` keeps the earlier ones that it is not ordered after.
void record(Access& access, const Block& block, int thread, bool add) {
  const int warp = thread / warp_size, warpgroup = thread / warpgroup_size;
  const bool same_warpgroup = access.warpgroup == warpgroup;
  const bool concurrent = add && access.thread != no_thread && access.block_epoch == block.epoch &&
                          (!same_warpgroup || access.warpgroup_epoch == block.warpgroup_epoch[warpgroup]);
  if (concurrent && access.warp != warp) {
    if (!same_warpgroup) access.warpgroup = multiple_threads;
    access.warp = access.thread = multiple_threads;
  } else if (concurrent && access.thread != thread && access.warp_epoch == block.warp_epoch[warp]) {
    access.thread = multiple_threads;
  } else {
    access = {thread,
              warp,
              warpgroup,
              block.epoch,
              block.warpgroup_epoch[warpgroup],
              block.warp_epoch[warp],
              current_thread().async_fences};
  }
}

// Whether what `block` did in its epoch `epoch` happens before what the current thread does now.
bool happens_before(std::int64_t block, unsigned epoch) {
  const VectorClock& clock = current_thread().clock;
  return block == current_block().index || (!clock.empty() && clock[block] > epoch);
}

void record_read(GlobalShadow& shadow, const Block& block) {
  const auto own = std::find_if(shadow.reads.rbegin(), shadow.reads.rend(),
                                [&](const BlockRead& read) { return read.block == block.index; });
  if (own == shadow.reads.rend()) {
    shadow.reads.push_back({block.index, block.epoch});
  } else {
    own->epoch = block.epoch;
  }
}

}  // namespace

void check_shared(const void* data, std::size_t bytes, bool write, const SourceLocation& location) {
  Block& block = current_block();
  const int self = thread_in_block();
  const std::size_t first = shared_granule(block, data);
  for (std::size_t i = first; i < first + bytes / granule; ++i) {
    SharedShadow& shadow = block.shared_shadow[i];
    if (shadow.in_flight) fail("accesses shared memory that an unfinished copy is going to write", location);
    if (!ordered(shadow.write, block, self)) {
      fail("race: accesses shared memory that thread " + std::to_string(shadow.write.thread) +
               " wrote, with no barrier between",
           location);
    }
    if (write && !ordered(shadow.read, block, self)) {
      fail("race: writes shared memory that another thread reads, with no barrier between", location);
    }
    record(write ? shadow.write : shadow.read, block, self, !write);
  }
}

void check_global_race(Buffer& buffer, const void* data, std::size_t bytes, bool write,
                       const SourceLocation& location) {
  const Block& block = current_block();
  const int self = thread_in_block();
  const std::size_t begin = reinterpret_cast<std::uintptr_t>(data) - buffer.begin;
  for (std::size_t i = begin / granule; i <= (begin + bytes - 1) / granule; ++i) {
    GlobalShadow& shadow = buffer.shadow[i];
    if (shadow.written_by != no_block && !happens_before(shadow.written_by, shadow.epoch)) {
      fail("accesses what block " + std::to_string(shadow.written_by) + " wrote in the same launch", location);
    }
    if (shadow.written_by == block.index && shadow.thread != self && shadow.epoch == block.epoch) {
      fail("accesses what thread " + std::to_string(shadow.thread) + " wrote, with no sync_threads between", location);
    }
    if (!write) {
      record_read(shadow, block);
      continue;
    }
    for (const BlockRead& read : shadow.reads) {
      if (!happens_before(read.block, read.epoch)) fail("writes what another block read in the same launch", location);
    }
    shadow.written_by = block.index;
    shadow.thread = self;
    shadow.epoch = block.epoch;
    shadow.reads.clear();
  }
}

}  // namespace pytbptt::emulator
