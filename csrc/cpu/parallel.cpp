#include "parallel.h"

#include <sched.h>
#include <unistd.h>

#include <thread>
#include <vector>

// GCC's OpenMP interface, which the LLVM and Intel runtimes provide as well.
extern "C" {
[[gnu::weak]] void GOMP_parallel(void (*body)(void*), void* data, unsigned threads, unsigned flags);
[[gnu::weak]] int omp_get_thread_num();
[[gnu::weak]] int omp_get_num_threads();
}

namespace dpmmd {
namespace {

constexpr int spins = 4096;
const pid_t owner = getpid();

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

struct Team {
    void (*body)(void*, const Worker&);
    void* argument;
    Barrier barrier;
};

void openmp_body(void* data) {
    Team& team = *static_cast<Team*>(data);
    // The team may be smaller than asked for.
    team.body(team.argument, Worker{omp_get_thread_num(), omp_get_num_threads(), team.barrier});
}

}  // namespace

void Worker::meet() const {
    if (threads == 1) return;
    const unsigned round = barrier.round.load(std::memory_order_relaxed);
    if (barrier.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
        barrier.arrived.store(0, std::memory_order_relaxed);
        barrier.round.store(round + 1, std::memory_order_release);
        return;
    }
    for (int i = 0; barrier.round.load(std::memory_order_acquire) == round; ++i) {
        if (i < spins) {
            relax();
        } else {
            sched_yield();
        }
    }
}

void run_team(int threads, void (*body)(void*, const Worker&), void* argument) {
    Team team{body, argument, {}};
    if (threads <= 1 || getpid() != owner) {
        body(argument, Worker{0, 1, team.barrier});
    } else if (GOMP_parallel && omp_get_thread_num && omp_get_num_threads) {
        GOMP_parallel(openmp_body, &team, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        for (int thread = 1; thread < threads; ++thread) {
            others.emplace_back([&team, thread, threads] {
                team.body(team.argument, Worker{thread, threads, team.barrier});
            });
        }
        body(argument, Worker{0, threads, team.barrier});
        for (std::thread& other : others) other.join();
    }
}

}  // namespace dpmmd
