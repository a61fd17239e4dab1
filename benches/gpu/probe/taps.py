"""The library's loss of given features: what an encoder would have made of images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benches.gpu.measure import Call
from benches.gpu.probe.rungs import Rungs
from benches.gpu.probe.sizes import Size
from benches.gpu.probe.step import played_release
from benches.shapes import Case
from dpmmd.nn import MMDLoss


class Taps(nn.Module):
    """Takes an encoder's place: features that are there already, whatever the images."""

    rectified = ()  # no ReLU that could take a gradient

    def __init__(self, features: list[Tensor], dim: int) -> None:
        super().__init__()
        self.features, self.dim = features, dim
        self.place = nn.Parameter(torch.zeros((), device=features[0].device), requires_grad=False)

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.features

    def spec(self) -> dict[str, Any]:
        return {"name": "taps"}


def case(rungs: Rungs, size: Size) -> Case:
    """Features of a batch, both moments by class."""
    scale, (pixels, batch) = rungs.sizes.scale, size
    dtype = torch.float32 if rungs.device.dry else torch.bfloat16
    return Case(batch, scale.classes, (1, 2), scale.taps, pixels, dtype)


def loss(like: Case, core: str, device: torch.device, seed: int = 0) -> Call:
    """Forward and backward of the "adam" loss with a core."""
    features = [f.requires_grad_() for f in like.features(device, seed)]
    encoder: Any = Taps(features, like.dim)
    release = played_release(encoder, like.classes)
    value = MMDLoss(release, encoder, estimator="adam", backend=core).train()
    labels = torch.arange(like.n, device=device) % like.classes
    return lambda: torch.autograd.grad(value(features[0], labels), features)
