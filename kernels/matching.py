"""The loss of an "adam" step on the mean embedding: sums, estimate and row dots in one pass.

The gradient of the loss in the means is -v, v the estimate after its step. So class means [M, K, D]
and their gradient [M, K, D] are never written: a program that has a class's sums in a block of
columns takes the estimate's step there, and has in v what the row dots of the same images need. The
gradient of the features reads v itself, and the scalar that reaches the loss from the device.

Launches: 3 after the row statistics (the pass, finish, value), backward 1. The state moves to the
same bits as by `class_sums` and `estimator`, whose functions these kernels call; so a training may
go on with either. The value and the row dots are summed over other blocks of columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd._contract.checks import check_buffer, check_labels
from dpmmd._contract.protocol import Saved, Step
from dpmmd.bounds import Bound
from dpmmd.kernels import injection, table
from dpmmd.kernels.class_sums import sums_of_class
from dpmmd.kernels.estimator import VALUES, adam_step, finish_step
from dpmmd.kernels.gradient import Terms, gradient
from dpmmd.kernels.row_dots import finish_dots
from dpmmd.kernels.row_statistics import check_saved, row_statistics
from dpmmd.kernels.schedule import class_range, image_at
from dpmmd.kernels.taps import Taps, find_block, launch, launch_blocks, load_tile

_SIZES = ["addresses", "n", "dim", "blocks", "parts", "num_classes", "slope"]


@triton.jit
def match_row(total, share, target, v, m, s, at, inside, taken, lr, slope):
    """Adam's step at [BLOCK] numbers of one class and moment: v there, and the sum of v d."""
    # The product is rounded by itself, as where means are stored. A compiler may make one operation
    # of a product and the difference it stands in, but not of this.
    mean = tl.fma(total, share, 0.0)
    d = tl.load(target + at, mask=inside, other=0.0) - mean
    estimate = tl.load(v + at, mask=inside, other=0.0)
    step = adam_step(estimate, d, slope, taken, m, s, at, inside)
    estimate -= step * tl.cast(lr, tl.float32)
    tl.store(v + at, estimate, mask=inside)
    return estimate, tl.sum(estimate * d, axis=0)


