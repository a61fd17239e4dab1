"""Outputs that cannot be written are refused before privacy is spent."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import dpmmd
from dpmmd import export
from dpmmd import run as runs
from dpmmd import train as training
from dpmmd.files import refuse_unwritable, write_atomically
from dpmmd.privacy import Ledger, PrivacyError, Release, UnsavedRelease, release_file
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


OPTIONS: dict[str, Any] = {"epsilon": 1, "delta": 1e-3, "adjacency": "replace-one"}


def released_into(folder: Path, hook: Callable[[], None], **options: Any) -> dpmmd.Release:
    """A release during whose noise something happens to the disk."""

    def sampler(n: int, sd: float) -> np.ndarray:
        hook()
        return np.zeros(n, np.int64)

    return dpmmd.release(
        images(20), small_encoder(), **OPTIONS, ledger=folder / "ledger", progress=False,
        insecure_test_noise=sampler, **{"out": folder / "r.safetensors", **options},
    )  # fmt: skip


def test_a_release_whose_name_is_taken_meanwhile_is_kept_under_another(tmp_path: Path) -> None:
    out, first = tmp_path / "r.safetensors", tmp_path / "r.recovered-1.safetensors"
    first.write_bytes(b"another's")
    partial = tmp_path / "partial"
    with pytest.raises(UnsavedRelease, match=r"spent, and the file .*recovered-2.*keep") as raised:
        released_into(tmp_path, lambda: out.write_bytes(b"theirs"), partial_sums=partial)
    assert out.read_bytes() == b"theirs"
    assert first.read_bytes() == b"another's"
    assert raised.value.saved == tmp_path / "r.recovered-2.safetensors"
    entry = Ledger(tmp_path / "ledger").entry_of(Release.load(raised.value.saved))
    assert entry.array_sha256 == raised.value.release.metadata.array_sha256
    assert not partial.exists()  # the release is done: nothing raw stays


def test_a_release_that_the_folder_cannot_hold_goes_to_the_temporary_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    folder = tmp_path / "folder"

    def replaced() -> None:
        if folder.is_dir():
            folder.rmdir()
            folder.touch()

    with pytest.raises(UnsavedRelease, match="spent, and the file") as raised:
        released_into(tmp_path, replaced, out=folder / "r.safetensors")
    assert raised.value.saved == tmp_path / "tmp" / "r.recovered-1.safetensors"
    Release.load(raised.value.saved)


def test_a_release_that_cannot_be_written_at_all_is_in_the_exception(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    smaller = (1500, before[1])  # the ledger fits, the release does not
    try:
        with pytest.raises(UnsavedRelease, match=r"spent, .*error\.release\.save") as raised:
            released_into(tmp_path, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, smaller))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert raised.value.saved is None
    kept = raised.value.release.save(tmp_path / "later.safetensors")
    Ledger(tmp_path / "ledger").entry_of(Release.load(kept))
    assert sorted(os.listdir(tmp_path)) == ["later.safetensors", "ledger"]


def test_a_release_that_is_interrupted_while_it_is_saved_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = release_file.write_atomically

    def interrupted(path: Path, data: bytes, **options: Any) -> None:
        if path.name == "r.safetensors":
            raise KeyboardInterrupt
        real(path, data, **options)

    monkeypatch.setattr(release_file, "write_atomically", interrupted)
    with (
        pytest.raises(KeyboardInterrupt),
        pytest.warns(UserWarning, match="the file .*recovered-1"),
    ):
        released_into(tmp_path, lambda: None)
    Release.load(tmp_path / "r.recovered-1.safetensors")


def test_a_full_disk_is_refused_before_the_spend(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dpmmd.files.shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"out=.*needs about 1,\d+,\d+ bytes .* 1,000 free"):
        released_into(tmp_path, lambda: None)
    assert not (tmp_path / "ledger").exists()


def test_a_tilde_is_the_home_folder_in_every_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, released: dpmmd.Release
) -> None:
    home, work = tmp_path / "home", tmp_path / "work"
    work.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.chdir(work)
    home.mkdir()
    assert Release.load(released_into(home, lambda: None, out="~/r").save("~/again")).num_classes
    training.save_png("~/a.png", np.zeros((1, 2, 2), np.uint8))
    export.write(Path("~/set"), np.zeros((1, 1, 2, 2), np.uint8), None, format="folder")
    with pytest.raises(runs.RunError, match=r"home.*report\.json"):
        runs.summarise(["~/run"])
    with pytest.raises(FileNotFoundError, match="home/c"):
        training.load_checkpoint("~/c")
    with pytest.raises(ValueError, match="no home folder for '~nobody-here'"):
        released.save("~nobody-here/r")
    assert sorted(os.listdir(home)) == ["a.png", "again", "ledger", "r", "set"]
    assert not os.listdir(work)
