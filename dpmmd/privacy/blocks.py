"""The blocks of the released vector, each described once.

The released vector is the concatenation of blocks. An image adds one vector to each block, of norm
at most 2^30 times the block's weight; `sensitivity` bounds what one unit can move of all of them
together. A new block is one entry of KINDS and an array of its name in `Release`: its size, sign
and place follow from here, for those who sum and noise it and for those who check a file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dpmmd.bounds import Bound
from dpmmd.privacy.metadata import BlockRecord
from dpmmd.privacy.sensitivity import Block
from dpmmd.privacy.sums import GRID_BITS, PrivateSums

GRID = 1 << GRID_BITS


@dataclass(frozen=True)
class Kind:
    """What a block of sums holds.

    Attributes:
        encoder: whose features are summed, by the encoder's name in `Metadata`.
        weight: what one image may contribute by default, relative to 2^30.
        products: whether the products q q' are summed, and not the vectors q. Such a block may have
            the weight 0: it is then left out.
        pooled: whether all classes share one row.
    """

    encoder: str
    weight: float
    products: bool = False
    pooled: bool = False


# In the order of the released vector. A selection block of 0.25 adds 3 % to the noise.
KINDS = {
    "phi1": Kind("encoder", 1.0),
    "phi2": Kind("encoder", 1.0),
    "phi1+phi2": Kind("encoder", 1.0),
    "pixels": Kind("pixel_encoder", 0.7),
    "products": Kind("pixel_encoder", 0.7, products=True, pooled=True),
    "class_products": Kind("pixel_encoder", 0.0, products=True),
    "selection": Kind("selection_encoder", 0.25),
}
# Beside signed sums under replace-one the counts are free; elsewhere 0.1 adds 0.5 % to the noise,
# and class counts get noise of about 53 images at epsilon = 1.
COUNTS = 0.1


@dataclass(frozen=True)
class Features:
    """An encoder as its blocks see it.

    Attributes:
        sizes: the number of features of each tap.
        nonnegative: whether no feature is below 0, for any image.
    """

    sizes: tuple[int, ...]
    nonnegative: bool

    @classmethod
    def of(cls, spec: Mapping[str, Any]) -> Features:
        """Of what a release records of an encoder (`Encoder.spec`)."""
        sizes = tuple(math.prod(tap["shape"]) for tap in spec["taps"])
        return cls(sizes, all(tap["sign"] == "nonnegative" for tap in spec["taps"]))


@dataclass(frozen=True)
class Part:
    """A block of sums and what is summed in it.

    Attributes:
        block: what `sensitivity` counts; its bound is in grid units.
        features: of its encoder.
        bound: of an image's vector.
        shared_taps: the first so many taps are summed over all classes.
    """

    block: Block
    kind: Kind
    features: Features
    bound: Bound
    shared_taps: int

    @property
    def width(self) -> int:
        """Features of an image."""
        return sum(self.features.sizes)

    @property
    def shared(self) -> int:
        """Numbers that all classes share."""
        if self.kind.products:
            return self.width * (self.width + 1) // 2 if self.kind.pooled else 0
        return sum(self.features.sizes[: self.shared_taps]) * len(self.bound.moments)

    @property
    def dim(self) -> int:
        """Columns of a class."""
        if self.kind.products:
            return 0 if self.kind.pooled else self.width * (self.width + 1) // 2
        return self.width * len(self.bound.moments) - self.shared

    @property
    def unit(self) -> float:
        """What one grid unit is worth in the released sums."""
        return self.bound.clip / self.block.bound

    @property
    def by_mode(self) -> bool:
        """Whether a release with modes sums it by class and mode, and not by class alone."""
        return self.kind.encoder != "pixel_encoder"

    @property
    def is_phi(self) -> bool:
        """Whether it is of the features to be matched: those blocks are released as one array."""
        return self.kind.encoder == "encoder"

    def shape(self, classes: int) -> tuple[int, ...]:
        """Of its array in the release, where it has one of its own."""
        if not self.kind.products:
            return classes, self.dim
        square = (self.width, self.width)
        return square if self.kind.pooled else (classes, *square)

    def zero(self, classes: int, device: torch.device) -> PrivateSums:
        """Sums of no image."""
        if self.kind.products:
            rows = self.width if self.kind.pooled else classes * self.width
            return PrivateSums(rows, self.width, device=device)
        return PrivateSums(classes, self.dim, self.shared, device)


@dataclass(frozen=True, eq=False)
class Raw:
    """The exact sums of every part, and of the counts: private, until noise is added."""

    parts: tuple[PrivateSums, ...]
    counts: PrivateSums | None

    @property
    def all(self) -> tuple[PrivateSums, ...]:
        return self.parts if self.counts is None else (*self.parts, self.counts)


@dataclass(frozen=True)
class Blocks:
    """All blocks of a release: the parts, and the counts if there are any.

    Attributes:
        classes: K.
        per_class: C, the rows of a class in the counts and in the parts that are by mode.
    """

    parts: tuple[Part, ...]
    counts: Block | None
    classes: int
    per_class: int = 1

    @classmethod
    def of(
        cls,
        features: Mapping[str, Features],
        bound: Bound,
        *,
        classes: int,
        shared_taps: int,
        weights: Mapping[str, float] | None,
        with_counts: bool,
        grouped: bool,
        per_class: int = 1,
    ) -> Blocks:
        """The blocks of these encoders, which are named as in `Metadata`.

        Args:
            grouped: whether a unit is a group of images, which may reach the rows of many classes.
            per_class: C, the modes of a class; 1 without modes.

        Raises:
            ValueError: a weight of no block, or out of range.
        """
        given = dict(weights or {})
        bounds = {"+".join(f"phi{m}" for m in alone.moments): alone for alone in bound.alone()}
        names = list(bounds)  # none without features: a bound of no moments
        for name, kind in KINDS.items():
            if kind.encoder == "encoder" or kind.encoder not in features:
                continue
            if kind.products and given.get(name, kind.weight) == 0:
                given.pop(name, None)
            else:
                names.append(name)
        _check(given, [*names, *["counts"] * with_counts])

        def grid(name: str, weight: float) -> float:
            return float(round(given.get(name, weight) * GRID))

        parts = []
        for name in names:
            kind, one = KINDS[name], bounds.get(name, Bound())
            its, shared = features[kind.encoder], shared_taps if name in bounds else 0
            nonnegative = kind.products or one.moments == (2,) or its.nonnegative
            # With modes, what is summed by class stays in its row while the counts move.
            by_class = per_class > 1 and kind.encoder == "pixel_encoder"
            spread = grouped or shared > 0 or kind.pooled or by_class
            block = Block(name, "sums", grid(name, kind.weight), nonnegative, spread)
            parts.append(Part(block, kind, its, one, shared))
        counts = Block("counts", "counts", grid("counts", COUNTS), False, grouped)
        return cls(tuple(parts), counts if with_counts else None, classes, per_class)

    @property
    def cells(self) -> int:
        """K C."""
        return self.classes * self.per_class

    def rows(self, part: Part) -> int:
        """Rows of a part's sums: K C of those that are by mode, K of the others."""
        return self.cells if part.by_mode else self.classes

    def all(self) -> list[Block]:
        """Every block, in the order of the released vector."""
        return [part.block for part in self.parts] + ([self.counts] if self.counts else [])

    def zero(self, device: torch.device) -> Raw:
        """Sums of no image."""
        parts = tuple(part.zero(self.rows(part), device) for part in self.parts)
        counts = None if self.counts is None else PrivateSums(self.cells, 1, device=device)
        return Raw(parts, counts)

    def records(self) -> tuple[BlockRecord, ...]:
        """What a release's metadata say of them."""
        sizes = [(self.rows(part) * part.dim, part.shared) for part in self.parts]
        sizes.append((self.cells, 0))
        return tuple(
            BlockRecord(
                name=block.name,
                kind="counts" if block.kind == "counts" else "sums",
                bound=block.bound / GRID,
                nonnegative=block.nonnegative,
                spread=block.spread,
                size=by_class + shared,
                shared=shared,
            )
            for block, (by_class, shared) in zip(self.all(), sizes, strict=False)
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every array of a release, by its name in `Release`."""
        first = self.parts[0]
        n = len(first.bound.moments)  # of a joint block, moments lie side by side
        moments = sum(len(part.bound.moments) for part in self.parts if part.is_phi)
        dim = first.dim // n if moments else 0
        shapes = {"sums": (moments, self.cells, dim), "counts": (self.cells,)}
        if first.shared_taps:
            shapes["shared"] = (moments, 1, first.shared // n)
        return shapes | {
            part.block.name: part.shape(self.rows(part)) for part in self.parts if not part.is_phi
        }


def _check(weights: Mapping[str, float], names: list[str]) -> None:
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"weights: unknown block {name!r}, this release has {names}.")
        if not 2.0**-20 <= weight <= 1.0:
            raise ValueError(f"weights[{name!r}]={weight!r}: expected a number in [2^-20, 1].")
