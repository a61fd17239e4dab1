"""Reading in silence: no warning and no line of a log may tell of a single private image."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from PIL import Image

_silent = threading.local()  # .depth: how many `quiet` blocks this thread is in


class _InSilentThreads:
    """Stands where a warnings filter has its message pattern; matches by thread, not by text."""

    pattern = "(?!)"  # nothing: for who copies filters to another process by their patterns

    def match(self, text: str) -> bool:
        return getattr(_silent, "depth", 0) > 0


_FILTER = ("ignore", _InSilentThreads(), Warning, None, 0)


class _Silence:
    """What is set for the process while any of its threads is silent, and put back after the last.

    The filter looks at the thread, so that a thread which never ends silences no other one.
    """

    def __init__(self) -> None:
        self.lock, self.threads, self.level = threading.Lock(), 0, logging.NOTSET
        if hasattr(os, "register_at_fork"):  # the parent's threads are not in a worker process
            os.register_at_fork(after_in_child=self._after_fork)

    def _after_fork(self) -> None:
        self.lock = threading.Lock()

    def enter(self) -> None:
        filters: Any = warnings.filters
        with self.lock:
            if not filters or filters[0] is not _FILTER:
                with contextlib.suppress(ValueError):
                    filters.remove(_FILTER)
                filters.insert(0, _FILTER)
            logger = logging.getLogger("PIL")
            if self.threads == 0:
                self.level = logger.level
                logger.setLevel(logging.CRITICAL + 1)
            self.threads += 1

    def leave(self) -> None:
        filters: Any = warnings.filters
        with self.lock:
            self.threads -= 1
            if self.threads == 0:
                logging.getLogger("PIL").setLevel(self.level)
                with contextlib.suppress(ValueError):
                    filters.remove(_FILTER)


_silence = _Silence()


@contextmanager
def quiet() -> Iterator[None]:
    """Decode in silence: no warning and no log line may tell of a single private image.

    Warnings are silenced in this thread alone, so that no interruption and no other thread's block
    can leave the process silent. (`warnings.catch_warnings` can, where two threads use it.)
    """
    depth = getattr(_silent, "depth", 0)
    _silence.enter()
    _silent.depth = depth + 1
    try:
        yield
    finally:
        _silent.depth = depth
        _silence.leave()


_stderr = threading.Lock()


@contextmanager
def quiet_libtiff(image: Image.Image) -> Iterator[None]:
    """Sends standard error away while libtiff decodes: it writes about damaged files there."""
    if image.format != "TIFF" or not getattr(image, "use_load_libtiff", True):
        yield
        return
    with _stderr:
        try:
            kept = os.dup(2)
        except OSError:  # there is no standard error
            yield
            return
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nowhere, 2)
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
            os.close(nowhere)
