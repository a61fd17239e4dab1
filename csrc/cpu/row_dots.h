// Row dots: <f, g> and <f^2, h> of one chunk of one row. Bytes: the chunk and those of g and h.
#pragma once

#include "simd.h"

namespace dpmmd::DPMMD_LEVEL {

template <int moments, class T>
static inline void row_dots(
    const T* f, const float* g, const float* h, std::int64_t count, double* sums
) {
    constexpr int ways = 4;
    Floats dot1[ways] = {}, dot2[ways] = {};
    const auto add = [&](int way, Floats v, auto load_gradient) {
        if (moments & 1) dot1[way] += v * load_gradient(g);
        if (moments & 2) dot2[way] += (v * v) * load_gradient(h);
    };
    std::int64_t i = 0;
    for (; i + ways * lanes <= count; i += ways * lanes) {
        for (int way = 0; way < ways; ++way) {
            const std::int64_t j = i + way * lanes;
            add(way, load(f + j), [j](const float* p) { return load(p + j); });
        }
    }
    for (; i + lanes <= count; i += lanes) {
        add(0, load(f + i), [i](const float* p) { return load(p + i); });
    }
    if (i < count) {
        const std::int64_t rest = count - i;
        const auto part = [i, rest](const float* p) { return load_part(p + i, rest); };
        add(0, load_part(f + i, rest), part);
    }
    sums[0] = moments & 1 ? sum((dot1[0] + dot1[1]) + (dot1[2] + dot1[3])) : 0;
    sums[1] = moments & 2 ? sum((dot2[0] + dot2[1]) + (dot2[2] + dot2[3])) : 0;
}

}  // namespace dpmmd::DPMMD_LEVEL
