"""The Triton core: the kernels of `dpmmd.kernels`, which are imported when they first run."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from dpmmd._contract.protocol import Core, Saved, Step
from dpmmd._contract.slot import Slot, written
from dpmmd._contract.taps import DTYPES
from dpmmd.bounds import Bound


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
        partials = [slot.take_partials() if isinstance(slot, _Slot) else None for slot in slots]
        return injection.forward(features, partials, labels, num_classes, bound)

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
        from dpmmd.kernels import gradient, injection, mean_embedding

        if slots is None:
            return mean_embedding.backward(
                features, labels, num_classes, bound, saved, upstream, needed
            )
        places, terms, gradients = injection.backward(
            features, labels, bound, saved, upstream.contiguous(), written(needed, slots)
        )
        for column, (slot, wanted) in enumerate(zip(slots, needed, strict=True)):
            if slot is not None and wanted:
                slot.left = partial(gradient.rectified_gradient, places, column, terms)
        return gradients

    def schedule_size(self, n: int, num_classes: int | None) -> int:
        from dpmmd.kernels.schedule import size

        return size(n, num_classes)

    def estimate(
        self, means: Tensor, counts: Tensor, target: Tensor, step: Step
    ) -> tuple[Tensor, Tensor | None]:
        from dpmmd.kernels.estimator import estimate

        return estimate(means, counts, target, step)

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
