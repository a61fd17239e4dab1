"""Row statistics: |v_1|^2 = sum f^2 and |v_2|^2 = sum f^4 of every image, and what follows."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd.kernels import schedule as schedules
from dpmmd.kernels import table
from dpmmd.kernels.schedule import clear_tiles, place_class, place_image
from dpmmd.kernels.taps import Taps, check_buffer, find_block, launch, load_tile

PARTS = tl.constexpr(256)


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


def row_statistics_into(
    taps: Taps,
    labels: Tensor | None,
    *,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
    scale: Tensor,
    projection: Tensor,
    counts: Tensor,
    schedule: Tensor,
) -> None:
    """Two launches, into float32 scale and projection [N, n, B], counts [K], int32 schedule.

    Labels out of range stop the device with an assertion, as an index out of range does.
    """
    per_tap, joint = bound.endswith("-per-tap"), joint_weight is not None
    blocks = len(taps.tensors) if per_tap else 1
    num_classes = counts.shape[0]
    size = (2 if len(moments) == 2 and not joint else 1, taps.n, blocks)
    check_buffer("scale", scale, size, taps.device)
    check_buffer("projection", projection, size, taps.device)
    length = schedules.size(taps.n, None if labels is None else num_classes)
    check_buffer("schedule", schedule, (length,), taps.device, torch.int32)
    check_buffer("counts", counts, (num_classes,), taps.device)
    config = table.lookup("row_statistics", taps.device, taps.dtype, taps.dim)
    parts = taps.blocks(config.block)
    if taps.n == 0 or parts == 0:
        for buffer in (scale, projection):
            buffer.zero_()
        counts.zero_()
        schedule.zero_()
        if taps.n == 0:
            return
    partials = torch.empty(len(moments), taps.n, parts, dtype=torch.float32, device=taps.device)
    bits, labelled = sum(moments), int(labels is not None)
    for piece in taps.launches(config.block):
        launch(
            partial_statistics,
            (piece.blocks, triton.cdiv(taps.n, config.rows)),
            taps.device,
            piece.addresses,
            piece.records,
            partials,
            schedule,
            taps.n,
            parts,
            num_classes,
            TYPE=taps.type,
            VECTOR=piece.vector,
            MOMENTS=bits,
            LABELLED=labelled,
            ROWS=config.rows,
            BLOCK=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    launch(
        finish_statistics,
        (taps.n * blocks + (num_classes if labelled else 0),),
        taps.device,
        partials,
        taps.ranges(config.block, per_tap),
        labels if labels is not None else schedule,
        scale,
        projection,
        counts,
        schedule,
        taps.n,
        blocks,
        parts,
        num_classes,
        clip / math.sqrt(blocks),
        1.0 if joint_weight is None else joint_weight,
        MOMENTS=bits,
        JOINT=int(joint),
        BALL=int(bound.startswith("ball")),
        LABELLED=labelled,
        num_warps=table.FINISH_WARPS,
        debug=bool(labelled),
        sanitize_overflow=False,
    )


def row_statistics(
    taps: Taps,
    labels: Tensor | None,
    num_classes: int,
    *,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scale and projection [N, n, B], counts [K] and the schedule of the labels."""
    blocks = len(taps.tensors) if bound.endswith("-per-tap") else 1
    norms = 2 if len(moments) == 2 and joint_weight is None else 1
    scale, projection = (
        torch.empty(norms, taps.n, blocks, dtype=torch.float32, device=taps.device)
        for _ in range(2)
    )
    counts = torch.empty(num_classes, dtype=torch.float32, device=taps.device)
    schedule = torch.empty(
        schedules.size(taps.n, None if labels is None else num_classes),
        dtype=torch.int32,
        device=taps.device,
    )
    row_statistics_into(
        taps,
        labels,
        moments=moments,
        bound=bound,
        clip=clip,
        joint_weight=joint_weight,
        scale=scale,
        projection=projection,
        counts=counts,
        schedule=schedule,
    )
    return scale, projection, counts, schedule
