"""What is not on every system is imported where it is used, and its absence is told."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import dpmmd
from dpmmd import _memory
from dpmmd.privacy import Ledger, PrivacyError
from tests.conftest import images, small_encoder

ROOT = Path(__file__).resolve().parent.parent
UNIX = {"resource", "fcntl", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline", "posix"}


def imported_with(tree: ast.Module) -> set[str]:
    """Modules that importing this one imports."""
    found, nodes = set(), list(tree.body)
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
        elif not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            nodes += ast.iter_child_nodes(node)
    return found


def test_no_module_needs_unix_to_be_imported() -> None:
    for path in sorted((ROOT / "dpmmd").rglob("*.py")):
        found = imported_with(ast.parse(path.read_text())) & UNIX
        assert not found, f"{path}: {found}"


def test_peak_memory_without_resource(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 2**20 < (_memory.peak_memory() or 0) < 2**40
    monkeypatch.setitem(sys.modules, "resource", None)
    assert _memory.peak_memory() is None


def test_no_ledger_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"epsilon": 1.0, "delta": 1e-3, "adjacency": "replace-one", "progress": False}
    dpmmd.release(images(20), small_encoder(), **options, ledger=tmp_path / "kept")
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for path in (tmp_path / "ledger", tmp_path / "kept"):
        with pytest.raises(OSError, match=r"ledger .*no file locks.*without a ledger"):
            dpmmd.release(images(20), small_encoder(), **options, ledger=path)
        with pytest.raises(OSError, match="no file locks"):
            Ledger(path)
    dpmmd.release(images(20), small_encoder(), **options)  # keeps count with nobody


def test_no_partial_sums_without_owners(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.geteuid")
    with pytest.raises(PrivacyError, match=r"partial_sums=.*leave it out"):
        dpmmd.release(
            images(20), small_encoder(), epsilon=1, delta=1e-3, adjacency="replace-one",
            partial_sums=tmp_path / "partial", progress=False,
        )  # fmt: skip
    assert not (tmp_path / "partial").exists()


SCRIPT = """
import sys
sys.modules.update(dict.fromkeys({modules!r}))
import os
for name in ("geteuid", "getuid", "fork", "O_DIRECTORY", "O_NOFOLLOW", "sched_getaffinity"):
    if hasattr(os, name):
        delattr(os, name)
import dpmmd
from dpmmd import cli, train
from dpmmd.recipe import GeneratorSection, TrainSection
from tests.conftest import images, small_encoder
release = dpmmd.release(
    images(20), small_encoder(), epsilon=1, delta=1e-3, adjacency="replace-one", num_classes=3,
    out="r.safetensors", progress=False,
)
train.train(
    dpmmd.Release.load("r.safetensors"), small_encoder(), settings=TrainSection(steps=2),
    generator_settings=GeneratorSection(name="conv", image_size=8, channels=1), out="run",
    progress=False,
)
for arguments in (
    ["--help"], ["calibrate", "--epsilon", "1", "--delta", "1e-6"], ["privacy", "r.safetensors"],
    ["sample", "run", "--out", "s.npz", "--num-images", "9", "--release", "r.safetensors", "-q"],
):
    sys.argv = ["dpmmd", *arguments]
    try:
        cli.main()
    except SystemExit as ended:
        assert not ended.code, (arguments, ended.code)
print("done")
"""


@pytest.mark.long
def test_a_process_without_unix(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(modules=sorted(UNIX - {"posix"}))],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("done\n")
