"""A frozen encoder's features and the gradient of the images, in the two precisions.

"torch's layers" has the same weights in nn.Conv2d, nn.MaxPool2d and nn.ReLU as torch provides them,
which keep more for backward.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from benches.harness import Measure
from dpmmd import encoders
from dpmmd.encoders.layers import Convolution, MaxPool


def plain(module: nn.Module) -> nn.Module:
    """The module with torch's own layers instead of the frozen ones."""
    for name, child in module.named_children():
        replacement = plain(child)
        if isinstance(child, Convolution):
            replacement = nn.Conv2d(
                child.in_channels,
                child.out_channels,
                child.kernel_size,
                child.stride,
                child.padding,
                groups=child.groups,
            )
            replacement.weight, replacement.bias = child.weight, child.bias
        elif isinstance(child, MaxPool):
            replacement = nn.MaxPool2d(child.kernel_size, child.stride, child.padding)
        elif isinstance(child, nn.ReLU):
            replacement = nn.ReLU()
        setattr(module, name, replacement)
    return module


@pytest.mark.parametrize(
    ("name", "pixels", "n"), [("vgg19", 32, 64), ("vgg19", 128, 4), ("resnet18", 32, 64)]
)
def test_encoder(measure: Measure, name: str, pixels: int, n: int) -> None:
    if measure.smoke:
        name, pixels, n = "resnet18", 32, 2

    def load(precision: str = "float32") -> encoders.Encoder:
        return encoders.load(name, image_size=pixels, weights="random", precision=precision)

    images = torch.rand(n, 3, pixels, pixels).requires_grad_()

    def variant(encoder: encoders.Encoder):
        def run() -> Tensor:
            maps = encoder(images)
            return torch.autograd.grad(maps, images, [fmap.detach() for fmap in maps])[0]

        return run

    theirs = load()
    plain(theirs.backbone)
    variants = {"torch's layers": variant(theirs), "dpmmd": variant(load())}
    try:
        variants["dpmmd, bfloat16"] = variant(load("bfloat16"))
    except ValueError as error:
        if "bfloat16" not in str(error):
            raise
    grad = measure(
        "encoder, forward + backward", f"{name} {pixels} px, n={n}", variants, ours="dpmmd"
    )
    assert grad.any()
