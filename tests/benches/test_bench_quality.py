"""The experiments of `benches.quality`: their arithmetic, and that the docs show their results."""

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpmmd
from benches.quality import __main__ as quality
from benches.quality import colour, ideas, modes, rounded, statistics, structure

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


def test_rows_are_measured_once_and_while_there_is_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, int]] = []

    def run(row: quality.Row, repeat: int, folder: Path, where: Any, left: float) -> dict[str, Any]:
        measured.append((row.name, repeat))
        folder.mkdir()
        (folder / "samples.png").write_bytes(b"")
        return {"accuracy": dict.fromkeys(quality.CLASSIFIERS, 0.5), **where.facts(1.0)}

    monkeypatch.setattr(quality, "run", run)
    monkeypatch.setattr(quality, "RESULTS", tmp_path / "kept.json")
    monkeypatch.setattr(quality, "TRIED", ())
    monkeypatch.setattr(quality, "ABLATIONS", ())
    results = tmp_path / "out" / "new.json"
    wanted = {(row.name, i) for row in quality.CLAIMS for i in range(row.repeats)}
    quality.measure(None, quality.Where(at_once=3, limit=0.0, results=results))
    assert not measured
    assert not results.exists()
    quality.measure(None, quality.Where(at_once=3, limit=60.0, results=results))
    assert sorted(measured) == sorted(wanted)
    assert {(r["row"], r["repeat"]) for r in quality._read(results)} == wanted
    assert (results.parent / "samples-epsilon-1.png").exists()
    quality.measure(None, quality.Where(results=results))
    assert len(measured) == len(wanted)


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
    assert ideas.table(ideas.read()) in text
    assert modes.explained_table() in text
    assert modes.trainings_table() in text
    assert colour.read()
    assert colour.accuracies(colour.read()) in text
    assert colour.looks(colour.read()) in text
    names = {row.name for row in (*quality.CLAIMS, *quality.TRIED, *quality.ABLATIONS)}
    assert {each["row"] for each in quality._read()} <= names


def test_roughness_is_of_single_pixels_and_its_spread_of_images() -> None:
    stripes = (0.5 + 0.06 * (-1.0) ** torch.arange(28)).expand(28, 28)
    rows, flat = stripes.T, torch.full((28, 28), 0.5)
    checkers = 0.5 + 0.06 * torch.outer(*[(-1.0) ** torch.arange(28)] * 2)
    found = ideas.roughness(torch.stack([stripes, rows, checkers, flat]))
    expected = torch.tensor([[6.0, 0, 6, 0], [0, 6, 6, 0], [0, 0, 6, 0]])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=0)


def test_variance_between_groups_is_a_share() -> None:
    values, groups = torch.tensor([1.0, 1, 5, 5]), torch.tensor([0, 0, 1, 1])
    assert ideas.between(values, groups, 2) == pytest.approx(1)
    assert ideas.between(values, torch.tensor([0, 1, 0, 1]), 2) == pytest.approx(0)


@pytest.mark.parametrize("name", ["gradients", "histograms"])
def test_structure_is_nonnegative_smooth_and_of_one_image(name: str) -> None:
    encoder = structure.load(name)
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    images[1] = 0  # flat: no gradient, and no root of 0
    images.requires_grad_()
    taps = encoder(images)
    assert all(bool((tap >= 0).all()) for tap in taps)
    for alone, tap in zip(encoder(images[:1]), taps, strict=True):
        torch.testing.assert_close(alone, tap[:1])
    (gradient,) = torch.autograd.grad(sum(tap.square().sum() for tap in taps), images)
    assert bool(gradient.isfinite().all())
    assert float(gradient[0].norm()) > 0


@pytest.mark.parametrize(
    ("side", "epsilon", "expected"),
    [(32, 10.0, 16), (64, 10.0, 8), (32, 1.0, 4), (64, 1.0, 1), (32, 0.2, 1), (64, 0.2, 1)],
)
def test_the_docs_say_how_many_modes_the_rule_makes(
    side: int, epsilon: float, expected: int
) -> None:
    found = dpmmd.modes.by_rule(
        torch.full((10,), 6000.0),
        (1, 28, 28),
        dpmmd.encoders.load("squeezenet1.1", image_size=side),
        num_classes=10,
        adjacency="replace-one",
        grouped=False,
        epsilon=dpmmd.privacy.split_epsilon(epsilon, 1e-5, 0.5)[1],
        delta=1e-5,
    )
    assert found == expected


def test_rows_explain_what_they_tell_apart_within_classes() -> None:
    labels, rows = torch.tensor([0, 0, 0, 0, 1, 1]), torch.tensor([0, 0, 1, 1, 2, 3])
    values = torch.tensor([[0.0], [0], [2], [2], [10], [20]])
    assert modes.explained(rows, values, labels) == pytest.approx(1)
    assert modes.explained(labels, values, labels) == pytest.approx(0)
    values[0], values[1] = -1, 1  # of 4 + 2 + 50 within classes, 2 are left
    assert modes.explained(rows, values, labels) == pytest.approx(1 - 2 / 56)


def test_a_histogram_tells_a_spread_from_its_mean() -> None:
    """Half black and half white is as bright as grey, and is told apart by bins alone."""
    encoder = structure.load("histograms")
    levels = torch.tensor([0.0, 1.0, 0.4, 0.6]).view(4, 1, 1, 1).expand(4, 1, 28, 28)
    light, _ = encoder(levels)
    spread, grey = light[:2].mean(0), light[2:].mean(0)
    torch.testing.assert_close(light.sum((1, 2, 3)), torch.full((4,), 7.0))
    assert float((spread - grey).norm()) > 0.5 * float(grey.norm())


def test_coring_spreads_detail_and_keeps_its_mean_square() -> None:
    rng = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 1, 28, 28, generator=rng)
    images = 0.5 + noise * torch.tensor([0.02, 0.06]).view(2, 1, 1, 1)
    before, after = (ideas.roughness(x[:, 0])[0] for x in (images, ideas.cored(images)))
    assert float(after[0]) < 0.7 * float(before[0])
    assert float(after[1]) > float(before[1])
    fine, cored = (x - ideas.blurred(x) for x in (images, ideas.cored(images)))
    assert float(cored.square().mean()) == pytest.approx(float(fine.square().mean()), rel=0.15)
    torch.testing.assert_close(ideas.cored(images, power=1), images)  # power 1 changes nothing


def test_a_hole_is_dark_and_enclosed() -> None:
    images = torch.zeros(2, 28, 28)
    images[:, 4:24, 4:24] = 1  # 400 px
    images[0, 10:14, 10:14] = 0  # a hole
    images[1, 4:8, 10:14] = 0  # a bay
    assert ideas.enclosed(images).tolist() == [4.0, 0.0]
