// The machine behind emulator.h: fibres, schedules, and a shadow of every byte of memory that says who touched it when.
#include "common/cuda/device/device.h"

#include <sys/mman.h>
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#include <algorithm>
#include <iterator>
#include <map>
#include <memory>
#include <random>
#include <vector>

#if !defined(__x86_64__)
#error "the emulator's fibres are written for x86-64"
#endif

// Saves the callee-saved registers on this stack and its pointer in *from, and goes on with the stack `to`.
extern "C" void pytbptt_switch(void** from, void* to);
asm(R"(
.text
.type pytbptt_switch, @function
pytbptt_switch:
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
.size pytbptt_switch, .-pytbptt_switch
)");

namespace pytbptt::emulator {
namespace {

using device::warp_size;
constexpr int max_threads = 1024;
constexpr std::size_t stack_bytes = 256 * 1024, page = 4096;
constexpr std::size_t granule = 2;  // bytes of memory with a shadow of their own

struct Copy {
  char* to;
  const char* from;
  int bytes, valid;
};

// Of each block of a launch together, the epochs before which its writes and reads come before what happens now.
// Epochs count a block's barriers.
using Known = std::vector<unsigned>;

// Sums of products that run beside their thread, the group of products that was the last to be added to them, and what
// they read.
struct Sums {
  float* to;
  std::vector<float> values;
  int group;
};
struct Operand16 {
  const void* data;
  char bytes[16];
  int group;
  Place place;
};

struct Thread {
  void* stack = nullptr;  // the lowest byte; a page that nobody may touch lies below
  void* pointer = nullptr;
  bool done = true;
  const char* waits_for = nullptr;
  Place place;
  std::vector<Copy> copies;
  std::vector<Sums> sums;
  std::vector<Operand16> operands;
  int committed = 0;    // groups of products
  bool fenced = false;  // since products were last waited for
  unsigned fences = 0;  // of stores to shared memory, for products
  Known known;          // empty where blocks run one after another: then none may touch what another wrote
};

// What arrives at one barrier or warp operation.
struct Meeting {
  int arrived = 0;
  const char* name = nullptr;
  Place place;
  void* arguments[4 * warp_size] = {};
};

constexpr int nobody = -1, several = -2;
const char* const flag_wait = "a flag";

// The last write, and the last reads, of a granule of shared memory. Barriers count up `epoch`s, of the block, of the
// warpgroup and of the warp: of two accesses by different threads the later one is ordered if the block's epoch has
// changed, or if both are of one warpgroup or warp and its epoch has changed.
struct Access {
  int thread = nobody;  // or several, all of one warp; `warp` is several if they are not, and so `warpgroup`
  int warp = nobody, warpgroup = nobody;
  unsigned block_epoch = 0, warpgroup_epoch = 0, warp_epoch = 0;
  unsigned fences = 0;  // that the thread had seen
};
struct SharedShadow {
  Access write, read;
  bool in_flight = false;
};

// Of global memory: which block wrote it in this launch, which of its threads and when; and when which blocks last read
// it since.
struct Reader {
  std::int64_t block;
  unsigned epoch;
};
struct GlobalShadow {
  std::int64_t written_by = nobody;
  int thread = nobody;
  unsigned epoch = 0;
  std::vector<Reader> readers;
};
struct Buffer {
  std::uintptr_t begin, end;
  bool writable;
  std::vector<GlobalShadow> shadow;
};

struct Block {
  std::int64_t number = 0;
  Meeting barrier;
  Meeting warps[max_threads / warp_size], warpgroups[max_threads / warp_size / 4];
  Meeting warpgroup_barriers[max_threads / warp_size / 4];
  unsigned epoch = 0, warpgroup_epoch[max_threads / warp_size / 4] = {}, warp_epoch[max_threads / warp_size] = {};
  std::vector<char> shared_storage;
  char* shared = nullptr;
  std::vector<SharedShadow> shared_shadow;
};

// What a flag was set to in this launch, and what whoever sees that knows.
struct Release {
  std::uint32_t value;
  Known known;
};

struct Machine {
  unsigned schedule = 0;
  bool warpgroups = false;
  std::mt19937 chance;
  std::vector<Buffer> buffers;
  std::string error;

