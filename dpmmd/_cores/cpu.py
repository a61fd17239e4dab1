"""The only caller of the native core: checks everything before an address leaves Python.

Operations of mean embeddings come in halves (`Phases` in csrc/dpmmd.h): row statistics and class
sums forward, row dots and gradient backward. ``STATISTICS | CLASS_SUMS`` and ``DOTS | GRADIENT``
do two halves in one pass over the features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from math import prod

import torch
from torch import Tensor

from dpmmd._contract.checks import (
    address,
    brief,
    check_buffer,
    check_estimate,
    check_labels,
    check_match,
    check_sums,
    refuse_values,
)
from dpmmd._contract.protocol import Core, Matched, Saved, Step, is_one
from dpmmd._contract.slot import Slot, written
from dpmmd._contract.taps import DTYPES, Taps
from dpmmd._cores import arguments
from dpmmd._cores.arguments import Buffers, call_of
from dpmmd.bounds import Bound

try:
    from dpmmd import _native
except ImportError as error:  # pragma: no cover - a build without the extension
    missing: str | None = str(error)
else:
    missing = None
    _level = os.environ.get("DPMMD_CPU")
    if _level and not _native.choose(_level):
        raise ValueError(
            f"DPMMD_CPU={_level!r}: this processor or build has no such level; leave the variable "
            f"unset ({_native.level()!r} then), or use 'baseline', 'avx2' or 'avx512'."
        )

STATISTICS = DOTS = 1
CLASS_SUMS = GRADIENT = 2
BOTH = 3

_LABEL_OUT_OF_RANGE = 1
_CPU = torch.device("cpu")
_NO_RELU = 0.0, 0, 0


class Native(Core):
    """The native core; ``threads`` is None for PyTorch's number wherever it is asked for."""

    name = "cpu"
    summed = tuple(arguments.TYPES)

    def check(self, origin: str, device: str, dtype: torch.dtype) -> None:
        if device != "cpu" or dtype not in DTYPES:
            raise ValueError(
                f"{origin}='cpu': cannot run {dtype} on {device}; it takes float32 and bfloat16 "
                "on the CPU. Use 'auto', or convert the tensors."
            )
        if missing is not None:
            raise ValueError(
                f"{origin}='cpu': dpmmd._native did not load ({missing}). Install dpmmd with "
                "a C++ compiler at hand, or use 'auto'."
            )

    def forward(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        slots: Sequence[Slot | None] | None = None,
        *,
        statistics: tuple[Tensor, Tensor] | None = None,
        phases: int = BOTH,
        threads: int | None = None,
    ) -> tuple[Tensor, Tensor, Saved]:
        """As `Core.forward`.

        Args:
            statistics: scale and projection, for ``phases=CLASS_SUMS``.
            phases: STATISTICS leaves means and counts undefined.
        """
        taps = Taps(features, DTYPES, "cpu")
        call = call_of(features, taps, num_classes, bound)
        if statistics is None:
            scale, projection = _empty(call.statistics), _empty(call.statistics)
        else:
            scale, projection = statistics
            check_buffer("scale", scale, call.statistics, _CPU)
            check_buffer("projection", projection, call.statistics, _CPU)
        means, counts = _empty(call.means), _empty(num_classes)
        labels = _checked_labels(labels, taps.n)
        buffers = Buffers(scale, projection, means, counts).addresses()
        images = arguments.images(taps, labels, num_classes)
        _embed(False, phases, images, call.bound, buffers, labels, threads)
        if phases & CLASS_SUMS:
            taps.to_columns(means)
        return means, counts, Saved(scale, projection, _empty(0, torch.int32))

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
        writes = written(needed, slots)
        phases = BOTH if slots is None or any(writes) else DOTS
        gradients, coefficients = self.gradients(
            features, labels, num_classes, bound, saved, upstream, writes, phases=phases
        )
        if slots is not None:
            factors = saved.scale, saved.projection, coefficients
            pieces = upstream.split([prod(f.shape[1:]) for f in features], dim=2)
            for column, (slot, wanted) in enumerate(zip(slots, needed, strict=True)):
                if slot is None or not wanted:
                    continue
                block = column if bound.per_tap else 0
                scale, projection, own = (f[:, :, block].contiguous() for f in factors)
                buffers = Buffers(
                    scale, projection, upstream=pieces[column].contiguous(), coefficients=own
                )
                slot.left = partial(
                    rectified_gradient,
                    labels=labels,
                    num_classes=num_classes,
                    bound=bound,
                    buffers=buffers,
                )
        return gradients

    def gradients(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        saved: Saved,
        upstream: Tensor,
        needed: Sequence[bool],
        *,
        coefficients: Tensor | None = None,
        phases: int = BOTH,
        threads: int | None = None,
    ) -> tuple[list[Tensor], Tensor]:
        """The gradients of `backward`, and the coefficients.

        Args:
            coefficients: [N, n, B], for ``phases=GRADIENT``.
            phases: DOTS leaves the gradients undefined.
        """
        taps = Taps(features, DTYPES, "cpu")
        call = call_of(features, taps, num_classes, bound)
        check_buffer("scale", saved.scale, call.statistics, _CPU)
        check_buffer("projection", saved.projection, call.statistics, _CPU)
        if coefficients is None:
            coefficients = _empty(call.statistics)
        else:
            check_buffer("coefficients", coefficients, call.statistics, _CPU)
        upstream = upstream.contiguous()
        check_buffer("upstream", upstream, call.means, _CPU)
        upstream = taps.from_columns(upstream)
        gradients = taps.empty_gradients(needed)
        labels = _checked_labels(labels, taps.n)
        buffers = Buffers(
            saved.scale, saved.projection, upstream=upstream, coefficients=coefficients
        ).addresses()
        images = arguments.images(taps, labels, num_classes, gradients)
        _embed(True, phases, images, call.bound, buffers, labels, threads)
        return gradients, coefficients

    def estimate(
        self,
        means: Tensor,
        counts: Tensor,
        target: Tensor,
        step: Step,
        threads: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        means, counts, target = means.contiguous(), counts.contiguous(), target.contiguous()
        check_estimate(means, counts, target, step.state(), _CPU)
        value, gradient = _empty(()), _empty(means.shape)
        buffers = means.data_ptr(), counts.data_ptr(), target.data_ptr()
        _step(means.shape, buffers, step, gradient.data_ptr(), value, threads)
        return value, gradient

    def match(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        target: Tensor,
        step: Step,
        slots: Sequence[Slot | None] | None = None,
    ) -> tuple[Tensor, Matched]:
        """As `Core.match`; the gradient, scale and projection lie in one buffer."""
        taps = Taps(features, DTYPES, "cpu")
        if slots is not None or taps.planes:
            return super().match(features, labels, num_classes, bound, target, step, slots)
        call = call_of(features, taps, num_classes, bound)
        labels, target = _checked_labels(labels, taps.n), target.contiguous()
        check_match(target, step.state(), call.means, _CPU)
        kept, value = _empty(call.numbers), _empty(())
        passing = _empty(call.gradient + num_classes)
        means, start = passing.data_ptr(), kept.data_ptr()
        counts = means + 4 * call.gradient
        factors = start + 4 * call.scale, start + 4 * call.projection
        images = arguments.images(taps, labels, num_classes)
        _embed(False, BOTH, images, call.bound, (*factors, means, counts, 0, 0), labels, None)
        _step(call.means, (means, counts, target.data_ptr()), step, start, value, None)
        return value, Matched(None, kept)

    def match_backward(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        matched: Matched,
        grad: Tensor,
        needed: Sequence[bool],
        slots: Sequence[Slot | None] | None = None,
    ) -> list[Tensor]:
        if matched.saved is not None:
            return super().match_backward(
                features, labels, num_classes, bound, matched, grad, needed, slots
            )
        taps, kept = Taps(features, DTYPES, "cpu"), matched.gradient
        call = call_of(features, taps, num_classes, bound)
        check_buffer("gradient", kept, (call.numbers,), _CPU)
        upstream = kept if is_one(grad) else kept[: call.gradient] * grad
        if taps.planes:  # which they were not in `match`: hooks have brought them back so
            upstream = taps.from_columns(upstream[: call.gradient].view(call.means))
        gradients, coefficients = taps.empty_gradients(needed), _empty(call.statistics)
        labels, start = _checked_labels(labels, taps.n), kept.data_ptr()
        factors = start + 4 * call.scale, start + 4 * call.projection
        buffers = *factors, 0, 0, upstream.data_ptr(), coefficients.data_ptr()
        images = arguments.images(taps, labels, num_classes, gradients)
        _embed(True, BOTH, images, call.bound, buffers, labels, None)
        return gradients

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
        threads: int | None = None,
    ) -> None:
        taps = Taps(features, self.summed, "cpu", planes=False)
        check_sums(features, taps.widths, labels, valid, limits, bound, sums, shared, shared_taps)
        status = _native.bounded_sums(
            arguments.images(taps, labels, sums.shape[0]),
            arguments.numbers(bound),
            nonnegative,
            shared_taps,
            tuple(map(address, (valid, limits, sums, shared))),
            _number(threads),
        )
        _check_status(status)

    def slot(self, bound: Bound, dim: int) -> NativeSlot:
        return NativeSlot(bound, dim)


