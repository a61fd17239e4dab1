"""What generators share: latent input with its class, fast upsampling, initial weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpmmd._choices import CHOICES
from dpmmd.generators import fused


class LatentInput(nn.Module):
    """(z, one-hot y) to a feature map [n, channels, side, side], channels-last in memory.

    Raises:
        ValueError: labels missing for a class-conditional generator, or given to another.
    """

    def __init__(self, z_dim: int, num_classes: int | None, channels: int, side: int) -> None:
        super().__init__()
        self.num_classes, self.channels, self.side = num_classes, channels, side
        self.linear = nn.Linear(z_dim + (num_classes or 0), side * side * channels)

    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        if (y is None) != (self.num_classes is None):
            raise ValueError(
                f"y={'None' if y is None else 'labels'}: the generator is built for "
                f"num_classes={self.num_classes}; pass labels exactly if it has classes."
            )
        if y is not None and self.num_classes is not None:
            z = torch.cat([z, F.one_hot(y, self.num_classes).to(z.dtype)], dim=1)
        h: Tensor = self.linear(z).view(-1, self.side, self.side, self.channels)
        return h.permute(0, 3, 1, 2)


class UpsampledConv(nn.Conv2d):
    """A 3x3 convolution of the input upsampled x 2 (nearest), at 4/9 of the products.

    Every output pixel sees a 3x3 window of the upsampled image, which holds only 2x2 different
    pixels: the same function is a transposed 4x4 convolution with stride 2, whose kernel sums those
    of the 3x3 weights that fall on one pixel. [n, in, H, W] to [n, out, 2 H, 2 W].
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv_transpose2d(x, _Spread.apply(self.weight), stride=2, padding=1)


class _Spread(torch.autograd.Function):
    """The 4x4 kernel [in, out, 4, 4] of a weight [out, in, 3, 3], channels-last in memory.

    Of rows first, then of columns, it makes (c, b + c, a + b, a) from (a, b, c).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        turned = weight.transpose(0, 1).contiguous(memory_format=torch.channels_last)
        return torch.cat(_spread(torch.cat(_spread(turned, 2), dim=2), 3), dim=3)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Gather.apply(grad)


def _spread(w: Tensor, dim: int) -> tuple[Tensor, ...]:
    a, _, c = w.split(1, dim)
    first, second = (w.narrow(dim, 0, 2) + w.narrow(dim, 1, 2)).split(1, dim)
    return c, second, first, a


class _Gather(torch.autograd.Function):
    """The adjoint of `_Spread`, [in, out, 4, 4] to [out, in, 3, 3]."""

    @staticmethod
    def forward(ctx: Any, kernel: Tensor) -> Tensor:
        kernel = kernel.flip(2, 3)
        columns = kernel[..., :3] + kernel[..., 1:]
        weight = (columns[:, :, :3] + columns[:, :, 1:]).transpose(0, 1)
        return weight.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return _Spread.apply(grad)


class ClassNorm(nn.Module):
    """Batch norm whose scale and shift are those of the image's class (Dumoulin et al. 2017).

    What varies between images is normalised over all classes; how much of it a class shows, and of
    which sign, is its own. Without that classes share whatever varies: grey ones are coloured.
    """

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale = nn.Parameter(torch.ones(num_classes, channels))
        self.shift = nn.Parameter(torch.zeros(num_classes, channels))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """x [n, channels, H, W] and y int64 [n] to the shape of x."""
        scale, shift = self.scale[y], self.shift[y]
        return torch.addcmul(shift[:, :, None, None], self.norm(x), scale[:, :, None, None])


def norm_relu(norm: nn.Module, x: Tensor, y: Tensor | None = None) -> Tensor:
    """relu(norm(x)) of a batch norm, relu(norm(x, y)) of a `ClassNorm`."""
    if isinstance(norm, ClassNorm):
        return F.relu(norm(x, y))
    if CHOICES.fused_norms and fused.takes_norm(norm, x):
        return fused.NormRelu.apply(x, norm.weight, norm.bias, norm)
    return F.relu(norm(x))


def add_upsampled(h: Tensor, s: Tensor) -> Tensor:
    """h [n, C, 2 H, 2 W] plus s [n, C, H, W] upsampled x 2 (nearest)."""
    if CHOICES.fused_upsampling and fused.takes_sum(h, s):
        return fused.AddUpsampled.apply(h, s)
    return h + F.interpolate(s, scale_factor=2)


def to_pixels(x: Tensor) -> Tensor:
    """The sigmoid, of half precision in float32: pixels near 0 and 1 would be lost otherwise."""
    return torch.sigmoid(x.float() if x.dtype in (torch.float16, torch.bfloat16) else x)


def recomputed(block: nn.Module, x: Tensor) -> Tensor:
    """block(x), of which backward keeps x alone and computes the rest again, with the same result.

    Running statistics of batch norms move once.
    """
    again = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    out: Tensor = checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _statistics_stay(again)),
    )
    return out


@contextlib.contextmanager
def _statistics_stay(norms: list[nn.modules.batchnorm._BatchNorm]) -> Iterator[None]:
    """Within the block batch norms in training mode leave their running statistics as they are.

    By weight 0 for what is new: without running statistics they would save other tensors than in
    the first pass, which torch's checkpoint refuses.
    """
    kept = [
        (norm, norm.momentum, norm.num_batches_tracked.clone())
        for norm in norms
        if norm.num_batches_tracked is not None
    ]
    for norm, _, _ in kept:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum = momentum
            assert norm.num_batches_tracked is not None
            norm.num_batches_tracked.copy_(count)


def initialise(module: nn.Module) -> None:
    """He-normal weights for layers before a ReLU, zero biases; batch norm starts as identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
