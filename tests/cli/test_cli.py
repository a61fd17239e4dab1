"""The command line and whole runs: what is printed where, exit codes, resumption, refusals."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import typer.main
from PIL import Image

import dpmmd
from dpmmd import cli
from dpmmd import run as runs
from dpmmd import train as training
from dpmmd.devices import choose_device
from dpmmd.privacy import Release
from dpmmd.privacy.printed import up
from dpmmd.train.step import Stepper

pytest.importorskip("sklearn")

SECONDS = {"release", "train", "sample", "evaluate"}
RUN_FILES = {
    "recipe.toml",
    "release.safetensors",
    "privacy.json",
    "checkpoints",
    "checkpoints/last.pt",
    "samples.png",
    "synthetic.npz",
    "README.md",
    "report.json",
    "measured.json",
}
RECIPE = """
[data]
source = "{folder}/train.npz"
test_source = "{folder}/test.npz"
num_classes = 3

[encoder]
image_size = 16
taps = ["conv1", "fire2", "fire3"]

[release]
epsilon = 5.0
delta = 1e-3
adjacency = "replace-one"

[generator]
image_size = 8
base_channels = 4

[train]
steps = 6
batch_size = 12
checkpoint_every = 2

[sample]
num_images = 90

[evaluate]
"""


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """The one JSON object on standard output, and nothing but it."""
        assert self.out.count("\n") == 1, self.out
        return json.loads(self.out)


Call = Callable[..., Result]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    """Runs the entry point in this process, with its error handling and exit code."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["dpmmd", *map(str, arguments)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as error:
            code = int(error.code or 0)
        return Result(code, *capfd.readouterr())

    return run


