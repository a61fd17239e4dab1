// What the bindings of the cores share: numbers and addresses, as dpmmd/_cores/arguments.py groups
// them, into the arguments of dpmmd.h.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "dpmmd.h"

using Address = std::uintptr_t;
// data, stride, columns, gradient (0: none), gradient's stride; strides in elements
using TapNumbers = std::tuple<Address, std::int64_t, std::int64_t, Address, std::int64_t>;
// taps, their type, n, labels, number of classes
using Images = std::tuple<std::vector<TapNumbers>, int, std::int64_t, Address, std::int64_t>;
// moments, ball, per tap, joint, clip, weight
using Bound = std::tuple<int, bool, bool, bool, double, double>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

// The arguments of an operation over the features of images. They point to the taps in here.
template <class Arguments>
struct OverTaps {
    std::vector<dpmmd::Tap> taps;
    Arguments arguments{};

    OverTaps(const OverTaps&) = delete;
    OverTaps(const Images& images, const Bound& bound) {
        const auto& [numbers, type, n, labels, num_classes] = images;
        taps.reserve(numbers.size());
        for (const auto& [data, stride, columns, gradient, gradient_stride] : numbers) {
            taps.push_back({at<void>(data), stride, columns, at<void>(gradient), gradient_stride});
        }
        Arguments& e = arguments;
        e.taps = taps.data();
        e.num_taps = static_cast<std::int64_t>(taps.size());
        e.type = static_cast<dpmmd::Type>(type);
        e.n = n;
        e.labels = at<const std::int64_t>(labels);
        e.num_classes = num_classes;
        bool joint;
        std::tie(e.moments, e.ball, e.per_tap, joint, e.clip, e.weight) = bound;
        if constexpr (std::is_same_v<Arguments, dpmmd::MeanEmbedding>) e.joint = joint;
    }
};

struct MeanEmbedding : OverTaps<dpmmd::MeanEmbedding> {
    // scale, projection, means, counts, upstream, coefficients
    using Buffers = std::array<Address, 6>;

    MeanEmbedding(const Images& images, const Bound& bound, const Buffers& buffers)
        : OverTaps(images, bound) {
        arguments.scale = at<float>(buffers[0]);
        arguments.projection = at<float>(buffers[1]);
        arguments.means = at<float>(buffers[2]);
        arguments.counts = at<float>(buffers[3]);
        arguments.upstream = at<const float>(buffers[4]);
        arguments.coefficients = at<float>(buffers[5]);
    }
};

struct BoundedSums : OverTaps<dpmmd::BoundedSums> {
    // valid, limits, sums, shared
    using Buffers = std::array<Address, 4>;

    BoundedSums(
        const Images& images, const Bound& bound, bool nonnegative, std::int64_t shared_taps,
        const Buffers& buffers
    )
        : OverTaps(images, bound) {
        arguments.nonnegative = nonnegative;
        arguments.shared_taps = shared_taps;
        arguments.valid = at<const std::uint8_t>(buffers[0]);
        arguments.limits = at<const std::int64_t>(buffers[1]);
        arguments.sums = at<std::int64_t>(buffers[2]);
        arguments.shared = at<std::int64_t>(buffers[3]);
    }
};

struct Estimator {
    using Shape = std::array<std::int64_t, 3>;  // moments, classes, columns
    // means, counts, target, estimate, first_moment, second_moment, steps, gradient, value
    using Buffers = std::array<Address, 9>;
    using Rates = std::array<double, 3>;  // decay, rate, numbers

    dpmmd::Estimator arguments{};

    Estimator(
        int kind, bool update, const Shape& shape, const Buffers& buffers, const Rates& rates
    ) {
        dpmmd::Estimator& e = arguments;
        e.kind = static_cast<dpmmd::Estimator::Kind>(kind);
        e.update = update;
        e.moments = shape[0];
        e.num_classes = shape[1];
        e.columns = shape[2];
        e.means = at<const float>(buffers[0]);
        e.counts = at<const float>(buffers[1]);
        e.target = at<const float>(buffers[2]);
        e.estimate = at<float>(buffers[3]);
        e.first_moment = at<float>(buffers[4]);
        e.second_moment = at<float>(buffers[5]);
        e.steps = at<float>(buffers[6]);
        e.gradient = at<float>(buffers[7]);
        e.value = at<float>(buffers[8]);
        e.decay = rates[0];
        e.rate = rates[1];
        e.numbers = rates[2];
    }
};

// The functions cuda_*; in a build without CUDA only cuda_architectures, which is empty.
void bind_cuda(pybind11::module_& module);
// Memory for gradients: lend and what belongs to it.
void bind_blocks(pybind11::module_& module);
