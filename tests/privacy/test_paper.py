"""Every recipe that comes with the package runs whole, on stand-ins of its data's shape.

Random weights stand for VGG19's and ResNet18's, random images for the private ones, a few steps for
200,000, and a small generator: what is tested is that the recipe's keys fit together and its files
come out.
"""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpmmd import recipe
from dpmmd import run as runs
from dpmmd._torchvision import import_torchvision
from dpmmd.privacy import Release

pytest.importorskip("sklearn")
if any(importlib.util.find_spec(name) is None for name in ("torch_fidelity", "prdc")):
    pytest.skip("the metrics' packages are not installed", allow_module_level=True)
SHAPES = {"fashion": (1, 28), "mnist": (1, 28), "celeba64": (3, 64), "photos64": (3, 64)}


def shape_of(name: str) -> tuple[int, int]:
    return next((shape for key, shape in SHAPES.items() if key in name), (3, 32))


def stand_ins(name: str, folder: Path) -> list[str]:
    """Files in place of the recipe's data, and the changes that make it read them."""
    import_torchvision()
    settings = recipe.read(name)[0]
    channels, side = shape_of(name)
    rng = np.random.default_rng(0)
    for split, n in (("train", 40), ("test", 20)):
        arrays = {"x": rng.integers(0, 256, (n, channels, side, side), dtype=np.uint8)}
        if settings.data.num_classes is not None:
            arrays["y"] = np.arange(n, dtype=np.int64) % settings.data.num_classes
        np.savez(folder / f"{split}.npz", **arrays)
    changes = [
        f'data.source="{folder}/train.npz"',
        f'data.test_source="{folder}/test.npz"',
        "data.num_images=40",
        "release.delta=1e-3",
        "release.batch_size=20",
        "generator.base_channels=4",
        "train.steps=2",
        "train.batch_size=10",
        "sample.num_images=20",
    ]
    if settings.encoder.name != "squeezenet1.1":
        changes.append("encoder.weights=random")
    if settings.evaluate is not None:
        # what is slow in the suite is tested elsewhere
        changes += ['evaluate.classifiers=["gaussian_nb", "cnn"]', "evaluate.seeds=[0, 1]"]
    if settings.metrics is not None:
        # Inception's weights cannot be had in a test
        changes += ['metrics.features=["squeezenet1.1"]', "metrics.num_images=15"]
    return changes


def ran(name: str, tmp_path: Path, *changes: str) -> tuple[Path, dict[str, Any]]:
    told: list[str] = []
    out = tmp_path / "run"
    report = runs.run(
        name,
        out,
        say=told.append,
        changes=[*stand_ins(name, tmp_path), *changes],
        device="cpu",
        progress=False,
    )
    return out, report


LONG = {"paper-celeba64", "paper-celeba32", "fashion-demo"}  # the others are of the same kinds


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in recipe.names()],
)
def test_the_recipe_runs_whole(name: str, tmp_path: Path) -> None:
    out, report = ran(name, tmp_path)
    wanted = recipe.read(name)[0]
    kept = recipe.read(out / "recipe.toml")[0]
    assert kept.train.steps == 2  # the folder's recipe says what was run
    assert kept.train.lr == wanted.train.lr
    assert report["private"] is True
    assert report["privacy"]["epsilon"] == wanted.release.epsilon
    with np.load(out / "synthetic.npz") as file:
        channels, side = shape_of(name)
        assert file["x"].shape == (20, channels, side, side)
        assert ("y" in file.files) == (wanted.data.num_classes is not None)
    assert set(report["accuracy"]) == (set() if wanted.evaluate is None else {"gaussian_nb", "cnn"})
    for classifier in report["accuracy"].values():
        assert set(classifier) == {"synthetic", "real", "seeds"}
        for kind, values in classifier["seeds"].items():
            assert len(values) == 2
            assert classifier[kind] == pytest.approx(sum(values) / 2)
    if wanted.metrics is not None:
        assert {f["held_out"] for f in report["metrics"].values()} == {True}
        figures = report["metrics"]["squeezenet1.1"]
        assert (figures["synthetic_images"], figures["real_images"]) == (15, 15)
        assert figures["split"] == wanted.data.test_split
        assert all(math.isfinite(figures[key]) for key in ("frechet_distance", "kid", "coverage"))


@pytest.mark.parametrize(
    "epsilon", [10, 0.2, *(pytest.param(e, marks=pytest.mark.long) for e in (5, 2, 0.5))]
)
def test_the_papers_epsilons(epsilon: float, tmp_path: Path) -> None:
    out, report = ran("paper-mnist", tmp_path, f"release.epsilon={epsilon}", "train.steps=1")
    assert report["privacy"]["epsilon"] == epsilon
    assert Release.load(out / "release.safetensors").metadata.epsilon == epsilon


@pytest.mark.parametrize(
    "name", [pytest.param("paper-mnist", marks=pytest.mark.long), "paper-cifar10-unlabelled"]
)
def test_the_other_encoder_and_both_moments(name: str, tmp_path: Path) -> None:
    other = {"resnet18": "vgg19", "vgg19": "resnet18"}[recipe.read(name)[0].encoder.name]
    changes = (f"encoder.name={other}", "release.moments=[1,2]")
    out, _ = ran(name, tmp_path, *changes)
    m = Release.load(out / "release.safetensors").metadata
    assert m.encoder["name"] == other
    assert m.moments == (1, 2)


def test_without_noise_everything_says_not_private(tmp_path: Path) -> None:
    """And nothing was added: the mean embedding keeps to its bound."""
    out, report = ran("paper-cifar10-unlabelled", tmp_path, "release.epsilon=inf")
    assert report["private"] is False
    assert report["privacy"]["epsilon"] is None
    assert "NOT PRIVATE" in (out / "NOT_PRIVATE").read_text()
    assert (out / "README.md").read_text().startswith("# NOT PRIVATE")
    facts = json.loads((out / "privacy.json").read_text())
    assert facts["private"] is False
    assert facts["promise"].startswith("NOT PRIVATE")
    assert "epsilon = inf" in (out / "recipe.toml").read_text()
    released = Release.load(out / "release.safetensors")
    norm = released.target.square().sum().sqrt()
    assert 0.5 < norm <= 1.0  # noise of D = 303,104 numbers would make it far larger
    again = runs.run(out / "recipe.toml", out, say=lambda line: None, progress=False)
    assert again == report
    private = (out / "recipe.toml").read_text().replace("epsilon = inf", "epsilon = 1.0")
    (out / "recipe.toml").write_text(private)
    with pytest.raises(runs.RunError, match="made with epsilon = inf, the recipe asks for 1"):
        runs.run(out / "recipe.toml", out, say=lambda line: None, progress=False)
