"""The DCGAN generator (Radford, Metz, Chintala 2016), conditional where there are classes."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from dpmmd.generators.layers import LatentInput, initialise, norm_relu, to_pixels


class DCGANGenerator(nn.Module):
    """Linear to 4 x 4, then transposed 4 x 4 convolutions of stride 2 up to the image's side.

    Batch norm and ReLU between. The width is ``base_channels`` at half resolution and doubles with
    every halving of the side, up to eight times. Weights start He-normal, like those of the other
    generators (DCGAN's own N(0, 0.02^2) vanishes where layers are narrow).

    Args:
        num_classes: K, or None for no labels.
        image_size: side in pixels: 32, 64 or 128.
        channels: 1 or 3.
        z_dim: size of the latent vector.
        base_channels: DCGAN's is 64.

    Raises:
        ValueError: another ``image_size``.
    """

    def __init__(
        self,
        *,
        num_classes: int | None,
        image_size: int = 64,
        channels: int = 3,
        z_dim: int = 100,
        base_channels: int = 64,
    ) -> None:
        super().__init__()
        if image_size not in (32, 64, 128):
            raise ValueError(f"image_size={image_size}: expected 32, 64 or 128.")
        self.z_dim, self.num_classes = z_dim, num_classes
        self.image_size, self.channels = image_size, channels
        doublings = image_size.bit_length() - 3  # from 4 x 4
        widths = [base_channels * min(8, 1 << i) for i in range(doublings - 1, -1, -1)]
        self.latent = LatentInput(z_dim, num_classes, widths[0], 4)
        layers: list[nn.Module] = [nn.BatchNorm2d(widths[0]), nn.ReLU()]
        for inputs, outputs in pairwise(widths):
            layers += [_doubling(inputs, outputs), nn.BatchNorm2d(outputs), nn.ReLU()]
        self.layers = nn.Sequential(*layers, _doubling(widths[-1], channels))
        initialise(self)
        for layer in self.modules():
            if isinstance(layer, nn.ConvTranspose2d):  # 2 x 2 of its taps fall on each output pixel
                nn.init.normal_(layer.weight, std=(2 / (4 * layer.in_channels)) ** 0.5)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        """z [n, z_dim], y int64 [n] or None, to images [n, channels, image_size, image_size]."""
        h = self.latent(z, y)
        norms, doublings = list(self.layers)[::3], list(self.layers)[2::3]  # a ReLU between
        for norm, doubling in zip(norms, doublings, strict=True):
            h = doubling(norm_relu(norm, h))
        return to_pixels(h)


def _doubling(inputs: int, outputs: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1, bias=False)
