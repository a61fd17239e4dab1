// Blocks are mappings of their own on Linux. Elsewhere there are none: allocators there keep more.
#include "blocks.h"

#if defined(__linux__)
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <mutex>
#include <vector>

namespace dpmmd::blocks {
namespace {

constexpr std::uint64_t passes_kept = 2;  // that a block may sit out before it is returned

struct Idle {
    Block block;
    std::uint64_t since;  // the pass in which it was given back
};

struct Pool {
    std::mutex mutex;
    std::vector<Idle> idle;
    std::uint64_t pass = 0;
    bool kept = true;
};

// Never destroyed: tensors give their blocks back even after static objects are gone. A fork waits
// for the mutex, so that the child, which has this thread alone, does not find it taken.
Pool& pool = *new Pool;
[[maybe_unused]] const int registered = pthread_atfork(
    [] { pool.mutex.lock(); }, [] { pool.mutex.unlock(); }, [] { pool.mutex.unlock(); }
);

void unmap(Block block) noexcept { munmap(block.data, block.bytes); }

Block map(std::size_t bytes) noexcept {
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    if (bytes > SIZE_MAX - page) return {};
    bytes = (bytes + page - 1) / page * page;
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data == MAP_FAILED ? Block{} : Block{data, bytes};
}

// Unmaps the idle blocks that `wanted` is true of; the mutex is held.
template <class Predicate>
std::size_t drop(std::vector<Idle>& idle, const Predicate& wanted) noexcept {
    std::size_t bytes = 0, left = 0;
    for (const Idle& each : idle) {
        if (wanted(each)) {
            bytes += each.block.bytes;
            unmap(each.block);
        } else {
            idle[left++] = each;
        }
    }
    idle.resize(left);
    return bytes;
}

}  // namespace

Block borrow(std::size_t bytes) {
    {
        const std::lock_guard<std::mutex> lock(pool.mutex);
        if (!pool.kept) return {};
        Idle* best = nullptr;  // the smallest that is large enough, and not twice as large
        for (Idle& each : pool.idle) {
            const std::size_t size = each.block.bytes;
            if (size >= bytes && size / 2 < bytes && (!best || size < best->block.bytes)) {
                best = &each;
            }
        }
        if (best) {
            const Block found = best->block;
            *best = pool.idle.back();
            pool.idle.pop_back();
            return found;
        }
    }
    const Block fresh = map(bytes);
    if (fresh.data || !return_idle()) return fresh;
    return map(bytes);
}

void give_back(Block block) noexcept {
    try {
        const std::lock_guard<std::mutex> lock(pool.mutex);
        if (pool.kept) {
            pool.idle.push_back({block, pool.pass});
            return;
        }
    } catch (...) {  // no memory for the list
    }
    unmap(block);
}

void begin_pass() noexcept {
    const std::lock_guard<std::mutex> lock(pool.mutex);
    ++pool.pass;
    drop(pool.idle, [&](const Idle& each) { return pool.pass - each.since > passes_kept; });
}

std::size_t return_idle() noexcept {
    const std::lock_guard<std::mutex> lock(pool.mutex);
    return drop(pool.idle, [](const Idle&) { return true; });
}

void keep(bool kept) noexcept {
    {
        const std::lock_guard<std::mutex> lock(pool.mutex);
        pool.kept = kept;
    }
    if (!kept) return_idle();
}

}  // namespace dpmmd::blocks

#else

namespace dpmmd::blocks {

Block borrow(std::size_t) { return {}; }
void give_back(Block) noexcept {}
void begin_pass() noexcept {}
std::size_t return_idle() noexcept { return 0; }
void keep(bool) noexcept {}

}  // namespace dpmmd::blocks

#endif
