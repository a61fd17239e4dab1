"""Runs a test file under Triton's interpreter, in a process of its own.

Whether a kernel is interpreted is settled when its module is imported, for the whole process: a
file of such tests consists of `test_interpreted = interpreted.whole(__file__)` where it is not the
interpreter that runs it, and of its tests where it is. By hand:
``TRITON_INTERPRET=1 pytest tests/core/test_conformance.py``.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

ACTIVE = os.environ.get("TRITON_INTERPRET") == "1"


def _hindrance() -> str | None:
    """Why the interpreter cannot run here, if so."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    triton, numpy = (
        tuple(int(part) for part in metadata.version(name).split(".")[:2])
        for name in ("triton", "numpy")
    )
    if triton < (3, 7) and numpy >= (2, 4):
        return "the interpreter of triton before 3.7 needs numpy before 2.4"
    return None


HINDRANCE = _hindrance()


def whole(path: str, marked: str = "not long", chosen: str = "") -> Callable[[], None]:
    """A test that the tests of a file pass under the interpreter, those so marked and named."""

    @pytest.mark.skipif(HINDRANCE is not None, reason=HINDRANCE or "")
    def test() -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, "-m", marked, "-k", chosen, path],
            env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).resolve().parents[2],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr

    return test


def set_blocks(monkeypatch: pytest.MonkeyPatch, columns: int) -> None:
    """Blocks of so many columns, and 4 images, so that small shapes have several of each."""
    from dpmmd.kernels import table

    def lookup(operation: str, *_: object) -> table.Config:
        tiled = operation in ("row_dots", "gradient", "gradient_with")
        rows = table.TILE_ROWS if tiled else 4
        return table.Config(columns, rows, 4, 1, 255)

    monkeypatch.setattr(table, "lookup", lookup)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_blocks(monkeypatch, 8)
