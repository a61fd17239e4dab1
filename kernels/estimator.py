"""The difference estimators: state, loss and gradient in one pass over D-sized vectors."""

from __future__ import annotations

import math
import struct

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd._cores.checks import check_apart
from dpmmd.kernels import table
from dpmmd.kernels.taps import check_buffer, launch

ESTIMATORS = {"batch": 0, "ema": 1, "adam": 2}
BATCH, EMA, ADAM = (tl.constexpr(i) for i in ESTIMATORS.values())
BETA1, BETA2, EPSILON = tl.constexpr(0.9), tl.constexpr(0.999), tl.constexpr(1e-8)
LOG_BETA1, LOG_BETA2 = tl.constexpr(math.log(0.9)), tl.constexpr(math.log(0.999))
VALUES = tl.constexpr(1024)


@triton.jit
def number(bits):
    """The float64 whose bits an int64 has: arguments of kernels are float32 otherwise."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


@triton.jit(do_not_specialize=["num_classes", "dim", "decay", "log_decay", "slope"])
def step_kernel(
    means,
    counts,
    target,
    estimate,
    first_moment,
    second_moment,
    steps,
    gradient,
    values,
    num_classes,
    dim,
    decay: tl.int64,
    log_decay: tl.int64,
    lr,
    slope,
    ESTIMATOR: tl.constexpr,
    UPDATE: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One step for the classes that are present, with d = target - means and t = steps + 1:

        batch  v = d                                             value |d|^2,   gradient -2 d
        ema    v' += (1 - decay) (d - v'), v = v' / (1 - decay^t)   value <v, d>,  gradient -v
        adam   one step of v on slope / 2 |v - d|^2                value <v, d>,  gradient -v

    UPDATE = 0 leaves the state (and t = steps). Absent classes keep theirs, have gradient 0 and add
    nothing. values[b, row] has a block's part of the value. Grid [blocks of D, M K].
    Shapes: means, target, estimate, first_moment, second_moment, gradient float32 [M, K, D];
    counts, steps [K]; values [blocks, M K]. decay and its logarithm are the bits of a float64.
    Bytes: 12 M K D for batch, 20 for ema, 36 for adam. Deterministic. The gradient is what backward
    needs, and all it needs.
    """
    row = tl.program_id(1)
    k = row % num_classes
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < dim
    dim = dim.to(tl.int64)
    if VECTOR > 1:
        dim = tl.multiple_of(dim, VECTOR)
        inside = columns < tl.multiple_of(dim, VECTOR)
    at = row.to(tl.int64) * dim + columns
    value = tl.zeros([], tl.float32)
    if tl.load(counts + k) > 0:
        goal = tl.load(target + at, mask=inside, other=0.0)
        d = goal - tl.load(means + at, mask=inside, other=0.0)
        if ESTIMATOR == BATCH:
            v = d
            tl.store(gradient + at, -2 * d, mask=inside)
        else:
            v = tl.load(estimate + at, mask=inside, other=0.0)
            taken = tl.maximum(tl.load(steps + k) + UPDATE, 1.0).to(tl.float64)
            if ESTIMATOR == EMA:
                if UPDATE:
                    keep = number(decay).to(tl.float32)
                    follow = (1.0 - number(decay)).to(tl.float32)
                    change = d - v
                    v = tl.where(follow < 0.5, v + follow * change, d - change * keep)
                    tl.store(estimate + at, v, mask=inside)
                v = tl.div_rn(v, (1.0 - tl.exp(taken * number(log_decay))).to(tl.float32))
            else:
                if UPDATE:
                    rate1 = tl.full([], 1 - BETA1, tl.float32)
                    rate2 = tl.full([], 1 - BETA2, tl.float32)
                    log1 = tl.full([], LOG_BETA1, tl.float64)
                    log2 = tl.full([], LOG_BETA2, tl.float64)
                    bias1 = (1.0 - tl.exp(taken * log1)).to(tl.float32)
                    bias2 = (1.0 - tl.exp(taken * log2)).to(tl.float32)
                    g = (v - d) * tl.cast(slope, tl.float32)
                    m = tl.load(first_moment + at, mask=inside, other=0.0)
                    s = tl.load(second_moment + at, mask=inside, other=0.0)
                    m += rate1 * (g - m)
                    s += rate2 * (g * g - s)
                    tl.store(first_moment + at, m, mask=inside)
                    tl.store(second_moment + at, s, mask=inside)
                    step = tl.div_rn(tl.div_rn(m, bias1), tl.sqrt_rn(tl.div_rn(s, bias2)) + EPSILON)
                    v -= step * tl.cast(lr, tl.float32)
                    tl.store(estimate + at, v, mask=inside)
            tl.store(gradient + at, -v, mask=inside)
        value = tl.sum(v * d, axis=0)
    else:
        tl.store(gradient + at, tl.zeros([BLOCK], tl.float32), mask=inside)
    tl.store(values + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + row, value)


