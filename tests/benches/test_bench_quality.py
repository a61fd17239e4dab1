"""The experiments of `benches.quality`: their arithmetic, and that the docs show their results."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpmmd
from benches.quality import __main__ as quality
from benches.quality import colour, rounded, statistics

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("name", ["pixel-covariance", "pixel-fourier", "feature-covariance"])
def test_every_image_of_a_statistic_has_norm_one(name: str) -> None:
    encoder = dpmmd.encoders.load("vgg11", weights="random")
    statistic = statistics.choose(name, encoder)
    assert statistic is not None
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    values = statistic(images, encoder(images))
    torch.testing.assert_close(values.norm(dim=1), torch.ones(3))
    assert (values[0] - values[1]).norm() > 1e-3


def test_the_u_statistic_is_that_of_the_pairs() -> None:
    rng = torch.Generator().manual_seed(0)
    values = torch.randn(7, 5, generator=rng, dtype=torch.float64)
    target = torch.randn(statistics.CLASSES, 5, generator=rng, dtype=torch.float64)
    labels = torch.tensor([0, 3, 3, 0, 3, 0, 0])
    expected = 0.0
    for k in (0, 3):
        own = values[labels == k]
        pairs = [a @ b for i, a in enumerate(own) for j, b in enumerate(own) if i != j]
        cross = [a @ target[k] for a in own]
        expected += float(sum(pairs) / len(pairs) - 2 * sum(cross) / len(cross))
        expected += float(target[k] @ target[k])
    assert float(statistics.u_statistic(target, values, labels)) == pytest.approx(expected)


def test_rounding_is_that_of_autocast() -> None:
    """Not to the bit: sums in another order, and ReLUs near 0, make errors of the same size."""
    shape = {"num_classes": 3, "image_size": 8, "channels": 1, "z_dim": 100, "base_channels": 4}
    z = torch.randn(16, 100, generator=torch.Generator().manual_seed(0))
    y = torch.arange(16) % 3

    def passed(how: AbstractContextManager[Any]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        generator = dpmmd.generators.build("conv", **shape)
        with how:
            images = generator(z, y)
        gradients = torch.autograd.grad(images.square().sum(), list(generator.parameters()))
        return [images.detach(), *gradients]

    exact, ours = passed(nullcontext()), passed(rounded.Rounding())
    autocast = passed(torch.autocast("cpu", torch.bfloat16, cache_enabled=False))
    for true, one, other in zip(exact, ours, autocast, strict=True):
        mine, its = float((one - true).norm()), float((other - true).norm())
        assert 0.4 < mine / its < 2.5


def test_the_measures_of_colour_are_those_of_images_known_to_the_last_digit() -> None:
    red = np.zeros((2, 3, 4, 6), np.uint8)  # one image black, one pure red
    red[1, 0] = 255
    stripes = np.zeros((1, 3, 4, 6), np.uint8)  # columns black and white
    stripes[..., ::2] = 255
    found = colour.measures(np.concatenate([red, stripes]), np.array([0, 0, 1]))
    assert found == {
        "saturation": [0.5, 0.0],
        "brightness": [round(1 / 6, 5), 0.0],
        "contrast": [0.0, 0.5],
        "across": [0.0, 1.0],
        "down": [0.0, 0.0],
    }


def test_the_docs_show_the_results() -> None:
    text = (DOCS / "QUALITY.md").read_text()
    assert quality.claims() in text
    assert quality.tried() in text
    assert quality.ablations() in text
    assert rounded.table(rounded.read()) in text
    assert colour.read()
    assert colour.accuracies(colour.read()) in text
    assert colour.looks(colour.read()) in text
    names = {row.name for row in (*quality.CLAIMS, *quality.TRIED, *quality.ABLATIONS)}
    assert {each["row"] for each in quality._read()} <= names
