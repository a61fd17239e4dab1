"""SqueezeNet 1.1 with ImageNet weights: the fast encoder. 9 taps, all outputs of a ReLU.

Iandola et al., "SqueezeNet: AlexNet-level accuracy with 50x fewer parameters", arXiv 1602.07360.
The weights are a port of the authors' Caffe model: convolutions in HWIO order, and images in
blue-green-red order, 0 to 255, less a mean per channel.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from dpmmd.encoders.base import StagedBackbone
from dpmmd.encoders.layers import Convolution, MaxPool, Rectified
from dpmmd.encoders.weights import SQUEEZENET, StrPath, load_array_pickle

_MEAN = (123.68 / 255, 116.779 / 255, 103.939 / 255)  # red, green, blue
_STD = (1 / 255, 1 / 255, 1 / 255)

SIGNS = dict.fromkeys(("conv1", *(f"fire{i}" for i in range(2, 10))), "nonnegative")

_POOL_BEFORE = ("fire2", "fire4", "fire6")


class Fire(nn.Module):
    """Squeeze to few channels, then expand by 1x1 and 3x3 convolutions; the last ReLU is left."""

    def __init__(self, squeeze: nn.Module, expand1x1: Convolution, expand3x3: Convolution) -> None:
        super().__init__()
        self.squeeze = squeeze
        self.expand1x1 = expand1x1
        self.expand3x3 = expand3x3

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu_()
        return torch.cat((self.expand1x1(x), self.expand3x3(x)), dim=1)

    def unbiased(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output without its bias, and the bias."""
        x = self.squeeze(x).relu_()
        (narrow, one), (wide, three) = self.expand1x1.unbiased(x), self.expand3x3.unbiased(x)
        return torch.cat((narrow, wide), dim=1), torch.cat((cast(Tensor, one), cast(Tensor, three)))


def read_weights(path: StrPath | None = None) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer name -> (weight [out, in, k, k], bias [out]), for images in red-green-blue order.

    Besides the tapped layers this holds the classifier "conv10".

    Raises:
        WeightsNotFoundError, WeightsError: no file, or not the pinned one.
    """
    with SQUEEZENET.find(path).open("rb") as file:
        SQUEEZENET.verify(file)
        arrays = load_array_pickle(file)
    layers = {}
    for name, (kernel, bias) in arrays.items():
        if name == "conv1":
            kernel = kernel[:, :, ::-1]  # blue-green-red to red-green-blue
        weight = np.ascontiguousarray(kernel.transpose(3, 2, 0, 1), dtype=np.float32)
        layers[name] = (torch.from_numpy(weight), torch.from_numpy(bias.astype(np.float32)))
    return layers


def build(path: StrPath | None = None) -> tuple[StagedBackbone, str]:
    """The backbone and the sha256 of its weights."""
    layers = read_weights(path)
    stages: dict[str, nn.Module] = {"conv1": Rectified(Convolution(*layers["conv1"], stride=2))}
    for name in list(SIGNS)[1:]:
        fire = Fire(
            Convolution(*layers[f"{name}/squeeze1x1"]),
            Convolution(*layers[f"{name}/expand1x1"]),
            Convolution(*layers[f"{name}/expand3x3"], padding=1),
        )
        pooled = name in _POOL_BEFORE
        stages[name] = Rectified(nn.Sequential(MaxPool(3, 2), fire) if pooled else fire)
    return StagedBackbone(stages, mean=_MEAN, std=_STD), SQUEEZENET.sha256
