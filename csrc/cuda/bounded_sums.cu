// Exact class sums of bounded integer vectors: dpmmd/privacy/sums.py on the device, whose docstring
// has the steps and why they are safe. Same arithmetic, same bits, in seven launches over all taps:
//
//   partial_largest, finish_largest          step 1: inverse = 2^-e; the schedule of the labels
//   partial_squares, finish_squares          step 2: s, rate = B guard / |g|
//   partial_certificate, finish_certificate  steps 3 and 4: q = trunc(v inverse rate), sum q^2
//   add_sums                                 sums[y] += q
//
// Maxima and integer sums are exact in any order; all else is products and quotients in double. This
// file is compiled without contraction of a b + c (-fmad=false). What an image holds moves nothing
// but the sums: no branch leads to an error or a message.
//
// A vector is a moment of a tap; bounds are of all vectors together, or of each. Arrays over bounds
// are [norms, n, blocks]: blocks of taps, and 2 norms for the two moments of a tap, if per tap.
// Bytes: the features four times, the sums of present classes in and out.
#include <cmath>

#include "schedule.h"

namespace dpmmd::cuda {
namespace {

constexpr double guard = 1.0 - 0x1p-20;
constexpr int unroll = 2;  // 16-byte accesses a lane and row
constexpr Index above = Index{1} << 31;  // no |q| of a vector within a limit reaches it
constexpr Index full = Index{1} << 30;   // of a sum's high part: 2^62, over every limit's square

template <class T>
constexpr int row_block = lanes * width<T> * unroll;
template <class T>
constexpr int sums_block = lanes * width<T>;

struct Sums {
    Table table;
    Schedule schedule;
    const Index *labels, *limits;
    const std::uint8_t* valid;
    int *order, *starts, *within;  // within [n]: whether an image contributes
    unsigned* largest;             // [n, parts]: bits of |f|, which are ordered as the numbers are
    Index* partials;               // [2, n, parts]
    double *inverse, *rate;        // [norms, n, blocks]; 0: without use
    Index *sums, *shared;
    Index n, parts, blocks, num_classes, classes, shared_taps, columns, shared_columns;
    double weight, share, clip;    // clip: of one bound
    int moments, norms, bits, columns_a_block;
    bool joint, ball, per_tap, nonnegative;

