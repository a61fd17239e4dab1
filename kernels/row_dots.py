"""Row dots: <f, G_1[y]> and <f^2, G_2[y]> of every image, and the coefficients that follow."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd._contract.checks import check_buffer
from dpmmd._contract.protocol import Saved
from dpmmd.bounds import Bound
from dpmmd.kernels import table
from dpmmd.kernels.row_statistics import total
from dpmmd.kernels.schedule import count_tiles, image_at, tile_at
from dpmmd.kernels.taps import Taps, find_block, launch, launch_blocks, load_tile


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
    bound: Bound,
    saved: Saved,
    upstream: Tensor,
    coefficients: Tensor,
) -> None:
    """Two launches, into float32 coefficients [N, n, B].

    Args:
        labels, bound, saved: as given to and by `row_statistics`.
        upstream: float32 [M, K, D], columns as they lie in memory.
    """
    num_classes, blocks = upstream.shape[1], saved.scale.shape[2]
    check_buffer("coefficients", coefficients, saved.scale.shape, taps.device)
    if taps.n == 0:
        return
    config = table.lookup("row_dots", taps.device, taps.dtype, taps.dim)
    parts, kind = (
        taps.blocks(config.block),
        {"MOMENTS": bound.bits, "LABELLED": int(labels is not None)},
    )
    partials = torch.empty(
        len(bound.moments), taps.n, parts, dtype=torch.float32, device=taps.device
    )
    launch_blocks(
        partial_dots,
        taps,
        config,
        count_tiles(taps.n, None if labels is None else num_classes),
        upstream,
        saved.schedule,
        partials,
        taps.n,
        taps.dim,
        parts,
        num_classes,
        **kind,
    )
    launch(
        finish_dots,
        (taps.n * blocks,),
        taps.device,
        partials,
        taps.ranges(config.block, bound.per_tap),
        saved.schedule if labels is None else labels,
        saved.schedule,
        saved.scale,
        saved.projection,
        coefficients,
        taps.n,
        blocks,
        parts,
        num_classes,
        bound.weight,
        JOINT=int(bound.joint),
        num_warps=table.FINISH_WARPS,
        **kind,
    )


def row_dots(
    taps: Taps, labels: Tensor | None, bound: Bound, saved: Saved, upstream: Tensor
) -> Tensor:
    """Coefficients [N, n, B] in a new tensor; arguments as in `row_dots_into`."""
    coefficients = torch.empty_like(saved.scale)
    row_dots_into(taps, labels, bound, saved, upstream, coefficients)
    return coefficients
