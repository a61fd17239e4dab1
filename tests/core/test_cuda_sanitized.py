"""The CUDA kernels on the host under ASan and UBSan: no access past a tensor, none misaligned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.core.emulated import SANITIZED

pytestmark = pytest.mark.long


def preloaded() -> str:
    """ASan's library and the C++ one, whose exceptions it must know, for an interpreter without."""
    paths = []
    for name in ("libasan.so", "libstdc++.so"):
        asked = ["g++", f"-print-file-name={name}"]
        path = Path(
            subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
        )
        if not path.is_absolute():
            pytest.skip(f"g++ has no {name}")
        paths.append(str(path))
    return " ".join(paths)


def test_nothing_is_touched_that_must_not_be() -> None:
    done = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:xdist", "-p", "no:cacheprovider",
            "-m", "not long", "-k", "test_cuda and not opcheck and not release",
            "tests/core/test_cuda.py", "tests/core/test_conformance.py",
        ],
        cwd=Path(__file__).resolve().parents[2],
        env={
            **os.environ,
            SANITIZED: "1",
            "LD_PRELOAD": preloaded(),
            "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
