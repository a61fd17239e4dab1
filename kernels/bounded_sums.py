"""Exact class sums of bounded integer vectors: `dpmmd.privacy.sums.PrivateSums.add` on the device.

Same steps, same float64 arithmetic, same bits (the docstring there says why they are safe):

    step 1  largest |v| of a group of taps, its exponent e, inverse = 2^-e
    step 2  s = sum of ceil((v inverse)^2 2^b), b = 62 - ceil(log2 D); rate = B guard / |g|
    step 3  q = trunc(v inverse rate)
    step 4  certificate: 0 < sum q^2 <= B^2 exactly, no q < 0 where declared
    then    sums[y] += q

Maxima and integer sums are exact in any order; all else is products and quotients of float64 (no
sum that could be contracted), so nothing depends on the launch. What an image holds moves nothing
but the sums.

A group is all vectors (a vector: a moment of a tap), or each one where bounds are per tap. Arrays
over groups are [N, n, B]: B blocks of taps, and N = 2 for the two moments of a tap, if per tap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd._contract.checks import check_sums
from dpmmd.bounds import Bound
from dpmmd.kernels import schedule as schedules
from dpmmd.kernels import table
from dpmmd.kernels.schedule import class_range, clear_tiles, image_at, place_class, place_image
from dpmmd.kernels.taps import (
    PARTS,
    Taps,
    bits_of,
    find_block,
    launch,
    launch_blocks,
    load_tile,
    number,
    to_device,
)

GUARD = tl.constexpr(1.0 - 2.0**-20)
ABOVE = tl.constexpr(1 << 31)  # no |q| of a vector within a limit reaches it
FULL = tl.constexpr(1 << 30)  # of a sum's high part: 2^62, over every limit's square

# Products are rounded before anything else happens to them, as PyTorch rounds them.
_EXACT = {"enable_fp_fusion": False}


@triton.jit
def power_of_two(exponent):
    """Exactly 2^exponent as float64, by its bits (exponent within +-1022)."""
    return ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def entries(f, weight, MOMENT: tl.constexpr, JOINT: tl.constexpr):
    """v of a moment in float64: f, f^2 or, in a joint vector, f^2 weight."""
    v = f.to(tl.float64)
    if MOMENT == 2:
        v = v * v
        if JOINT:
            v = v * number(weight)
    return v


@triton.jit
def unit(f, weight, inverse, MOMENT: tl.constexpr, JOINT: tl.constexpr):
    """g = v inverse, 0 in rows without use (inverse 0), whatever they hold."""
    v = entries(f, weight, MOMENT, JOINT)
    return tl.where((inverse != 0)[:, None], v, 0.0) * inverse[:, None]


@triton.jit(do_not_specialize=["addresses", "n", "parts", "num_classes"])
def partial_largest(
    addresses,
    records,
    partials,
    schedule,
    n,
    parts,
    num_classes,
    TYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step 1: partials[i, b] = bits of the largest |f| in block b, NaN above all.

    Grid [blocks of the launch, tiles of images]. Clears the schedule's tiles in passing.
    Shapes: features [n, d_l] a tap; partials int32 [n, parts]. Bytes: the features once.
    """
    tile = tl.program_id(1)
    if tl.program_id(0) == 0:
        clear_tiles(schedule, n, num_classes, tile, tl.num_programs(1), 128)
    pointer, stride, rest, _, _, block = find_block(addresses, records, TYPE, VECTOR, BLOCK)
    images = tile * ROWS + tl.arange(0, ROWS)
    live = images < n
    f = load_tile(pointer, stride, images, live, rest, BLOCK)
    bits = f.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.store(partials + images.to(tl.int64) * parts + block, tl.max(bits, axis=1), mask=live)


@triton.jit
def store_inverse(inverse, at, most):
    """2^-e for the exponent e of the largest entry; 0 where that is 0, tiny, huge or NaN."""
    usable = (most >= 2.0**-1000) & (most <= 2.0**1000)
    bits = tl.where(usable, most, 1.0).to(tl.int64, bitcast=True)
    exponent = (bits >> 52) - 1022
    tl.store(inverse + at, tl.where(usable, power_of_two(-exponent), 0.0))


