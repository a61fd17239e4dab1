// Vectors of the width that this file is compiled for, and what is laid out in units of them.
//
// Every file of an operation is compiled once a level (DPMMD_LEVEL: baseline, avx2, avx512), into a
// namespace of that name. Such files must not use the standard library's inline functions: the
// linker keeps one copy of each, perhaps the one with instructions this processor lacks.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../dpmmd.h"

namespace dpmmd::DPMMD_LEVEL {

#if defined(__AVX512F__)
constexpr int lanes = 16;
#elif defined(__AVX2__)
constexpr int lanes = 8;
#else
constexpr int lanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * lanes)));
typedef std::uint32_t Words __attribute__((vector_size(4 * lanes)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * lanes)));
struct bf16 {
    std::uint16_t bits;
};

// Sums over columns are taken chunk by chunk, the chunks' sums added in double precision.
constexpr std::int64_t chunk_columns = 4096;

static inline Floats broadcast(float x) { return x - Floats{}; }

static inline Floats load(const float* p) {
    Floats v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
}

static inline Floats load(const bf16* p) {
    Halves h;
    __builtin_memcpy(&h, p, sizeof h);
    return (Floats)(__builtin_convertvector(h, Words) << 16);
}

static inline void store(float* p, Floats v) { __builtin_memcpy(p, &v, sizeof v); }

static inline Halves rounded(Floats v) {  // to nearest, ties to even
    const Words bits = (Words)v;
    const Words near = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const Words quiet = (Words)(v != v);  // all ones for NaN
    return __builtin_convertvector((near & ~quiet) | (quiet & 0x7fc0), Halves);
}

static inline void store(bf16* p, Floats v) {
    const Halves h = rounded(v);
    __builtin_memcpy(p, &h, sizeof h);
}

// Past the caches, for what is not read again soon; p must be aligned to the vector it stores.
static inline void stream(float* p, Floats v) {
#if defined(__AVX512F__)
    _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
    _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
    _mm_stream_ps(p, (__m128)v);
#else
    store(p, v);
#endif
}

static inline void stream(bf16* p, Floats v) {
#if defined(__AVX512F__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)rounded(v));
#elif defined(__AVX2__)
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), (__m128i)rounded(v));
#else
    store(p, v);
#endif
}

static inline void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

// The last columns of a row, fewer than a vector; absent lanes are zero. All columns go through the
// same vector arithmetic, so a result does not depend on where in memory a row begins.
template <class T>
static inline Floats load_part(const T* p, std::int64_t count) {
    T buffer[lanes] = {};
    __builtin_memcpy(buffer, p, static_cast<std::size_t>(count) * sizeof(T));
    return load(buffer);
}

template <class T>
static inline void store_part(T* p, Floats v, std::int64_t count) {
    T buffer[lanes];
    store(buffer, v);
    __builtin_memcpy(p, buffer, static_cast<std::size_t>(count) * sizeof(T));
}

static inline double sum(Floats v) {
    double total = 0;
    for (int lane = 0; lane < lanes; ++lane) total += v[lane];
    return total;
}

static inline std::int64_t smaller(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
static inline std::int64_t larger(std::int64_t a, std::int64_t b) { return a > b ? a : b; }

}  // namespace dpmmd::DPMMD_LEVEL
