"""The Triton core: the kernels of `dpmmd.kernels`, which are imported when they first run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dpmmd._contract.lending import is_lendable, lend
from dpmmd._contract.protocol import Core, Matched, Saved, Step
from dpmmd._contract.slot import Slot, written
from dpmmd._contract.taps import DTYPES
from dpmmd.bounds import Bound

if TYPE_CHECKING:
    from dpmmd.kernels.gradient import Terms
    from dpmmd.kernels.taps import Taps


def hindrance() -> str | None:
    """Why no kernel can be compiled on this machine; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "Triton finds no C compiler"
    return None


class Triton(Core):
    """The core of GPU kernels that are compiled at their first launch."""

    name = "triton"
    summed = DTYPES

    def check(self, origin: str, device: str, dtype: torch.dtype) -> None:
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own, for tests
        if (device != "cuda" and not interpreted) or dtype not in DTYPES:
            raise ValueError(
                f"{origin}='triton': cannot run {dtype} on {device}; it takes float32 and bfloat16 "
                "on a CUDA device. Use 'auto', or move the tensors."
            )
        if importlib.util.find_spec("triton") is None:
            raise ValueError(
                f"{origin}='triton': the package triton is not installed; pip install "
                "'dpmmd[triton]' (builds of PyTorch for CUDA bring it), or use 'auto'."
            )

    def forward(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        slots: Sequence[Slot | None] | None = None,
    ) -> tuple[Tensor, Tensor, Saved]:
        from dpmmd.kernels import injection, mean_embedding

        if slots is None:
            return mean_embedding.forward(features, labels, num_classes, bound)
        return injection.forward(features, _partials(slots), labels, num_classes, bound)

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
        from dpmmd.kernels import injection, mean_embedding

        if slots is None:
            return mean_embedding.backward(
                features, labels, num_classes, bound, saved, upstream, needed
            )
        places, terms, gradients = injection.backward(
            features, labels, bound, saved, upstream.contiguous(), written(needed, slots)
        )
        _leave(slots, needed, places, terms)
        return gradients

    def schedule_size(self, n: int, num_classes: int | None) -> int:
        from dpmmd.kernels.schedule import size

        return size(n, num_classes)

    def estimate(
        self, means: Tensor, counts: Tensor, target: Tensor, step: Step
    ) -> tuple[Tensor, Tensor | None]:
        from dpmmd.kernels.estimator import estimate

        return estimate(means, counts, target, step)

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
        """In one pass, which writes no means, for an "adam" step and taps in order of columns."""
        from dpmmd.kernels import matching
        from dpmmd.kernels.taps import Taps

        estimate = step.estimate
        moves = step.estimator == "adam" and step.update
        if not moves or estimate is None or not is_lendable():
            return super().match(features, labels, num_classes, bound, target, step, slots)
        taps = Taps(features, planes=slots is None)
        if taps.planes:
            return super().match(features, labels, num_classes, bound, target, step, slots)
        partials = None if slots is None else _partials(slots)
        value, saved, coefficients = matching.forward(
            taps, labels, num_classes, bound, target, step, partials
        )
        return value, Matched(saved, coefficients, lend(estimate))

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
        from dpmmd.kernels import matching
        from dpmmd.kernels.taps import Taps

        saved, coefficients, lent = matched
        if lent is None or saved is None:
            return super().match_backward(
                features, labels, num_classes, bound, matched, grad, needed, slots
            )
        taps = Taps(features, planes=False)  # hooks on saved tensors may have changed the layout
        terms, gradients = matching.backward(
            taps,
            labels,
            num_classes,
            bound,
            saved,
            coefficients,
            lent.read(),
            grad,
            written(needed, slots),
        )
        if slots is not None:
            _leave(slots, needed, taps.places(), terms)
        lent.finish()
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
    ) -> None:
        from dpmmd.kernels.bounded_sums import bounded_sums

        bounded_sums(
            features,
            labels,
            valid,
            limits,
            bound=bound,
            nonnegative=nonnegative,
            sums=sums,
            shared=shared,
            shared_taps=shared_taps,
        )

    def slot(self, bound: Bound, dim: int) -> Slot | None:
        return _Slot(bound, dim)


def _partials(slots: Sequence[Slot | None]) -> list[Tensor | None]:
    """The partial statistics that taps bring in their slots."""
    return [slot.take_partials() if isinstance(slot, _Slot) else None for slot in slots]


def _leave(
    slots: Sequence[Slot | None], needed: Sequence[bool], places: Taps, terms: Terms
) -> None:
    """Leaves in each slot what makes the gradient that its ReLU adds to its own."""
    from dpmmd.kernels.gradient import rectified_gradient

    for column, (slot, wanted) in enumerate(zip(slots, needed, strict=True)):
        if slot is not None and wanted:
            slot.left = partial(rectified_gradient, places, column, terms)


class _Slot(Slot):
    """One pass over x forward, one over f and its gradient backward.

    Attributes:
        partials: partial statistics of f, from the ReLU.
    """

    partials: Tensor | None = None

    def forward(self, x: Tensor, bias: Tensor | None, ceiling: float | None) -> None:
        from dpmmd.kernels.row_statistics import rectify

        self.partials = rectify(x, bias, ceiling, self.bound, self.dim)

    def take_partials(self) -> Tensor | None:
        """The partial statistics, which the slot then holds no longer."""
        partials, self.partials = self.partials, None
        return partials


CORE = Triton()
