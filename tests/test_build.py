"""What is built and installed: from a source archive to a wheel that needs no compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.long
USE = """
import torch
import dpmmd
from dpmmd import backends, functional
assert dpmmd.__file__.startswith({folder!r}), dpmmd.__file__
assert backends.resolve() == "cpu"
f = torch.rand(4, 8, 2, 2, requires_grad=True)
means, counts = functional.mean_embedding([f], backend="cpu")
functional.mmd_loss(means, counts, torch.zeros_like(means)).backward()
assert f.grad.isfinite().all()
print("recipes", len(dpmmd.recipe.names()))
"""


def test_a_wheel_of_the_source_archive_imports_without_a_compiler(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)  # the wheel is made from the archive
    (wheel,) = tmp_path.glob("*.whl")
    folder = tmp_path / "installed"
    zipfile.ZipFile(wheel).extractall(folder)
    done = subprocess.run(
        [sys.executable, "-c", "import dpmmd.recipe\n" + USE.format(folder=str(folder))],
        cwd=tmp_path,
        env={"PATH": "/nonexistent", "PYTHONPATH": str(folder), "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("recipes ")


def test_without_a_compiler_one_line_says_what_to_install(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)],
        env={**os.environ, "CXX": "/nonexistent/c++"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "compiler" in line]
    assert len(lines) == 1
    assert "apt install g++" in lines[0]
