"""What the two native cores are told: numbers and addresses, in the groups of csrc/bindings.h."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpmmd._contract.checks import address
from dpmmd._contract.protocol import Step
from dpmmd._contract.taps import Taps
from dpmmd.bounds import Bound

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_ESTIMATORS = {"batch": 0, "ema": 1, "adam": 2}


# The taps, their type, n, the labels, K; see csrc/bindings.h, which has this name too.
Images = tuple[list[tuple[int, int, int, int, int]], int, int, int, int]


class Buffers(NamedTuple):
    """What an embedding's operations read and write besides the taps; None: not of this one."""

    scale: Tensor
    projection: Tensor
    means: Tensor | None = None
    counts: Tensor | None = None
    upstream: Tensor | None = None
    coefficients: Tensor | None = None

    def addresses(self) -> tuple[int, ...]:
        return tuple([address(buffer) for buffer in self])


def images(
    taps: Taps, labels: Tensor | None, num_classes: int, gradients: list[Tensor] | None = None
) -> Images:
    """The taps and, where given, their gradients; the labels."""
    return taps.for_native(gradients), TYPES[taps.dtype], taps.n, address(labels), num_classes


def numbers(bound: Bound) -> tuple[int, bool, bool, bool, float, float]:
    return bound.bits, bound.ball, bound.per_tap, bound.joint, bound.clip, bound.weight


def estimator(
    means: Tensor, counts: Tensor, target: Tensor, step: Step, gradient: Tensor, value: Tensor
) -> tuple[int, bool, tuple[int, ...], tuple[int, ...], tuple[float, float, float]]:
    """Which estimator, whether its state moves, [M, K, D], the buffers and the rates."""
    states = step.estimate, step.first_moment, step.second_moment, step.steps
    buffers = means, counts, target, *states, gradient, value
    count = max(means.numel(), 1) if step.numbers is None else step.numbers
    return (
        _ESTIMATORS[step.estimator],
        step.update,
        tuple(means.shape),
        tuple([address(buffer) for buffer in buffers]),
        (step.decay, step.lr, float(count)),
    )
