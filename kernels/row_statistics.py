"""Row statistics: |v_1|^2 = sum f^2 and |v_2|^2 = sum f^4 of every image, and what follows."""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd._contract.checks import check_buffer
from dpmmd._contract.protocol import Saved
from dpmmd.bounds import Bound
from dpmmd.kernels import schedule as schedules
from dpmmd.kernels import table
from dpmmd.kernels.schedule import clear_tiles, place_class, place_image
from dpmmd.kernels.taps import (
    PARTS,
    TYPES,
    Taps,
    find_block,
    launch,
    launch_blocks,
    load_tile,
)


@triton.jit(do_not_specialize=["addresses", "n", "parts", "num_classes"])
def partial_statistics(
    addresses,
    records,
    partials,
    schedule,
    n,
    parts,
    num_classes,
    TYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    MOMENTS: tl.constexpr,
    LABELLED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[m, i, b] = sum over the columns of block b of f^2 (m = 1), f^4 (m = 2).

    A program has ROWS images of one block; grid [blocks of the launch, tiles of images]. Clears the
    schedule's tiles in passing.
    Shapes: features [n, d_l] a tap; partials float32 [M, n, parts], parts the blocks of all taps.
    Bytes: the features once, 4 M n parts. Deterministic.
    """
    tile = tl.program_id(1)
    if LABELLED:
        if tl.program_id(0) == 0:
            clear_tiles(schedule, n, num_classes, tile, tl.num_programs(1), 128)
    pointer, stride, rest, _, _, block = find_block(addresses, records, TYPE, VECTOR, BLOCK)
    images = tile * ROWS + tl.arange(0, ROWS)
    live = images < n
    f = load_tile(pointer, stride, images, live, rest, BLOCK)
    square = f * f
    at = partials + images.to(tl.int64) * parts + block
    if MOMENTS & 1:
        tl.store(at, tl.sum(square, axis=1), mask=live)
        at += n.to(tl.int64) * parts
    if MOMENTS & 2:
        tl.store(at, tl.sum(square * square, axis=1), mask=live)


@triton.jit(do_not_specialize=["n", "parts"])
def rectify_kernel(
    x,
    bias,
    partials,
    n,
    columns,
    channels,
    parts,
    ceiling,
    TYPE: tl.constexpr,
    BIAS: tl.constexpr,
    CEILING: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """f = min(max(x + bias, 0), ceiling) in the place of x, and partials as `partial_statistics`.

    The statistics are of f as it is stored. NaN stays NaN. Grid [parts, tiles of images].
    Shapes: x [n, columns], one tap in channels-last order; bias [channels]; partials float32
    [M, n, parts], parts the blocks of this tap.
    Bytes: x in, f out, 4 M n parts. Deterministic. Saved for backward: f alone.
    """
    images = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = (images < n)[:, None] & (at < columns)[None, :]
    where = x + images.to(tl.int64)[:, None] * columns + at[None, :]
    f = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    if BIAS:
        f += tl.load(bias + at % channels, mask=at < columns, other=0.0).to(tl.float32)[None, :]
    f = tl.where(f < 0, 0.0, f)
    if CEILING:
        most = tl.cast(ceiling, tl.float32)
        f = tl.where(f > most, most, f)
    stored = f.to(TYPE)
    tl.store(where, stored, mask=mask)
    f = tl.where(mask, stored.to(tl.float32), 0.0)
    square = f * f
    to = partials + images.to(tl.int64) * parts + tl.program_id(0)
    if MOMENTS & 1:
        tl.store(to, tl.sum(square, axis=1), mask=images < n)
        to += n.to(tl.int64) * parts
    if MOMENTS & 2:
        tl.store(to, tl.sum(square * square, axis=1), mask=images < n)


@triton.jit
def total(partials, row, first, end, parts):
    """Sum of partials[row, first:end] in float64, in a fixed order."""
    sums = tl.zeros([PARTS], tl.float64)
    for start in range(first, end, PARTS):
        part = start + tl.arange(0, PARTS)
        values = tl.load(partials + row * parts + part, mask=part < end, other=0.0)
        sums += values.to(tl.float64)
    return tl.sum(sums, axis=0)


@triton.jit
def store_scale(square, at, scale, projection, clip, BALL: tl.constexpr):
    """s = c / |v| and p = 1 / |v|; where a ball's bound is inactive 1 and 0; both 0 without use."""
    usable = (square > 0) & (square < float("inf"))  # false for NaN
    inverse = 1.0 / tl.sqrt(tl.where(usable, square, 1.0))
    sphere = clip * inverse
    if BALL:
        inverse = tl.where(sphere >= 1, 0.0, inverse)
        sphere = tl.minimum(sphere, 1.0)
    tl.store(scale + at, tl.where(usable, sphere, 0.0).to(tl.float32))
    tl.store(projection + at, tl.where(usable, inverse, 0.0).to(tl.float32))


@triton.jit(do_not_specialize=["n", "blocks", "parts", "num_classes"])
def finish_statistics(
    partials,
    ranges,
    labels,
    scale,
    projection,
    counts,
    schedule,
    n,
    blocks,
    parts,
    num_classes,
    clip,
    weight,
    MOMENTS: tl.constexpr,
    JOINT: tl.constexpr,
    BALL: tl.constexpr,
    LABELLED: tl.constexpr,
):
    """Scale s and projection p of every norm, image and block; counts; the schedule.

    With |v_m| summed over the parts ranges[b]..ranges[b + 1] in their order, in float64, v_2 =
    weight f^2, and one norm of both for a joint bound:

        sphere  s = c / |v|, p = 1 / |v|
        ball    likewise where c < |v|, else s = 1, p = 0
        and s = p = 0 where |v| is 0 or not finite

    A program has one block of one image; with labels K more have a class each. Grid [n B (+ K)].
    Shapes: scale, projection float32 [N, n, B], N the norms bounded on their own, B the blocks of
    taps that are; counts float32 [K]; schedule as in `schedule`.
    Bytes: 4 M n parts in, 8 N n B out. Deterministic. scale and projection serve backward.
    """
    program = tl.program_id(0)
    if program < n * blocks:
        image = program // blocks
        block = program % blocks
        first = tl.load(ranges + block)
        end = tl.load(ranges + block + 1)
        radius = tl.cast(clip, tl.float32).to(tl.float64)
        w = tl.cast(weight, tl.float32).to(tl.float64)
        row = image.to(tl.int64)
        if MOMENTS == 3:
            one = total(partials, row, first, end, parts)
            two = total(partials, row + n, first, end, parts) * (w * w)
            if JOINT:
                store_scale(one + two, row * blocks + block, scale, projection, radius, BALL)
            else:
                store_scale(one, row * blocks + block, scale, projection, radius, BALL)
                store_scale(two, (row + n) * blocks + block, scale, projection, radius, BALL)
        else:
            square = total(partials, row, first, end, parts)
            store_scale(square, row * blocks + block, scale, projection, radius, BALL)
        if LABELLED:
            if block == 0:
                place_image(labels, schedule, image, n, num_classes, 1)
        else:
            if program == 0:
                tl.store(counts, n.to(tl.float32))
    else:
        place_class(labels, counts, schedule, program - n * blocks, n, num_classes)


def rectify(
    x: Tensor, bias: Tensor | None, ceiling: float | None, bound: Bound, dim: int
) -> Tensor:
    """f = min(max(x + bias, 0), ceiling) in the place of x; returns f's partial statistics.

    Args:
        x: [n, C, H, W], float32 or bfloat16, channels-last.
        bias: [C] in x's dtype, or None.
        ceiling: None for none.
        bound: whose moments are taken.
        dim: D, the features of all taps, which decides the size of blocks.

    Returns:
        float32 [M, n, blocks of this tap].
    """
    (n, channels), columns = x.shape[:2], x[0].numel() if x.shape[0] else 0
    config = table.lookup("row_statistics", x.device, x.dtype, dim)
    parts = triton.cdiv(columns, config.block)
    partials = torch.empty(len(bound.moments), n, parts, dtype=torch.float32, device=x.device)
    if n and columns:
        launch(
            rectify_kernel,
            (parts, triton.cdiv(n, config.rows)),
            x.device,
            x,
            partials if bias is None else bias,
            partials,
            n,
            columns,
            channels,
            parts,
            0.0 if ceiling is None else ceiling,
            TYPE=TYPES[x.dtype],
            BIAS=int(bias is not None),
            CEILING=int(ceiling is not None),
            MOMENTS=bound.bits,
            **config.options,
        )
    return partials


def partial_statistics_of(
    taps: Taps,
    config: table.Config,
    bound: Bound,
    schedule: Tensor,
    labels: Tensor | None = None,
    num_classes: int = 1,
) -> Tensor:
    """float32 [M, n, blocks of all taps], by one launch; with labels it clears the schedule."""
    parts = taps.blocks(config.block)
    partials = torch.empty(
        len(bound.moments), taps.n, parts, dtype=torch.float32, device=taps.device
    )
    launch_blocks(
        partial_statistics,
        taps,
        config,
        triton.cdiv(taps.n, config.rows),
        partials,
        schedule,
        taps.n,
        parts,
        num_classes,
        MOMENTS=bound.bits,
        LABELLED=int(labels is not None),
    )
    return partials


def finish_into(
    taps: Taps,
    labels: Tensor | None,
    bound: Bound,
    partials: Tensor,
    block: int,
    saved: Saved,
    counts: Tensor,
) -> None:
    """One launch, from partial statistics in blocks of so many columns; as `row_statistics_into`.

    The tiles of the schedule are clear.
    """
    blocks, num_classes, labelled = saved.scale.shape[2], counts.shape[0], labels is not None
    launch(
        finish_statistics,
        (taps.n * blocks + (num_classes if labelled else 0),),
        taps.device,
        partials,
        taps.ranges(block, bound.per_tap),
        saved.schedule if labels is None else labels,
        saved.scale,
        saved.projection,
        counts,
        saved.schedule,
        taps.n,
        blocks,
        partials.shape[2],
        num_classes,
        bound.radius(len(taps.widths)),
        bound.weight,
        MOMENTS=bound.bits,
        JOINT=int(bound.joint),
        BALL=int(bound.ball),
        LABELLED=int(labelled),
        num_warps=table.FINISH_WARPS,
        debug=labelled,
        sanitize_overflow=False,
    )


def row_statistics_into(
    taps: Taps, labels: Tensor | None, bound: Bound, saved: Saved, counts: Tensor
) -> None:
    """Two launches, into float32 scale and projection [N, n, B], counts [K], int32 schedule.

    Labels out of range stop the device with an assertion, as an index out of range does.
    """
    num_classes = counts.shape[0]
    check_saved(taps, labels, num_classes, bound, saved)
    check_buffer("counts", counts, (num_classes,), taps.device)
    if taps.n == 0 or taps.dim == 0:
        for buffer in (*saved, counts):
            buffer.zero_()
        if taps.n == 0:
            return
    config = table.lookup("row_statistics", taps.device, taps.dtype, taps.dim)
    partials = partial_statistics_of(taps, config, bound, saved.schedule, labels, num_classes)
    finish_into(taps, labels, bound, partials, config.block, saved, counts)


def row_statistics(
    taps: Taps, labels: Tensor | None, num_classes: int, bound: Bound
) -> tuple[Saved, Tensor]:
    """Scale and projection [N, n, B] with the schedule of the labels, and counts [K]."""
    saved, counts = empty_statistics(taps, labels, num_classes, bound)
    row_statistics_into(taps, labels, bound, saved, counts)
    return saved, counts


def empty_statistics(
    taps: Taps, labels: Tensor | None, num_classes: int, bound: Bound
) -> tuple[Saved, Tensor]:
    """What `row_statistics_into` writes, not yet written."""
    size, length = _sizes(taps, labels, num_classes, bound)
    new = partial(torch.empty, device=taps.device)
    saved = Saved(
        new(size, dtype=torch.float32),
        new(size, dtype=torch.float32),
        new(length, dtype=torch.int32),
    )
    return saved, new(num_classes, dtype=torch.float32)


def check_saved(
    taps: Taps, labels: Tensor | None, num_classes: int, bound: Bound, saved: Saved
) -> None:
    """Refuses what is not of the shapes that `empty_statistics` has."""
    size, length = _sizes(taps, labels, num_classes, bound)
    check_buffer("scale", saved.scale, size, taps.device)
    check_buffer("projection", saved.projection, size, taps.device)
    check_buffer("schedule", saved.schedule, (length,), taps.device, torch.int32)


def _sizes(
    taps: Taps, labels: Tensor | None, num_classes: int, bound: Bound
) -> tuple[tuple[int, int, int], int]:
    """[N, n, B], and the length of the schedule."""
    length = schedules.size(taps.n, None if labels is None else num_classes)
    return (bound.norms, taps.n, bound.blocks(len(taps.widths))), length
