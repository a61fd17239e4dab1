// Exact class sums of bounded integer vectors: the native twin of dpmmd/privacy/sums.py, whose
// docstring has the steps and why they are safe. Same arithmetic, same bits:
//
//   step 1  largest |v| of a group of taps, its exponent e, inverse = 2^-e
//   step 2  s = sum of ceil((v inverse)^2 2^b), b = 62 - ceil(log2 D); rate = B guard / |g|
//   step 3  q = trunc(v inverse rate)
//   step 4  certificate: 0 < sum q^2 <= B^2 exactly, no q < 0 where so declared
//   then    sums[y] += q
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
constexpr std::int64_t tile_bytes = 5 << 19;
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

// How a vector (a moment of a tap) is quantised: q = trunc(v inverse rate). Without use: 0.
struct Grid {
    double inverse;  // 2^-e
    double bits;     // 2^b
    double rate;
};

// Whether v is multiplied by inverse before all else. Float64 and joint vectors, whose weight may be
// any number, need it, lest squares overflow. Of the others the power of two is multiplied into the
// next factor: all factors are within 2^+-700, so no bit changes.
template <bool joint, class T>
constexpr bool scaled_first = joint || sizeof(T) == 8;

// What the certificate reads of an image's integers: the sum of q^2 modulo 2^64, the sum of the
// high halves of q^2, which tells whether that sum is exact, and what any q has of sign and size.
struct Size {
    std::uint64_t square, high, magnitude;
    std::int64_t sign;  // negative if any q is
};

// The entry of the vector of a moment: f, f^2 or, in a joint vector, weight f^2.
template <int moment, bool joint, class T>
inline double entry(T f, double weight) {
    const double v = value(f);
    if (moment == 1) return v;
    return joint ? v * v * weight : v * v;
}

// Step 1: the largest |f|. NaN stays, nothing compares above it.
template <class T>
double largest(const T* __restrict f, std::int64_t count) {
    auto most = ordered(T{});
    for (std::int64_t i = 0; i < count; ++i) {
        const auto v = ordered(f[i]);
        most = v > most ? v : most;
    }
    return number(most);
}

// Step 2: the sum of ceil((v inverse)^2 2^b).
template <int moment, bool joint, class T>
std::int64_t square(const T* __restrict f, Grid grid, double weight, std::int64_t count) {
    const double before = scaled_first<joint, T> ? grid.inverse : 1;
    const double after =
        scaled_first<joint, T> ? grid.bits : grid.inverse * grid.inverse * grid.bits;
    std::int64_t total = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        double g = entry<moment, joint>(f[i], weight);
        if (scaled_first<joint, T>) g *= before;
        const double x = g * g * after;
        const auto down = static_cast<std::int64_t>(x);  // x >= 0: the ceiling is it or one more
        total += down + (static_cast<double>(down) < x ? 1 : 0);
    }
    return total;
}

// Step 3. |q| <= 2^30 up to rounding, whatever f is; the conversion truncates toward zero.
template <int moment, bool joint, class T>
inline std::int64_t quantised(T f, Grid grid, double weight) {
    const double v = entry<moment, joint>(f, weight);
    return static_cast<std::int64_t>(
        scaled_first<joint, T> ? v * grid.inverse * grid.rate : v * (grid.inverse * grid.rate)
    );
}

// Step 4, what the certificate reads.
template <int moment, bool joint, class T>
void measure(const T* __restrict f, Grid grid, double weight, std::int64_t count, Size& size) {
    std::uint64_t total = 0, high = 0;
    std::int64_t magnitude = 0, sign = 0;
    for (std::int64_t i = 0; i < count; ++i) {
        const std::int64_t q = quantised<moment, joint>(f[i], grid, weight);
        const auto q2 = static_cast<std::uint64_t>(q) * static_cast<std::uint64_t>(q);
        total += q2;
        high += q2 >> 32;
        magnitude |= q < 0 ? -q : q;
        sign |= q;
    }
    size.square += total;
    size.high += high;
    size.magnitude |= static_cast<std::uint64_t>(magnitude);
    size.sign |= sign;
}

