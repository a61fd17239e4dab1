"""The examples run as they are, at toy size."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import dpmmd
from tests.conftest import no_noise

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("release") / "release.safetensors"
    rng = np.random.default_rng(0)
    dpmmd.release(
        (rng.integers(0, 256, (20, 1, 16, 16), dtype=np.uint8), np.arange(20) % 3),
        dpmmd.encoders.load("squeezenet1.1", taps=["conv1", "fire2"]),
        epsilon=5.0,
        delta=1e-3,
        adjacency="replace-one",
        num_classes=3,
        progress=False,
        out=path,
        insecure_test_noise=no_noise,
    )
    return path


def run(name: str, *arguments: object, processes: int | None = None) -> str:
    """Its standard output; the example must end well."""
    command = [sys.executable]
    if processes is not None:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [str(ROOT / "tests/example.py"), str(EXAMPLES / f"{name}.py")]
    command += map(str, arguments)
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "ACCELERATE_USE_CPU": "true",  # what `accelerate launch --cpu` sets
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def needs(*packages: str) -> None:
    """Skips the test without them; does not import them (see tests/example.py)."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


def test_every_example_is_listed_and_tried() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    listed = (EXAMPLES / "README.md").read_text()
    tried = Path(__file__).read_text()
    assert names
    assert all(f"({name})" in listed and f'"{name[:-3]}"' in tried for name in names)


def test_plain_loop(release: Path, tmp_path: Path) -> None:
    out = tmp_path / "samples.png"
    text = run("plain_loop", release, "--out", out, "--steps", 2, "--batch-size", 6)
    assert "step 1: loss" in text
    assert Image.open(out).size == (2 * 10 * 16, 2 * 3 * 16)


def test_own_encoder(tmp_path: Path) -> None:
    sys.path.insert(0, str(EXAMPLES))
    try:
        from own_encoder import Backbone, load
    finally:
        sys.path.remove(str(EXAMPLES))
    weights, out = tmp_path / "backbone.pt", tmp_path / "release.safetensors"
    torch.save(Backbone().state_dict(), weights)
    rng = np.random.default_rng(0)
    for label in ("ill", "well"):
        (tmp_path / "scans" / label).mkdir(parents=True)
        for i in range(4):
            pixels = rng.integers(0, 256, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "scans" / label / f"{i}.png")
    run(
        "own_encoder", tmp_path / "scans", "--weights", weights, "--num-classes", 2,
        "--image-size", 16, "--out", out,
    )  # fmt: skip
    made = dpmmd.Release.load(out)
    loss = dpmmd.nn.MMDLoss(made, load(weights, 16))
    assert loss(torch.rand(4, 1, 16, 16), torch.tensor([0, 1, 0, 1])) > 0


@pytest.mark.parametrize("name", ["lightning_module", "fabric"])
def test_lightning(name: str, release: Path, tmp_path: Path) -> None:
    needs("lightning")
    out = tmp_path / "generator.pt"
    run(name, release, "--out", out, "--steps", 2, "--batch-size", 6)
    assert "to_image.weight" in torch.load(out, weights_only=True)


def test_two_processes_are_as_one(release: Path, tmp_path: Path) -> None:
    """The loss that is printed first: of the whole batch, through synchronised batch norms."""
    needs("lightning")
    losses = []
    for processes in (1, 2):
        out = tmp_path / f"{processes}.pt"
        text = run(
            "fabric", release, "--out", out, "--steps", 1, "--batch-size", 6, processes=processes
        )
        assert f"trained by {processes} process" in text
        assert out.is_file()
        losses.append(float(text.split("loss ")[1].split()[0]))
    assert losses[0] > 0
    assert losses[1] == pytest.approx(losses[0], abs=2e-4)  # printed with four digits


@pytest.mark.parametrize("processes", [1, 2])
def test_one_step_diffusion(release: Path, tmp_path: Path, processes: int) -> None:
    needs("diffusers", "accelerate")
    out = tmp_path / "unet"
    text = run(
        "one_step_diffusion", release, "--out", out, "--steps", 2, "--batch-size", 4,
        processes=processes,
    )  # fmt: skip
    assert f"trained by {processes} process" in text
    assert (out / "config.json").is_file()
