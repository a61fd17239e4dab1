"""Gradient of the class means with respect to the features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd._contract.checks import brief
from dpmmd._contract.protocol import Saved
from dpmmd._contract.taps import empty_gradient, empty_gradients
from dpmmd.bounds import Bound
from dpmmd.kernels import table
from dpmmd.kernels.row_dots import load_class_rows
from dpmmd.kernels.schedule import count_tiles, image_at, tile_at
from dpmmd.kernels.taps import TYPES, Taps, find_block, launch, load_tile, tap_address

# Bits of a launch's RECTIFIED, which is 0 for the gradient of f.
RECTIFIED, WITH_INCOMING, WITH_CEILING = 1, 2, 4


@triton.jit
def load_norms(
    scale,
    coefficients,
    grad,
    at,
    n,
    blocks,
    live,
    count,
    NORMS: tl.constexpr,
    AGAINST: tl.constexpr,
):
    """1 / n_y, and s_1, e_1, s_2, e_2 at entries [ROWS] of the first norm; moments may share one.

    AGAINST: the gradient wanted is -grad times that for G and e, so 1 / n_y and e come out -grad
    times as great; grad is one number on the device.
    """
    share = 1.0 / count.to(tl.float32)
    one = tl.load(scale + at, mask=live, other=0.0)
    e_one = tl.load(coefficients + at, mask=live, other=0.0)
    if AGAINST:
        against = -tl.load(grad)
        share *= against
        e_one *= against
    two = one
    e_two = e_one
    if NORMS == 2:
        at += n.to(tl.int64) * blocks
        two = tl.load(scale + at, mask=live, other=0.0)
        e_two = tl.load(coefficients + at, mask=live, other=0.0)
        if AGAINST:
            e_two *= against
    return share, one, e_one, two, e_two


@triton.jit
def rectified(df, value, incoming, mask, ceiling, RECTIFIED: tl.constexpr):
    """(incoming + df) [f > 0], the gradient of the x of which f = max(x, 0) is ``value``.

    RECTIFIED & 2: the layers behind send something, at the pointers ``incoming``; & 4: f is
    min(max(x, 0), ceiling).
    """
    if RECTIFIED & 2:
        df += tl.load(incoming, mask=mask, other=0.0).to(tl.float32)
    passes = value > 0
    if RECTIFIED & 4:
        passes = passes & (value < tl.cast(ceiling, tl.float32))
    return tl.where(passes, df, 0.0)


_SIZES = ["addresses", "gradients", "incoming", "n", "dim", "blocks", "num_classes", "ceiling"]


@triton.jit(do_not_specialize=_SIZES)
def gradient_kernel(
    addresses,
    gradients,
    incoming,
    records,
    upstream,
    schedule,
    scale,
    coefficients,
    grad,
    n,
    dim,
    blocks,
    num_classes,
    weight,
    ceiling,
    TYPE: tl.constexpr,
    OUT: tl.constexpr,
    VECTOR: tl.constexpr,
    MOMENTS: tl.constexpr,
    NORMS: tl.constexpr,
    PER_TAP: tl.constexpr,
    LABELLED: tl.constexpr,
    RECTIFIED: tl.constexpr,
    AGAINST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """df = s_1 G_1[y] / n_y - e_1 f + 2 w f (s_2 G_2[y] / n_y - w e_2 f^2), w = weight.

    Rows without use (s = 0) are not loaded, for they may hold NaN; their gradient is zero.
    RECTIFIED and AGAINST are those of `rectified` and `load_norms`. A program has one block and one
    tile of images of the same class. Grid [blocks of the launch, tiles].
    Shapes: features and gradients [n, d_l] a tap; scale, coefficients float32 [N, n, B]; G float32
    [M, K, D].
    Bytes: the features once, the gradients once, 4 M D a tile (from cache). Deterministic.
    """
    k, first, rows, count = tile_at(schedule, tl.program_id(1), n, num_classes, LABELLED)
    if rows > 0:
        pointer, stride, rest, column, number, _ = find_block(
            addresses, records, TYPE, VECTOR, BLOCK
        )
        g, h = load_class_rows(upstream, k, num_classes, dim, column, rest, MOMENTS, VECTOR, BLOCK)
        live = tl.arange(0, ROWS) < rows
        images = image_at(schedule, first + tl.arange(0, ROWS), live, LABELLED).to(tl.int64)
        at = images * blocks + number * PER_TAP
        share, one, e_one, two, e_two = load_norms(
            scale, coefficients, grad, at, n, blocks, live, count, NORMS, AGAINST
        )
        used = (one != 0) | (two != 0)
        if RECTIFIED:
            value = load_tile(pointer, stride, images, live, rest, BLOCK)
            f = tl.where(used[:, None], value, 0.0)
        else:
            f = load_tile(pointer, stride, images, used, rest, BLOCK)
        df = tl.zeros([ROWS, BLOCK], tl.float32)
        if MOMENTS & 1:
            df = (one * share)[:, None] * g - e_one[:, None] * f
        if MOMENTS & 2:
            w = tl.cast(weight, tl.float32)
            along = (2 * w * two * share)[:, None] * h
            df += f * (along - (2 * w * w * e_two)[:, None] * (f * f))
        record = records + tl.program_id(0).to(tl.int64) * 8
        tap = tl.load(record)
        begin = tl.load(record + 1)
        width = tl.load(record + 2)
        start = tap_address(gradients, tap).to(tl.pointer_type(OUT))
        if VECTOR > 1:
            begin = tl.multiple_of(begin, VECTOR)
            width = tl.multiple_of(width, VECTOR)
            start = tl.multiple_of(start, 16)
        columns = tl.arange(0, BLOCK)
        place = begin + images[:, None] * width + columns[None, :]
        mask = live[:, None] & (columns < rest)[None, :]
        if RECTIFIED:
            come = tap_address(incoming, tap).to(tl.pointer_type(TYPE))
            if VECTOR > 1:
                come = tl.multiple_of(come, 16)
            df = rectified(df, value, come + place, mask, ceiling, RECTIFIED)
        tl.store(start + place, df.to(OUT), mask=mask)


@dataclass(frozen=True)
class Terms:
    """What the gradients of all taps are made of, besides the features.

    Attributes:
        bound, saved: as given to and by `row_statistics`.
        coefficients: float32 [N, n, B], from `row_dots`.
        upstream: float32 [M, K, D], columns as they lie in memory.
        grad: float32, one number on the device: where given, the upstream gradient is -grad times
            ``upstream``, and ``coefficients`` are those of ``upstream``.
    """

    bound: Bound
    saved: Saved
    coefficients: Tensor
    upstream: Tensor
    grad: Tensor | None = None


def gradient_into(taps: Taps, terms: Terms, gradients: Sequence[Tensor | None]) -> None:
    """One launch, into one gradient a tap: dense, in the tap's order, float32 or its dtype.

    Args:
        gradients: None for a tap without one.
    """
    if taps.n == 0 or all(g is None for g in gradients):
        return
    for i, (tap, gradient) in enumerate(zip(taps.tensors, gradients, strict=True)):
        if gradient is not None and (
            gradient.shape != tap.shape
            or gradient.device != taps.device
            or gradient.dtype not in TYPES
            or (taps.n > 1 and gradient.numel() and gradient.stride(0) != taps.widths[i])
        ):
            raise ValueError(
                f"gradients[{i}]: {brief(gradient)}, expected the shape of {brief(tap)}."
            )
    _launch(taps, terms, gradients)


def gradient(taps: Taps, terms: Terms, needed: Sequence[bool]) -> list[Tensor]:
    """New gradients with the taps' shapes, dtype and memory formats; empty where not needed."""
    gradients = empty_gradients(taps.tensors, needed)
    into = [g if wanted else None for g, wanted in zip(gradients, needed, strict=True)]
    gradient_into(taps, terms, into)
    return gradients


