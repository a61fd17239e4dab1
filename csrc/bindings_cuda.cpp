// The CUDA core in dpmmd._native; dpmmd/_cuda.py alone calls it, and has checked every address.
// DPMMD_CUDA_ARCHITECTURES lists what it was compiled for, e.g. "80-real 90-real 100".
#include <string>

#include "bindings.h"

namespace py = pybind11;

#ifdef DPMMD_CUDA_ARCHITECTURES

namespace {

using dpmmd::cuda::Stream;

// Runs an operation on a workspace that the caller allocates: `allocate` takes a number of bytes and
// gives an address that stays valid until this call is over and the stream has come past it.
template <class Arguments, class Run>
int on_workspace(
    Arguments& arguments, const py::function& allocate, std::size_t bytes, const Run& run
) {
    arguments.workspace_bytes = bytes;
    if (bytes) arguments.workspace = at<std::byte>(allocate(bytes).cast<Address>());
    py::gil_scoped_release release;
    return run();
}

int mean_embedding(
    bool is_backward, const std::vector<TapNumbers>& numbers, int type, std::int64_t n,
    Address labels, std::int64_t num_classes, int moments, bool ball, bool per_tap, bool joint,
    double clip, double weight, Address scale, Address projection, Address means, Address counts,
    Address upstream, Address coefficients, Address schedule, const py::function& allocate,
    Address stream
) {
    const std::vector<dpmmd::Tap> taps = taps_of(numbers);
    dpmmd::MeanEmbedding e{};
    e.taps = taps.data();
    e.num_taps = static_cast<std::int64_t>(taps.size());
    e.type = static_cast<dpmmd::Type>(type);
    e.n = n;
    e.labels = at<const std::int64_t>(labels);
    e.num_classes = num_classes;
    e.moments = moments;
    e.ball = ball;
    e.per_tap = per_tap;
    e.joint = joint;
    e.clip = clip;
    e.weight = weight;
    e.scale = at<float>(scale);
    e.projection = at<float>(projection);
    e.means = at<float>(means);
    e.counts = at<float>(counts);
    e.upstream = at<const float>(upstream);
    e.coefficients = at<float>(coefficients);
    const std::size_t bytes = is_backward ? dpmmd::cuda::backward_workspace(e)
                                          : dpmmd::cuda::forward_workspace(e);
    return on_workspace(e, allocate, bytes, [&] {
        return is_backward ? dpmmd::cuda::backward(e, at<int>(schedule), at<void>(stream))
                           : dpmmd::cuda::forward(e, at<int>(schedule), at<void>(stream));
    });
}

int difference(
    int estimator, bool update, std::int64_t moments, std::int64_t num_classes,
    std::int64_t columns, Address means, Address counts, Address target, Address estimate,
    Address first_moment, Address second_moment, Address steps, double decay, double rate,
    double numbers, Address gradient, Address value, const py::function& allocate, Address stream
) {
    dpmmd::Difference e{};
    e.estimator = static_cast<dpmmd::Difference::Estimator>(estimator);
    e.update = update;
    e.moments = moments;
    e.num_classes = num_classes;
    e.columns = columns;
    e.means = at<const float>(means);
    e.counts = at<const float>(counts);
    e.target = at<const float>(target);
    e.estimate = at<float>(estimate);
    e.first_moment = at<float>(first_moment);
    e.second_moment = at<float>(second_moment);
    e.steps = at<float>(steps);
    e.decay = decay;
    e.rate = rate;
    e.numbers = numbers;
    e.gradient = at<float>(gradient);
    e.value = at<float>(value);
    return on_workspace(e, allocate, dpmmd::cuda::difference_workspace(e), [&] {
        return dpmmd::cuda::difference(e, at<void>(stream));
    });
}

int bounded_sums(
    const std::vector<TapNumbers>& numbers, int type, std::int64_t n, Address labels,
    std::int64_t num_classes, Address valid, Address limits, int moments, bool ball, bool per_tap,
    bool nonnegative, double clip, double weight, std::int64_t shared_taps, Address sums,
    Address shared, const py::function& allocate, Address stream
) {
    const std::vector<dpmmd::Tap> taps = taps_of(numbers);
    dpmmd::BoundedSums e{};
    e.taps = taps.data();
    e.num_taps = static_cast<std::int64_t>(taps.size());
    e.type = static_cast<dpmmd::Type>(type);
    e.n = n;
    e.labels = at<const std::int64_t>(labels);
    e.num_classes = num_classes;
    e.valid = at<const std::uint8_t>(valid);
    e.limits = at<const std::int64_t>(limits);
    e.moments = moments;
    e.ball = ball;
    e.per_tap = per_tap;
    e.nonnegative = nonnegative;
    e.clip = clip;
    e.weight = weight;
    e.shared_taps = shared_taps;
    e.sums = at<std::int64_t>(sums);
    e.shared = at<std::int64_t>(shared);
    return on_workspace(e, allocate, dpmmd::cuda::bounded_sums_workspace(e), [&] {
        return dpmmd::cuda::bounded_sums(e, at<void>(stream));
    });
}

}  // namespace

void bind_cuda(py::module_& module) {
    module.def("cuda_architectures", [] { return std::string(DPMMD_CUDA_ARCHITECTURES); });
    module.def("cuda_device_count", dpmmd::cuda::device_count);
    module.def("cuda_load", dpmmd::cuda::load);
    module.def("cuda_describe", [](int error) { return std::string(dpmmd::cuda::describe(error)); });
    module.def("cuda_mean_embedding", mean_embedding);
    module.def("cuda_difference", difference);
    module.def("cuda_bounded_sums", bounded_sums);
}

#else

void bind_cuda(py::module_& module) {
    module.def("cuda_architectures", [] { return std::string(); });
}

#endif
