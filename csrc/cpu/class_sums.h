// Class sums: adds a f and b f^2 of several rows of one class to that class's sums, column by
// column and row after row, so that a sum is read and written once for all of them.
// Bytes: the rows' chunks once, the sums' chunk once in and once out.
#pragma once

#include "simd.h"

namespace dpmmd::DPMMD_LEVEL {

constexpr int rows_at_once = 8;

template <int moments, int rows, class T>
static inline void class_sums_of(
    const T* const* f, const float* a, const float* b, bool fresh, float* first, float* second,
    std::int64_t count
) {
    const T* row[rows + 1];
    Floats scale_a[rows + 1], scale_b[rows + 1];
    for (int r = 0; r < rows; ++r) {
        row[r] = f[r];
        if (moments & 1) scale_a[r] = broadcast(a[r]);
        if (moments & 2) scale_b[r] = broadcast(b[r]);
    }
    const auto add = [&](std::int64_t i, Floats& sum1, Floats& sum2, auto load_row) {
        for (int r = 0; r < rows; ++r) {
            const Floats v = load_row(row[r] + i);
            if (moments & 1) sum1 += scale_a[r] * v;
            if (moments & 2) sum2 += scale_b[r] * (v * v);
        }
    };
    std::int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
        Floats sum1 = {}, sum2 = {};
        if ((moments & 1) && !fresh) sum1 = load(first + i);
        if ((moments & 2) && !fresh) sum2 = load(second + i);
        add(i, sum1, sum2, [](const T* p) { return load(p); });
        if (moments & 1) store(first + i, sum1);
        if (moments & 2) store(second + i, sum2);
    }
    if (i < count) {
        const std::int64_t rest = count - i;
        Floats sum1 = {}, sum2 = {};
        if ((moments & 1) && !fresh) sum1 = load_part(first + i, rest);
        if ((moments & 2) && !fresh) sum2 = load_part(second + i, rest);
        add(i, sum1, sum2, [rest](const T* p) { return load_part(p, rest); });
        if (moments & 1) store_part(first + i, sum1, rest);
        if (moments & 2) store_part(second + i, sum2, rest);
    }
}

// Rows f[0..rows-1], at most rows_at_once of them. `fresh`: the sums begin here, at zero.
template <int moments, class T>
static inline void class_sums(
    int rows, const T* const* f, const float* a, const float* b, bool fresh, float* first,
    float* second, std::int64_t count
) {
    switch (rows) {
#define DPMMD_CASE(n)                                                       \
    case n:                                                                 \
        class_sums_of<moments, n>(f, a, b, fresh, first, second, count); \
        break;
        DPMMD_CASE(0)
        DPMMD_CASE(1)
        DPMMD_CASE(2)
        DPMMD_CASE(3)
        DPMMD_CASE(4)
        DPMMD_CASE(5)
        DPMMD_CASE(6)
        DPMMD_CASE(7)
        DPMMD_CASE(8)
#undef DPMMD_CASE
    }
}

}  // namespace dpmmd::DPMMD_LEVEL
