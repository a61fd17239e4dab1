"""Faults injected into the native integer sums: their tests must catch each one."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCE = "csrc/cpu/bounded_sums.cpp"
pytestmark = pytest.mark.long

GUARD = ("constexpr double guard = 1.0 - 0x1p-20;", "constexpr double guard = 2.0;")
CERTIFICATE = ("exact && size.square > 0 && size.square <= limit * limit &&", "size.square > 0 &&")
LIMIT = "static_cast<double>(e_.limits[{}]) * share"
TRUNCATED = "static_cast<std::int64_t>(\n        scaled_first"
ADDED = "if (within(r)) add_row(images[r], r, u);"
MUTATIONS = {
    "twice the norm": GUARD,
    "negative entries pass": ("!(e_.nonnegative && size.sign < 0)", "true"),
    "invalid images count": ("return e_.valid[image] && limit > 0", "return limit > 0"),
    "one limit for all images": (LIMIT.format("image"), LIMIT.format("0")),
    "rounded up": (f"return {TRUNCATED}", f"return 1 + {TRUNCATED}"),
    "moments of shared taps mixed": ("e_.shared + index * p_", "e_.shared + 0 * index * p_"),
    "an image is added twice": (ADDED, f"{ADDED} if (r == 3) add_row(images[r], r, u);"),
}
# One image of norm LIMIT: what arrives in the sums, in exact integers.
NORM = """
import torch
from dpmmd import _cpu
sums = torch.zeros(1, 5, dtype=torch.int64)
_cpu.bounded_sums([torch.arange(1.0, 6.0)[None]], torch.zeros(1, dtype=torch.int64),
    torch.ones(1, dtype=torch.bool), torch.tensor([1 << 30]), moments=(1,), joint_weight=1.0,
    bound="sphere", clip=1.0, nonnegative=True, sums=sums)
print(sum(int(q) ** 2 for q in sums.flatten()) / 2**60)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources, configured to build the module beside a copy of the package."""
    pybind11 = pytest.importorskip("pybind11")
    folder = tmp_path_factory.mktemp("native")
    for name in ("csrc", "dpmmd", "tests"):
        ignore = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    configure = [
        "cmake", "-S", ".", "-B", "build",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={folder / 'dpmmd'}",
    ]  # fmt: skip
    subprocess.run(configure, cwd=folder, check=True, capture_output=True, env=environment())
    return folder


def environment() -> dict[str, str]:
    scripts = Path(sys.executable).parent
    return {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}


def run(tree: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Builds the tree, then runs Python in it."""
    build = ["cmake", "--build", "build", "--parallel", "2"]
    subprocess.run(build, cwd=tree, check=True, capture_output=True, env=environment())
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=tree,
        capture_output=True,
        text=True,
        env={**environment(), "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "2"},
    )


def run_tests(tree: Path) -> subprocess.CompletedProcess[str]:
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return run(tree, "-m", "pytest", *options, "tests/test_bounded_sums.py")


@contextlib.contextmanager
def mutated(tree: Path, *edits: tuple[str, str]) -> Iterator[None]:
    path = tree / SOURCE
    before = text = path.read_text()
    for old, new in edits:
        assert text.count(old) == 1
        text = text.replace(old, new)
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)


def test_unmutated_they_pass(tree: Path) -> None:
    done = run_tests(tree)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS)
def test_a_fault_is_caught(tree: Path, mutation: tuple[str, str]) -> None:
    with mutated(tree, mutation):
        done = run_tests(tree)
    assert done.returncode == 1, done.stdout
    assert "1 failed" in done.stdout


def test_the_certificate_alone_keeps_the_bound(tree: Path) -> None:
    """Vectors of twice the norm add nothing; without the certificate they would."""
    with mutated(tree, GUARD):
        assert float(run(tree, "-c", NORM).stdout) == 0
    with mutated(tree, GUARD, CERTIFICATE):
        assert float(run(tree, "-c", NORM).stdout) > 3.9
