"""The source `photographs`: patches of what scikit-image ships, here of small stand-ins."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dpmmd.data import open_source, photographs

WIDTH, HEIGHT = 141, 70  # the left half has 70 columns, the right 71


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of that name whose photographs number their columns in red; folder of its files."""
    folder = tmp_path / "skimage" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "skimage" / "__init__.py").write_text("raise AssertionError('imported')")
    columns = np.broadcast_to(np.arange(WIDTH, dtype=np.uint8), (HEIGHT, WIDTH))
    rows = np.broadcast_to(np.arange(HEIGHT, dtype=np.uint8)[:, None], (HEIGHT, WIDTH))
    colour = Image.fromarray(np.stack([columns, rows, np.full_like(rows, 200)], axis=2))
    known = {}
    for name, photograph in (("red.png", colour), ("grey.png", Image.fromarray(columns))):
        photograph.save(folder / name)
        known[name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    monkeypatch.setattr(photographs, "_SHA256", known)
    monkeypatch.setattr(photographs, "NAMES", ("red", "grey"))
    monkeypatch.setattr(photographs, "_PATCHES", {"train": 40, "test": 10})
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


@pytest.mark.usefixtures("package")
def test_no_column_is_in_both_splits_and_nearly_all_are_in_one() -> None:
    for split, number, first, last in (("train", 40, 0, 69), ("test", 10, 70, 140)):
        source = open_source("photographs", split=split, num_classes=2)
        images, labels = source.arrays()
        assert images.shape == (2 * number, 3, 32, 32)
        assert labels.tolist() == [0, 1] * number  # in turn, so that every part has both
        assert source.class_names == ("red", "grey")
        red, grey = images[::2], images[1::2]
        assert first <= red[:, 0].min() < first + 8
        assert last - 8 < red[:, 0].max() <= last
        assert (red[:, 0].diff(dim=-1) == 1).all()  # as they lie in the photograph
        assert (red[:, 1].diff(dim=-2) == 1).all()
        assert (red[:, 2] == 200).all()
        assert (grey == grey[:, :1]).all()
        assert (grey[:, 0] == red[:, 0]).all()


@pytest.mark.usefixtures("package")
def test_patches_are_the_same_every_time_and_of_the_size_asked_for() -> None:
    first, second = (open_source("photographs", image_size=64).arrays()[0] for _ in range(2))
    assert first.shape[1:] == (3, 64, 64)
    assert (first == second).all()
    assert len(np.unique(first[::2, :2, 0, 0], axis=0)) > 20  # corners, of 7 x 7 that are there
    grey = open_source("photographs", image_size=64, channels=1)
    assert grey.image_shape == (1, 64, 64)


@pytest.mark.usefixtures("package")
def test_a_half_is_reduced_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reducing the whole photograph would mix columns of both halves at their border."""
    monkeypatch.setattr(photographs, "_SHORTER", 35)
    red, _ = open_source("photographs").arrays()
    assert red[::2, 0].max() <= 69
    red, _ = open_source("photographs", split="test").arrays()
    assert red[::2, 0].min() >= 70


@pytest.mark.usefixtures("package")
@pytest.mark.parametrize("size", [28, (64, 32)])
def test_another_size_is_refused(size: int | tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=r"image_size=.*expected one of \(32, 64\)"):
        open_source("photographs", image_size=size)


def test_another_photograph_is_refused_and_a_missing_one_named(package: Path) -> None:
    Image.new("RGB", (WIDTH, HEIGHT)).save(package / "red.png")
    with pytest.raises(ValueError, match=r"red\.png is damaged or another photograph"):
        open_source("photographs")
    (package / "grey.png").unlink()
    with pytest.raises(FileNotFoundError, match="pip install scikit-image"):
        open_source("photographs")


@pytest.mark.skipif(importlib.util.find_spec("skimage") is None, reason="needs scikit-image")
def test_the_photographs() -> None:
    for split, number in (("train", 12_100), ("test", 3_025)):
        images, labels = open_source("photographs", split=split, num_classes=11).arrays()
        assert images.shape == (number, 3, 32, 32)
        grey = (images == images[:, :1]).flatten(1).all(1)
        assert labels[grey].unique().tolist()[-3:] == [8, 9, 10]
        assert np.bincount(labels[grey])[8:].tolist() == [number // 11] * 3
