"""What the two native cores are told: numbers and addresses, in the groups of csrc/bindings.h."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from dpmmd._contract.checks import address
from dpmmd._contract.plans import plan_of
from dpmmd._contract.protocol import Step
from dpmmd._contract.taps import Taps, statistics_shape
from dpmmd.bounds import Bound

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_ESTIMATORS = {"batch": 0, "ema": 1, "adam": 2}


# The taps, their type, n, the labels, K; see csrc/bindings.h, which has this name too.
Images = tuple[list[tuple[int, int, int, int, int]], int, int, int, int]
Numbers = tuple[int, bool, bool, bool, float, float]  # the bound there


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


class Call:
    """What follows of an operation's taps, classes and bound, and is the same in a later call.

    Attributes:
        statistics: [N, n, B], the shape of scale, projection and coefficients.
        means: [M, K, D].
        bound: as csrc/bindings.h has it.
        gradient, scale, projection: numbers of a gradient [M, K, D], and where the others start
            behind it in one buffer.
        numbers: in that buffer.
    """

    def __init__(self, taps: Taps, num_classes: int, bound: Bound) -> None:
        self.statistics = statistics_shape(bound, taps.n, len(taps.tensors))
        self.means = len(bound.moments), num_classes, taps.dim
        self.bound = numbers(bound)
        self.gradient = prod(self.means)
        self.scale = _whole_lines(self.gradient)
        self.projection = self.scale + _whole_lines(prod(self.statistics))
        self.numbers = self.projection + prod(self.statistics)


def call_of(features: Sequence[Tensor], taps: Taps, num_classes: int, bound: Bound) -> Call:
    """The call over taps that were made of features; of their plan where they have one."""
    plan = plan_of(features)
    if plan is None or plan.bound is not bound or plan.num_classes != num_classes:
        return Call(taps, num_classes, bound)
    return plan.kept.get(Call) or plan.keep(Call, Call(taps, num_classes, bound))


def _whole_lines(numbers: int) -> int:
    """So many float32, rounded up to what fills lines of the cache."""
    return -(-numbers // 16) * 16


def images(
    taps: Taps, labels: Tensor | None, num_classes: int, gradients: list[Tensor] | None = None
) -> Images:
    """The taps and, where given, their gradients; the labels."""
    return taps.for_native(gradients), TYPES[taps.dtype], taps.n, address(labels), num_classes


def numbers(bound: Bound) -> Numbers:
    return bound.bits, bound.ball, bound.per_tap, bound.joint, bound.clip, bound.weight


def estimator(
    shape: tuple[int, ...], buffers: tuple[int, int, int], step: Step, gradient: int, value: int
) -> tuple[int, bool, tuple[int, ...], tuple[int, ...], tuple[float, float, float]]:
    """Which estimator, whether its state moves, [M, K, D], the buffers and the rates.

    Args:
        shape: [M, K, D].
        buffers: addresses of means, counts and target.
        gradient, value: addresses of what is written.
    """
    states = step.estimate, step.first_moment, step.second_moment, step.steps
    count = max(prod(shape), 1) if step.numbers is None else step.numbers
    return (
        _ESTIMATORS[step.estimator],
        step.update,
        shape,
        (*buffers, *map(address, states), gradient, value),
        (step.decay, step.lr, float(count)),
    )
