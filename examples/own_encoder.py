"""A release with an encoder of one's own: any module that yields feature maps.

python examples/own_encoder.py scans/ --weights backbone.pt --num-classes 2 --out scans.safetensors

The folder holds one sub-folder of images a class. The weights must be public: trained on data that
are not the private ones.
"""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn

import dpmmd


class Backbone(nn.Module):
    """Takes RGB images in [0, 1], normalises them itself, returns {tap name: feature map}."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        first = self.conv1((images - 0.5) / 0.25).relu()
        return {"conv1": first, "conv2": self.conv2(first).relu()}


def load(weights: Path, image_size: int) -> dpmmd.encoders.Encoder:
    """The encoder; the release records the hash of its weights, and training needs the same."""
    backbone = Backbone()
    backbone.load_state_dict(torch.load(weights, weights_only=True))
    return dpmmd.encoders.Encoder(
        backbone,
        name="my-backbone",
        weights_sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        image_size=image_size,
        # Behind a ReLU features are never negative, which lowers the noise under replace-one.
        tap_signs={"conv1": "nonnegative", "conv2": "nonnegative"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", help="a folder with one sub-folder of images a class")
    parser.add_argument("--weights", type=Path, required=True, help="Backbone().state_dict()")
    parser.add_argument("--num-classes", type=int, required=True)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--epsilon", type=float, default=1.0)
    parser.add_argument("--delta", type=float, default=1e-6)
    parser.add_argument("--out", default="release.safetensors")
    arguments = parser.parse_args()

    release = dpmmd.release(
        arguments.images,
        load(arguments.weights, arguments.image_size),
        epsilon=arguments.epsilon,
        delta=arguments.delta,
        adjacency="replace-one",
        num_classes=arguments.num_classes,
        image_size=arguments.image_size,
        out=arguments.out,
    )
    print(f"{arguments.out}: {release.num_classes} classes of {release.target.shape[2]} features")


if __name__ == "__main__":
    main()
