"""What an implementation of the operations provides: four of them do, one file each.

`dpmmd.backends` picks one; `dpmmd._ops` gives what it computes to autograd and torch.library;
`dpmmd.injection` and `dpmmd.privacy.sums` ask it for a slot and for integer sums.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dpmmd._contract.checks import check_apart, check_buffer
from dpmmd._contract.lending import Lent, settle
from dpmmd._contract.slot import Slot
from dpmmd.bounds import Bound


class Saved(NamedTuple):
    """What a forward pass leaves for its backward pass, beside labels and features.

    Attributes:
        scale, projection: [N, n, B]: per norm, image and block of taps.
        schedule: int32, the labels in the order that a GPU core sorts them in; empty elsewhere.
    """

    scale: Tensor
    projection: Tensor
    schedule: Tensor


class Step(NamedTuple):
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

    def state(self) -> dict[str, Tensor]:
        """The tensors that it changes in place, by name."""
        if self.estimator == "batch":
            return {}
        states = {
            "estimate": self.estimate,
            "first_moment": self.first_moment,
            "second_moment": self.second_moment,
            "steps": self.steps,
        }
        return {name: state for name, state in states.items() if state is not None}

    def check(self, target: Tensor, shape: Sequence[int], device: torch.device) -> None:
        """Refuses a target and a state that a core could not take by their addresses.

        Args:
            shape: [M, K, D], of the means.
        """
        state = self.state()
        for name, buffer in {"target": target, **state}.items():
            check_buffer(name, buffer, shape[1:2] if name == "steps" else shape, device)
        check_apart(state, {"target": target})

    def settle(self) -> None:
        """Before any core moves the state: whoever the estimate is lent to gets a copy."""
        if self.update and self.estimate is not None:
            settle(self.estimate)

    def mark(self) -> None:
        """Tells autograd that the state has moved, if it has."""
        if self.update:
            for state in self.state().values():
                torch.autograd.graph.increment_version(state)


class Matched(NamedTuple):
    """What `Core.match` leaves for `Core.match_backward`, beside labels and features.

    Attributes:
        saved: as `Core.forward` leaves it; None of a core that has all in ``gradient``.
        gradient: [M, K, D], of the loss in the means. A core that never forms the means, or keeps
            them elsewhere, leaves here what its `match_backward` needs in the place of it.
        lent: the estimate, if `match_backward` reads it in the place of a gradient.
    """

    saved: Saved | None
    gradient: Tensor
    lent: Lent | None = None


class Core(Protocol):
    """One implementation.

    Attributes:
        name: as `dpmmd.backends.BACKENDS` has it.
        opaque: whether it takes tensors by their addresses, so that what traces must see an
            operator of torch.library in its place.
        summed: dtypes of the features that `bounded_sums` takes.
    """

    name: str
    opaque: bool = True
    summed: tuple[torch.dtype, ...] = ()

    def check(self, origin: str, device: str, dtype: torch.dtype) -> None:
        """Raises a ValueError, which starts with ``origin``, if it cannot run such tensors."""
        return

    def forward(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        slots: Sequence[Slot | None] | None = None,
    ) -> tuple[Tensor, Tensor, Saved]:
        """Class means [M, K, D] and counts [K], and what `backward` needs.

        ``slots`` are this core's own, one a tap: what a tap's ReLU has left in its slot is taken.
        """
        ...

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
        """The gradient of each tap, in its shape, dtype and memory format.

        It is without elements where none is needed, and for a tap with a slot, which gets what its
        ReLU needs to make it.
        """
        ...

    def schedule_size(self, n: int, num_classes: int | None) -> int:
        """Length of `Saved.schedule`; ``num_classes`` is None without labels."""
        return 0

    def estimate(
        self, means: Tensor, counts: Tensor, target: Tensor, step: Step
    ) -> tuple[Tensor, Tensor | None]:
        """Loss of an estimator and its gradient [M, K, D] in the means; moves the state.

        The gradient is None of a core that is not opaque: autograd has it. The caller settles the
        step (`Step.settle`) before, where nothing traces.
        """
        ...

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
        """Loss of an estimator's step on the features' mean embedding; moves the state.

        Of an opaque core; target and state are float32, on the device of the features. What a later
        call of `match` moves, or writes in place, must not be what `match_backward` needs. The
        caller settles the step (`Step.settle`) before and marks it (`Step.mark`) afterwards.
        """
        means, counts, saved = self.forward(features, labels, num_classes, bound, slots)
        value, gradient = self.estimate(means, counts, target, step)
        assert gradient is not None
        return value, Matched(saved, gradient)

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
        """The gradient of each tap, as of `backward`; ``grad`` is the scalar that reaches the loss.

        It may run several times for one `match` (``retain_graph=True``).
        """
        saved = matched.saved
        assert saved is not None
        upstream = times(matched.gradient, grad)
        return self.backward(features, labels, num_classes, bound, saved, upstream, needed, slots)

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
        """Adds the bounded integer vectors of a batch to int64 class sums.

        What the images hold never raises: rows that are not valid, whose label is not in 0..K-1,
        whose limit is not in 1..2^30 or which fail the certificate add nothing.

        Args:
            features: L tensors [n, ...], of a dtype in `summed`.
            labels: int64 [n].
            valid: bool [n].
            limits: int64 [n], greatest norm of each image's vector in grid units.
            bound, nonnegative: as `dpmmd.privacy.sums.PrivateSums.add`, the definition.
            sums: int64 [K, M D'], D' the columns of the taps that are not shared; added to.
            shared: int64 [1, M (D - D')], added to whatever the label; None without shared taps.
            shared_taps: how many leading taps are shared by all classes.
        """
        ...

    def slot(self, bound: Bound, dim: int) -> Slot | None:
        """A new slot of `dpmmd.injection` for one tap and pass; None: this core has none."""
        return None


def times(gradient: Tensor, grad: Tensor) -> Tensor:
    """``gradient * grad`` of a scalar ``grad``; the same tensor where that is known to be 1."""
    return gradient if is_one(grad) else gradient * grad


def is_one(grad: Tensor) -> bool:
    """Whether a scalar is known to be 1, the usual case, which then costs no pass and no memory.

    While a graph is traced (the tensor is of another class then) there is no value to look at, and
    one on a device would have to be waited for, which a CUDA graph cannot capture.
    """
    return type(grad) is Tensor and grad.is_cpu and grad.item() == 1.0
