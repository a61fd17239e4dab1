"""Times variants in turn and keeps the rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch

from benches.gpu.budget import Budget, OutOfTimeError
from benches.gpu.device import NoGraph, brief

GRAPH_SECONDS = 1e-3  # that a replay should take at least
FEWEST = 3  # rounds, even where the time is over
CACHES = 3  # sets of inputs together exceed the L2 so many times

Call = Callable[[], Any]


@dataclass(frozen=True)
class Row:
    """One variant of one operation on one shape.

    Attributes:
        operation, shape, dtype: what is computed on what.
        variant: a backend of the library, "eager", "compile", or what else it is.
        seconds, fastest: median and least over the rounds, of one call.
        rounds: how many.
        how: "graph" (replays) or "launches".
        bytes: the fewest that the operation must move; None where memory is not what bounds it.
        peak_bytes: the most memory that tensors had, less what others' tensors had before.
        items: images a call, where throughput is what matters.
        note: why there is no time, or no graph.
    """

    operation: str
    shape: str
    dtype: str
    variant: str
    seconds: float | None = None
    fastest: float | None = None
    rounds: int = 0
    how: str = ""
    bytes: int | None = None
    peak_bytes: int | None = None
    items: int | None = None
    note: str = ""


class _Ready(NamedTuple):
    """A variant that is warm: what is timed, how many calls that is, how, a note, and its time."""

    run: Call
    calls: int
    how: str
    note: str
    seconds: float


class Measure:
    """What sections call: times variants, each over as many sets of inputs, and keeps the rows.

    Args:
        device: a `Cuda` or what has its methods.
        budget: how much time there is.
        rounds: fewest and most a measurement.
        seconds: that the rounds of one measurement take in all, if more than the fewest.
    """

    def __init__(
        self,
        device: Any,
        budget: Budget,
        rounds: tuple[int, int] = (10, 50),
        seconds: float = 0.5,
    ) -> None:
        self.device, self.budget, self.rounds, self.seconds = device, budget, rounds, seconds
        self.rows: list[dict[str, Any]] = []
        self.errors: list[str] = []  # of the library's own variants

    def __call__(
        self,
        operation: str,
        shape: str,
        dtype: str,
        variants: Mapping[str, Sequence[Call]],
        *,
        min_bytes: int | None = None,
        graph: Container[str] = (),
        theirs: Sequence[str] = (),
        items: int | None = None,
        peaks: Mapping[str, int | None] | None = None,
        limit: float = 60.0,
    ) -> None:
        """Times variants in turn.

        Args:
            operation, shape, dtype, min_bytes, items: see `Row`.
            variants: name -> one call for each set of inputs.
            graph: variants that are captured and replayed, since launching them takes the host
                longer than the device; launched nevertheless if they cannot be captured.
            theirs: variants that are not the library's; if one fails, that is no error of ours.
            peaks: name -> peak_bytes.
            limit: seconds that a variant may take to get going (compile) before it is left out.
        """
        name = f"{operation}, {shape}, {dtype}"
        if not self.budget.fits(name):
            return
        ready: dict[str, _Ready] = {}
        notes: dict[str, str] = {}
        for variant, calls in variants.items():
            try:
                ready[variant] = self._prepared(calls, variant in graph, limit)
            except (OutOfTimeError, torch.OutOfMemoryError) as error:
                memory = isinstance(error, torch.OutOfMemoryError)
                notes[variant] = "out of memory" if memory else str(error)
                self.device.free()
            except Exception as error:
                notes[variant] = brief(error)
                if variant not in theirs:
                    self.errors.append(f"{name}, {variant}: {brief(error)}")
        times = self._times(ready)
        for variant in variants:
            row = Row(operation, shape, dtype, variant)
            if variant not in ready:
                self.keep(replace(row, note=notes[variant]))
                continue
            self.keep(
                replace(
                    row,
                    seconds=statistics.median(times[variant]),
                    fastest=min(times[variant]),
                    rounds=len(times[variant]),
                    how=ready[variant].how,
                    bytes=min_bytes,
                    peak_bytes=(peaks or {}).get(variant),
                    items=items,
                    note=ready[variant].note,
                )
            )

    def _times(self, ready: Mapping[str, _Ready]) -> dict[str, list[float]]:
        """Of a call of each variant, in rounds of all of them."""
        whole = sum(variant.seconds for variant in ready.values())
        least, most = self.rounds
        rounds = min(max(int(min(self.seconds, self.budget.left) / max(whole, 1e-9)), least), most)
        times: dict[str, list[float]] = {name: [] for name in ready}
        for done in range(rounds if ready else 0):
            if done >= FEWEST and self.budget.left <= 0:
                break
            for name, variant in ready.items():
                times[name].append(self.device.seconds(variant.run) / variant.calls)
        return times

    def _prepared(self, calls: Sequence[Call], graph: bool, limit: float) -> _Ready:
        if self.budget.left <= 0:
            raise OutOfTimeError("no time left")
        with self.budget.at_most(limit):
            return self._prepare(calls, graph)

    def _prepare(self, calls: Sequence[Call], graph: bool) -> _Ready:
        """Warms a variant up."""

        def once() -> None:
            for call in calls:
                call()

        once()
        seconds = max(self.device.seconds(once), 1e-9)
        if not graph:
            return _Ready(once, len(calls), "launches", "", seconds)
        repeats = max(1, int(GRAPH_SECONDS / seconds))

        def many() -> None:
            for _ in range(repeats):
                once()

        try:
            replay, seconds = self._captured(many)
            if seconds < GRAPH_SECONDS / 2:  # what was launched took the host's time
                repeats = math.ceil(repeats * GRAPH_SECONDS / seconds)
                replay, seconds = self._captured(many)
        except NoGraph as error:
            return _Ready(once, len(calls), "launches", f"no graph: {error}", seconds)
        return _Ready(replay, repeats * len(calls), "graph", "", seconds)

    def _captured(self, run: Call) -> tuple[Call, float]:
        """A graph, and the time of a replay: of the second, for the first one uploads it."""
        replay = self.device.capture(run)
        replay()
        return replay, max(self.device.seconds(replay), 1e-9)

    def keep(self, row: Row) -> None:
        self.rows.append(asdict(row))


def sets_of(size: int, cache: int) -> int:
    """How many sets of inputs of so many bytes it takes to exceed the cache `CACHES` times."""
    return max(1, -(-CACHES * cache // max(size, 1)))
