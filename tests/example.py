"""Runs an example where torchvision, which others import, needs help beside a CPU-only torch."""

from __future__ import annotations

import contextlib
import runpy
import sys

from dpmmd._torchvision import import_torchvision

if __name__ == "__main__":
    with contextlib.suppress(ImportError):
        import_torchvision()
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
