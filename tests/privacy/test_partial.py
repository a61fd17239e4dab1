"""Releases that are interrupted: what goes on, what is refused, and what is left behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpmmd
from dpmmd.data import ArraySource, Batch
from dpmmd.privacy import Ledger, PrivacyError, Release, partial
from tests.conftest import images, no_noise, small_encoder, small_modes

BATCH, N = 8, 60
WARNING = "ignore:partial_sums=.* raw private statistics:UserWarning"
pytestmark = pytest.mark.filterwarnings(WARNING)


class Stops(ArraySource):
    """Raises before a batch, once."""

    def __init__(
        self, at: int | None, error: type[BaseException] = KeyboardInterrupt, **options: Any
    ) -> None:
        super().__init__(*images(N), **options)
        self.at, self.error, self.read = at, error, 0

    def batches(self, batch_size: int) -> Iterator[Batch]:
        for index, batch in enumerate(super().batches(batch_size)):
            if index == self.at:
                raise self.error
            self.read += 1
            yield batch


def release(source: Any, folder: Path | None, **options: Any) -> Release:
    arguments = {"epsilon": 1.0, "delta": 1e-9, "adjacency": "replace-one", "num_classes": 3}
    arguments.update({"progress": False, "insecure_test_noise": no_noise, "batch_size": BATCH})
    arguments.update({"partial_sums": folder, **options})
    return dpmmd.release(source, small_encoder(), **arguments)


@pytest.mark.parametrize(
    "options",
    [{}, {"moments": (1, 2), "shared_taps": 1}, {"modes": small_modes()}],
    ids=["plain", "shared", "modes"],
)
@pytest.mark.parametrize("at", [0, 1, 5])
def test_it_goes_on_to_the_same_bits(tmp_path: Path, at: int, options: dict[str, Any]) -> None:
    folder = tmp_path / "sums"
    with pytest.raises(KeyboardInterrupt):
        release(Stops(at), folder, **options)
    assert stat.S_IMODE(os.stat(folder).st_mode) == 0o700
    assert [p.name for p in folder.iterdir()] == [partial.FILE]
    assert stat.S_IMODE(os.stat(folder / partial.FILE).st_mode) == 0o600
    summed = torch.zeros(3, 1)
    add = dpmmd.privacy.sums.PrivateSums.add_counts

    def watch(self: Any, labels: Any, valid: Any, taus: Any) -> None:
        summed[0] += int(valid.sum())
        add(self, labels, valid, taus)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpmmd.privacy.sums.PrivateSums, "add_counts", watch)
        resumed = release(Stops(None), folder, **options)
    assert summed[0] == N - at * BATCH  # the others were not summed again
    whole = release(Stops(None), None, **options)
    assert whole.modes is resumed.modes
    for name in ("sums", "counts", "shared"):
        a, b = getattr(resumed, name), getattr(whole, name)
        assert (a is b is None) or torch.equal(a, b)
    assert not folder.exists()


@pytest.mark.parametrize("at", [1, 5])
def test_it_goes_on_with_the_shares_of_its_own_images(tmp_path: Path, at: int) -> None:
    """Images 0 to 39 have a group each, the others are one person's: a twentieth each."""
    groups = {"groups": np.r_[np.arange(40), np.full(N - 40, 40)], "group_by": "person"}
    with pytest.raises(KeyboardInterrupt):
        release(Stops(at, **groups), tmp_path / "sums")
    resumed = release(Stops(None, **groups), tmp_path / "sums")
    whole = release(Stops(None, **groups), None)
    assert torch.equal(resumed.sums, whole.sums)
    assert torch.equal(resumed.counts, whole.counts)


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    os.chdir(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        release(Stops(3), None, out=tmp_path / "r.safetensors")
    assert not list(tmp_path.iterdir())


def test_the_folder_is_warned_about(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"raw private statistics.*Do not copy"):
        release(Stops(None), tmp_path / "sums")
    assert not list(tmp_path.iterdir())


def test_an_interruption_within_a_batch_keeps_whole_batches_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the blocks of one batch: what was stored last is used, not half a batch."""
    monkeypatch.setattr(partial, "SECONDS", 0.0)
    add = dpmmd.privacy.sums.PrivateSums.add_counts
    calls = []

    def breaks(self: Any, *arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        add(self, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partial.PartialSums, "store_if_due", partial.PartialSums.store)
        patch.setattr(dpmmd.privacy.sums.PrivateSums, "add_counts", breaks)
        with pytest.raises(KeyboardInterrupt):
            release(Stops(None), tmp_path / "sums")
    resumed = release(Stops(None), tmp_path / "sums")
    whole = release(Stops(None), None)
    assert torch.equal(resumed.sums, whole.sums)
    assert torch.equal(resumed.counts, whole.counts)


CHANGES: dict[str, dict[str, Any]] = {
    "epsilon": {"epsilon": 2.0},
    "moments": {"moments": (1, 2)},
    "adjacency": {"adjacency": "add-remove"},
    "batch size": {"batch_size": 4},
    "classes": {"num_classes": 4},
    "weights": {"weights": {"counts": 0.2}},
    "real noise": {"insecure_test_noise": None},
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_sums_of_another_release_are_not_mixed_in(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = tmp_path / "sums"
    with pytest.raises(KeyboardInterrupt):
        release(Stops(3), folder)
    before = (folder / partial.FILE).read_bytes()
    with pytest.raises(PrivacyError, match="partial sums of another release"):
        release(Stops(None), folder, **change)
    assert (folder / partial.FILE).read_bytes() == before


def test_sums_of_other_modes_are_not_mixed_in(tmp_path: Path) -> None:
    first = small_modes()
    other = dpmmd.Modes(8, 1, first.directions, first.thresholds + 1)
    with pytest.raises(KeyboardInterrupt):
        release(Stops(3), tmp_path / "sums", modes=first)
    with pytest.raises(PrivacyError, match="partial sums of another release"):
        release(Stops(None), tmp_path / "sums", modes=other)


def test_other_data_are_not_mixed_in(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        release(Stops(3), tmp_path / "sums")
    for other in (ArraySource(*images(N), name="other"), ArraySource(*images(N + 1))):
        with pytest.raises(PrivacyError, match="partial sums of another release"):
            release(other, tmp_path / "sums")


@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "foot"])
def test_damaged_sums_are_refused(tmp_path: Path, damage: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        release(Stops(3), tmp_path / "sums")
    path = tmp_path / "sums" / partial.FILE
    data = bytearray(path.read_bytes())
    if damage == "flip":
        data[5] ^= 1
    if damage == "foot":
        data[-300] ^= 1
    path.write_bytes({"cut": data[:-1], "empty": b""}.get(damage, data))
    with pytest.raises(PrivacyError, match="damaged; delete"):
        release(Stops(None), tmp_path / "sums")


def test_a_folder_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    for mode in (0o755, 0o750, 0o701):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(PrivacyError, match=f"mode {mode:04o}.*chmod 700"):
            release(Stops(None), folder)
    link = tmp_path / "link"
    (tmp_path / "real").mkdir(mode=0o700)
    link.symlink_to(tmp_path / "real")
    with pytest.raises(PrivacyError, match="only you can enter"):
        release(Stops(None), link)
    (tmp_path / "real" / "notes.txt").write_text("mine")
    with pytest.raises(PrivacyError, match=r"holds 'notes.txt'"):
        release(Stops(None), tmp_path / "real")
    assert (tmp_path / "real" / "notes.txt").read_text() == "mine"


def test_a_full_disk_leaves_the_last_whole_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "sums"
    with pytest.raises(KeyboardInterrupt):
        release(Stops(3), folder)
    before = (folder / partial.FILE).read_bytes()
    write = dpmmd.privacy.sums.PrivateSums.write

    def full(self: Any, file: Any) -> None:
        write(self, file)
        raise OSError(28, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpmmd.privacy.sums.PrivateSums, "write", full)
        with pytest.raises(OSError, match="No space left"):
            release(Stops(5), folder)
    assert [p.name for p in folder.iterdir()] == [partial.FILE]
    assert (folder / partial.FILE).read_bytes() == before
    release(Stops(None), folder)


# ----------------------------------------------------------------------------- with a ledger


def test_going_on_spends_once(tmp_path: Path) -> None:
    book = tmp_path / "ledger"
    options = {"ledger": book, "budget": (1.0, 1e-9), "insecure_test_noise": None}
    with pytest.raises(KeyboardInterrupt):
        release(Stops(3), tmp_path / "sums", **options)
    assert [e.array_sha256 for e in Ledger(book).entries()] == [None]
    released = release(Stops(None), tmp_path / "sums", **options)
    assert [e.array_sha256 for e in Ledger(book).entries()] == [released.metadata.array_sha256]


def test_a_spend_that_was_released_is_not_used_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release was confirmed, but could not be saved: a second one spends again."""
    book = tmp_path / "ledger"
    options = {"ledger": book, "insecure_test_noise": None}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Release, "save", lambda *_: (_ for _ in ()).throw(OSError("full")))
        patch.setattr(partial.PartialSums, "store_if_due", partial.PartialSums.store)
        with pytest.raises(OSError, match="full"):
            release(Stops(None), tmp_path / "sums", out=tmp_path / "r", **options)
    release(Stops(None), tmp_path / "sums", **options)
    entries = Ledger(book).entries()
    assert len({e.array_sha256 for e in entries}) == 2
    assert None not in {e.array_sha256 for e in entries}


