"""Batch norm and ReLU of a map in training: y = max(w (x - mean) / sqrt(var + eps) + b, 0).

A map [n, C, H, W] is channels-last: R = n H W rows of C channels. Forward and backward are each
one pass that reduces rows, one small launch that adds up what it found, and one pass that writes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd.kernels import table
from dpmmd.kernels.maps import Cut, offsets, tile_of
from dpmmd.kernels.taps import PARTS, launch


@triton.jit
def load_channels(values, columns, inside):
    """A number a channel as float32 [1, BLOCK]."""
    return tl.load(values + columns, mask=inside, other=0.0).to(tl.float32)[None, :]


@triton.jit
def standardise(x, mean, rstd, weight, bias, columns, inside):
    """(x - mean) rstd, and the same times the weight plus the bias."""
    centred = x - load_channels(mean, columns, inside)
    inverse = load_channels(rstd, columns, inside)
    scale = inverse * load_channels(weight, columns, inside)
    return centred * inverse, centred * scale + load_channels(bias, columns, inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def partial_moments(x, partials, rows, steps, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """partials[p, 0] = mean, partials[p, 1] = sum of squares about it, of part p of the rows.

    Sums are of x less the part's first row, so that a large mean takes no digits of the variance.
    Grid [parts, blocks of channels]; a part is ``steps`` tiles of rows.
    Shapes: x [R, C]; partials float32 [parts, 2, C]. Bytes: x once. Deterministic.
    """
    part = tl.program_id(0)
    first = part * steps
    begin = first * ROWS
    _, columns, _ = tile_of(rows, channels, first, ROWS, BLOCK)
    inside = columns < channels
    shift = load_channels(x + begin.to(tl.int64) * channels, columns, inside)
    ones = tl.zeros([ROWS, BLOCK], tl.float32)
    twos = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(first, first + steps):
        at, columns, mask = tile_of(rows, channels, step, ROWS, BLOCK)
        d = tl.load(x + offsets(at, columns, channels), mask=mask, other=0.0)
        d = d.to(tl.float32) - shift
        d = tl.where(mask, d, 0.0)
        ones += d
        twos += d * d
    count = tl.minimum(rows - begin, steps * ROWS).to(tl.float32)
    total = tl.sum(ones, axis=0)[None, :]
    offset = total / count
    squares = tl.sum(twos, axis=0)[None, :] - total * offset
    squares = tl.where(squares < 0, 0.0, squares)
    to = partials + part.to(tl.int64) * 2 * channels + columns[None, :]
    tl.store(to, shift + offset, mask=inside[None, :])
    tl.store(to + channels, squares, mask=inside[None, :])


@triton.jit
def load_part(partials, first, parts, row, channels, columns):
    """partials[first:, row] in float64 [PARTS, BLOCK], which of them are parts, and their masks."""
    part = first + tl.arange(0, PARTS)
    mask = (part < parts)[:, None] & (columns < channels)[None, :]
    at = (2 * part + row).to(tl.int64)[:, None] * channels + columns[None, :]
    return tl.load(partials + at, mask=mask, other=0.0).to(tl.float64), part, mask


@triton.jit(do_not_specialize=["parts", "rows", "each", "momentum", "eps"])
def finish_moments(
    partials,
    mean,
    rstd,
    running_mean,
    running_var,
    batches,
    parts,
    rows,
    each,
    channels,
    momentum,
    eps,
    COLUMNS: tl.constexpr,
):
    """Mean and 1 / sqrt(var + eps) of each channel; running statistics take ``momentum`` of them.

    Parts of ``each`` rows, the last of what is left, are put together in their order in float64.
    The running variance takes the unbiased one. batches += 1. Grid [blocks of channels].
    Shapes: mean, rstd, running_mean, running_var float32 [C]; batches int64 [1].
    Bytes: 16 parts C. Deterministic. Mean and rstd serve backward.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < channels
    number = rows.to(tl.float64)
    total = tl.zeros([COLUMNS], tl.float64)
    for first in range(0, parts, PARTS):
        means, part, mask = load_part(partials, first, parts, 0, channels, columns)
        count = tl.minimum(rows - part.to(tl.int64) * each, each).to(tl.float64)
        total += tl.sum(tl.where(mask, means * count[:, None], 0.0), axis=0)
    centre = total / number
    squares = tl.zeros([COLUMNS], tl.float64)
    for first in range(0, parts, PARTS):
        means, part, mask = load_part(partials, first, parts, 0, channels, columns)
        within, part, mask = load_part(partials, first, parts, 1, channels, columns)
        count = tl.minimum(rows - part.to(tl.int64) * each, each).to(tl.float64)
        apart = means - centre[None, :]
        squares += tl.sum(tl.where(mask, within + apart * apart * count[:, None], 0.0), axis=0)
    small = tl.cast(eps, tl.float32).to(tl.float64)
    tl.store(mean + columns, centre.to(tl.float32), mask=inside)
    inverse = 1.0 / tl.sqrt(squares / number + small)
    tl.store(rstd + columns, inverse.to(tl.float32), mask=inside)
    follow = tl.cast(momentum, tl.float32)
    keep = 1.0 - follow
    old = tl.load(running_mean + columns, mask=inside, other=0.0)
    tl.store(running_mean + columns, keep * old + follow * centre.to(tl.float32), mask=inside)
    old = tl.load(running_var + columns, mask=inside, other=0.0)
    unbiased = (squares / (number - 1.0)).to(tl.float32)
    tl.store(running_var + columns, keep * old + follow * unbiased, mask=inside)
    if tl.program_id(0) == 0:
        tl.store(batches, tl.load(batches) + 1)


