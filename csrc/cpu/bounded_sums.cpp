// Exact class sums of bounded integer vectors: the native twin of dpmmd/privacy/sums.py, whose
// docstring has the steps and why they are safe. Same arithmetic, same bits:
//
//   step 1  largest |v| of a group of taps, its exponent e, inverse = 2^-e      (largest)
//   step 2  s = sum of ceil((v inverse)^2 2^b), b = 62 - ceil(log2 D); rate = B guard / |g|  (square)
//   step 3  q = trunc(v inverse rate)                                          (quantised)
//   step 4  certificate: 0 < sum q^2 <= B^2 exactly, no q < 0 where declared  (certify)
//   then    sums[y] += q                                                     (add)
//
// Steps 1, 2 and 4 reduce over an image's features; maxima and integer sums are exact in any order,
// so threads own ranges of columns and add up their shares between the steps. What an image holds
// moves nothing but the sums: no branch leads to an error or a message.
//
// Bytes: the features once from memory and three times from cache, the sums once a tile.
// This file is compiled without contraction of a b + c: products are rounded as PyTorch's are.
#include "parallel.h"
#include "workspace.h"

namespace dpmmd::DPMMD_LEVEL {
namespace {

constexpr double guard = 1.0 - 0x1p-20;
constexpr std::uint64_t too_high = std::uint64_t{1} << 60;  // of a sum's high part
constexpr std::int64_t tile_bytes = 4 << 20;
constexpr std::int64_t most_rows = 16;

// Double precision, exactly the number that the feature is.
double value(float f) { return f; }
double value(double f) { return f; }
double value(bf16 f) {
    const std::uint32_t bits = static_cast<std::uint32_t>(f.bits) << 16;
    float v;
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
}

// |f| as an integer that is ordered as the numbers are, infinity above them and NaN above it.
std::uint64_t ordered(double f) {
    std::uint64_t bits;
    __builtin_memcpy(&bits, &f, sizeof bits);
    return bits & 0x7fffffffffffffff;
}
std::uint32_t ordered(float f) {
    std::uint32_t bits;
    __builtin_memcpy(&bits, &f, sizeof bits);
    return bits & 0x7fffffff;
}
std::uint16_t ordered(bf16 f) { return f.bits & 0x7fff; }

double number(std::uint64_t bits) {
    double v;
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
}
double number(std::uint32_t bits) {
    float v;
    __builtin_memcpy(&v, &bits, sizeof v);
    return v;
}
double number(std::uint16_t bits) { return value(bf16{bits}); }

// What a thread found in its columns of one row, per vector (a moment of a tap) or row.
struct Square {
    std::uint64_t high, low;  // the sum is high 2^32 + low: exact for any row
};

// How a vector is quantised: g = v inverse, q = trunc(g rate). A vector without use has rate 0.
struct Grid {
    double inverse, rate, bits;  // bits = 2^b of its group
};

struct Plan {
    const BoundedSums& e;
    std::int64_t columns, first_moment, num_moments, num_vectors, groups, num_chunks, tile_rows;
    std::int64_t shared_columns, own_columns;
    int threads;
    std::size_t bytes;
    Chunk* chunks;
    double* largest;    // [threads, rows, taps]: |f|
    std::int64_t* squares;  // [threads, rows, groups]
    Square* sizes;          // [threads, rows]
    std::uint8_t* negative;  // [threads, rows]
    Grid* grids;             // [threads, rows, vectors]
    std::uint8_t* within;    // [threads, rows]

