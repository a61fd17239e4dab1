"""Sections within a time budget: what does not fit is left out and listed, never silently."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from types import FrameType


class OutOfTimeError(Exception):
    """Raised within `Budget.at_most` when its time is over."""


@dataclass
class Section:
    """A part of the run.

    Attributes:
        name: by which it is listed, and chosen on the command line.
        seconds: its allowance.
        run: what it does; asks the budget between its measurements whether there is time left.
    """

    name: str
    seconds: float
    run: Callable[[], None]


@dataclass
class Budget:
    """Time in all, and of the section at hand.

    Attributes:
        total: seconds in all.
        skipped: what was left out, and why.
        failed: which sections raised, and what.
        took: seconds of each section that ran.
    """

    total: float
    clock: Callable[[], float] = perf_counter
    skipped: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    took: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._start = self.clock()
        self._end = self._start + self.total
        self._section = ""

    @property
    def spent(self) -> float:
        return self.clock() - self._start

    @property
    def left(self) -> float:
        """Of the section at hand."""
        return self._end - self.clock()

    def skip(self, what: str, why: str = "no time left") -> None:
        line = f"{self._section}: {what}: {why}" if self._section else why
        if line not in self.skipped:
            self.skipped.append(line)

    def fits(self, what: str, seconds: float = 0.0) -> bool:
        """Whether there is time for something that takes so long; if not, it is listed."""
        if self.left > seconds:
            return True
        self.skip(what)
        return False

    def run(self, sections: list[Section], after: Callable[[], None]) -> None:
        """Runs sections in turn, `after` behind each; what raises loses its section only."""
        last = self._start + self.total
        for section in sections:
            self._section = section.name
            self._end = min(last, self.clock() + section.seconds)
            if self.left <= 0:
                self.skip("all of it")
                continue
            start = self.clock()
            try:
                section.run()
            except Exception as error:
                from benches.gpu.device import brief

                self.skip("the rest of it", brief(error))
                self.failed.append(f"{section.name}: {brief(error)}")
            self.took[section.name] = round(self.clock() - start, 1)
            after()
        self._section, self._end = "", last

    @contextmanager
    def at_most(self, seconds: float) -> Iterator[None]:
        """Within the block `OutOfTimeError` is raised after so many seconds, or the section's."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def stop(number: int, frame: FrameType | None) -> None:
            raise OutOfTimeError(f"not done in {round(limit, 1):g} s")

        limit = max(0.01, min(seconds, self.left))
        before = signal.signal(signal.SIGALRM, stop)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
