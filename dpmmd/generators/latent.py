"""What generators share: the latent input with its class, and the initial weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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


def initialise(module: nn.Module) -> None:
    """He-normal weights for layers before a ReLU, zero biases; batch norm starts as identity."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
