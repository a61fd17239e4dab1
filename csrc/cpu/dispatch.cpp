// The operations for the processor at hand.
#include <cstring>

#include "../dpmmd.h"

#define DPMMD_DECLARE(name)                                         \
    namespace dpmmd::name {                                         \
    std::size_t forward_workspace(const MeanEmbedding&);            \
    Status forward(const MeanEmbedding&, Phases);                   \
    std::size_t backward_workspace(const MeanEmbedding&);           \
    Status backward(const MeanEmbedding&, Phases);                  \
    std::size_t estimator_workspace(const Estimator&);              \
    Status estimator(const Estimator&);                             \
    std::size_t bounded_sums_workspace(const BoundedSums&);         \
    Status bounded_sums(const BoundedSums&);                        \
    constexpr Operations operations{                                \
        #name,          forward_workspace,    forward,    backward_workspace,     backward, \
        estimator_workspace, estimator, bounded_sums_workspace, bounded_sums};              \
    }

DPMMD_DECLARE(baseline)
#if defined(__x86_64__)
DPMMD_DECLARE(avx2)
DPMMD_DECLARE(avx512)
#endif

namespace dpmmd {
namespace {

struct Level {
    const Operations* operations;
    bool runs;
};

const Operations* find(const char* level) {  // null: the best
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                            __builtin_cpu_supports("avx512dq") &&
                            __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512vl");
    const Level levels[] = {
        {&avx512::operations, has_avx512},
        {&avx2::operations, has_avx2},
        {&baseline::operations, true},
    };
#else
    const Level levels[] = {{&baseline::operations, true}};
#endif
    for (const Level& candidate : levels) {
        if (candidate.runs && (!level || !std::strcmp(level, candidate.operations->level))) {
            return candidate.operations;
        }
    }
    return nullptr;
}

const Operations* chosen = find(nullptr);

}  // namespace

const Operations& operations() { return *chosen; }

bool choose(const char* level) {
    const Operations* found = find(level);
    if (found) chosen = found;
    return found != nullptr;
}

}  // namespace dpmmd