  std::vector<Block> blocks;    // those that are on the machine at once
  std::vector<Thread> threads;  // theirs, block by block, and maybe more from an earlier launch
  int count = 0, all = 0;       // threads of a block, and of all of them
  int current = 0, unfinished = 0;
  void* scheduler = nullptr;
  std::vector<std::uint64_t> runnable;
  const std::function<void()>* kernel = nullptr;
  std::size_t shared_bytes = 0;
  std::map<const std::uint32_t*, std::vector<Release>> flags;
};
Machine machine;

Block& own_block() {
  return machine.blocks[machine.current / machine.count];
}

std::string who() {
  return "thread " + std::to_string(thread()) + " of block " + std::to_string(own_block().number);
}

std::string where(const Place& place) {
  const std::string file = place.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(place.line());
}

void set_runnable(int thread, bool value) {
  const std::uint64_t bit = std::uint64_t{1} << (thread % 64);
  std::uint64_t& word = machine.runnable[thread / 64];
  word = value ? word | bit : word & ~bit;
}

void to_scheduler() {
  pytbptt_switch(&machine.threads[machine.current].pointer, machine.scheduler);
}

void wait_for(const char* what, const Place& place) {
  Thread& self = machine.threads[machine.current];
  self.waits_for = what;
  self.place = place;
  set_runnable(machine.current, false);
  to_scheduler();
}

void fibre() {
  (*machine.kernel)();
  Thread& self = machine.threads[machine.current];
  if (!self.copies.empty()) fail("the thread ends with copies that it never waited for", Place::current());
  if (!self.sums.empty()) fail("the thread ends with products that it never waited for", Place::current());
  self.done = true;
  --machine.unfinished;
  set_runnable(machine.current, false);
  to_scheduler();
}

void prepare(Thread& thread) {
  if (thread.stack == nullptr) {
    void* const memory =
        mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, page, PROT_NONE);
    thread.stack = memory;
  }
#ifdef __SANITIZE_ADDRESS__
  // A thread that was given up in mid-function has left its variables marked.
  __asan_unpoison_memory_region(static_cast<char*>(thread.stack) + page, stack_bytes);
#endif
  // As `pytbptt_switch` leaves a stack: six registers, the address to go on at, and below it a caller that never was.
  auto** top = reinterpret_cast<void**>(static_cast<char*>(thread.stack) + page + stack_bytes);
  top[-1] = nullptr;
  top[-2] = reinterpret_cast<void*>(&fibre);
  std::fill(top - 8, top - 2, nullptr);
  thread.pointer = top - 8;
  thread.done = false;
  thread.waits_for = nullptr;
  thread.copies.clear();
  thread.sums.clear();
  thread.operands.clear();
  thread.committed = 0;
  thread.fenced = false;
  thread.fences = 0;
  thread.known.clear();
}

// A process may have some tens of thousands of mappings, and a stack takes two: those that only a launch of many blocks
// together needs are not kept.
void release_stacks() {
  for (std::size_t i = max_threads; i < machine.threads.size(); ++i)
    munmap(machine.threads[i].stack, stack_bytes + page);
  machine.threads.resize(std::min<std::size_t>(machine.threads.size(), max_threads));
}

int pick() {
  const int words = static_cast<int>(machine.runnable.size());
  if (machine.schedule == 1) {
    for (int word = words - 1; word >= 0; --word) {
      if (machine.runnable[word] != 0) return 64 * word + 63 - __builtin_clzll(machine.runnable[word]);
    }
    return nobody;
  }
  const int start = machine.schedule == 0 ? 0 : static_cast<int>(machine.chance() % machine.all);
  for (int step = 0; step <= words; ++step) {
    const int word = (start / 64 + step) % words;
    std::uint64_t bits = machine.runnable[word];
    if (step == 0) bits &= ~std::uint64_t{0} << (start % 64);
    if (bits != 0) return 64 * word + __builtin_ctzll(bits);
  }
  return nobody;
}

std::string deadlock() {
  std::string text = "deadlock: nothing can run";
  std::vector<std::string> seen;
  for (int i = 0; i < machine.all; ++i) {
    const Thread& thread = machine.threads[i];
    const std::string block = std::to_string(machine.blocks[i / machine.count].number);
    const std::string state =
        thread.done ? "have ended" : std::string("wait for ") + thread.waits_for + " at " + where(thread.place);
    if (std::find(seen.begin(), seen.end(), block + state) == seen.end()) {
      seen.push_back(block + state);
      text += "; thread " + std::to_string(i % machine.count) + " of block " + block + " and its like " + state;
    }
  }
  return text;
}

void prepare(Block& block, std::int64_t number, int threads) {
  block.number = number;
  block.epoch = 1;
  block.barrier = {};
  for (Meeting& warpgroup : block.warpgroups) warpgroup = {};
  for (Meeting& barrier : block.warpgroup_barriers) barrier = {};
  std::fill(std::begin(block.warpgroup_epoch), std::end(block.warpgroup_epoch), 1);
  for (int warp = 0; warp < threads / warp_size; ++warp) {
    block.warps[warp] = {};
    block.warp_epoch[warp] = 1;
  }
  // All ones is NaN in every type.
  block.shared_storage.assign(machine.shared_bytes + 1024, static_cast<char>(0xff));
  auto address = reinterpret_cast<std::uintptr_t>(block.shared_storage.data());
  block.shared = reinterpret_cast<char*>((address + 1023) / 1024 * 1024);
  block.shared_shadow.assign(machine.shared_bytes / granule, {});
}

// Runs blocks at once, until all have ended or something is wrong. Where they are all of a launch, they may learn of
// one another.
void run_blocks(const std::vector<std::int64_t>& numbers, bool together, int threads) {
  machine.count = threads;
  machine.all = machine.unfinished = static_cast<int>(numbers.size()) * threads;
  machine.blocks.resize(numbers.size());
  machine.threads.resize(std::max<std::size_t>(machine.threads.size(), machine.all));
  machine.runnable.assign((machine.all + 63) / 64, 0);
  for (std::size_t i = 0; i < numbers.size(); ++i) prepare(machine.blocks[i], numbers[i], threads);
  for (int i = 0; i < machine.all; ++i) {
    prepare(machine.threads[i]);
    if (together) machine.threads[i].known.assign(numbers.size(), 0);
    set_runnable(i, true);
  }
  while (machine.unfinished > 0) {
    machine.current = pick();
    if (machine.current == nobody) {
      machine.error = deadlock();
      return;
    }
    pytbptt_switch(&machine.scheduler, machine.threads[machine.current].pointer);
    if (!machine.error.empty()) return;
  }
}

// Lets a thread arrive at a meeting of `wanted`; true for the last one, after which the meeting is empty again.
bool arrive(Meeting& meeting, int wanted, const char* name, const Place& place) {
  if (meeting.arrived == 0) {
    meeting.name = name;
    meeting.place = place;
  } else if (std::strcmp(meeting.name, name) != 0 || meeting.place.line() != place.line() ||
             std::strcmp(meeting.place.file_name(), place.file_name()) != 0) {
    fail(std::string(name) + " diverges: other threads are at " + meeting.name + " in " + where(meeting.place), place);
  }
  if (++meeting.arrived < wanted) return false;
  meeting.arrived = 0;
  return true;
}

Meeting& own_warp() {
  return own_block().warps[thread() / warp_size];
}

void join(Known& into, const Known& from) {
  for (std::size_t i = 0; i < into.size(); ++i) into[i] = std::max(into[i], from[i]);
}

// Threads of the running thread's block go on, each knowing what any of them knew.
void wake(int first, int count, bool joined) {
  first += machine.current / machine.count * machine.count;
  if (joined) {
    Known& all = machine.threads[first].known;
    for (int i = first; i < first + count; ++i) join(all, machine.threads[i].known);
    for (int i = first + 1; i < first + count; ++i) machine.threads[i].known = all;
  }
  for (int i = first; i < first + count; ++i) set_runnable(i, true);
}

bool ordered(const Access& earlier, int thread) {
  const Block& block = own_block();
  const int warp = thread / warp_size, warpgroup = warp / 4;
  return earlier.thread == nobody || earlier.thread == thread || earlier.block_epoch != block.epoch ||
         (earlier.warpgroup == warpgroup && earlier.warpgroup_epoch != block.warpgroup_epoch[warpgroup]) ||
         (earlier.warp == warp && earlier.warp_epoch != block.warp_epoch[warp]);
}

void record(Access& access, bool add) {
  const Block& block = own_block();
  const int self = thread(), warp = self / warp_size, warpgroup = warp / 4;
  const bool of_group = access.warpgroup == warpgroup;
  const bool same_time = add && access.thread != nobody && access.block_epoch == block.epoch &&
                         (!of_group || access.warpgroup_epoch == block.warpgroup_epoch[warpgroup]);
  if (same_time && access.warp != warp) {
    if (!of_group) access.warpgroup = several;
    access.warp = access.thread = several;
  } else if (same_time && access.thread != self && access.warp_epoch == block.warp_epoch[warp]) {
    access.thread = several;
  } else {
    access = {self,
              warp,
              warpgroup,
              block.epoch,
              block.warpgroup_epoch[warpgroup],
              block.warp_epoch[warp],
              machine.threads[machine.current].fences};
  }
}

// Whether what a block did in an epoch of its own came before what the running thread does now.
bool known(std::int64_t block, unsigned epoch) {
  const Known& known = machine.threads[machine.current].known;
  return block == own_block().number || (!known.empty() && known[block] > epoch);
}

Buffer* find_buffer(std::uintptr_t begin, std::size_t bytes) {
  for (Buffer& buffer : machine.buffers) {
    if (begin >= buffer.begin && begin + bytes <= buffer.end) return &buffer;
  }
  return nullptr;
}

}  // namespace

