"""Runs with modes: two releases with one total, each made once, and what comes of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dpmmd
from dpmmd import run as runs
from dpmmd.privacy import Ledger, Release, collecting
from dpmmd.privacy.composition import epsilon_of, together
from dpmmd.train import Mixture
from dpmmd.train.plan import PlanError, Target
from tests.cli.test_cli import Call, bars, call, files, refused
from tests.conftest import small_encoder

__all__ = ["call"]  # the fixture

pytest.importorskip("sklearn")

RECIPE = """
[data]
source = "{folder}/train.npz"
num_classes = 3

[release]
epsilon = 50.0
delta = 1e-3
adjacency = "replace-one"
pixel_moments = 8

[modes]
per_class = 2

[generator]
image_size = 8
base_channels = 4

[train]
steps = 3
batch_size = 12
checkpoint_every = 1

[sample]
num_images = 90
"""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """An encoder that needs no weights, and an alignment that is fitted to few images."""
    monkeypatch.setattr("dpmmd.encoders.load", lambda *_, **__: small_encoder())
    monkeypatch.setattr("dpmmd.encoders.from_spec", lambda _, **__: small_encoder())
    monkeypatch.setattr("dpmmd.run.samples._FITTED", 300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    x, y = bars(400, seed=240)
    x[np.random.default_rng(1).random(400) < 0.6, 0, :, 4:] += 120  # bright to the right, or not
    np.savez(tmp_path / "train.npz", x=x, y=y)
    (tmp_path / "mine.toml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def changed(folder: Path, **changes: str) -> Path:
    """The recipe with other lines."""
    text = (folder / "mine.toml").read_text()
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new)
    (folder / "mine.toml").write_text(text)
    return folder / "mine.toml"


def test_a_run_makes_two_releases_with_one_total(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = folder / "run"
    result = call("run", folder / "mine.toml", "--out", out, "--json")
    assert result.code == 0, result.err
    first, second = (
        Release.load(out / name) for name in ("moments.safetensors", "release.safetensors")
    )
    assert first.metadata.encoder is None
    assert first.pixels is not None
    assert second.pixels is None
    assert (second.num_classes, second.num_rows) == (3, 6)
    assert second.metadata.modes is not None
    assert second.metadata.modes.origin is not None
    assert second.metadata.modes.origin.array_sha256 == first.metadata.array_sha256

    # The recipe's epsilon is that of both, and every statement says so.
    mu = together(second.metadata)
    total = epsilon_of(mu, 1e-3)
    assert 50 * (1 - 1e-4) < total <= 50
    assert first.metadata.mu**2 == pytest.approx(0.5 * mu**2, rel=1e-3)
    privacy = result.json["privacy"]
    assert (privacy["epsilon"], privacy["mu"]) == (total, mu)
    assert [part["epsilon"] for part in privacy["releases"]] == [
        first.metadata.epsilon,
        second.metadata.epsilon,
    ]
    told = json.loads((out / "privacy.json").read_text())
    assert told["together"]["epsilon"] == total
    card = (out / "README.md").read_text()
    assert told["promise"] in card
    assert "aligned with released moments of pixels" in card
    assert "epsilon = 50 for both releases together" in result.err
    assert set(result.json["seconds"]) >= {"moments", "release", "train", "sample"}
    with np.load(out / "synthetic.npz") as synthetic:
        assert np.bincount(synthetic["y"]).tolist() == [30, 30, 30]
        assert "modes" not in synthetic

    before = {p: (out / p).read_bytes() for p in files(out) if (out / p).is_file()}
    monkeypatch.setattr("dpmmd.modes.along", None)  # on another machine its last bits may differ
    again = call("run", folder / "mine.toml", "--out", out, "--json")
    assert again.json == result.json
    for stage in ("moments", "release", "train", "sample"):
        assert f"{stage}: found" in again.err
    assert {p: (out / p).read_bytes() for p in before if p != "measured.json"} == {
        p: data for p, data in before.items() if p != "measured.json"
    }

    # What is drawn from the folder is the same set, aligned; modes come on request.
    draw = ["sample", out, "--num-images", 90, "--out"]
    assert call(*draw, folder / "a.npz", "--modes").code == 0
    modes = Mixture.of(second)
    assert modes is not None
    with np.load(folder / "a.npz") as drawn, np.load(out / "synthetic.npz") as synthetic:
        assert (drawn["x"] == synthetic["x"]).all()
        assert drawn["modes"].tolist() == modes.modes()[modes.drawn(90)].tolist()
    assert "`modes` is int64" in (folder / "a.md").read_text()
    refused(call(*draw, folder / "f", "--modes"), "a folder of PNGs has no place")
    assert not (folder / "f").exists()
    kept = folder / "kept"
    shutil.copytree(out / "checkpoints", kept / "checkpoints")
    shutil.copy(out / "release.safetensors", kept / "release.safetensors")
    told = call("sample", kept, "--num-images", 9, "--out", folder / "b.npz")
    assert "not aligned, since moments.safetensors" in told.err
    assert "aligned with released" not in (folder / "b.md").read_text()

    # Training by its own command takes the release, and not the moments.
    train = ["train", out / "release.safetensors", "--out", folder / "t", "--recipe"]
    assert call(*train, folder / "mine.toml", "--json").json["step"] == 3
    train[1] = out / "moments.safetensors"
    refused(call(*train, folder / "mine.toml"), "moments of pixels alone")


@pytest.mark.parametrize("stage", ["moments", "release", "train"])
def test_a_run_that_stops_goes_on_where_it_was(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    """What is released is not released again: the ledger has two spends, however often it stops."""
    ledger, out = folder / "ledger.jsonl", folder / "run"
    keys = f'ledger = "{ledger}"\nbudget = [50.0, 1e-3]\npartial_sums = "{folder}/sums"\n[modes]'
    recipe = changed(folder, ledger=("[modes]", keys))
    made = runs.releases.make_release

    def stopped(*arguments: Any, **options: Any) -> Release:
        if stage == "moments" or options["modes"] is not None:
            raise KeyboardInterrupt
        return made(*arguments, **options)

    def never(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if stage == "train":
            patch.setattr("dpmmd.train.train", never)
        else:
            patch.setattr(runs.releases, "make_release", stopped)
        assert call("run", recipe, "--out", out).code == 130
    kept = {p.name: p.read_bytes() for p in out.glob("*.safetensors")}
    assert len(kept) == ["moments", "release", "train"].index(stage)
    again = call("run", recipe, "--out", out)
    assert again.code == 0, again.err
    assert {name: (out / name).read_bytes() for name in kept} == kept
    for name in kept:
        assert f"{name.partition('.')[0]}: found" in again.err
    entries = Ledger(ledger).entries()
    assert [e.array_sha256 for e in entries] == [
        Release.load(out / f"{name}.safetensors").metadata.array_sha256
        for name in ("moments", "release")
    ]
    assert Ledger(ledger).total().epsilon(adjacency="replace-one", delta=1e-3) <= 50
    assert not (folder / "sums").exists()
    second = Release.load(out / "release.safetensors")
    rule = dpmmd.modes.fit(Release.load(out / "moments.safetensors"), 2)
    assert second.modes is not None
    assert second.modes.sha256 == rule.sha256


def test_a_failure_after_the_first_release_leaves_the_folder(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = runs.releases.make_release

    def fails(*arguments: Any, **options: Any) -> Release:
        if options["modes"] is not None:
            raise ValueError("no")
        return made(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(runs.releases, "make_release", fails)
        refused(call("run", folder / "mine.toml", "--out", folder / "run"), "no")
    assert (folder / "run" / "moments.safetensors").exists()
    assert (folder / "run" / "recipe.toml").exists()
    assert call("run", folder / "mine.toml", "--out", folder / "run").code == 0


def test_a_budget_must_hold_both_before_the_first_is_spent(call: Call, folder: Path) -> None:
    """Each of the two would fit."""
    ledger = folder / "ledger.jsonl"
    keys = f'ledger = "{ledger}"\nbudget = [49.0, 1e-3]\n[modes]'
    recipe = changed(folder, ledger=("[modes]", keys))
    refused(call("run", recipe, "--out", folder / "run"), "budget=(49, 0.001)", "No image was read")
    assert not ledger.exists()
    assert not (folder / "run").exists()


WRONG = {
    "one mode": (("per_class = 2", "per_class = 1"), "modes.per_class = 1"),
    "no power of two": (("per_class = 2", "per_class = 6"), "a power of two, such as 8"),
    "too many": (("per_class = 2", "per_class = 16"), "400 images, and a mode needs 30; at most 8"),
    "share": (("per_class = 2", "share = 1.0"), "modes.share = 1.0"),
    "unknown key": (("per_class = 2", "how = 'kmeans'"), "unknown key 'modes.how'"),
    "no moments": (("pixel_moments = 8", ""), "release.pixel_moments asks"),
    "no products": (("pixel_moments = 8", "pixel_moments = 8\nweights = {products = 0}"), "leaves"),
    "shared taps": (("pixel_moments = 8", "pixel_moments = 8\nshared_taps = 1"), "use one of the"),
    "no pairs": (("batch_size = 12", "batch_size = 1\nestimator = 'unbiased'"), "takes pairs"),
    "too few values": (
        ("pixel_moments = 8\n\n[modes]\nper_class = 2",
         "pixel_moments = 1\n\n[modes]\nper_class = 4"),
        "1 x 1 (release.pixel_moments) have directions for 2",
    ),
    "private number": (
        ('"replace-one"\npixel_moments = 8\n\n[modes]\nper_class = 2',
         '"add-remove"\npixel_moments = 8\n\n[modes]'),
        "modes.per_class is missing",
    ),
    "unknown weight": (("pixel_moments = 8", "pixel_moments = 8\nweights = {phi3 = 0.5}"), "phi3"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "phrase"), WRONG.values(), ids=WRONG)
def test_wrong_recipes_spend_nothing(
    call: Call,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: tuple[str, str],
    phrase: str,
) -> None:
    def spent(*_: Any, **__: Any) -> None:
        raise AssertionError("private data were released")

    monkeypatch.setattr(runs.releases, "make_release", spent)
    recipe, before = changed(folder, change=change), files(folder)
    refused(call("run", recipe, "--out", folder / "run"), phrase)
    assert files(folder) == before


def test_a_folder_with_other_releases_is_refused(call: Call, folder: Path) -> None:
    out = folder / "run"
    assert call("run", folder / "mine.toml", "--out", out).code == 0
    first = (out / "moments.safetensors").read_bytes()
    (out / "moments.safetensors").unlink()
    refused(call("run", folder / "mine.toml", "--out", out), "is not there", "restore it")
    shutil.copy(out / "release.safetensors", out / "moments.safetensors")
    refused(call("run", folder / "mine.toml", "--out", out), "moments.safetensors: made with")
    other = dpmmd.release(
        folder / "train.npz",
        None,
        epsilon=20.0,
        delta=1e-3,
        adjacency="replace-one",
        num_classes=3,
        pixel_moments=8,
        progress=False,
    )
    other.save(out / "moments.safetensors", overwrite=True)
    refused(call("run", folder / "mine.toml", "--out", out), "moments.safetensors: made with eps")
    (out / "moments.safetensors").write_bytes(first)
    assert call("run", folder / "mine.toml", "--out", out).code == 0


@pytest.mark.parametrize("epsilon", [0.5, 50.0])
def test_the_public_rule_says_how_many(call: Call, folder: Path, epsilon: float) -> None:
    """For little epsilon none: then one release with moments of pixels is made."""
    recipe = changed(
        folder, rule=("per_class = 2\n", ""), e=("epsilon = 50.0", f"epsilon = {epsilon}")
    )
    out = folder / "run"
    result = call("run", recipe, "--out", out)
    assert result.code == 0, result.err
    second = Release.load(out / "release.safetensors")
    if epsilon > 1:
        assert second.modes is not None
        assert second.modes.per_class == 4  # of 133 images, and at least 30 in each
        assert "modes: 4 a class" in result.err
    else:
        assert second.modes is None
        assert second.pixels is not None
        assert second.metadata.epsilon == epsilon
        assert not (out / "moments.safetensors").exists()
        assert "modes: none, by the public rule" in result.err
    (out / "report.json").unlink()
    assert call("run", recipe, "--out", out).code == 0  # and says the same again
    if epsilon < 1:
        refused(call("sample", out, "--out", folder / "s.npz", "--modes"), "without modes")


@pytest.mark.parametrize("made", ["moments", "release"])
def test_a_rule_that_changes_makes_no_third_release(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch, made: str
) -> None:
    """Another version may say none where moments were released: both keep to the recipe."""
    recipe, out = changed(folder, rule=("per_class = 2\n", "")), folder / "run"
    assert call("run", recipe, "--out", out).code == 0
    for name in ("report.json", *(("release.safetensors",) if made == "moments" else ())):
        (out / name).unlink()
    if made == "moments":
        shutil.rmtree(out / "checkpoints")
        (out / "synthetic.npz").unlink()
    monkeypatch.setattr("dpmmd.modes.NOISE", 1e-9)
    result = call("run", recipe, "--out", out)
    assert result.code == 0, result.err
    second = Release.load(out / "release.safetensors")
    assert second.metadata.per_class == (2 if made == "moments" else 4)
    assert epsilon_of(together(second.metadata), 1e-3) <= 50


def test_where_noise_makes_classes_small_there_are_fewer_modes(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first release is spent: it is not a reason to give up."""
    monkeypatch.setattr(Release, "class_counts", property(lambda _: torch.tensor([70.0, 80, 90])))
    recipe = changed(folder, more=("per_class = 2", "per_class = 4"))
    for _ in range(2):
        result = call("run", recipe, "--out", folder / "run")
        assert result.code == 0, result.err
        assert "modes: 2 a class, not 4" in result.err
    assert Release.load(folder / "run" / "release.safetensors").metadata.per_class == 2


