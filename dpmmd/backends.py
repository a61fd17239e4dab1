"""Which implementation runs an operation: by argument, context manager or environment variable.

``auto`` takes the fastest one available for the tensors at hand and may fall back; every explicit
choice runs as chosen or raises.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

BACKENDS = ("auto", "torch")
ENVIRONMENT_VARIABLE = "DPMMD_BACKEND"

_chosen: ContextVar[str | None] = ContextVar("dpmmd_backend", default=None)


def resolve(backend: str = "auto") -> str:
    """The implementation that will run.

    An argument other than ``"auto"`` wins, then `use`, then the variable DPMMD_BACKEND.

    Raises:
        ValueError: the name is unknown to this build.
    """
    origin = "backend"
    if backend == "auto":
        inner = _chosen.get()
        if inner is not None:
            backend = inner
        elif ENVIRONMENT_VARIABLE in os.environ:
            backend, origin = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    if backend not in BACKENDS:
        raise ValueError(
            f"{origin}={backend!r}: this build has {', '.join(map(repr, BACKENDS))}. "
            "Use 'auto' to let the library choose."
        )
    return "torch" if backend == "auto" else backend


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Within the block, calls with ``backend="auto"`` run ``backend``."""
    resolve(backend)
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)