void set_schedule(unsigned schedule) {
  machine.schedule = schedule;
  machine.chance.seed(schedule);
}

void set_warpgroups(bool offered) {
  machine.warpgroups = offered;
}

bool offers_warpgroups() {
  return machine.warpgroups;
}

void add_buffer(const void* data, std::size_t bytes, bool writable) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  machine.buffers.push_back({begin, begin + bytes, writable, {}});
}

void clear_buffers() {
  machine.buffers.clear();
}

const std::string& error() {
  return machine.error;
}

void clear_error() {
  machine.error.clear();
}

void fail(const std::string& what, const Place& place) {
  if (machine.error.empty()) machine.error = what + " (" + who() + ", " + where(place) + ")";
  to_scheduler();
  __builtin_unreachable();  // nobody resumes a thread that failed
}

void run(std::int64_t blocks, bool together, int threads, int shared_bytes, const std::function<void()>& kernel) {
  if (!machine.error.empty()) return;
  if (threads % warp_size != 0 || threads > max_threads) {
    machine.error = "a block of " + std::to_string(threads) + " threads";
    return;
  }
  if (shared_bytes % 16 != 0 || shared_bytes > 227 * 1024) {
    machine.error = std::to_string(shared_bytes) + " bytes of shared memory";
    return;
  }
  machine.kernel = &kernel;
  machine.shared_bytes = static_cast<std::size_t>(shared_bytes);
  machine.flags.clear();
  for (Buffer& buffer : machine.buffers) {
    if (buffer.writable) buffer.shadow.assign((buffer.end - buffer.begin + granule - 1) / granule, {});
  }
  std::vector<std::int64_t> order(blocks);
  for (std::int64_t i = 0; i < blocks; ++i) order[i] = i;
  if (together) {
    run_blocks(order, true, threads);
    return release_stacks();
  }

  if (machine.schedule == 1) std::reverse(order.begin(), order.end());
  if (machine.schedule > 1) std::shuffle(order.begin(), order.end(), machine.chance);
  for (const std::int64_t block : order) {
    run_blocks({block}, false, threads);
    if (!machine.error.empty()) return;
  }
}