    Plan(const BoundedSums& sums, std::byte* base)
        : e(sums),
          columns(total_columns(e.taps, e.num_taps)),
          first_moment(e.moments == 2 ? 2 : 1),
          num_moments(e.moments == 3 ? 2 : 1),
          num_vectors(num_moments * e.num_taps),
          groups(e.per_tap ? num_vectors : 1),
          num_chunks(count_chunks(e.taps, e.num_taps)),
          shared_columns(total_columns(e.taps, e.shared_taps)),
          own_columns(columns - shared_columns),
          threads(static_cast<int>(
              smaller(e.threads, larger(1, columns * larger(e.n, 1) >> 14)))) {
        const std::int64_t width = e.type == Type::f64 ? 8 : e.type == Type::f32 ? 4 : 2;
        tile_rows = smaller(most_rows, larger(1, tile_bytes / larger(columns * width, 1)));
        tile_rows = larger(1, smaller(tile_rows, e.n));
        Workspace workspace(base);
        chunks = workspace.take<Chunk>(num_chunks);
        largest = workspace.take<double>(threads * tile_rows * e.num_taps);
        squares = workspace.take<std::int64_t>(threads * tile_rows * groups);
        sizes = workspace.take<Square>(threads * tile_rows);
        negative = workspace.take<std::uint8_t>(threads * tile_rows);
        grids = workspace.take<Grid>(threads * tile_rows * num_vectors);
        within = workspace.take<std::uint8_t>(threads * tile_rows);
        bytes = workspace.used();
    }
};

// b of a group of `columns` numbers, so that s <= 2^62.
int fraction_bits(std::int64_t columns) {
    int log = 0;
    while (log < 62 && (std::int64_t{1} << log) < columns) ++log;
    return 62 - log;
}

double power_of_two(int exponent) { return __builtin_ldexp(1.0, exponent); }

template <class T>
class Work {
public:
    Work(const Plan& plan, const Worker& worker)
        : p_(plan),
          e_(plan.e),
          worker_(worker),
          first_(first_chunk(plan.chunks, plan.num_chunks, plan.columns, worker.thread,
                             worker.threads)),
          last_(first_chunk(plan.chunks, plan.num_chunks, plan.columns, worker.thread + 1,
                            worker.threads)) {}

    void run() const {
        for (std::int64_t begin = 0; begin < e_.n; begin += p_.tile_rows) {
            const std::int64_t rows = smaller(p_.tile_rows, e_.n - begin);
            for (std::int64_t r = 0; r < rows; ++r) largest(begin + r, r);
            worker_.meet();
            for (std::int64_t r = 0; r < rows; ++r) {
                scale(r);
                square(begin + r, r);
            }
            worker_.meet();
            for (std::int64_t r = 0; r < rows; ++r) {
                rate(begin + r, r);
                certify(begin + r, r);
            }
            worker_.meet();
            for (std::int64_t r = 0; r < rows; ++r) {
                if (is_within(begin + r, r)) add(begin + r, r);
            }
        }
    }

private:
    const Plan& p_;
    const BoundedSums& e_;
    const Worker& worker_;
    const std::int64_t first_, last_;  // chunks

    const T* features(std::int64_t image, const Chunk& chunk) const {
        const Tap& tap = e_.taps[chunk.tap];
        return static_cast<const T*>(tap.data) + image * tap.stride + chunk.begin;
    }

    std::int64_t slot(std::int64_t thread, std::int64_t r) const {
        return thread * p_.tile_rows + r;
    }
    Grid* grids(std::int64_t r) const {
        return p_.grids + slot(worker_.thread, r) * p_.num_vectors;
    }
    std::int64_t group_of(std::int64_t vector) const { return e_.per_tap ? vector : 0; }

    // The entry of the vector of moment m: f, f^2 or, in a joint vector, weight f^2.
    template <int m, bool joint>
    double entry(T f) const {
        const double v = value(f);
        if (m == 1) return v;
        return joint ? v * v * e_.weight : v * v;
    }

    // Calls body(moment, joint) with compile-time constants for each moment.
    template <class Body>
    void each_moment(const Body& body) const {
        if (e_.moments == 1) {
            body(Moment<1, false>{}, 0);
        } else if (e_.moments == 2) {
            body(Moment<2, false>{}, 0);
        } else {
            body(Moment<1, true>{}, 0);
            body(Moment<2, true>{}, 1);
        }
    }
    template <int number, bool joint_vector>
    struct Moment {
        static constexpr int m = number;
        static constexpr bool joint = joint_vector;
    };

    void largest(std::int64_t image, std::int64_t r) const {
        double* result = p_.largest + slot(worker_.thread, r) * e_.num_taps;
        for (std::int64_t l = 0; l < e_.num_taps; ++l) result[l] = 0;
        for (std::int64_t u = first_; u < last_; ++u) {
            const Chunk& chunk = p_.chunks[u];
            const T* f = features(image, chunk);
            auto most = ordered(T{});
            for (std::int64_t i = 0; i < chunk.columns; ++i) {
                const auto v = ordered(f[i]);
                most = v > most ? v : most;
            }
            // NaN stays: nothing compares above it.
            const double v = number(most);
            double& so_far = result[chunk.tap];
            if (!(v <= so_far) && so_far == so_far) so_far = v;
        }
    }

