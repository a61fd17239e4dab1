// The module dpmmd._native: numbers and addresses in, a status out. dpmmd/_cpu.py alone calls what
// is bound here, and has checked every address; bindings_cuda.cpp has the rest.
#include <cstdlib>
#include <string>

#include "bindings.h"

namespace dpmmd {
const char* sources();  // sha256 of what this module was compiled from; CMakeLists.txt writes it
}

namespace py = pybind11;

namespace {

// Runs an operation on its workspace, allocated here for the caller, without the GIL.
template <class Arguments, class Run>
int on_workspace(
    Arguments& arguments, std::size_t (*size)(const Arguments&), const Run& run
) {
    py::gil_scoped_release release;
    arguments.workspace_bytes = size(arguments);
    arguments.workspace = static_cast<std::byte*>(
        std::aligned_alloc(64, arguments.workspace_bytes / 64 * 64 + 64)
    );
    if (!arguments.workspace) return static_cast<int>(dpmmd::Status::workspace_too_small);
    const dpmmd::Status status = run(arguments);
    std::free(arguments.workspace);
    return static_cast<int>(status);
}


int mean_embedding(
    bool is_backward, int phases, const std::vector<TapNumbers>& numbers, int type, std::int64_t n,
    Address labels, std::int64_t num_classes, int moments, bool ball, bool per_tap, bool joint,
    double clip, double weight, Address scale, Address projection, Address means, Address counts,
    Address upstream, Address coefficients, float ceiling, Address incoming,
    std::int64_t incoming_stride, int threads
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
    e.ceiling = ceiling;
    e.incoming = at<const void>(incoming);
    e.incoming_stride = incoming_stride;
    e.threads = threads;
    const dpmmd::Operations& operations = dpmmd::operations();
    return on_workspace(
        e, is_backward ? operations.backward_workspace : operations.forward_workspace,
        [&](const dpmmd::MeanEmbedding& arguments) {
            return (is_backward ? operations.backward : operations.forward)(
                arguments, static_cast<dpmmd::Phases>(phases)
            );
        }
    );
}

int difference(
    int estimator, bool update, std::int64_t moments, std::int64_t num_classes,
    std::int64_t columns, Address means, Address counts, Address target, Address estimate,
    Address first_moment, Address second_moment, Address steps, double decay, double rate,
    double numbers, Address gradient, Address value, int threads
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
    e.threads = threads;
    const dpmmd::Operations& operations = dpmmd::operations();
    return on_workspace(e, operations.difference_workspace, operations.difference);
}

int bounded_sums(
    const std::vector<TapNumbers>& numbers, int type, std::int64_t n, Address labels,
    std::int64_t num_classes, Address valid, Address limits, int moments, bool ball, bool per_tap,
    bool nonnegative, double clip, double weight, std::int64_t shared_taps, Address sums,
    Address shared, int threads
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
    e.threads = threads;
    const dpmmd::Operations& operations = dpmmd::operations();
    return on_workspace(e, operations.bounded_sums_workspace, operations.bounded_sums);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native cores (csrc/); dpmmd/_cpu.py and _cuda.py are their only callers.";
    module.attr("sources") = dpmmd::sources();
    module.def("level", [] { return std::string(dpmmd::operations().level); });
    module.def("choose", [](const std::string& level) { return dpmmd::choose(level.c_str()); });
    module.def("mean_embedding", mean_embedding);
    module.def("difference", difference);
    module.def("bounded_sums", bounded_sums);
    bind_cuda(module);
}