@triton.jit
def store_dots(
    f,
    stride,
    rest,
    schedule,
    partials,
    start,
    end,
    n,
    parts,
    v1,
    v2,
    MOMENTS: tl.constexpr,
    LABELLED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[m, i] = sum of f^m v_m over a block, for the images i at positions start..end.

    A row without use may have any result, NaN too: `finish_dots` leaves it out.
    """
    for first in range(start, end, ROWS):
        positions = first + tl.arange(0, ROWS)
        live = positions < end
        images = image_at(schedule, positions, live, LABELLED).to(tl.int64)
        tile = load_tile(f, stride, images, live, rest, BLOCK)
        at = partials + images * parts
        if MOMENTS & 1:
            tl.store(at, tl.sum(tile * v1[None, :], axis=1), mask=live)
            at += n.to(tl.int64) * parts
        if MOMENTS & 2:
            tl.store(at, tl.sum(tile * tile * v2[None, :], axis=1), mask=live)


@triton.jit(do_not_specialize=_SIZES)
def match_kernel(
    addresses,
    records,
    scale,
    schedule,
    target,
    v,
    m,
    s,
    steps,
    partials,
    values,
    n,
    dim,
    blocks,
    parts,
    num_classes,
    weight,
    lr,
    slope,
    TYPE: tl.constexpr,
    VECTOR: tl.constexpr,
    MOMENTS: tl.constexpr,
    NORMS: tl.constexpr,
    PER_TAP: tl.constexpr,
    LABELLED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """With d = target - mean over class k of s f^m, and values, partials of block b of columns:

        v, m, s            one step of Adam on slope / 2 |v - d|^2, the steps[k] + 1-th
        values[b, k]       <v, d>
        partials[m, i, b]  <f_i^m, v> of every image i of class k

    A program has one block and one class, whose images it reads twice; the second time they lie in
    cache, if they are few. Absent classes keep their state. Grid [blocks of the launch, K].
    Shapes: features [n, d_l] a tap; scale [N, n, B]; target, v, m, s [M, K, D]; values [parts, K];
    partials [M, n, parts], all float32.
    Bytes: the features once, 28 M K D, 4 M n parts out. Deterministic. Backward needs v alone.
    """
    f, gap, rest, column, number, block = find_block(addresses, records, TYPE, VECTOR, BLOCK)
    k = tl.program_id(1)
    start, end = class_range(schedule, k, n, num_classes, LABELLED)
    scale += number * PER_TAP
    v1, v2 = sums_of_class(
        f, gap, rest, scale, schedule, start, end, n, blocks, MOMENTS, NORMS, LABELLED, ROWS, BLOCK
    )
    value = tl.zeros([], tl.float32)
    if end > start:
        inside = tl.arange(0, BLOCK) < rest
        width = dim.to(tl.int64)
        if VECTOR > 1:
            width = tl.multiple_of(width, VECTOR)
        at = k.to(tl.int64) * width + column + tl.arange(0, BLOCK)
        share = 1.0 / tl.maximum(end - start, 1).to(tl.float32)
        taken = tl.maximum(tl.load(steps + k) + 1, 1.0).to(tl.float64)
        if MOMENTS & 1:
            v1, value = match_row(v1, share, target, v, m, s, at, inside, taken, lr, slope)
            at += num_classes.to(tl.int64) * width
        if MOMENTS & 2:
            share = share * tl.cast(weight, tl.float32)
            v2, more = match_row(v2, share, target, v, m, s, at, inside, taken, lr, slope)
            value += more
        to = partials + block
        store_dots(
            f, gap, rest, schedule, to, start, end, n, parts, v1, v2, MOMENTS, LABELLED, ROWS, BLOCK
        )
    tl.store(values + block * num_classes + k, value)


@triton.jit(do_not_specialize=["n", "blocks", "parts", "num_classes", "num_values"])
def finish_matching(
    partials,
    ranges,
    labels,
    schedule,
    scale,
    projection,
    coefficients,
    values,
    sums,
    n,
    blocks,
    parts,
    num_classes,
    num_values,
    weight,
    MOMENTS: tl.constexpr,
    JOINT: tl.constexpr,
    LABELLED: tl.constexpr,
):
    """`finish_dots` by the first n B programs; sums [programs beyond], of VALUES values each.

    Grid [n B + parts of the values].
    Bytes: 4 M n parts and the values in, 12 N n B. Deterministic.
    """
    program = tl.program_id(0)
    if program < n * blocks:
        finish_dots(
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
            MOMENTS,
            JOINT,
            LABELLED,
        )
    else:
        part = program - n * blocks
        at = part.to(tl.int64) * VALUES + tl.arange(0, VALUES)
        some = tl.load(values + at, mask=at < num_values, other=0.0).to(tl.float64)
        tl.store(sums + part, tl.sum(some, axis=0))


def match_into(
    taps: Taps,
    labels: Tensor | None,
    bound: Bound,
    saved: Saved,
    counts: Tensor,
    target: Tensor,
    step: Step,
    value: Tensor,
    coefficients: Tensor,
) -> None:
    """Three launches, into value (one number) and coefficients [N, n, B]; moves the state in place.

    Args:
        taps: in the order of columns.
        labels, bound, saved, counts: as given to and by `row_statistics`.
        target, step: float32 [M, K, D], and an "adam" step that moves.
        coefficients: of the upstream gradient v, as `row_dots` computes them.
    """
    state, num_classes = step.state(), counts.shape[0]
    if taps.n == 0 or taps.dim == 0:
        value.zero_()
        coefficients.zero_()
        state["steps"].add_(counts > 0)
        return
    config = table.lookup("matching", taps.device, taps.dtype, taps.dim)
    new, parts = taps.tensors[0].new_empty, taps.blocks(config.block)
    partials = new((len(bound.moments), taps.n, parts), dtype=torch.float32)
    values = new((parts, num_classes), dtype=torch.float32)
    launch_blocks(
        match_kernel,
        taps,
        config,
        num_classes,
        saved.scale,
        saved.schedule,
        target,
        state["estimate"],
        state["first_moment"],
        state["second_moment"],
        state["steps"],
        partials,
        values,
        taps.n,
        taps.dim,
        saved.scale.shape[2],
        parts,
        num_classes,
        bound.weight,
        step.lr,
        2.0 / (target.numel() if step.numbers is None else step.numbers),
        MOMENTS=bound.bits,
        NORMS=saved.scale.shape[0],
        PER_TAP=int(saved.scale.shape[2] > 1),
        LABELLED=int(labels is not None),
    )
    ranges = taps.ranges(config.block, bound.per_tap)
    sums = _finish(partials, values, ranges, labels, bound, saved, coefficients)
    launch(
        finish_step,
        (1,),
        taps.device,
        sums,
        counts,
        state["steps"],
        value,
        sums.numel(),
        num_classes,
        UPDATE=1,
        num_warps=table.VALUE_WARPS,
    )


def _finish(
    partials: Tensor,
    values: Tensor,
    ranges: Tensor,
    labels: Tensor | None,
    bound: Bound,
    saved: Saved,
    coefficients: Tensor,
) -> Tensor:
    """One launch, from what `match_kernel` leaves to coefficients; returns sums of its values."""
    _, n, blocks = saved.scale.shape
    parts, num_classes = values.shape
    sums = values.new_empty(triton.cdiv(values.numel(), VALUES.value), dtype=torch.float64)
    launch(
        finish_matching,
        (n * blocks + sums.numel(),),
        values.device,
        partials,
        ranges,
        saved.schedule if labels is None else labels,
        saved.schedule,
        saved.scale,
        saved.projection,
        coefficients,
        values,
        sums,
        n,
        blocks,
        parts,
        num_classes,
        values.numel(),
        bound.weight,
        MOMENTS=bound.bits,
        JOINT=int(bound.joint),
        LABELLED=int(labels is not None),
        num_warps=table.FINISH_WARPS,
    )
    return sums


def forward(
    taps: Taps,
    labels: Tensor | None,
    num_classes: int,
    bound: Bound,
    target: Tensor,
    step: Step,
    partials: Sequence[Tensor | None] | None = None,
) -> tuple[Tensor, Saved, Tensor]:
    """The loss of an "adam" step that moves, and what `backward` needs beside the estimate.

    Args:
        taps: in the order of columns (`Taps.planes` is empty).
        target: float32 [M, K, D].
        step: its state is float32, contiguous and changed in place.
        partials: what taps bring with gradient injection, as `injection.forward` takes it.

    Returns:
        A scalar, scale and projection and schedule, and coefficients [N, n, B].
    """
    target = target.contiguous()
    _check(taps, labels, num_classes, bound, target, step)
    labels = None if labels is None else labels.contiguous()
    if partials is None:
        saved, counts = row_statistics(taps, labels, num_classes, bound)
    else:
        saved, counts = injection.statistics(taps, partials, labels, num_classes, bound)
    value, coefficients = target.new_empty(()), torch.empty_like(saved.scale)
    match_into(taps, labels, bound, saved, counts, target, step, value, coefficients)
    return value, saved, coefficients


def backward(
    taps: Taps,
    labels: Tensor | None,
    num_classes: int,
    bound: Bound,
    saved: Saved,
    coefficients: Tensor,
    estimate: Tensor,
    grad: Tensor,
    needed: Sequence[bool],
) -> tuple[Terms, list[Tensor]]:
    """What `gradient.rectified_gradient` takes of all taps, and the gradients that are needed here.

    Args:
        taps, labels, num_classes, bound: as in `forward`.
        saved, coefficients: from `forward`.
        estimate: the state's as `forward` left it.
        grad: float32, the number that reaches the loss; it is read on the device.
        needed: for which taps.
    """
    size = (len(bound.moments), num_classes, taps.dim)
    check_saved(taps, labels, num_classes, bound, saved)
    check_buffer("coefficients", coefficients, saved.scale.shape, taps.device)
    check_buffer("estimate", estimate, size, taps.device)
    check_buffer("grad", grad, (), taps.device)
    terms = Terms(bound, saved, coefficients, estimate, grad)
    return terms, gradient(taps, terms, needed)


def _check(
    taps: Taps, labels: Tensor | None, num_classes: int, bound: Bound, target: Tensor, step: Step
) -> None:
    """Refuses what the kernels could not take by its address."""
    if labels is not None:
        check_labels(labels, taps.n, taps.device)
    size = (len(bound.moments), num_classes, taps.dim)
    step.check(target, size, taps.device)
