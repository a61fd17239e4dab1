"""A small convolutional generator for 28- and 32-px images, fast on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpmmd.generators.layers import (
    ClassNorm,
    LatentInput,
    UpsampledConv,
    initialise,
    norm_relu,
    to_pixels,
)


class ConvGenerator(nn.Module):
    """Linear, then twice (nearest upsampling x 2, 3x3 convolution), batch norm and ReLU between.

    Labels enter with the latent vector. With ``by_class`` every batch norm has a scale and a shift
    for each of them, too (`dpmmd.generators.layers.ClassNorm`).

    Args:
        num_classes: K, or None for no labels.
        image_size: side in pixels, a multiple of 4.
        channels: 1 or 3.
        z_dim: size of the latent vector.
        base_channels: width at full resolution; twice that at half, four times at a quarter.

    Raises:
        ValueError: ``image_size`` is not a multiple of 4.
    """

    def __init__(
        self,
        *,
        num_classes: int | None,
        image_size: int = 28,
        channels: int = 1,
        z_dim: int = 100,
        base_channels: int = 32,
        by_class: bool = False,
    ) -> None:
        super().__init__()
        if image_size < 8 or image_size % 4:
            raise ValueError(f"image_size={image_size}: expected a multiple of 4, at least 8.")
        self.z_dim, self.num_classes = z_dim, num_classes
        self.image_size, self.channels = image_size, channels
        b = base_channels
        self.latent = LatentInput(z_dim, num_classes, 4 * b, image_size // 4)
        self.norm0 = _norm(4 * b, num_classes, by_class)
        self.conv1 = UpsampledConv(4 * b, 2 * b)
        self.norm1 = _norm(2 * b, num_classes, by_class)
        self.conv2 = UpsampledConv(2 * b, b)
        self.norm2 = _norm(b, num_classes, by_class)
        self.to_image = nn.Conv2d(b, channels, 3, padding=1)
        initialise(self)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """z [n, z_dim], y int64 [n] or None, to images [n, channels, image_size, image_size]."""
        h = norm_relu(self.norm0, self.latent(z, y), y)
        h = norm_relu(self.norm1, self.conv1(h), y)
        h = norm_relu(self.norm2, self.conv2(h), y)
        return to_pixels(self.to_image(h))


def _norm(channels: int, num_classes: int | None, by_class: bool) -> nn.Module:
    if by_class and num_classes is not None:
        return ClassNorm(channels, num_classes)
    return nn.BatchNorm2d(channels)
