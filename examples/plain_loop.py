"""The loss in a plain training loop, with a generator of one's own.

python examples/plain_loop.py runs/demo/release.safetensors --out samples.png
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import dpmmd
from dpmmd.train import sample_grid, save_png


class Generator(nn.Module):
    """Any module that makes images [n, C, H, W] in [0, 1] will do."""

    def __init__(self, num_classes: int, channels: int, side: int, z_dim: int = 64) -> None:
        super().__init__()
        self.z_dim, self.num_classes, self.side = z_dim, num_classes, side
        self.start = nn.Linear(z_dim + num_classes, 64 * (side // 4) ** 2)
        self.layers = nn.Sequential(
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.ConvTranspose2d(64, 32, 4, stride=2, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.ConvTranspose2d(32, channels, 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        one_hot = nn.functional.one_hot(y, self.num_classes).to(z.dtype)
        h = self.start(torch.cat([z, one_hot], dim=1))
        return self.layers(h.view(-1, 64, self.side // 4, self.side // 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", help="a labelled release, e.g. runs/demo/release.safetensors")
    parser.add_argument("--out", default="samples.png")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=100)
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    release = dpmmd.Release.load(arguments.release)
    encoder = dpmmd.encoders.from_spec(release.metadata.encoder).to(device)
    loss_of = dpmmd.nn.MMDLoss(release, encoder, estimator="batch", graph=device == "cuda")
    channels, side, _ = release.metadata.image_shape
    generator = Generator(release.num_classes, channels, side).to(device)
    optimizer = torch.optim.Adam(generator.parameters(), lr=3e-3)

    for step in range(1, arguments.steps + 1):
        z = torch.randn(arguments.batch_size, generator.z_dim, device=device)
        y = torch.arange(arguments.batch_size, device=device) % release.num_classes
        loss = loss_of(generator(z, y), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step == 1 or step % 50 == 0:
            print(f"step {step}: loss {loss.item():.4f}")

    save_png(arguments.out, sample_grid(generator, release.num_classes, torch.device(device)))
    print(f"{arguments.out}: a row a class")


if __name__ == "__main__":
    main()
