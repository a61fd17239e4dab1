// What the CUDA kernels share: the tap table, 16-byte accesses, warp sums and launches.
//
// Everywhere a warp takes whole rows (images) and a block of threads a block of columns, so that a
// row's reduction is two-stage and in a fixed order: partial sums by block of columns, added up by
// the kernel that finishes. No atomics, no allocation, no waiting for the device.
#pragma once

#ifdef DPMMD_EMULATED
#include "../tests/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

#include "../dpmmd.h"

namespace dpmmd::cuda {

using Index = std::int64_t;

constexpr int lanes = 32;
// Taps a launch. The table travels by value: a kernel's parameters are limited to 4 KiB.
#ifdef DPMMD_EMULATED  // small, so that small shapes have several of each
constexpr int warps = 2;
constexpr int most_taps = 3;
#else
constexpr int warps = 8;
constexpr int most_taps = 56;
#endif
constexpr int threads = warps * lanes;
constexpr Index most_blocks = 65535;  // CUDA's limit on a grid's second dimension

struct bf16 {
    std::uint16_t bits;
};

// Numbers an access of 16 bytes.
template <class T>
constexpr int width = 16 / static_cast<int>(sizeof(T));

// A tap of a launch.
struct Part {
    const void* data;
    void* gradient;
    Index stride, gradient_stride, columns;
    Index column;     // its first in D
    int first_block;  // its first block of columns, of those of all taps with a place
    int number;       // among all taps
    int bits;         // of a group of its columns; see bounded_sums.cu
    int aligned;      // whether every access to its rows is of 16 bytes at a multiple of 16
};

struct Table {
    Part parts[most_taps];
    int count, first_block, blocks;  // blocks: of this launch
};

// ---- host ----

inline int blocks_of(Index columns, int block) {
    return static_cast<int>((columns + block - 1) / block);
}

inline Index count_blocks(const Tap* taps, Index num_taps, int block) {
    Index blocks = 0;
    for (Index i = 0; i < num_taps; ++i) blocks += blocks_of(taps[i].columns, block);
    return blocks;
}

inline Index total_columns(const Tap* taps, Index num_taps) {
    Index columns = 0;
    for (Index i = 0; i < num_taps; ++i) columns += taps[i].columns;
    return columns;
}

// Which taps have a place in the tables.
enum class Which { all, with_columns, with_gradient };

// Calls run(table), which returns an error or 0, for tables that together hold the taps asked for.
// `rows` is what the kernel reads besides, [.., D]: its address and D decide on alignment too.
template <class Run>
int for_each_table(
    const Tap* taps, Index num_taps, int itemsize, int block, const void* rows, Which which,
    const Run& run
) {
    const Index whole = 16 / itemsize, dim = total_columns(taps, num_taps);
    const auto address = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
    Table table{};
    Index column = 0;
    int first_block = 0, error = 0;
    for (Index i = 0; i < num_taps; ++i) {
        const Tap& tap = taps[i];
        const int blocks = blocks_of(tap.columns, block);
        if (which == Which::all || (tap.columns && (which == Which::with_columns || tap.gradient))) {
            if (table.count == most_taps) {
                if ((error = run(table))) return error;
                table.count = table.blocks = 0;
            }
            if (table.count == 0) table.first_block = first_block;
            const bool aligned =
                ((address(tap.data) | address(tap.gradient) | address(rows)) & 15) == 0 &&
                (tap.columns | tap.stride | tap.gradient_stride | column | dim) % whole == 0;
            table.parts[table.count++] = {
                tap.data, tap.gradient, tap.stride, tap.gradient_stride, tap.columns, column,
                first_block, static_cast<int>(i), 0, aligned};
            table.blocks += blocks;
            first_block += blocks;
        }
        column += tap.columns;
    }
    return table.count ? run(table) : 0;
}

inline unsigned grid_of(Index count, Index each = 1) {
    const Index blocks = (count + each - 1) / each;
    return static_cast<unsigned>(blocks < most_blocks ? blocks : most_blocks);
}

// kernel(parameters) on a stream; a CUDA error as a negative number, or 0.
template <class Parameters>
int launch(
    void (*kernel)(Parameters), dim3 grid, int block, Stream stream, const Parameters& parameters
) {
    static_assert(sizeof(Parameters) <= 4096, "CUDA's limit on a kernel's parameters");
    if (grid.x == 0 || grid.y == 0) return 0;
#ifdef DPMMD_EMULATED
    (void)stream;
    return -emulation::launch(grid, block, [&] { kernel(parameters); });
#else
    void* arguments[] = {const_cast<Parameters*>(&parameters)};
    return -static_cast<int>(cudaLaunchKernel(
        reinterpret_cast<const void*>(kernel), grid, dim3(static_cast<unsigned>(block)), arguments,
        0, static_cast<cudaStream_t>(stream)
    ));
#endif
}

// Loads a kernel's code for the current device: a CUDA error as a negative number, or 0.
template <class Parameters>
int load_kernel(void (*kernel)(Parameters)) {
#ifdef DPMMD_EMULATED
    return kernel ? 0 : -1;
#else
    cudaFuncAttributes attributes;
    return -static_cast<int>(
        cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel))
    );