int thread() {
  return machine.current % machine.count;
}

int block() {
  return static_cast<int>(own_block().number);
}

void sync_threads(const Place& place) {
  Block& block = own_block();
  if (!arrive(block.barrier, machine.count, "sync_threads", place)) return wait_for("sync_threads", place);
  ++block.epoch;
  wake(0, machine.count, true);
}

void sync_warp(const Place& place) {
  const int warp = thread() / warp_size;
  if (!arrive(own_warp(), warp_size, "sync_warp", place)) return wait_for("sync_warp", place);
  ++own_block().warp_epoch[warp];
  wake(warp * warp_size, warp_size, true);
}

void sync_warpgroup(const Place& place) {
  constexpr int count = 4 * warp_size;
  const int warpgroup = thread() / count;
  if (!arrive(own_block().warpgroup_barriers[warpgroup], count, "sync_warpgroup", place)) {
    return wait_for("sync_warpgroup", place);
  }
  ++own_block().warpgroup_epoch[warpgroup];
  wake(warpgroup * count, count, true);
}

void together(const char* name, void* argument, void (*perform)(void** arguments), const Place& place) {
  Meeting& meeting = own_warp();
  meeting.arguments[thread() % warp_size] = argument;
  if (!arrive(meeting, warp_size, name, place)) return wait_for(name, place);
  perform(meeting.arguments);
  wake(thread() / warp_size * warp_size, warp_size, false);
}

