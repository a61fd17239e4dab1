"""Max pooling that keeps the place of each maximum within its window in a byte."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd.kernels.maps import Cut, offsets, tile_of


@triton.jit
def split(row, height, width):
    """Image, y and x of rows of a map."""
    line = row // width
    image = line // height
    return image, line - image * height, row - line * width


@triton.jit(do_not_specialize=["rows", "height", "width", "steps_y", "steps_x"])
def pool_kernel(
    x,
    out,
    places,
    rows,
    height,
    width,
    steps_y,
    steps_x,
    channels,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the maximum of each window, places = where in it, KERNEL dy + dx of the first such.

    NaN is more than any number, and of several the last counts, as in PyTorch. Grid [tiles of rows
    of out, blocks of channels].
    Shapes: x [n, height, width, C]; out and uint8 places [n, steps_y, steps_x, C], rows theirs.
    Bytes: x once (its overlaps from a cache), out and places out. Deterministic.
    Saved for backward: places alone.
    """
    at, columns, mask = tile_of(rows, channels, tl.program_id(0), ROWS, BLOCK)
    image, y, x_ = split(at, steps_y, steps_x)
    top = y * STRIDE - PADDING
    left = x_ * STRIDE - PADDING
    first = tl.maximum(-top, 0) * KERNEL + tl.maximum(-left, 0)
    best = tl.full([ROWS, BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([ROWS, BLOCK], tl.int32) + first[:, None]
    for dy in tl.static_range(KERNEL):
        for dx in tl.static_range(KERNEL):
            row = top + dy
            column = left + dx
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            where = offsets((image * height + row) * width + column, columns, channels)
            v = tl.load(x + where, mask=mask & inside[:, None], other=float("-inf"))
            v = v.to(tl.float32)
            more = (v > best) | (v != v)
            best = tl.where(more, v, best)
            place = tl.where(more, KERNEL * dy + dx, place)
    to = offsets(at, columns, channels)
    tl.store(out + to, best, mask=mask)
    tl.store(places + to, place.to(tl.uint8), mask=mask)


@triton.jit(do_not_specialize=["rows", "height", "width", "steps_y", "steps_x"])
def unpool_kernel(
    grad,
    places,
    out,
    rows,
    height,
    width,
    steps_y,
    steps_x,
    channels,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out = the sum of grad over the windows whose maximum each pixel is, in float32 and in order.

    Grid [tiles of rows of out, blocks of channels]. Shapes: out [n, height, width, C], rows its
    own; grad and places [n, steps_y, steps_x, C].
    Bytes: grad and places once (their overlaps from a cache), out out. Deterministic.
    """
    at, columns, mask = tile_of(rows, channels, tl.program_id(0), ROWS, BLOCK)
    image, y, x = split(at, height, width)
    # The last windows that could hold the pixel, and how far into them it lies.
    low = (y + PADDING) // STRIDE
    right = (x + PADDING) // STRIDE
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for i in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
        for j in tl.static_range((KERNEL + STRIDE - 1) // STRIDE):
            row = low - i
            column = right - j
            dy = y + PADDING - row * STRIDE
            dx = x + PADDING - column * STRIDE
            inside = (row >= 0) & (row < steps_y) & (column >= 0) & (column < steps_x)
            inside = mask & (inside & (dy < KERNEL) & (dx < KERNEL))[:, None]
            where = offsets((image * steps_y + row) * steps_x + column, columns, channels)
            place = tl.load(places + where, mask=inside, other=255).to(tl.int32)
            g = tl.load(grad + where, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(place == (KERNEL * dy + dx)[:, None], g, 0.0)
    tl.store(out + offsets(at, columns, channels), total, mask=mask)


def max_pool(x: Tensor, kernel: int, stride: int, padding: int) -> tuple[Tensor, Tensor]:
    """The pooled map and uint8 places of its maxima, both channels-last, in one launch.

    Args:
        x: [n, C, H, W], float32 or bfloat16, channels-last.
        kernel: side of a window, at most 15, so that 255 is no place.
        stride, padding: PyTorch's.
    """
    steps_y, steps_x = (
        (side + 2 * padding - kernel) // stride + 1 for side in (x.shape[2], x.shape[3])
    )
    out = _map(x, (*x.shape[:2], steps_y, steps_x), x.dtype)
    places = torch.empty_like(out, dtype=torch.uint8)
    cut = Cut.of("pooling", out)
    sizes = *x.shape[2:], steps_y, steps_x, cut.channels
    window = {"KERNEL": kernel, "STRIDE": stride, "PADDING": padding}
    cut.launch(pool_kernel, cut.tiles, x, out, places, cut.rows, *sizes, **window)
    return out, places


def max_pool_gradient(
    grad: Tensor, places: Tensor, size: torch.Size, kernel: int, stride: int, padding: int
) -> Tensor:
    """The gradient of the x [n, C, H, W] of `max_pool`, in one launch.

    Args:
        grad: of the pooled map, channels-last.
        places: from `max_pool`.
        size: of x.
    """
    out = _map(grad, size, grad.dtype)
    cut = Cut.of("pooling", out)
    sizes = *size[2:], *grad.shape[2:], cut.channels
    window = {"KERNEL": kernel, "STRIDE": stride, "PADDING": padding}
    cut.launch(unpool_kernel, cut.tiles, grad, places, out, cut.rows, *sizes, **window)
    return out


def _map(like: Tensor, size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device=like.device, memory_format=torch.channels_last)