    // Where the inverse and rate of an image's moment at a tap are.
    __device__ Index at(int moment, Index image, int tap) const {
        const Index norm = moment == 2 && norms == 2;
        return (norm * n + image) * blocks + (per_tap ? tap : 0);
    }
};

__device__ inline double power_of_two(int exponent) {
    return __longlong_as_double(static_cast<long long>(exponent + 1023) << 52);
}

// v of a moment: f, f^2 or, in a joint vector, f^2 weight.
__device__ inline double entry(float f, int moment, const Sums& p) {
    double v = f;
    if (moment == 2) {
        v = v * v;
        if (p.joint) v = v * p.weight;
    }
    return v;
}

__device__ inline Index quantised(float f, int moment, const Sums& p, double inverse, double rate) {
    return static_cast<Index>(entry(f, moment, p) * inverse * rate);
}

// Calls row(image, numbers of this lane as they lie in memory) for the rows of this block.
template <class T, bool aligned, class Row>
__device__ inline void each_row(const Sums& p, const Part& tap, const Row& row) {
    const Index first =
        static_cast<Index>(block_of(p.table) - tap.first_block) * row_block<T> +
        lane_of() * width<T>;
    const Index step = static_cast<Index>(gridDim.y) * warps;
    for (Index image = static_cast<Index>(blockIdx.y) * warps + warp_of(); image < p.n;
         image += step) {
        const T* const data = static_cast<const T*>(tap.data) + image * tap.stride;
        uint4 raw[unroll];
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            raw[u] = load<aligned>(data, first + u * lanes * width<T>, tap.columns);
        }
        row(image, raw);
    }
}

template <class T, class Row>
__device__ inline void each_row_of(const Sums& p, const Row& row) {
    const Part& tap = find_part(p.table);
    if (tap.aligned) {
        each_row<T, true>(p, tap, row);
    } else {
        each_row<T, false>(p, tap, row);
    }
}

// ---- step 1 ----

template <class T>
__global__ void __launch_bounds__(threads) partial_largest(const __grid_constant__ Sums p) {
    each_row_of<T>(p, [&](Index image, const uint4(&raw)[unroll]) {
        unsigned most = 0;
#pragma unroll
        for (int u = 0; u < unroll; ++u) {
            float f[width<T>];
            unpack(raw[u], f);
#pragma unroll
            for (int i = 0; i < width<T>; ++i) {
                const unsigned bits = __float_as_uint(f[i]) & 0x7fffffffU;  // NaN is above all
                most = bits > most ? bits : most;
            }
        }
        most = warp_largest(most);
        if (lane_of() == 0) p.largest[image * p.parts + block_of(p.table)] = most;
    });
}

struct Range {
    Index image, local, first, end;
};

__device__ inline Range range_of(const Sums& p, Index task) {
    const Index local = task % p.table.count, image = task / p.table.count;
    if (!p.per_tap) return {image, local, 0, p.parts};
    const Part& tap = p.table.parts[local];
    const Index first = tap.first_block;
    return {
        image, local, first, first + (tap.columns + p.columns_a_block - 1) / p.columns_a_block};
}

__device__ inline double inverse_of(double most) {
    if (!(most >= 0x1p-1000 && most <= 0x1p1000)) return 0;  // NaN too
    const int exponent = static_cast<int>(__double_as_longlong(most) >> 52) - 1022;
    return power_of_two(-exponent);
}

// A warp an image and bound; then (classes > 0) the schedule.
__global__ void __launch_bounds__(threads) finish_largest(const __grid_constant__ Sums p) {
    const Index task = warp_of_grid(), rows = p.n * p.table.count;
    if (task >= rows) {
        if (task - rows < p.classes) {
            place_class(p.labels, p.starts, nullptr, task - rows, p.n, p.num_classes);
        }
        return;
    }
    const Range range = range_of(p, task);
    unsigned bits = 0;
    for (Index i = range.first + lane_of(); i < range.end; i += lanes) {
        const unsigned other = p.largest[range.image * p.parts + i];
        bits = other > bits ? other : bits;
    }
    bits = warp_largest(bits);
    if (lane_of() == 0) {
        // Rounding is monotone, so the largest |f| gives the largest entry.
        const float f = __uint_as_float(bits);
        const int tap = p.table.parts[range.local].number;
        const double one = entry(f, 1, p), two = entry(f, 2, p);
        if (p.norms == 2) {
            p.inverse[p.at(1, range.image, tap)] = inverse_of(one);
            p.inverse[p.at(2, range.image, tap)] = inverse_of(two);
        } else {
            const double most = p.moments == 1 || (p.moments == 3 && !(two > one)) ? one : two;
            p.inverse[p.at(1, range.image, tap)] = inverse_of(most);
        }
    }
    if (p.classes && range.local == 0) {
        place_image(p.labels, p.order, range.image, p.n, p.num_classes);
    }
}

// ---- step 2 ----

template <class T>
__global__ void __launch_bounds__(threads) partial_squares(const __grid_constant__ Sums p) {
    const Part& part = find_part(p.table);
    const double power = power_of_two(p.per_tap ? part.bits : p.bits);
    const int tap = part.number;
    each_row_of<T>(p, [&](Index image, const uint4(&raw)[unroll]) {
        Index one = 0, two = 0;  // by norm
#pragma unroll
        for (int moment = 1; moment <= 2; ++moment) {
            if (!(p.moments & moment)) continue;
            const double inverse = p.inverse[p.at(moment, image, tap)];
            if (inverse == 0) continue;
            Index sum = 0;
#pragma unroll
            for (int u = 0; u < unroll; ++u) {
                float f[width<T>];
                unpack(raw[u], f);
#pragma unroll
                for (int i = 0; i < width<T>; ++i) {
                    const double g = entry(f[i], moment, p) * inverse;
                    const double x = g * g * power;
                    const auto down = static_cast<Index>(x);  // the ceiling is it or one more
                    sum += down + (static_cast<double>(down) < x ? 1 : 0);
                }
            }
            if (moment == 2 && p.norms == 2) {
                two += sum;
            } else {
                one += sum;
            }
        }
        Index* const at = p.partials + image * p.parts + block_of(p.table);
        one = warp_sum(one);
        if (lane_of() == 0) at[0] = one;
        if (p.norms == 2) {
            two = warp_sum(two);
            if (lane_of() == 0) at[p.n * p.parts] = two;
        }
    });
}

// A warp an image and bound.
__global__ void __launch_bounds__(threads) finish_squares(const __grid_constant__ Sums p) {
    const Index task = warp_of_grid();
    if (task >= p.n * p.table.count) return;
    const Range range = range_of(p, task);
    const Part& tap = p.table.parts[range.local];
    for (int norm = 0; norm < p.norms; ++norm) {
        const Index* const partials = p.partials + (norm * p.n + range.image) * p.parts;
        const Index square = sum_of<Index>(partials, range.first, range.end);
        if (lane_of() != 0) continue;
        const Index at = p.at(norm + 1, range.image, tap.number), limit = p.limits[range.image];
        const double inverse = p.inverse[at];
        double rate = 0;
        // Only with a limit of at most 2^30 do integers fit.
        if (inverse != 0 && p.valid[range.image] && limit > 0 && limit <= Index{1} << 30) {
            const double most = static_cast<double>(limit) * p.share * guard;
            const int bits = p.per_tap ? tap.bits : p.bits;
            rate = most / sqrt(static_cast<double>(square) * power_of_two(-bits));
            if (p.ball) {
                const double ball = most * (1 / inverse) / p.clip;
                rate = ball < rate ? ball : rate;
            }
        }
        p.rate[at] = rate;
    }
}

// ---- steps 3 and 4 ----

template <class T>
__global__ void __launch_bounds__(threads) partial_certificate(const __grid_constant__ Sums p) {
    const int tap = find_part(p.table).number;
    each_row_of<T>(p, [&](Index image, const uint4(&raw)[unroll]) {
        Index high = 0, low = 0;  // the sum of q^2 is high 2^32 + low
#pragma unroll
        for (int moment = 1; moment <= 2; ++moment) {
            if (!(p.moments & moment)) continue;
            const Index at = p.at(moment, image, tap);
            const double inverse = p.inverse[at], rate = p.rate[at];
            if (rate == 0) continue;
#pragma unroll
            for (int u = 0; u < unroll; ++u) {
                float f[width<T>];
                unpack(raw[u], f);
#pragma unroll
                for (int i = 0; i < width<T>; ++i) {
                    const Index q = quantised(f[i], moment, p, inverse, rate);
                    // An entry that has no square in 64 bits is over any limit.
                    const bool outside =
                        q >= above || q <= -above || (p.nonnegative && q < 0);
                    const Index square = outside ? full << 32 : q * q;
                    high += square >> 32;
                    low += square & 0xffffffff;
                }
            }
        }
        high = warp_sum(high);
        low = warp_sum(low);
        if (lane_of() == 0) {
            Index* const to = p.partials + image * p.parts + block_of(p.table);
            to[0] = high;
            to[p.n * p.parts] = low;
        }
    });
}

// A warp an image.
__global__ void __launch_bounds__(threads) finish_certificate(const __grid_constant__ Sums p) {
    const Index image = warp_of_grid();
    if (image >= p.n) return;
    const Index* const partials = p.partials + image * p.parts;
    Index high = sum_of<Index>(partials, 0, p.parts);
    Index low = sum_of<Index>(partials + p.n * p.parts, 0, p.parts);
    high += low >> 32;
    low &= 0xffffffff;
    if (lane_of() == 0) {
        const Index limit = p.limits[image];
        const bool eligible = p.valid[image] && limit > 0 && limit <= Index{1} << 30;
        bool within = false;
        if (eligible && high < full) {
            const Index square = (high << 32) | low;
            within = square > 0 && square <= limit * limit;
        }
        p.within[image] = within;
    }
}

// ---- then ----

template <class T, bool aligned>
__device__ inline void quantised_sums(
    const Sums& p, const Part& tap, Index column, Index start, Index end,
    Index (&one)[width<T>], Index (&two)[width<T>]
) {
    for (Index first = start + warp_of(); first < end; first += warps) {
        const Index image = p.schedule.image(first);
        if (!p.within[image]) continue;
        const T* const row = static_cast<const T*>(tap.data) + image * tap.stride;
        float f[width<T>];
        unpack(load<aligned>(row, column, tap.columns), f);
#pragma unroll
        for (int moment = 1; moment <= 2; ++moment) {
            if (!(p.moments & moment)) continue;
            const Index at = p.at(moment, image, tap.number);
            const double inverse = p.inverse[at], rate = p.rate[at];
            if (rate == 0) continue;
#pragma unroll
            for (int i = 0; i < width<T>; ++i) {
                (moment == 1 ? one[i] : two[i]) += quantised(f[i], moment, p, inverse, rate);
            }
        }
    }
}

// Grid [blocks of columns, classes]. A shared tap has the images of all classes, with class 0.
template <class T>
__global__ void __launch_bounds__(threads) add_sums(const __grid_constant__ Sums p) {
    __shared__ Index shares[warps][sums_block<T>];
    const Part& tap = find_part(p.table);
    const Index begin =
        static_cast<Index>(block_of(p.table) - tap.first_block) * sums_block<T>;
    const Index column = begin + lane_of() * width<T>;
    const bool shared = tap.number < p.shared_taps;
    const Index step = shared ? p.shared_columns : p.columns;
    for (Index k = blockIdx.y; k < p.num_classes; k += gridDim.y) {
        const Index start = p.schedule.start(k);
        const Index end = p.schedule.end(shared ? p.num_classes - 1 : k);
        if (start == end || (shared && k > 0)) continue;
        Index one[width<T>] = {}, two[width<T>] = {};
        if (tap.aligned) {
            quantised_sums<T, true>(p, tap, column, start, end, one, two);
        } else {
            quantised_sums<T, false>(p, tap, column, start, end, one, two);
        }
        Index* to = shared ? p.shared + tap.column + begin
                           : p.sums + k * (p.moments == 3 ? 2 : 1) * step + tap.column -
                                 p.shared_columns + begin;
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
                    Index sum = to[c];
#pragma unroll
                    for (int w = 0; w < warps; ++w) sum += shares[w][c];
                    to[c] = sum;
                }
            }
            __syncthreads();
            to += step;
        }
    }
}