void together_in_warpgroup(const char* name, void* argument, void (*perform)(void** arguments), const Place& place) {
  constexpr int count = 4 * warp_size;
  if (!machine.warpgroups) fail(std::string(name) + " on a machine without warpgroups", place);
  if (!machine.threads[machine.current].fenced) fail(std::string(name) + " without a warpgroup_fence before it", place);
  Meeting& meeting = own_block().warpgroups[thread() / count];
  meeting.arguments[thread() % count] = argument;
  if (!arrive(meeting, count, name, place)) return wait_for(name, place);
  perform(meeting.arguments);
  wake(thread() / count * count, count, false);
}

void read_until_wait(const void* data, const Place& place) {
  Block& block = own_block();
  const std::size_t first = (static_cast<const char*>(data) - block.shared) / granule;
  for (std::size_t i = first; i < first + 16 / granule; ++i) {
    const Access& write = block.shared_shadow[i].write;
    if (write.thread == nobody) continue;
    const int writer = machine.current / machine.count * machine.count + write.thread;
    if (machine.threads[writer].fences == write.fences) {
      fail("a product reads what thread " + std::to_string(write.thread) + " wrote, with no fence_async_shared between",
           place);
    }
  }
  Thread& self = machine.threads[machine.current];
  self.operands.push_back({data, {}, self.committed, place});
  std::memcpy(self.operands.back().bytes, data, 16);
}

float* pending_sums(int thread_of_group, float* sums, int count) {
  constexpr int of_group = 4 * warp_size;
  Thread& owner = machine.threads[machine.current / of_group * of_group + thread_of_group];
  for (Sums& pending : owner.sums) {
    if (pending.to != sums) continue;
    pending.group = owner.committed;
    return pending.values.data();
  }
  owner.sums.push_back({sums, {sums, sums + count}, owner.committed});
  std::fill(sums, sums + count, std::nanf(""));
  return owner.sums.back().values.data();
}

void fence_async_shared() {
  ++machine.threads[machine.current].fences;
}

void warpgroup_fence() {
  machine.threads[machine.current].fenced = true;
}

void warpgroup_commit() {
  ++machine.threads[machine.current].committed;
}

void warpgroup_wait(int groups, const Place& place) {
  Thread& self = machine.threads[machine.current];
  self.fenced = false;
  const auto is_done = [&](const auto& pending) { return pending.group < self.committed - groups; };
  for (const Operand16& operand : self.operands) {
    if (is_done(operand) && std::memcmp(operand.data, operand.bytes, 16) != 0) {
      fail("an operand of the product at " + where(operand.place) + " was written before it was waited for", place);
    }
  }
  for (const Sums& pending : self.sums) {
    if (is_done(pending)) std::copy(pending.values.begin(), pending.values.end(), pending.to);
  }
  self.operands.erase(std::remove_if(self.operands.begin(), self.operands.end(), is_done), self.operands.end());
  self.sums.erase(std::remove_if(self.sums.begin(), self.sums.end(), is_done), self.sums.end());
}

