"""The ledger: nothing that was spent is lost, edits are found, budgets hold, N stays private."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import stat
import threading
import time
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpmmd
from dpmmd.data import ArraySource, Batch, ImageSource, open_source
from dpmmd.privacy import (
    ADJACENCIES,
    Block,
    Ledger,
    PrivacyError,
    accounting,
    calibrate,
    composition,
    sensitivity,
)
from dpmmd.privacy import ledger_file as module
from dpmmd.privacy.mechanism import rounded_gaussian
from dpmmd.privacy.report import facts, markdown
from tests.conftest import images, no_noise, small_encoder

ONE, OTHER = "1" * 64, "2" * 64
OPTIONS: dict[str, Any] = {
    "epsilon": 1.0,
    "delta": 1e-6,
    "adjacency": "replace-one",
    "num_classes": 3,
    "progress": False,
}


def spend(ledger: Ledger, identity: str = ONE, **changes: Any) -> str:
    given = {
        "epsilon": 1.0,
        "delta": 1e-6,
        "adjacency": "replace-one",
        "unit": "image",
        "private": True,
    }
    given.update(changes)
    given.setdefault("mu", calibrate(epsilon=given["epsilon"], delta=given["delta"]).mu)
    return ledger.spend(identity=identity, source="scans", **given)


def release(path: Path, n: int = 40, **changes: Any) -> dpmmd.Release:
    return dpmmd.release(images(n), small_encoder(), **{**OPTIONS, "ledger": path, **changes})


class Source(ImageSource):
    """Blank images; `before` runs before each batch."""

    name, identity, image_shape, num_images = "mine", ONE, (1, 8, 8), 8

    def __init__(self, before: Any = None) -> None:
        self.before = before or (lambda: None)

    def look(self, positions: Sequence[int]) -> list[None]:
        return [None] * len(positions)  # nothing is read before the spend

    def batches(self, batch_size: int) -> Iterator[Batch]:
        for _ in range(0, self.num_images, batch_size):
            self.before()
            yield Batch(
                torch.zeros(batch_size, *self.image_shape),
                torch.zeros(batch_size, dtype=torch.int64),
                torch.ones(batch_size, dtype=torch.bool),
            )


def unreadable() -> Source:
    def fail(*_: object) -> None:
        raise AssertionError("an image was read")

    source = Source(fail)
    source.look = fail  # type: ignore[assignment, method-assign]
    return source


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


@pytest.fixture
def filled(path: Path) -> Path:
    """A header, a spend and its release, and two spends that did not complete."""
    ledger = Ledger(path)
    ledger.confirm(spend(ledger), "a" * 64)
    spend(ledger, epsilon=2.0)
    spend(ledger, OTHER, epsilon=0.5)
    return path


# ----------------------------------------------------------------------------- units


@pytest.mark.filterwarnings("ignore:population=")
def test_a_release_for_groups_promises_something_for_images(path: Path) -> None:
    """One image changed is its group exchanged: one step, or two for blanking and leaving out."""
    for number, adjacency in enumerate(ADJACENCIES):
        options = {"adjacency": adjacency, "unit": "group by patient", "population": f"{number}"}
        spend(Ledger(path), mu=0.3, **options)
    factors = {
        "replace-one": (1, 1, math.inf),
        "zero-out": (2, 2, math.inf),
        "add-remove": (2, 2, 2),
    }
    for number, adjacency in enumerate(ADJACENCIES):
        total = Ledger(path).total(f"{number}")
        assert tuple(total.mu) == ("replace-one", "zero-out", "add-remove")
        found = tuple(mu / 0.3 for mu in total.mu.values())
        assert found == pytest.approx(factors[adjacency])
        own = Ledger(path).total(f"{number}", unit="group by patient")
        assert own.mu[adjacency] == pytest.approx(0.3)
        assert own.unit == "group by patient"


def test_a_release_for_images_promises_nothing_for_groups(path: Path) -> None:
    ledger = Ledger(path, budget=(5.0, 1e-5))
    spend(ledger, unit="image")
    spend(ledger, unit="image")
    total = ledger.total(unit="group by patient")
    assert (set(total.mu.values()), total.units) == ({math.inf}, ("image", "image"))
    with pytest.raises(PrivacyError, match=r"another unit \(image\)"):
        spend(ledger, unit="group by patient")
    other = Ledger(path.with_name("other"), budget=(5.0, 1e-5))
    spend(other, unit="group by patient")
    with pytest.raises(PrivacyError, match=r"another unit \(group by patient\)"):
        spend(other, unit="group by family")
    spend(other, unit="image")  # that is stated for images


# ----------------------------------------------------------------------------- what is recorded


def test_a_release_is_recorded_with_its_hash(path: Path) -> None:
    released = release(path)
    (entry,) = Ledger(path).entries()
    m = released.metadata
    for name in ("private", "mu", "epsilon", "delta", "adjacency", "unit", "version"):
        assert getattr(entry, name) == getattr(m, name), name
    assert entry.array_sha256 == m.array_sha256
    assert entry.identity == open_source(images(40)).identity
    assert entry.source == m.source
    assert Ledger(path).entry_of(released) == entry
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_releases_in_a_ledger_compose(path: Path) -> None:
    """Whatever their sources: a spelling, a wrapper or a copy hides nothing."""
    ledger = Ledger(path)
    mus = [calibrate(epsilon=e, delta=1e-6).mu for e in (1.0, 2.0, 0.5)]
    for number, mu in enumerate(mus):
        spend(ledger, f"{number}" * 64, mu=mu)
    total = ledger.total()
    assert (total.releases, total.incomplete, total.private) == (3, 3, True)
    assert total.mu["replace-one"] == pytest.approx(accounting.compose(mus), rel=1e-12)
    assert total.mu["replace-one"] ** 2 >= math.fsum(mu * mu for mu in mus)
    expected = accounting.epsilon(mu=accounting.compose(mus), delta=1e-5)
    assert total.epsilon(adjacency="replace-one", delta=1e-5) == pytest.approx(expected)


def test_nothing_in_the_ledger_depends_on_n_under_add_remove(tmp_path: Path) -> None:
    texts = []
    for n in (40, 41, 2000):
        path = tmp_path / f"{n}.jsonl"
        release(path, n, adjacency="add-remove", delta=1e-9)
        release(path, n, adjacency="add-remove", delta=1e-9)
        (sha,) = {e.array_sha256 for e in Ledger(path).entries()[:1]}
        text = path.read_text().replace(str(sha), "-")
        for line in path.read_text().splitlines():  # hashes follow from the arrays' alone
            text = text.replace(json.loads(line)["hash"], "-")
        other = Ledger(path).entries()[1].array_sha256
        texts.append(text.replace(str(other), "-"))
    assert texts[0] == texts[1] == texts[2]
    keys = {key for line in texts[0].splitlines() for key in json.loads(line)}
    assert keys == {
        "kind", "format", "identity", "source", "private", "mu", "epsilon", "delta", "adjacency",
        "unit", "spend", "array_sha256", "version", "previous", "hash",
    }  # fmt: skip


def test_test_noise_is_an_infinite_loss(path: Path) -> None:
    released = release(path, insecure_test_noise=no_noise)
    (entry,) = Ledger(path).entries()
    assert (entry.private, entry.mu) == (False, math.inf)
    release(path)
    total = Ledger(path).total()
    assert not total.private
    assert set(total.mu.values()) == {math.inf}
    assert total.epsilon(adjacency="zero-out", delta=0.5) == math.inf
    f = facts(released, Ledger(path))["ledger"]
    assert set(f["mu"].values()) == set(f["epsilon"].values()) == {None}
    json.dumps(f, allow_nan=False)
    assert "NO GUARANTEE" in markdown(released, Ledger(path))
    before = path.read_bytes()
    with pytest.raises(PrivacyError, match="has a release with test noise"):
        release(path, budget=(9000.0, 0.9))
    with pytest.raises(PrivacyError, match="no budget allows it"):
        release(path.with_name("new"), budget=(9000.0, 0.9), insecure_test_noise=no_noise)
    assert path.read_bytes() == before
    assert not path.with_name("new").exists()


# ----------------------------------------------------------------------------- adjacencies


@pytest.mark.filterwarnings("ignore:population=")
def test_factors_between_adjacencies(path: Path) -> None:
    mus = {"replace-one": 0.3, "zero-out": 0.4, "add-remove": 0.5}
    for adjacency, mu in mus.items():
        spend(Ledger(path), population=adjacency, adjacency=adjacency, mu=mu)
    of = {a: Ledger(path).total(a).mu for a in mus}
    assert of["replace-one"] == pytest.approx(
        {"replace-one": 0.3, "zero-out": 0.3, "add-remove": math.inf}
    )
    assert of["zero-out"] == pytest.approx(
        {"replace-one": 0.8, "zero-out": 0.4, "add-remove": math.inf}
    )
    assert of["add-remove"] == pytest.approx(
        {"replace-one": 1.0, "zero-out": 0.5, "add-remove": 0.5}
    )


@pytest.mark.parametrize("nonnegative", [False, True])
@pytest.mark.parametrize("counts", [0.0, 0.1, 1.0, 3.0])
@pytest.mark.parametrize("moments", [1, 2])
def test_factors_hold_for_this_mechanism(nonnegative: bool, counts: float, moments: int) -> None:
    """The black-box factors are never below what the sensitivities say of the real blocks."""
    blocks = [Block(f"phi{m}", "sums", 1.0, nonnegative) for m in range(moments)]
    blocks += [Block("counts", "counts", counts)] if counts else []
    for made, factors in composition.FACTORS.items():
        for stated in ("replace-one", "zero-out"):
            true = sensitivity(stated, blocks) / sensitivity(made, blocks)
            assert true <= composition.FACTORS[stated][made] * (1 + 1e-12), (made, stated)
        assert factors[made] == 1.0


def test_mixed_adjacencies_and_the_budget(path: Path) -> None:
    ledger = Ledger(path, budget=(3.4, 1e-6))
    spend(ledger, adjacency="add-remove")
    spend(ledger, adjacency="add-remove")
    spend(ledger, adjacency="replace-one")  # sqrt(4 + 4 + 1) mu of epsilon = 1
    mu = calibrate(epsilon=1.0, delta=1e-6).mu
    assert ledger.total().mu["replace-one"] == pytest.approx(3 * mu)
    assert ledger.total().mu["zero-out"] == pytest.approx(3**0.5 * mu)
    assert ledger.total().mu["add-remove"] == math.inf
    with pytest.raises(PrivacyError, match=r"stated the number of images.*'replace-one'"):
        spend(ledger, adjacency="add-remove", epsilon=0.01)
    limit = calibrate(epsilon=3.4, delta=1e-6).mu
    assert 3 * mu < limit < 10**0.5 * mu
    with pytest.raises(PrivacyError, match="under replace-one"):
        spend(ledger, adjacency="replace-one")
    spend(ledger, adjacency="zero-out")


# ----------------------------------------------------------------------------- budgets


def test_a_budget_is_used_up_to_the_last_bit_and_not_passed(path: Path) -> None:
    ledger = Ledger(path, budget=(1.0, 1e-6))
    spend(ledger, epsilon=1.0, delta=1e-6)
    before = path.read_bytes()
    with pytest.raises(PrivacyError, match="nothing of it is left"):
        spend(ledger, epsilon=0.001)
    assert path.read_bytes() == before
    with pytest.raises(PrivacyError, match="of whatever source"):
        spend(ledger, OTHER, epsilon=0.001)  # the same images, another name for their source
    assert path.read_bytes() == before


def test_what_the_refusal_says_fits_does_fit(path: Path) -> None:
    ledger = Ledger(path, budget=(2.0, 1e-5))
    spend(ledger)
    with pytest.raises(PrivacyError, match=r"1 earlier release spent mu = 0\.2368 of") as caught:
        spend(ledger, epsilon=2.0)
    text = str(caught.value)
    fits = float(text.split("at most epsilon = ")[1].split()[0])
    assert 0.5 < fits < 2.0
    with pytest.raises(PrivacyError):
        spend(ledger, epsilon=fits + 2e-5)
    spend(ledger, epsilon=fits)
    assert ledger.total().epsilon(adjacency="replace-one", delta=1e-5) <= 2.0


def test_over_the_budget_no_image_is_read_and_nothing_is_written(tmp_path: Path) -> None:
    path, out = tmp_path / "ledger.jsonl", tmp_path / "r.safetensors"
    options = {**OPTIONS, "num_classes": None, "ledger": path, "out": out, "budget": (0.9, 1e-6)}
    with pytest.raises(PrivacyError, match=r"budget=\(0\.9, 1e-06\).*No image was read"):
        dpmmd.release(unreadable(), small_encoder(), **options)
    assert not list(tmp_path.iterdir())
    spend(Ledger(path))
    before = path.read_bytes()
    with pytest.raises(PrivacyError, match="No image was read"):
        dpmmd.release(unreadable(), small_encoder(), **{**options, "budget": (1.2, 1e-6)})
    assert path.read_bytes() == before
    with pytest.raises(AssertionError, match="an image was read"):  # the source does tell
        dpmmd.release(unreadable(), small_encoder(), **{**options, "budget": None})


@pytest.mark.parametrize(
    ("budget", "kind", "message"),
    [
        (1.0, TypeError, r"budget=1\.0: expected \(epsilon, delta\)"),
        ((1.0,), TypeError, "expected"),
        ((0.0, 1e-6), ValueError, r"budget=\(0\.0, 1e-06\): epsilon=0\.0"),
        ((1.0, 2.0), ValueError, r"delta=2\.0"),
        ((float("nan"), 1e-6), ValueError, "epsilon=nan"),
        (("a", 1e-6), ValueError, "budget"),
    ],
)
def test_budgets_out_of_range(path: Path, budget: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        release(path, budget=budget)
    assert not path.exists()


def test_a_budget_needs_a_ledger() -> None:
    with pytest.raises(ValueError, match=r"budget=\(1, 1e-06\): needs ledger=FILE"):
        dpmmd.release(unreadable(), small_encoder(), **OPTIONS, budget=(1, 1e-6))


# ----------------------------------------------------------------------------- populations


def test_one_data_set_under_other_names_is_counted_once_more_each_time(tmp_path: Path) -> None:
    """A link, a copy, another kind of source, a wrapper: a budget for one release allows one."""
    x, y = images(40)
    np.savez(tmp_path / "a.npz", x=x, y=y)
    (tmp_path / "link.npz").symlink_to(tmp_path / "a.npz")
    np.savez(tmp_path / "copy.npz", x=x, y=y)

    class Wrapper(ArraySource):
        pass

    path, sources = tmp_path / "ledger", (tmp_path / "a.npz", tmp_path / "link.npz")
    for number, source in enumerate(
        (*sources, tmp_path / "copy.npz", (x, y), ArraySource(x, y, name="b"), Wrapper(x, y))
    ):
        options = {**OPTIONS, "ledger": path, "budget": (1.0, 1e-6)}
        if number:
            with pytest.raises(PrivacyError, match="1 earlier release spent"):
                dpmmd.release(source, small_encoder(), **options)
        else:
            dpmmd.release(source, small_encoder(), **options)
    assert len(Ledger(path).entries()) == 1


def test_populations_that_are_declared_disjoint_do_not_compose(path: Path) -> None:
    ledger = Ledger(path, budget=(1.0, 1e-6))
    spend(ledger, population="ward 3")
    with pytest.warns(UserWarning, match=r"'ward 4' is new.*'ward 3': you declare that nobody"):
        spend(ledger, population="ward 4")
    mu = calibrate(epsilon=1.0, delta=1e-6).mu
    spellings = ("ward 3", "Ward-3", "WARD  3", "ward3", "\uff37ard \uff13", "w\u00e5rd 03")
    for name in (*spellings, "ward\u3164\u0663"):  # one word
        assert ledger.total(name).mu["replace-one"] == pytest.approx(mu)
        with pytest.raises(PrivacyError, match=r"for population .*1 earlier release spent"):
            spend(ledger, population=name)
    assert ledger.total().mu["replace-one"] == pytest.approx(2**0.5 * mu)
    with pytest.raises(PrivacyError, match="2 earlier releases spent"):
        spend(ledger)  # nothing was declared of it: all of them may have its people
    assert [e.population for e in ledger.entries()] == ["ward 3", "ward 4"]


@pytest.mark.filterwarnings("ignore:population=")
def test_what_has_no_population_composes_with_every_one(path: Path) -> None:
    ledger = Ledger(path)
    spend(ledger, mu=0.3)
    spend(ledger, mu=0.4, population="a")
    spend(ledger, mu=1.2, population="b")
    assert ledger.total("a").mu["replace-one"] == pytest.approx(0.5)
    assert ledger.total("b").mu["replace-one"] == pytest.approx(1.53**0.5)
    assert ledger.total().mu["replace-one"] == pytest.approx(1.3)
    assert ledger.total().releases == 3
    strict = Ledger(path, budget=(1.0, 1e-6))
    with pytest.raises(PrivacyError, match=r"2 earlier releases spent mu = 0\.5001"):
        spend(strict, population="a")


def test_a_ledger_of_before_is_read_and_all_of_it_composes(path: Path) -> None:
    """Its lines have no population; those of now have none either, unless one is named."""
    spend(Ledger(path), ONE)
    assert "population" not in path.read_text()
    spend(Ledger(path), OTHER, population="a")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line.get("population") for line in lines] == [None, None, "a"]
    assert Ledger(path).total("a").releases == 2
    edited = path.read_bytes().replace(b'"population":"a",', b"")
    path.write_bytes(edited)
    with pytest.raises(PrivacyError, match="line 3: has hash"):
        Ledger(path).total()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (ONE, "is the identity of a source, which no longer counts"),
        ("", "expected a name"),
        (" - ", "expected a name"),
        ("\u3164", "expected a name"),
        ("\u115f\uffa0", "expected a name"),
        ("a\x1b[31m", r"population='a\\x1b\[31m': expected a name"),
        ("a" * 201, "at most 200"),
        (3, "population=3: expected a name"),
    ],
)
def test_names_that_are_none_are_refused(path: Path, name: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        release(path, population=name)
    with pytest.raises((ValueError, TypeError), match=message):
        spend(Ledger(path), population=name)
    assert not path.exists()
    spend(Ledger(path))
    with pytest.raises((ValueError, TypeError), match=message):
        Ledger(path).total(name)


def test_a_population_that_is_not_there_is_no_zero(path: Path) -> None:
    spend(Ledger(path), population="ward 3")
    with pytest.raises(ValueError, match=r"population='wart 3': .* only for 'ward 3'"):
        Ledger(path).total("wart 3")
    with pytest.raises(ValueError, match=r"population='ward 3': needs ledger=FILE"):
        dpmmd.release(unreadable(), small_encoder(), **OPTIONS, population="ward 3")


def test_a_population_is_on_record(path: Path) -> None:
    first = release(path, population="ward 3")
    with pytest.warns(UserWarning, match="is new to ledger"):
        release(path, population="ward 4")
    f = facts(first, Ledger(path))["ledger"]
    assert (f["population"], f["releases"]) == ("ward 3", 1)
    assert "| population | 'ward 3', which was declared disjoint" in markdown(first, Ledger(path))
    release(path)
    assert facts(first, Ledger(path))["ledger"]["releases"] == 2


# ----------------------------------------------------------------------------- crashes


def crash(*_: object) -> Any:
    raise KeyboardInterrupt


@pytest.mark.parametrize("where", ["first batch", "later batch", "sampler", "metadata", "save"])
def test_a_crash_after_the_spend_leaves_it_counted(
    tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, out = tmp_path / "ledger.jsonl", tmp_path / "r.safetensors"
    seen = []

    def before() -> None:
        seen.append(len(Ledger(path).entries()))
        if where == "first batch" or (where == "later batch" and len(seen) == 2):
            crash()

    def sampler(n: int, sd: float) -> np.ndarray:
        seen.append(len(Ledger(path).entries()))
        return rounded_gaussian(n, sd) if where != "sampler" else crash()

    monkeypatch.setattr("dpmmd.privacy.mechanism.rounded_gaussian", sampler)
    if where == "metadata":
        monkeypatch.setattr("dpmmd.privacy.mechanism.array_hash", crash)
    if where == "save":
        monkeypatch.setattr(dpmmd.Release, "save", crash)
    options = {**OPTIONS, "num_classes": None, "batch_size": 2, "ledger": path, "out": out}
    with pytest.raises(KeyboardInterrupt):
        dpmmd.release(Source(before), small_encoder(), **options)
    assert set(seen) == {1}  # recorded before the first image, and before the noise
    total = Ledger(path).total()
    assert (total.releases, total.incomplete) == (1, 0 if where == "save" else 1)
    assert total.mu["replace-one"] == pytest.approx(calibrate(epsilon=1.0, delta=1e-6).mu)
    assert not out.exists()
    monkeypatch.undo()
    with pytest.raises(PrivacyError, match="1 earlier release spent"):
        dpmmd.release(unreadable(), small_encoder(), **{**options, "budget": (1.2, 1e-6)})


def test_what_fails_before_any_image_is_read_costs_nothing(path: Path) -> None:
    class Broken(Source):
        image_shape = (2, 8, 8)  # neither grey nor RGB: the encoder refuses it

    with pytest.raises(Exception, match=r"2|channel"):
        dpmmd.release(Broken(unreadable().before), small_encoder(), **{**OPTIONS, "ledger": path})
    assert not path.exists()


def test_no_release_leaves_if_it_cannot_be_confirmed(tmp_path: Path) -> None:
    path, out = tmp_path / "ledger.jsonl", tmp_path / "r.safetensors"

    def replace() -> None:
        path.unlink()
        spend(Ledger(path), OTHER)

    options = {**OPTIONS, "num_classes": None, "batch_size": 8, "ledger": path, "out": out}
    with pytest.raises(PrivacyError, match="is no longer there"):
        dpmmd.release(Source(replace), small_encoder(), **options)
    assert not out.exists()


def test_every_line_is_on_disk_before_anything_goes_on(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spend that a power cut could undo would let a budget be passed."""
    synced: list[tuple[int, int]] = []  # inode and size at that time
    fsync = os.fsync

    def watch(descriptor: int) -> None:
        fsync(descriptor)
        synced.append((os.fstat(descriptor).st_ino, os.fstat(descriptor).st_size))

    def whole() -> tuple[int, int]:
        return path.stat().st_ino, path.stat().st_size

    monkeypatch.setattr(os, "fsync", watch)
    ledger = Ledger(path)
    first = spend(ledger)
    folder = path.parent.stat().st_ino
    named = [i for i, (inode, _) in enumerate(synced) if inode == folder]
    assert named  # the file's name is on disk too
    assert synced[0][0] == path.stat().st_ino  # a first line, before it has that name
    assert named[0] > 0
    assert synced[-1] == whole()
    spend(ledger)
    assert synced[-1] == whole()
    ledger.confirm(first, "0" * 64)
    assert synced[-1] == whole()


