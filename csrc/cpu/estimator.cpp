// The estimators: one pass over D-sized vectors moves its state by the batch's difference
// d = target - means and gives the loss and its gradient with respect to the means.
//
//   batch  v = d                      loss |d|^2    gradient -2 d
//   ema    v += (1 - decay) (d - v)   loss <v', d>  gradient -v', v' = v / (1 - decay^steps)
//   adam   one step on mean((v - d)^2)  loss <v, d> gradient -v
//
// Classes absent from the batch keep their state, add nothing and have no gradient.
// Bytes: means, target, state in; state and gradient out; once each.
#include "parallel.h"
#include "row_dots.h"
#include "workspace.h"

namespace dpmmd::DPMMD_LEVEL {
namespace {

using Kind = Estimator::Kind;

constexpr double beta1 = 0.9, beta2 = 0.999;
constexpr float epsilon = 1e-8F;

struct Plan {
    const Estimator& e;
    Tap tap;
    std::int64_t num_chunks;
    int threads;
    std::size_t bytes;
    Chunk* chunks;
    double* values;  // [moments, num_classes, chunks]

    Plan(const Estimator& estimator, std::byte* base)
        : e(estimator),
          tap{nullptr, 0, e.columns, nullptr, 0},
          num_chunks(count_chunks(&tap, 1)),
          threads(static_cast<int>(smaller(
              e.threads, larger(1, e.moments * e.num_classes * e.columns >> 15)))) {
        Workspace workspace(base);
        chunks = workspace.take<Chunk>(num_chunks);
        values = workspace.take<double>(e.moments * e.num_classes * num_chunks);
        bytes = workspace.used();
    }
};

double power(double base, double exponent) { return __builtin_pow(base, exponent); }

// One chunk of one class that is in the batch; returns its part of the loss.
template <Kind kind>
double step(const Estimator& e, std::int64_t at, std::int64_t count, double steps) {
    constexpr std::int64_t piece = 512;  // stays in the first level of cache between the two loops
    const auto slope = static_cast<float>(2 / e.numbers);
    const auto rate1 = static_cast<float>(1 - beta1), rate2 = static_cast<float>(1 - beta2);
    const double taken = steps > 1 ? steps : 1;
    const auto bias1 = static_cast<float>(1 - power(beta1, taken));
    const auto bias2 = static_cast<float>(1 - power(beta2, taken));
    const auto lr = static_cast<float>(e.rate), keep = static_cast<float>(e.decay);
    const float follow = static_cast<float>(1 - e.decay);
    const auto correction = static_cast<float>(1 - power(e.decay, taken));
    double value = 0;
    for (std::int64_t begin = 0; begin < count; begin += piece) {
        const std::int64_t from = at + begin, size = smaller(piece, count - begin);
        const float* __restrict means = e.means + from;
        const float* __restrict target = e.target + from;
        float* __restrict gradient = e.gradient + from;
        float difference[piece];
        for (std::int64_t i = 0; i < size; ++i) difference[i] = target[i] - means[i];
        if (kind == Kind::batch) {
            for (std::int64_t i = 0; i < size; ++i) gradient[i] = -2 * difference[i];
            double sums[2];
            row_dots<1>(difference, difference, nullptr, size, sums);
            value += sums[0];
            continue;
        }
        float* __restrict v = e.estimate + from;
        if (kind == Kind::ema) {
            if (e.update) {
                for (std::int64_t i = 0; i < size; ++i) {
                    const float change = difference[i] - v[i];
                    v[i] = follow < 0.5F ? v[i] + follow * change : difference[i] - change * keep;
                }
            }
            for (std::int64_t i = 0; i < size; ++i) gradient[i] = -(v[i] / correction);
        } else {
            if (e.update) {
                float* __restrict m = e.first_moment + from;
                float* __restrict s = e.second_moment + from;
                for (std::int64_t i = 0; i < size; ++i) {
                    const float g = (v[i] - difference[i]) * slope;
                    m[i] += rate1 * (g - m[i]);
                    s[i] += rate2 * (g * g - s[i]);
                    v[i] -= m[i] / bias1 / (__builtin_sqrtf(s[i] / bias2) + epsilon) * lr;
                }
            }
            for (std::int64_t i = 0; i < size; ++i) gradient[i] = -v[i];
        }
        double sums[2];
        row_dots<1>(gradient, difference, nullptr, size, sums);
        value -= sums[0];
    }
    return value;
}

template <Kind kind>
void work(void* argument, const Worker& worker) {
    const Plan& p = *static_cast<const Plan*>(argument);
    const Estimator& e = p.e;
    const std::int64_t first =
        first_chunk(p.chunks, p.num_chunks, e.columns, worker.thread, worker.threads);
    const std::int64_t last =
        first_chunk(p.chunks, p.num_chunks, e.columns, worker.thread + 1, worker.threads);
    for (std::int64_t m = 0; m < e.moments; ++m) {
        for (std::int64_t k = 0; k < e.num_classes; ++k) {
            const std::int64_t row = m * e.num_classes + k;
            for (std::int64_t u = first; u < last; ++u) {
                const Chunk& chunk = p.chunks[u];
                const std::int64_t at = row * e.columns + chunk.column;
                double& value = p.values[row * p.num_chunks + u];
                if (e.counts[k] > 0) {
                    const double steps = e.steps ? e.steps[k] : 0;
                    value = step<kind>(e, at, chunk.columns, steps);
                } else {
                    value = 0;
                    __builtin_memset(
                        e.gradient + at, 0, static_cast<std::size_t>(chunk.columns) * sizeof(float)
                    );
                }
            }
        }
    }
}

}  // namespace

std::size_t estimator_workspace(const Estimator& e) { return Plan(e, nullptr).bytes; }

Status estimator(const Estimator& e) {
    Plan plan(e, e.workspace);
    if (plan.bytes > e.workspace_bytes) return Status::workspace_too_small;
    cut_chunks(&plan.tap, 1, plan.chunks);
    if (e.kind != Kind::batch && e.update) {
        for (std::int64_t k = 0; k < e.num_classes; ++k) e.steps[k] += e.counts[k] > 0;
    }
    void (*const bodies[3])(void*, const Worker&) = {
        work<Kind::batch>, work<Kind::ema>, work<Kind::adam>};
    run_team(plan.threads, bodies[static_cast<int>(e.kind)], &plan);
    double value = 0;
    const std::int64_t values = e.moments * e.num_classes * plan.num_chunks;
    for (std::int64_t i = 0; i < values; ++i) value += plan.values[i];
    *e.value = static_cast<float>(value);
    return Status::ok;
}

}  // namespace dpmmd::DPMMD_LEVEL