    // Step 1, for every group of one row.
    void scale(std::int64_t r) const {
        Grid* const grid = grids(r);
        for (std::int64_t group = 0; group < p_.groups; ++group) {
            const std::int64_t begin = e_.per_tap ? group : 0;
            const std::int64_t end = e_.per_tap ? group + 1 : p_.num_vectors;
            double most = 0;
            std::int64_t columns = 0;
            for (std::int64_t j = begin; j < end; ++j) {
                const std::int64_t tap = j % e_.num_taps;
                columns += e_.taps[tap].columns;
                double v = 0;
                for (int thread = 0; thread < worker_.threads; ++thread) {
                    const double f = p_.largest[slot(thread, r) * e_.num_taps + tap];
                    if (!(f <= v) && v == v) v = f;
                }
                // Rounding is monotone, so the largest |f| gives the largest entry.
                if (p_.first_moment == 2 || j >= e_.num_taps) v = v * v;
                if (j >= e_.num_taps) v = v * e_.weight;
                if (!(v <= most) && most == most) most = v;
            }
            const bool usable = most >= 0x1p-1000 && most <= 0x1p1000;  // false for NaN
            int exponent = 0;
            if (usable) __builtin_frexp(most, &exponent);
            for (std::int64_t j = begin; j < end; ++j) {
                grid[j].inverse = usable ? power_of_two(-exponent) : 0;
                grid[j].bits = power_of_two(fraction_bits(columns));
                grid[j].rate = 0;
            }
        }
    }

    // Step 2, this thread's columns.
    void square(std::int64_t image, std::int64_t r) const {
        std::int64_t* result = p_.squares + slot(worker_.thread, r) * p_.groups;
        for (std::int64_t group = 0; group < p_.groups; ++group) result[group] = 0;
        for (std::int64_t u = first_; u < last_; ++u) {
            const Chunk& chunk = p_.chunks[u];
            const T* f = features(image, chunk);
            each_moment([&](auto moment, std::int64_t index) {
                const std::int64_t vector = index * e_.num_taps + chunk.tap;
                const Grid grid = grids(r)[vector];
                if (grid.inverse == 0) return;
                std::int64_t total = 0;
                for (std::int64_t i = 0; i < chunk.columns; ++i) {
                    const double g = this->template entry<moment.m, moment.joint>(f[i]) * grid.inverse;
                    const double x = g * g * grid.bits;
                    const auto down = static_cast<std::int64_t>(x);  // x >= 0: ceil is down or one more
                    total += down + (static_cast<double>(down) < x);
                }
                result[group_of(vector)] += total;
            });
        }
    }

    // The rate of every group of one row: B guard / |g|, for balls at most B guard 2^e / c.
    void rate(std::int64_t image, std::int64_t r) const {
        Grid* const grid = grids(r);
        const double share =
            e_.per_tap ? 1.0 / __builtin_sqrt(static_cast<double>(p_.num_vectors)) : 1.0;
        const double limit = static_cast<double>(e_.limits[image]) * share;
        for (std::int64_t j = 0; j < p_.num_vectors; ++j) {
            if (grid[j].inverse == 0) continue;
            std::int64_t s = 0;
            for (int thread = 0; thread < worker_.threads; ++thread) {
                s += p_.squares[slot(thread, r) * p_.groups + group_of(j)];
            }
            const double norm = __builtin_sqrt(static_cast<double>(s) * (1 / grid[j].bits));
            double rate = limit * guard / norm;
            if (e_.ball) {
                const double most = limit * guard * (1 / grid[j].inverse) / (e_.clip * share);
                rate = most < rate ? most : rate;
            }
            grid[j].rate = rate;
        }
    }

    // Step 3.
    template <int m, bool joint>
    std::int64_t quantised(T f, const Grid& grid) const {
        return static_cast<std::int64_t>(entry<m, joint>(f) * grid.inverse * grid.rate);
    }