def test_a_full_disk_leaves_no_half_line(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = filled.read_bytes()
    real = module.append

    class Full(FileIO):
        def write(self, data: Any) -> int:
            return super().write(data[:10])

    def append(file: FileIO, *rest: Any) -> str:
        full = Full(os.dup(file.fileno()), "r+b")
        return real(full, *rest)

    monkeypatch.setattr(module, "append", append)
    with pytest.raises(OSError, match="wrote 10 of"):
        spend(Ledger(filled))
    assert filled.read_bytes() == before


def test_a_file_name_that_is_not_utf8_does_not_fail_after_the_spend(tmp_path: Path) -> None:
    x, y = images(40)
    source, out = tmp_path / os.fsdecode(b"\xff.npz"), tmp_path / "r.safetensors"
    np.savez(source, x=x, y=y)
    ledger = Ledger(tmp_path / "ledger.jsonl")
    released = dpmmd.release(source, small_encoder(), **OPTIONS, ledger=ledger.path, out=out)
    assert ledger.entry_of(dpmmd.Release.load(out)).array_sha256 == released.metadata.array_sha256
    assert released.metadata.source == "?.npz"


# ----------------------------------------------------------------------------- two at once


def test_a_ledger_that_another_makes_meanwhile_is_kept(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = module.append

    def append(file: FileIO, record: dict[str, Any], previous: str) -> str:
        if record["kind"] == "ledger":
            monkeypatch.setattr(module, "append", real)
            spend(Ledger(path), OTHER)
        return real(file, record, previous)

    monkeypatch.setattr(module, "append", append)
    spend(Ledger(path))
    assert [e.identity for e in Ledger(path).entries()] == [OTHER, ONE]


def _race(path: Path, start: Any, fits: Any) -> None:
    start.wait()
    try:
        spend(Ledger(path, budget=(2.0, 1e-6)))
    except PrivacyError:
        os._exit(3)
    fits.release()
    os._exit(0)


@pytest.mark.parametrize("exists", [False, True])
def test_processes_at_once_do_not_pass_the_budget(
    path: Path, exists: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if exists:
        spend(Ledger(path), OTHER, epsilon=1e-3)
    real = module.append

    def slow(file: FileIO, *rest: Any) -> str:  # between check and record
        time.sleep(0.02)
        return real(file, *rest)

    monkeypatch.setattr(module, "append", slow)
    context = multiprocessing.get_context("fork")
    start, fits = context.Barrier(8), context.Semaphore(0)
    workers = [context.Process(target=_race, args=(path, start, fits)) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    limit = calibrate(epsilon=2.0, delta=1e-6).mu
    expected = int((limit / calibrate(epsilon=1.0, delta=1e-6).mu) ** 2)
    assert 2 <= expected <= 4
    assert sorted(worker.exitcode or 0 for worker in workers) == [0] * expected + [3] * (
        8 - expected
    )
    assert Ledger(path).total().releases == expected + exists


def test_releases_at_once_in_one_process(path: Path) -> None:
    start, results = threading.Barrier(3), []

    def one() -> None:
        source = Source()
        start.wait()
        options = {**OPTIONS, "num_classes": None, "ledger": path, "budget": (1.0, 1e-6)}
        try:
            results.append(dpmmd.release(source, small_encoder(), **options))
        except PrivacyError as error:
            results.append(error)

    threads = [threading.Thread(target=one) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(isinstance(r, PrivacyError) for r in results) == [False, True, True]
    assert Ledger(path).total().releases == 1


# ----------------------------------------------------------------------------- edits


def rehashed(line: bytes, **changes: Any) -> bytes:
    data = {**json.loads(line), **changes}
    del data["hash"]
    return module._canonical({**data, "hash": module._hash(data)})


EDITS: dict[str, tuple[Any, str]] = {
    "a smaller mu": (
        lambda x: [*x[:1], x[1].replace(b'"mu":0.236', b'"mu":0.136'), *x[2:]],
        "line 2: has hash .*, expected .* of its content",
    ),
    "another data set": (
        lambda x: [*x[:3], x[3].replace(b"1" * 64, b"3" * 64), *x[4:]],
        "line 4: has hash",
    ),
    "an edit with a new hash": (
        lambda x: [*x[:3], rehashed(x[3], mu=0.1), *x[4:]],
        "line 5: follows hash .*, expected .* of line 4",
    ),
    "a line removed": (lambda x: [*x[:1], *x[2:]], "line 2: follows hash .* of line 1"),
    "the first line removed": (lambda x: x[1:], "line 1: follows hash .* of a first line"),
    "a middle line removed": (lambda x: [*x[:3], *x[4:]], "line 4: follows hash"),
    "two lines exchanged": (lambda x: [x[0], x[1], x[3], x[2], *x[4:]], "line 3: follows hash"),
    "a line twice": (lambda x: [*x[:4], *x[3:]], "line 5: follows hash"),
    "spaces": (lambda x: [x[0], x[1].replace(b":", b": "), *x[2:]], "line 2: has hash"),
    "a key twice": (lambda x: [x[0], b'{"mu":0.1,' + x[1][1:], *x[2:]], "line 2: has hash"),
    "an empty line": (lambda x: [*x, b""], "line 6: expected a JSON object"),
    "text": (lambda x: [*x, b"mu = 0"], "line 6: expected a JSON object"),
    "bytes": (lambda x: [*x, b"\xff\x00"], "line 6: expected a JSON object"),
    "a list": (lambda x: [*x, b"[]"], "line 6: expected a JSON object"),
    "a nan": (lambda x: [*x, b'{"hash":"","mu":NaN}'], "line 6: expected a JSON object"),
    "an overflow": (lambda x: [*x, b'{"hash":"","mu":1e999}'], "line 6: expected a JSON object"),
    "brackets": (lambda x: [*x, b"[" * 100_000], "line 6: expected a JSON object"),
    "a negative mu, forged": (
        lambda x: [*x, rehashed(x[4], mu=-1.0, previous=json.loads(x[4])["hash"])],
        "line 6: of a kind that this version",
    ),
    "a new kind": (
        lambda x: [*x, rehashed(x[4], kind="refund", previous=json.loads(x[4])["hash"])],
        "line 6: of a kind that this version",
    ),
    "released twice": (
        lambda x: [*x, rehashed(x[2], previous=json.loads(x[4])["hash"])],
        "line 6: releases .* expected a spend",
    ),
    "a second start": (
        lambda x: [*x, rehashed(x[0], previous=json.loads(x[4])["hash"])],
        "line 6: 'ledger' is out of place",
    ),
}


@pytest.mark.parametrize(("edit", "message"), EDITS.values(), ids=EDITS)
def test_edits_are_found(filled: Path, edit: Any, message: str) -> None:
    lines = filled.read_bytes().splitlines()
    assert len(lines) == 5
    edited = b"".join(line + b"\n" for line in edit(lines))
    assert edited != filled.read_bytes()
    filled.write_bytes(edited)
    ledger = Ledger(filled)
    for use in (ledger.entries, lambda: ledger.total(), lambda: spend(ledger)):
        with pytest.raises(PrivacyError, match=f"ledger .*ledger.jsonl, {message}"):
            use()
    with pytest.raises(PrivacyError, match=message):
        dpmmd.release(
            unreadable(), small_encoder(), **{**OPTIONS, "num_classes": None, "ledger": filled}
        )
    assert filled.read_bytes() == edited  # left as evidence


@pytest.mark.parametrize("keep", [-1, -2, -100, 10])
def test_a_cut_line_is_refused_with_the_remedy(filled: Path, keep: int) -> None:
    data = filled.read_bytes()
    filled.write_bytes(data[:keep])
    remedy = "Restore the ledger" if keep == 10 else "delete the incomplete line by hand"
    with pytest.raises(PrivacyError, match=f"incomplete.*{remedy}"):
        Ledger(filled).total()
    with pytest.raises(PrivacyError, match="incomplete"):
        spend(Ledger(filled))
    assert filled.read_bytes() == data[:keep]
    if keep > -100 and keep < 0:  # the remedy works
        filled.write_bytes(data[: data[:keep].rindex(b"\n") + 1])
        assert len(Ledger(filled).entries()) == 2


def test_other_files_are_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    with pytest.raises(PrivacyError, match="not a ledger, empty; nothing was changed"):
        spend(Ledger(empty))
    with pytest.raises(PrivacyError, match="not a file"):
        spend(Ledger(tmp_path))
    with pytest.raises(FileNotFoundError, match="no such file"):
        Ledger(tmp_path / "absent").entries()
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        spend(Ledger(tmp_path / "absent" / "ledger"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty"]


def npz(path: Path) -> None:
    np.savez(path.with_suffix(".npz"), x=np.zeros((9, 8, 8), np.uint8))
    path.with_suffix(".npz").rename(path)


@pytest.mark.parametrize(
    "write",
    [
        npz,
        lambda path: path.write_text("hello\nworld"),
        lambda path: path.write_text('{"a": 1}\n{"b"'),
        lambda path: path.write_bytes(b"\0" * 100),
        lambda path: path.touch(),
    ],
)
def test_a_file_that_is_no_ledger_is_left_alone(path: Path, write: Any) -> None:
    write(path)
    before = path.read_bytes()
    for use in (lambda: spend(Ledger(path)), Ledger(path).entries):
        with pytest.raises(PrivacyError, match=r"not a ledger.*nothing was changed") as raised:
            use()
        assert "by hand" not in str(raised.value)
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.parametrize("name", ["", ".", "a\0b", "x" * 300])
def test_a_name_that_no_ledger_can_have(name: str) -> None:
    with pytest.raises((PrivacyError, OSError), match=r"^ledger='.*--ledger FILE") as raised:
        dpmmd.release(unreadable(), small_encoder(), **{**OPTIONS, "ledger": name})
    assert name in ("", ".", "a\0b") or raised.type is OSError


def test_a_ledger_may_have_the_longest_name(tmp_path: Path) -> None:
    spend(Ledger(tmp_path / ("x" * 255)))


@pytest.mark.parametrize("there", [False, True])
def test_a_ledger_that_may_not_be_written(
    path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """Root may write everywhere, so the system's refusal is played."""
    if there:
        spend(Ledger(path))
    before = os.listdir(path.parent)
    real = os.open

    def refuse(name: Any, flags: int, *rest: Any, **more: Any) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied", f".{path.name}.temporary")
        return real(name, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(PermissionError, match=r"^ledger='.*Permission denied.*--ledger") as raised:
        dpmmd.release(unreadable(), small_encoder(), **{**OPTIONS, "ledger": path})
    assert "temporary" not in str(raised.value)
    assert os.listdir(path.parent) == before
    assert len(Ledger(path).entries() if there else []) == there


# ----------------------------------------------------------------------------- the report


def test_the_report_shows_the_total(path: Path) -> None:
    first = release(path)
    second = release(path, epsilon=2.0)
    spend(Ledger(path), open_source(images(40)).identity)  # one that did not complete
    f = facts(first, Ledger(path))["ledger"]
    mus = [calibrate(epsilon=e, delta=1e-6).mu for e in (1.0, 2.0, 1.0)]
    assert f["mu"]["replace-one"] == pytest.approx(accounting.compose(mus))
    assert f["epsilon"]["replace-one"] == pytest.approx(
        accounting.epsilon(mu=accounting.compose(mus), delta=1e-6)
    )
    assert f["mu"]["add-remove"] is None
    assert (f["releases"], f["incomplete"], f["delta"]) == (3, 1, 1e-6)
    assert facts(second, Ledger(path))["ledger"] == {**f, "entry": Ledger(path).entries()[1].hash}
    text = markdown(first, Ledger(path))
    for phrase in ("has this release", "3, 1 of them not completed but spent", "no guarantee: one"):
        assert phrase in text
    assert "ledger" not in facts(first)


def test_a_release_that_is_not_in_the_ledger(path: Path) -> None:
    released = release(path)
    other = release(path.with_name("other.jsonl"))
    with pytest.raises(PrivacyError, match=f"{other.metadata.array_sha256} is not in it"):
        facts(other, Ledger(path))
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:1]))  # whole lines cut off: the chain alone cannot tell
    with pytest.raises(PrivacyError, match="its line was removed"):
        facts(released, Ledger(path))


def test_a_release_file_that_says_otherwise(path: Path) -> None:
    released = release(path)
    for change in ({"mu": 0.1}, {"epsilon": 0.5}, {"private": False}, {"adjacency": "zero-out"}):
        (name,) = change
        edited = dpmmd.Release(
            released.sums, released.counts, released.metadata.model_copy(update=change)
        )
        with pytest.raises(PrivacyError, match=f"recorded this release with {name} = "):
            Ledger(path).entry_of(edited)
