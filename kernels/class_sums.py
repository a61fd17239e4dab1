"""Class sums: class means of the bounded moments, given every image's scale."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd._contract.checks import check_buffer
from dpmmd._contract.protocol import Saved
from dpmmd.bounds import Bound
from dpmmd.kernels import table
from dpmmd.kernels.schedule import class_range, image_at
from dpmmd.kernels.taps import Taps, find_block, launch_blocks, load_tile


@triton.jit
def sums_of_class(
    pointer,
    stride,
    rest,
    scale,
    schedule,
    start,
    end,
    n,
    blocks,
    MOMENTS: tl.constexpr,
    NORMS: tl.constexpr,
    LABELLED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums [BLOCK] of s_1 f and s_2 f^2 over the images at positions start..end of the order.

    ROWS at a time, in their order. Rows without use (s = 0) are not even loaded: they may hold NaN.
    """
    sum1 = tl.zeros([BLOCK], tl.float32)
    sum2 = tl.zeros([BLOCK], tl.float32)
    for first in range(start, end, ROWS):
        positions = first + tl.arange(0, ROWS)
        live = positions < end
        images = image_at(schedule, positions, live, LABELLED).to(tl.int64)
        one = tl.load(scale + images * blocks, mask=live, other=0.0)
        two = one
        if NORMS == 2:
            two = tl.load(scale + (images + n) * blocks, mask=live, other=0.0)
        used = (one != 0) | (two != 0)
        f = load_tile(pointer, stride, images, used, rest, BLOCK)
        if MOMENTS & 1:
            sum1 += tl.sum(one[:, None] * f, axis=0)
        if MOMENTS & 2:
            sum2 += tl.sum(two[:, None] * (f * f), axis=0)
    return sum1, sum2


@triton.jit(do_not_specialize=["addresses", "n", "dim", "blocks", "num_classes"])
def class_sums_kernel(
    addresses,
    records,
    scale,
    schedule,
    means,
    n,
    dim,
    blocks,
    num_classes,
    weight,
    TYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    MOMENTS: tl.constexpr,
    NORMS: tl.constexpr,
    PER_TAP: tl.constexpr,
    LABELLED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """means[m, k] = sum over images i of class k of s_i v_m / n_k; v_1 = f, v_2 = weight f^2.

    A program has one block of columns and one class. A block is as wide as its threads' loads, so
    that a thread has its columns to itself: no sum crosses threads. Absent classes become zero.
    Grid [blocks of the launch, K].
    Shapes: features [n, d_l] a tap; scale float32 [N, n, B]; means float32 [M, K, D].
    Bytes: the features once, 4 M K D out. Deterministic.
    """
    f, stride, rest, column, number, _ = find_block(addresses, records, TYPE, VECTOR, BLOCK)
    k = tl.program_id(1)
    start, end = class_range(schedule, k, n, num_classes, LABELLED)
    scale += number * PER_TAP
    sum1, sum2 = sums_of_class(
        f,
        stride,
        rest,
        scale,
        schedule,
        start,
        end,
        n,
        blocks,
        MOMENTS,
        NORMS,
        LABELLED,
        ROWS,
        BLOCK,
    )
    share = 1.0 / tl.maximum(end - start, 1).to(tl.float32)
    columns = tl.arange(0, BLOCK)
    step = dim.to(tl.int64)
    if VECTOR > 1:
        step = tl.multiple_of(step, VECTOR)
    at = means + k.to(tl.int64) * step + column
    if MOMENTS & 1:
        tl.store(at + columns, sum1 * share, mask=columns < rest)
        at += num_classes.to(tl.int64) * step
    if MOMENTS & 2:
        share = share * tl.cast(weight, tl.float32)
        tl.store(at + columns, sum2 * share, mask=columns < rest)


def class_sums_into(taps: Taps, bound: Bound, saved: Saved, means: Tensor) -> None:
    """One launch, into float32 means [M, K, D] (columns as they lie in memory).

    Args:
        saved: from `row_statistics`.
    """
    num_classes, (scale, _projection, schedule) = means.shape[1], saved
    check_buffer("means", means, (len(bound.moments), num_classes, taps.dim), taps.device)
    if taps.n == 0:
        means.zero_()
        return
    launch_blocks(
        class_sums_kernel,
        taps,
        table.lookup("class_sums", taps.device, taps.dtype, taps.dim),
        num_classes,
        scale,
        schedule,
        means,
        taps.n,
        taps.dim,
        scale.shape[2],
        num_classes,
        bound.weight,
        MOMENTS=bound.bits,
        NORMS=scale.shape[0],
        PER_TAP=int(scale.shape[2] > 1),
        LABELLED=int(schedule.numel() > 0),
    )


def class_sums(taps: Taps, num_classes: int, bound: Bound, saved: Saved) -> Tensor:
    """Means [M, K, D] in a new tensor; arguments as in `class_sums_into`."""
    size = (len(bound.moments), num_classes, taps.dim)
    means = torch.empty(size, dtype=torch.float32, device=taps.device)
    class_sums_into(taps, bound, saved, means)
    return means
