"""The native cores (csrc/bindings*.cpp). Addresses are ints, statuses are those of csrc/dpmmd.h.

The functions cuda_* but for cuda_architectures are missing in a build without CUDA.
"""

from collections.abc import Callable

_Tap = tuple[int, int, int, int, int]  # data, stride, columns, gradient or 0, gradient's stride

sources: str  # sha256 of what it was compiled from

def level() -> str: ...
def choose(level: str) -> bool: ...
def mean_embedding(
    is_backward: bool,
    phases: int,
    taps: list[_Tap],
    type: int,
    n: int,
    labels: int,
    num_classes: int,
    moments: int,
    ball: bool,
    per_tap: bool,
    joint: bool,
    clip: float,
    weight: float,
    scale: int,
    projection: int,
    means: int,
    counts: int,
    upstream: int,
    coefficients: int,
    ceiling: float,
    incoming: int,
    incoming_stride: int,
    threads: int,
) -> int: ...
def difference(
    estimator: int,
    update: bool,
    moments: int,
    num_classes: int,
    columns: int,
    means: int,
    counts: int,
    target: int,
    estimate: int,
    first_moment: int,
    second_moment: int,
    steps: int,
    decay: float,
    rate: float,
    numbers: float,
    gradient: int,
    value: int,
    threads: int,
) -> int: ...
def bounded_sums(
    taps: list[_Tap],
    type: int,
    n: int,
    labels: int,
    num_classes: int,
    valid: int,
    limits: int,
    moments: int,
    ball: bool,
    per_tap: bool,
    nonnegative: bool,
    clip: float,
    weight: float,
    shared_taps: int,
    sums: int,
    shared: int,
    threads: int,
) -> int: ...
def cuda_architectures() -> str: ...
def cuda_device_count() -> int: ...
def cuda_load() -> int: ...
def cuda_describe(error: int) -> str: ...
def cuda_mean_embedding(
    is_backward: bool,
    taps: list[_Tap],
    type: int,
    n: int,
    labels: int,
    num_classes: int,
    moments: int,
    ball: bool,
    per_tap: bool,
    joint: bool,
    clip: float,
    weight: float,
    scale: int,
    projection: int,
    means: int,
    counts: int,
    upstream: int,
    coefficients: int,
    schedule: int,
    allocate: Callable[[int], int],
    stream: int,
) -> int: ...
def cuda_difference(
    estimator: int,
    update: bool,
    moments: int,
    num_classes: int,
    columns: int,
    means: int,
    counts: int,
    target: int,
    estimate: int,
    first_moment: int,
    second_moment: int,
    steps: int,
    decay: float,
    rate: float,
    numbers: float,
    gradient: int,
    value: int,
    allocate: Callable[[int], int],
    stream: int,
) -> int: ...
def cuda_bounded_sums(
    taps: list[_Tap],
    type: int,
    n: int,
    labels: int,
    num_classes: int,
    valid: int,
    limits: int,
    moments: int,
    ball: bool,
    per_tap: bool,
    nonnegative: bool,
    clip: float,
    weight: float,
    shared_taps: int,
    sums: int,
    shared: int,
    allocate: Callable[[int], int],
    stream: int,
) -> int: ...
