"""The paper's generator: residual blocks with upsampling (Harder et al. 2023, appendix; the
architecture of generative feature matching networks, Santos et al. 2019)."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from dpmmd.generators.layers import (
    LatentInput,
    UpsampledConv,
    add_upsampled,
    initialise,
    norm_relu,
    recomputed,
    to_pixels,
)


class ResNetGenerator(nn.Module):
    """Linear to 4 x 4, then residual blocks that double the side up to the image's.

    The width is ``base_channels`` at full resolution and doubles with every halving of the side,
    up to eight times.

    With ``recompute`` set to True, backward keeps the inputs of the blocks and computes what is
    inside of them again: the same result in less memory and more time.

    Args:
        num_classes: K, or None for no labels.
        image_size: side in pixels: 32, 64, 128, 256 or 512.
        channels: 1 or 3.
        z_dim: size of the latent vector; the paper's is 100.
        base_channels: the paper's is 64.

    Raises:
        ValueError: another ``image_size``.
    """

    def __init__(
        self,
        *,
        num_classes: int | None,
        image_size: int = 32,
        channels: int = 3,
        z_dim: int = 100,
        base_channels: int = 64,
    ) -> None:
        super().__init__()
        if image_size not in (32, 64, 128, 256, 512):
            raise ValueError(f"image_size={image_size}: expected 32, 64, 128, 256 or 512.")
        self.z_dim, self.num_classes, self.recompute = z_dim, num_classes, False
        self.image_size, self.channels = image_size, channels
        doublings = image_size.bit_length() - 3  # from 4 x 4
        widths = [base_channels * min(8, 1 << i) for i in range(doublings, -1, -1)]
        self.latent = LatentInput(z_dim, num_classes, widths[0], 4)
        self.blocks = nn.Sequential(*(_UpBlock(a, b) for a, b in pairwise(widths)))
        self.norm = nn.BatchNorm2d(widths[-1])
        self.to_image = nn.Conv2d(widths[-1], channels, 3, padding=1)
        initialise(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """z [n, z_dim], y int64 [n] or None, to images [n, channels, image_size, image_size]."""
        h = self.latent(z, y)
        if self.recompute and self.training and torch.is_grad_enabled():
            for block in self.blocks:
                h = recomputed(block, h)
        else:
            h = self.blocks(h)
        return to_pixels(self.to_image(norm_relu(self.norm, h)))


class _UpBlock(nn.Module):
    """x -> up(skip(x)) + conv(relu(norm(conv(up(relu(norm(x)))))))."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = UpsampledConv(inputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(norm_relu(self.norm1, x))
        h = self.conv2(norm_relu(self.norm2, h))
        # A 1x1 convolution and nearest upsampling commute: the cheap order first.
        return add_upsampled(h, self.skip(x))
