"""The only caller of the CUDA core (csrc/cuda/): checks everything before an address leaves Python.

Kernels run on PyTorch's current stream, and workspaces are tensors of it: nothing waits for the
device, and calls can be captured in a CUDA graph once one has run outside of it. Labels are sorted
on the device; `forward` returns that order, which `backward` takes, as the Triton core does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dpmmd._cores import cpu
from dpmmd._cores.checks import address, check_apart, check_buffer, check_labels, check_sums
from dpmmd._cores.taps import Taps, empty_gradients, statistics_shape
from dpmmd.bounds import Bound

_native: Any = None if cpu.missing is not None else cpu._native
DEVICE = "cuda"  # the type of device; tests run the kernels on the host

TYPES = {torch.float32: 0, torch.bfloat16: 1}
_ESTIMATORS = {"batch": 0, "ema": 1, "adam": 2}
_loaded: set[torch.device] = set()


def hindrance() -> str | None:
    """Why no kernel can run on this machine, and what to do about it; None if one can."""
    if _native is None:
        return f"dpmmd._native did not load ({cpu.missing}); install dpmmd with a C++ compiler"
    if not _native.cuda_architectures():
        return (
            "this build is without CUDA; install dpmmd where nvcc of the CUDA toolkit (12.0 or "
            "newer) is on the PATH"
        )
    count = _native.cuda_device_count()
    if count < 0:
        return (
            f"no CUDA device can be used ({_native.cuda_describe(count)}); install or update the "
            "NVIDIA driver"
        )
    return None if count else "no CUDA device is visible; see CUDA_VISIBLE_DEVICES"


def schedule_size(n: int, num_classes: int | None) -> int:
    """Length of a schedule; 0 without labels (``num_classes=None``)."""
    return 0 if num_classes is None else n + num_classes + 1


def forward(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    *,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Class means of bounded moments; see `dpmmd.functional.mean_embedding`.

    Labels out of range stop the device with an assertion, as an index out of range does.

    Returns:
        means [M, K, D], counts [K], scale and projection [N, n, B] as `cpu.forward` has
        them, all float32, and the schedule of the labels, int32 [`schedule_size`(n, K)].
    """
    taps = Taps(features, TYPES, DEVICE)
    n, device = features[0].shape[0], features[0].device
    size = statistics_shape(Bound(tuple(moments), bound, 1.0, joint_weight), n, len(features))
    labels = _checked_labels(labels, n, device)
    length = schedule_size(n, None if labels is None else num_classes)
    with _ready(device) as stream:
        new = features[0].new_empty
        scale, projection = (new(size, dtype=torch.float32) for _ in range(2))
        means = new((len(moments), num_classes, taps.dim), dtype=torch.float32)
        counts = new((num_classes,), dtype=torch.float32)
        schedule = new((length,), dtype=torch.int32)
        _embed(
            taps, None, labels, num_classes, moments, bound, clip, joint_weight,
            scale, projection, means, counts, None, None, schedule, stream,
        )  # fmt: skip
        taps.to_columns(means)
    return means, counts, scale, projection, schedule