    // Whether an image may contribute: it is valid and its limit is one.
    bool is_eligible(std::int64_t image) const {
        const std::int64_t limit = e_.limits[image], label = e_.labels[image];
        return e_.valid[image] && limit > 0 && limit <= std::int64_t{1} << 30 && label >= 0 &&
               label < e_.num_classes;
    }

    // Step 4, this thread's columns.
    void certify(std::int64_t image, std::int64_t r) const {
        Square size{0, 0};
        std::int64_t signs = 0;
        for (std::int64_t u = first_; u < last_ && is_eligible(image); ++u) {
            const Chunk& chunk = p_.chunks[u];
            const T* f = features(image, chunk);
            each_moment([&](auto moment, std::int64_t index) {
                const Grid grid = grids(r)[index * e_.num_taps + chunk.tap];
                if (grid.rate == 0) return;
                std::uint64_t high = 0, low = 0;
                std::int64_t either = 0, magnitude = 0;
                for (std::int64_t i = 0; i < chunk.columns; ++i) {
                    const std::int64_t q =
                        this->template quantised<moment.m, moment.joint>(f[i], grid);
                    const auto square = static_cast<std::uint64_t>(q) * static_cast<std::uint64_t>(q);
                    high += square >> 32;
                    low += square & 0xffffffff;
                    either |= q;
                    magnitude |= q ^ (q >> 63);
                }
                size.high += high;
                size.low += low;
                // An entry whose square would not fit in 64 bits is over any limit.
                if (magnitude >> 31) size.high |= too_high;
                signs |= either;
            });
        }
        p_.sizes[slot(worker_.thread, r)] = size;
        p_.negative[slot(worker_.thread, r)] = signs < 0;
    }

    bool is_within(std::int64_t image, std::int64_t r) const {
        if (!is_eligible(image)) return false;
        std::uint64_t high = 0, low = 0;
        bool negative = false;
        for (int thread = 0; thread < worker_.threads; ++thread) {
            high += p_.sizes[slot(thread, r)].high;
            low += p_.sizes[slot(thread, r)].low;
            negative |= p_.negative[slot(thread, r)] != 0;
        }
        high += low >> 32;
        low &= 0xffffffff;
        const auto limit = static_cast<std::uint64_t>(e_.limits[image]);
        const std::uint64_t most = limit * limit;  // at most 2^60
        const bool fits = high < (std::uint64_t{1} << 30) && (high << 32 | low) <= most;
        return fits && (high | low) != 0 && !(e_.nonnegative && negative);
    }

    void add(std::int64_t image, std::int64_t r) const {
        for (std::int64_t u = first_; u < last_; ++u) {
            const Chunk& chunk = p_.chunks[u];
            const T* f = features(image, chunk);
            const bool shared = chunk.tap < e_.shared_taps;
            each_moment([&](auto moment, std::int64_t index) {
                const Grid grid = grids(r)[index * e_.num_taps + chunk.tap];
                if (grid.rate == 0) return;
                std::int64_t* sums =
                    shared ? e_.shared + index * p_.shared_columns + chunk.column
                           : e_.sums + (e_.labels[image] * p_.num_moments + index) * p_.own_columns +
                                 chunk.column - p_.shared_columns;
                for (std::int64_t i = 0; i < chunk.columns; ++i) {
                    sums[i] += this->template quantised<moment.m, moment.joint>(f[i], grid);
                }
            });
        }
    }
};

template <class T>
void run(void* argument, const Worker& worker) {
    Work<T>(*static_cast<const Plan*>(argument), worker).run();
}

}  // namespace

std::size_t bounded_sums_workspace(const BoundedSums& e) { return Plan(e, nullptr).bytes; }

Status bounded_sums(const BoundedSums& e) {
    Plan plan(e, e.workspace);
    if (plan.bytes > e.workspace_bytes) return Status::workspace_too_small;
    cut_chunks(e.taps, e.num_taps, plan.chunks);
    void (*const bodies[3])(void*, const Worker&) = {run<float>, run<bf16>, run<double>};
    run_team(plan.threads, bodies[static_cast<int>(e.type)], &plan);
    return Status::ok;
}

}  // namespace dpmmd::DPMMD_LEVEL