@triton.jit(do_not_specialize=["n", "blocks", "parts", "num_classes", "weight"])
def finish_largest(
    partials,
    ranges,
    labels,
    inverse,
    counts,
    schedule,
    n,
    blocks,
    parts,
    num_classes,
    weight: tl.int64,
    MOMENTS: tl.constexpr,
    NORMS: tl.constexpr,
):
    """Step 1: inverse = 2^-e [N, n, B] float64; the schedule. Grid [n B + K]. Bytes: 4 n parts."""
    program = tl.program_id(0)
    if program < n * blocks:
        image = program // blocks
        block = program % blocks
        first = tl.load(ranges + block)
        end = tl.load(ranges + block + 1)
        row = image.to(tl.int64)
        most = tl.zeros([PARTS], tl.int32)
        for start in range(first, end, PARTS):
            part = start + tl.arange(0, PARTS)
            most = tl.maximum(
                most, tl.load(partials + row * parts + part, mask=part < end, other=0)
            )
        # Rounding is monotone, so the largest |f| gives the largest entry.
        f = tl.max(most, axis=0).to(tl.float32, bitcast=True)
        at = row * blocks + block
        if MOMENTS == 3:
            one = entries(f, weight, 1, 1)
            two = entries(f, weight, 2, 1)
            if NORMS == 2:
                store_inverse(inverse, at, one)
                store_inverse(inverse, at + n.to(tl.int64) * blocks, two)
            else:
                store_inverse(inverse, at, tl.where(two > one, two, one))
        else:
            store_inverse(inverse, at, entries(f, weight, MOMENTS, 0))
        if block == 0:
            place_image(labels, schedule, image, n, num_classes, 0)
    else:
        place_class(labels, counts, schedule, program - n * blocks, n, num_classes)


@triton.jit
def ceilings(g, power):
    """Sum of ceil(g^2 power) over columns, int64 [ROWS]; exact, for every term is below 2^62."""
    x = g * g * power
    down = x.to(tl.int64)
    up = down + (down.to(tl.float64) < x).to(tl.int64)
    return tl.sum(up, axis=1)


