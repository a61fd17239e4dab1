"""Times variants in turn and keeps the rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

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
        ready: dict[str, tuple[Call, int, str, str]] = {}
        notes: dict[str, str] = {}
        estimates: dict[str, float] = {}
        for variant, calls in variants.items():
            if self.budget.left <= 0:
                notes[variant] = "no time left"
                continue
            try:
                with self.budget.at_most(limit):
                    call, count, how, note, estimates[variant] = self._prepare(
                        calls, variant in graph
                    )
                ready[variant] = (call, count, how, note)
            except OutOfTimeError as error:
                notes[variant] = str(error)
            except torch.OutOfMemoryError:
                notes[variant] = "out of memory"
                self.device.free()
            except Exception as error:
                notes[variant] = brief(error)
                if variant not in theirs:
                    self.errors.append(f"{name}, {variant}: {brief(error)}")
        whole = sum(estimates.values())
        least, most = self.rounds
        rounds = min(max(int(min(self.seconds, self.budget.left) / max(whole, 1e-9)), least), most)
        times: dict[str, list[float]] = {variant: [] for variant in ready}
        for done in range(rounds if ready else 0):
            if done >= FEWEST and self.budget.left <= 0:
                break
            for variant, (call, count, _, _) in ready.items():
                times[variant].append(self.device.seconds(call) / count)
        for variant in variants:
            if variant not in ready:
                self.keep(Row(operation, shape, dtype, variant, note=notes[variant]))
                continue
            _, _, how, note = ready[variant]
            self.keep(
                Row(
                    operation,
                    shape,
                    dtype,
                    variant,
                    statistics.median(times[variant]),
                    min(times[variant]),
                    len(times[variant]),
                    how,
                    min_bytes,
                    (peaks or {}).get(variant),
                    items,
                    note,
                )
            )

    def _prepare(self, calls: Sequence[Call], graph: bool) -> tuple[Call, int, str, str, float]:
        """Warms a variant up; what is timed, how many calls it is, how, a note, and its time."""

        def once() -> None:
            for call in calls:
                call()

        once()
        seconds = max(self.device.seconds(once), 1e-9)
        if not graph:
            return once, len(calls), "launches", "", seconds
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
            return once, len(calls), "launches", f"no graph: {error}", seconds
        return replay, repeats * len(calls), "graph", "", seconds

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
