// Class means of bounded moments, forward and backward.
//
// Images are taken in the order of their classes, a tile of a few at a time that stays in the last
// level of cache. A thread owns a range of columns. Per tile it adds up its columns' share of the
// row reductions (statistics, or dots); the team meets; every thread adds the shares of all chunks
// in their order and goes over its columns again, now in cache, with the scales (or coefficients)
// that follow. The second half of a tile is interleaved, chunk by chunk, with the first half of the
// next, so that memory is busy throughout. DRAM traffic: forward 1 read; backward 1 read, 1 write.
#include "class_sums.h"
#include "gradient.h"
#include "parallel.h"
#include "row_dots.h"
#include "row_statistics.h"
#include "workspace.h"

namespace dpmmd::DPMMD_LEVEL {
namespace {

constexpr std::int64_t tile_bytes = 5 << 20;
constexpr std::int64_t most_rows = 32;
constexpr std::int64_t streamed_bytes = 16 << 20;  // gradients larger than this bypass the caches

struct Plan {
    const MeanEmbedding& e;
    int threads;
    bool backward, half1, half2;
    std::int64_t columns, blocks, norms, num_moments, num_chunks, tile_rows;
    std::size_t bytes;
    Chunk* chunks;
    std::int64_t* order;   // [n] images by class
    std::int64_t* starts;  // [num_classes + 1]
    double* shares;        // [2 tiles, rows, chunks, 2]: row reductions of each chunk
    float* factors;        // [threads, 2 moments, rows, blocks, 2]: scales, coefficients

    Plan(const MeanEmbedding& embedding, bool is_backward, Phases phases, std::byte* base)
        : e(embedding),
          backward(is_backward),
          half1(static_cast<int>(phases) & 1),
          half2(static_cast<int>(phases) & 2),
          columns(total_columns(e.taps, e.num_taps)),
          blocks(e.per_tap ? e.num_taps : 1),
          norms(e.moments == 3 && !e.joint ? 2 : 1),
          num_moments(e.moments == 3 ? 2 : 1),
          num_chunks(count_chunks(e.taps, e.num_taps)) {
        const std::int64_t row_bytes = columns * (e.type == Type::bf16 ? 2 : 4);
        // A row that no cache holds costs a second read anyway: then tiles spare the sums' traffic.
        tile_rows = row_bytes > tile_bytes
                        ? rows_at_once
                        : smaller(most_rows, larger(1, tile_bytes / larger(row_bytes, 1)));
        tile_rows = larger(1, smaller(tile_rows, e.n));
        // Starting a team costs about as much as 32,000 numbers.
        threads = static_cast<int>(smaller(e.threads, larger(1, columns * larger(e.n, 1) >> 15)));
        Workspace workspace(base);
        chunks = workspace.take<Chunk>(num_chunks);
        order = workspace.take<std::int64_t>(e.n);
        starts = workspace.take<std::int64_t>(e.num_classes + 1);
        shares = workspace.take<double>(2 * tile_rows * num_chunks * 2);
        factors = workspace.take<float>(threads * factors_of_thread());
        bytes = workspace.used();
    }

    // Whole cache lines, so that threads do not share one.
    std::int64_t factors_of_thread() const { return (2 * tile_rows * blocks * 2 + 15) / 16 * 16; }
    std::int64_t tiles() const { return (e.n + tile_rows - 1) / tile_rows; }
    std::int64_t begin(std::int64_t tile) const { return tile * tile_rows; }
    std::int64_t end(std::int64_t tile) const { return smaller(e.n, (tile + 1) * tile_rows); }
    std::int64_t label(std::int64_t image) const { return e.labels ? e.labels[image] : 0; }
    double* share(std::int64_t tile, std::int64_t row, std::int64_t chunk) const {
        return shares + ((tile % 2 * tile_rows + row) * num_chunks + chunk) * 2;
    }
    std::int64_t block_of(std::int64_t tap) const { return blocks == 1 ? 0 : tap; }
    // Where the [norms, n, blocks] arrays have their entry.
    std::int64_t at(std::int64_t norm, std::int64_t image, std::int64_t block) const {
        return (norm * e.n + image) * blocks + block;
    }
    double of_class(std::int64_t k) const {
        return 1.0 / static_cast<double>(larger(1, starts[k + 1] - starts[k]));
    }
};

// One thread's work on one embedding; `T` is the features' type.
template <class T, int moments>
class Work {
public:
    Work(const Plan& plan, const Worker& worker)
        : p_(plan),
          e_(plan.e),
          worker_(worker),
          factors_(plan.factors + worker.thread * plan.factors_of_thread()),
          first_(first_chunk(plan.chunks, plan.num_chunks, plan.columns, worker.thread,
                             worker.threads)),
          last_(first_chunk(plan.chunks, plan.num_chunks, plan.columns, worker.thread + 1,
                            worker.threads)) {}

