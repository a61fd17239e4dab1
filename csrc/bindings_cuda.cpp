// The CUDA core in dpmmd._native; dpmmd/_cores/cuda.py alone calls it, and has checked
// every address.
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
    bool is_backward, const Images& images, const Bound& bound,
    const MeanEmbedding::Buffers& buffers, Address schedule, const py::function& allocate,
    Address stream
) {
    MeanEmbedding call(images, bound, buffers);
    dpmmd::MeanEmbedding& e = call.arguments;
    const std::size_t bytes = is_backward ? dpmmd::cuda::backward_workspace(e)
                                          : dpmmd::cuda::forward_workspace(e);
    return on_workspace(e, allocate, bytes, [&] {
        return is_backward ? dpmmd::cuda::backward(e, at<int>(schedule), at<void>(stream))
                           : dpmmd::cuda::forward(e, at<int>(schedule), at<void>(stream));
    });
}

int estimator(
    int kind, bool update, const Estimator::Shape& shape, const Estimator::Buffers& buffers,
    const Estimator::Rates& rates, const py::function& allocate, Address stream
) {
    Estimator call(kind, update, shape, buffers, rates);
    dpmmd::Estimator& e = call.arguments;
    return on_workspace(e, allocate, dpmmd::cuda::estimator_workspace(e), [&] {
        return dpmmd::cuda::estimator(e, at<void>(stream));
    });
}

int bounded_sums(
    const Images& images, const Bound& bound, bool nonnegative, std::int64_t shared_taps,
    const BoundedSums::Buffers& buffers, const py::function& allocate, Address stream
) {
    BoundedSums call(images, bound, nonnegative, shared_taps, buffers);
    dpmmd::BoundedSums& e = call.arguments;
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
    module.def("cuda_estimator", estimator);
    module.def("cuda_bounded_sums", bounded_sums);
}

#else

void bind_cuda(py::module_& module) {
    module.def("cuda_architectures", [] { return std::string(); });
}

#endif
