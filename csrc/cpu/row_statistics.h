// Row statistics: sum f^2 and sum f^4 of one chunk of one row. Bytes: the chunk, once.
#pragma once

#include "simd.h"

namespace dpmmd::DPMMD_LEVEL {

template <int moments, class T>
static inline void row_statistics(const T* f, std::int64_t count, double* sums) {
    constexpr int ways = 4;  // independent sums: an addition takes several cycles
    Floats square[ways] = {}, fourth[ways] = {};
    const auto add = [&](int way, Floats v) {
        v *= v;
        if (moments & 1) square[way] += v;
        if (moments & 2) fourth[way] += v * v;
    };
    std::int64_t i = 0;
    for (; i + ways * lanes <= count; i += ways * lanes) {
        for (int way = 0; way < ways; ++way) add(way, load(f + i + way * lanes));
    }
    for (; i + lanes <= count; i += lanes) add(0, load(f + i));
    if (i < count) add(0, load_part(f + i, count - i));
    sums[0] = moments & 1 ? sum((square[0] + square[1]) + (square[2] + square[3])) : 0;
    sums[1] = moments & 2 ? sum((fourth[0] + fourth[1]) + (fourth[2] + fourth[3])) : 0;
}

}  // namespace dpmmd::DPMMD_LEVEL
