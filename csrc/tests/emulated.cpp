// The CUDA core's bindings over host memory, for tests: see cuda_emulation.h.
#include "../bindings.h"

PYBIND11_MODULE(dpmmd_emulated, module) { bind_cuda(module); }
