"""The sum of a map and a smaller one upsampled x 2 (nearest), and the smaller one's gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd.kernels.maps import Cut, offsets, tile_of


@triton.jit(do_not_specialize=["rows", "height", "width"])
def add_kernel(h, s, out, rows, height, width, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i, y, x] = h[i, y, x] + s[i, y // 2, x // 2]; grid [tiles of rows, blocks of channels].

    Shapes: h, out [n, 2 height, 2 width, C]; s [n, height, width, C]; rows those of h.
    Bytes: h and s in, out out. Deterministic. Backward needs none of them.
    """
    at, columns, mask = tile_of(rows, channels, tl.program_id(0), ROWS, BLOCK)
    line = at // (2 * width)
    x = at - line * (2 * width)
    image = line // (2 * height)
    y = line - image * (2 * height)
    small = (image * height + y // 2) * width + x // 2
    where = offsets(at, columns, channels)
    sums = tl.load(h + where, mask=mask, other=0.0).to(tl.float32)
    sums += tl.load(s + offsets(small, columns, channels), mask=mask, other=0.0).to(tl.float32)
    tl.store(out + where, sums, mask=mask)


@triton.jit(do_not_specialize=["rows", "width"])
def fold_kernel(grad, out, rows, width, channels, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """out[i, y, x] = the sum over the 2x2 pixels of grad that s[i, y, x] was added to, in float32.

    Grid [tiles of rows, blocks of channels]. Shapes: out [n, height, width, C], whose rows they
    are; grad [n, 2 height, 2 width, C]. Bytes: grad in, out out. Deterministic.
    """
    at, columns, mask = tile_of(rows, channels, tl.program_id(0), ROWS, BLOCK)
    line = at // width
    first = 4 * line * width + 2 * (at - line * width)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for dy in tl.static_range(2):
        for dx in tl.static_range(2):
            where = offsets(first + dy * 2 * width + dx, columns, channels)
            total += tl.load(grad + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + offsets(at, columns, channels), total, mask=mask)


def add_upsampled(h: Tensor, s: Tensor) -> Tensor:
    """h [n, C, 2 H, 2 W] plus s [n, C, H, W] upsampled, in one launch.

    Args:
        h, s: of one dtype, float32 or bfloat16, channels-last.
    """
    cut, out = Cut.of("upsampling", h), torch.empty_like(h)
    cut.launch(add_kernel, cut.tiles, h, s, out, cut.rows, s.shape[2], s.shape[3], cut.channels)
    return out


def upsampled_gradient(grad: Tensor) -> Tensor:
    """The gradient [n, C, H, W] of what was upsampled to [n, C, 2 H, 2 W], in one launch.

    Args:
        grad: of the sum, float32 or bfloat16, channels-last.
    """
    n, channels, height, width = grad.shape
    out = torch.empty(
        (n, channels, height // 2, width // 2),
        dtype=grad.dtype,
        device=grad.device,
        memory_format=torch.channels_last,
    )
    cut = Cut.of("upsampling", out)
    cut.launch(fold_kernel, cut.tiles, grad, out, cut.rows, width // 2, cut.channels)
    return out