class NativeSlot(Slot):
    """The slot of the native core, which acts in backward: one pass over f and its gradient.

    Forward is torch's: its convolutions add the bias as they write, and the core's class sums take
    a row's statistics while it is in the cache.
    """

    adds_bias = False

    def forward(self, x: Tensor, bias: Tensor | None, ceiling: float | None) -> None:
        assert bias is None
        x.relu_() if ceiling is None else x.clamp_(0, ceiling)


CORE = Native()


def rectified_gradient(
    tap: Tensor,
    incoming: Tensor | None,
    ceiling: float | None,
    labels: Tensor | None,
    num_classes: int,
    bound: Bound,
    buffers: Buffers,
    threads: int | None = None,
) -> Tensor:
    """Gradient of the input of the ReLU that a tap f comes from: (incoming + E) [0 < f < ceiling].

    E is what `Native.backward` would write for this tap.

    Args:
        tap: f, [n, C, H, W], channels-last.
        incoming: what reaches f from elsewhere, with its shape and dtype; None: nothing.
        ceiling: of the ReLU; None: it has none.
        buffers: scale, projection and coefficients [N, n]; upstream [M, K, C H W], this tap's
            columns of the gradient with respect to the means.

    Returns:
        A new tensor like f.
    """
    taps = Taps([tap], DTYPES, "cpu", planes=False)
    for name in ("scale", "projection", "coefficients"):
        check_buffer(name, getattr(buffers, name), (bound.norms, taps.n), _CPU)
    size = len(bound.moments), num_classes, taps.dim
    check_buffer("upstream", buffers.upstream, size, _CPU)  # type: ignore[arg-type]
    if ceiling is not None and not ceiling > 0:
        raise ValueError(f"ceiling={ceiling!r}: expected None or a number > 0.")
    if incoming is not None:
        if incoming.shape != tap.shape or incoming.dtype != tap.dtype:
            raise ValueError(f"incoming: {brief(incoming)}, expected it like tap: {brief(tap)}.")
        incoming = Taps([incoming], DTYPES, "cpu", planes=False).tensors[0]
    top = torch.tensor(float("inf") if ceiling is None else ceiling, dtype=tap.dtype).item()
    out = torch.empty_like(taps.tensors[0], memory_format=torch.preserve_format)
    labels = _checked_labels(labels, taps.n)
    images = arguments.images(taps, labels, num_classes, [out])
    relu = top, address(incoming), 0 if incoming is None else incoming.stride(0)
    told = arguments.numbers(bound), buffers.addresses()
    _embed(True, GRADIENT, images, *told, labels, threads, relu)
    return out