// Then: sums += q.
template <int moment, bool joint, class T>
void add(
    const T* __restrict f, Grid grid, double weight, std::int64_t count,
    std::int64_t* __restrict sums
) {
    for (std::int64_t i = 0; i < count; ++i) {
        sums[i] += quantised<moment, joint>(f[i], grid, weight);
    }
}

struct Plan {
    const BoundedSums& e;
    std::int64_t columns, first_moment, num_moments, num_vectors, groups, num_chunks, tile_rows;
    std::int64_t shared_columns, own_columns;
    int threads;
    std::size_t bytes;
    Chunk* chunks;
    std::int64_t* order;    // [n] images by class: a class's sums stay in cache for several
    std::int64_t* starts;   // [num_classes + 1]
    double* largest;        // [threads, rows, taps]: |f|
    std::int64_t* squares;  // [threads, rows, groups]
    Size* sizes;            // [threads, rows]
    Grid* grids;            // [threads, rows, vectors]
    bool* within;           // [threads, rows]

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
        order = workspace.take<std::int64_t>(e.n);
        starts = workspace.take<std::int64_t>(e.num_classes + 1);
        largest = workspace.take<double>(threads * tile_rows * e.num_taps);
        squares = workspace.take<std::int64_t>(threads * tile_rows * groups);
        sizes = workspace.take<Size>(threads * tile_rows);
        grids = workspace.take<Grid>(threads * tile_rows * num_vectors);
        within = workspace.take<bool>(threads * tile_rows);
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
        if (e_.n == 0) return;
        bool forth = true;
        clear_largest(rows_from(0));
        sweep(forth, [&](std::int64_t u) { find_largest(0, u); });
        for (std::int64_t begin = 0; begin < e_.n; begin += p_.tile_rows) {
            const std::int64_t rows = rows_from(begin), next = begin + p_.tile_rows;
            const std::int64_t* const images = p_.order + begin;
            worker_.meet();
            for (std::int64_t r = 0; r < rows; ++r) choose_scale(r);
            sweep(forth, [&](std::int64_t u) {
                for (std::int64_t r = 0; r < rows; ++r) add_squares(images[r], r, u);
            });
            worker_.meet();
            for (std::int64_t r = 0; r < rows; ++r) choose_rate(images[r], r);
            sweep(forth, [&](std::int64_t u) {
                for (std::int64_t r = 0; r < rows; ++r) take_size(images[r], r, u);
            });
            worker_.meet();
            for (std::int64_t r = 0; r < rows; ++r) within(r) = is_within(images[r], r);
            clear_largest(rows_from(next));
            sweep(forth, [&](std::int64_t u) {
                for (std::int64_t r = 0; r < rows; ++r) {
                    if (within(r)) add_row(images[r], r, u);
                }
                find_largest(next, u);  // meanwhile, from memory
            });
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
    // The grids of a row's vectors; vector = index of the moment * num_taps + tap.
    Grid* grids(std::int64_t r) const {
        return p_.grids + slot(worker_.thread, r) * p_.num_vectors;
    }
    std::int64_t group_of(std::int64_t vector) const { return e_.per_tap ? vector : 0; }

    template <int number, bool joint_vector>
    struct Moment {
        static constexpr int moment = number;
        static constexpr bool joint = joint_vector;
    };

    // Calls body(Moment, its index) for each moment, which is a constant to the compiler.
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

    // Calls body(chunk) for this thread's chunks, by turns forth and back: what the last pass read
    // last is still in this core's own cache.
    template <class Body>
    void sweep(bool& forth, const Body& body) const {
        if (forth) {
            for (std::int64_t u = first_; u < last_; ++u) body(u);
        } else {
            for (std::int64_t u = last_; u-- > first_;) body(u);
        }
        forth = !forth;
    }

    std::int64_t rows_from(std::int64_t begin) const {
        return larger(0, smaller(p_.tile_rows, e_.n - begin));
    }

    bool& within(std::int64_t r) const { return p_.within[slot(worker_.thread, r)]; }

    double* largest_of(std::int64_t thread, std::int64_t r) const {
        return p_.largest + slot(thread, r) * e_.num_taps;
    }

    void clear_largest(std::int64_t rows) const {
        for (std::int64_t i = 0; i < rows * e_.num_taps; ++i) {
            largest_of(worker_.thread, 0)[i] = 0;
        }
    }

    // Step 1, one chunk, of the tile that begins with image order[begin].
    void find_largest(std::int64_t begin, std::int64_t u) const {
        const Chunk& chunk = p_.chunks[u];
        for (std::int64_t r = 0; r < rows_from(begin); ++r) {
            double& so_far = largest_of(worker_.thread, r)[chunk.tap];
            so_far = larger_or_nan(
                so_far, largest(features(p_.order[begin + r], chunk), chunk.columns)
            );
        }
    }

    static double larger_or_nan(double a, double b) {
        return a != a || a >= b ? a : b;
    }

    // Step 1, for every group of one row; its sums begin at 0.
    void choose_scale(std::int64_t r) const {
        Grid* const grid = grids(r);
        p_.sizes[slot(worker_.thread, r)] = {0, 0, 0, 0};
        for (std::int64_t group = 0; group < p_.groups; ++group) {
            squares(worker_.thread, r)[group] = 0;
            const std::int64_t begin = e_.per_tap ? group : 0;
            const std::int64_t end = e_.per_tap ? group + 1 : p_.num_vectors;
            double most = 0;
            std::int64_t columns = 0;
            for (std::int64_t j = begin; j < end; ++j) {
                const std::int64_t tap = j % e_.num_taps;
                columns += e_.taps[tap].columns;
                double v = 0;
                for (int thread = 0; thread < worker_.threads; ++thread) {
                    v = larger_or_nan(v, largest_of(thread, r)[tap]);
                }
                // Rounding is monotone, so the largest |f| gives the largest entry.
                if (p_.first_moment == 2 || j >= e_.num_taps) v = v * v;
                if (j >= e_.num_taps) v = v * e_.weight;
                most = larger_or_nan(most, v);
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

    std::int64_t* squares(std::int64_t thread, std::int64_t r) const {
        return p_.squares + slot(thread, r) * p_.groups;
    }

    // Step 2, one chunk.
    void add_squares(std::int64_t image, std::int64_t r, std::int64_t u) const {
        const Chunk& chunk = p_.chunks[u];
        each_moment([&](auto m, std::int64_t index) {
            const std::int64_t vector = index * e_.num_taps + chunk.tap;
            const Grid& grid = grids(r)[vector];
            if (grid.inverse == 0) return;
            squares(worker_.thread, r)[group_of(vector)] += square<m.moment, m.joint>(
                features(image, chunk), grid, e_.weight, chunk.columns
            );
        });
    }

    // The rate of every group of one row: B guard / |g|, for balls at most B guard 2^e / c.
    // What may not contribute keeps rate 0: only with a limit of at most 2^30 do integers fit.
    void choose_rate(std::int64_t image, std::int64_t r) const {
        if (!is_eligible(image)) return;
        Grid* const grid = grids(r);
        const double share =
            e_.per_tap ? 1.0 / __builtin_sqrt(static_cast<double>(p_.num_vectors)) : 1.0;
        const double limit = static_cast<double>(e_.limits[image]) * share;
        for (std::int64_t j = 0; j < p_.num_vectors; ++j) {
            if (grid[j].inverse == 0) continue;
            std::int64_t s = 0;
            for (int thread = 0; thread < worker_.threads; ++thread) {
                s += squares(thread, r)[group_of(j)];
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

    // Steps 3 and 4, one chunk.
    void take_size(std::int64_t image, std::int64_t r, std::int64_t u) const {
        const Chunk& chunk = p_.chunks[u];
        each_moment([&](auto m, std::int64_t index) {
            const Grid& grid = grids(r)[index * e_.num_taps + chunk.tap];
            if (grid.rate == 0) return;
            measure<m.moment, m.joint>(
                features(image, chunk), grid, e_.weight, chunk.columns,
                p_.sizes[slot(worker_.thread, r)]
            );
        });
    }

    // Whether an image may contribute at all: it is valid, and its limit and label are in range.
    bool is_eligible(std::int64_t image) const {
        const std::int64_t limit = e_.limits[image], label = e_.labels[image];
        return e_.valid[image] && limit > 0 && limit <= std::int64_t{1} << 30 && label >= 0 &&
               label < e_.num_classes;
    }

    // Step 4: the certificate.
    bool is_within(std::int64_t image, std::int64_t r) const {
        Size size{0, 0, 0, 0};
        for (int thread = 0; thread < worker_.threads; ++thread) {
            const Size& part = p_.sizes[slot(thread, r)];
            size.square += part.square;
            size.high += part.high;
            size.magnitude |= part.magnitude;
            size.sign |= part.sign;
        }
        // Every q^2 is below (its high half + 1) 2^32, so the sum of squares is exact where
        // high + entries <= 2^32; a sum that is not is over any limit.
        const auto entries = static_cast<std::uint64_t>(p_.columns * p_.num_moments);
        const bool exact =
            size.magnitude >> 32 == 0 && size.high + entries <= std::uint64_t{1} << 32;
        const auto limit = static_cast<std::uint64_t>(e_.limits[image]);
        return is_eligible(image) && exact && size.square > 0 && size.square <= limit * limit &&
               !(e_.nonnegative && size.sign < 0);
    }

    void add_row(std::int64_t image, std::int64_t r, std::int64_t u) const {
        const Chunk& chunk = p_.chunks[u];
        each_moment([&](auto m, std::int64_t index) {
            const Grid& grid = grids(r)[index * e_.num_taps + chunk.tap];
            if (grid.rate == 0) return;
            std::int64_t* const sums =
                chunk.tap < e_.shared_taps
                    ? e_.shared + index * p_.shared_columns + chunk.column
                    : e_.sums + (e_.labels[image] * p_.num_moments + index) * p_.own_columns +
                          chunk.column - p_.shared_columns;
            add<m.moment, m.joint>(
                features(image, chunk), grid, e_.weight, chunk.columns, sums
            );
        });
    }
};

template <class T>
void run(void* argument, const Worker& worker) {
    Work<T>(*static_cast<const Plan*>(argument), worker).run();
}

// Images by class; those whose label is out of range, which add nothing, lie with class 0.
void sort_by_class(const BoundedSums& e, std::int64_t* order, std::int64_t* starts) {
    const auto label = [&](std::int64_t i) {
        return e.labels[i] >= 0 && e.labels[i] < e.num_classes ? e.labels[i] : 0;
    };
    for (std::int64_t k = 0; k <= e.num_classes; ++k) starts[k] = 0;
    for (std::int64_t i = 0; i < e.n; ++i) ++starts[label(i) + 1];
    for (std::int64_t k = 0; k < e.num_classes; ++k) starts[k + 1] += starts[k];
    for (std::int64_t i = 0; i < e.n; ++i) order[starts[label(i)]++] = i;
}

}  // namespace

std::size_t bounded_sums_workspace(const BoundedSums& e) { return Plan(e, nullptr).bytes; }

Status bounded_sums(const BoundedSums& e) {
    Plan plan(e, e.workspace);
    if (plan.bytes > e.workspace_bytes) return Status::workspace_too_small;
    cut_chunks(e.taps, e.num_taps, plan.chunks);
    sort_by_class(e, plan.order, plan.starts);
    void (*const bodies[3])(void*, const Worker&) = {run<float>, run<bf16>, run<double>};
    run_team(plan.threads, bodies[static_cast<int>(e.type)], &plan);
    return Status::ok;
}

}  // namespace dpmmd::DPMMD_LEVEL
