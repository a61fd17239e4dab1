"""One release by several processes (gloo, on this machine): one sum, one noise, one spend."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import dpmmd
from dpmmd.data import ArraySource, Batch, write_npz
from dpmmd.privacy import Ledger, PrivacyError, Release, mechanism, partial, ranks
from dpmmd.privacy.release_file import FURTHER
from dpmmd.privacy.sums import PrivateSums
from tests.conftest import images, nonnegative_encoder, small_encoder, small_modes

N, BATCH = 61, 4  # 16 batches: not as many for each of 3 ranks, and the last one is not full
ARGUMENTS: dict[str, Any] = {
    "epsilon": 1.0,
    "delta": 1e-9,
    "adjacency": "replace-one",
    "num_classes": 3,
    "batch_size": BATCH,
    "progress": False,
}
RELEASES: dict[str, dict[str, Any]] = {
    "unlabelled": {"num_classes": None},
    "hybrid, two moments": {"moments": (1, 2), "shared_taps": 1},
    "selection, add-remove": {"selection": nonnegative_encoder(), "adjacency": "add-remove"},
    "groups": {"group_by": "patient"},
    "moments of pixels": {"pixel_moments": 4},
    "modes": {"modes": small_modes(), "pixel_moments": 4},
}


def one_everywhere(n: int, sd: float) -> np.ndarray:
    """Test noise that shows how often it was added, and in which rank."""
    assert not dist.is_initialized() or dist.get_rank() == 0
    return np.full(n, 2**20, np.int64)


def start(
    world: int, work: Callable[[int, Path], None], folder: Path, timeout: float = 60.0
) -> list[int | None]:
    """Exit codes of work(rank, folder) in so many processes of one group; 0 where it returned."""
    context = mp.get_context("spawn")
    store = str(folder / "store")
    processes = [
        context.Process(target=_process, args=(rank, world, work, folder, store, timeout))
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(timeout=100)
    finally:
        for process in processes:
            process.kill()
            process.join()
        Path(store).unlink(missing_ok=True)
    return [process.exitcode for process in processes]


def _process(rank: int, world: int, work: Any, folder: Path, store: str, timeout: float) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "partial_sums=")
    dist.init_process_group(
        "gloo",
        f"file://{store}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout),
    )
    try:
        work(rank, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def release(source: Any = None, encoder: Any = None, **options: Any) -> Release:
    arguments = {**ARGUMENTS, "process_group": dist.group.WORLD, **options}
    return dpmmd.release(
        images(N) if source is None else source, encoder or small_encoder(), **arguments
    )


class Watched(ArraySource):
    """Calls a function before each batch is read."""

    def __init__(self, watch: Callable[[int], None]) -> None:
        super().__init__(*images(N))
        self.watch = watch

    def part(self, batch_size: int, numbers: range) -> Iterator[Batch]:
        for number, batch in zip(numbers, super().part(batch_size, numbers), strict=True):
            self.watch(number)
            yield batch


# ----------------------------------------------------------------------------- the same bits


def same_bits(rank: int, folder: Path) -> None:
    for options in RELEASES.values():
        source: Any = images(N)
        if "group_by" in options:
            source = (*source, np.arange(N) // 3)
        together = release(source, insecure_test_noise=one_everywhere, **options)
        dist.barrier()
        alone = release(
            source,
            process_group=None,
            insecure_test_noise=lambda n, sd: np.full(n, 2**20, np.int64),
            **options,
        )
        assert together.metadata == alone.metadata
        assert torch.equal(together.sums, alone.sums)
        assert together.modes is alone.modes
        for name in ("counts", *FURTHER):
            a, b = getattr(together, name), getattr(alone, name)
            assert (a is b is None) or torch.equal(a, b)
    for n in (0, 1):  # no batch at all, or none for some ranks
        few = release(
            images(n),
            adjacency="add-remove",
            insecure_test_noise=one_everywhere,
        )
        assert few.sums.shape == (1, 3, few.sums.shape[2])


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.long), 4])
def test_the_integers_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    """With one noise, which is added after the reduction, in the first rank."""
    assert start(world, same_bits, tmp_path) == [0] * world


def test_shards_are_all_of_it_once() -> None:
    one = ranks.Ranks()
    for batches in (0, 1, 5, 16, 17):
        for world in (1, 2, 3, 4, 7):
            seen: list[int] = []
            for rank in range(world):
                one.rank, one.world = rank, world
                shard = one.shard(batches)
                assert len(shard) in (batches // world, -(-batches // world))
                seen += shard
            assert seen == list(range(batches))


def test_only_the_first_rank_keeps_sums() -> None:
    class Second(ranks.Ranks):
        def __init__(self) -> None:
            super().__init__()
            self.rank = 1

    for together, kept in ((ranks.Ranks(), True), (Second(), False)):
        sums = PrivateSums(3, 2)
        sums.reduce(together)
        with contextlib.nullcontext() if kept else pytest.raises(RuntimeError, match="taken"):
            sums.take()


# ----------------------------------------------------------------------------- the ledger, refusals


def one_spend(rank: int, folder: Path) -> None:
    book, out = folder / "ledger", folder / "r.safetensors"

    def spent(number: int) -> None:
        assert [e.array_sha256 for e in Ledger(book).entries()] == [None]

    released = release(Watched(spent), ledger=book, out=out, budget=(1.0, 1e-9))
    dist.barrier()
    assert released.metadata.private
    (entry,) = Ledger(book).entries()
    loaded = Release.load(out)
    assert entry.array_sha256 == released.metadata.array_sha256 == loaded.metadata.array_sha256
    assert torch.equal(loaded.sums, released.sums)
    dist.barrier()
    before = book.read_bytes()
    # The budget is used up: only rank 0 knows, and all are refused.
    with pytest.raises((PrivacyError, RuntimeError), match=r"another process|budget"):
        release(Watched(pytest.fail), ledger=book, budget=(1.0, 1e-9))  # type: ignore[arg-type]
    # What differs between ranks is refused in all of them, before anything is spent.
    odd = rank == dist.get_world_size() - 1
    changes: list[tuple[str, dict[str, Any]]] = [
        ("epsilon", {"epsilon": 2.0 if odd else 1.0}),
        ("encoder", {"encoder": nonnegative_encoder() if odd else small_encoder()}),
        ("num_units", {"source": images(N - odd)}),
        ("images", {"source": images(N - odd), "adjacency": "add-remove"}),
        ("identity", {"source": ArraySource(*images(N), name="odd" if odd else "arrays")}),
        ("batch_size", {"batch_size": 5 if odd else 4}),
        ("ledger", {"ledger": None} if odd else {}),
    ]
    for name, options in changes:
        with pytest.raises(ValueError, match=f"rank 1 has another {name} than rank 0"):
            release(**{"ledger": book, **options})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mechanism, "__version__", "0.0.9" if odd else dpmmd.__version__)
        with pytest.raises(ValueError, match="rank 1 has another version than rank 0"):
            release(ledger=book)
    # What fails in one of them alone fails in all.
    missing = folder / "missing.npz" if odd else images(N)
    kind, message = (FileNotFoundError, "does not exist") if odd else (RuntimeError, "has stopped")
    with pytest.raises(kind, match=message):
        release(missing, ledger=book)

    def breaks(number: int) -> None:
        if number == 11:
            raise OSError("no such disk")

    kind, message = (OSError, "no such disk") if odd else (RuntimeError, "has stopped")
    dist.barrier()
    assert book.read_bytes() == before
    dist.barrier()
    with pytest.raises(kind, match=message):
        release(Watched(breaks), ledger=book, out=folder / "never")
    dist.barrier()
    assert [e.array_sha256 is None for e in Ledger(book).entries()] == [False, True]
    assert not (folder / "never").exists()

    class Full(Ledger):
        def confirm(self, spend: str, array_sha256: str) -> None:
            raise OSError("full")

    with pytest.MonkeyPatch.context() as patch:  # at the very end, in rank 0 alone
        patch.setattr("dpmmd.privacy.mechanism.Ledger", Full)
        kind, message = (RuntimeError, "has stopped") if rank else (OSError, "full")
        with pytest.raises(kind, match=message):
            release(ledger=book, out=folder / "never")
    dist.barrier()
    assert not (folder / "never").exists()


def test_one_spend_and_what_is_refused_everywhere(tmp_path: Path) -> None:
    assert start(2, one_spend, tmp_path) == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ledger", "r.safetensors"]


def test_a_group_needs_to_be_initialised() -> None:
    with pytest.raises(RuntimeError, match=r"torch[.]distributed is not initialised"):
        release(process_group=object())


# ----------------------------------------------------------------------------- a rank that is gone


def killed(rank: int, folder: Path) -> None:
    def die(number: int) -> None:
        if number == 9:
            os.kill(os.getpid(), signal.SIGKILL)

    started = time.monotonic()
    with pytest.raises(RuntimeError, match="another process has stopped"):
        release(Watched(die), ledger=folder / "ledger", out=folder / "out")
    assert time.monotonic() - started < 30


def test_a_killed_rank_stops_the_others(tmp_path: Path) -> None:
    assert start(3, killed, tmp_path) == [0, -signal.SIGKILL, 0]
    assert [p.name for p in tmp_path.iterdir()] == ["ledger"]
    assert [e.array_sha256 for e in Ledger(tmp_path / "ledger").entries()] == [None]


def silent(rank: int, folder: Path) -> None:
    def hang(number: int) -> None:
        if number == 9:
            os.kill(os.getpid(), signal.SIGSTOP)

    with pytest.raises(RuntimeError, match="another process has stopped"):
        release(Watched(hang), out=folder / "out")


@pytest.mark.long
def test_a_silent_rank_stops_the_others_after_the_timeout(tmp_path: Path) -> None:
    started = time.monotonic()
    context = mp.get_context("spawn")
    processes = [
        context.Process(
            target=_process, args=(rank, 2, silent, tmp_path, str(tmp_path / "store"), 6.0)
        )
        for rank in range(2)
    ]
    for process in processes:
        process.start()
    processes[0].join(timeout=60)
    code = processes[0].exitcode
    processes[1].kill()
    processes[1].join()
    assert code == 0
    assert time.monotonic() - started < 60
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- partial sums


def interrupted(rank: int, folder: Path) -> None:
    def stop(number: int) -> None:
        if number == 13:
            raise KeyboardInterrupt

    sums, book = folder / "sums", folder / "ledger"
    kind = KeyboardInterrupt if rank else RuntimeError
    with pytest.raises(kind):
        release(Watched(stop), partial_sums=sums, ledger=book, insecure_test_noise=one_everywhere)
    dist.barrier()
    assert sorted(p.name for p in sums.iterdir()) == [f"{partial.FILE}-{r}-of-2" for r in range(2)]
    for path in sums.iterdir():
        assert path.stat().st_mode & 0o777 == 0o600


def goes_on(rank: int, folder: Path) -> None:
    seen: list[int] = []
    options = {"insecure_test_noise": one_everywhere, "ledger": folder / "ledger"}
    resumed = release(Watched(seen.append), partial_sums=folder / "sums", **options)
    dist.barrier()
    if rank == 0:  # its shard was done
        assert not seen
    assert len(seen) < 8
    whole = release(insecure_test_noise=one_everywhere)
    assert resumed.metadata.array_sha256 == whole.metadata.array_sha256
    assert not (folder / "sums").exists()
    assert len(Ledger(folder / "ledger").entries()) == 1


def other_number(rank: int, folder: Path) -> None:
    with pytest.raises(PrivacyError, match="holds sums of 2 processes, this is one of 3"):
        release(
            Watched(lambda _: None),
            partial_sums=folder / "sums",
            insecure_test_noise=one_everywhere,
        )


def test_partial_sums_go_on_with_as_many_ranks(tmp_path: Path) -> None:
    assert start(2, interrupted, tmp_path) == [0, 0]
    assert start(2, goes_on, tmp_path) == [0, 0]


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:partial_sums=")
def test_partial_sums_of_another_number_of_ranks_are_refused(tmp_path: Path) -> None:
    assert start(2, interrupted, tmp_path) == [0, 0]
    before = {p.name: p.read_bytes() for p in (tmp_path / "sums").iterdir()}
    assert start(3, other_number, tmp_path) == [0, 0, 0]
    with pytest.raises(PrivacyError, match="holds sums of 2 processes, this is one of 1"):
        release(Watched(lambda _: None), process_group=None, partial_sums=tmp_path / "sums")
    assert {p.name: p.read_bytes() for p in (tmp_path / "sums").iterdir()} == before


# ----------------------------------------------------------------------------- the command line


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         "-m", "dpmmd", "release", *arguments],
        capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def test_torchrun(tmp_path: Path) -> None:
    data, out = tmp_path / "x.npz", tmp_path / "r.safetensors"
    write_npz(data, *images(20))
    arguments = [
        str(data), "--out", str(out), "--epsilon", "1", "--delta", "1e-6", "--adjacency",
        "replace-one", "--num-classes", "3", "--batch-size", "4", "--ledger",
        str(tmp_path / "ledger"), "--json",
    ]  # fmt: skip
    done = torchrun(*arguments)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["array_sha256"] == Release.load(out).metadata.array_sha256
    assert len(Ledger(tmp_path / "ledger").entries()) == 1


@pytest.mark.long
def test_torchrun_reports_a_refusal(tmp_path: Path) -> None:
    data = tmp_path / "x.npz"
    write_npz(data, *images(20))
    done = torchrun(
        str(data), "--out", str(tmp_path / "r"), "--epsilon", "0", "--delta", "1e-6",
        "--adjacency", "replace-one",
    )  # fmt: skip
    assert done.returncode != 0
    assert "error: epsilon=0.0" in done.stderr
    assert "exitcode  : 2" in done.stderr
    assert not (tmp_path / "r").exists()