// ---- host ----

// b of a group of `columns` numbers, so that s <= 2^62.
int fraction_bits(Index columns) {
    int log = 0;
    while (log < 62 && (Index{1} << log) < columns) ++log;
    return 62 - log;
}

std::size_t lay_out(const BoundedSums& e, Sums& p) {
    p.columns_a_block = e.type == Type::bf16 ? row_block<bf16> : row_block<float>;
    p.n = e.n;
    p.parts = count_blocks(e.taps, e.num_taps, p.columns_a_block);
    p.blocks = e.per_tap ? e.num_taps : 1;
    p.norms = e.per_tap && e.moments == 3 ? 2 : 1;
    Arrays arrays(e.workspace);
    p.inverse = arrays.take<double>(p.norms * p.n * p.blocks);
    p.rate = arrays.take<double>(p.norms * p.n * p.blocks);
    p.partials = arrays.take<Index>(2 * p.n * p.parts);
    p.largest = arrays.take<unsigned>(p.n * p.parts);
    p.within = arrays.take<int>(p.n);
    p.order = arrays.take<int>(p.n);
    p.starts = arrays.take<int>(e.num_classes + 1);
    return arrays.used();
}

template <class T>
int run(const BoundedSums& e, Sums& p, Stream stream) {
    const auto over_features = [&](void (*kernel)(Sums), int block, unsigned rows) {
        return for_each_table(
            e.taps, e.num_taps, static_cast<int>(sizeof(T)), block, nullptr, Which::with_columns,
            [&](const Table& table) {
                p.table = table;
                for (int i = 0; i < table.count; ++i) {
                    p.table.parts[i].bits = fraction_bits(table.parts[i].columns);
                }
                return launch(
                    kernel, dim3(static_cast<unsigned>(table.blocks), rows), threads, stream, p
                );
            }
        );
    };
    const auto over_bounds = [&](void (*kernel)(Sums), Index classes) {
        p.classes = classes;
        const auto once = [&](const Table& table) {
            p.table = table;
            for (int i = 0; i < table.count; ++i) {
                p.table.parts[i].bits = fraction_bits(table.parts[i].columns);
            }
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
            return once(whole);
        }
        return for_each_table(
            e.taps, e.num_taps, 4, p.columns_a_block, nullptr, Which::all, once
        );
    };
    const unsigned rows = grid_of(e.n, warps);
    int error = over_features(partial_largest<T>, row_block<T>, rows);
    if (!error) error = over_bounds(finish_largest, e.num_classes);
    if (!error) error = over_features(partial_squares<T>, row_block<T>, rows);
    if (!error) error = over_bounds(finish_squares, 0);
    if (!error) error = over_features(partial_certificate<T>, row_block<T>, rows);
    if (!error) {
        error = launch(
            finish_certificate, dim3(static_cast<unsigned>((p.n + warps - 1) / warps)), threads,
            stream, p
        );
    }
    if (!error) error = over_features(add_sums<T>, sums_block<T>, grid_of(e.num_classes));
    return error;
}

}  // namespace