@triton.jit(do_not_specialize=["rows"])
def apply_norm(
    x, y, mean, rstd, weight, bias, rows, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """y = max(w (x - mean) rstd + b, 0). NaN stays NaN. Grid [tiles of rows, blocks of channels].

    Shapes: x, y [R, C]; mean, rstd, weight, bias float32 [C]. Bytes: x in, y out. Deterministic.
    Saved for backward: x, from which it computes again where y is positive.
    """
    row, columns, mask = tile_of(rows, channels, tl.program_id(0), ROWS, BLOCK)
    at = offsets(row, columns, channels)
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    _, z = standardise(v, mean, rstd, weight, bias, columns, columns < channels)
    tl.store(y + at, tl.where(z < 0, 0.0, z), mask=mask)


@triton.jit
def load_slopes(x, grad, mean, rstd, weight, bias, at, mask, columns, channels):
    """(x - mean) rstd, and the gradient where y is positive, 0 elsewhere."""
    v = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    standard, z = standardise(v, mean, rstd, weight, bias, columns, columns < channels)
    return standard, tl.where(z <= 0, 0.0, g)


@triton.jit(do_not_specialize=["rows", "steps"])
def partial_slopes(
    x,
    grad,
    partials,
    mean,
    rstd,
    weight,
    bias,
    rows,
    steps,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """partials[p] = sums over part p of the rows of g and of g (x - mean) rstd, g = grad [y > 0].

    Grid [parts, blocks of channels]. Shapes: x, grad [R, C]; partials float32 [parts, 2, C].
    Bytes: x and grad once. Deterministic.
    """
    part = tl.program_id(0)
    first = part * steps
    ones = tl.zeros([ROWS, BLOCK], tl.float32)
    twos = tl.zeros([ROWS, BLOCK], tl.float32)
    _, columns, _ = tile_of(rows, channels, first, ROWS, BLOCK)
    for step in range(first, first + steps):
        row, columns, mask = tile_of(rows, channels, step, ROWS, BLOCK)
        at = offsets(row, columns, channels)
        standard, g = load_slopes(x, grad, mean, rstd, weight, bias, at, mask, columns, channels)
        ones += g
        twos += g * tl.where(mask, standard, 0.0)
    to = partials + part.to(tl.int64) * 2 * channels + columns
    tl.store(to, tl.sum(ones, axis=0), mask=columns < channels)
    tl.store(to + channels, tl.sum(twos, axis=0), mask=columns < channels)


@triton.jit(do_not_specialize=["parts"])
def finish_slopes(partials, grad_weight, grad_bias, parts, channels, COLUMNS: tl.constexpr):
    """Gradients of weight and bias: partials added in their order in float64.

    Grid [blocks of channels]. Shapes: both float32 [C]. Bytes: 8 parts C. Deterministic.
    """
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    ones = tl.zeros([COLUMNS], tl.float64)
    twos = tl.zeros([COLUMNS], tl.float64)
    for first in range(0, parts, PARTS):
        one, _, _ = load_part(partials, first, parts, 0, channels, columns)
        two, _, _ = load_part(partials, first, parts, 1, channels, columns)
        ones += tl.sum(one, axis=0)
        twos += tl.sum(two, axis=0)
    tl.store(grad_bias + columns, ones.to(tl.float32), mask=columns < channels)
    tl.store(grad_weight + columns, twos.to(tl.float32), mask=columns < channels)


@triton.jit(do_not_specialize=["rows"])
def apply_slopes(
    x,
    grad,
    out,
    mean,
    rstd,
    weight,
    bias,
    grad_weight,
    grad_bias,
    rows,
    channels,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = w rstd (g - (grad_bias + s grad_weight) / R), with s = (x - mean) rstd.

    Grid [tiles of rows, blocks of channels]. Bytes: x and grad in, out out. Deterministic.
    """
    row, columns, mask = tile_of(rows, channels, tl.program_id(0), ROWS, BLOCK)
    at = offsets(row, columns, channels)
    standard, g = load_slopes(x, grad, mean, rstd, weight, bias, at, mask, columns, channels)
    inside = columns < channels
    scale = load_channels(rstd, columns, inside) * load_channels(weight, columns, inside)
    share = 1.0 / rows.to(tl.float32)
    common = load_channels(grad_bias, columns, inside) * share
    along = load_channels(grad_weight, columns, inside) * share
    tl.store(out + at, scale * (g - common - standard * along), mask=mask)


class Layer(NamedTuple):
    """A batch norm's float32 weight and bias [C] and what its running statistics are.

    Attributes:
        running_mean, running_var: float32 [C], moved in place.
        batches: int64, one number, raised by one.
        momentum: the part of the new in them.
        eps: added to the variance.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    batches: Tensor
    momentum: float
    eps: float


def norm_relu(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, Tensor]:
    """The ReLU of batch norm in training mode, and mean and 1 / sqrt(var + eps) [C] for backward.

    Three launches; running statistics move in place.

    Args:
        x: [n, C, H, W], channels-last, float32 or bfloat16, with n H W > 1.
    """
    cut = Cut.of("normalise", x)
    y, channels = torch.empty_like(x), cut.channels
    mean, rstd = x.new_empty((2, channels), dtype=torch.float32)
    partials, steps = _parts(cut)
    parts = partials.shape[0]
    cut.launch(partial_moments, parts, x, partials, cut.rows, steps, channels)
    launch(
        finish_moments,
        (triton.cdiv(channels, table.FINISH_COLUMNS),),
        x.device,
        partials,
        mean,
        rstd,
        layer.running_mean,
        layer.running_var,
        layer.batches,
        parts,
        cut.rows,
        steps * cut.options["ROWS"],
        channels,
        layer.momentum,
        layer.eps,
        COLUMNS=table.FINISH_COLUMNS,
        num_warps=table.VALUE_WARPS,
    )
    affine = layer.weight, layer.bias
    cut.launch(apply_norm, cut.tiles, x, y, mean, rstd, *affine, cut.rows, channels)
    return y, mean, rstd


def norm_relu_backward(
    x: Tensor, grad: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, in three launches, from what `norm_relu` took and gave.

    Args:
        grad: of y, with the shape, dtype and strides of x.
    """
    cut = Cut.of("normalise", x)
    out, channels = torch.empty_like(x), cut.channels
    grad_weight, grad_bias = x.new_empty((2, channels), dtype=torch.float32)
    partials, steps = _parts(cut)
    given, parts = (mean, rstd, weight, bias), partials.shape[0]
    cut.launch(partial_slopes, parts, x, grad, partials, *given, cut.rows, steps, channels)
    launch(
        finish_slopes,
        (triton.cdiv(channels, table.FINISH_COLUMNS),),
        x.device,
        partials,
        grad_weight,
        grad_bias,
        parts,
        channels,
        COLUMNS=table.FINISH_COLUMNS,
        num_warps=table.VALUE_WARPS,
    )
    slopes = grad_weight, grad_bias
    cut.launch(apply_slopes, cut.tiles, x, grad, out, *given, *slopes, cut.rows, channels)
    return out, grad_weight, grad_bias


def _parts(cut: Cut) -> tuple[Tensor, int]:
    """Partial results float32 [parts, 2, C], not yet written, and tiles of rows a part."""
    steps = triton.cdiv(cut.tiles * cut.blocks, table.REDUCING_PROGRAMS)
    size = (triton.cdiv(cut.tiles, steps), 2, cut.channels)
    return torch.empty(size, dtype=torch.float32, device=cut.device), steps
