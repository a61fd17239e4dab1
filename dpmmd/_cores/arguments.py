"""What the two native cores are told: numbers and addresses, in the groups of csrc/bindings.h."""

from __future__ import annotations

import torch
from torch import Tensor

from dpmmd._contract.checks import address
from dpmmd._contract.taps import Taps
from dpmmd.bounds import Bound

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}


# The taps, their type, n, the labels, K; see csrc/bindings.h, which has this name too.
Images = tuple[list[tuple[int, int, int, int, int]], int, int, int, int]
Numbers = tuple[int, bool, bool, bool, float, float]  # the bound there


def images(
    taps: Taps, labels: Tensor | None, num_classes: int, gradients: list[Tensor] | None = None
) -> Images:
    """The taps and, where given, their gradients; the labels."""
    return taps.for_native(gradients), TYPES[taps.dtype], taps.n, address(labels), num_classes


def numbers(bound: Bound) -> Numbers:
    return bound.bits, bound.ball, bound.per_tap, bound.joint, bound.clip, bound.weight