void check_global(const void* data, std::size_t bytes, bool write, const Place& place) {
  const auto begin = reinterpret_cast<std::uintptr_t>(data);
  Buffer* const buffer = find_buffer(begin, bytes);
  if (buffer == nullptr) fail(write ? "writes outside every buffer" : "reads outside every buffer", place);
  if (begin % bytes != 0) fail("misaligned in global memory", place);
  if (!buffer->writable) {
    if (write) fail("writes to an input", place);
    return;
  }
  const Block& block = own_block();
  const std::size_t first = (begin - buffer->begin) / granule, last = (begin - buffer->begin + bytes - 1) / granule;
  for (std::size_t i = first; i <= last; ++i) {
    GlobalShadow& shadow = buffer->shadow[i];
    if (shadow.written_by != nobody && !known(shadow.written_by, shadow.epoch)) {
      fail("touches what block " + std::to_string(shadow.written_by) + " wrote in the same launch", place);
    }
    if (shadow.written_by == block.number && shadow.thread != thread() && shadow.epoch == block.epoch) {
      fail("touches what thread " + std::to_string(shadow.thread) + " wrote, with no sync_threads between", place);
    }
    if (write) {
      for (const Reader& reader : shadow.readers) {
        if (!known(reader.block, reader.epoch)) fail("writes what another block read in the same launch", place);
      }
      shadow.written_by = block.number;
      shadow.thread = thread();
      shadow.epoch = block.epoch;
      shadow.readers.clear();
      continue;
    }
    const auto own = std::find_if(shadow.readers.rbegin(), shadow.readers.rend(),
                                  [&](const Reader& reader) { return reader.block == block.number; });
    if (own == shadow.readers.rend()) {
      shadow.readers.push_back({block.number, block.epoch});
    } else {
      own->epoch = block.epoch;
    }
  }
}

void store_release(std::uint32_t* flag, std::uint32_t value, const Place& place) {
  Buffer* const buffer = find_buffer(reinterpret_cast<std::uintptr_t>(flag), sizeof(*flag));
  if (buffer == nullptr || !buffer->writable) fail("sets a flag outside every buffer", place);
  std::vector<Release>& releases = machine.flags[flag];
  if (value <= *flag) fail("a flag goes from " + std::to_string(*flag) + " to " + std::to_string(value), place);
  Known known = machine.threads[machine.current].known;
  if (!known.empty()) known[own_block().number] = own_block().epoch;
  if (!releases.empty()) join(known, releases.back().known);
  releases.push_back({value, std::move(known)});
  *flag = value;
  for (int i = 0; i < machine.all; ++i) {
    const Thread& thread = machine.threads[i];
    if (!thread.done && thread.waits_for == flag_wait) set_runnable(i, true);
  }
}

void wait_at_least(const std::uint32_t* flag, std::uint32_t value, const Place& place) {
  if (find_buffer(reinterpret_cast<std::uintptr_t>(flag), sizeof(*flag)) == nullptr) {
    fail("waits for a flag outside every buffer", place);
  }
  while (*flag < value) wait_for(flag_wait, place);
  Thread& self = machine.threads[machine.current];
  self.waits_for = nullptr;
  // It learns only what the least value that satisfies it tells, whatever the schedule made of the flag since.
  for (const Release& release : machine.flags[flag]) {
    if (release.value < value) continue;
    join(self.known, release.known);
    return;
  }
}

void clear(void* data, std::size_t bytes) {
  if (!machine.error.empty()) return;
  const Buffer* const buffer = find_buffer(reinterpret_cast<std::uintptr_t>(data), bytes);
  if (buffer == nullptr || !buffer->writable) {
    machine.error = "clears memory outside every buffer";
    return;
  }
  std::memset(data, 0, bytes);
}