@triton.jit(do_not_specialize=["num_values", "num_classes"])
def finish_step(
    values,
    counts,
    steps,
    value,
    num_values,
    num_classes,
    UPDATE: tl.constexpr,
):
    """value = sum of values in float64, in a fixed order; steps += 1 for classes that are present.

    One program. Bytes: the values once. Deterministic.
    """
    sums = tl.zeros([VALUES], tl.float64)
    for first in range(0, num_values, VALUES):
        at = first + tl.arange(0, VALUES)
        sums += tl.load(values + at, mask=at < num_values, other=0.0).to(tl.float64)
    tl.store(value, tl.sum(sums, axis=0).to(tl.float32))
    if UPDATE:
        for first in range(0, num_classes, VALUES):
            at = first + tl.arange(0, VALUES)
            inside = at < num_classes
            present = tl.load(counts + at, mask=inside, other=0.0) > 0
            taken = tl.load(steps + at, mask=inside, other=0.0)
            tl.store(steps + at, taken + present.to(tl.float32), mask=inside)


def difference_into(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    *,
    estimator: str,
    estimate: Tensor | None,
    steps: Tensor | None,
    first_moment: Tensor | None,
    second_moment: Tensor | None,
    decay: float,
    lr: float,
    numbers: int | None,
    update: bool,
    value: Tensor,
    gradient: Tensor,
) -> None:
    """Two launches, into value (one number) and gradient [M, K, D]; moves the state in place."""
    moments, num_classes, dim = means.shape
    device, rows = means.device, moments * num_classes
    if means.numel() == 0:
        value.zero_()
        if steps is not None and update:
            steps += counts > 0
        return
    config = table.lookup("estimator", device, torch.float32, dim)
    values = torch.empty(triton.cdiv(dim, config.block), rows, dtype=torch.float32, device=device)
    moves = int(update and estimator != "batch")
    launch(
        step_kernel,
        tuple(values.shape),
        device,
        means,
        counts,
        target,
        means if estimate is None else estimate,
        means if first_moment is None else first_moment,
        means if second_moment is None else second_moment,
        counts if steps is None else steps,
        gradient,
        values,
        num_classes,
        dim,
        bits_of(decay),
        bits_of(math.log(decay) if decay > 0 else -math.inf),
        lr,
        2.0 / (means.numel() if numbers is None else numbers),
        ESTIMATOR=ESTIMATORS[estimator],
        UPDATE=moves,
        VECTOR=4 if dim % 4 == 0 else 1,
        BLOCK=config.block,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    launch(
        finish_step,
        (1,),
        device,
        values,
        counts,
        counts if steps is None else steps,
        value,
        values.numel(),
        num_classes,
        UPDATE=moves,
        num_warps=table.VALUE_WARPS,
    )


def difference(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    *,
    estimator: str = "batch",
    estimate: Tensor | None = None,
    steps: Tensor | None = None,
    first_moment: Tensor | None = None,
    second_moment: Tensor | None = None,
    decay: float = 0.0,
    lr: float = 0.0,
    numbers: int | None = None,
    update: bool = True,
) -> tuple[Tensor, Tensor]:
    """Loss of a difference estimator and its gradient in ``means``, as `_cores.cpu.difference`.

    All tensors are float32 on one device; the state (estimate, first_moment, second_moment
    [M, K, D], steps [K]) is contiguous and changed in place.

    Returns:
        A scalar and [M, K, D].
    """
    device, shape = means.device, tuple(means.shape)
    means, counts, target = means.contiguous(), counts.contiguous(), target.contiguous()
    inputs = {"means": means, "target": target, "counts": counts}
    given = {
        "estimate": estimate,
        "first_moment": first_moment,
        "second_moment": second_moment,
        "steps": steps,
    }
    states = {name: state for name, state in given.items() if state is not None}
    for name, buffer in (inputs | states).items():
        check_buffer(name, buffer, shape[1:2] if name in ("counts", "steps") else shape, device)
    check_apart(states, inputs)
    value = torch.empty((), dtype=torch.float32, device=device)
    gradient = torch.empty(shape, dtype=torch.float32, device=device)
    difference_into(
        means,
        counts,
        target,
        estimator=estimator,
        estimate=estimate,
        steps=steps,
        first_moment=first_moment,
        second_moment=second_moment,
        decay=decay,
        lr=lr,
        numbers=numbers,
        update=update,
        value=value,
        gradient=gradient,
    )
    return value, gradient


def bits_of(value: float) -> int:
    """What `number` takes."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits
