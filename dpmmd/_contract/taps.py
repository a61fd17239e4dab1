"""The features as the cores take them: every tap by address, each image's features in one piece.

Columns are in the order [H, W, C] of maps [n, C, H, W]. A tap may lie in that order in memory
(ROWS) or in the order of its dimensions (PLANES); one that lies in neither is copied.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import cached_property
from math import prod
from typing import NoReturn

import torch
from torch import Tensor

from dpmmd._contract.checks import brief
from dpmmd._contract.plans import plan_of
from dpmmd.bounds import Bound

DTYPES = (torch.float32, torch.bfloat16)  # of the features that all cores but plain torch take

# How the features of one image lie in memory.
ROWS, PLANES = 0, 1  # in the order of columns; [C, H, W] where columns are [H, W, C]


def layout(tap: Tensor) -> int | None:
    """ROWS, PLANES, or None where an image's features are not in one piece."""
    if tap.ndim != 4:
        return ROWS if tap.is_contiguous() or _one_piece(tap) else None
    if _channels_last(tap):
        return ROWS
    if tap.is_contiguous():
        return PLANES
    if _one_piece(tap.permute(0, 2, 3, 1)):
        return ROWS
    return PLANES if _one_piece(tap) else None


def _channels_last(tap: Tensor) -> bool:
    return tap.ndim == 4 and tap.is_contiguous(memory_format=torch.channels_last)