char* shared_memory(int first_byte, std::size_t bytes) {
  if (first_byte % 16 != 0 || first_byte + bytes > machine.shared_bytes) {
    fail("shared memory up to byte " + std::to_string(first_byte + bytes) + " of " +
             std::to_string(machine.shared_bytes),
         Place::current());
  }
  return own_block().shared + first_byte;
}

std::size_t shared_offset(const void* data) {
  return static_cast<std::size_t>(static_cast<const char*>(data) - own_block().shared);
}

void check_shared(const void* data, std::size_t bytes, bool write, const Place& place) {
  Block& block = own_block();
  const std::size_t first = (static_cast<const char*>(data) - block.shared) / granule;
  for (std::size_t i = first; i < first + bytes / granule; ++i) {
    SharedShadow& shadow = block.shared_shadow[i];
    if (shadow.in_flight) fail("touches shared memory that an unfinished copy is going to write", place);
    if (!ordered(shadow.write, thread())) {
      fail("race: touches shared memory that thread " + std::to_string(shadow.write.thread) +
               " wrote, with no barrier between",
           place);
    }
    if (write && !ordered(shadow.read, thread())) {
      fail("race: writes shared memory that another thread reads, with no barrier between", place);
    }
    record(write ? shadow.write : shadow.read, !write);
  }
}

void copy_later(void* to, const void* from, int bytes, int valid, const Place& place) {
  if (valid < 0 || valid > bytes) fail("a copy of " + std::to_string(valid) + " valid bytes", place);
  if (reinterpret_cast<std::uintptr_t>(from) % bytes != 0) fail("a copy from a misaligned address", place);
  if (valid > 0) {
    // What is read is an input, or was written by an earlier launch.
    const Buffer* const buffer = find_buffer(reinterpret_cast<std::uintptr_t>(from), valid);
    if (buffer == nullptr) fail("copies from outside every buffer", place);
  }
  check_shared(to, bytes, true, place);
  Block& block = own_block();
  const std::size_t first = (static_cast<char*>(to) - block.shared) / granule;
  for (std::size_t i = first; i < first + bytes / granule; ++i) block.shared_shadow[i].in_flight = true;
  machine.threads[machine.current].copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, valid});
}

void land_copies(const Place& place) {
  Block& block = own_block();
  std::vector<Copy>& copies = machine.threads[machine.current].copies;
  for (const Copy& copy : copies) {
    const std::size_t first = (copy.to - block.shared) / granule;
    for (std::size_t i = first; i < first + copy.bytes / granule; ++i) block.shared_shadow[i].in_flight = false;
    check_shared(copy.to, copy.bytes, true, place);
    std::memset(copy.to, 0, copy.bytes);
    std::memcpy(copy.to, copy.from, copy.valid);
  }
  copies.clear();
}

float half_to_float(std::uint16_t bits) {
  const std::uint32_t magnitude = bits & 0x7fffu, sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  float value;
  if (magnitude >= 0x7c00u) {
    const std::uint32_t wide = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
    std::memcpy(&value, &wide, 4);
    return value;
  }
  const std::uint32_t wide = magnitude << 13;  // 2^112 too small
  std::memcpy(&value, &wide, 4);
  value *= 0x1p112f;
  return sign != 0 ? -value : value;
}

std::uint16_t float_to_half(float value) {
  const auto sign = static_cast<std::uint16_t>(std::signbit(value) ? 0x8000 : 0);
  if (std::isnan(value)) return 0x7fff;  // what cvt gives
  const float magnitude = std::fabs(value);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  // Halves are the multiples of 2^-24 below 2^-14, and of 2^(e-10) from 2^e on.
  int exponent = -14;
  if (magnitude >= 0x1p-14f) exponent = std::ilogb(magnitude);
  const auto units = static_cast<std::uint32_t>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  return static_cast<std::uint16_t>(sign | ((static_cast<std::uint32_t>(exponent + 14) << 10) + units));
}

std::uint16_t float_to_bfloat16(float value) {
  if (std::isnan(value)) return 0x7fff;
  std::uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<std::uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace pytbptt::emulator
