// Images in the order of their classes, found on the device while row reductions are finished.
//
// A schedule is int32 [n + K + 1]: the images sorted by class, stably, then where each class begins
// in that order. An image's position is the number of images with a lower class, or with its own and
// before it: n comparisons an image by a warp each, instead of the several launches of a sort.
// Images whose label is not in 0..K-1 are in no class and have no position.
#pragma once

#include "device.h"

namespace dpmmd::cuda {

// Where the images of a class are; without labels all are in class 0, in their own order.
struct Schedule {
    const int* order;  // null without labels
    const int* starts;
    Index n;

    __device__ Index start(Index k) const { return order ? starts[k] : 0; }
    __device__ Index end(Index k) const { return order ? starts[k + 1] : n; }
    __device__ Index image(Index position) const { return order ? order[position] : position; }
};

inline Schedule schedule_of(const int* schedule, Index n) {
    return {schedule, schedule ? schedule + n : nullptr, n};
}

// By a warp: where one image stands.
__device__ inline void place_image(
    const Index* labels, int* order, Index image, Index n, Index num_classes
) {
    const Index label = labels[image];
    int position = 0;
    for (Index other = lane_of(); other < n; other += lanes) {
        const Index theirs = labels[other];
        position += (theirs >= 0 && theirs < label) || (theirs == label && other < image);
    }
    position = warp_sum(position);
    if (lane_of() == 0 && label >= 0 && label < num_classes) {
        order[position] = static_cast<int>(image);
    }
}

// By a warp: where one class begins (and the last one ends), and how many images it has.
__device__ inline void place_class(
    const Index* labels, int* starts, float* counts, Index k, Index n, Index num_classes
) {
    if (!labels) {
        if (lane_of() == 0 && counts) counts[k] = static_cast<float>(n);
        return;
    }
    int own = 0, lower = 0;
    for (Index other = lane_of(); other < n; other += lanes) {
        const Index theirs = labels[other];
        own += theirs == k;
        lower += theirs >= 0 && theirs < k;
    }
    own = warp_sum(own);
    lower = warp_sum(lower);
    if (lane_of() == 0) {
        if (counts) counts[k] = static_cast<float>(own);
        starts[k] = lower;
        if (k == num_classes - 1) starts[k + 1] = lower + own;
    }
}

}  // namespace dpmmd::cuda
