"""Whether a CUDA graph is being made: who chooses cores asks, and what graphs read outlives caches.

A graph reads tensors by their addresses. One that a cache of ours hands out (`hold`) lives as long
as every graph that was made while it was handed out, even if the cache drops it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

_T = TypeVar("_T")

_capturing: ContextVar[bool] = ContextVar("dpmmd_capturing", default=False)
# Of all threads: autograd runs backward passes of a GPU in a thread of its own, out of our context.
_holders: list[list[object]] = []


@contextmanager
def captured() -> Iterator[list[object]]:
    """Within the block calls are those of a step that becomes a CUDA graph: warm-up and capture.

    Yields:
        What the graph needs to be kept alive; it fills up within the block.
    """
    held: list[object] = []
    token = _capturing.set(True)
    _holders.append(held)
    try:
        yield held
    finally:
        _holders[:] = [other for other in _holders if other is not held]
        _capturing.reset(token)


def is_captured() -> bool:
    """Whether the caller is within `captured`."""
    return _capturing.get()


def hold(value: _T) -> _T:
    """Returns a value of a cache, which graphs that are being made keep alive."""
    for held in _holders:
        held.append(value)
    return value
