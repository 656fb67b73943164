// Work on torch's own thread pool, without OpenMP in this extension: a second OpenMP runtime (clang's beside GCC's,
// or the system's beside the one in torch's wheel) would bring a second pool of spinning threads.
#pragma once

#include <cstdint>
#include <functional>

namespace pytbptt::cpu {

// How many threads run_tasks and run_team use at most: torch.get_num_threads(); inside a parallel region they use one.
int thread_count();

// Whether torch's threads all start before any of them goes on, as OpenMP's do. In another pool some may have to wait
// for others' end, so until this is set run_team has one member.
void set_threads_run_together(bool they_do);

// Calls task(index) once for every index in [0, tasks), each on whichever thread is free. Tasks must not depend on one
// another, so that results are the same for every number of threads.
void run_tasks(std::int64_t tasks, const std::function<void(std::int64_t)>& task);

// Calls member(rank, size) on `size` threads that run at the same time, so that they may wait for one another. `size`
// is `most` or fewer: OpenMP decides it anew in every call (OMP_DYNAMIC, OMP_THREAD_LIMIT).
void run_team(int most, const std::function<void(int, int)>& member);

// The most bytes that a thread keeps for its next call. It holds an LSTM's weights up to 2,048 hidden units, and what
// attention needs of a chunk of tens of thousands of tokens; what is larger is given back, and taken anew in each call.
constexpr std::int64_t kept_workspace = std::int64_t{64} << 20;

// A buffer of at least `bytes`, aligned to 64 bytes, for any thread to use until the one that made it lets it go; each
// has one at a time. Its contents are whatever the last user left.
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
