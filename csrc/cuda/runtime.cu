// Whether the kernels can run here.
#include "device.h"

namespace dpmmd::cuda {

int device_count() {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error != cudaSuccess) {
        (void)cudaGetLastError();  // or the next call of anybody's would report it
        return -static_cast<int>(error);
    }
    return count;
}

int load() {
    int error = load_mean_embedding();
    if (!error) error = load_estimator();
    if (!error) error = load_bounded_sums();
    if (error) (void)cudaGetLastError();
    return error;
}

const char* describe(int error) { return cudaGetErrorString(static_cast<cudaError_t>(-error)); }

}  // namespace dpmmd::cuda
