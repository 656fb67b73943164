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

// A buffer of at least `bytes`, aligned to 64 bytes, that belongs to the calling thread and is kept until the thread
// ends or asks for a larger one. Its contents are whatever the last user left.
void* thread_workspace(std::int64_t bytes);

}  // namespace pytbptt::cpu
