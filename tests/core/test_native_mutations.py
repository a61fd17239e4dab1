"""Faults injected into the native integer sums: their tests must catch each one."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.record import native_sources

ROOT = Path(__file__).resolve().parents[2]
SOURCE = "csrc/cpu/bounded_sums.cpp"
pytestmark = pytest.mark.long

Edits = tuple[tuple[str, str], ...]
LIMIT = "static_cast<double>(e_.limits[{}]) * share"
TRUNCATED = "static_cast<std::int64_t>(\n        scaled_first"
ADDED = "if (within(r)) add_row(images[r], r, u);"
LABEL = "e_.labels[image]"
# What the comparison with the definition shows.
MUTATIONS: dict[str, Edits] = {
    "twice the norm": (
        ("constexpr double guard = 1.0 - 0x1p-20;", "constexpr double guard = 2.0;"),
    ),
    "negative entries pass": (("!(e_.nonnegative && size.sign < 0)", "true"),),
    "invalid images count": (("return e_.valid[image] && limit > 0", "return limit > 0"),),
    "limits over 2^30 pass": (
        ("limit <= std::int64_t{1} << 30", "limit <= std::int64_t{1} << 31"),
    ),
    "labels out of range are the first class's": (
        ("label >= 0 &&\n               label < e_.num_classes", "label == label"),
        (
            f"({LABEL} * p_.num_moments",
            f"(({LABEL} >= 0 && {LABEL} < e_.num_classes ? {LABEL} : 0) * p_.num_moments",
        ),
    ),
    "one limit for all images": ((LIMIT.format("image"), LIMIT.format("0")),),
    "rounded up": ((f"return {TRUNCATED}", f"return 1 + {TRUNCATED}"),),
    "norms rounded down": (("total += down + (", "total += down + 0 * ("),),
    "infinity is usable": (("most >= 0x1p-1000 && most <= 0x1p1000", "most >= 0x1p-1000"),),
    "balls without a radius": (("rate = most < rate ? most : rate;", "(void)most;"),),
    "moments of shared taps mixed": (("e_.shared + index * p_", "e_.shared + 0 * index * p_"),),
    "an image is added twice": ((ADDED, f"{ADDED} if (r == 3) add_row(images[r], r, u);"),),
}
# The guard keeps every vector away from the limit, so that nothing shows whether the certificate is
# right. Here it is a number of the test's choice, read at each call.
CHOSEN_GUARD: Edits = (
    ("constexpr double guard = 1.0 - 0x1p-20;", '#define guard (std::atof(std::getenv("GUARD")))'),
    ('#include "parallel.h"', '#include <cstdlib>\n#include "parallel.h"'),
)
# guard, features, limits. Every image but those "at the limit" must add nothing.
CASES: dict[str, tuple[float, str, list[int]]] = {
    "at the limit": (1.0, "[[1, 2.0**-31]]", [1 << 30]),  # q = (2^30, 0)
    "one above it": (1.0, "[[1, 2.0**-30]]", [1 << 30]),  # q = (2^30, 1)
    "twice the limit": (2.0, "[[1, 2, 3, 4, 5]]", [1 << 30]),
    "one large entry": (4.0, "[[1, 2.0**-31]]", [1 << 30]),  # q = (2^32, 2), squares 4 mod 2^64
    "many entries": (4.0, "[[1, 1, 1, 1, 2.0**-31]]", [1 << 30]),  # 2^31 and 1, squares 1 mod 2^64
    "several threads": (1.2, "[[1] * 40000]", [1 << 30]),
    "another's limit": (2.0, "[[1, 0], [1, 0]]", [1 << 30, 5]),
}
SUMMED = """
import json, os
import torch
from dpmmd._cores import matching
from dpmmd.bounds import Bound
found = {}
for name, (guard, features, limits) in json.loads(os.environ["CASES"]).items():
    os.environ["GUARD"] = str(guard)
    rows = torch.tensor(eval(features), dtype=torch.float32)
    n, columns = rows.shape
    sums = torch.zeros(n, columns, dtype=torch.int64)
    matching.CORE.bounded_sums([rows], torch.arange(n), torch.ones(n, dtype=torch.bool),
        torch.tensor(limits), bound=Bound(), nonnegative=True, sums=sums, threads=2)
    found[name] = sum(int(q) ** 2 for q in sums.flatten() if q)
