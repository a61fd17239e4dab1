// Cuts a caller's buffer into arrays; without a buffer it only measures.
#pragma once

#include "simd.h"

namespace dpmmd::DPMMD_LEVEL {

class Workspace {
public:
    explicit Workspace(std::byte* base) : base_(base) {}

    template <class T>
    T* take(std::int64_t count) {
        const std::size_t start = used_;
        used_ += (static_cast<std::size_t>(count) * sizeof(T) + 63) / 64 * 64;  // cache lines
        return base_ ? reinterpret_cast<T*>(base_ + start) : nullptr;
    }

    std::size_t used() const { return used_; }

private:
    std::byte* base_;
    std::size_t used_ = 0;
};

// A chunk of the columns of one tap: `columns` of them from `begin`, `column` in the concatenation.
struct Chunk {
    std::int64_t tap, begin, columns, column;
};

static inline std::int64_t count_chunks(const Tap* taps, std::int64_t num_taps) {
    std::int64_t count = 0;
    for (std::int64_t l = 0; l < num_taps; ++l) {
        count += (taps[l].columns + chunk_columns - 1) / chunk_columns;
    }
    return count;
}

static inline void cut_chunks(const Tap* taps, std::int64_t num_taps, Chunk* chunks) {
    std::int64_t column = 0;
    for (std::int64_t l = 0; l < num_taps; ++l) {
        for (std::int64_t begin = 0; begin < taps[l].columns; begin += chunk_columns) {
            *chunks++ = {l, begin, smaller(chunk_columns, taps[l].columns - begin), column + begin};
        }
        column += taps[l].columns;
    }
}

static inline std::int64_t total_columns(const Tap* taps, std::int64_t num_taps) {
    std::int64_t total = 0;
    for (std::int64_t l = 0; l < num_taps; ++l) total += taps[l].columns;
    return total;
}

// The first chunk of a thread, so that threads have about the same number of columns.
static inline std::int64_t first_chunk(
    const Chunk* chunks, std::int64_t num_chunks, std::int64_t columns, int thread, int threads
) {
    if (thread == threads) return num_chunks;
    const std::int64_t column = columns / threads * thread + columns % threads * thread / threads;
    std::int64_t low = 0, high = num_chunks;
    while (low < high) {
        const std::int64_t middle = (low + high) / 2;
        if (chunks[middle].column < column) {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    return low;
}

// Images sorted by class, in their own order within a class: order [n], starts [num_classes + 1].
// False, with both unfinished, if a label is out of range.
static inline bool sort_by_class(
    const std::int64_t* labels, std::int64_t n, std::int64_t num_classes, std::int64_t* order,
    std::int64_t* starts
) {
    for (std::int64_t k = 0; k <= num_classes; ++k) starts[k] = 0;
    for (std::int64_t i = 0; i < n; ++i) {
        const std::int64_t y = labels ? labels[i] : 0;
        if (y < 0 || y >= num_classes) return false;
        ++starts[y + 1];
    }
    for (std::int64_t k = 0; k < num_classes; ++k) starts[k + 1] += starts[k];
    for (std::int64_t i = 0; i < n; ++i) order[starts[labels ? labels[i] : 0]++] = i;
    for (std::int64_t k = num_classes; k > 0; --k) starts[k] = starts[k - 1];
    starts[0] = 0;
    return true;
}

}  // namespace dpmmd::DPMMD_LEVEL