def _embed(
    is_backward: bool,
    phases: int,
    images: arguments.Images,
    bound: arguments.Numbers,
    buffers: tuple[int, ...],
    labels: Tensor | None,
    threads: int | None,
    relu: tuple[float, int, int] = _NO_RELU,
) -> None:
    status = _native.mean_embedding(
        is_backward, phases, images, bound, buffers, relu, _number(threads)
    )
    if status == _LABEL_OUT_OF_RANGE and labels is not None:
        refuse_values(labels, images[-1])
    _check_status(status)


def _step(
    shape: tuple[int, ...],
    buffers: tuple[int, int, int],
    step: Step,
    gradient: int,
    value: Tensor,
    threads: int | None,
) -> None:
    told = arguments.estimator(shape, buffers, step, gradient, value.data_ptr())
    _check_status(_native.estimator(*told, _number(threads)))


def _empty(size: int | Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """What the core writes: float32 on the CPU, whatever torch's defaults are."""
    return torch.empty(size, dtype=dtype, device=_CPU)


def _number(threads: int | None) -> int:
    return torch.get_num_threads() if threads is None else threads


def _checked_labels(labels: Tensor | None, n: int) -> Tensor | None:
    if labels is None:
        return None
    check_labels(labels, n, _CPU, "the CPU")
    return labels.contiguous()


def _check_status(status: int) -> None:
    if status:
        raise MemoryError(f"dpmmd._native: no workspace (status {status}).")
