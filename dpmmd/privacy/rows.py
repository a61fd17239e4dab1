"""The rows of a release, as those see them who use it: modes that stand out from their noise.

A release with modes holds noised sums of K C cells. A cell that few images are in has a count that
its noise hides, or a mean that is mostly noise. So cells are merged: within a class, along the
binary tree of the modes' bits, the last bit first. A group that does not stand out joins its
sibling; if the sibling is several groups, the smallest of them. In the end every group of a class
stands out, or the class is one group. The merged sums and counts are sums of what was released, so
that all of this costs no privacy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

STANDS_OUT = 4.0  # a group's count, in standard deviations of its noise
LEAST = 30.0  # images that a group has at least
MOST_NOISE = 2.0  # norm of the noise on a group's mean, relative to the bound on that mean


@dataclass(frozen=True, eq=False)
class Rows:
    """What generated images are matched with: A rows of K classes; without modes the classes.

    Rows are ordered mode by mode: the first row of every class, then the second of those classes
    that have one, and so on, so that rows in turn alternate classes.

    Attributes:
        classes: int64 [A], the class of each row.
        cells: of each row the cells k C + mode that make it; without modes its class.
        counts: images of each row, float64 [A], at least 1: the divisors.
        sums: noised sums of the features of each row, float32 [M, A, D].
        selection: those of the selection block, float32 [A, D'], or None.
    """

    classes: Tensor
    cells: tuple[tuple[int, ...], ...]
    counts: Tensor
    sums: Tensor
    selection: Tensor | None

    @classmethod
    def of(
        cls, counts: Tensor, sums: Tensor, selection: Tensor | None, per_class: int, needed: float
    ) -> Rows:
        """The rows of released numbers.

        Args:
            counts: as released, float64 [K C].
            sums: float32 [M, K C, D].
            selection: float32 [K C, D'], or None.
            per_class: C; 1 without modes: then every class is a row.
            needed: images that a cell must have to stand out from its noise.
        """
        if per_class == 1:
            classes = torch.arange(len(counts))
            return cls(classes, tuple((k,) for k in classes.tolist()), counts, sums, selection)
        by_class = [
            [tuple(k * per_class + cell for cell in group) for group in groups(own, needed)]
            for k, own in enumerate(counts.view(-1, per_class).tolist())
        ]
        cells = tuple(
            group for turn in zip_longest(*by_class) for group in turn if group is not None
        )
        return cls(
            torch.tensor([group[0] // per_class for group in cells]),
            cells,
            _merged(counts, cells, 0).clamp(min=1.0),
            _merged(sums, cells, 1),
            None if selection is None else _merged(selection, cells, 0),
        )


def needed(count_sd: float, noise_norm: float) -> float:
    """How many images a cell must have to stand out from its noise.

    Args:
        count_sd: standard deviation of the noise on a cell's count, in images.
        noise_norm: expected norm of the noise on a cell's sum of features, where an image adds a
            vector of norm 1.
    """
    return max(STANDS_OUT * count_sd, noise_norm / MOST_NOISE)


def stands_out(count: float, cells: int, needed: float) -> bool:
    """Whether the released count of so many cells, whose noises add up, is more than noise."""
    return count >= max(LEAST, needed * math.sqrt(cells))


def groups(counts: list[float], needed: float) -> list[tuple[int, ...]]:
    """Cells of one class, merged until every group stands out or there is one group.

    Args:
        counts: as released, one a cell, 2^J of them.
        needed: images that one of them must have.

    Returns:
        Disjoint groups of cells 0..2^J - 1, each in ascending order, by their first cells.
    """

    def size(group: tuple[int, ...]) -> float:
        return sum(counts[cell] for cell in group)

    def hidden(group: tuple[int, ...]) -> bool:
        return not stands_out(size(group), len(group), needed)

    def below(cells: range) -> list[tuple[int, ...]]:
        """The groups of a node; several only if each of them stands out."""
        if len(cells) == 1:
            return [(cells[0],)]
        half = len(cells) // 2
        found = below(cells[:half]) + below(cells[half:])
        while len(found) > 1 and (weak := next(filter(hidden, found), None)) is not None:
            found.remove(weak)
            nearest = min(found, key=size)
            found.remove(nearest)
            found = sorted([*found, tuple(sorted(nearest + weak))])
        return found

    return below(range(len(counts)))


def _merged(values: Tensor, cells: tuple[tuple[int, ...], ...], axis: int) -> Tensor:
    """Sums over the cells of each group, in float64 and rounded once."""
    own = [values.index_select(axis, torch.tensor(group)) for group in cells]
    return torch.stack([part.double().sum(axis) for part in own], axis).to(values.dtype)
