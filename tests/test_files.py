"""Outputs that cannot be written are refused before privacy is spent."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

import dpmmd
from dpmmd import run as runs
from dpmmd import train as training
from dpmmd.files import refuse_unwritable, write_atomically
from dpmmd.privacy import Ledger, PrivacyError
from dpmmd.recipe import GeneratorSection, TrainSection
from tests.conftest import images, small_encoder


def dangling(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "gone" / "r.safetensors")
    return folder / "out"


def dangling_beside(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "not-yet")
    return folder / "out"


def loop(folder: Path) -> Path:
    (folder / "out").symlink_to(folder / "out")
    return folder / "out"


def a_folder(folder: Path) -> Path:
    (folder / "out").mkdir()
    return folder / "out"


def linked_folder(folder: Path) -> Path:
    (folder / "real").mkdir()
    (folder / "out").symlink_to(folder / "real")
    return folder / "out"


def below_a_file(folder: Path) -> Path:
    (folder / "file").touch()
    return folder / "file" / "out"


def below_a_dangling_link(folder: Path) -> Path:
    (folder / "link").symlink_to(folder / "gone")
    return folder / "link" / "out"


def long_name(folder: Path) -> Path:
    return folder / ("x" * 250)  # the temporary file beside it has a longer one


def zero_byte(folder: Path) -> Path:
    return folder / "a\0b"


def no_folder(folder: Path) -> Path:
    return Path("/proc/dpmmd/out")


def unwritable_folder(folder: Path) -> Path:
    return Path("/proc/out")


def the_ledger(folder: Path) -> Path:
    return folder / "ledger"


def the_ledger_by_a_link(folder: Path) -> Path:
    (folder / "here").symlink_to(folder)
    return folder / "here" / "ledger"


def in_partial_sums(folder: Path) -> Path:
    return folder / "partial" / "out"


def the_partial_sums(folder: Path) -> Path:
    return folder / "partial"


PLACES = (
    dangling, dangling_beside, loop, a_folder, linked_folder, below_a_file, below_a_dangling_link,
    long_name, zero_byte, no_folder, unwritable_folder, the_ledger, the_ledger_by_a_link,
    in_partial_sums, the_partial_sums,
)  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_nothing_is_spent_where_out_cannot_be_written(
    tmp_path: Path, place: Callable[[Path], Path]
) -> None:
    out, ledger = place(tmp_path), tmp_path / "ledger"
    before = sorted(os.listdir(tmp_path))
    with pytest.raises((OSError, ValueError), match=r"out|exists|link"):
        dpmmd.release(
            images(20), small_encoder(), epsilon=1, delta=1e-3, adjacency="replace-one",
            ledger=ledger, partial_sums=tmp_path / "partial", out=out, progress=False,
        )  # fmt: skip
    assert not ledger.exists()
    assert sorted(os.listdir(tmp_path)) == before


def test_what_can_be_written_is_not_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "a" / "b", tmp_path / ("x" * 240), tmp_path / "a b\u00e9"):
        refuse_unwritable(path, others=(None, tmp_path / "ledger"))
        write_atomically(path, b"1")
        with pytest.raises(FileExistsError, match="not overwritten"):
            refuse_unwritable(path)
        refuse_unwritable(path, overwrite=True)
    with pytest.raises(FileExistsError, match="exists"):
        refuse_unwritable(tmp_path / "a", overwrite=True)  # a folder is never replaced


@pytest.mark.parametrize("place", [dangling_beside, loop, a_folder, below_a_file])
def test_a_ledger_that_cannot_be_one_is_refused_first(
    tmp_path: Path, place: Callable[[Path], Path]
) -> None:
    with pytest.raises((OSError, PrivacyError), match="ledger"):
        dpmmd.release(
            images(20), small_encoder(), epsilon=1, delta=1e-3, adjacency="replace-one",
            ledger=place(tmp_path), out=tmp_path / "r.safetensors", progress=False,
        )  # fmt: skip
    assert not (tmp_path / "r.safetensors").exists()


def test_partial_sums_that_cannot_be_stored_are_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write everywhere, so the system's refusal is played."""

    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("dpmmd.privacy.partial.tempfile.mkstemp", refuse)
    with pytest.raises(PrivacyError, match=r"partial_sums=.*cannot write there \(Read-only"):
        dpmmd.release(
            images(20), small_encoder(), epsilon=1, delta=1e-3, adjacency="replace-one",
            partial_sums=tmp_path / "partial", ledger=tmp_path / "ledger", progress=False,
        )  # fmt: skip
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize("place", [dangling_beside, loop, lambda folder: folder / "file"])
def test_a_run_folder_that_cannot_be_one_is_refused(
    tmp_path: Path, place: Callable[[Path], Path]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(runs.RunError, match=r"a link to a folder|is not a run folder"):
        runs.run("fashion-demo", place(tmp_path), say=lambda line: None)


def test_training_asks_first_whether_its_checkpoint_can_be_written(
    tmp_path: Path, released: dpmmd.Release
) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(OSError, match=r"checkpoints.*cannot write there"):
        training.train(
            released,
            small_encoder(),
            settings=TrainSection(steps=10**6),
            generator_settings=GeneratorSection(name="conv", image_size=8, channels=1),
            out=tmp_path,
            progress=False,
        )


def test_links_that_lead_somewhere_are_kept(tmp_path: Path) -> None:
    """A ledger may be a link to the real one; a run folder a link to another disk."""
    real = tmp_path / "real"
    options = {"epsilon": 1.0, "delta": 1e-3, "adjacency": "replace-one", "progress": False}
    dpmmd.release(images(20), small_encoder(), **options, ledger=real)
    (tmp_path / "ledger").symlink_to(real)
    dpmmd.release(images(20), small_encoder(), **options, ledger=tmp_path / "ledger")
    assert len(Ledger(real).entries()) == 2