# ----------------------------------------------------------------------------- killed

SCRIPT = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job of the background ignores it
import torch, warnings
warnings.simplefilter("ignore")
sys.path.insert(0, {root!r})
import dpmmd
from dpmmd.data import ArraySource
from dpmmd.privacy import partial
from tests.conftest import images, no_noise, small_encoder, small_modes
partial.SECONDS = 0.0
class Slow(ArraySource):
    def batches(self, batch_size):
        for index, batch in enumerate(super().batches(batch_size)):
            if index == 4:
                print("reading", flush=True)
                time.sleep(60)
            yield batch
dpmmd.release(Slow(*images(60)), small_encoder(), epsilon=1.0, delta=1e-9, adjacency="replace-one",
    num_classes=3, progress=False, insecure_test_noise=no_noise, batch_size=8,
    partial_sums={folder!r}, out={out!r})
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("named", [True, False])
def test_a_killed_process(tmp_path: Path, number: int, named: bool) -> None:
    """No half-written release; raw sums in the named folder alone, which the next call takes up."""
    root = str(Path(__file__).resolve().parents[2])
    folder = tmp_path / "sums" if named else None
    out = tmp_path / "r.safetensors"
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    script = textwrap.dedent(SCRIPT).format(
        root=root, folder=None if folder is None else str(folder), out=str(out)
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"reading\n"
    time.sleep(0.1)
    process.send_signal(number)
    assert process.wait(timeout=60) != 0
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left == (["sums", "tmp"] if named else ["tmp"])
    assert not list(temporary.iterdir())
    if folder is not None:
        resumed = release(ArraySource(*images(N)), folder, out=out)
        assert torch.equal(resumed.sums, release(ArraySource(*images(N)), None).sums)
        assert not folder.exists()


def test_a_full_disk_at_the_end_leaves_no_half_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpmmd.files.os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        release(Stops(None), None, out=tmp_path / "r.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_dead_worker_is_as_an_interruption(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError):
        release(Stops(2, RuntimeError), tmp_path / "sums", out=tmp_path / "r")
    assert [p.name for p in tmp_path.iterdir()] == ["sums"]
    resumed = release(Stops(None), tmp_path / "sums")
    assert torch.equal(resumed.sums, release(Stops(None), None).sums)


# ----------------------------------------------------------------------------- no image at all


@pytest.mark.parametrize("classes", [None, 3])
def test_no_image_is_released_as_one_is_under_add_remove(
    classes: int | None, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    options = {"adjacency": "add-remove", "num_classes": classes, "progress": True}
    none, one = (release(images(n), None, **options) for n in (0, 1))
    hidden = {"array_sha256"}
    assert none.metadata.model_dump(exclude=hidden) == one.metadata.model_dump(exclude=hidden)
    assert none.sums.shape == one.sums.shape
    assert not none.sums.any()
    assert one.sums.any()
    assert np.array_equal(none.counts, np.ones(classes or 1))  # at least 1, as a divisor
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_no_image_is_refused_where_n_is_public() -> None:
    with pytest.raises(ValueError, match="holds no images"):
        release(images(0), None)


def test_it_does_not_go_on_for_another_population(tmp_path: Path) -> None:
    folder, book = tmp_path / "sums", tmp_path / "ledger"
    with pytest.raises(KeyboardInterrupt):
        release(Stops(2), folder, ledger=book, population="ward 3", insecure_test_noise=None)
    for other in (None, "ward 4"):
        with pytest.raises(PrivacyError, match="partial sums of another release"):
            release(Stops(None), folder, ledger=book, population=other, insecure_test_noise=None)
