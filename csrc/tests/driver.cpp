// Test driver of the native core, built with ASan and UBSan by `make test-native`: every operation
// at every level of this processor, on buffers of exactly the size promised, against plain loops.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "../cpu/blocks.h"
#include "../dpmmd.h"

namespace {

using namespace dpmmd;
using std::int64_t;
using std::size_t;

int failures = 0;

void expect(bool condition, const char* what, const char* level) {
    if (!condition) {
        std::printf("FAILED at level %s: %s\n", level, what);
        ++failures;
    }
}

std::uint16_t to_bf16(float f) {
    std::uint32_t bits;
    std::memcpy(&bits, &f, sizeof bits);
    return static_cast<std::uint16_t>(bits >> 16);  // truncated: exact as a feature either way
}

float from_bf16(std::uint16_t h) {
    const std::uint32_t bits = static_cast<std::uint32_t>(h) << 16;
    float f;
    std::memcpy(&f, &bits, sizeof f);
    return f;
}

// A buffer from malloc of exactly so many bytes, so that ASan sees one byte too many.
template <class T>
struct Exact {
    explicit Exact(size_t count) : data(static_cast<T*>(std::malloc(count * sizeof(T)))) {}
    ~Exact() { std::free(data); }
    Exact(const Exact&) = delete;
    Exact& operator=(const Exact&) = delete;
    T* data;
};

struct Problem {
    int64_t n, classes;
    std::vector<int64_t> columns;
    std::vector<std::vector<double>> values;  // [n][D], exact in the features' type
    std::vector<std::unique_ptr<Exact<char>>> taps, gradients;
    std::vector<Tap> list;
    std::vector<int64_t> labels;
    int64_t dim = 0;