print(json.dumps(found))
"""
EXACT = "size.magnitude >> 32 == 0 && size.high + entries <= std::uint64_t{1} << 32"
SQUARE = "size.square <= limit * limit"
# A fault of the certificate, and the case that shows it.
CERTIFICATE: dict[str, tuple[Edits, str]] = {
    "square not checked": (((SQUARE, "limit == limit"),), "twice the limit"),
    "square checked loosely": (((SQUARE, f"{SQUARE} + 1"),), "one above it"),
    "overflow not excluded": ((("exact && size.square > 0", "size.square > 0"),), "many entries"),
    "large entries not excluded": (
        ((EXACT, EXACT.split(" && ")[1]),),
        "one large entry",
    ),
    "many entries not excluded": (((EXACT, EXACT.split(" && ")[0]),), "many entries"),
    "magnitude not measured": (
        (("size.magnitude |= static_cast<std::uint64_t>(magnitude);", ""),),
        "one large entry",
    ),
    "high halves not measured": ((("high += q2 >> 32;", ""),), "many entries"),
    "high halves not added": ((("size.high += part.high;", ""),), "many entries"),
    "one thread's share": (
        (
            (
                "thread < worker_.threads; ++thread) {\n            const Size& part",
                "thread < 1; ++thread) {\n            const Size& part",
            ),
        ),
        "several threads",
    ),
    "the last chunk alone": (
        (("size.square += total;", "size.square = total;"),),
        "several threads",
    ),
    "another image's limit": (
        (
            (
                "static_cast<std::uint64_t>(e_.limits[image])",
                "static_cast<std::uint64_t>(e_.limits[0])",
            ),
        ),
        "another's limit",
    ),
    "not asked": (((ADDED, "add_row(images[r], r, u);"),), "twice the limit"),
}


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
        "-DDPMMD_CUDA=OFF",
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
        env={
            **environment(),
            "PYTHONPATH": str(tree),
            "OMP_NUM_THREADS": "2",
            "CASES": json.dumps(CASES),
        },
    )


def run_tests(tree: Path) -> subprocess.CompletedProcess[str]:
    options = ["-q", "-x", "-rs", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return run(tree, "-m", "pytest", *options, "tests/core/test_bounded_sums.py")


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


def summed(tree: Path) -> dict[str, int]:
    """Squared norm of what each case adds."""
    done = run(tree, "-c", SUMMED)
    assert done.returncode == 0, done.stderr
    return {str(name): int(square) for name, square in json.loads(done.stdout).items()}


def test_unmutated_they_pass(tree: Path) -> None:
    done = run_tests(tree)
    assert done.returncode == 0, done.stdout
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
    assert all("this processor has no" in line for line in skipped), done.stdout
    digest = run(tree, "-c", "from dpmmd import _native; print(_native.sources)").stdout.strip()
    assert digest == native_sources(tree)


@pytest.mark.parametrize("edits", MUTATIONS.values(), ids=MUTATIONS)
def test_a_fault_is_caught(tree: Path, edits: Edits) -> None:
    with mutated(tree, *edits):
        done = run_tests(tree)
    assert done.returncode == 1, done.stdout
    assert "1 failed" in done.stdout


def test_the_certificate_alone_keeps_the_bound(tree: Path) -> None:
    """Vectors of the limit are summed; longer ones add nothing, whatever made them."""
    with mutated(tree, *CHOSEN_GUARD):
        assert summed(tree) == {name: (name == "at the limit") << 60 for name in CASES}


@pytest.mark.parametrize(("edits", "case"), CERTIFICATE.values(), ids=CERTIFICATE)
def test_a_fault_of_the_certificate_is_caught(tree: Path, edits: Edits, case: str) -> None:
    """Where `test_the_certificate_alone_keeps_the_bound` would fail, by this case at least."""
    with mutated(tree, *CHOSEN_GUARD, *edits):
        found = summed(tree)
    assert found[case] > 0