std::size_t bounded_sums_workspace(const BoundedSums& e) {
    Sums p{};
    return lay_out(e, p);
}

int bounded_sums(const BoundedSums& e, Stream stream) {
    Sums p{};
    if (e.workspace_bytes < lay_out(e, p)) return static_cast<int>(Status::workspace_too_small);
    if (e.n == 0 || p.parts == 0) return 0;
    const Index num_moments = e.moments == 3 ? 2 : 1, dim = total_columns(e.taps, e.num_taps);
    p.schedule = {p.order, p.starts, e.n};
    p.labels = e.labels;
    p.limits = e.limits;
    p.valid = e.valid;
    p.sums = e.sums;
    p.shared = e.shared;
    p.num_classes = e.num_classes;
    p.shared_taps = e.shared_taps;
    p.shared_columns = total_columns(e.taps, e.shared_taps);
    p.columns = dim - p.shared_columns;
    p.weight = e.weight;
    p.share =
        e.per_tap ? 1.0 / std::sqrt(static_cast<double>(num_moments * e.num_taps)) : 1.0;
    p.clip = e.clip * p.share;
    p.moments = e.moments;
    p.joint = e.moments == 3;
    p.bits = fraction_bits(num_moments * dim);
    p.ball = e.ball;
    p.per_tap = e.per_tap;
    p.nonnegative = e.nonnegative;
    return e.type == Type::bf16 ? run<bf16>(e, p, stream) : run<float>(e, p, stream);
}

int load_bounded_sums() {
    const int errors[] = {
        load_kernel(partial_largest<float>), load_kernel(partial_largest<bf16>),
        load_kernel(finish_largest),
        load_kernel(partial_squares<float>), load_kernel(partial_squares<bf16>),
        load_kernel(finish_squares),
        load_kernel(partial_certificate<float>), load_kernel(partial_certificate<bf16>),
        load_kernel(finish_certificate),
        load_kernel(add_sums<float>), load_kernel(add_sums<bf16>)};
    for (const int error : errors) {
        if (error) return error;
    }
    return 0;
}

}  // namespace dpmmd::cuda