@triton.jit(do_not_specialize=["addresses", "n", "blocks", "parts", "weight"])
def partial_squares(
    addresses,
    records,
    inverse,
    bits,
    partials,
    n,
    blocks,
    parts,
    weight: tl.int64,
    TYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    MOMENTS: tl.constexpr,
    NORMS: tl.constexpr,
    PER_TAP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step 2: partials[N, i, b] = sum over block b of ceil((v inverse)^2 2^bits).

    Grid [blocks of the launch, tiles of images].
    Shapes: features [n, d_l] a tap; inverse float64 [N, n, B]; bits int32 [B]; partials int64
    [N, n, parts]. Bytes: the features once.
    """
    pointer, stride, rest, _, tap, block = find_block(addresses, records, TYPE, VECTOR, BLOCK)
    images = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = images < n
    f = load_tile(pointer, stride, images, live, rest, BLOCK)
    power = power_of_two(tl.load(bits + tap * PER_TAP))
    at = images * blocks + tap * PER_TAP
    one = tl.load(inverse + at, mask=live, other=0.0)
    to = partials + images * parts + block
    if MOMENTS == 3:
        square = ceilings(unit(f, weight, one, 1, 1), power)
        if NORMS == 2:
            tl.store(to, square, mask=live)
            two = tl.load(inverse + at + n.to(tl.int64) * blocks, mask=live, other=0.0)
            square = ceilings(unit(f, weight, two, 2, 1), power)
            tl.store(to + n.to(tl.int64) * parts, square, mask=live)
        else:
            square += ceilings(unit(f, weight, one, 2, 1), power)
            tl.store(to, square, mask=live)
    else:
        tl.store(to, ceilings(unit(f, weight, one, MOMENTS, 0), power), mask=live)


@triton.jit
def total(partials, row, first, end, parts):
    """Sum of partials[row, first:end] in int64."""
    sums = tl.zeros([PARTS], tl.int64)
    for start in range(first, end, PARTS):
        part = start + tl.arange(0, PARTS)
        sums += tl.load(partials + row * parts + part, mask=part < end, other=0)
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["n", "blocks", "parts", "share", "clip"])
def finish_squares(
    partials,
    ranges,
    bits,
    limits,
    inverse,
    rate,
    n,
    blocks,
    parts,
    share: tl.int64,
    clip: tl.int64,
    BALL: tl.constexpr,
):
    """Step 2: rate = B guard / |g| [N, n, B] float64, for balls at most B guard 2^e / c.

    B = limits[i] share, and c (`clip`) is a group's. Grid [n B, N]. Bytes: 8 N n parts.
    """
    norm = tl.program_id(1).to(tl.int64)
    image = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    row = norm * n + image
    at = row * blocks + block
    square = total(partials, row, tl.load(ranges + block), tl.load(ranges + block + 1), parts)
    length = tl.sqrt(square.to(tl.float64) * power_of_two(-tl.load(bits + block)))
    goal = tl.load(limits + image).to(tl.float64) * number(share) * GUARD
    back = tl.load(inverse + at)
    usable = back != 0
    result = goal / tl.where(usable, length, 1.0)
    if BALL:
        most = goal * (1.0 / tl.where(usable, back, 1.0)) / number(clip)
        result = tl.where(most < result, most, result)
    tl.store(rate + at, tl.where(usable, result, 0.0))


@triton.jit
def quantised(f, weight, inverse, rate, MOMENT: tl.constexpr, JOINT: tl.constexpr):
    """Step 3: q [ROWS, BLOCK] int64."""
    return (unit(f, weight, inverse, MOMENT, JOINT) * rate[:, None]).to(tl.int64)


@triton.jit
def squares(q, NONNEGATIVE: tl.constexpr):
    """sum q^2 over columns in two parts, high 2^32 + low; high >= FULL where an entry disqualifies.

    An entry of 2^31 or more has no square in 64 bits and is over any limit.
    """
    outside = (q >= ABOVE) | (q <= -ABOVE)
    if NONNEGATIVE:
        outside = outside | (q < 0)
    square = tl.where(outside, 0, q * q)
    high = tl.sum(tl.where(outside, FULL, square >> 32), axis=1)
    return high, tl.sum(square & 0xFFFFFFFF, axis=1)


@triton.jit(do_not_specialize=["addresses", "n", "blocks", "parts", "weight"])
def partial_certificate(
    addresses,
    records,
    inverse,
    rate,
    partials,
    n,
    blocks,
    parts,
    weight: tl.int64,
    TYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    MOMENTS: tl.constexpr,
    NORMS: tl.constexpr,
    PER_TAP: tl.constexpr,
    NONNEGATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Step 4: partials[:, i, b] = sum q^2 over block b, high and low part.

    Grid [blocks of the launch, tiles of images].
    Shapes: features [n, d_l] a tap; inverse, rate float64 [N, n, B]; partials int64 [2, n, parts].
    Bytes: the features once.
    """
    pointer, stride, rest, _, tap, block = find_block(addresses, records, TYPE, VECTOR, BLOCK)
    images = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    live = images < n
    f = load_tile(pointer, stride, images, live, rest, BLOCK)
    at = images * blocks + tap * PER_TAP
    back = tl.load(inverse + at, mask=live, other=0.0)
    speed = tl.load(rate + at, mask=live, other=0.0)
    if MOMENTS == 3:
        high, low = squares(quantised(f, weight, back, speed, 1, 1), NONNEGATIVE)
        if NORMS == 2:
            at += n.to(tl.int64) * blocks
            back = tl.load(inverse + at, mask=live, other=0.0)
            speed = tl.load(rate + at, mask=live, other=0.0)
        more_high, more_low = squares(quantised(f, weight, back, speed, 2, 1), NONNEGATIVE)
        high += more_high
        low += more_low
    else:
        high, low = squares(quantised(f, weight, back, speed, MOMENTS, 0), NONNEGATIVE)
    to = partials + images * parts + block
    tl.store(to, high, mask=live)
    tl.store(to + n.to(tl.int64) * parts, low, mask=live)


@triton.jit(do_not_specialize=["n", "parts"])
def finish_certificate(partials, valid, limits, within, n, parts):
    """Step 4: within[i] = 1 where image i may contribute, else 0. Grid [n]. Bytes: 16 n parts."""
    image = tl.program_id(0)
    row = image.to(tl.int64)
    high = total(partials, row, 0, parts, parts)
    low = total(partials, row + n, 0, parts, parts)
    high += low >> 32
    low = low & 0xFFFFFFFF
    limit = tl.load(limits + image)
    eligible = (tl.load(valid + image) != 0) & (limit > 0) & (limit <= (1 << 30))
    limit = tl.where(eligible, limit, 0)
    square = (tl.where(high < FULL, high, 0) << 32) | low
    fits = eligible & (high < FULL) & (square <= limit * limit) & (square > 0)
    tl.store(within + image, fits.to(tl.int32))


_ADD = ["addresses", "n", "blocks", "num_classes", "weight", "shared_taps"]


@triton.jit(do_not_specialize=[*_ADD, "columns", "shared_columns"])
def add_sums(
    addresses,
    records,
    inverse,
    rate,
    within,
    schedule,
    sums,
    shared,
    n,
    blocks,
    num_classes,
    weight: tl.int64,
    shared_taps,
    columns,
    shared_columns,
    TYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    MOMENTS: tl.constexpr,
    NORMS: tl.constexpr,
    PER_TAP: tl.constexpr,
    SHARED: tl.constexpr,
    SUMS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sums[k, m] += sum of q over the images of class k that are within; shared taps over all.

    A program has one block of columns and one class, and goes over the class's images ROWS at a
    time; a block of a shared tap has all images, in the program of class 0. Grid [blocks of the
    launch, K].
    Shapes: features [n, d_l] a tap; sums int64 [K, M columns]; shared int64 [1, M shared_columns].
    Bytes: the features once, the sums of present classes in and out.
    """
    pointer, stride, rest, column, tap, _block = find_block(addresses, records, TYPE, VECTOR, BLOCK)
    k = tl.program_id(1)
    start, end = class_range(schedule, k, n, num_classes, 1)
    step = columns.to(tl.int64)
    shift = shared_columns.to(tl.int64)
    if SUMS > 1:
        step = tl.multiple_of(step, SUMS)
        shift = tl.multiple_of(shift, SUMS)
    to = sums + k.to(tl.int64) * step * (2 if MOMENTS == 3 else 1)
    to += column - shift
    if SHARED:
        if tap < shared_taps:
            _first, last = class_range(schedule, num_classes - 1, n, num_classes, 1)
            end = tl.where(k == 0, last, start)
            step = shift
            to = shared + column
    at_tap = tap * PER_TAP
    sum1 = tl.zeros([ROWS, BLOCK], tl.int64)
    sum2 = tl.zeros([ROWS, BLOCK], tl.int64)
    for first in range(start, end, ROWS):
        positions = first + tl.arange(0, ROWS)
        live = positions < end
        images = image_at(schedule, positions, live, 1).to(tl.int64)
        used = tl.load(within + images, mask=live, other=0) != 0
        at = images * blocks + at_tap
        back = tl.load(inverse + at, mask=used, other=0.0)
        speed = tl.load(rate + at, mask=used, other=0.0)
        f = load_tile(pointer, stride, images, used, rest, BLOCK)
        if MOMENTS == 3:
            sum1 += quantised(f, weight, back, speed, 1, 1)
            if NORMS == 2:
                at += n.to(tl.int64) * blocks
                back = tl.load(inverse + at, mask=used, other=0.0)
                speed = tl.load(rate + at, mask=used, other=0.0)
            sum2 += quantised(f, weight, back, speed, 2, 1)
        else:
            sum1 += quantised(f, weight, back, speed, MOMENTS, 0)
    if end > start:
        offsets = tl.arange(0, BLOCK)
        inside = offsets < rest
        q = tl.sum(sum1, axis=0)
        tl.store(to + offsets, tl.load(to + offsets, mask=inside) + q, mask=inside)
        if MOMENTS == 3:
            to += step
            q = tl.sum(sum2, axis=0)
            tl.store(to + offsets, tl.load(to + offsets, mask=inside) + q, mask=inside)


class _Batch:
    """A batch as its launches see it, and what they leave each other.

    Attributes:
        parts: blocks of columns of all taps.
        blocks, norms: B and N of the module's docstring.
        inverse, rate: float64 [N, n, B], of steps 1 and 2.
        schedule: int32, the labels in their order, from step 1.
        within: int32 [n], of step 4.
        groups: what kernels need to know of the groups, as constants.
    """

    def __init__(self, taps: Taps, num_classes: int, bound: Bound) -> None:
        self.taps, self.num_classes, self.bound = taps, num_classes, bound
        self.config = table.lookup("bounded_sums", taps.device, taps.dtype, taps.dim)
        self.parts = taps.blocks(self.config.block)
        self.tiles = triton.cdiv(taps.n, self.config.rows)
        self.ranges = taps.ranges(self.config.block, bound.per_tap)
        self.blocks = bound.blocks(len(taps.widths))
        self.norms = 2 if bound.per_tap and bound.bits == 3 else 1
        self.weight = bits_of(bound.weight)
        groups = bound.per_tap and self.blocks > 1
        self.groups = {"MOMENTS": bound.bits, "NORMS": self.norms, "PER_TAP": int(groups)}
        size = (self.norms, taps.n, self.blocks)
        self.inverse, self.rate = self.empty(size, torch.float64), self.empty(size, torch.float64)
        self.schedule = self.empty((schedules.size(taps.n, num_classes),), torch.int32)
        self.within = self.empty((taps.n,), torch.int32)

    def empty(self, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=dtype, device=self.taps.device)

    def over_blocks(self, kernel: Any, rows: int, *args: Any, **constants: int) -> None:
        launch_blocks(kernel, self.taps, self.config, rows, *args, **constants, **_EXACT)

    def over_images(self, kernel: Any, grid: tuple[int, ...], *args: Any, **constants: int) -> None:
        options = {"num_warps": table.FINISH_WARPS, **_EXACT}
        launch(kernel, grid, self.taps.device, *args, **constants, **options)


def _find_inverse(batch: _Batch, labels: Tensor) -> None:
    """Step 1 and the schedule."""
    n, parts, num_classes = batch.taps.n, batch.parts, batch.num_classes
    largest = batch.empty((n, parts), torch.int32)
    counts = batch.empty((num_classes,), torch.float32)
    batch.over_blocks(partial_largest, batch.tiles, largest, batch.schedule, n, parts, num_classes)
    batch.over_images(
        finish_largest,
        (n * batch.blocks + num_classes,),
        largest,
        batch.ranges,
        labels,
        batch.inverse,
        counts,
        batch.schedule,
        n,
        batch.blocks,
        parts,
        num_classes,
        batch.weight,
        MOMENTS=batch.bound.bits,
        NORMS=batch.norms,
    )


def _find_rate(batch: _Batch, limits: Tensor) -> None:
    """Step 2."""
    bound, widths = batch.bound, batch.taps.widths
    sizes = (batch.taps.n, batch.blocks, batch.parts)
    share = 1.0 / math.sqrt(len(bound.moments) * len(widths)) if bound.per_tap else 1.0
    bits = _fraction_bits(widths, len(bound.moments), bound.per_tap, batch.taps.device)
    squares = batch.empty((batch.norms, batch.taps.n, batch.parts), torch.int64)
    batch.over_blocks(
        partial_squares,
        batch.tiles,
        batch.inverse,
        bits,
        squares,
        *sizes,
        batch.weight,
        **batch.groups,
    )
    batch.over_images(
        finish_squares,
        (batch.taps.n * batch.blocks, batch.norms),
        squares,
        batch.ranges,
        bits,
        limits,
        batch.inverse,
        batch.rate,
        *sizes,
        bits_of(share),
        bits_of(bound.clip * share),
        BALL=int(bound.ball),
    )


def _certify(batch: _Batch, valid: Tensor, limits: Tensor, nonnegative: bool) -> None:
    """Steps 3 and 4."""
    n, parts = batch.taps.n, batch.parts
    squares = batch.empty((2, n, parts), torch.int64)
    batch.over_blocks(
        partial_certificate,
        batch.tiles,
        batch.inverse,
        batch.rate,
        squares,
        n,
        batch.blocks,
        parts,
        batch.weight,
        NONNEGATIVE=int(nonnegative),
        **batch.groups,
    )
    valid = valid.view(torch.uint8)
    batch.over_images(finish_certificate, (n,), squares, valid, limits, batch.within, n, parts)


def _add(batch: _Batch, sums: Tensor, shared: Tensor | None, shared_taps: int) -> None:
    """What is certified, into the sums."""
    of_shared = sum(batch.taps.widths[:shared_taps])
    own = batch.taps.dim - of_shared
    for piece in batch.taps.launches(batch.config.block):
        whole = own % piece.vector == of_shared % piece.vector == 0
        launch(
            add_sums,
            (piece.blocks, batch.num_classes),
            batch.taps.device,
            piece.addresses,
            piece.records,
            batch.inverse,
            batch.rate,
            batch.within,
            batch.schedule,
            sums,
            sums if shared is None else shared,
            batch.taps.n,
            batch.blocks,
            batch.num_classes,
            batch.weight,
            shared_taps,
            own,
            of_shared,
            TYPE=batch.taps.type,
            VECTOR=piece.vector,
            SHARED=int(shared_taps > 0),
            SUMS=piece.vector if whole else 1,
            **batch.groups,
            **batch.config.options,
            **_EXACT,
        )


def bounded_sums(
    features: Sequence[Tensor],
    labels: Tensor,
    valid: Tensor,
    limits: Tensor,
    *,
    bound: Bound,
    nonnegative: bool,
    sums: Tensor,
    shared: Tensor | None = None,
    shared_taps: int = 0,
) -> None:
    """Adds the bounded integer vectors of a batch to int64 class sums: `PrivateSums.add` exactly.

    What the images hold never raises: rows that are not valid, whose label is not in 0..K-1, whose
    limit is not in 1..2^30 or which fail the certificate add nothing.

    Seven launches over the features' four reads; all tensors on one device.

    Args:
        features: L tensors [n, ...], float32 or bfloat16.
        labels: int64 [n].
        valid: bool [n].
        limits: int64 [n], greatest norm of each image's vector in grid units.
        bound, nonnegative: as `dpmmd.privacy.sums.PrivateSums.add`.
        sums: int64 [K, M D'], D' the columns of the taps that are not shared; added to.
        shared: int64 [1, M (D - D')], added to whatever the label; None where ``shared_taps`` is 0.
        shared_taps: how many leading taps are shared by all classes.
    """
    taps = Taps(features, planes=False)
    check_sums(features, taps.widths, labels, valid, limits, bound, sums, shared, shared_taps)
    if taps.n == 0 or taps.dim == 0 or sums.shape[0] == 0:
        return
    batch = _Batch(taps, sums.shape[0], bound)
    _find_inverse(batch, labels)
    _find_rate(batch, limits)
    _certify(batch, valid, limits, nonnegative)
    _add(batch, sums, shared, shared_taps)


@lru_cache(maxsize=256)
def _fraction_bits(
    widths: tuple[int, ...], moments: int, per_tap: bool, device: torch.device
) -> Tensor:
    """int32 [B]: b of every block of taps, so that s <= 2^62."""
    columns = widths if per_tap else (moments * sum(widths),)
    bits = [62 - max(0, math.ceil(math.log2(max(c, 1)))) for c in columns]
    return to_device(torch.tensor(bits, dtype=torch.int32), device)