    void run() const {
        if (!p_.backward && p_.half2) clear_absent();
        const std::int64_t tiles = p_.tiles();
        if (p_.half1 && tiles) {
            for (std::int64_t u = first_; u < last_; ++u) reduce(0, u);
        }
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
            if (p_.half1) worker_.meet();
            if (p_.backward) {
                coefficients(tile);
            } else {
                scales(tile);
            }
            for (std::int64_t u = first_; u < last_; ++u) {
                if (p_.half2) apply(tile, u);
                if (p_.half1 && tile + 1 < tiles) reduce(tile + 1, u);
            }
        }
        if (p_.backward) stream_fence();
    }

private:
    const Plan& p_;
    const MeanEmbedding& e_;
    const Worker& worker_;
    float* const factors_;
    const std::int64_t first_, last_;  // chunks

    const T* row(std::int64_t image, const Chunk& chunk) const {
        const Tap& tap = e_.taps[chunk.tap];
        return static_cast<const T*>(tap.data) + image * tap.stride + chunk.begin;
    }

    // [moments, num_classes, D] arrays: the row of one class at a chunk.
    std::int64_t sums_at(int moment, std::int64_t k, const Chunk& chunk) const {
        const std::int64_t m = moment == 2 && moments == 3;
        return (m * e_.num_classes + k) * p_.columns + chunk.column;
    }

    // This thread's factors of a row of the tile: pairs by moment (1, 2).
    float* factor(int moment, std::int64_t row, std::int64_t block) const {
        return factors_ + (((moment - 1) * p_.tile_rows + row) * p_.blocks + block) * 2;
    }

    void clear_absent() const {
        for (std::int64_t k = 0; k < e_.num_classes; ++k) {
            if (p_.starts[k + 1] > p_.starts[k]) continue;
            for (std::int64_t u = first_; u < last_; ++u) {
                const Chunk& chunk = p_.chunks[u];
                const auto size = static_cast<std::size_t>(chunk.columns) * sizeof(float);
                if (moments & 1) __builtin_memset(e_.means + sums_at(1, k, chunk), 0, size);
                if (moments & 2) __builtin_memset(e_.means + sums_at(2, k, chunk), 0, size);
            }
        }
    }

    void reduce(std::int64_t tile, std::int64_t u) const {
        const Chunk& chunk = p_.chunks[u];
        for (std::int64_t i = p_.begin(tile); i < p_.end(tile); ++i) {
            const std::int64_t image = p_.order[i];
            double* share = p_.share(tile, i - p_.begin(tile), u);
            if (p_.backward) {
                const std::int64_t k = p_.label(image);
                row_dots<moments>(
                    row(image, chunk), e_.upstream + sums_at(1, k, chunk),
                    e_.upstream + sums_at(2, k, chunk), chunk.columns, share
                );
            } else {
                row_statistics<moments>(row(image, chunk), chunk.columns, share);
            }
        }
    }

    // The row reductions of one block of a row: the shares of its chunks, added in their order.
    void total(std::int64_t tile, std::int64_t row, std::int64_t block, std::int64_t& u,
               double* sums) const {
        sums[0] = sums[1] = 0;
        for (; u < p_.num_chunks && p_.block_of(p_.chunks[u].tap) == block; ++u) {
            sums[0] += p_.share(tile, row, u)[0];
            sums[1] += p_.share(tile, row, u)[1];
        }
    }

