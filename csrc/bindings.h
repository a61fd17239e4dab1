// What the bindings of the cores share.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "dpmmd.h"

using Address = std::uintptr_t;
// data, stride, columns, gradient (0: none), gradient's stride; strides in elements
using TapNumbers = std::tuple<Address, std::int64_t, std::int64_t, Address, std::int64_t>;

template <class T>
T* at(Address address) {
    return reinterpret_cast<T*>(address);
}

inline std::vector<dpmmd::Tap> taps_of(const std::vector<TapNumbers>& numbers) {
    std::vector<dpmmd::Tap> taps;
    taps.reserve(numbers.size());
    for (const auto& [data, stride, columns, gradient, gradient_stride] : numbers) {
        taps.push_back({at<void>(data), stride, columns, at<void>(gradient), gradient_stride});
    }
    return taps;
}

// The functions cuda_*; in a build without CUDA only cuda_architectures, which is empty.
void bind_cuda(pybind11::module_& module);