def bars(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 120, (n, 1, 8, 8), dtype=np.uint8)
    y = np.arange(n, dtype=np.int64) % 3
    for i, k in enumerate(y):
        x[i, 0, 3 * k : 3 * k + 2] += 100
    return x, y


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Private and test images, and a recipe for them."""
    for name, n in (("train", 240), ("test", 60)):
        x, y = bars(n, seed=n)
        np.savez(tmp_path / f"{name}.npz", x=x, y=y)
    (tmp_path / "mine.toml").write_text(RECIPE.format(folder=tmp_path))
    return tmp_path


def release_arguments(folder: Path, **changes: object) -> list[object]:
    options = {
        "out": folder / "r.safetensors",
        "epsilon": 5,
        "delta": 1e-3,
        "adjacency": "replace-one",
        "num-classes": 3,
        **{key.replace("_", "-"): value for key, value in changes.items()},
    }
    source = options.pop("source", folder / "train.npz")
    given = [(f"--{key}", value) for key, value in options.items() if value is not None]
    return ["release", source, *(part for pair in given for part in pair)]


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*")}


def refused(result: Result, *phrases: str) -> None:
    """Exit code 2, nothing on standard output, one line that says what is wrong."""
    assert result.code == 2, result
    assert result.out == ""
    text = result.err.strip()
    last = text.splitlines()[-1]
    assert last.startswith("error: "), text
    assert "Traceback" not in text
    for phrase in phrases:
        assert phrase in last


# ----------------------------------------------------------------------------- calibrate


def test_calibrate(call: Call) -> None:
    result = call("calibrate", "--epsilon", 1, "--delta", 1e-6, "--json").json
    assert result["sd_over_sensitivity"] == pytest.approx(4.2246788893268, rel=1e-8)
    assert result["mu"] == pytest.approx(1 / 4.2246788893268, rel=1e-8)
    assert set(result) == {"epsilon", "delta", "mu", "sd_over_sensitivity"}


def test_calibrate_and_back(call: Call) -> None:
    there = call("calibrate", "--epsilon", 1, "--delta", 1e-6, "--json").json
    by_mu = call("calibrate", "--mu", there["mu"], "--delta", 1e-6, "--json").json
    assert by_mu["epsilon"] == pytest.approx(1.0, rel=1e-6)
    by_sd = call("calibrate", "--sd", there["sd_over_sensitivity"], "--epsilon", 1, "--json").json
    assert by_sd["delta"] == pytest.approx(1e-6, rel=1e-5)
    assert by_sd["mu"] == pytest.approx(there["mu"], rel=1e-9)


@pytest.mark.parametrize(
    ("adjacency", "signed", "nonnegative"),
    [("replace-one", 2.0, 2**0.5), ("zero-out", 1.0, 1.0), ("add-remove", 1.0, 1.0)],
)
def test_calibrate_with_an_adjacency(
    call: Call, adjacency: str, signed: float, nonnegative: float
) -> None:
    result = call(
        "calibrate", "--epsilon", 1, "--delta", 1e-6, "--adjacency", adjacency, "--json"
    ).json
    assert result["sensitivity_signed"] == pytest.approx(signed)
    assert result["sensitivity_nonnegative"] == pytest.approx(nonnegative)
    assert result["sd_nonnegative"] == pytest.approx(4.2246788893268 * nonnegative, rel=1e-8)


def test_calibrate_prints_a_table(call: Call) -> None:
    result = call("calibrate", "--epsilon", 1, "--delta", 1e-6)
    assert result.code == 0
    assert "4.22467889 " in result.out
    assert result.err == ""


@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        ([], "exactly two of"),
        (["--epsilon", 1], "exactly two of"),
        (["--epsilon", 1, "--delta", 1e-6, "--mu", 1], "exactly two of"),
        (["--mu", 1, "--sd", 1], "give one of them"),
        (["--sd", 0, "--delta", 1e-6], "--sd 0.0"),
        (["--mu", -1, "--delta", 1e-6], "mu=-1.0"),
        (["--epsilon", 0, "--delta", 1e-6], "epsilon=0.0"),
        (["--epsilon", 1, "--delta", 1], "delta=1.0"),
        (["--epsilon", "nan", "--delta", 1e-6], "epsilon=nan"),
    ],
)
def test_calibrate_refuses(call: Call, arguments: list[object], phrase: str) -> None:
    refused(call("calibrate", *arguments), phrase)


# ----------------------------------------------------------------------------- the four stages


def test_release_train_sample_evaluate_privacy(call: Call, folder: Path) -> None:
    """With the whole encoder at its default size, each stage by its own command."""
    released = call(*release_arguments(folder), "--json")
    assert released.code == 0
    assert "release" in released.err
    facts = released.json
    assert (facts["epsilon"], facts["delta"]) == (5.0, 1e-3)
    path = folder / "r.safetensors"
    assert facts["out"] == str(path)

    told = call("privacy", path, "--json")
    assert told.err == ""
    assert told.json == {key: value for key, value in facts.items() if key != "out"}
    assert "replace-one" in call("privacy", path).out
    assert call("privacy", path, "--markdown").out == Release.load(path).report()

    train = ["train", path, "--out", folder / "t", "--recipe", folder / "mine.toml"]
    trained = call(*train, "--steps", 3, "--json")
    assert trained.json["step"] == 3
    assert trained.json["private"] is True
    assert "3/3" in trained.err
    assert trained.err.startswith("precision: encoder float32")
    refused(call(*train, "--steps", 4), "steps = 3, now 4")

    sampled = call("sample", folder / "t", "--out", folder / "s.npz", "--num-images", 60, "--json")
    assert sampled.json["num_images"] == 60
    with np.load(folder / "s.npz") as synthetic:
        assert synthetic["x"].shape == (60, 1, 8, 8)
        assert synthetic["x"].dtype == np.uint8
        assert np.bincount(synthetic["y"]).tolist() == [20, 20, 20]
    with Image.open(sampled.json["picture"]) as picture:
        assert picture.size == (2 * 10 * 8, 2 * 3 * 8)  # ten columns, a row for each class

    other = ["--out", folder / "warm.npz", "--num-images", 60, "--temperature", 2]
    call("sample", folder / "t", *other)
    with np.load(folder / "warm.npz") as warm, np.load(folder / "s.npz") as synthetic:
        assert (warm["x"] != synthetic["x"]).any()

    assert sampled.json["card"] is None  # `train` keeps no release in its folder
    for name, options in (("f", []), ("p.parquet", []), ("b.npz", ["--format", "npz-float"])):
        command = ["sample", folder / "t", "--out", folder / name, "--num-images", 30, *options]
        told = call(*command, "--release", path, "--json").json
        assert told["format"] == (options or {"f": ["folder"], "p.parquet": ["parquet"]}[name])[-1]
        assert len(dpmmd.data.open_source(folder / name).arrays()[0]) == 30
        assert "(5, 0.001)-differentially private" in Path(told["card"]).read_text()
        refused(call(*command), "exists")

    evaluated = call(
        "evaluate", folder / "train.npz", "--test", folder / "test.npz", "--real",
        folder / "s.npz", "--num-classes", 3, "--classifiers", "logistic_regression, cnn", "--json",
    )  # fmt: skip
    assert evaluated.json["metrics"] == {}
    accuracy = evaluated.json["accuracy"]
    assert set(accuracy) == {"logistic_regression", "cnn"}
    assert accuracy["logistic_regression"]["synthetic"] > 0.9 > accuracy["cnn"]["real"]
    assert "not covered" in evaluated.json["accuracy_note"]
    assert {p for p in files(folder) if "tmp" in p or Path(p).name.startswith(".")} == set()


def test_releases_of_a_ledger_compose_and_keep_to_the_budget(call: Call, folder: Path) -> None:
    ledger = folder / "ledger.jsonl"
    budget = ["--ledger", ledger, "--budget-epsilon", 8, "--budget-delta", 1e-3, "--quiet"]
    first = call(*release_arguments(folder), *budget, "--json").json
    assert first["ledger"]["epsilon"]["replace-one"] == pytest.approx(5.0, rel=1e-6)
    second = call(*release_arguments(folder, out=folder / "2.safetensors"), *budget)
    assert second.code == 0
    assert "releases together" in second.out
    before = files(folder), ledger.read_bytes()
    third = call(*release_arguments(folder, out=folder / "3.safetensors"), *budget)
    refused(third, "budget=(8, 0.001)", "2 earlier releases", "at most epsilon = ")
    assert (files(folder), ledger.read_bytes()) == before

    told = call("privacy", folder / "r.safetensors", "--ledger", ledger, "--json").json["ledger"]
    assert told["releases"] == 2
    assert told["mu"]["replace-one"] == pytest.approx(2**0.5 * first["mu"])
    assert 5 < told["epsilon"]["replace-one"] < 8
    table = call("privacy", folder / "r.safetensors", "--ledger", ledger, "--markdown").out
    shown = up(told["mu"]["replace-one"])
    assert f"| all of them, replace-one | mu = {shown}, epsilon = " in table

    ledger.write_bytes(ledger.read_bytes().replace(b'"epsilon":5.0', b'"epsilon":0.1', 1))
    refused(call("privacy", folder / "r.safetensors", "--ledger", ledger), "line 2: has hash")
    refused(call(*release_arguments(folder, out=folder / "4"), *budget), "line 2: has hash")
    refused(call("privacy", folder / "r.safetensors", "--ledger", folder / "none"), "no such file")


def test_budgets_are_given_whole(call: Call, folder: Path) -> None:
    before = files(folder)
    refused(call(*release_arguments(folder), "--budget-epsilon", 1), "--budget-delta")
    both = ["--budget-epsilon", 1, "--budget-delta", 1e-3]
    refused(call(*release_arguments(folder), *both), "needs ledger=FILE (--ledger FILE)")
    named = release_arguments(folder, population="ward 3")
    refused(call(*named), "population='ward 3': needs ledger=FILE (--ledger FILE)")
    assert files(folder) == before


def test_a_size_of_the_encoder_is_refused_by_its_option(call: Call, folder: Path) -> None:
    for size in (0, 1):
        refused(call(*release_arguments(folder, encoder_size=size)), "--encoder-size")


def test_a_release_that_is_lost_is_said_to_be(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dpmmd.privacy.release_file.write_atomically", full)
    result = call(*release_arguments(folder))
    assert result.code == 2
    assert "No space left on device). The budget of this release was spent" in result.err
    assert "lost: the release itself" in result.err.splitlines()[-1]


def test_quiet_is_quiet(call: Call, folder: Path) -> None:
    assert call(*release_arguments(folder, encoder_size=32), "--quiet", "--json").err == ""
    assert call("run", folder / "mine.toml", "--out", folder / "run", "-q", "--json").err == ""


def test_the_card_is_that_of_the_release_trained_on(call: Call, folder: Path) -> None:
    out = folder / "run"
    assert call("run", folder / "mine.toml", "--out", out, "--quiet").code == 0
    assert "(5, 0.001)-differentially private" in (out / "README.md").read_text()
    sampled = call("sample", out, "--out", folder / "s.npz", "--num-images", 9)
    assert str(folder / "s.md") in sampled.err
    assert "# 9 synthetic images" in (folder / "s.md").read_text()
    other = call(*release_arguments(folder, out=folder / "other.safetensors"), "--json")
    command = ["sample", out, "--out", folder / "t.npz", "--release", other.json["out"]]
    refused(call(*command), "other.safetensors: is not the release")
    assert not (folder / "t.npz").exists()


@pytest.mark.parametrize("command", ["sample", "release"])
def test_a_finished_output_is_kept(call: Call, folder: Path, command: str) -> None:
    if command == "release":
        (folder / "r.safetensors").write_text("mine")
        refused(call(*release_arguments(folder)), "r.safetensors exists", "another name")
        assert (folder / "r.safetensors").read_text() == "mine"
        return
    for name in ("s.npz", "s.png"):  # the picture goes beside the set
        (folder / name).write_text("mine")
        refused(call("sample", folder, "--out", folder / "s.npz"), f"{name} exists")
        assert (folder / name).read_text() == "mine"
        (folder / name).unlink()


# ----------------------------------------------------------------------------- run


def test_run_and_run_again(call: Call, folder: Path) -> None:
    out = folder / "deep" / "run"
    first = call("run", folder / "mine.toml", "--out", out, "--json")
    assert first.code == 0
    assert first.err.startswith("precision: encoder float32")
    report = first.json
    assert set(report["accuracy"]) == {"logistic_regression", "mlp", "cnn"}
    for both in report["accuracy"].values():
        assert set(both) == {"synthetic", "real"}
        assert all(0 <= value <= 1 for value in both.values())
    assert report["accuracy"]["logistic_regression"]["real"] > 0.9
    assert set(report["seconds"]) == SECONDS
    assert 2**26 < report["peak_rss_bytes"] < 2**34
    assert report["private"] is True
    assert report["privacy"]["epsilon"] == 5.0
    assert {p for p in files(out) if not p.startswith("tensorboard")} == RUN_FILES
    assert json.loads((out / "report.json").read_text()) | {"out": str(out)} == report
    facts = json.loads((out / "privacy.json").read_text())
    assert facts["adjacency"] == "replace-one"
    with np.load(out / "synthetic.npz") as synthetic:
        assert synthetic["x"].shape == (90, 1, 8, 8)

    before = {p: (out / p).read_bytes() for p in RUN_FILES if (out / p).is_file()}
    again = call("run", folder / "mine.toml", "--out", out, "--json")
    assert again.json == report
    for stage in ("release", "train", "sample", "evaluate"):
        assert f"{stage}: found" in again.err
    assert "no further privacy is spent" in again.err
    assert {p: (out / p).read_bytes() for p in before} | {"measured.json": b""} == before | {
        "measured.json": b""
    }

    # What is missing is made from what is there, without releasing again.
    (out / "report.json").unlink()
    (out / "synthetic.npz").unlink()
    (folder / "train.npz").rename(folder / "moved.npz")
    third = call("run", folder / "mine.toml", "--out", out)
    refused(third, "train.npz")  # evaluation wants the real images
    assert (out / "synthetic.npz").read_bytes() == before["synthetic.npz"]
    assert (out / "release.safetensors").read_bytes() == before["release.safetensors"]
    (folder / "moved.npz").rename(folder / "train.npz")

    table = call("run", folder / "mine.toml", "--out", out)
    assert "logistic regression" in table.out
    assert "not covered by (epsilon, delta)" in table.err
    assert str(out / "synthetic.npz") in table.err


def test_a_run_with_changes_says_so_in_its_recipe(call: Call, folder: Path) -> None:
    out = folder / "run"
    command = [
        "run",
        folder / "mine.toml",
        "--out",
        out,
        "--epsilon",
        0.5,
        "--set",
        "train.steps=3",
    ]
    assert call(*command, "--set", "train.betas=[0.4, 0.9]").code == 0
    kept = dpmmd.recipe.read(out / "recipe.toml")[0]
    assert (kept.release.epsilon, kept.train.steps, kept.train.betas) == (0.5, 3, (0.4, 0.9))
    assert Release.load(out / "release.safetensors").metadata.epsilon == 0.5
    again = call("run", out / "recipe.toml", "--out", out)  # the folder's recipe is the whole of it
    assert again.code == 0
    assert "no further privacy is spent" in again.err
    refused(call("run", folder / "mine.toml", "--out", out), "another recipe")
    for bad in ("train.step=3", "train", "release.epsilon=-1"):
        refused(call(*command[:3], folder / "new", "--set", bad), bad.partition("=")[0])
    assert not (folder / "new").exists()


def test_training_takes_keys_of_its_recipe_anew(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def train(*_: object, **options: Any) -> None:
        seen.update(options)
        raise ValueError("seen")

    monkeypatch.setattr(training, "train", train)
    assert call(*release_arguments(folder)).code == 0
    command = ["train", folder / "r.safetensors", "--recipe", folder / "mine.toml", "--out", "t"]
    changes = ["--set", "train.memory=8GiB", "--set", "generator.base_channels=5"]
    refused(call(*command, *changes, "--set", "train.steps=2", "--steps", 3), "seen")
    assert (seen["settings"].memory, seen["settings"].batch_size) == ("8GiB", 12)
    assert seen["settings"].steps == 3  # an option of its own counts more
    assert seen["generator_settings"].base_channels == 5
    seen.clear()
    for bad in ("train.step=3", "train", "release.epsilon=2", "encoder.image_size=8"):
        refused(call(*command, "--set", bad), bad.partition("=")[0])
    assert not seen


def test_images_are_aligned_with_released_moments(call: Call, folder: Path) -> None:
    out = folder / "run"
    command = ["run", folder / "mine.toml", "--set", "release.pixel_moments=8", "--epsilon", "inf"]
    assert call(*command, "--out", out).code == 0
    blocks = json.loads((out / "privacy.json").read_text())["blocks"]
    assert [b["name"] for b in blocks] == ["phi1", "pixels", "products", "counts"]
    assert "aligned with released moments of pixels" in (out / "README.md").read_text()

    # The command line draws the same set, given the release; without it, images as generated.
    draw = ["sample", out, "--num-images", 90, "--out"]
    assert call(*draw, folder / "a.npz").code == 0
    (folder / "t").mkdir()
    shutil.copytree(out / "checkpoints", folder / "t" / "checkpoints")
    draw[1] = folder / "t"
    told = call(*draw, folder / "b.npz")
    assert "not aligned" in told.err
    x = {name: np.load(folder / f"{name}.npz")["x"].astype(float) for name in "ab"}
    assert (x["a"] == np.load(out / "synthetic.npz")["x"]).all()
    real, y = bars(240, seed=240)
    distances = {
        name: sum(
            np.linalg.norm(made[np.arange(90) % 3 == k].mean(0) - real[y == k].mean(0))
            for k in range(3)
        )
        for name, made in x.items()
    }
    assert distances["a"] < 0.2 * distances["b"]  # six steps of training bring little

    refused(call(*command, "--out", folder / "c", "--set", "release.pixel_moments=56"), "1 to 55")
    refused(
        call(*command, "--out", folder / "c", "--set", "generator.channels=3"),
        "release.pixel_moments",
        "alignment needs them equal",
    )
    assert not (folder / "c" / "release.safetensors").exists()
    text = (out / "recipe.toml").read_text()
    (out / "recipe.toml").write_text(text.replace("pixel_moments = 8", "pixel_moments = 4"))
    again = call("run", out / "recipe.toml", "--out", out)
    refused(again, "made with pixel_moments = 8, the recipe asks for 4")
    released = call(*release_arguments(folder, pixel_moments=5), "--json").json
    assert [b["name"] for b in released["blocks"]] == ["phi1", "pixels", "products", "counts"]


def test_an_infinite_epsilon_is_not_private(call: Call, folder: Path) -> None:
    out = folder / "run"
    result = call("run", folder / "mine.toml", "--out", out, "--epsilon", "inf")
    assert result.code == 0
    assert "NO NOISE: NOT PRIVATE" in result.err
    assert result.err.count("NOT PRIVATE") >= 2
    assert (out / "NOT_PRIVATE").exists()
    assert "NOT PRIVATE" in call("privacy", out / "release.safetensors").out


def test_a_run_spends_once(call: Call, folder: Path) -> None:
    ledger = folder / "ledger.jsonl"
    text = (folder / "mine.toml").read_text().replace("[evaluate]", "")
    keys = f'ledger = "{ledger}"\nbudget = [6.0, 1e-3]\n[generator]'
    (folder / "mine.toml").write_text(text.replace("[generator]", keys))
    command = ["run", folder / "mine.toml", "--out"]
    assert call(*command, folder / "run").code == 0
    before = ledger.read_bytes()
    (folder / "run" / "report.json").unlink()
    again = call(*command, folder / "run")
    assert again.code == 0
    assert "no further privacy is spent" in again.err
    assert ledger.read_bytes() == before
    refused(call(*command, folder / "other"), "budget=(6, 0.001)", "1 earlier release")
    assert not (folder / "other").exists()
    assert ledger.read_bytes() == before


def test_an_interrupted_run_resumes_to_the_same_set(
    call: Call, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, advance = folder / "run", Stepper.advance
    text = (folder / "mine.toml").read_text().replace("[evaluate]", "")
    (folder / "mine.toml").write_text(text)

    def interrupted(self: Any, *arguments: Any) -> Any:
        if self.state.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return advance(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "advance", interrupted)
        result = call("run", folder / "mine.toml", "--out", out, "--json")
    assert result.code == 130
    assert result.out == ""
    assert "interrupted; run the same command again" in result.err
    assert "Traceback" not in result.err
    released = (out / "release.safetensors").read_bytes()

    resumed = call("run", folder / "mine.toml", "--out", out, "--json")
    assert "release: found" in resumed.err
    assert "train: resumes at step 3 of 6" in resumed.err
    assert resumed.json["accuracy"] == {}
    assert (out / "release.safetensors").read_bytes() == released

    whole = folder / "whole"
    whole.mkdir()
    for name in ("recipe.toml", "release.safetensors"):
        (whole / name).write_bytes((out / name).read_bytes())
    assert call("run", folder / "mine.toml", "--out", whole).code == 0
    assert (whole / "synthetic.npz").read_bytes() == (out / "synthetic.npz").read_bytes()
    assert (whole / "samples.png").read_bytes() == (out / "samples.png").read_bytes()


def test_a_folder_of_another_recipe_is_refused(call: Call, folder: Path) -> None:
    out = folder / "run"
    out.mkdir()
    (out / "recipe.toml").write_text(RECIPE.format(folder=folder).replace("5.0", "4.0"))
    before = files(folder)
    refused(
        call("run", folder / "mine.toml", "--out", out), "another recipe", "another folder", "--out"
    )
    other = folder / "other"
    other.mkdir()
    (other / "diary.txt").write_text("mine")
    refused(call("run", folder / "mine.toml", "--out", other), "not a run folder", "--out")
    assert files(folder) == before | {"other", "other/diary.txt"}


RELEASES = {
    "epsilon": ({"epsilon": 4.0}, {}, "made with epsilon = 4.0, the recipe asks for 5.0"),
    "adjacency": ({"adjacency": "zero-out"}, {}, "made with adjacency = 'zero-out'"),
    "classes": ({"num_classes": 4}, {}, "made with num_classes = 4, the recipe asks for 3"),
    "taps": ({}, {"taps": ["conv1", "fire2"]}, "its taps is conv1, fire2, fire3"),
    "image size": ({}, {"image_size": 24}, "its image_size is [16, 16]"),
    "encoder": (
        {},
        {"name": "efficientnet-lite0", "image_size": 32, "taps": None},
        "its name is 'squeezenet1.1', the release was made with 'efficientnet-lite0'",
    ),
}


@pytest.mark.parametrize(("options", "encoder", "phrase"), RELEASES.values(), ids=RELEASES)
def test_a_release_of_other_settings_is_not_used(
    call: Call, folder: Path, options: dict[str, Any], encoder: dict[str, Any], phrase: str
) -> None:
    arguments = {"name": "squeezenet1.1", "image_size": 16, "taps": ["conv1", "fire2", "fire3"]}
    out = folder / "run"
    dpmmd.release(
        folder / "train.npz",
        dpmmd.encoders.load(**{**arguments, **encoder}),
        out=out / "release.safetensors",
        progress=False,
        **{
            "epsilon": 5.0,
            "delta": 1e-3,
            "adjacency": "replace-one",
            "num_classes": 3,
            **options,
        },
    )
    (out / "recipe.toml").write_text((folder / "mine.toml").read_text())
    before = files(out)
    refused(call("run", folder / "mine.toml", "--out", out), phrase)
    assert files(out) == before


# ----------------------------------------------------------------------------- bad input


BAD_RELEASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "encoder": ({"encoder": "squeezenet"}, ("unknown encoder 'squeezenet'", "squeezenet1.1")),
    "epsilon": ({"epsilon": 0}, ("epsilon=0.0", "expected a number in")),
    "negative": ({"epsilon": -1}, ("epsilon=-1.0", "expected a number in")),
    "delta": ({"delta": 1.5}, ("delta=1.5", "expected a number in", "1 / N")),
    "classes": ({"num_classes": 2}, ("label", "2")),
    "no classes": ({"num_classes": 0}, ("num_classes=0",)),
    "moments": ({"moments": "1,3"}, ("moments=(1, 3)", "(1, 2)")),
    "no moments": ({"moments": "first"}, ("--moments 'first'", "1,2")),
    "bound": ({"bound": "cube"}, ("bound='cube'", "sphere")),
    "clip": ({"clip": 0}, ("clip=0.0",)),
    "batch": ({"batch_size": 0}, ("batch_size=0",)),
    "size": ({"encoder_size": 4}, ("image_size=(4, 4)", "larger image_size")),
    "crop": ({"crop": "middle"}, ("crop='middle'", "center")),
    "channels": ({"channels": 2}, ("channels=2",)),
    "source": ({"source": "absent.npz"}, ("'absent.npz' does not exist",)),
    "name": ({"source": "fashion-mnits"}, ("fashion-mnits", "Did you mean 'fashion-mnist'?")),
    "no weights": ({"weights": "absent.pkl"}, ("weights='absent.pkl'", "no such file")),
}


@pytest.mark.parametrize(("changes", "phrases"), BAD_RELEASES.values(), ids=BAD_RELEASES)
def test_release_refuses(
    call: Call, folder: Path, changes: dict[str, Any], phrases: tuple[str, ...]
) -> None:
    before = files(folder)
    refused(call(*release_arguments(folder, **changes)), *phrases)
    assert files(folder) == before


def test_a_release_of_pixels_and_one_with_its_modes(call: Call, folder: Path) -> None:
    first, second = folder / "first.safetensors", folder / "second.safetensors"
    made = call(
        *release_arguments(folder, out=first, encoder="none", pixel_moments=4, num_classes=3),
        "--json",
    ).json
    assert made["encoder"] is None
    told = call("privacy", first)
    assert "none: moments of pixels alone" in told.out
    arguments = release_arguments(folder, out=second, num_classes=3)
    both = call(*arguments, "--modes", first, "--per-class", 2, "--json").json
    assert both["together"]["origin"]["array_sha256"] == made["array_sha256"]
    assert both["together"]["epsilon"] > both["epsilon"]
    assert both["modes"]["per_class"] == 2
    refused(call("train", first, "--out", folder / "run"), "moments of pixels alone")


@pytest.mark.parametrize(
    ("options", "phrases"),
    [
        (["--per-class", 8], ("--per-class 8: needs --modes FIRST.safetensors",)),
        (["--modes", "first.safetensors"], ("--modes first.safetensors: needs --per-class C",)),
        (["--modes", "absent.st", "--per-class", 2], ("absent.st: no such release",)),
        (["--encoder", "none"], ("needs pixel_moments=SIDE (--pixel-moments SIDE)",)),
    ],
)
def test_modes_are_asked_for_whole(
    call: Call, folder: Path, options: list[object], phrases: tuple[str, ...]
) -> None:
    refused(call(*release_arguments(folder), *options), *phrases)
    assert not (folder / "r.safetensors").exists()


def test_weights_of_another_hash_are_refused(call: Call, folder: Path) -> None:
    (folder / "w.pkl").write_bytes(b"other weights")
    before = files(folder)
    result = call(*release_arguments(folder, weights=folder / "w.pkl"))
    refused(result, "w.pkl", "sha256 is", "expected f286bbf4", "pip install")
    assert files(folder) == before


def test_an_empty_data_set_is_refused(call: Call, folder: Path) -> None:
    np.savez(folder / "train.npz", x=np.zeros((0, 1, 8, 8), np.uint8), y=np.zeros(0, np.int64))
    refused(call(*release_arguments(folder)), "train.npz")
    (folder / "empty").mkdir()
    refused(call(*release_arguments(folder, source=folder / "empty")), "empty")
    assert not (folder / "r.safetensors").exists()


def test_mixed_sizes_need_a_rule(call: Call, folder: Path) -> None:
    for label in ("a", "b"):
        (folder / "scans" / label).mkdir(parents=True)
        for i, side in enumerate((8, 9)):
            Image.new("L", (side, side), 100).save(folder / "scans" / label / f"{i}.png")
    arguments = release_arguments(folder, source=folder / "scans", num_classes=2, delta=0.1)
    refused(call(*arguments), "image_size")
    assert not (folder / "r.safetensors").exists()
    assert call(*arguments, "--image-size", 8, "--quiet").code == 0


def test_a_large_delta_warns(call: Call, folder: Path) -> None:
    result = call(*release_arguments(folder, delta=0.01))
    assert result.code == 0
    assert "warning: delta=0.01 is above 1 / N" in result.err


@pytest.mark.parametrize("missing", ["epsilon", "delta", "adjacency", "out"])
def test_a_required_option_is_asked_for(call: Call, folder: Path, missing: str) -> None:
    before = files(folder)
    result = call(*release_arguments(folder, **{missing: None}))
    assert result.code == 2
    assert result.out == ""
    assert f"--{missing}" in result.err
    assert files(folder) == before


BAD_RECIPES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tap": ('"conv1"', '"conv0"', ("no tap 'conv0'", "did you mean 'conv1'", "fire9")),
    "encoder": ("[encoder]", '[encoder]\nname = "vgg"', ("unknown encoder 'vgg'", "vgg11")),
    "key": ("[train]", "[train]\nstep = 2", ("unknown key 'train.step'", "steps")),
    "adjacency": ('adjacency = "replace-one"', "", ("'release.adjacency' is missing",)),
    "epsilon": ("epsilon = 5.0", "epsilon = -1", ("release.epsilon = -1",)),
    "generator": ("[generator]", '[generator]\nname = "gan"', ("generator 'gan'", "resnet")),
    "generator size": ("image_size = 8", "image_size = 9", ("image_size=9", "multiple of 4")),
    "other size": ("image_size = 8", "image_size = 12", ("(1, 12, 12)", "(1, 8, 8)")),
    "classifier": ("[evaluate]", '[evaluate]\nclassifiers = ["svm"]', ("svm", "mlp, ", "cnn, ")),
    "classes": ("num_classes = 3", "num_classes = 2", ("label", "2")),
    "no classes": ("num_classes = 3", "", ("data.num_classes",)),
    "source": ("train.npz", "absent.npz", ("absent.npz", "does not exist")),
    "budget": ("[generator]", "budget = [1, 0.1]\n[generator]", ("release.budget", "'ledger'")),
    "joint": ("[generator]", "joint_weight = 1.0\n[generator]", ("joint_weight=1.0",)),
    "memory": ("[train]", '[train]\nmemory = "50MiB"', ("memory='50MiB'", "step of batch_size=12")),
}


@pytest.mark.parametrize(("old", "new", "phrases"), BAD_RECIPES.values(), ids=BAD_RECIPES)
def test_run_refuses_before_it_releases(
    call: Call, folder: Path, old: str, new: str, phrases: tuple[str, ...]
) -> None:
    text = (folder / "mine.toml").read_text()
    assert old in text
    (folder / "bad.toml").write_text(text.replace(old, new))
    before = files(folder)
    refused(call("run", folder / "bad.toml", "--out", folder / "run"), *phrases)
    assert files(folder) == before  # the folder is free for the corrected recipe


def test_unknown_recipes_list_the_known(call: Call, folder: Path) -> None:
    refused(call("run", "fashion", "--out", folder / "run"), "'fashion'", "fashion-demo")
    assert set(call("recipes", "--json").json) == set(dpmmd.recipe.names())
    assert "fashion-demo" in call("recipes").out


def test_corrupt_files_are_refused(call: Call, folder: Path) -> None:
    bad = folder / "bad.safetensors"
    bad.write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    refused(call("privacy", bad), "bad.safetensors", "not a readable release")
    refused(call("train", bad, "--out", folder / "t"), "bad.safetensors", "not a readable release")
    refused(call("privacy", folder / "absent"), "no such release", "dpmmd release")
    (folder / "t" / "checkpoints").mkdir(parents=True)
    (folder / "t" / "checkpoints" / "last.pt").write_bytes(b"PK")
    before = files(folder)
    result = call("sample", folder / "t", "--out", folder / "s.npz")
    refused(result, "last.pt", "not a readable checkpoint", "remove it")
    refused(call("sample", folder / "absent", "--out", folder / "s.npz"), "no such checkpoint")
    refused(call("sample", folder / "t", "--out", folder / "s.png"), "--out", ".npz")
    arguments = ["sample", folder / "t", "--out", folder / "s", "--format", "npz"]
    refused(call(*arguments), "--format npz", "expected a name with .npz")
    refused(call("sample", folder / "t", "--out", folder / "s.npz", "--num-images", 0), "0")
    refused(call("sample", folder / "t", "--out", folder / "s.npz", "--temperature", -1), "> 0")
    assert files(folder) == before


def test_summarise(call: Call, folder: Path) -> None:
    """Mean and spread over releases; each run counts once."""
    text = (folder / "mine.toml").read_text()
    short = text.replace("[evaluate]", '[evaluate]\nclassifiers = ["gaussian_nb"]\nseeds = [0, 1]')
    (folder / "mine.toml").write_text(short)
    out = [folder / f"run{i}" for i in range(3)]
    values = []
    for i, each in enumerate(out):
        call("run", folder / "mine.toml", "--out", each, "--set", f"train.seed={i}", "--quiet")
        report = json.loads((each / "report.json").read_text())
        accuracy = report["accuracy"]["gaussian_nb"]
        accuracy["synthetic"] = 0.5 + i / 10
        report["metrics"] = {"vgg19": {"frechet_distance": float(i), "seed": 0, "held_out": True}}
        (each / "report.json").write_text(json.dumps(report))
        values.append(accuracy["real"])
    told = call("summarise", *out, "--json").json
    figures = told["figures"]
    assert figures["gaussian_nb.synthetic"] == {
        "mean": pytest.approx(0.6), "sd": pytest.approx(0.1), "n": 3
    }  # fmt: skip
    assert figures["gaussian_nb.real"]["mean"] == pytest.approx(np.mean(values))
    assert figures["vgg19.frechet_distance"] == {"mean": 1.0, "sd": 1.0, "n": 3}
    assert set(figures) == {"gaussian_nb.synthetic", "gaussian_nb.real", "vgg19.frechet_distance"}
    assert told["privacy"]["epsilon"] == 5.0
    assert "not covered" in told["accuracy_note"]
    assert call("summarise", out[0], "--json").json["figures"]["gaussian_nb.real"]["sd"] is None
    assert "vgg19.frechet_distance" in call("summarise", *out).out

    refused(call("summarise", out[0], out[0]), "different run folders")
    refused(call("summarise", out[0], folder), "no report.json")
    report = json.loads((out[1] / "report.json").read_text())
    report["privacy"]["epsilon"] = 4.0
    (out[1] / "report.json").write_text(json.dumps(report))
    refused(call("summarise", *out), "run1", "summarise runs that promise the same")


def test_several_seeds_are_a_mean_and_a_spread(call: Call, folder: Path) -> None:
    arguments = [
        "evaluate",
        folder / "train.npz",
        "--test",
        folder / "test.npz",
        "--num-classes",
        3,
    ]
    arguments += ["--classifiers", "decision_tree"]
    three = call(*arguments, "--seeds", "0,1,2", "--json").json["accuracy"]["decision_tree"]
    each = [
        call(*arguments, "--seed", i, "--json").json["accuracy"]["decision_tree"] for i in range(3)
    ]
    assert three["seeds"]["synthetic"] == [one["synthetic"] for one in each]
    assert three["synthetic"] == pytest.approx(np.mean(three["seeds"]["synthetic"]))
    assert "n = 3" in call(*arguments, "--seeds", "0,1,2").out
    refused(call(*arguments, "--seeds", "0,x"), "--seeds '0,x'")


@pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("torch_fidelity", "prdc")),
    reason="the metrics' packages are not installed",
)
def test_metrics_stand_beside_the_accuracies(call: Call, folder: Path) -> None:
    assert call(*release_arguments(folder), "--quiet").code == 0
    arguments = ["evaluate", folder / "train.npz", "--test", folder / "test.npz"]
    arguments += ["--features", "squeezenet1.1", "--num-compared", 30]
    unknown = call(*arguments, "--json").json
    assert unknown["accuracy"] == {}
    assert set(unknown["metrics"]) == {"squeezenet1.1"}
    assert unknown["metrics"]["squeezenet1.1"]["held_out"] is None
    against = [*arguments, "--release", folder / "r.safetensors"]
    known = call(*against, "--json").json["metrics"]
    assert {k: f["held_out"] for k, f in known.items()} == {
        "squeezenet1.1": False, "efficientnet-lite0": True
    }  # fmt: skip
    printed = call(*against)
    assert "efficientnet-lite0" in printed.out
    assert "30 synthetic and 30 real images" in printed.err
    assert "torch-fidelity" in printed.err
    refused(call(*arguments[:-4], "--json"), "--num-classes", "--features")
    bad = [*arguments, "--weights", "squeezenet1.1=absent.pkl"]
    refused(call(*bad), "absent.pkl", "no such file")
    refused(call(*arguments, "--weights", "vgg19=x"), "vgg19", "metrics.features")


BEFORE_THE_DATA: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "weights of the encoder": ("[encoder]", '[encoder]\nweights = "no.pkl"', ("no.pkl", "pip")),
    "weights of Inception": (
        "[sample]",
        '[metrics]\nweights = {inception-v3 = "no.pth"}\n[sample]',
        ("no.pth", "download https", "leave out"),
    ),
    "weights of no feature": (
        "[sample]",
        '[metrics]\nfeatures = ["squeezenet1.1"]\nweights = {vgg19 = "x"}\n[sample]',
        ("metrics.weights: vgg19 is not among",),
    ),
    "features": ("[sample]", '[metrics]\nfeatures = ["vgg"]\n[sample]', ("vgg19", "['vgg']")),
    "key of metrics": ("[sample]", "[metrics]\nfid = 1\n[sample]", ("'metrics.fid'", "features")),
    "classifier": ("[evaluate]", '[evaluate]\nclassifiers = ["svc"]', ("'svc'", "linear_svm")),
    "key": ("[train]", "[train]\nstep = 2", ("unknown key 'train.step'",)),
    "estimator for balls": (
        "[generator]",
        'bound = "ball"\n[generator]',
        ("train.estimator = 'unbiased'", "release.bound = 'ball'", "'batch'"),
    ),
    "estimator for shared taps": (
        "[generator]",
        "shared_taps = 1\n[generator]",
        ("train.estimator = 'unbiased'", "release.shared_taps = 1", "'batch'"),
    ),
    "graph in memory": (
        "[train]",
        '[train]\ngraph = true\nmemory = "1GiB"',
        ("train.graph with train.memory = '1GiB'",),
    ),
    "graph on a CPU": ("[train]", "[train]\ngraph = true", ("only CUDA devices have graphs",)),
    "images that may not be counted": (
        'adjacency = "replace-one"\n',
        'adjacency = "add-remove"\n[data]\nnum_images = 240\n',
        ("data.num_images = 240", "leave the key out"),
    ),
}


@pytest.mark.parametrize(("old", "new", "phrases"), BEFORE_THE_DATA.values(), ids=BEFORE_THE_DATA)
def test_bad_input_is_refused_before_private_data_are_opened(
    call: Call,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    old: str,
    new: str,
    phrases: tuple[str, ...],
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("private data were opened")

    monkeypatch.setattr(runs.releases, "open_source", opened)
    text = (folder / "mine.toml").read_text()
    assert old in text
    if "'unbiased'" in phrases[0]:
        text = text.replace("[train]", '[train]\nestimator = "unbiased"')
    if "\n[data]\n" in new:  # a key of a section that is there already
        text = text.replace("num_classes = 3", "num_classes = 3\nnum_images = 240")
        new = new.partition("[data]")[0]
    (folder / "bad.toml").write_text(text.replace(old, new))
    before = files(folder)
    refused(call("run", folder / "bad.toml", "--out", folder / "run"), *phrases)
    assert files(folder) == before


def test_a_data_set_of_another_size_is_refused_before_privacy_is_spent(
    call: Call, folder: Path
) -> None:
    text = (folder / "mine.toml").read_text()
    ledger = f'ledger = "{folder}/ledger"\n[generator]'
    text = text.replace("[generator]", ledger).replace("[data]", "[data]\nnum_images = 241")
    (folder / "mine.toml").write_text(text)
    before = files(folder)
    command = ["run", folder / "mine.toml", "--out", folder / "run"]
    refused(call(*command), "data.num_images = 241", "holds 240 images", "correct the key")
    assert files(folder) == before
    assert call(*command, "--set", "data.num_images=240", "--quiet").code == 0


def test_evaluate_refuses(call: Call, folder: Path) -> None:
    x, y = bars(30, 0)
    np.savez(folder / "plain.npz", x=x)
    np.savez(folder / "large.npz", x=x.repeat(2, axis=2).repeat(2, axis=3), y=y)
    (folder / "torn.npz").write_bytes((folder / "test.npz").read_bytes()[:100])

    def evaluate(name: str, *more: object) -> Result:
        return call(
            "evaluate", folder / name, "--test", folder / "test.npz", "--num-classes", 3, *more
        )

    refused(evaluate("train.npz", "--classifiers", "svm"), "'svm'", "mlp, ", "cnn, ")
    refused(evaluate("train.npz", "--num-train", 0), "num_train")
    refused(evaluate("plain.npz"), "plain.npz", "label")
    refused(evaluate("large.npz"), "(1, 16, 16)", "image_size")
    refused(evaluate("torn.npz"), "torn.npz")
    refused(evaluate("absent.npz"), "absent.npz")


def class_folders(path: Path, names: dict[int, str], n: int = 60) -> Path:
    x, y = bars(n, seed=n)
    for label, name in names.items():
        (path / name).mkdir(parents=True)
        for i in np.flatnonzero(y == label):
            Image.fromarray(x[i, 0]).save(path / name / f"{i:03d}.png")
    return path


def test_evaluate_matches_classes_by_name_and_says_what_it_used(call: Call, folder: Path) -> None:
    """A test folder that lacks a class would else score a perfect set 0.5, with exit code 0."""
    dpmmd.data.write_npz(folder / "s.npz", *bars(90, 0), classes=("low", "mid", "top"))
    test = class_folders(folder / "test", {0: "low", 2: "top"})
    arguments = ["evaluate", folder / "s.npz", "--test", test, "--classifiers", "gaussian_nb"]
    arguments += ["--num-classes", 3]
    told = call(*arguments, "--json").json
    assert told["accuracy"]["gaussian_nb"] == {"synthetic": 1.0}
    assert told["images"]["test"] == {"used": 40, "left_out": {}, "passed_over": {}}
    assert told["classes"]["matched_by"] == {"test": "name"}
    assert told["classes"]["without_test_images"] == ["mid"]
    printed = call(*arguments)
    assert "test (test): 40 images used" in printed.err
    assert "no test images of mid" in printed.err
    assert "100.0 %" in printed.out

    class_folders(test, {1: "other"})
    refused(call(*arguments), "test: source 'test'", "lacks (other)", "low, mid, top")
    (test / "other").rename(test / "mid")
    images = sorted((test / "mid").iterdir())
    for image in images[:4]:
        image.write_bytes(b"")
    sizes = ["--image-size", 8, "--channels", 1]
    refused(call(*arguments, *sizes), "56 images used; 4 left out", "at most 5%")
    for image in images[1:4]:
        image.unlink()
    told = call(*arguments, *sizes, "--json").json
    assert told["images"]["test"]["used"] == 56
    assert sum(told["images"]["test"]["left_out"].values()) == 1
    assert told["classes"]["without_test_images"] == []


def test_names_of_classes_go_through_a_run(call: Call, folder: Path) -> None:
    private = class_folders(folder / "private", {0: "T-shirt", 1: "bag", 2: "boot"}, 90)
    test = class_folders(folder / "real", {1: "Bag", 2: "boot"})
    text = (folder / "mine.toml").read_text().replace(f"{folder}/train.npz", str(private))
    short = text.replace("[evaluate]", '[evaluate]\nclassifiers = ["gaussian_nb"]')
    (folder / "mine.toml").write_text(short.replace(f"{folder}/test.npz", str(test)))
    out = folder / "run"
    report = call("run", folder / "mine.toml", "--out", out, "--json").json
    names = ["T-shirt", "bag", "boot"]
    assert report["classes"]["names"] == names
    assert report["classes"]["matched_by"] == {"test": "name", "real": "name"}
    assert report["classes"]["without_test_images"] == ["T-shirt"]
    assert report["images"]["real"]["used"] == 90
    assert report["accuracy"]["gaussian_nb"]["real"] == 1.0
    assert Release.load(out / "release.safetensors").metadata.class_names == tuple(names)
    assert json.loads((out / "privacy.json").read_text())["class_names"] == names
    assert "T-shirt, bag, boot" in call("privacy", out / "release.safetensors", "--markdown").out
    assert "0 is T-shirt; 1 is bag; 2 is boot" in (out / "README.md").read_text()
    with np.load(out / "synthetic.npz") as file:
        assert file["classes"].tolist() == names
    sampled = call("sample", out, "--out", folder / "s", "--num-images", 6, "--json").json
    assert sampled["classes"] == names
    assert {p.name for p in (folder / "s").iterdir()} == set(names)


def test_a_run_with_many_broken_private_images_keeps_its_other_figures(
    call: Call, folder: Path
) -> None:
    private = class_folders(folder / "private", {0: "low", 1: "mid", 2: "top"}, 90)
    for path in sorted((private / "low").iterdir())[:6]:
        path.write_bytes(b"")
    text = (folder / "mine.toml").read_text().replace(f"{folder}/train.npz", str(private))
    text = text.replace("num_classes = 3", "num_classes = 3\nimage_size = 8\nchannels = 1")
    short = text.replace("[evaluate]", '[evaluate]\nclassifiers = ["gaussian_nb"]')
    (folder / "mine.toml").write_text(short)
    result = call("run", folder / "mine.toml", "--out", folder / "run", "--json")
    assert set(result.json["accuracy"]["gaussian_nb"]) == {"synthetic"}
    assert "84 images used; 6 left out" in result.json["real_not_compared"]
    assert "Classifiers are not trained on real images" in result.err


def test_a_run_whose_evaluation_would_be_refused_is_refused_before_privacy_is_spent(
    call: Call, folder: Path
) -> None:
    private = class_folders(folder / "private", {0: "low", 1: "mid", 2: "top"}, 90)
    text = (folder / "mine.toml").read_text().replace(f"{folder}/train.npz", str(private))
    text = text.replace("[generator]", f'ledger = "{folder}/ledger"\n[generator]')
    x, y = bars(60, 60)
    np.savez(folder / "plain.npz", x=x)
    np.savez(folder / "two.npz", x=x, y=y % 2)
    np.savez(folder / "large.npz", x=x.repeat(2, axis=2).repeat(2, axis=3), y=y)
    class_folders(folder / "names", {0: "low", 1: "other", 2: "top"})
    class_folders(folder / "splits", {0: "train", 1: "test"})
    wrong = {
        "plain.npz": ("test: source 'plain.npz' has no labels",),
        "two.npz": ("has 2 classes", "3 classes (low, mid, top)"),
        "large.npz": ("data.test_source", "(1, 16, 16)", "(1, 8, 8)"),
        "names": ("lacks (other)",),
        "splits": ("splits and not classes",),
        "private": ("are the same images",),
        "absent": ("absent",),
    }
    before = files(folder)
    for name, phrases in wrong.items():
        (folder / "mine.toml").write_text(text.replace("test.npz", name))
        refused(call("run", folder / "mine.toml", "--out", folder / "run"), *phrases)
        assert files(folder) == before
    fewer = text.replace("num_classes = 3", "num_classes = 2")
    (folder / "mine.toml").write_text(fewer)
    result = call("run", folder / "mine.toml", "--out", folder / "run")
    refused(result, "num_classes=2", "low, mid, top", "num_classes=3")
    (folder / "mine.toml").write_text(text.replace("num_classes = 3", "num_classes = 1"))
    refused(call("run", folder / "mine.toml", "--out", folder / "run"), "every classifier is right")
    assert files(folder) == before


# ----------------------------------------------------------------------------- real processes


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dpmmd", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def test_exit_codes_of_real_processes(tmp_path: Path) -> None:
    good = process("calibrate", "--epsilon", 1, "--delta", 1e-6, "--json")
    assert good.returncode == 0
    assert good.stderr == ""
    assert json.loads(good.stdout)["mu"] == pytest.approx(1 / 4.2246788893268, rel=1e-8)
    bad = process("privacy", tmp_path / "absent")
    assert bad.returncode == 2
    assert bad.stdout == ""
    assert bad.stderr.startswith("error: ")
    assert bad.stderr.count("\n") == 1


def test_ctrl_c_in_a_real_process(folder: Path) -> None:
    text = (folder / "mine.toml").read_text()
    (folder / "mine.toml").write_text(text.replace("steps = 6", "steps = 100000"))
    command = [sys.executable, "-m", "dpmmd", "run", "mine.toml", "--out", "run"]
    running = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    assert running.stderr is not None
    seen = ""
    for line in running.stderr:
        seen += line
        if line.startswith("train: starts"):
            break
    while not (folder / "run" / "checkpoints" / "last.pt").exists():
        assert running.poll() is None, seen
        time.sleep(0.02)
    running.send_signal(signal.SIGINT)
    rest = running.communicate(timeout=60)[1]
    assert running.returncode == 130, seen + rest
    assert "Traceback" not in rest
    assert "interrupted" in rest
    assert training.load_checkpoint(folder / "run" / "checkpoints" / "last.pt")["step"] > 1


# ----------------------------------------------------------------------------- help


COMMANDS = [c.callback.__name__ for c in cli.app.registered_commands if c.callback]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(call: Call, command: str) -> None:
    result = call(command, "--help")
    assert result.code == 0
    assert "--json" in result.out
    group = typer.main.get_command(cli.app)
    for parameter in group.commands[command].params:  # type: ignore[attr-defined]
        assert getattr(parameter, "help", None), parameter.name


@pytest.mark.parametrize("device", ["gpu", "meta", "mps", ""])
@pytest.mark.parametrize(
    "command",
    [
        ["run", "fashion-demo", "--out", "r"],
        ["train", "no.safetensors", "--out", "r"],
        ["sample", "no", "--out", "s.npz"],
        [
            "release",
            "no.npz",
            "--out",
            "r.st",
            "--epsilon",
            "1",
            "--delta",
            "1e-5",
            "--adjacency",
            "replace-one",
        ],
    ],
    ids=lambda command: command[0],
)
def test_a_device_that_cannot_be_used_is_refused_first(
    call: Call, command: list[object], device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*command, "--device", device)
    assert result.code == 2
    assert f"device={device!r}" in result.err
    assert "'auto', 'cpu'" in result.err
    assert not list(tmp_path.iterdir())


def test_a_named_device_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert choose_device("cpu").type == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda"


def test_wrong_use_is_told_in_a_few_lines(call: Call) -> None:
    for arguments in (["nosuch"], ["calibrate", "--epsilom", 1], ["calibrate", "--epsilon", "x"]):
        result = call(*arguments)
        assert result.code == 2
        assert result.out == ""
        assert str(arguments[-1]) in result.err or str(arguments[-2]) in result.err
        assert "Traceback" not in result.err


def test_the_table_of_accuracies() -> None:
    rows = runs.accuracy_rows({"logistic_regression": {"synthetic": 0.71234}})
    assert rows == [("logistic regression", "71.2 %", "")]
