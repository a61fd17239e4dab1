// The estimators in two launches; the formulas stand in csrc/cpu/estimator.cpp.
//
//   step         state, gradient and a block's part of the loss   means, target, state in and out
//   finish_step  the loss, in float64 and a fixed order; steps += 1 for classes that are present
#include <cmath>

#include "device.h"

namespace dpmmd::cuda {
namespace {

using Kind = Estimator::Kind;

constexpr int columns_a_block = threads * 4;
constexpr double beta1 = 0.9, beta2 = 0.999;
constexpr float epsilon = 1e-8F;

struct Step {
    const float *means, *counts, *target;
    float *estimate, *first_moment, *second_moment, *steps, *gradient, *value;
    double* values;  // [moments num_classes, blocks]
    Index rows, num_classes, columns, blocks;
    double decay, log_decay, log_beta1, log_beta2;
    float rate, slope;
    Kind kind;
    bool update, aligned;
};

// What a class's steps decide, found by one thread for its block.
struct Correction {
    float first, second;
};

template <bool aligned>
__device__ inline float step_of(const Step& p, Index row, Index column, Correction correction) {
    const Index at = row * p.columns;
    float means[4], target[4], gradient[4], v[4];
    load_floats<aligned>(p.means + at, column, p.columns, means);
    load_floats<aligned>(p.target + at, column, p.columns, target);
    float value = 0;
    if (p.kind == Kind::batch) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float d = target[i] - means[i];
            gradient[i] = -2 * d;
            value += d * d;
        }
        store<aligned>(p.gradient + at, column, p.columns, gradient);
        return value;
    }
    load_floats<aligned>(p.estimate + at, column, p.columns, v);
    if (p.update) {
        if (p.kind == Kind::ema) {
            const auto keep = static_cast<float>(p.decay);
            const auto follow = static_cast<float>(1 - p.decay);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float d = target[i] - means[i], change = d - v[i];
                v[i] = follow < 0.5F ? v[i] + follow * change : d - change * keep;
            }
        } else {
            const auto rate1 = static_cast<float>(1 - beta1);
            const auto rate2 = static_cast<float>(1 - beta2);
            float m[4], s[4];
            load_floats<aligned>(p.first_moment + at, column, p.columns, m);
            load_floats<aligned>(p.second_moment + at, column, p.columns, s);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float g = (v[i] - (target[i] - means[i])) * p.slope;
                m[i] += rate1 * (g - m[i]);
                s[i] += rate2 * (g * g - s[i]);
                v[i] -= m[i] / correction.first / (sqrtf(s[i] / correction.second) + epsilon) *
                        p.rate;
            }
            store<aligned>(p.first_moment + at, column, p.columns, m);
            store<aligned>(p.second_moment + at, column, p.columns, s);
        }
        store<aligned>(p.estimate + at, column, p.columns, v);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        if (p.kind == Kind::ema) v[i] /= correction.first;
        gradient[i] = -v[i];
        // Past the last column all are 0.
        value += v[i] * (target[i] - means[i]);
    }
    store<aligned>(p.gradient + at, column, p.columns, gradient);
    return value;
}

