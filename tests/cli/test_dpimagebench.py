"""The files for DPImageBench: its split, its delta, and recipes that match what is prepared."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpmmd import recipe
from dpmmd.data import open_source

FOLDER = Path(__file__).resolve().parents[2] / "integrations" / "dpimagebench"


def prepare() -> Any:
    spec = importlib.util.spec_from_file_location("prepare", FOLDER / "prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def zipped(path: Path, n: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """As data/preprocess_dataset.py writes it: RGB PNGs, and dataset.json with the labels."""
    rng = np.random.default_rng(n)
    x = rng.integers(0, 256, (n, channels, 8, 8), dtype=np.uint8)
    y, labels = rng.integers(0, 10, n), []
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(n):
            name, data = f"{i:08d}"[:5] + f"/img{i:08d}.png", io.BytesIO()
            Image.fromarray(np.broadcast_to(x[i], (3, 8, 8)).transpose(1, 2, 0)).save(data, "PNG")
            archive.writestr(name, data.getvalue())
            labels.append([name, int(y[i])])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return x, y


@pytest.mark.parametrize("name", ["fmnist_28", "cifar10_32"])
@pytest.mark.parametrize("mode", ["val", "syn"])
def test_prepared_data_are_its_split(
    name: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, channels = prepare(), 1 if "mnist" in name else 3
    x, y = zipped(tmp_path / "train.zip", 40, channels)
    x_test, _ = zipped(tmp_path / "test.zip", 9, channels)
    monkeypatch.setitem(module.TRAIN_SIZES, name, 30)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prepare", name, "train.zip", "test.zip", "--mode", mode])
    module.main()
    torch.manual_seed(0)  # what its data/dataset_loader.py does
    part, _ = torch.utils.data.random_split(list(range(40)), [30, 10])
    kept = list(part.indices) if mode == "val" else list(range(40))
    images, labels = open_source(f"{name}.npz", split="train").arrays()
    np.testing.assert_array_equal(images, x[kept])
    np.testing.assert_array_equal(labels, y[kept])
    np.testing.assert_array_equal(open_source(f"{name}.npz", split="test").arrays()[0], x_test)
    with pytest.raises(FileExistsError):
        module.main()


def test_every_data_set_has_a_recipe_with_its_size_and_delta() -> None:
    module = prepare()
    assert {p.stem for p in FOLDER.glob("*.toml")} == set(module.TRAIN_SIZES)
    table = (FOLDER / "README.md").read_text()
    for name, n in module.TRAIN_SIZES.items():
        settings = recipe.read(FOLDER / f"{name}.toml")[0]
        assert settings.data.source == f"{name}.npz"
        assert settings.data.num_images == n
        exact = module.delta(n)
        assert exact * (1 - 1e-4) < settings.release.delta <= exact
        assert settings.sample.num_images == 60_000
        assert 60_000 % (settings.data.num_classes or 0) == 0  # uniform labels
        assert f"{settings.release.delta:.5e}" in table
        assert f"{n:,}" in table
