"""Generators: plain modules ``generator(z, y) -> images`` in [0, 1].

Any module with that call and an attribute ``z_dim`` can be trained instead:

    class Mine(torch.nn.Module):
        z_dim = 64
        def forward(self, z, y):       # z float32 [n, z_dim], y int64 [n] or None
            ...                        # images [n, C, H, W] in [0, 1]
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from dpmmd.generators.conv import ConvGenerator
from dpmmd.generators.dcgan import DCGANGenerator
from dpmmd.generators.resnet import ResNetGenerator

__all__ = ["NAMES", "ConvGenerator", "DCGANGenerator", "ResNetGenerator", "build"]


_REGISTRY: dict[str, Callable[..., nn.Module]] = {
    "conv": ConvGenerator,
    "conv-by-class": partial(ConvGenerator, by_class=True),
    "dcgan": DCGANGenerator,
    "resnet": ResNetGenerator,
}
NAMES = tuple(_REGISTRY)


def build(
    name: str,
    *,
    num_classes: int | None,
    image_size: int,
    channels: int,
    z_dim: int = 100,
    base_channels: int = 64,
) -> nn.Module:
    """A generator by name.

    Args:
        name: ``"conv"`` (small, 28 or 32 px and other multiples of 4), ``"conv-by-class"`` (the
            same with a scale and a shift of each class in its batch norms), ``"dcgan"`` (32, 64 or
            128 px) or ``"resnet"`` (the paper's, 32 to 512 px).
        num_classes: K for a class-conditional generator, None for an unconditional one.
        image_size: side of the images in pixels.
        channels: 1 or 3.
        z_dim: size of the latent vector.
        base_channels: width of the layers at full resolution.

    Raises:
        ValueError: an unknown name, or a size the generator cannot make.
    """
    if name not in _REGISTRY:
        raise ValueError(f"generator {name!r}: expected one of {', '.join(NAMES)}.")
    return _REGISTRY[name](
        num_classes=num_classes,
        image_size=image_size,
        channels=channels,
        z_dim=z_dim,
        base_channels=base_channels,
    )