    // Scale and projection of every row of a tile from its statistics, and factors s / n.
    void scales(std::int64_t tile) const {
        const double clip = e_.per_tap ? e_.clip / __builtin_sqrt(static_cast<double>(e_.num_taps))
                                       : e_.clip;
        for (std::int64_t i = p_.begin(tile); i < p_.end(tile); ++i) {
            const std::int64_t image = p_.order[i], r = i - p_.begin(tile);
            const double share = p_.of_class(p_.label(image));
            std::int64_t u = 0;
            for (std::int64_t block = 0; block < p_.blocks; ++block) {
                float s[2];
                if (p_.half1) {
                    double square[2];
                    total(tile, r, block, u, square);
                    square[1] *= e_.weight * e_.weight;
                    if (e_.joint) square[0] += square[1];
                    for (std::int64_t norm = 0; norm < p_.norms; ++norm) {
                        const double v = square[moments == 2 ? 1 : norm];
                        const bool usable = v > 0 && v <= 1.7976931348623157e308;  // not NaN
                        const double inverse = usable ? 1 / __builtin_sqrt(v) : 0;
                        const double sphere = clip * inverse;
                        const bool inactive = e_.ball && sphere >= 1;
                        s[norm] = static_cast<float>(inactive ? 1 : sphere);
                        if (worker_.thread == 0) {
                            const std::int64_t at = p_.at(norm, image, block);
                            e_.scale[at] = s[norm];
                            e_.projection[at] = static_cast<float>(inactive ? 0 : inverse);
                        }
                    }
                } else {
                    for (std::int64_t norm = 0; norm < p_.norms; ++norm) {
                        s[norm] = e_.scale[p_.at(norm, image, block)];
                    }
                }
                for (int moment = 1; moment <= 2; ++moment) {
                    const double of = s[moment == 2 && p_.norms == 2];
                    const double weight = moment == 2 ? e_.weight : 1;
                    factor(moment, r, block)[0] = static_cast<float>(of * weight * share);
                }
            }
        }
    }

    // Coefficients of every row of a tile from its dots, and the gradient's four factors.
    void coefficients(std::int64_t tile) const {
        for (std::int64_t i = p_.begin(tile); i < p_.end(tile); ++i) {
            const std::int64_t image = p_.order[i], r = i - p_.begin(tile);
            const double share = p_.of_class(p_.label(image));
            std::int64_t u = 0;
            for (std::int64_t block = 0; block < p_.blocks; ++block) {
                float coefficient[2];
                double scale[2];
                double dot[2] = {0, 0};
                if (p_.half1) {
                    total(tile, r, block, u, dot);
                    dot[1] *= e_.weight;
                    if (e_.joint) dot[0] += dot[1];
                }
                for (std::int64_t norm = 0; norm < p_.norms; ++norm) {
                    const std::int64_t at = p_.at(norm, image, block);
                    const double projection = e_.projection[at];
                    scale[norm] = e_.scale[at];
                    if (p_.half1) {
                        // An unusable row may have any dot, NaN too.
                        const double v = dot[moments == 2 ? 1 : norm] * share;
                        coefficient[norm] =
                            projection > 0
                                ? static_cast<float>(projection * v * projection * scale[norm])
                                : 0;
                        if (worker_.thread == 0) e_.coefficients[at] = coefficient[norm];
                    } else {
                        coefficient[norm] = e_.coefficients[at];
                    }
                }
                const std::int64_t second = p_.norms == 2;
                const double twice = 2 * e_.weight;
                factor(1, r, block)[0] = static_cast<float>(scale[0] * share);
                factor(1, r, block)[1] = coefficient[0];
                factor(2, r, block)[0] = static_cast<float>(twice * scale[second] * share);
                factor(2, r, block)[1] =
                    static_cast<float>(twice * e_.weight * coefficient[second]);
            }
        }
    }

    void apply(std::int64_t tile, std::int64_t u) const {
        if (p_.backward) {
            gradients(tile, u);
        } else {
            sums(tile, u);
        }
    }

