"""The estimators of target - means: state, loss and gradient in one pass over D-sized vectors."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd._contract.checks import check_estimate
from dpmmd._contract.protocol import Step
from dpmmd.kernels import table
from dpmmd.kernels.taps import bits_of, launch, number

ESTIMATORS = {"batch": 0, "ema": 1, "adam": 2}
BATCH, EMA, ADAM = (tl.constexpr(i) for i in ESTIMATORS.values())
BETA1, BETA2, EPSILON = tl.constexpr(0.9), tl.constexpr(0.999), tl.constexpr(1e-8)
LOG_BETA1, LOG_BETA2 = tl.constexpr(math.log(0.9)), tl.constexpr(math.log(0.999))
VALUES = tl.constexpr(1024)


@triton.jit
def adam_step(v, d, slope, taken, first_moment, second_moment, at, inside):
    """Adam's step at the rate 1, the ``taken``-th, for the gradient slope (v - d)."""
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
    return tl.div_rn(tl.div_rn(m, bias1), tl.sqrt_rn(tl.div_rn(s, bias2)) + EPSILON)


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
                    step = adam_step(v, d, slope, taken, first_moment, second_moment, at, inside)
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


def estimate_into(
    means: Tensor, counts: Tensor, target: Tensor, step: Step, value: Tensor, gradient: Tensor
) -> None:
    """Two launches, into value (one number) and gradient [M, K, D]; moves the state in place."""
    moments, num_classes, dim = means.shape
    device, rows = means.device, moments * num_classes
    if means.numel() == 0:
        value.zero_()
        if step.steps is not None and step.update:
            step.steps.add_(counts > 0)
        return
    config = table.lookup("estimator", device, torch.float32, dim)
    values = torch.empty(triton.cdiv(dim, config.block), rows, dtype=torch.float32, device=device)
    steps = counts if step.steps is None else step.steps
    moves = int(step.update and step.estimator != "batch")
    launch(
        step_kernel,
        tuple(values.shape),
        device,
        means,
        counts,
        target,
        means if step.estimate is None else step.estimate,
        means if step.first_moment is None else step.first_moment,
        means if step.second_moment is None else step.second_moment,
        steps,
        gradient,
        values,
        num_classes,
        dim,
        bits_of(step.decay),
        bits_of(math.log(step.decay) if step.decay > 0 else -math.inf),
        step.lr,
        2.0 / (means.numel() if step.numbers is None else step.numbers),
        ESTIMATOR=ESTIMATORS[step.estimator],
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
        steps,
        value,
        values.numel(),
        num_classes,
        UPDATE=moves,
        num_warps=table.VALUE_WARPS,
    )


def estimate(means: Tensor, counts: Tensor, target: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """Loss of an estimator of target - means and its gradient in ``means``.

    All tensors are float32 on one device; the state (estimate, first_moment, second_moment
    [M, K, D], steps [K]) is contiguous and changed in place.

    Returns:
        A scalar and [M, K, D].
    """
    means, counts, target = means.contiguous(), counts.contiguous(), target.contiguous()
    check_estimate(means, counts, target, step.state(), means.device)
    value, gradient = means.new_empty(()), torch.empty_like(means)
    estimate_into(means, counts, target, step, value, gradient)
    return value, gradient
