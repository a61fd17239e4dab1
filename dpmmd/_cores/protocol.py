"""What an implementation of the operations provides: four of them do, one file each.

`dpmmd.backends` picks one; `dpmmd._ops` gives what it computes to autograd and torch.library;
`dpmmd.injection` and `dpmmd.privacy.sums` ask it for a slot and for integer sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor

from dpmmd.bounds import Bound

if TYPE_CHECKING:
    import torch


class Saved(NamedTuple):
    """What a forward pass leaves for its backward pass, beside labels and features.

    Attributes:
        scale, projection: float32 [N, n, B]: per norm, image and block of taps.
        schedule: int32, the labels in the order that a GPU core sorts them in; empty elsewhere.
    """

    scale: Tensor
    projection: Tensor
    schedule: Tensor


@dataclass(frozen=True)
class Step:
    """One step of an estimator of target - means: which one, its state, its rates.

    Attributes:
        estimator: ``"batch"``, ``"ema"`` or ``"adam"``.
        estimate, first_moment, second_moment: [M, K, D]; changed in place.
        steps: [K]; changed in place.
        decay: of ``"ema"``.
        lr: of ``"adam"``.
        numbers: over how many numbers the mean of ``"adam"`` goes; None: M K D.
        update: whether the state moves.
    """

    estimator: str = "batch"
    estimate: Tensor | None = None
    steps: Tensor | None = None
    first_moment: Tensor | None = None
    second_moment: Tensor | None = None
    decay: float = 0.0
    lr: float = 0.0
    numbers: int | None = None
    update: bool = True


class Core(Protocol):
    """One implementation.

    Attributes:
        name: as `dpmmd.backends.BACKENDS` has it.
    """

    name: str

    def check(self, origin: str, device: str, dtype: torch.dtype) -> None:
        """Raises a ValueError, which starts with ``origin``, if it cannot run such tensors."""

    def forward(
        self, features: Sequence[Tensor], labels: Tensor | None, num_classes: int, bound: Bound
    ) -> tuple[Tensor, Tensor, Saved]:
        """Class means [M, K, D] and counts [K], and what `backward` needs."""

    def backward(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        saved: Saved,
        upstream: Tensor,
        needed: Sequence[bool],
    ) -> list[Tensor]:
        """The gradient of each tap, in its shape, dtype and memory format; empty if not needed."""

    def schedule_size(self, n: int, num_classes: int | None) -> int:
        """Length of `Saved.schedule`."""

    def estimate(
        self, means: Tensor, counts: Tensor, target: Tensor, step: Step
    ) -> tuple[Tensor, Tensor]:
        """Loss of an estimator and its gradient [M, K, D] in the means; moves the state."""

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
        """Adds the bounded integer vectors of a batch to int64 sums: `PrivateSums.add` exactly."""

    def slot(self, bound: Bound, dim: int) -> Any:
        """A new slot of `dpmmd.injection` for one tap and pass; None: this core has none."""
