"""The estimate of the difference that the loss follows: work of the size of D, not of the batch.

Measured as the gradient of `dpmmd.nn.MMDLoss` in one image whose pixels are the features.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from benches import baselines
from benches.backends import on_this_cpu
from benches.harness import Measure
from benches.shapes import small_release
from dpmmd.encoders import Encoder
from dpmmd.nn import MMDLoss

CLASSES = 10


class Pixels(nn.Module):
    """A backbone whose one tap is the image."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"pixels": images * 1}


@pytest.mark.parametrize("estimator", ["adam", "ema"])
def test_estimator(measure: Measure, estimator: str) -> None:
    side = 8 if measure.smoke else 318  # D = 303,372, VGG19's at 32 px within a thousandth
    encoder = Encoder(
        Pixels(),
        name="pixels",
        weights_sha256="0" * 64,
        image_size=side,
        tap_signs={"pixels": "nonnegative"},
    )
    release = small_release(encoder, CLASSES)
    image = torch.rand(1, 3, side, side).requires_grad_()
    label = torch.zeros(1, dtype=torch.int64)

    def ours(backend: str) -> Callable[[], Tensor]:
        loss = MMDLoss(release, encoder, estimator=estimator, backend=backend).train()
        return lambda: torch.autograd.grad(loss(image, label), image)[0]

    variants = {backend: ours(backend) for backend in on_this_cpu()}
    if estimator == "adam":
        variants["eager"] = _authors(release.target, encoder, image, label)
    state = 3 if estimator == "adam" else 1  # vectors that are read and written
    grad = measure(
        f"estimator {estimator}, forward + backward",
        f"D={encoder.dim}, n=1, K={CLASSES}, moments 1+2",
        variants,
        ours=on_this_cpu()[-1],
        # One class is present: the others' state need not move. The target is read.
        min_bytes=(2 * state + 1) * 4 * encoder.dim * 2,
    )
    assert grad.any()


def _authors(target: Tensor, encoder: Encoder, image: Tensor, label: Tensor) -> Callable:
    estimator = baselines.AdamEstimator(target)

    def run() -> None:
        means, _ = baselines.mean_embedding(encoder(image), label, CLASSES, moments=(1, 2))
        torch.autograd.grad(estimator.loss(means), image)
        estimator.update(means)

    return run
