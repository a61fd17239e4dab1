// Gradient: df = a g - c f + f (b h - d f^2) of one chunk of one row; where f is a ReLU's output,
// that of the ReLU's input: (df + in) [0 < f < ceiling], for `in` what reaches f from elsewhere.
// Bytes: the chunk (and `in`) in and the gradient out, once each, and the chunks of g and h.
#pragma once

#include "simd.h"

namespace dpmmd::DPMMD_LEVEL {

template <int moments, bool streamed, bool rectified, class T>
static inline void gradient(
    const T* f, const float* g, const float* h, float a, float b, float c, float d, const T* in,
    float ceiling, T* out, std::int64_t count
) {
    const Floats va = broadcast(a), vb = broadcast(b), vc = broadcast(c), vd = broadcast(d);
    const Floats zero = {}, top = broadcast(ceiling);
    const auto of = [&](Floats v, Floats vg, Floats vh, Floats vin) {
        Floats df = {};
        if (moments & 1) df = va * vg - vc * v;
        if (moments & 2) df += v * (vb * vh - vd * (v * v));
        if (!rectified) return df;
        return (Floats)((Words)(df + vin) & (Words)(v > zero) & (Words)(v < top));
    };
    const auto part = [&](std::int64_t i, std::int64_t rest) {
        const Floats vg = moments & 1 ? load_part(g + i, rest) : Floats{};
        const Floats vh = moments & 2 ? load_part(h + i, rest) : Floats{};
        const Floats vin = rectified && in ? load_part(in + i, rest) : Floats{};
        store_part(out + i, of(load_part(f + i, rest), vg, vh, vin), rest);
    };
    std::int64_t i = 0;
    if (streamed) {  // up to where whole vectors lie aligned
        constexpr std::uintptr_t size = lanes * sizeof(T);
        const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(out) % size;
        i = smaller(count, past ? static_cast<std::int64_t>((size - past) / sizeof(T)) : 0);
        if (i) part(0, i);
    }
    for (; i + lanes <= count; i += lanes) {
        const Floats vg = moments & 1 ? load(g + i) : Floats{};
        const Floats vh = moments & 2 ? load(h + i) : Floats{};
        const Floats vin = rectified && in ? load(in + i) : Floats{};
        const Floats df = of(load(f + i), vg, vh, vin);
        if (streamed) {
            stream(out + i, df);
        } else {
            store(out + i, df);
        }
    }
    if (i < count) part(i, count - i);
}

}  // namespace dpmmd::DPMMD_LEVEL