#endif
}

// Cuts a workspace into arrays, each on a multiple of 256 bytes; with base null it only counts.
class Arrays {
public:
    explicit Arrays(std::byte* base) : base_(base) {}
    template <class T>
    T* take(Index count) {
        std::byte* const at = base_ ? base_ + used_ : nullptr;
        used_ += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
        return reinterpret_cast<T*>(at);
    }
    std::size_t used() const { return used_; }

private:
    std::byte* base_;
    std::size_t used_ = 0;
};

// ---- device ----

__device__ inline int lane_of() { return static_cast<int>(threadIdx.x) % lanes; }
__device__ inline int warp_of() { return static_cast<int>(threadIdx.x) / lanes; }
// Of all warps of a grid of one dimension.
__device__ inline Index warp_of_grid() {
    return static_cast<Index>(blockIdx.x) * warps + warp_of();
}

// The tap whose block of columns blockIdx.x is.
__device__ inline const Part& find_part(const Table& table) {
    const int block = static_cast<int>(blockIdx.x) + table.first_block;
    int low = 0, high = table.count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (table.parts[middle].first_block <= block) {
            low = middle;
        } else {
            high = middle - 1;
        }
    }
    return table.parts[low];
}

__device__ inline int block_of(const Table& table) {
    return static_cast<int>(blockIdx.x) + table.first_block;
}

// 16 bytes of features as they lie in memory: the numbers from `column` on, 0 past the last one.
template <bool aligned>
__device__ inline uint4 load(const float* row, Index column, Index columns) {
    uint4 raw = {0, 0, 0, 0};
    if constexpr (aligned) {
        if (column < columns) raw = *reinterpret_cast<const uint4*>(row + column);
    } else {
        const float* const p = row + column;
        const Index rest = columns - column;
        if (rest > 0) raw.x = __float_as_uint(p[0]);
        if (rest > 1) raw.y = __float_as_uint(p[1]);
        if (rest > 2) raw.z = __float_as_uint(p[2]);
        if (rest > 3) raw.w = __float_as_uint(p[3]);
    }
    return raw;
}

__device__ inline unsigned load_pair(const bf16* p, Index rest) {
    unsigned pair = 0;
    if (rest > 0) pair = p[0].bits;
    if (rest > 1) pair |= static_cast<unsigned>(p[1].bits) << 16;
    return pair;
}

template <bool aligned>
__device__ inline uint4 load(const bf16* row, Index column, Index columns) {
    uint4 raw = {0, 0, 0, 0};
    if constexpr (aligned) {
        if (column < columns) raw = *reinterpret_cast<const uint4*>(row + column);
    } else {
        const bf16* const p = row + column;
        const Index rest = columns - column;
        raw.x = load_pair(p, rest);
        raw.y = load_pair(p + 2, rest - 2);
        raw.z = load_pair(p + 4, rest - 4);
        raw.w = load_pair(p + 6, rest - 6);
    }
    return raw;
}

