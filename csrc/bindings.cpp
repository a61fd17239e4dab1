// The module dpmmd._native: numbers and addresses in, a status out. dpmmd/_cores/cpu.py alone
// calls what is bound here, and has checked every address; bindings_cuda.cpp has the rest.
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

// The output of a ReLU: its ceiling (0: it is none), what comes in from elsewhere, its stride.
using Rectified = std::tuple<float, Address, std::int64_t>;

int mean_embedding(
    bool is_backward, int phases, const Images& images, const Bound& bound,
    const MeanEmbedding::Buffers& buffers, const Rectified& rectified, int threads
) {
    MeanEmbedding call(images, bound, buffers);
    dpmmd::MeanEmbedding& e = call.arguments;
    e.ceiling = std::get<0>(rectified);
    e.incoming = at<const void>(std::get<1>(rectified));
    e.incoming_stride = std::get<2>(rectified);
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

int estimator(
    int kind, bool update, const Estimator::Shape& shape, const Estimator::Buffers& buffers,
    const Estimator::Rates& rates, int threads
) {
    Estimator call(kind, update, shape, buffers, rates);
    call.arguments.threads = threads;
    const dpmmd::Operations& operations = dpmmd::operations();
    return on_workspace(call.arguments, operations.estimator_workspace, operations.estimator);
}

int bounded_sums(
    const Images& images, const Bound& bound, bool nonnegative, std::int64_t shared_taps,
    const BoundedSums::Buffers& buffers, int threads
) {
    BoundedSums call(images, bound, nonnegative, shared_taps, buffers);
    call.arguments.threads = threads;
    const dpmmd::Operations& operations = dpmmd::operations();
    return on_workspace(call.arguments, operations.bounded_sums_workspace, operations.bounded_sums);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
    module.doc() = "The native cores (csrc/); dpmmd/_cores/ has their only callers.";
    module.attr("sources") = dpmmd::sources();
    module.def("level", [] { return std::string(dpmmd::operations().level); });
    module.def("choose", [](const std::string& level) { return dpmmd::choose(level.c_str()); });
    module.def("mean_embedding", mean_embedding);
    module.def("estimator", estimator);
    module.def("bounded_sums", bounded_sums);
    bind_cuda(module);
    bind_blocks(module);
}
