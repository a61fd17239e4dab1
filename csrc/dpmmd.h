// The native core: arithmetic on raw pointers, free of any framework.
//
// Callers own every buffer, workspaces included; nothing here allocates, throws or logs. Sizes and
// strides count elements, not bytes. Results do not depend on the number of threads: row
// reductions are summed by fixed chunks of columns, class sums image by image in a fixed order.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dpmmd {

enum class Type : int { f32, bf16, f64 };

enum class Status : int { ok, label_out_of_range, workspace_too_small };

// One tap: the features of n images, each `columns` numbers in one piece, `stride` apart.
struct Tap {
    const void* data;
    std::int64_t stride;
    std::int64_t columns;
    void* gradient;  // where backward writes, laid out likewise; null where none is asked for
    std::int64_t gradient_stride;
};

// What half of an operation to do; `both` does the two in one pass over the features.
enum class Phases : int { first = 1, second = 2, both = 3 };

// Class means of the bounded moments of the features, and their gradient.
//
// With v_1 = f, v_2 = weight f^2 and y the class of an image:
//   first half of forward:   row statistics |v_m|^2, from them scale s and projection p = 1 / |v|
//   second half of forward:  class means[m, k] = sum over y = k of s v_m, divided by the class's n
//   first half of backward:  row dots <v_m, G_m[y]> / n, from them coefficients
//                            e = s p^2 <v_m, G_m[y]> / n   (p = 0 where a ball's bound is inactive)
//   second half of backward: df = s G_1 / n - e_1 f + 2 weight f (s G_2 / n - weight e_2 f^2)
//
// `blocks` below is num_taps where bounds are per tap, else 1; `norms` is the number of norms that
// are bounded on their own: 1 for one moment or a joint bound, else 2.
struct MeanEmbedding {
    const Tap* taps;
    std::int64_t num_taps;
    Type type;  // f32 or bf16
    std::int64_t n;
    const std::int64_t* labels;  // [n] in 0..num_classes-1, or null: all 0
    std::int64_t num_classes;
    int moments;  // bit 0: the features, bit 1: their squares
    bool ball, per_tap, joint;
    double clip;    // of the whole vector
    double weight;  // of the second moment where the bound is joint, else 1
    float* scale;         // s [norms, n, blocks]; 0 where the vector is 0 or not finite
    float* projection;    // p [norms, n, blocks]
    float* means;         // [moments, num_classes, D]; forward writes it
    float* counts;        // [num_classes]; forward writes it
    const float* upstream;  // G [moments, num_classes, D]; backward reads it
    float* coefficients;  // e [norms, n, blocks]; backward writes and reads it
    // Above 0 (on the CPU): the only tap is the output of a ReLU up to this ceiling, and backward
    // writes the gradient of the ReLU's input, (df + incoming) [0 < f < ceiling].
    float ceiling;
    const void* incoming;  // laid out like the tap, `incoming_stride` apart; null for zeros
    std::int64_t incoming_stride;
    std::byte* workspace;
    std::size_t workspace_bytes;
    int threads;
};

// The estimate of the difference target - means, its step, the loss it stands for and the gradient.
struct Estimator {
    enum class Kind : int { batch, ema, adam };

    Kind kind;
    bool update;  // move the state (training), else only read it; batch has none
    std::int64_t moments, num_classes, columns;
    const float* means;   // [moments, num_classes, columns]
    const float* counts;  // [num_classes]; classes with 0 keep their state and add nothing
    const float* target;
    float* estimate;       // v, state of ema and adam
    float* first_moment;   // state of adam
    float* second_moment;  // state of adam
    float* steps;          // [num_classes], state of ema and adam
    double decay, rate;    // of ema; of adam
    double numbers;        // of adam: over how many numbers the loss that trains v is a mean
    float* gradient;       // with respect to means; written
    float* value;          // one number; written
    std::byte* workspace;
    std::size_t workspace_bytes;
    int threads;
};

// Exact class sums of bounded integer vectors: the native twin of dpmmd/privacy/sums.py.
struct BoundedSums {
    const Tap* taps;
    std::int64_t num_taps;
    Type type;
    std::int64_t n;
    const std::int64_t* labels;  // [n]
    std::int64_t num_classes;
    const std::uint8_t* valid;   // [n], 0 or 1
    const std::int64_t* limits;  // [n], greatest norm of each image's vector
    int moments;                 // as above; both bits: the joint vector (f, weight f^2)
    bool ball, per_tap, nonnegative;
    double clip, weight;
    std::int64_t shared_taps;  // so many leading taps are summed over all classes
    std::int64_t* sums;        // [num_classes, moments * columns of the other taps]; added to
    std::int64_t* shared;      // [moments * columns of the shared taps]; added to; null if none
    std::byte* workspace;
    std::size_t workspace_bytes;
    int threads;
};

// The operations as compiled for one kind of processor.
struct Operations {
    const char* level;
    std::size_t (*forward_workspace)(const MeanEmbedding&);
    Status (*forward)(const MeanEmbedding&, Phases);
    std::size_t (*backward_workspace)(const MeanEmbedding&);
    Status (*backward)(const MeanEmbedding&, Phases);
    std::size_t (*estimator_workspace)(const Estimator&);
    Status (*estimator)(const Estimator&);
    std::size_t (*bounded_sums_workspace)(const BoundedSums&);
    Status (*bounded_sums)(const BoundedSums&);
};

// The operations for this processor, or for the level last chosen with `choose`.
const Operations& operations();

// Chooses "baseline", "avx2" or "avx512" for all later calls; false if this build or processor
// lacks it. The environment variable DPMMD_CPU does so at start.
bool choose(const char* level);

// The same operations on an NVIDIA GPU, on pointers of the current device and on a stream
// (cudaStream_t). They only launch kernels: nothing waits, so calls may be captured in a graph. Each
// returns a Status, or a CUDA error as a negative number. `threads` has no meaning here.
//
// Class labels are sorted on the device, into `schedule`, int32 [n + num_classes + 1], which forward
// writes and backward reads (null without labels); a label out of range stops the device with an
// assertion, but adds nothing in bounded_sums, which takes f32 and bf16. Status::label_out_of_range
// is never returned.
namespace cuda {

using Stream = void*;

std::size_t forward_workspace(const MeanEmbedding&);
int forward(const MeanEmbedding&, int* schedule, Stream);
std::size_t backward_workspace(const MeanEmbedding&);
int backward(const MeanEmbedding&, const int* schedule, Stream);
std::size_t estimator_workspace(const Estimator&);
int estimator(const Estimator&, Stream);
std::size_t bounded_sums_workspace(const BoundedSums&);
int bounded_sums(const BoundedSums&, Stream);

int device_count();              // or a CUDA error as a negative number: there is no driver, say
int load();                      // every kernel onto the current device, or the error why not
const char* describe(int error); // a negative number returned by any of these

// Parts of `load`, one a file.
int load_mean_embedding();
int load_estimator();
int load_bounded_sums();

}  // namespace cuda

}  // namespace dpmmd