__device__ inline void unpack(uint4 raw, float (&f)[4]) {
    f[0] = __uint_as_float(raw.x);
    f[1] = __uint_as_float(raw.y);
    f[2] = __uint_as_float(raw.z);
    f[3] = __uint_as_float(raw.w);
}

__device__ inline void unpack(uint4 raw, float (&f)[8]) {
    const unsigned pairs[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        f[2 * i] = __uint_as_float(pairs[i] << 16);
        f[2 * i + 1] = __uint_as_float(pairs[i] & 0xffff0000U);
    }
}

// Count (4 or 8) float32 numbers from `column` on, 0 past the last one.
template <bool aligned, int count>
__device__ inline void load_floats(const float* row, Index column, Index columns, float (&f)[count]) {
#pragma unroll
    for (int i = 0; i < count; i += 4) {
        const uint4 raw = load<aligned>(row, column + i, columns);
        f[i] = __uint_as_float(raw.x);
        f[i + 1] = __uint_as_float(raw.y);
        f[i + 2] = __uint_as_float(raw.z);
        f[i + 3] = __uint_as_float(raw.w);
    }
}

// Two bf16, rounded to nearest even, the first in the low half.
__device__ inline unsigned pack_pair(float low, float high) {
#ifdef __CUDA_ARCH__
    unsigned pair;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
#else
    const auto rounded = [](float f) -> unsigned {
        if (f != f) return 0x7fff;
        const unsigned bits = __float_as_uint(f);
        return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    };
    return rounded(low) | rounded(high) << 16;
#endif
}

template <bool aligned>
__device__ inline void store(float* row, Index column, Index columns, const float (&f)[4]) {
    if constexpr (aligned) {
        if (column < columns) {
            *reinterpret_cast<uint4*>(row + column) = {
                __float_as_uint(f[0]), __float_as_uint(f[1]), __float_as_uint(f[2]),
                __float_as_uint(f[3])};
        }
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            if (column + i < columns) row[column + i] = f[i];
        }
    }
}

template <bool aligned>
__device__ inline void store(bf16* row, Index column, Index columns, const float (&f)[8]) {
    const unsigned pairs[4] = {
        pack_pair(f[0], f[1]), pack_pair(f[2], f[3]), pack_pair(f[4], f[5]), pack_pair(f[6], f[7])};
    if constexpr (aligned) {
        if (column < columns) {
            *reinterpret_cast<uint4*>(row + column) = {pairs[0], pairs[1], pairs[2], pairs[3]};
        }
    } else {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (column + i < columns) {
                row[column + i].bits = static_cast<std::uint16_t>(pairs[i / 2] >> (i % 2 * 16));
            }
        }
    }
}

// The sum over a warp, in every lane, in a fixed order.
template <class V>
__device__ inline V warp_sum(V value) {
#pragma unroll
    for (int offset = lanes / 2; offset; offset /= 2) {
        value += __shfl_xor_sync(0xffffffffU, value, offset);
    }
    return value;
}

__device__ inline unsigned warp_largest(unsigned value) {
#pragma unroll
    for (int offset = lanes / 2; offset; offset /= 2) {
        const unsigned other = __shfl_xor_sync(0xffffffffU, value, offset);
        value = other > value ? other : value;
    }
    return value;
}

// values[first..end) added up in Sum, by a warp and in a fixed order.
template <class Sum, class V>
__device__ inline Sum sum_of(const V* values, Index first, Index end) {
    Sum sum = 0;
    for (Index i = first + lane_of(); i < end; i += lanes) sum += static_cast<Sum>(values[i]);
    return warp_sum(sum);
}

}  // namespace dpmmd::cuda
