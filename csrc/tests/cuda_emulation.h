// What of CUDA the kernels use, on the host, so that the very sources in csrc/cuda/ run (and are
// tested, under sanitizers too) where there is no GPU: blocks one after another, a block's threads as
// fibers that switch at __syncthreads and at warp shuffles. A thread that a barrier waits for in vain
// ends the process, and so does a shuffle that not all lanes of a warp take part in.
#pragma once

#include <ucontext.h>

#include <cassert>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
    unsigned x, y;
    explicit dim3(unsigned columns = 1, unsigned rows = 1) : x(columns), y(rows) {}
};

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};

using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0, cudaErrorAssert = 710;

namespace emulation {

inline dim3 block_index, grid_size;
inline unsigned thread_index;

enum class State { ready, at_block, at_warp, done };

struct Fiber {
    ucontext_t context;
    State state;
    unsigned shuffles;
};

constexpr int lanes = 32;
constexpr std::size_t stack_bytes = 256 << 10;
inline std::vector<Fiber> fibers;
inline std::vector<char*> stacks;
inline ucontext_t scheduler;
inline std::uint64_t slots[2][1024];  // what lanes give in a shuffle; two, for the next may follow
inline const std::function<void()>* body;
inline cudaError_t failure;

[[noreturn]] inline void stop(const char* what) {
    std::fprintf(stderr, "cuda_emulation: %s\n", what);
    std::abort();
}

inline void wait(State state) {
    Fiber& fiber = fibers[thread_index];
    fiber.state = state;
    swapcontext(&fiber.context, &scheduler);
}

inline void begin() {
    (*body)();
    wait(State::done);
}

// Ends a block early, as a failed assertion ends a kernel.
inline void fail(cudaError_t error) {
    failure = error;
    wait(State::done);
}

inline void run_block(unsigned threads) {
    while (stacks.size() < threads) stacks.push_back(static_cast<char*>(std::malloc(stack_bytes)));
    fibers.resize(threads);
    for (unsigned t = 0; t < threads; ++t) {
        Fiber& fiber = fibers[t];
        fiber.state = State::ready;
        fiber.shuffles = 0;
        getcontext(&fiber.context);
        fiber.context.uc_stack.ss_sp = stacks[t];
        fiber.context.uc_stack.ss_size = stack_bytes;
        fiber.context.uc_link = nullptr;
        makecontext(&fiber.context, begin, 0);
    }
    for (;;) {
        bool ran = false;
        // Backwards every other thread's turn would do as well: no order is promised.
        for (unsigned t = 0; t < threads; ++t) {
            if (fibers[t].state != State::ready) continue;
            thread_index = t;
            swapcontext(&scheduler, &fibers[t].context);
            if (failure) return;
            ran = true;
        }
        unsigned done = 0, at_block = 0;
        for (unsigned warp = 0; warp < threads; warp += lanes) {
            int waiting = 0;
            for (unsigned t = warp; t < warp + lanes; ++t) {
                waiting += fibers[t].state == State::at_warp;
                done += fibers[t].state == State::done;
                at_block += fibers[t].state == State::at_block;
            }
            if (waiting == 0) continue;
            if (waiting < lanes) {
                if (!ran) stop("a shuffle that not all lanes of its warp take part in");
                continue;
            }
            for (unsigned t = warp; t < warp + lanes; ++t) fibers[t].state = State::ready;
            ran = true;
        }
        if (done == threads) return;
        if (at_block && at_block + done == threads) {
            for (Fiber& fiber : fibers) {
                if (fiber.state == State::at_block) fiber.state = State::ready;
            }
            ran = true;
        }
        if (!ran) stop("threads wait for one another");
    }
}

inline cudaError_t launch(dim3 grid, int threads, const std::function<void()>& kernel) {
    body = &kernel;
    grid_size = grid;
    failure = cudaSuccess;
    for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) {
            block_index = dim3(x, y);
            run_block(static_cast<unsigned>(threads));
            if (failure) return failure;
        }
    }
    return cudaSuccess;
}

struct Thread {
    struct {
        operator unsigned() const { return thread_index; }
    } x;
};

}  // namespace emulation

#define threadIdx (emulation::Thread{})
#define blockIdx (emulation::block_index)
#define gridDim (emulation::grid_size)

inline void __syncthreads() { emulation::wait(emulation::State::at_block); }

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int offset) {
    static_assert(sizeof(T) <= 8, "as on the device");
    if (mask != 0xffffffffU) emulation::stop("only whole warps");
    const unsigned thread = emulation::thread_index;
    std::uint64_t* const slots = emulation::slots[emulation::fibers[thread].shuffles++ % 2];
    slots[thread] = 0;
    std::memcpy(&slots[thread], &value, sizeof value);
    emulation::wait(emulation::State::at_warp);
    std::memcpy(&value, &slots[thread ^ static_cast<unsigned>(offset)], sizeof value);
    return value;
}

template <class To, class From>
To bits_as(From from) {
    To to;
    static_assert(sizeof to == sizeof from, "bits");
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float f) { return bits_as<unsigned>(f); }
inline float __uint_as_float(unsigned u) { return bits_as<float>(u); }
inline long long __double_as_longlong(double f) { return bits_as<long long>(f); }
inline double __longlong_as_double(long long i) { return bits_as<double>(i); }

#undef assert
#define assert(condition) ((condition) ? (void)0 : emulation::fail(cudaErrorAssert))

inline cudaError_t cudaGetDeviceCount(int* count) {
    *count = 1;
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaErrorAssert ? "device-side assert triggered" : "emulated";
}