def rectified_gradient(
    taps: Taps,
    column: int,
    terms: Terms,
    f: Tensor,
    incoming: Tensor | None,
    ceiling: float | None,
) -> Tensor:
    """Gradient of the x of which tap number ``column`` is f = min(max(x, 0), ceiling), one launch.

    Args:
        taps: from `injection.backward`; f alone need be alive.
        f: [n, C, H, W], channels-last.
        incoming: what comes in from the layers behind, like f, or None.
    """
    out = empty_gradient(f)
    if taps.n == 0 or f.numel() == 0:
        return out
    flags = RECTIFIED
    if incoming is not None:
        incoming = incoming.to(f.dtype).contiguous(memory_format=torch.channels_last)
        if incoming.stride() != out.stride() or incoming.data_ptr() % 16:
            incoming = torch.empty_like(out).copy_(incoming)
        flags |= WITH_INCOMING
    if ceiling is not None:
        flags |= WITH_CEILING
    gradients: list[Tensor | None] = [None] * len(taps.widths)
    gradients[column] = out
    _launch(taps.at(column, f), terms, gradients, flags, incoming, ceiling)
    return out


def _launch(
    taps: Taps,
    terms: Terms,
    gradients: Sequence[Tensor | None],
    rectified: int = 0,
    incoming: Tensor | None = None,
    ceiling: float | None = None,
) -> None:
    (dtype,) = {g.dtype for g in gradients if g is not None}
    scale, _projection, schedule = terms.saved
    num_classes, labelled = terms.upstream.shape[1], int(schedule.numel() > 0)
    operation = "gradient_with" if rectified or terms.grad is not None else "gradient"
    config = table.lookup(operation, taps.device, taps.dtype, taps.dim)
    for piece in taps.launches(config.block, gradients):
        launch(
            gradient_kernel,
            (piece.blocks, count_tiles(taps.n, num_classes if labelled else None)),
            taps.device,
            piece.addresses,
            piece.partners,
            piece.partners if incoming is None else (incoming.data_ptr(),),
            piece.records,
            terms.upstream,
            schedule,
            scale,
            terms.coefficients,
            terms.coefficients if terms.grad is None else terms.grad,
            taps.n,
            taps.dim,
            scale.shape[2],
            num_classes,
            terms.bound.weight,
            0.0 if ceiling is None else ceiling,
            TYPE=taps.type,
            OUT=TYPES[dtype],
            VECTOR=piece.vector,
            MOMENTS=terms.bound.bits,
            NORMS=scale.shape[0],
            PER_TAP=int(scale.shape[2] > 1),
            LABELLED=labelled,
            RECTIFIED=rectified,
            AGAINST=int(terms.grad is not None),
            **config.options,
        )