    Problem(int64_t images, int64_t k, std::vector<int64_t> widths, Type type, bool hostile)
        : n(images), classes(k), columns(std::move(widths)) {
        std::mt19937 random(7);
        std::normal_distribution<float> normal;
        for (int64_t d : columns) dim += d;
        values.assign(static_cast<size_t>(n), std::vector<double>(static_cast<size_t>(dim)));
        for (int64_t i = 0; i < n; ++i) labels.push_back(static_cast<int64_t>(random() % k));
        int64_t column = 0;
        for (int64_t d : columns) {
            const size_t size = type == Type::bf16 ? 2 : type == Type::f32 ? 4 : 8;
            const size_t bytes = static_cast<size_t>(n * d) * size;
            taps.push_back(std::make_unique<Exact<char>>(bytes));
            gradients.push_back(std::make_unique<Exact<char>>(bytes));
            for (int64_t i = 0; i < n; ++i) {
                for (int64_t j = 0; j < d; ++j) {
                    float v = normal(random);
                    v = v > 0 ? v : 0;
                    if (hostile && i % 5 == 1 && j == d - 1) {
                        v = i % 2 ? std::nanf("") : std::numeric_limits<float>::infinity();
                    }
                    char* at = taps.back()->data + static_cast<size_t>(i * d + j) * size;
                    if (type == Type::bf16) {
                        const std::uint16_t h = to_bf16(v);
                        v = from_bf16(h);
                        std::memcpy(at, &h, size);
                    } else if (type == Type::f32) {
                        std::memcpy(at, &v, size);
                    } else {
                        const double w = v;
                        std::memcpy(at, &w, size);
                    }
                    values[static_cast<size_t>(i)][static_cast<size_t>(column + j)] = v;
                }
            }
            list.push_back({taps.back()->data, d, d, gradients.back()->data, d});
            column += d;
        }
    }
};

double norm(const std::vector<double>& v, int power) {
    double total = 0;
    for (double x : v) total += std::pow(x, 2 * power);
    return std::sqrt(total);
}

void mean_embedding(const Operations& o, Type type, int moments, bool per_tap, int threads) {
    Problem p(13, 3, {1, 33, 4100, 0, 70}, type, true);
    const int64_t m = moments == 3 ? 2 : 1;
    const auto blocks = static_cast<int64_t>(per_tap ? p.columns.size() : 1);
    const auto norms = static_cast<size_t>(m * p.n * blocks);
    const auto sums = static_cast<size_t>(m * p.classes * p.dim);
    Exact<float> scale(norms), projection(norms), coefficients(norms);
    Exact<float> means(sums), upstream(sums), counts(static_cast<size_t>(p.classes));
    for (size_t i = 0; i < sums; ++i) upstream.data[i] = std::sin(static_cast<float>(i));
    MeanEmbedding e{};
    e.taps = p.list.data();
    e.num_taps = static_cast<int64_t>(p.list.size());
    e.type = type;
    e.n = p.n;
    e.labels = p.labels.data();
    e.num_classes = p.classes;
    e.moments = moments;
    e.per_tap = per_tap;
    e.clip = 2;
    e.weight = 1;
    e.scale = scale.data;
    e.projection = projection.data;
    e.means = means.data;
    e.counts = counts.data;
    e.upstream = upstream.data;
    e.coefficients = coefficients.data;
    e.threads = threads;
    Exact<std::byte> forward_space(o.forward_workspace(e));
    e.workspace = forward_space.data;
    e.workspace_bytes = o.forward_workspace(e) - 1;
    expect(o.forward(e, Phases::both) == Status::workspace_too_small, "small workspace", o.level);
    ++e.workspace_bytes;
    expect(o.forward(e, Phases::both) == Status::ok, "forward", o.level);
    Exact<std::byte> backward_space(o.backward_workspace(e));
    e.workspace = backward_space.data;
    e.workspace_bytes = o.backward_workspace(e);
    expect(o.backward(e, Phases::both) == Status::ok, "backward", o.level);
    if (!per_tap) {
        std::vector<double> expected(sums, 0.0);
        std::vector<double> per_class(static_cast<size_t>(p.classes), 0.0);
        for (int64_t y : p.labels) per_class[static_cast<size_t>(y)] += 1;
        for (int64_t i = 0; i < p.n; ++i) {
            const auto& v = p.values[static_cast<size_t>(i)];
            const int64_t y = p.labels[static_cast<size_t>(i)];
            for (int64_t row = 0; row < m; ++row) {
                const int power = moments == 2 ? 2 : static_cast<int>(row) + 1;
                const double length = norm(v, power);
                if (!std::isfinite(length) || length == 0) continue;
                for (int64_t j = 0; j < p.dim; ++j) {
                    expected[static_cast<size_t>((row * p.classes + y) * p.dim + j)] +=
                        std::pow(v[static_cast<size_t>(j)], power) * 2 / length /
                        per_class[static_cast<size_t>(y)];
                }
            }
        }
        double worst = 0;
        for (size_t i = 0; i < sums; ++i) {
            worst = std::fmax(worst, std::fabs(expected[i] - static_cast<double>(means.data[i])));
        }
        expect(worst < 1e-6, "class means", o.level);
    }
    p.labels[5] = p.classes;
    expect(o.backward(e, Phases::both) == Status::label_out_of_range, "label", o.level);
}

void estimator(const Operations& o, Estimator::Kind kind, int threads) {
    const size_t size = 2 * 3 * 5001;
    Exact<float> means(size), target(size), estimate(size), first(size), second(size);
    Exact<float> gradient(size), counts(3), steps(3), value(1);
    for (size_t i = 0; i < size; ++i) {
        means.data[i] = std::sin(static_cast<float>(i));
        target.data[i] = std::cos(static_cast<float>(i));
        estimate.data[i] = first.data[i] = second.data[i] = 0;
    }
    for (size_t k = 0; k < 3; ++k) counts.data[k] = static_cast<float>(k), steps.data[k] = 0;
    Estimator e{};
    e.kind = kind;
    e.update = true;
    e.moments = 2;
    e.num_classes = 3;
    e.columns = 5001;
    e.means = means.data;
    e.counts = counts.data;
    e.target = target.data;
    e.estimate = estimate.data;
    e.first_moment = first.data;
    e.second_moment = second.data;
    e.steps = steps.data;
    e.decay = 0.9;
    e.rate = 0.01;
    e.gradient = gradient.data;
    e.value = value.data;
    e.threads = threads;
    Exact<std::byte> space(o.estimator_workspace(e));
    e.workspace = space.data;
    e.workspace_bytes = o.estimator_workspace(e);
    expect(o.estimator(e) == Status::ok, "estimator", o.level);
    expect(gradient.data[0] == 0, "an absent class has no gradient", o.level);
    if (kind == Estimator::Kind::batch) {
        double expected = 0;
        for (size_t i = 0; i < size; ++i) {
            const double d = static_cast<double>(target.data[i]) - means.data[i];
            if (i / 5001 % 3 != 0) expected += d * d;
        }
        expect(std::fabs(*value.data / expected - 1) < 1e-6, "squared MMD", o.level);
    }
}

void bounded_sums(const Operations& o, Type type, int moments, bool per_tap, int threads) {
    Problem p(13, 3, {1, 33, 4100, 0, 70}, type, true);
    const int64_t m = moments == 3 ? 2 : 1, shared_columns = 34;
    std::vector<std::uint8_t> valid(13, 1);
    valid[3] = 0;
    std::vector<int64_t> limits(13, int64_t{1} << 30);
    limits[4] = std::numeric_limits<int64_t>::max();
    limits[7] = std::numeric_limits<int64_t>::min();
    p.labels[9] = -1;
    const auto size = static_cast<size_t>(m * p.classes * (p.dim - shared_columns));
    Exact<int64_t> sums(size), shared(static_cast<size_t>(m * shared_columns));
    std::memset(sums.data, 0, size * sizeof(int64_t));
    std::memset(shared.data, 0, static_cast<size_t>(m * shared_columns) * sizeof(int64_t));
    BoundedSums e{};
    e.taps = p.list.data();
    e.num_taps = static_cast<int64_t>(p.list.size());
    e.type = type;
    e.n = p.n;
    e.labels = p.labels.data();
    e.num_classes = p.classes;
    e.valid = valid.data();
    e.limits = limits.data();
    e.moments = moments;
    e.per_tap = per_tap;
    e.ball = per_tap;
    e.nonnegative = true;
    e.clip = 2;
    e.weight = 0.5;
    e.shared_taps = 2;
    e.sums = sums.data;
    e.shared = shared.data;
    e.threads = threads;
    Exact<std::byte> space(o.bounded_sums_workspace(e));
    e.workspace = space.data;
    e.workspace_bytes = o.bounded_sums_workspace(e);
    expect(o.bounded_sums(e) == Status::ok, "bounded sums", o.level);
    int64_t total = 0;
    for (size_t i = 0; i < size; ++i) total += sums.data[i];
    expect(total > 0, "bounded sums add something", o.level);
}

// A fork finds another thread in the pool sooner or later; the child must not wait for it.
void fork_amid_lending() {
    std::atomic<bool> over{false};
    std::thread busy([&] {
        while (!over) blocks::give_back(blocks::borrow(1 << 14));
    });
    bool good = true;
    for (int i = 0; good && i < 200; ++i) {
        const pid_t child = fork();
        if (!child) {
            alarm(10);
            blocks::give_back(blocks::borrow(1 << 14));
            _exit(0);
        }
        int status = 1;
        good = child > 0 && waitpid(child, &status, 0) == child && !status;
    }
    over = true;
    busy.join();
    expect(good, "a forked child borrows", "blocks");
}

void lent_blocks() {
    const char* what = "blocks";
    constexpr size_t bytes = 1 << 20;
    const blocks::Block first = blocks::borrow(bytes), second = blocks::borrow(bytes);
    if (!first.data) return;  // this system keeps none
    expect(first.data != second.data && first.bytes >= bytes, "each has one owner", what);
    std::memset(first.data, 1, first.bytes);
    std::memset(second.data, 2, second.bytes);
    blocks::give_back(first);
    expect(blocks::borrow(bytes).data == first.data, "a block comes back", what);
    blocks::give_back(first);
    expect(blocks::borrow(bytes / 4).data != first.data, "not for a quarter of it", what);
    blocks::begin_pass();
    blocks::begin_pass();
    expect(blocks::borrow(bytes).data == first.data, "a block sits out two passes", what);
    blocks::give_back(first);
    for (int i = 0; i < 3; ++i) blocks::begin_pass();
    expect(blocks::return_idle() == 0, "and no third", what);

    std::vector<std::thread> borrowers;
    for (int t = 0; t < 4; ++t) {
        borrowers.emplace_back([t] {
            for (size_t i = 0; i < 200; ++i) {
                const blocks::Block block = blocks::borrow((i % 7 + 1) << 14);
                std::memset(block.data, t, block.bytes);
                auto* last = static_cast<char*>(block.data) + block.bytes - 1;
                expect(*last == t, "no two threads have one", "blocks");
                if (i % 5 == 0) blocks::begin_pass();
                blocks::give_back(block);
            }
        });
    }
    for (std::thread& each : borrowers) each.join();
    expect(static_cast<char*>(second.data)[bytes - 1] == 2, "what is held is nobody else's", what);
    fork_amid_lending();
    blocks::keep(false);
    expect(!blocks::borrow(bytes).data, "none while none are kept", what);
    blocks::give_back(second);
    expect(blocks::return_idle() == 0, "nor are they taken back", what);
    blocks::keep(true);
}

}  // namespace

int main() {
    lent_blocks();
    int levels = 0;
    for (const char* level : {"baseline", "avx2", "avx512"}) {
        if (!choose(level)) continue;
        ++levels;
        const Operations& o = operations();
        for (int threads : {1, 3}) {
            for (int moments : {1, 2, 3}) {
                for (bool per_tap : {false, true}) {
                    for (Type type : {Type::f32, Type::bf16}) {
                        mean_embedding(o, type, moments, per_tap, threads);
                    }
                    for (Type type : {Type::f32, Type::bf16, Type::f64}) {
                        bounded_sums(o, type, moments, per_tap, threads);
                    }
                }
            }
            using Kind = Estimator::Kind;
            for (Kind kind : {Kind::batch, Kind::ema, Kind::adam}) {
                estimator(o, kind, threads);
            }
        }
    }
    std::printf("%d levels, %d failures\n", levels, failures);
    return failures != 0;
}
