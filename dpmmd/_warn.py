"""Warnings at the line of the caller, however deep in this package their reason is."""

from __future__ import annotations

import sys
import warnings

_HERE = __name__.partition(".")[0]


def warn(message: str) -> None:
    """Warns at the innermost line outside this package."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _of_this_package(frame.f_globals.get("__name__")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _of_this_package(module: object) -> bool:
    return str(module).partition(".")[0] == _HERE
