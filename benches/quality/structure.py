"""Encoders without weights that were tried on Fashion-MNIST: gradients and histograms.

They go through the ordinary `dpmmd.encoders.Encoder`. None is in the package: docs/QUALITY.md has
what they are worth.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dpmmd
from dpmmd.encoders import Encoder

SIDE = 28
_DIGEST = "0" * 64  # of no weights


class OrientedGradients(nn.Module):
    """Rectified derivatives in 8 directions, averaged over cells of 4 px; and cells' brightness.

    Args:
        smoothing: standard deviation in pixels of the Gaussian whose derivatives are taken.
        light: factor on the brightness.
    """

    kernel: Tensor

    def __init__(self, smoothing: float = 0.8, light: float = 0.5) -> None:
        super().__init__()
        self.light = light
        t = torch.arange(5, dtype=torch.float64) - 2
        blur = torch.exp(-(t**2) / 2 / smoothing**2)
        blur /= blur.sum()
        slope = t * blur / (t**2 * blur).sum()  # 1 on a ramp of slope 1
        along, across = torch.outer(blur, slope), torch.outer(slope, blur)
        angles = [2 * math.pi * i / 8 for i in range(8)]
        kernels = [along * math.cos(a) + across * math.sin(a) for a in angles]
        self.register_buffer("kernel", torch.stack(kernels)[:, None].float())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        grey = images.mean(1, keepdim=True)
        rectified = F.relu(F.conv2d(F.pad(grey, (2,) * 4, mode="replicate"), self.kernel))
        # Windows of 8 px, 4 px apart, so that an edge moves smoothly from cell to cell.
        energy = F.avg_pool2d(rectified, 8, 4, padding=2, count_include_pad=False)
        light = F.avg_pool2d(grey, 4)
        return {"gradients": energy / 7, "light": light * self.light / 7}


class Histograms(nn.Module):
    """Soft histograms, 6 bins each: brightness of cells of 4 px, roughness of cells of 7 px.

    A class mean of binned numbers is their distribution; of the numbers it is their average alone.
    Roughness is the mean square of second differences along rows, columns and both, on a
    logarithmic scale.
    """

    filters: Tensor

    def __init__(self) -> None:
        super().__init__()
        second = torch.tensor([-1.0, 2.0, -1.0]) / 4
        flat = torch.tensor([0.0, 1.0, 0.0])
        pairs = ((flat, second), (second, flat), (second * math.sqrt(2), second * math.sqrt(2)))
        self.register_buffer("filters", torch.stack([torch.outer(*p)[None] for p in pairs]))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        grey = images.mean(1, keepdim=True)
        detail = F.conv2d(F.pad(grey, (1,) * 4, mode="replicate"), self.filters)
        rough = F.avg_pool2d(detail.square(), 7)
        rough = (torch.log1p(rough / 1e-4) / math.log1p(400)).clamp(max=1)
        light = F.avg_pool2d(grey, 4)
        return {"light": _binned(light) / 7, "roughness": _binned(rough) / math.sqrt(48)}


def _binned(x: Tensor, bins: int = 6) -> Tensor:
    """[n, C, h, w] in [0, 1] to [n, bins * C, h, w], of sum C: shares of the two nearest bins."""
    centres = torch.linspace(0, 1, bins, device=x.device, dtype=x.dtype).view(1, bins, 1, 1, 1)
    return (1 - (x[:, None] - centres).abs() * (bins - 1)).clamp(min=0).flatten(1, 2)


class Beside(nn.Module):
    """SqueezeNet's taps at 32 px and another's, the other's with a share of the squared norm."""

    def __init__(self, other: nn.Module, share: float) -> None:
        super().__init__()
        self.first = dpmmd.encoders.load("squeezenet1.1", image_size=32).backbone
        self.other, self.share = other, share

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        large = F.interpolate(images, (32, 32), mode="bilinear", align_corners=False)
        first = _scaled(self.first(large), 1 - self.share)
        return {**first, **_scaled(self.other(images), self.share)}


def _scaled(taps: Mapping[str, Tensor], square: float) -> dict[str, Tensor]:
    """Taps of one squared norm for every image."""
    norm = sum(tap.flatten(1).square().sum(1) for tap in taps.values())
    assert isinstance(norm, Tensor)
    factor = math.sqrt(square) / norm.clamp(min=1e-12).sqrt()
    return {name: tap * factor[:, None, None, None] for name, tap in taps.items()}


def load(name: str) -> Encoder:
    """An encoder by name: "gradients", "histograms", "beside-histograms", "squeezenet" or
    "squeezenet-pooled" (taps averaged down to 4 x 4)."""
    if name.startswith("squeezenet"):
        pool = 4 if name.endswith("pooled") else None
        return dpmmd.encoders.load("squeezenet1.1", image_size=32, pool=pool)
    if name == "gradients":
        backbone: nn.Module = OrientedGradients()
    else:
        backbone = Histograms() if name == "histograms" else Beside(Histograms(), 0.3)
    signs = dict.fromkeys(backbone(torch.zeros(1, 3, SIDE, SIDE)), "nonnegative")
    return Encoder(backbone, name=name, weights_sha256=_DIGEST, image_size=SIDE, tap_signs=signs)
