"""Modes: a frozen public rule that splits every class into C = 2^J disjoint cells.

A release with modes has K C rows in the place of K: an image adds to the row of its class and mode.
The proof needs one thing of the rule. The row of a record is a function of that record alone, of
its image and its label, and lies in 0..K C - 1, whatever the image is (`rows_of`).

The rule, in whole numbers:

1. X = round(65535 x) of an image x in [0, 1]; what is no number is 0.
2. X is brought to ``side`` x ``side`` as `dpmmd.encoders.Encoder` resizes, that is bilinearly, with
   the exact weights: fractions over (2 side)^2 whose sum is rounded once. So X stays in 0..65535.
3. score_j = <w_j, X> with whole |w_j| <= 2^20. At most 3,072 products below 2^36 are summed in
   float64, below 2^48: exactly, in any order, on any device.
4. bit_j = score_j > threshold_kj, k being the label. The first bit is the most significant one of
   the mode, and the row is k C + mode.

Nothing is rounded but in steps 1 and 2, where IEEE 754 and integer division fix the result. So a
row has the same number in every batch, on every device, with any number of threads.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from dpmmd.encoders.pixels import LARGEST
from dpmmd.privacy.metadata import ModesRecord, Statement

LEVELS = 65535  # that a pixel of 1 becomes
MOST_BITS = 16  # J
_WEIGHT = 1 << 20  # the largest |w|
_SCORE = 1 << 49  # the largest |threshold|; no score is as large
_AT_ONCE = 1 << 18  # numbers of images that are taken at once: they stay in cache


@dataclass(frozen=True, eq=False)
class Modes:
    """A public partition of every class into C = 2^J modes.

    `dpmmd.modes.fit` makes one of a release of pixel moments. One that you make by hand must not
    depend on private images, except through the release that ``origin`` states.

    Attributes:
        side: to which images are brought, as squares.
        channels: 1 or 3, of the images.
        directions: int64 [G, J, d] with d = channels * side * side and G = 1 or K: one set of
            directions for all classes or one for each; at most 2^20 in absolute value.
        thresholds: int64 [K, J], of the scores of images whose values are 0 to 65535.
        origin: what the release that they were fitted to promises; None: they are public.

    Raises:
        ValueError: an attribute out of range, or of a shape that does not go with the others.
        TypeError: an attribute of another type.
    """

    side: int
    channels: int
    directions: Tensor
    thresholds: Tensor
    origin: Statement | None = None

    def __post_init__(self) -> None:
        if self.origin is not None and not isinstance(self.origin, Statement):
            raise TypeError(
                f"origin: a {type(self.origin).__name__}, expected a Statement or None."
            )
        if self.channels not in (1, 3):
            raise ValueError(f"channels={self.channels!r}: expected 1 or 3.")
        whole = type(self.side) is int and self.side > 0
        values = self.channels * self.side**2 if whole else 0
        if not 0 < values <= LARGEST:
            raise ValueError(
                f"side={self.side!r}: expected an int >= 1, at most {LARGEST:,} values an image."
            )
        for name, dims, most in (("directions", 3, _WEIGHT), ("thresholds", 2, _SCORE)):
            found = getattr(self, name)
            if not isinstance(found, Tensor) or found.dtype != torch.int64 or found.ndim != dims:
                raise TypeError(f"{name}: expected an int64 tensor of {dims} dimensions.")
            if not found.numel() or not -most <= int(found.min()) <= int(found.max()) <= most:
                raise ValueError(f"{name}: expected whole numbers from -{most} to {most}.")
            object.__setattr__(self, name, found.detach().cpu().clone().contiguous())
        (g, bits, d), (classes, thresholds) = self.directions.shape, self.thresholds.shape
        if d != values or g not in (1, classes):
            raise ValueError(
                f"directions: {[g, bits, d]}, expected [1 or {classes}, J, {values}] for the side "
                f"{self.side}, {self.channels} channels and {classes} classes."
            )
        if bits != thresholds or bits > MOST_BITS:
            raise ValueError(
                f"thresholds: {[classes, thresholds]}, expected [K, {bits}], one for each of "
                f"1 to {MOST_BITS} directions."
            )

    @property
    def per_class(self) -> int:
        """C, the modes of a class."""
        return 1 << self.directions.shape[1]

    @property
    def num_classes(self) -> int:
        """K."""
        return len(self.thresholds)

    @cached_property
    def sha256(self) -> str:
        """Of the rule and of its origin: what identifies it."""
        facts = {
            "side": self.side,
            "channels": self.channels,
            "shapes": [[*self.directions.shape], [*self.thresholds.shape]],
            "origin": None if self.origin is None else self.origin.model_dump(),
        }
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
        for array in (self.directions, self.thresholds):
            digest.update(np.ascontiguousarray(array.numpy(), dtype="<i8").data)
        return digest.hexdigest()

    @property
    def record(self) -> ModesRecord:
        """What a release's metadata say of them."""
        return ModesRecord(
            side=self.side,
            channels=self.channels,
            per_class=self.per_class,
            sha256=self.sha256,
            origin=self.origin,
        )

    def rows(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """The row of each image, k C + mode: int64 [n] in 0..K C - 1.

        Args:
            images: [n, C, H, W] in [0, 1]; brought to ``side``.
            labels: int64 [n], classes 0..K-1; None: all of class 0.

        Raises:
            ValueError: images of another shape or not floating point, or labels out of range.
        """
        if images.ndim != 4 or images.shape[1] != self.channels or 0 in images.shape[2:]:
            raise ValueError(
                f"images: shape is {list(images.shape)}, expected [n, {self.channels}, H, W]."
            )
        if not images.is_floating_point():
            raise ValueError(
                f"images: dtype is {images.dtype}, expected floating point in [0, 1]; divide 8-bit "
                "images by 255: images.float() / 255"
            )
        if labels is None:
            labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"labels: {labels.dtype} {list(labels.shape)}, expected int64, one an image."
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise ValueError(f"labels: expected the {self.num_classes} classes of the modes.")
        return rows_of(self, images, labels)

    def __repr__(self) -> str:
        whose = "public" if self.origin is None else "of a release"
        return (
            f"Modes({self.per_class} a class, classes={self.num_classes}, side={self.side}, "
            f"channels={self.channels}, {whose})"
        )


def rows_of(modes: Modes, images: Tensor, labels: Tensor) -> Tensor:
    """The rule: int64 [n] in 0..K C - 1, of images [n, C, H, W] and labels in 0..K-1.

    It looks at no value to decide whether it goes on: no image can make it raise.
    """
    directions = modes.directions.to(images.device, torch.float64)  # [G, J, d]
    thresholds = modes.thresholds.to(images.device)
    g, bits, d = directions.shape
    powers = 2 ** torch.arange(bits, device=images.device).flip(0)
    found = []
    for x, k in zip(*(t.split(_step(images)) for t in (images, labels)), strict=True):
        scores = (_integers(x, modes.side).double() @ directions.view(-1, d).T).to(torch.int64)
        scores = scores.view(-1, g, bits)[torch.arange(len(k), device=k.device), k if g > 1 else 0]
        mode = ((scores > thresholds[k]) * powers).sum(dim=1)
        found.append(k * modes.per_class + mode)
    return torch.cat(found)


def _step(images: Tensor) -> int:
    """How many images at once; it changes no row."""
    return max(1, _AT_ONCE // max(1, images[:1].numel()))


def _integers(images: Tensor, side: int) -> Tensor:
    """X of each image: int64 [n, d] in 0..65535, steps 1 and 2 of the rule."""
    if tuple(images.shape[-2:]) == (side, side):
        return _levels(images).flatten(1)
    rows, down = _between(images.shape[2], side, images.device)
    columns, across = _between(images.shape[3], side, images.device)
    x = _levels(images.index_select(2, rows.flatten()).index_select(3, columns.flatten()))
    x = x.unflatten(2, rows.shape).mul_(down[:, :, None]).sum(2)  # [n, C, side, 2 side]
    x = x.unflatten(3, columns.shape).mul_(across).sum(3)
    unit = 2 * (2 * side) ** 2
    return torch.div(2 * x + unit // 2, unit, rounding_mode="floor").flatten(1)


def _levels(images: Tensor) -> Tensor:
    """Whole numbers 0..65535, int64."""
    x = images.to(torch.float64, copy=True).nan_to_num_(0.0).clamp_(0, 1)
    return x.mul_(LEVELS).round_().to(torch.int64)


def _between(size: int, side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Linear interpolation along an axis: which two places, int64 [2, side], and their shares.

    Shares are in units of 1 / (2 side), of which both together have 2 side.
    """
    whole = 2 * side
    places = (2 * torch.arange(side, device=device) + 1) * size - side
    places = places.clamp(min=0)
    low = torch.div(places, whole, rounding_mode="floor")
    part = places - low * whole
    return torch.stack((low, (low + 1).clamp(max=size - 1))), torch.stack((whole - part, part))
