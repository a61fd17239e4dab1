"""What a release says before it spends: a source of which nothing, or little, is usable."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import dpmmd
from dpmmd.data import open_source
from dpmmd.data.look import check_source, first_look
from dpmmd.privacy import layout
from tests.conftest import images, small_encoder

N = 40
OPTIONS: dict[str, Any] = {"epsilon": 20.0, "delta": 1e-6, "adjacency": "replace-one"}


class Normalised(Dataset):
    """Items in [-1, 1], as many training scripts have them."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.from_numpy(images(N)[0][index]).float() / 127.5 - 1, 0


def files(folder: Path, broken: int) -> Path:
    """Images of which the first are text that only has an image's name."""
    from PIL import Image

    for i, image in enumerate(images(N)[0]):
        path = folder / f"{i:03d}.png"
        Image.fromarray(image[0]).save(path)
        if i < broken:
            path.write_text("see the archive")
    return folder


def spend(source: Any, tmp_path: Path, **options: Any) -> dpmmd.Release:
    ledger = tmp_path / "ledger.jsonl"
    try:
        return dpmmd.release(
            source, small_encoder(), ledger=ledger, progress=False, **{**OPTIONS, **options}
        )
    except ValueError:
        assert not ledger.exists()  # nothing was spent
        raise


def test_a_normalised_data_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none of its .*values outside \[0, 1\].*Normalize"):
        spend(Normalised(), tmp_path)
    with pytest.raises(ValueError, match=r"none of the 40 .*values outside \[0, 1\].*Normalize"):
        spend(Normalised(), tmp_path, image_size=8, channels=1)


@pytest.mark.parametrize("adjacency", ["replace-one", "add-remove", "zero-out"])
def test_floats_to_255_are_refused(tmp_path: Path, adjacency: str) -> None:
    arrays = images(N)[0].astype(np.float32), None
    with pytest.raises(ValueError, match=r"none of the 40 .*divide floats on a 0..255 scale"):
        spend(arrays, tmp_path, adjacency=adjacency)
    np.savez(tmp_path / "x.npz", x=arrays[0])
    with pytest.raises(ValueError, match=r"none of the 40 .*divide floats on a 0..255 scale"):
        spend(tmp_path / "x.npz", tmp_path, adjacency=adjacency)


def test_files_that_only_stand_for_images_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"none of the 40 .*40 x not an image of a known format"):
        spend(files(folder, N), tmp_path, image_size=8, channels=1)


def test_many_unusable_records_are_warned_about_before_anything_is_spent(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.warns(UserWarning, match=r"5 of the 40 .*5 x not an image.*for you alone"):
        spend(files(folder, 5), tmp_path, image_size=8, channels=1)


def test_a_few_unusable_records_are_passed_by_in_silence(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        spend(files(folder, 2), tmp_path, image_size=8, channels=1)


def test_counts_far_below_n_are_warned_about_from_the_noised_counts() -> None:
    """What a first look misses: it reads 256 records of four places."""
    x = images(2000)[0].astype(np.float32) / 255
    x[128:600] = 7.0
    labels = np.arange(2000) % 3
    assert first_look(open_source((x, labels))).usable == 256
    with pytest.warns(UserWarning, match=r"noised class counts add up to 15.. of N = 2000"):
        dpmmd.release((x, labels), small_encoder(), num_classes=3, progress=False, **OPTIONS)


def test_the_look_is_short_and_spread() -> None:
    looked: list[int] = []

    class Watched(Dataset):
        def __len__(self) -> int:
            return 100_000

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            looked.append(index)
            return torch.zeros(1, 8, 8), 0

    check_source(open_source(Watched(), image_size=8, channels=1))
    assert len(looked) <= 256 + 2 * 32
    assert (min(looked), max(looked)) == (0, 99_999)
    assert len({index // 25_000 for index in looked}) >= 3


@pytest.mark.parametrize("dtype", [np.uint16, np.bool_, np.uint8, np.float32, np.float16])
def test_arrays_are_taken_for_what_they_are(dtype: type) -> None:
    values = np.linspace(0, 1, 64).reshape(1, 8, 8)
    scale = {np.uint16: 65_535, np.uint8: 255}.get(dtype, 1)
    array = (values * scale).round().astype(dtype) if scale > 1 else values.astype(dtype)
    batch = next(open_source((array, None)).batches(1))
    expected = torch.from_numpy(array.astype(np.float64) / scale)
    assert torch.allclose(batch.images[0].double(), expected, atol=1e-7)

    class Items(Dataset):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
            return array[0], 0

    assert torch.equal(next(open_source(Items()).batches(1)).images, batch.images)


@pytest.mark.parametrize("dtype", ["int64", "int16", "uint32", "complex64"])
def test_advice_by_type_does_not_destroy(dtype: str) -> None:
    with pytest.raises(TypeError, match=f"of type {dtype}: expected uint8") as caught:
        open_source((np.zeros((2, 8, 8), dtype), None))
    assert ("images.max()" in str(caught.value)) == ("int" in dtype)


def test_the_default_batch_follows_the_size_of_the_images() -> None:
    encoder = small_encoder()
    cpu = torch.device("cpu")
    assert layout.default_batch_size((1, 28, 28), [encoder], cpu) == 256
    for side in (256, 1536, 8192):
        size = layout.default_batch_size((3, side, side), [encoder], cpu)
        assert size == 1 or size * 4 * 4 * 3 * side * side <= layout.BATCH_MEMORY
        assert size <= 256


def test_the_default_batch_is_what_a_release_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "BATCH_MEMORY", 1 << 17)
    asked = []
    part = dpmmd.data.ArraySource.part

    def watched(self: Any, batch_size: int, numbers: range) -> Any:
        asked.append(batch_size)
        return part(self, batch_size, numbers)

    monkeypatch.setattr(dpmmd.data.ArraySource, "part", watched)
    dpmmd.release(images(N), small_encoder(), progress=False, **OPTIONS)
    assert 1 < asked[0] < 256
