"""The native core's losses: of means, and of features in one step between two buffers.

It is apart from `dpmmd._cores.cpu` since no release is made with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dpmmd._contract.checks import check_buffer, check_estimate
from dpmmd._contract.protocol import Matched, Step, is_one
from dpmmd._contract.slot import Slot
from dpmmd._contract.taps import DTYPES, Taps
from dpmmd._cores import arguments, blocks, cpu
from dpmmd._cores.calls import call_of, estimator
from dpmmd._cores.cpu import BOTH, CPU, Native, check_status, checked_labels, embed, empty, number
from dpmmd.bounds import Bound


class Matching(Native):
    """The native core, whole."""

    def estimate(
        self,
        means: Tensor,
        counts: Tensor,
        target: Tensor,
        step: Step,
        threads: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        means, counts, target = means.contiguous(), counts.contiguous(), target.contiguous()
        check_estimate(means, counts, target, step.state(), CPU)
        value, gradient = empty(()), empty(means.shape)
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
        labels, target = checked_labels(labels, taps.n), target.contiguous()
        step.check(target, call.means, CPU)
        kept, value, passing = empty(call.numbers), empty(()), empty(call.passing)
        means, start = passing.data_ptr(), kept.data_ptr()
        counts = means + 4 * call.gradient
        factors = start + 4 * call.scale, start + 4 * call.projection
        images = arguments.images(taps, labels, num_classes)
        embed(False, BOTH, images, call.bound, (*factors, means, counts, 0, 0), labels, None)
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
        check_buffer("gradient", kept, (call.numbers,), CPU)
        upstream = kept if is_one(grad) else kept[: call.gradient] * grad
        if taps.planes:  # which they were not in `match`: hooks have brought them back so
            upstream = taps.from_columns(upstream[: call.gradient].view(call.means))
        gradients, coefficients = blocks.empty_gradients(taps, needed), empty(call.statistics)
        labels, start = checked_labels(labels, taps.n), kept.data_ptr()
        factors = start + 4 * call.scale, start + 4 * call.projection
        buffers = *factors, 0, 0, upstream.data_ptr(), coefficients.data_ptr()
        images = arguments.images(taps, labels, num_classes, gradients)
        embed(True, BOTH, images, call.bound, buffers, labels, None)
        return gradients


def _step(
    shape: tuple[int, ...],
    buffers: tuple[int, int, int],
    step: Step,
    gradient: int,
    value: Tensor,
    threads: int | None,
) -> None:
    told = estimator(shape, buffers, step, gradient, value.data_ptr())
    check_status(cpu._native.estimator(*told, number(threads)))


CORE = Matching()