@pytest.mark.parametrize("adjacency", ["replace-one", "add-remove"])
def test_a_first_release_that_has_no_classes_is_gone_on_from(
    call: Call, folder: Path, adjacency: str
) -> None:
    """Noise, or a private number of images, may leave none that are as large as two modes."""
    if adjacency == "add-remove":
        empty = np.zeros((0, 1, 8, 8), np.uint8), np.zeros(0, np.int64)
        np.savez(folder / "train.npz", x=empty[0], y=empty[1])
    recipe = changed(
        folder, of=('"replace-one"', f'"{adjacency}"'), e=("epsilon = 50.0", "epsilon = 0.01")
    )
    result = call("run", recipe, "--out", folder / "run")
    assert result.code == 0, result.err
    second = Release.load(folder / "run" / "release.safetensors")
    assert epsilon_of(together(second.metadata), 1e-3) == pytest.approx(0.01, rel=1e-3)
    assert second.num_rows == 3


@pytest.mark.parametrize("which", [1, 2])
def test_partial_sums_go_on_within_the_budget_of_both(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch, which: int
) -> None:
    """What was spent for the sums that are there is not asked for again."""
    ledger, out, sums = folder / "ledger.jsonl", folder / "run", folder / "sums"
    keys = f'ledger = "{ledger}"\nbudget = [50.0, 1e-3]\npartial_sums = "{sums}"\nbatch_size = 40'
    recipe = changed(folder, ledger=("[modes]", f"{keys}\n[modes]"))
    read, batches = collecting.harmless, 0

    def stops(*arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 10 * (which - 1) + 3:
            raise KeyboardInterrupt
        return read(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(collecting, "harmless", stops)
        assert call("run", recipe, "--out", out).code == 130
    assert len(list(sums.iterdir())) == 1
    again = call("run", recipe, "--out", out)
    assert again.code == 0, again.err
    assert [e.array_sha256 is not None for e in Ledger(ledger).entries()] == [True, True]


def test_what_was_trained_on_is_not_released_again(call: Call, folder: Path) -> None:
    out, ledger = folder / "run", folder / "ledger.jsonl"
    recipe = changed(folder, ledger=("[modes]", f'ledger = "{ledger}"\n[modes]'))
    assert call("run", recipe, "--out", out).code == 0
    (out / "release.safetensors").unlink()
    refused(call("run", recipe, "--out", out), "is not there", "restore it")
    (out / "moments.safetensors").unlink()
    refused(call("run", recipe, "--out", out), "is not there", "restore it")
    assert len(Ledger(ledger).entries()) == 2


def test_weights_of_no_encoder_are_refused(call: Call, folder: Path) -> None:
    out = folder / "r.safetensors"
    result = call(
        *("release", folder / "train.npz", "--epsilon", 1, "--delta", 1e-3, "--encoder", "none"),
        *("--adjacency", "replace-one", "--pixel-moments", 8, "--weights", "w.pt", "--out", out),
    )
    refused(result, "there are none with --encoder none")
    assert not out.exists()


def test_a_release_without_modes_is_refused_before_moments_are_released(
    call: Call, folder: Path
) -> None:
    out = folder / "run"
    assert call("run", folder / "mine.toml", "--out", out).code == 0
    for name in ("moments", "release"):
        (out / f"{name}.safetensors").unlink()
    options: dict[str, Any] = {"epsilon": 50.0, "delta": 1e-3, "adjacency": "replace-one"}
    other = dpmmd.release(folder / "train.npz", small_encoder(), num_classes=3, **options)
    other.save(out / "release.safetensors")
    refused(call("run", folder / "mine.toml", "--out", out), "made without modes")
    assert not (out / "moments.safetensors").exists()


def test_the_public_rule_knows_how_many_directions_there_are(call: Call, folder: Path) -> None:
    recipe = changed(
        folder, rule=("per_class = 2\n", ""), side=("pixel_moments = 8", "pixel_moments = 1")
    )
    result = call("run", recipe, "--out", folder / "run")
    assert result.code == 0, result.err
    assert "modes: 2 a class" in result.err


def test_a_release_with_moments_of_its_own_is_aligned_with_them(call: Call, folder: Path) -> None:
    """And it is said so."""
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    release = ["release", folder / "train.npz", "--epsilon", 20, "--delta", 1e-3, "--num-classes"]
    release += [3, "--adjacency", "replace-one", "--pixel-moments", 8, "--out"]
    assert call(*release, first, "--encoder", "none").code == 0
    assert call(*release, second, "--modes", first, "--per-class", 2).code == 0
    train = ["train", second, "--out", folder / "t", "--recipe", folder / "mine.toml"]
    assert call(*train).code == 0
    result = call(
        "sample", folder / "t", "--release", second, "--num-images", 9, "--out", folder / "s.npz"
    )
    assert result.code == 0, result.err
    assert "not aligned" not in result.err
    assert "aligned with released moments" in (folder / "s.md").read_text()


def test_an_encoder_that_fails_does_so_before_the_first_release(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise ValueError("no such layer")

    monkeypatch.setattr("dpmmd.encoders.base.Encoder.forward", fails)
    refused(call("run", folder / "mine.toml", "--out", folder / "run"), "no such layer")
    assert not (folder / "run").exists()


def test_blocks_get_their_weights(call: Call, folder: Path) -> None:
    weights = "pixel_moments = 8\nweights = {pixels = 0.5, counts = 0.2, phi1 = 0.9}"
    recipe = changed(folder, weights=("pixel_moments = 8", weights))
    assert call("run", recipe, "--out", folder / "run").code == 0
    first, second = (
        {b.name: b.bound for b in Release.load(folder / "run" / name).metadata.blocks}
        for name in ("moments.safetensors", "release.safetensors")
    )
    assert first == pytest.approx({"pixels": 0.5, "products": 0.7, "counts": 0.2})
    assert second == pytest.approx({"phi1": 0.9, "counts": 0.2})


def test_without_noise_nothing_is_private(call: Call, folder: Path) -> None:
    out = folder / "run"
    result = call("run", folder / "mine.toml", "--out", out, "--epsilon", "inf", "--json")
    assert result.code == 0, result.err
    assert result.err.count("NO NOISE: NOT PRIVATE") == 2
    assert (out / "NOT_PRIVATE").exists()
    privacy = result.json["privacy"]
    assert (privacy["epsilon"], privacy["mu"]) == (None, None)
    assert [part["epsilon"] for part in privacy["releases"]] == [None, None]
    assert call("run", folder / "mine.toml", "--out", out, "--epsilon", "inf").code == 0


def test_modes_are_not_asked_for_where_there_are_none(call: Call, folder: Path) -> None:
    recipe = changed(
        folder, no=("[modes]\nper_class = 2\n", ""), ask=("= 90", "= 90\nmodes = true")
    )
    refused(call("run", recipe, "--out", folder / "run"), "none without a section [modes]")
    assert not (folder / "run").exists()


def test_modes_are_written_where_the_recipe_asks(call: Call, folder: Path) -> None:
    recipe = changed(folder, ask=("num_images = 90", "num_images = 90\nmodes = true"))
    assert call("run", recipe, "--out", folder / "run").code == 0
    with np.load(folder / "run" / "synthetic.npz") as synthetic:
        assert set(synthetic["modes"].tolist()) == {0, 1}


def test_a_memory_plan_counts_rows_and_is_made_before_anything_is_spent(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(_: str, __: Any, generator: Any, target: Target, ___: Any, *, held: int) -> Any:
        seen.append((generator.num_classes, target.num_classes, target.modes, held))
        raise PlanError("too little")

    seen: list[tuple[int, int, bool, int]] = []
    monkeypatch.setattr("dpmmd.train.plan.make", made)
    recipe = changed(folder, memory=("steps = 3", 'steps = 3\nmemory = "1MiB"'))
    refused(call("run", recipe, "--out", folder / "run"), "too little")
    assert not (folder / "run").exists()
    call("plan", changed(folder, size=("num_classes", "image_size = 8\nnum_classes")))
    features = 2 * 6 * small_encoder().dim  # as released, and merged
    assert seen == [
        (6, 6, True, 4 * (features + (3 + 65) * 65)),
        (6, 6, True, 4 * (features + (3 + 193) * 193)),  # it is not known that images are grey
    ]