def backward(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    *,
    moments: Sequence[int],
    bound: str,
    joint_weight: float | None,
    scale: Tensor,
    projection: Tensor,
    schedule: Tensor,
    upstream: Tensor,
    needed: Sequence[bool] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of `forward`'s means with respect to the features.

    Args:
        scale, projection, schedule: from `forward`.
        upstream: float32 [M, K, D], gradient with respect to the means.
        needed: for which taps; None for all.

    Returns:
        One gradient per tap, with its shape, dtype and memory format (empty where not needed), and
        the coefficients [N, n, B].
    """
    taps = Taps(features, TYPES, DEVICE)
    n, device = features[0].shape[0], features[0].device
    size = statistics_shape(Bound(tuple(moments), bound, 1.0, joint_weight), n, len(features))
    labels = _checked_labels(labels, n, device)
    upstream = upstream.contiguous()
    length = schedule_size(n, None if labels is None else num_classes)
    check_buffer("scale", scale, size, device)
    check_buffer("projection", projection, size, device)
    check_buffer("schedule", schedule, (length,), device, torch.int32)
    check_buffer("upstream", upstream, (len(moments), num_classes, taps.dim), device)
    needed = [True] * len(features) if needed is None else needed
    with _ready(device) as stream:
        upstream = taps.from_columns(upstream)
        coefficients = torch.empty_like(scale)
        gradients = empty_gradients(taps.tensors, needed)
        _embed(
            taps, gradients, labels, num_classes, moments, bound, 1.0, joint_weight,
            scale, projection, None, None, upstream, coefficients, schedule, stream,
        )  # fmt: skip
    return gradients, coefficients


def _embed(
    taps: Taps,
    gradients: Sequence[Tensor] | None,
    labels: Tensor | None,
    num_classes: int,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
    scale: Tensor,
    projection: Tensor,
    means: Tensor | None,
    counts: Tensor | None,
    upstream: Tensor | None,
    coefficients: Tensor | None,
    schedule: Tensor,
    stream: int,
) -> None:
    first = taps.tensors[0]
    allocate, _kept = _workspace(first.device)
    status = _native.cuda_mean_embedding(
        upstream is not None,
        taps.for_native(gradients),
        TYPES[first.dtype],
        first.shape[0],
        address(labels),
        num_classes,
        sum(moments),
        bound.startswith("ball"),
        bound.endswith("-per-tap"),
        joint_weight is not None,
        clip,
        1.0 if joint_weight is None else joint_weight,
        address(scale),
        address(projection),
        address(means),
        address(counts),
        address(upstream),
        address(coefficients),
        address(schedule),
        allocate,
        stream,
    )
    _check_status(status)


def difference(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    *,
    estimator: str = "batch",
    estimate: Tensor | None = None,
    steps: Tensor | None = None,
    first_moment: Tensor | None = None,
    second_moment: Tensor | None = None,
    decay: float = 0.0,
    lr: float = 0.0,
    numbers: int | None = None,
    update: bool = True,
) -> tuple[Tensor, Tensor]:
    """Loss of a difference estimator and its gradient in ``means``; moves the state in place.

    Arguments and results as of `cpu.difference`, on one CUDA device.
    """
    shape = tuple(means.shape)
    device = means.device if means.device.type == DEVICE else torch.device(DEVICE)
    means, counts, target = means.contiguous(), counts.contiguous(), target.contiguous()
    inputs = {"means": means, "counts": counts, "target": target}
    given = {
        "estimate": estimate,
        "first_moment": first_moment,
        "second_moment": second_moment,
        "steps": steps,
    }
    states = {name: state for name, state in given.items() if state is not None}
    for name, buffer in (inputs | states).items():
        size = shape[1:2] if name in ("counts", "steps") else shape
        check_buffer(name, buffer, size, device)
    check_apart(states, inputs)
    with _ready(device) as stream:
        value, gradient = means.new_empty(()), means.new_empty(shape)
        allocate, _kept = _workspace(device)
        status = _native.cuda_difference(
            _ESTIMATORS[estimator],
            update,
            *shape,
            address(means),
            address(counts),
            address(target),
            address(estimate),
            address(first_moment),
            address(second_moment),
            address(steps),
            decay,
            lr,
            float(max(means.numel(), 1) if numbers is None else numbers),
            address(gradient),
            address(value),
            allocate,
            stream,
        )
    _check_status(status)
    return value, gradient


def bounded_sums(
    features: Sequence[Tensor],
    labels: Tensor,
    valid: Tensor,
    limits: Tensor,
    *,
    bound: Bound,
    nonnegative: bool,
    sums: Tensor,
    shared: Tensor | None = None,
    shared_taps: int = 0,
) -> None:
    """Adds the bounded integer vectors of a batch to int64 class sums: `PrivateSums.add` exactly.

    Arguments as of `cpu.bounded_sums`, on one CUDA device; float32 and bfloat16 features.
    What the images hold never raises, and never stops the device.
    """
    taps = Taps(features, TYPES, DEVICE, planes=False)
    n, device = taps.n, taps.device
    check_sums(features, taps.widths, labels, valid, limits, bound, sums, shared, shared_taps)
    with _ready(device) as stream:
        allocate, _kept = _workspace(device)
        status = _native.cuda_bounded_sums(
            taps.for_native(),
            TYPES[features[0].dtype],
            n,
            address(labels),
            sums.shape[0],
            address(valid),
            address(limits),
            bound.bits,
            bound.ball,
            bound.per_tap,
            nonnegative,
            bound.clip,
            bound.weight,
            shared_taps,
            address(sums),
            address(shared),
            allocate,
            stream,
        )
    _check_status(status)


@contextmanager
def _ready(device: torch.device) -> Iterator[int]:
    """The current stream of a device that has the kernels, current while in the block."""
    if device.type != "cuda":  # tests, on the host
        yield 0
        return
    with torch.cuda.device(device):
        if device not in _loaded:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    f"backend='cuda': the kernels have not been loaded on {device} yet, which they "
                    "cannot be while a CUDA graph is being captured. Run one step before the "
                    "capture (PyTorch's recipe does so, on a side stream)."
                )
            error = _native.cuda_load()
            if error:
                major, minor = torch.cuda.get_device_capability(device)
                raise ValueError(
                    f"backend='cuda': no kernel for {torch.cuda.get_device_name(device)}, "
                    f"sm_{major}{minor} ({_native.cuda_describe(error)}); this build has "
                    f"{_native.cuda_architectures()} and needs sm_80 or newer. Use backend='torch'."
                )
            _loaded.add(device)
        yield torch.cuda.current_stream(device).cuda_stream


def _workspace(device: torch.device) -> tuple[Callable[[int], int], list[Tensor]]:
    """What the core allocates with, and what keeps that alive until the launches are made.

    PyTorch gives the memory to later work of the same stream only, which comes after the kernels.
    """
    kept: list[Tensor] = []

    def allocate(size: int) -> int:
        kept.append(torch.empty(size, dtype=torch.uint8, device=device))
        return kept[-1].data_ptr()

    return allocate, kept


def _checked_labels(labels: Tensor | None, n: int, device: torch.device) -> Tensor | None:
    if labels is None:
        return None
    check_labels(labels, n, device)
    return labels.contiguous()


def _check_status(status: int) -> None:
    if status < 0:
        raise RuntimeError(
            f"backend='cuda': a kernel could not be launched: {_native.cuda_describe(status)} "
            f"(CUDA error {-status}). An error of earlier work on the device shows here too; "
            "CUDA_LAUNCH_BLOCKING=1 finds which."
        )
    if status:
        raise MemoryError(f"dpmmd._native: no workspace (status {status}).")