    void sums(std::int64_t tile, std::int64_t u) const {
        const Chunk& chunk = p_.chunks[u];
        const std::int64_t block = p_.block_of(chunk.tap);
        std::int64_t i = p_.begin(tile);
        while (i < p_.end(tile)) {
            const std::int64_t k = p_.label(p_.order[i]);
            const bool fresh = i == p_.starts[k];
            const std::int64_t stop =
                smaller(smaller(p_.starts[k + 1], p_.end(tile)), i + rows_at_once);
            const T* rows[rows_at_once];
            float a[rows_at_once], b[rows_at_once];
            int count = 0;
            for (; i < stop; ++i) {
                const std::int64_t r = i - p_.begin(tile);
                a[count] = factor(1, r, block)[0];
                b[count] = factor(2, r, block)[0];
                // A row without use is left out: it may hold NaN.
                const bool used =
                    ((moments & 1) && a[count] != 0) || ((moments & 2) && b[count] != 0);
                rows[count] = row(p_.order[i], chunk);
                count += used;
            }
            class_sums<moments>(
                count, rows, a, b, fresh, e_.means + sums_at(1, k, chunk),
                e_.means + sums_at(2, k, chunk), chunk.columns
            );
        }
    }

    void gradients(std::int64_t tile, std::int64_t u) const {
        const Chunk& chunk = p_.chunks[u];
        const Tap& tap = e_.taps[chunk.tap];
        if (!tap.gradient) return;
        const std::int64_t block = p_.block_of(chunk.tap);
        const bool rectified = e_.ceiling > 0;
        const bool streamed =
            p_.columns * e_.n * static_cast<std::int64_t>(sizeof(T)) > streamed_bytes;
        for (std::int64_t i = p_.begin(tile); i < p_.end(tile); ++i) {
            const std::int64_t image = p_.order[i], k = p_.label(image), r = i - p_.begin(tile);
            T* out = static_cast<T*>(tap.gradient) + image * tap.gradient_stride + chunk.begin;
            const float *one = factor(1, r, block), *two = factor(2, r, block);
            const bool used =
                ((moments & 1) && one[0] != 0) || ((moments & 2) && two[0] != 0);
            if (!used && !rectified) {
                __builtin_memset(out, 0, static_cast<std::size_t>(chunk.columns) * sizeof(T));
                continue;
            }
            const T* f = row(image, chunk);
            const T* in = static_cast<const T*>(e_.incoming);
            if (in) in += image * e_.incoming_stride + chunk.begin;
            const float* g = e_.upstream + sums_at(1, k, chunk);
            const float* h = e_.upstream + sums_at(2, k, chunk);
            const auto write = [&](auto kernel) {
                kernel(
                    f, g, h, one[0], two[0], one[1], two[1], in, e_.ceiling, out, chunk.columns
                );
            };
            if (!rectified) {
                write(streamed ? gradient<moments, true, false, T>
                               : gradient<moments, false, false, T>);
            } else if (!used) {
                write(gradient<0, false, true, T>);
            } else {
                write(streamed ? gradient<moments, true, true, T>
                               : gradient<moments, false, true, T>);
            }
        }
    }
};

template <class T, int moments>
void run(void* argument, const Worker& worker) {
    Work<T, moments>(*static_cast<const Plan*>(argument), worker).run();
}

Status start(const MeanEmbedding& e, bool backward, Phases phases) {
    Plan plan(e, backward, phases, e.workspace);
    if (plan.bytes > e.workspace_bytes) return Status::workspace_too_small;
    cut_chunks(e.taps, e.num_taps, plan.chunks);
    if (!sort_by_class(e.labels, e.n, e.num_classes, plan.order, plan.starts)) {
        return Status::label_out_of_range;
    }
    if (!backward && plan.half2) {
        for (std::int64_t k = 0; k < e.num_classes; ++k) {
            e.counts[k] = static_cast<float>(plan.starts[k + 1] - plan.starts[k]);
        }
    }
    void (*const bodies[2][3])(void*, const Worker&) = {
        {run<float, 1>, run<float, 2>, run<float, 3>},
        {run<bf16, 1>, run<bf16, 2>, run<bf16, 3>},
    };
    run_team(plan.threads, bodies[e.type == Type::bf16][e.moments - 1], &plan);
    return Status::ok;
}

}  // namespace

std::size_t forward_workspace(const MeanEmbedding& e) {
    return Plan(e, false, Phases::both, nullptr).bytes;
}

Status forward(const MeanEmbedding& e, Phases phases) { return start(e, false, phases); }

std::size_t backward_workspace(const MeanEmbedding& e) {
    return Plan(e, true, Phases::both, nullptr).bytes;
}

Status backward(const MeanEmbedding& e, Phases phases) { return start(e, true, phases); }

}  // namespace dpmmd::DPMMD_LEVEL
