"""Synthetic sets as .npz, folder and Parquet: what is read back is what was made; and the card."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import dpmmd
from dpmmd import export
from dpmmd.data import open_source
from tests.conftest import images, no_noise, small_encoder


def made(
    n: int = 25, channels: int = 3, labelled: bool = True
) -> tuple[np.ndarray, np.ndarray | None]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, channels, 8, 8), dtype=np.uint8)
    return x, np.arange(n, dtype=np.int64) % 12 if labelled else None


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["set.npz", "set", "set.parquet"])
def test_what_is_written_is_read_back(
    name: str, channels: int, labelled: bool, tmp_path: Path
) -> None:
    x, y = made(channels=channels, labelled=labelled)
    path = tmp_path / name
    export.write(path, x, y, format=export.format_of(path))
    source = open_source(path)
    again, labels = source.arrays()
    assert source.labelled == labelled
    order = np.arange(len(x)) if name != "set" or y is None else np.argsort(y, kind="stable")
    np.testing.assert_array_equal(again, x[order])
    if y is not None:
        np.testing.assert_array_equal(labels, y[order])
    assert [p.name for p in tmp_path.iterdir()] == [name]  # nothing temporary is left


def test_floats_are_what_dpimagebench_reads(tmp_path: Path) -> None:
    x, y = made()
    export.write(tmp_path / "gen.npz", x, y, format="npz-float")
    with np.load(tmp_path / "gen.npz") as file:
        assert set(file.files) == {"x", "y"}
        assert file["x"].dtype == np.float32
        assert (file["x"].min(), file["x"].max()) == (0, 1)
        assert file["x"].shape == x.shape
        np.testing.assert_array_equal((file["x"] * 255).round(), x)
        np.testing.assert_array_equal(file["y"], y)


def test_parquet_says_what_its_columns_are(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    x, y = made(n=2100)
    export.write(tmp_path / "set.parquet", x, y, format="parquet")
    with pq.ParquetFile(tmp_path / "set.parquet") as file:
        assert file.num_row_groups == 3
        features = json.loads(file.schema_arrow.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"]["names"] == [f"{k:02d}" for k in range(12)]


@pytest.mark.parametrize("name", ["set.npz", "set", "set.parquet"])
def test_what_exists_is_kept(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.mkdir() if name == "set" else path.write_text("mine")
    with pytest.raises(FileExistsError):
        export.write(path, *made(), format=export.format_of(path))
    export_again = name != "set"
    if export_again:
        assert path.read_text() == "mine"
        export.write(path, *made(), format=export.format_of(path), overwrite=True)
        assert len(open_source(path).arrays()[0]) == 25
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(image: np.ndarray) -> bytes:
        raise OSError("no space left")

    monkeypatch.setattr(export, "png", broken)
    for name in ("set", "set.parquet"):
        with pytest.raises(OSError, match="no space left"):
            export.write(tmp_path / name, *made(), format=export.format_of(tmp_path / name))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("set.zip", None, r"set.zip: expected a name ending in .npz or .parquet, or a folder"),
        ("set.npz", "zip", r"--format zip: expected one of npz, npz-float, folder, parquet"),
        ("set.npz", "folder", r"expected a name with no ending"),
        ("set", "npz-float", r"expected a name with \.npz"),
        ("set.npz", "parquet", r"expected a name with \.parquet"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(name: str, given: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        export.format_of(Path(name), given)


def card(release: dpmmd.Release) -> str:
    return export.card(
        release, name="set.npz", format="npz", shape=(60, 1, 8, 8), step=7, temperature=1.5, seed=3
    )


def test_the_card_says_what_was_promised(released: dpmmd.Release) -> None:
    text, m = card(released), released.metadata
    assert text.startswith("# 60 synthetic images")
    promise = next(line for line in text.splitlines() if "differentially private" in line)
    assert f"({m.epsilon:g}, {m.delta:g})" in promise
    assert "replace-one adjacency" in promise
    assert "any one image, with its label, exchanged for any other" in promise
    for said in (
        "60 grey images of 8 x 8 px, labels 0 to 2", "encoder two-taps", "7 steps",
        "temperature 1.5", "seed 3",
        "| unit | one image |", "Not covered:", "Several images of one person",
        m.array_sha256, "public training data",
    ):  # fmt: skip
        assert said in text


def test_the_card_of_test_noise_promises_nothing() -> None:
    release = dpmmd.release(
        images(20), small_encoder(), epsilon=1, delta=1e-3, adjacency="replace-one",
        insecure_test_noise=no_noise, progress=False,
    )  # fmt: skip
    text = card(release)
    assert text.startswith("# NOT PRIVATE: 60 synthetic images")
    assert "differentially private" not in text
    assert "epsilon" not in text
    assert "no labels" in text