def _one_piece(tap: Tensor) -> bool:
    """Whether each image of a view is dense in the order of its dimensions."""
    step = 1
    for size, stride in zip(reversed(tap.shape[1:]), reversed(tap.stride()[1:]), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def rows_of(f: Tensor) -> Tensor:
    """[n, ...] as [n, columns], maps [n, C, H, W] in channels-last order."""
    f = f.permute(0, 2, 3, 1) if f.ndim == 4 else f
    return f.reshape(f.shape[0], prod(f.shape[1:]))


def empty_gradient(tap: Tensor) -> Tensor:
    """Uninitialised, with the tap's shape and memory format."""
    if tap.is_contiguous() or _channels_last(tap):
        return torch.empty_like(tap)
    if tap.ndim == 4 and layout(tap) != PLANES:
        return torch.empty_like(tap, memory_format=torch.channels_last)
    return torch.empty_like(tap, memory_format=torch.contiguous_format)


def empty_gradients(taps: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor]:
    """An `empty_gradient` of each tap that needs one; no elements where none is needed."""
    return [
        empty_gradient(tap) if wanted else tap.new_empty(0)
        for tap, wanted in zip(taps, needed, strict=True)
    ]


def statistics_shape(bound: Bound, n: int, taps: int) -> tuple[int, int, int]:
    """[N, n, B] of scale, projection and coefficients."""
    return bound.norms, n, bound.blocks(taps)


class Geometry:
    """What follows of taps from their shapes, strides, dtypes and devices.

    Attributes:
        widths: columns of each tap.
        planes: indices of those that lie as PLANES.
        copied: indices of those that are copied, since their images are not in one piece.
        strides: from one image to the next in each tap, or its copy, in elements.
        alike: whether torch.empty_like makes the `empty_gradient` of every tap.
        n, dtype, device: of all.
        dim: D, the columns of all taps.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        dtypes: Collection[torch.dtype],
        kind: str | None,
        planes: bool,
    ) -> None:
        if not features:
            raise ValueError("features: expected at least one tap.")
        first = features[0]
        n, dtype, device = first.shape[:1], first.dtype, first.device
        if dtype not in dtypes or (kind is not None and device.type != kind):
            _refuse(features, dtypes, kind)
        widths, of_planes, copied, strides = [], [], [], []
        for i, tap in enumerate(features):
            shape = tap.shape
            if (
                tap.dtype != dtype
                or tap.device != device
                or len(shape) < 2
                or shape[:1] != n
                or tap.layout != torch.strided
            ):
                _refuse(features, dtypes, kind)
            widths.append(prod(shape[1:]))
            how = layout(tap)
            if how is None or (how == PLANES and not planes):
                copied.append(i)
            elif how == PLANES and widths[-1]:
                of_planes.append(i)
            strides.append(widths[-1] if i in copied[-1:] else tap.stride(0))
        self.alike = not copied and all(t.is_contiguous() or _channels_last(t) for t in features)
        self.widths, self.planes, self.copied = tuple(widths), of_planes, copied
        self.strides = tuple(strides)
        self.n, self.dim, self.dtype, self.device = n[0], sum(widths), dtype, device


class Taps:
    """Features of n images at L taps: checked, and in one piece a tap and image.

    Args:
        features: L tensors [n, ...], of one dtype and on one device.
        dtypes: that are taken.
        kind: type of the device; None: any.
        planes: whether maps may lie as PLANES; else they are copied to channels-last.

    Attributes:
        tensors: the taps; a copy of one whose images were not in one piece.
        widths, planes, n, dtype, device, dim: as of `Geometry`.

    Raises:
        ValueError: dtype, device, layout or shape do not fit.
    """

    def __init__(
        self,
        features: Sequence[Tensor],
        dtypes: Collection[torch.dtype],
        kind: str | None = None,
        *,
        planes: bool = True,
    ) -> None:
        plan = plan_of(features)
        if plan is None:
            known = Geometry(features, dtypes, kind, planes)
        else:
            key = Geometry, kind, planes, *dtypes
            found = plan.kept.get(key)
            known = found or plan.keep(key, Geometry(features, dtypes, kind, planes))
        self.widths, self.planes, self.alike = known.widths, known.planes, known.alike
        self.strides = known.strides
        self.n, self.dim, self.dtype, self.device = known.n, known.dim, known.dtype, known.device
        self.tensors = list(features)
        for i in known.copied:
            self.tensors[i] = _in_rows(features[i])

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """From one image to the next in each tap, in elements."""
        return self.strides if self.n > 1 else self.widths

    @cached_property
    def addresses(self) -> tuple[int, ...]:
        """Where each tap starts."""
        return tuple([t.data_ptr() for t in self.tensors])

    def for_native(
        self, gradients: Sequence[Tensor] | None = None
    ) -> list[tuple[int, int, int, int, int]]:
        """What the native cores know of each tap: address, step, columns; the gradient's too."""
        if gradients is None:
            return [
                (tap.data_ptr(), stride, columns, 0, 0)
                for tap, stride, columns in zip(
                    self.tensors, self.strides, self.widths, strict=True
                )
            ]
        return [  # the address of a gradient without elements is 0
            (tap.data_ptr(), stride, columns, out.data_ptr(), columns)
            for tap, stride, columns, out in zip(
                self.tensors, self.strides, self.widths, gradients, strict=True
            )
        ]

    def empty_gradients(self, needed: Sequence[bool]) -> list[Tensor]:
        """An `empty_gradient` of each tap that needs one; no elements where none is needed."""
        if self.alike and all(needed):
            return list(map(torch.empty_like, self.tensors))
        return empty_gradients(self.tensors, needed)

    def to_columns(self, means: Tensor) -> None:
        """Puts [M, K, D] as the taps lie into the order of columns, in place."""
        if self.planes:
            pieces = means.split(self.widths, dim=2)
            for i in self.planes:
                by_plane = pieces[i].unflatten(2, (self.tensors[i].shape[1], -1))
                pieces[i].copy_(by_plane.transpose(2, 3).flatten(2))

    def from_columns(self, upstream: Tensor) -> Tensor:
        """[M, K, D] in the order of columns as the taps lie."""
        if not self.planes:
            return upstream
        ordered = upstream.clone()
        sources, pieces = upstream.split(self.widths, dim=2), ordered.split(self.widths, dim=2)
        for i in self.planes:
            channels = self.tensors[i].shape[1]
            by_pixel = sources[i].unflatten(2, (-1, channels))
            pieces[i].unflatten(2, (channels, -1)).copy_(by_pixel.transpose(2, 3))
        return ordered


def _in_rows(tap: Tensor) -> Tensor:
    last = torch.channels_last if tap.ndim == 4 else torch.contiguous_format
    return tap.contiguous(memory_format=last)


def _refuse(
    features: Sequence[Tensor], dtypes: Collection[torch.dtype], kind: str | None
) -> NoReturn:
    """Names the first tap that does not fit; a core of any device (None) has words of its own."""
    first = features[0]
    fits = kind is None or first.device.type == kind
    for i, tap in enumerate(features):
        said = f"features[{i}]: {brief(tap)}, expected"
        if not fits or tap.device != first.device or tap.layout != torch.strided:
            where = str(first.device) if fits else f"a {kind} device"
            raise ValueError(f"{said} a dense tensor on {where}.")
        if tap.dtype not in dtypes or tap.dtype != first.dtype:
            names = [str(d).removeprefix("torch." if kind is None else "") for d in dtypes]
            raise ValueError(
                f"{said} {first.dtype if first.dtype in dtypes else ' or '.join(names)}."
            )
        if kind is None and (tap.ndim < 2 or tap.shape[0] != first.shape[0]):
            n = first.shape[0]
            raise ValueError(f"{said} [n, ...] with n={n} as in features[0].")
        if tap.ndim < 2:
            raise ValueError(f"{said} [n, ...], at least 2-d.")
        if tap.shape[0] != first.shape[0]:
            raise ValueError(f"{said} n={first.shape[0]} as in features[0].")
    raise AssertionError("taps that fit")
