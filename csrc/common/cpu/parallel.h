// Uses torch's thread pool. The extension itself does not use OpenMP, because a second OpenMP runtime would add a
// second pool of spinning threads.
#pragma once

#include <cstdint>
#include <functional>

namespace pytbptt::cpu {

// Maximum number of threads: torch.get_num_threads(). Inside a parallel region both functions use one thread.
int thread_count();

// Says that parallel_for's threads run concurrently, as with OpenMP. Other pools may queue some until others finish,
// where a barrier would deadlock, so run_team uses one thread unless this is set.
void set_threads_run_concurrently(bool they_do);

// Calls task(index) for each index in [0, tasks), dynamically scheduled. Tasks must be independent.
void run_tasks(std::int64_t tasks, const std::function<void(std::int64_t)>& task);

// Calls member(rank, size) on `size` threads that run at the same time, so that they may wait for one another. `size`
// <= `most`; OpenMP may choose fewer threads in any call (OMP_DYNAMIC, OMP_THREAD_LIMIT).
void run_team(int most, const std::function<void(int, int)>& member);

// Largest workspace that a thread caches between calls. Enough for an LSTM with 2,048 hidden units and for attention
// over tens of thousands of tokens. Larger ones are freed after each call.
constexpr std::int64_t kept_workspace = std::int64_t{64} << 20;

// A 64-byte-aligned buffer of at least `bytes`, usable by any thread until it is destroyed. At most one per thread at a
// time. Uninitialised.
class Workspace {
 public:
  explicit Workspace(std::int64_t bytes);
  ~Workspace();
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  void* data_;
};

}  // namespace pytbptt::cpu
