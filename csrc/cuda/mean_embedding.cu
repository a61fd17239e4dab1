// Class means of bounded moments, forward and backward, in three launches each over all taps:
//
//   partial_statistics  sums of f^2 and f^4 of a row by block of columns       features in
//   finish_statistics   scale s, projection p; the schedule of the labels
//   class_sums          means[m, k] = sum over y = k of s v_m / n_k            features in
//   partial_dots        <f, G_1[y]>, <f^2, G_2[y]> by block of columns         features in
//   finish_dots         coefficients e
//   gradient            df = s G_1 / n - e_1 f + 2 w f (s G_2 / n - w e_2 f^2) features in, out
//
// Features are read twice each way and gradients written once; all else is small or from cache.
// float32 sums within a block of columns or a warp's share of a class, float64 over blocks; every
// order is fixed. Rows without use (s = 0) are not multiplied: they may hold NaN.
#undef NDEBUG  // labels out of range stop the device, in every build
#include <cassert>
#include <cmath>

#include "schedule.h"

namespace dpmmd::cuda {
namespace {

// 16-byte accesses a lane and row: blocks of 1024 (bf16) or 512 columns, and half as many.
constexpr int statistics_unroll = 4, dots_unroll = 2;
constexpr int rows_at_once = 4;  // rows that a warp has in flight

template <class T>
constexpr int statistics_block = lanes * width<T> * statistics_unroll;
template <class T>
constexpr int dots_block = lanes * width<T> * dots_unroll;
template <class T>
constexpr int sums_block = lanes * width<T>;

// ---- row statistics ----

struct PartialStatistics {
    Table table;
    float* partials;  // [moments, n, parts]
    Index n, parts;
    int moments;
};

template <class T, bool aligned>
__device__ inline void statistics_of(const PartialStatistics& p, const Part& tap) {
    const int block = block_of(p.table);
    const Index first =
        static_cast<Index>(block - tap.first_block) * statistics_block<T> + lane_of() * width<T>;
    const Index step = static_cast<Index>(gridDim.y) * warps;
    for (Index image = static_cast<Index>(blockIdx.y) * warps + warp_of(); image < p.n;
         image += step) {
        const T* const row = static_cast<const T*>(tap.data) + image * tap.stride;
        uint4 raw[statistics_unroll];
#pragma unroll
        for (int u = 0; u < statistics_unroll; ++u) {
            raw[u] = load<aligned>(row, first + u * lanes * width<T>, tap.columns);
        }
        float one = 0, two = 0;
#pragma unroll
        for (int u = 0; u < statistics_unroll; ++u) {
            float f[width<T>];
            unpack(raw[u], f);
#pragma unroll
            for (int i = 0; i < width<T>; ++i) {
                const float square = f[i] * f[i];
                one += square;
                two += square * square;
            }
        }
        float* at = p.partials + image * p.parts + block;
        if (p.moments & 1) {
            one = warp_sum(one);
            if (lane_of() == 0) *at = one;
            at += p.n * p.parts;
        }
        if (p.moments & 2) {
            two = warp_sum(two);
            if (lane_of() == 0) *at = two;
        }
    }
}

// Grid [blocks of columns, rows by warp].
template <class T>
__global__ void __launch_bounds__(threads)
partial_statistics(const __grid_constant__ PartialStatistics p) {
    const Part& tap = find_part(p.table);
    if (tap.aligned) {
        statistics_of<T, true>(p, tap);
    } else {
        statistics_of<T, false>(p, tap);
    }
}

struct Finish {
    Table table;             // where bounds are per tap: the blocks of this launch's taps
    const float* partials;   // [moments, n, parts]
    const Index* labels;     // null: all 0
    int* schedule;           // forward writes it
    float *scale, *projection, *coefficients;  // [norms, n, blocks]
    float* counts;
    Index n, parts, blocks, num_classes, classes;  // classes: so many are placed by this launch
    double clip, weight;
    int moments, columns_a_block;
    bool ball, per_tap, joint;
};

// The blocks of columns that are summed for one image and one bound, and where the result goes.
struct Range {
    Index image, first, end, at;
};

__device__ inline Range range_of(const Finish& p, Index task) {
    const Index local = task % p.table.count, image = task / p.table.count;
    const Part& tap = p.table.parts[local];
    if (!p.per_tap) return {image, 0, p.parts, image};
    const Index first = tap.first_block;
    const Index end = first + (tap.columns + p.columns_a_block - 1) / p.columns_a_block;
    return {image, first, end, image * p.blocks + tap.number};
}

// Scale and projection of every row, a warp each; then (classes > 0) the schedule and the counts.
__global__ void __launch_bounds__(threads) finish_statistics(const __grid_constant__ Finish p) {
    const Index task = warp_of_grid(), rows = p.n * p.table.count;
    if (task >= rows) {
        const Index k = task - rows;
        if (k < p.classes) {
            place_class(p.labels, p.schedule + p.n, p.counts, k, p.n, p.num_classes);
        }
        return;
    }
    const Range range = range_of(p, task);
    const Index row = range.image * p.parts;
    double square[2] = {0, 0};
    if (p.moments & 1) {
        square[0] = sum_of<double>(p.partials + row, range.first, range.end);
    }
    if (p.moments & 2) {
        const Index second = p.moments == 3 ? p.n * p.parts : 0;
        square[1] = sum_of<double>(p.partials + second + row, range.first, range.end);
        square[1] *= p.weight * p.weight;
    }
    if (p.joint) square[0] += square[1];
    if (p.moments == 2) square[0] = square[1];
    if (lane_of() == 0) {
        const int norms = p.moments == 3 && !p.joint ? 2 : 1;
        for (int norm = 0; norm < norms; ++norm) {
            const double v = norm ? square[1] : square[0];
            const bool usable = v > 0 && v <= 1.7976931348623157e308;  // false for NaN
            const double inverse = usable ? 1 / sqrt(v) : 0;
            const double sphere = p.clip * inverse;
            const bool inactive = p.ball && sphere >= 1;
            const Index at = norm * p.n * p.blocks + range.at;
            p.scale[at] = static_cast<float>(inactive ? 1 : sphere);
            p.projection[at] = static_cast<float>(inactive ? 0 : inverse);
        }
    }
    if (p.labels && p.classes && task % p.table.count == 0) {
        const Index label = p.labels[range.image];
        assert((label >= 0 && label < p.num_classes) && "dpmmd: labels: out of range");
        place_image(p.labels, p.schedule, range.image, p.n, p.num_classes);
    }
}

// ---- class sums ----

struct ClassSums {
    Table table;
    Schedule schedule;
    const float* scale;  // [norms, n, blocks]
    float* means;        // [moments, num_classes, dim]
    Index n, dim, blocks, num_classes;
    float weight;
    int moments, norms;
    bool per_tap;
};

// A warp's share of a class: its rows in their order, rows_at_once at a time.
template <class T, bool aligned>
__device__ inline void sums_of(
    const ClassSums& p, const Part& tap, Index column, Index start, Index end,
    float (&one)[width<T>], float (&two)[width<T>]
) {
    const float* const scales = p.scale + (p.per_tap ? tap.number : 0);
    const Index second = p.norms == 2 ? p.n * p.blocks : 0;
    for (Index first = start + warp_of() * rows_at_once; first < end;
         first += warps * rows_at_once) {
        uint4 raw[rows_at_once];
        float a[rows_at_once], b[rows_at_once];
#pragma unroll
        for (int r = 0; r < rows_at_once; ++r) {
            raw[r] = {0, 0, 0, 0};
            a[r] = b[r] = 0;
            if (first + r < end) {
                const Index image = p.schedule.image(first + r);
                a[r] = scales[image * p.blocks];
                b[r] = scales[image * p.blocks + second];
                if (a[r] != 0 || b[r] != 0) {
                    const T* const row = static_cast<const T*>(tap.data) + image * tap.stride;
                    raw[r] = load<aligned>(row, column, tap.columns);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < rows_at_once; ++r) {
            float f[width<T>];
            unpack(raw[r], f);
#pragma unroll
            for (int i = 0; i < width<T>; ++i) {
                // Of a row that only one moment can use, the other may overflow: 0 inf is NaN.
                if (p.moments & 1) one[i] += a[r] * f[i];
                if (p.moments & 2) two[i] += b[r] != 0 ? b[r] * (f[i] * f[i]) : 0.0F;
            }
        }
    }
}

// Grid [blocks of columns, classes].
template <class T>
// Three blocks a multiprocessor: left to itself ptxas keeps to 64 registers for sm_100, and spills.
__global__ void __launch_bounds__(threads, 3) class_sums(const __grid_constant__ ClassSums p) {
    __shared__ float shares[warps][sums_block<T>];
    const Part& tap = find_part(p.table);
    const Index begin =
        static_cast<Index>(block_of(p.table) - tap.first_block) * sums_block<T>;
    const Index column = begin + lane_of() * width<T>;
    for (Index k = blockIdx.y; k < p.num_classes; k += gridDim.y) {
        const Index start = p.schedule.start(k), end = p.schedule.end(k);
        float one[width<T>] = {}, two[width<T>] = {};
        if (tap.aligned) {
            sums_of<T, true>(p, tap, column, start, end, one, two);
        } else {
            sums_of<T, false>(p, tap, column, start, end, one, two);
        }
        const float share = 1.0F / static_cast<float>(end > start ? end - start : 1);
        float* means = p.means + k * p.dim + tap.column + begin;
#pragma unroll
        for (int moment = 1; moment <= 2; ++moment) {
            if (!(p.moments & moment)) continue;
#pragma unroll
            for (int i = 0; i < width<T>; ++i) {
                shares[warp_of()][lane_of() * width<T> + i] = moment == 1 ? one[i] : two[i];
            }
            __syncthreads();
            for (int c = static_cast<int>(threadIdx.x); c < sums_block<T>; c += threads) {
                if (begin + c < tap.columns) {
                    float sum = 0;
#pragma unroll
                    for (int w = 0; w < warps; ++w) sum += shares[w][c];
                    means[c] = sum * (moment == 1 ? share : share * p.weight);
                }
            }
            __syncthreads();
            means += p.num_classes * p.dim;
        }
    }
}

// ---- row dots ----

// Rows are taken in the order of classes, so that a warp keeps a class's row of G for several.
struct PartialDots {
    Table table;
    Schedule schedule;
    const Index* labels;
    const float* upstream;  // G [moments, num_classes, dim]
    float* partials;        // [moments, n, parts]
    Index parts, dim, num_classes;
    int moments;
};

struct Gradient {
    Table table;
    Schedule schedule;
    const Index* labels;
    const float *upstream, *scale, *coefficients;  // [norms, n, blocks]
    Index dim, blocks, num_classes;
    float weight;
    int moments, norms;
    bool per_tap;
};

// A lane's columns of the rows G_1[k] and G_2[k].
template <class T, bool aligned, class Parameters>
__device__ inline void load_class(
    const Parameters& p, const Part& tap, Index k, Index column,
    float (&g)[dots_unroll][width<T>], float (&h)[dots_unroll][width<T>]
) {
    const float* const one = p.upstream + k * p.dim + tap.column;
    const float* const two = p.moments == 3 ? one + p.num_classes * p.dim : one;
#pragma unroll
    for (int u = 0; u < dots_unroll; ++u) {
        const Index at = column + u * lanes * width<T>;
        if (p.moments & 1) load_floats<aligned>(one, at, tap.columns, g[u]);
        if (p.moments & 2) load_floats<aligned>(two, at, tap.columns, h[u]);
    }
}

template <class T>
__device__ inline Index first_column(const Table& table, const Part& tap) {
    return static_cast<Index>(block_of(table) - tap.first_block) * dots_block<T> +
           lane_of() * width<T>;
}

template <class T, bool aligned>
__device__ inline void dots_of(const PartialDots& p, const Part& tap) {
    const Index column = first_column<T>(p.table, tap), n = p.schedule.n;
    const Index step = static_cast<Index>(gridDim.y) * warps * rows_at_once;
    Index held = -1;
    float g[dots_unroll][width<T>] = {}, h[dots_unroll][width<T>] = {};
    for (Index first = (static_cast<Index>(blockIdx.y) * warps + warp_of()) * rows_at_once;
         first < n; first += step) {
        uint4 raw[rows_at_once][dots_unroll];
        Index images[rows_at_once];
#pragma unroll
        for (int r = 0; r < rows_at_once; ++r) {
            images[r] = first + r < n ? p.schedule.image(first + r) : -1;
#pragma unroll
            for (int u = 0; u < dots_unroll; ++u) {
                raw[r][u] = {0, 0, 0, 0};
                if (images[r] >= 0) {
                    const T* const row = static_cast<const T*>(tap.data) + images[r] * tap.stride;
                    raw[r][u] = load<aligned>(row, column + u * lanes * width<T>, tap.columns);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < rows_at_once; ++r) {
            if (images[r] < 0) continue;
            const Index k = p.labels ? p.labels[images[r]] : 0;
            if (k != held) {
                load_class<T, aligned>(p, tap, k, column, g, h);
                held = k;
            }
            float one = 0, two = 0;
#pragma unroll
            for (int u = 0; u < dots_unroll; ++u) {
                float f[width<T>];
                unpack(raw[r][u], f);
#pragma unroll
                for (int i = 0; i < width<T>; ++i) {
                    one += f[i] * g[u][i];
                    two += f[i] * f[i] * h[u][i];
                }
            }
            float* at = p.partials + images[r] * p.parts + block_of(p.table);
            if (p.moments & 1) {
                one = warp_sum(one);
                if (lane_of() == 0) *at = one;
                at += n * p.parts;
            }
            if (p.moments & 2) {
                two = warp_sum(two);
                if (lane_of() == 0) *at = two;
            }
        }
    }
}

// Grid [blocks of columns, rows_at_once rows by warp].
template <class T>
__global__ void __launch_bounds__(threads) partial_dots(const __grid_constant__ PartialDots p) {
    const Part& tap = find_part(p.table);
    if (tap.aligned) {
        dots_of<T, true>(p, tap);
    } else {
        dots_of<T, false>(p, tap);
    }
}

// e = s p^2 <v_m, G_m[y]> / n of every row, a warp each.
__global__ void __launch_bounds__(threads) finish_dots(const __grid_constant__ Finish p) {
    const Index task = warp_of_grid();
    if (task >= p.n * p.table.count) return;
    const Range range = range_of(p, task);
    const Index row = range.image * p.parts;
    double dot[2] = {0, 0};
    if (p.moments & 1) dot[0] = sum_of<double>(p.partials + row, range.first, range.end);
    if (p.moments & 2) {
        const Index second = p.moments == 3 ? p.n * p.parts : 0;
        dot[1] = sum_of<double>(p.partials + second + row, range.first, range.end) * p.weight;
    }
    if (p.joint) dot[0] += dot[1];
    if (p.moments == 2) dot[0] = dot[1];
    if (lane_of() == 0) {
        const Schedule schedule{
            p.labels ? p.schedule : nullptr, p.labels ? p.schedule + p.n : nullptr, p.n};
        const Index k = p.labels ? p.labels[range.image] : 0;
        const double share = 1.0 / static_cast<double>(schedule.end(k) - schedule.start(k));
        const int norms = p.moments == 3 && !p.joint ? 2 : 1;
        for (int norm = 0; norm < norms; ++norm) {
            const Index at = norm * p.n * p.blocks + range.at;
            const double projection = p.projection[at], v = (norm ? dot[1] : dot[0]) * share;
            // A row without use may have any dot, NaN too.
            p.coefficients[at] =
                projection > 0 ? static_cast<float>(projection * v * projection * p.scale[at]) : 0;
        }
    }
}

// ---- gradient ----

template <class T, bool aligned>
__device__ inline void gradient_of(const Gradient& p, const Part& tap) {
    const Index column = first_column<T>(p.table, tap), n = p.schedule.n;
    const Index step = static_cast<Index>(gridDim.y) * warps * rows_at_once;
    const Index bound = p.per_tap ? tap.number : 0, second = p.norms == 2 ? n * p.blocks : 0;
    const float twice = 2 * p.weight;
    Index held = -1;
    float share = 0;
    float g[dots_unroll][width<T>] = {}, h[dots_unroll][width<T>] = {};
    for (Index first = (static_cast<Index>(blockIdx.y) * warps + warp_of()) * rows_at_once;
         first < n; first += step) {
        uint4 raw[rows_at_once][dots_unroll];
        Index images[rows_at_once];
#pragma unroll
        for (int r = 0; r < rows_at_once; ++r) {
            images[r] = first + r < n ? p.schedule.image(first + r) : -1;
            bool used = false;
            if (images[r] >= 0) {
                const Index at = images[r] * p.blocks + bound;
                used = p.scale[at] != 0 || p.scale[at + second] != 0;
            }
#pragma unroll
            for (int u = 0; u < dots_unroll; ++u) {
                raw[r][u] = {0, 0, 0, 0};
                if (used) {
                    const T* const row = static_cast<const T*>(tap.data) + images[r] * tap.stride;
                    raw[r][u] = load<aligned>(row, column + u * lanes * width<T>, tap.columns);
                }
            }
        }
#pragma unroll
        for (int r = 0; r < rows_at_once; ++r) {
            if (images[r] < 0) continue;
            const Index k = p.labels ? p.labels[images[r]] : 0;
            if (k != held) {
                load_class<T, aligned>(p, tap, k, column, g, h);
                share = 1.0F / static_cast<float>(p.schedule.end(k) - p.schedule.start(k));
                held = k;
            }
            const Index at = images[r] * p.blocks + bound;
            const float a = p.scale[at] * share, c = p.coefficients[at];
            const float b = twice * p.scale[at + second] * share;
            const float d = twice * p.weight * p.coefficients[at + second];
            T* const out = static_cast<T*>(tap.gradient) + images[r] * tap.gradient_stride;
#pragma unroll
            for (int u = 0; u < dots_unroll; ++u) {
                float f[width<T>], df[width<T>];
                unpack(raw[r][u], f);
#pragma unroll
                for (int i = 0; i < width<T>; ++i) {
                    df[i] = 0;
                    if (p.moments & 1) df[i] = a * g[u][i] - c * f[i];
                    // Of a row that only the first moment can use, f^2 may overflow: 0 inf is NaN.
                    if ((p.moments & 2) && b != 0) {
                        df[i] += f[i] * (b * h[u][i] - d * (f[i] * f[i]));
                    }
                }
                store<aligned>(out, column + u * lanes * width<T>, tap.columns, df);
            }
        }
    }
}

// Grid [blocks of columns, rows_at_once rows by warp].
template <class T>
__global__ void __launch_bounds__(threads) gradient(const __grid_constant__ Gradient p) {
    const Part& tap = find_part(p.table);
    if (tap.aligned) {
        gradient_of<T, true>(p, tap);
    } else {
        gradient_of<T, false>(p, tap);
    }
}

// ---- host ----

template <class T>
Index count_parts(const MeanEmbedding& e, bool backward) {
    return count_blocks(e.taps, e.num_taps, backward ? dots_block<T> : statistics_block<T>);
}

std::size_t workspace(const MeanEmbedding& e, bool backward) {
    const Index parts =
        e.type == Type::bf16 ? count_parts<bf16>(e, backward) : count_parts<float>(e, backward);
    Arrays arrays(nullptr);
    arrays.take<float>((e.moments == 3 ? 2 : 1) * e.n * parts);
    return arrays.used();
}

// One launch, or where bounds are per tap one for every table of taps.
int finish(
    const MeanEmbedding& e, void (*kernel)(Finish), int columns_a_block, Index parts, int* schedule,
    Index classes, Stream stream
) {
    Finish p{};
    p.partials = reinterpret_cast<const float*>(e.workspace);
    p.labels = e.labels;
    p.schedule = schedule;
    p.scale = e.scale;
    p.projection = e.projection;
    p.coefficients = e.coefficients;
    p.counts = e.counts;
    p.n = e.n;
    p.parts = parts;
    p.blocks = e.per_tap ? e.num_taps : 1;
    p.num_classes = e.num_classes;
    p.classes = classes;
    p.clip = e.per_tap ? e.clip / std::sqrt(static_cast<double>(e.num_taps)) : e.clip;
    p.weight = e.weight;
    p.moments = e.moments;
    p.columns_a_block = columns_a_block;
    p.ball = e.ball;
    p.per_tap = e.per_tap;
    p.joint = e.joint;
    const auto run = [&](const Table& table) {
        p.table = table;
        const Index tasks = p.n * table.count + p.classes;
        const int error = launch(
            kernel, dim3(static_cast<unsigned>((tasks + warps - 1) / warps)), threads, stream, p
        );
        p.classes = 0;
        return error;
    };
    if (!e.per_tap) {
        Table whole{};
        whole.count = 1;
        return run(whole);
    }
    return for_each_table(e.taps, e.num_taps, 4, columns_a_block, nullptr, Which::all, run);
}

template <class T>
int forward_of(const MeanEmbedding& e, int* schedule, Stream stream) {
    const Index parts = count_parts<T>(e, false);
    const int size = static_cast<int>(sizeof(T));
    int error = for_each_table(
        e.taps, e.num_taps, size, statistics_block<T>, nullptr, Which::with_columns,
        [&](const Table& table) {
            const PartialStatistics p{
                table, reinterpret_cast<float*>(e.workspace), e.n, parts, e.moments};
            return launch(
                partial_statistics<T>,
                dim3(static_cast<unsigned>(table.blocks), grid_of(e.n, warps)), threads, stream, p
            );
        }
    );
    if (error) return error;
    error = finish(
        e, finish_statistics, statistics_block<T>, parts, schedule, e.num_classes, stream
    );
    if (error) return error;
    const Index dim = total_columns(e.taps, e.num_taps);
    return for_each_table(
        e.taps, e.num_taps, size, sums_block<T>, nullptr, Which::with_columns,
        [&](const Table& table) {
            const ClassSums p{
                table, schedule_of(e.labels ? schedule : nullptr, e.n), e.scale, e.means, e.n, dim,
                e.per_tap ? e.num_taps : 1, e.num_classes, static_cast<float>(e.weight), e.moments,
                e.moments == 3 && !e.joint ? 2 : 1, e.per_tap};
            return launch(
                class_sums<T>, dim3(static_cast<unsigned>(table.blocks), grid_of(e.num_classes)),
                threads, stream, p
            );
        }
    );
}

template <class T>
int backward_of(const MeanEmbedding& e, const int* schedule, Stream stream) {
    const Index parts = count_parts<T>(e, true), dim = total_columns(e.taps, e.num_taps);
    const Schedule order = schedule_of(e.labels ? schedule : nullptr, e.n);
    const int size = static_cast<int>(sizeof(T));
    const unsigned rows = grid_of(e.n, warps * rows_at_once);
    int error = for_each_table(
        e.taps, e.num_taps, size, dots_block<T>, e.upstream, Which::with_columns,
        [&](const Table& table) {
            const PartialDots p{
                table, order, e.labels, e.upstream, reinterpret_cast<float*>(e.workspace), parts,
                dim, e.num_classes, e.moments};
            return launch(
                partial_dots<T>, dim3(static_cast<unsigned>(table.blocks), rows), threads, stream, p
            );
        }
    );
    if (error) return error;
    error = finish(
        e, finish_dots, dots_block<T>, parts, const_cast<int*>(schedule), 0, stream
    );
    if (error) return error;
    return for_each_table(
        e.taps, e.num_taps, size, dots_block<T>, e.upstream, Which::with_gradient,
        [&](const Table& table) {
            const Gradient p{
                table, order, e.labels, e.upstream, e.scale, e.coefficients, dim,
                e.per_tap ? e.num_taps : 1, e.num_classes, static_cast<float>(e.weight), e.moments,
                e.moments == 3 && !e.joint ? 2 : 1, e.per_tap};
            return launch(
                gradient<T>, dim3(static_cast<unsigned>(table.blocks), rows), threads, stream, p
            );
        }
    );
}

}  // namespace

std::size_t forward_workspace(const MeanEmbedding& e) { return workspace(e, false); }

int forward(const MeanEmbedding& e, int* schedule, Stream stream) {
    if (e.workspace_bytes < forward_workspace(e)) {
        return static_cast<int>(Status::workspace_too_small);
    }
    return e.type == Type::bf16 ? forward_of<bf16>(e, schedule, stream)
                                : forward_of<float>(e, schedule, stream);
}

std::size_t backward_workspace(const MeanEmbedding& e) { return workspace(e, true); }

int backward(const MeanEmbedding& e, const int* schedule, Stream stream) {
    if (e.workspace_bytes < backward_workspace(e)) {
        return static_cast<int>(Status::workspace_too_small);
    }
    return e.type == Type::bf16 ? backward_of<bf16>(e, schedule, stream)
                                : backward_of<float>(e, schedule, stream);
}

int load_mean_embedding() {
    const int errors[] = {
        load_kernel(partial_statistics<float>), load_kernel(partial_statistics<bf16>),
        load_kernel(finish_statistics),
        load_kernel(class_sums<float>), load_kernel(class_sums<bf16>),
        load_kernel(partial_dots<float>), load_kernel(partial_dots<bf16>),
        load_kernel(finish_dots),
        load_kernel(gradient<float>), load_kernel(gradient<bf16>)};
    for (const int error : errors) {
        if (error) return error;
    }
    return 0;
}

}  // namespace dpmmd::cuda
