"""The only step that opens raw sums: S becomes R = S + round(sd N(0, I)), once.

S is a vector of integers, so that S + round(X) = round(S + X): R is a function of the real-valued
Gaussian mechanism's output, and is as private. Scaling and rounding R afterwards costs nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpmmd._memory import return_freed_memory
from dpmmd.privacy.blocks import Blocks, Part, Raw
from dpmmd.privacy.sums import PrivateSums

Sampler = Callable[[int, float], np.ndarray]  # n, sd -> int64 [n]


@dataclass(frozen=True, eq=False)
class Noised:
    """Numbers that have their noise: whatever is done with them costs no privacy.

    Attributes:
        arrays: those of the release by name, float32, but for the counts.
        counts: noised counts of classes, or of classes and modes, float64 [K C], or None.
    """

    arrays: Mapping[str, Tensor]
    counts: Tensor | None


def noise(raw: Raw, blocks: Blocks, sd: float, sampler: Sampler) -> Noised:
    """Takes every sum, once, and gives every number of it a draw of its own, of the same sd.

    So the noise of the whole vector is N(0, sd^2 I), rounded, whatever blocks it is made of; what
    is above the diagonal of products stands for two equal numbers (`_noised_products`). Nothing but
    the noised numbers leaves: each block's raw sums are gone when the next one is taken.
    """
    arrays: dict[str, Tensor] = {}
    phi: list[tuple[Tensor, Tensor]] = []  # of every moment, by class and shared
    for part, sums in zip(blocks.parts, raw.parts, strict=True):
        if part.kind.products:
            arrays[part.block.name] = _noised_products(part, sums, sd, sampler)
            continue
        by_class, shared = _noised(sums, sd, sampler, part.unit)
        if part.is_phi:
            n = len(part.bound.moments)  # of a joint block, moments lie side by side
            phi += zip(by_class.chunk(n, dim=1), shared.chunk(n, dim=1), strict=True)
        else:
            arrays[part.block.name] = by_class
    arrays["sums"] = torch.zeros(0, blocks.cells, 0)
    if phi:
        arrays["sums"] = torch.stack([sums for sums, _ in phi]).float().contiguous()  # [M, K C, D]
    if blocks.parts[0].shared_taps:
        arrays["shared"] = torch.stack([shared for _, shared in phi]).float()
    counts = None
    if raw.counts is not None and blocks.counts is not None:
        unit = 1 / blocks.counts.bound
        counts = _noised(raw.counts, sd, sampler, unit, torch.float64)[0][:, 0]
    return Noised(arrays, counts)


def _noised(
    sums: PrivateSums, sd: float, sampler: Sampler, unit: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """S + integer noise, then in float64 times what a grid unit is worth, rounded; S is gone."""
    by_class, shared = (with_noise(whole, sd, sampler, unit, dtype) for whole in sums.take())
    return_freed_memory()  # or the process keeps what S took, and what comes after takes more
    return by_class, shared


def _noised_products(part: Part, sums: PrivateSums, sd: float, sampler: Sampler) -> Tensor:
    """The same of products: symmetric [K, d, d], or [d, d] of all classes.

    What is noised is the diagonal and, times sqrt(2), what is above it (`sensitivity`). Noise of
    sd on sqrt(2) S is noise of sd / sqrt(2) on S.
    """
    taken, unit = sums.take()[0], part.unit
    d = taken.shape[1]
    rows, columns = torch.triu_indices(d, d, 1)
    result = torch.empty(taken.shape).view(-1, d, d)
    for square, out in zip(taken.view(-1, d, d), result, strict=True):
        out.diagonal().copy_(with_noise(square.diagonal().clone(), sd, sampler, unit))
        above = with_noise(square[rows, columns], sd / math.sqrt(2), sampler, unit)
        out[rows, columns] = out[columns, rows] = above
    return result[0] if part.kind.pooled else result


def with_noise(
    whole: Tensor, sd: float, sampler: Sampler, unit: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A piece at a time: nothing of the size of ``whole`` is held beside it and the result."""
    result = torch.empty(whole.shape, dtype=dtype)
    for values, out in zip(*(t.view(-1).split(1 << 22) for t in (whole, result)), strict=True):
        drawn = np.asarray(sampler(values.numel(), sd), np.int64)
        values += torch.from_numpy(drawn).view_as(values)
        out.copy_(values.double() * unit)
    return result