// Grid [blocks of columns, moments x classes].
__global__ void __launch_bounds__(threads) step(const __grid_constant__ Step p) {
    __shared__ Correction correction;
    __shared__ double shares[warps];
    const Index column = static_cast<Index>(blockIdx.x) * columns_a_block + threadIdx.x * 4;
    for (Index row = blockIdx.y; row < p.rows; row += gridDim.y) {
        const Index k = row % p.num_classes;
        const bool present = p.counts[k] > 0;
        if (threadIdx.x == 0 && present && p.kind != Kind::batch) {
            // finish_step counts this step only after all blocks have read the number.
            const double steps = static_cast<double>(p.steps[k]) + (p.update ? 1 : 0);
            const double taken = steps > 1 ? steps : 1;
            if (p.kind == Kind::ema) {
                correction.first = static_cast<float>(-expm1(taken * p.log_decay));
            } else {
                correction.first = static_cast<float>(-expm1(taken * p.log_beta1));
                correction.second = static_cast<float>(-expm1(taken * p.log_beta2));
            }
        }
        __syncthreads();
        float value = 0;
        if (present) {
            value = p.aligned ? step_of<true>(p, row, column, correction)
                              : step_of<false>(p, row, column, correction);
        } else {
            const float zeros[4] = {0, 0, 0, 0};
            if (p.aligned) {
                store<true>(p.gradient + row * p.columns, column, p.columns, zeros);
            } else {
                store<false>(p.gradient + row * p.columns, column, p.columns, zeros);
            }
        }
        const double share = warp_sum(static_cast<double>(value));
        if (lane_of() == 0) shares[warp_of()] = share;
        __syncthreads();
        if (threadIdx.x == 0) {
            double sum = 0;
            for (int w = 0; w < warps; ++w) sum += shares[w];
            p.values[row * p.blocks + blockIdx.x] = sum;
        }
        __syncthreads();
    }
}

// One block.
__global__ void __launch_bounds__(threads) finish_step(const __grid_constant__ Step p) {
    __shared__ double shares[warps];
    double sum = 0;
    for (Index i = threadIdx.x; i < p.rows * p.blocks; i += threads) sum += p.values[i];
    sum = warp_sum(sum);
    if (lane_of() == 0) shares[warp_of()] = sum;
    __syncthreads();
    if (threadIdx.x == 0) {
        double value = 0;
        for (int w = 0; w < warps; ++w) value += shares[w];
        *p.value = static_cast<float>(value);
    }
    if (p.update) {
        for (Index k = threadIdx.x; k < p.num_classes; k += threads) {
            p.steps[k] += p.counts[k] > 0 ? 1.0F : 0.0F;
        }
    }
}

Index count_values(const Estimator& e) {
    return e.moments * e.num_classes * blocks_of(e.columns, columns_a_block);
}

}  // namespace

std::size_t estimator_workspace(const Estimator& e) {
    Arrays arrays(nullptr);
    arrays.take<double>(count_values(e));
    return arrays.used();
}

int estimator(const Estimator& e, Stream stream) {
    if (e.workspace_bytes < estimator_workspace(e)) {
        return static_cast<int>(Status::workspace_too_small);
    }
    const auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
    const std::uintptr_t off = address(e.means) | address(e.target) | address(e.estimate) |
                               address(e.first_moment) | address(e.second_moment) |
                               address(e.gradient);
    Step p{};
    p.means = e.means;
    p.counts = e.counts;
    p.target = e.target;
    p.estimate = e.estimate;
    p.first_moment = e.first_moment;
    p.second_moment = e.second_moment;
    p.steps = e.steps;
    p.gradient = e.gradient;
    p.value = e.value;
    p.values = reinterpret_cast<double*>(e.workspace);
    p.rows = e.moments * e.num_classes;
    p.num_classes = e.num_classes;
    p.columns = e.columns;
    p.blocks = blocks_of(e.columns, columns_a_block);
    p.decay = e.decay;
    p.log_decay = std::log(e.decay);  // -infinity for 0, whose power is 0
    p.log_beta1 = std::log(beta1);
    p.log_beta2 = std::log(beta2);
    p.rate = static_cast<float>(e.rate);
    p.slope = static_cast<float>(2 / e.numbers);
    p.kind = e.kind;
    p.update = e.update && e.kind != Kind::batch;
    p.aligned = (off & 15) == 0 && e.columns % 4 == 0;
    const dim3 grid(static_cast<unsigned>(p.blocks), grid_of(p.rows));
    if (const int error = launch(step, grid, threads, stream, p)) return error;
    return launch(finish_step, dim3(1), threads, stream, p);
}

int load_estimator() {
    const int error = load_kernel(step);
    return error ? error : load_kernel(finish_step);
}

}  // namespace dpmmd::cuda
