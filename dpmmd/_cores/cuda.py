"""The only caller of the CUDA core (csrc/cuda/): checks everything before an address leaves Python.

Kernels run on PyTorch's current stream, and workspaces are tensors of it: nothing waits for the
device, and calls can be captured in a CUDA graph once one has run outside of it. Labels are sorted
on the device; `forward` saves that order, which `backward` takes, as the Triton core does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from dpmmd._contract.checks import address, check_buffer, check_estimate, check_labels, check_sums
from dpmmd._contract.protocol import Core, Saved, Step
from dpmmd._contract.slot import Slot
from dpmmd._contract.taps import DTYPES, Taps
from dpmmd._cores import arguments, cpu
from dpmmd._cores.arguments import Buffers, call_of
from dpmmd.bounds import Bound

_native: Any = None if cpu.missing is not None else cpu._native
DEVICE = "cuda"  # the type of device; tests run the kernels on the host

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


class Cuda(Core):
    """The CUDA core. Labels out of range stop the device, as an index out of range does."""

    name = "cuda"
    summed = DTYPES

    def check(self, origin: str, device: str, dtype: torch.dtype) -> None:
        if device != DEVICE or dtype not in DTYPES:
            raise ValueError(
                f"{origin}='cuda': cannot run {dtype} on {device}; it takes float32 and bfloat16 "
                "on a CUDA device. Use 'auto', or move the tensors."
            )
        reason = hindrance()
        if reason is not None:
            raise ValueError(f"{origin}='cuda': {reason}, or use 'auto'.")

    def schedule_size(self, n: int, num_classes: int | None) -> int:
        return 0 if num_classes is None else n + num_classes + 1

    def forward(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        slots: Sequence[Slot | None] | None = None,
    ) -> tuple[Tensor, Tensor, Saved]:
        taps = Taps(features, DTYPES, DEVICE)
        call = call_of(features, taps, num_classes, bound)
        labels = _checked_labels(labels, taps.n, taps.device)
        length = self.schedule_size(taps.n, None if labels is None else num_classes)
        with _ready(taps.device) as stream:
            new = features[0].new_empty
            scale, projection = (new(call.statistics, dtype=torch.float32) for _ in range(2))
            means = new(call.means, dtype=torch.float32)
            counts = new((num_classes,), dtype=torch.float32)
            schedule = new((length,), dtype=torch.int32)
            allocate, _kept = _workspace(taps.device)
            status = _native.cuda_mean_embedding(
                False,
                arguments.images(taps, labels, num_classes),
                call.bound,
                Buffers(scale, projection, means, counts).addresses(),
                address(schedule),
                allocate,
                stream,
            )
            _check_status(status)
            taps.to_columns(means)
        return means, counts, Saved(scale, projection, schedule)

    def backward(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        saved: Saved,
        upstream: Tensor,
        needed: Sequence[bool],
        slots: Sequence[Slot | None] | None = None,
    ) -> list[Tensor]:
        taps = Taps(features, DTYPES, DEVICE)
        device, call = taps.device, call_of(features, taps, num_classes, bound)
        labels = _checked_labels(labels, taps.n, device)
        upstream = upstream.contiguous()
        length = self.schedule_size(taps.n, None if labels is None else num_classes)
        check_buffer("scale", saved.scale, call.statistics, device)
        check_buffer("projection", saved.projection, call.statistics, device)
        check_buffer("schedule", saved.schedule, (length,), device, torch.int32)
        check_buffer("upstream", upstream, call.means, device)
        with _ready(device) as stream:
            upstream = taps.from_columns(upstream)
            coefficients = torch.empty_like(saved.scale)
            gradients = taps.empty_gradients(needed)
            buffers = Buffers(
                saved.scale, saved.projection, upstream=upstream, coefficients=coefficients
            )
            allocate, _kept = _workspace(device)
            status = _native.cuda_mean_embedding(
                True,
                arguments.images(taps, labels, num_classes, gradients),
                call.bound,
                buffers.addresses(),
                address(saved.schedule),
                allocate,
                stream,
            )
        _check_status(status)
        return gradients

    def estimate(
        self, means: Tensor, counts: Tensor, target: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        device = means.device if means.device.type == DEVICE else torch.device(DEVICE)
        means, counts, target = means.contiguous(), counts.contiguous(), target.contiguous()
        check_estimate(means, counts, target, step.state(), device)
        with _ready(device) as stream:
            value, gradient = means.new_empty(()), means.new_empty(means.shape)
            allocate, _kept = _workspace(device)
            buffers = means.data_ptr(), counts.data_ptr(), target.data_ptr()
            written = gradient.data_ptr(), value.data_ptr()
            told = arguments.estimator(means.shape, buffers, step, *written)
            status = _native.cuda_estimator(*told, allocate, stream)
        _check_status(status)
        return value, gradient

    def bounded_sums(
        self,
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
        taps = Taps(features, DTYPES, DEVICE, planes=False)
        check_sums(features, taps.widths, labels, valid, limits, bound, sums, shared, shared_taps)
        with _ready(taps.device) as stream:
            allocate, _kept = _workspace(taps.device)
            status = _native.cuda_bounded_sums(
                arguments.images(taps, labels, sums.shape[0]),
                arguments.numbers(bound),
                nonnegative,
                shared_taps,
                tuple(map(address, (valid, limits, sums, shared))),
                allocate,
                stream,
            )
        _check_status(status)


CORE = Cuda()


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
