"""The native cores (csrc/bindings*.cpp). Addresses are ints, statuses are those of csrc/dpmmd.h.

The functions cuda_* but for cuda_architectures are missing in a build without CUDA.
"""

from collections.abc import Callable, Sequence
from typing import Any

_Tap = tuple[int, int, int, int, int]  # data, stride, columns, gradient or 0, gradient's stride
_Images = tuple[list[_Tap], int, int, int, int]  # taps, type, n, labels, number of classes
_Bound = tuple[int, bool, bool, bool, float, float]  # moments, ball, per tap, joint, clip, weight
_Addresses = tuple[int, ...]
_Allocate = Callable[[int], int]

sources: str  # sha256 of what it was compiled from

def level() -> str: ...
def choose(level: str) -> bool: ...
def mean_embedding(
    is_backward: bool,
    phases: int,
    images: _Images,
    bound: _Bound,
    buffers: _Addresses,
    rectified: tuple[float, int, int],
    threads: int,
) -> int: ...
def estimator(
    kind: int,
    update: bool,
    shape: tuple[int, ...],
    buffers: _Addresses,
    rates: tuple[float, float, float],
    threads: int,
) -> int: ...
def bounded_sums(
    images: _Images,
    bound: _Bound,
    nonnegative: bool,
    shared_taps: int,
    buffers: _Addresses,
    threads: int,
) -> int: ...

# A DLPack capsule, or None.
def lend(shape: Sequence[int], strides: Sequence[int], type: int) -> Any: ...
def begin_pass() -> None: ...
def return_blocks() -> int: ...
def keep_blocks(kept: bool) -> None: ...
def cuda_architectures() -> str: ...
def cuda_device_count() -> int: ...
def cuda_load() -> int: ...
def cuda_describe(error: int) -> str: ...
def cuda_mean_embedding(
    is_backward: bool,
    images: _Images,
    bound: _Bound,
    buffers: _Addresses,
    schedule: int,
    allocate: _Allocate,
    stream: int,
) -> int: ...
def cuda_estimator(
    kind: int,
    update: bool,
    shape: tuple[int, ...],
    buffers: _Addresses,
    rates: tuple[float, float, float],
    allocate: _Allocate,
    stream: int,
) -> int: ...
def cuda_bounded_sums(
    images: _Images,
    bound: _Bound,
    nonnegative: bool,
    shared_taps: int,
    buffers: _Addresses,
    allocate: _Allocate,
    stream: int,
) -> int: ...
