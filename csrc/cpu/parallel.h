// Teams of threads, and the barrier they meet at.
#pragma once

#include <atomic>

namespace dpmmd {

// Where a team of threads meets.
struct Barrier {
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<unsigned> round{0};
};

// One thread of a team.
struct Worker {
    int thread, threads;
    Barrier& barrier;

    // Waits for the whole team: spins for a while (phases take microseconds), then gives way.
    void meet() const;
};

// Runs body(argument, worker) on a team of at most `threads` threads and waits for them.
//
// The team is that of the OpenMP runtime already in the process, if there is one: PyTorch's workers
// spin for milliseconds after each of its operations, and threads of our own would have to share
// the cores with them. No runtime is linked, so there are never two. Without one, threads are
// started for the call. A forked child runs alone: OpenMP teams do not survive a fork.
void run_team(int threads, void (*body)(void* argument, const Worker&), void* argument);

}  // namespace dpmmd
