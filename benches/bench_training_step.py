"""A whole training step: the paper's generator, VGG19, both moments by class, both Adams.

Steps with the same generator: the library's; the same with its gradient injected into the
encoder's ReLUs; with the loss replaced by the sum of the last tap (what generator and encoder alone
cost); and the authors' procedure in plain torch.
VGG19 has random weights here, which cost what others would.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import dpmmd
from benches.backends import on_this_cpu
from benches.baselines import AuthorsStep
from benches.harness import Measure
from benches.shapes import small_release
from dpmmd.nn import MMDLoss

CLASSES = 10


def test_training_step(measure: Measure) -> None:
    name, batch, width = ("vgg11", 2, 8) if measure.smoke else ("vgg19", 64, 64)
    encoder = dpmmd.encoders.load(name, image_size=32, weights="random")
    release = small_release(encoder, CLASSES)
    variants: dict[str, Callable[[], None]] = {}
    for backend in on_this_cpu():
        variants[backend] = _step(
            MMDLoss(release, encoder, estimator="adam", backend=backend).train(), batch, width
        )
    injected = MMDLoss(release, encoder, estimator="adam", inject=True).train()
    variants["injected"] = _step(injected, batch, width)
    variants["sum of the last tap"] = _step(lambda x, y: encoder(x)[-1].sum(), batch, width)
    if not measure.smoke:
        variants["eager"] = AuthorsStep(_generator(width), release.target, batch, CLASSES)
    measure(
        "training step",
        f"{name} 32 px, n={batch}, K={CLASSES}, moments 1+2",
        variants,
        ours=on_this_cpu()[-1],
    )


def _generator(width: int) -> nn.Module:
    torch.manual_seed(0)
    return dpmmd.generators.build(
        "resnet", num_classes=CLASSES, image_size=32, channels=3, base_channels=width
    ).train()


def _step(loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], batch: int, width: int):
    generator = _generator(width)
    optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)

    def run() -> None:
        z = torch.randn(batch, int(generator.z_dim))  # type: ignore[arg-type]
        y = torch.arange(batch) % CLASSES
        optimizer.zero_grad()
        loss(generator(z, y), y).backward()
        optimizer.step()

    return run
