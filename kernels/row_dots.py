"""Row dots: <f, G_1[y]> and <f^2, G_2[y]> of every image, and the coefficients that follow."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd.kernels import table
from dpmmd.kernels.row_statistics import total
from dpmmd.kernels.schedule import count_tiles, image_at, tile_at
from dpmmd.kernels.taps import Taps, check_buffer, find_block, launch, load_tile


@triton.jit
def load_class_rows(
    rows,
    k,
    num_classes,
    dim,
    column,
    rest,
    MOMENTS: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rows[m, k] [M, K, D] in a block, as [1, BLOCK] for moments 1 and 2 (any where absent)."""
    columns = tl.arange(0, BLOCK)
    dim = dim.to(tl.int64)
    if VECTOR > 1:
        dim = tl.multiple_of(dim, VECTOR)
    at = rows + k.to(tl.int64) * dim + column
    first = tl.load(at + columns, mask=columns < rest, other=0.0)[None, :]
    second = first
    if MOMENTS == 3:
        at += num_classes.to(tl.int64) * dim
        second = tl.load(at + columns, mask=columns < rest, other=0.0)[None, :]
    return first, second


@triton.jit(do_not_specialize=["addresses", "n", "dim", "parts", "num_classes"])
def partial_dots(
    addresses,
    records,
    upstream,
    schedule,
    partials,
    n,
    dim,
    parts,
    num_classes,
    TYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    MOMENTS: tl.constexpr,
    LABELLED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[m, i, b] = sum over the columns of block b of f^m G_m[y_i].

    A program has one block and one tile of images of the same class, whose row of G it loads once.
    Grid [blocks of the launch, tiles].
    Shapes: features [n, d_l] a tap; G float32 [M, K, D]; partials float32 [M, n, parts].
    Bytes: the features once, 4 M D a tile (from cache), 4 M n parts out. Deterministic.
    """
    k, first, rows, _count = tile_at(schedule, tl.program_id(1), n, num_classes, LABELLED)
    if rows > 0:
        pointer, stride, rest, column, _tap, block = find_block(
            addresses, records, TYPE, VECTOR, BLOCK
        )
        g, h = load_class_rows(upstream, k, num_classes, dim, column, rest, MOMENTS, VECTOR, BLOCK)
        row = tl.arange(0, ROWS)
        live = row < rows
        images = image_at(schedule, first + row, live, LABELLED)
        f = load_tile(pointer, stride, images, live, rest, BLOCK)
        at = partials + images.to(tl.int64) * parts + block
        if MOMENTS & 1:
            tl.store(at, tl.sum(f * g, axis=1), mask=live)
            at += n.to(tl.int64) * parts
        if MOMENTS & 2:
            tl.store(at, tl.sum(f * f * h, axis=1), mask=live)


@triton.jit
def store_coefficient(dot, at, scale, projection, coefficients):
    """e = s p^2 dot; an image without use may have any dot, NaN too."""
    s = tl.load(scale + at).to(tl.float64)
    p = tl.load(projection + at).to(tl.float64)
    e = tl.where(p > 0, p * dot * p * s, 0.0)
    tl.store(coefficients + at, e.to(tl.float32))


@triton.jit(do_not_specialize=["n", "blocks", "parts", "num_classes"])
def finish_dots(
    partials,
    ranges,
    labels,
    schedule,
    scale,
    projection,
    coefficients,
    n,
    blocks,
    parts,
    num_classes,
    weight,
    MOMENTS: tl.constexpr,
    JOINT: tl.constexpr,
    LABELLED: tl.constexpr,
):
    """e = s p^2 <v_m, G_m[y]> / n_y of every norm, image and block; both moments for a joint bound.

    Parts are summed in their order, in float64. A program has one block of one image; grid [n B].
    Shapes: scale, projection, coefficients float32 [N, n, B]; partials float32 [M, n, parts].
    Bytes: 4 M n parts in, 12 N n B. Deterministic.
    """
    image = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    first = tl.load(ranges + block)
    end = tl.load(ranges + block + 1)
    count = n
    if LABELLED:
        at = schedule + n + tl.load(labels + image)
        count = tl.load(at + 1) - tl.load(at)
    share = 1.0 / count.to(tl.float64)
    w = tl.cast(weight, tl.float32).to(tl.float64)
    row = image.to(tl.int64)
    at = row * blocks + block
    if MOMENTS == 3:
        one = total(partials, row, first, end, parts) * share
        two = total(partials, row + n, first, end, parts) * w * share
        if JOINT:
            store_coefficient(one + two, at, scale, projection, coefficients)
        else:
            store_coefficient(one, at, scale, projection, coefficients)
            store_coefficient(two, at + n.to(tl.int64) * blocks, scale, projection, coefficients)
    else:
        dot = total(partials, row, first, end, parts) * share
        store_coefficient(dot, at, scale, projection, coefficients)


def row_dots_into(
    taps: Taps,
    labels: Tensor | None,
    schedule: Tensor,
    scale: Tensor,
    projection: Tensor,
    upstream: Tensor,
    *,
    moments: Sequence[int],
    joint_weight: float | None,
    coefficients: Tensor,
) -> None:
    """Two launches, into float32 coefficients [N, n, B].

    Args:
        labels, schedule, scale, projection: as given to and by `row_statistics`.
        upstream: float32 [M, K, D], columns as they lie in memory.
    """
    num_classes, blocks = upstream.shape[1], scale.shape[2]
    check_buffer("coefficients", coefficients, scale.shape, taps.device)
    if taps.n == 0:
        return
    config = table.lookup("row_dots", taps.device, taps.dtype, taps.dim)
    parts, labelled = taps.blocks(config.block), int(labels is not None)
    partials = torch.empty(len(moments), taps.n, parts, dtype=torch.float32, device=taps.device)
    for piece in taps.launches(config.block):
        launch(
            partial_dots,
            (piece.blocks, count_tiles(taps.n, num_classes if labelled else None)),
            taps.device,
            piece.addresses,
            piece.records,
            upstream,
            schedule,
            partials,
            taps.n,
            taps.dim,
            parts,
            num_classes,
            TYPE=taps.type,
            VECTOR=piece.vector,
            MOMENTS=sum(moments),
            LABELLED=labelled,
            ROWS=config.rows,
            BLOCK=config.block,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    launch(
        finish_dots,
        (taps.n * blocks,),
        taps.device,
        partials,
        taps.ranges(config.block, blocks > 1),
        labels if labels is not None else schedule,
        schedule,
        scale,
        projection,
        coefficients,
        taps.n,
        blocks,
        parts,
        num_classes,
        1.0 if joint_weight is None else joint_weight,
        MOMENTS=sum(moments),
        JOINT=int(joint_weight is not None),
        LABELLED=labelled,
        num_warps=table.FINISH_WARPS,
    )


def row_dots(
    taps: Taps,
    labels: Tensor | None,
    schedule: Tensor,
    scale: Tensor,
    projection: Tensor,
    upstream: Tensor,
    *,
    moments: Sequence[int],
    joint_weight: float | None,
) -> Tensor:
    """Coefficients [N, n, B] in a new tensor; arguments as in `row_dots_into`."""
    coefficients = torch.empty_like(scale)
    row_dots_into(
        taps,
        labels,
        schedule,
        scale,
        projection,
        upstream,
        moments=moments,
        joint_weight=joint_weight,
        coefficients=coefficients,
    )
    return coefficients
