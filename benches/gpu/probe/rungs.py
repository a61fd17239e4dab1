"""Measures variants of what a GPU does, each built when it is its turn and given up after it."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import Any

import torch

from benches.gpu.budget import Budget
from benches.gpu.device import brief
from benches.gpu.measure import Call, Measure, Row
from benches.gpu.probe.sizes import Size, Sizes
from benches.gpu.probe.variants import How

LIMIT = 30.0  # seconds that a variant may take to get going


class Rungs:
    """What the sections of a probe call.

    A variant that raises, has no memory or takes too long is a row with a note; the rest goes on.

    Args:
        device: a `Cuda` or what has its methods.
        budget: how much time there is.
        sizes: on what it runs.
        cores: backends of the library that run here, plain torch not among them.

    Attributes:
        rows, errors: see `Measure`.
        chosen: by size, the fastest way to do a step that was found.
        networks: by size, what `step.network_of` made.
        kernels: by the name of a step, what a profile has of its kernels.
    """

    def __init__(self, device: Any, budget: Budget, sizes: Sizes, cores: list[str]) -> None:
        self.device, self.budget, self.sizes, self.cores = device, budget, sizes, cores
        self.measure = Measure(device, budget, sizes.rounds, sizes.seconds)
        self.rows, self.errors = self.measure.rows, self.measure.errors
        self.chosen: dict[Size, How] = {}
        self.networks: dict[Size, Any] = {}
        self.kernels: dict[str, list[tuple[str, float, float]]] = {}
        self._searching = ThreadPoolExecutor(1, "searching")

    def __call__(
        self,
        operation: str,
        shape: str,
        dtype: str,
        variants: Mapping[str, Callable[[], Call]],
        *,
        graph: bool = True,
        theirs: bool = False,
        searched: bool = False,
        least: int | None = None,
        limit: float = LIMIT,
        **more: Any,
    ) -> dict[str, float]:
        """Seconds of a call of each variant, timed in turn; without those that have none.

        Args:
            operation, shape, dtype: see `measure.Row`.
            variants: name -> what builds the call.
            graph: whether they are replayed as CUDA graphs.
            theirs: whether they are not the library's, so that a failure is no error of ours.
            searched: whether cuDNN times its algorithms, see `search`.
            least: the fewest bytes that a call must move.
            limit: seconds that a variant may take to get going; a search has none.
            more: what else the rows hold.
        """
        found = len(self.rows)

        def timed() -> None:
            self.measure(
                operation,
                shape,
                dtype,
                {name: [built(make)] for name, make in variants.items()},
                min_bytes=least,
                graph=tuple(variants) if graph else (),
                theirs=tuple(variants) if theirs else (),
                limit=limit,
            )

        if searched:
            self.search(timed)
        else:
            timed()
        self.device.free()
        for row in self.rows[found:]:
            row.update(more)
        return {row["variant"]: row["seconds"] for row in self.rows[found:] if row["seconds"]}

    def settle(self) -> None:
        """Says that what is there now stays.

        Memory is given back after each variant, and looking for what has no owner through all that
        was imported takes longer than a variant.
        """
        gc.collect()
        gc.freeze()

    def host(self, operation: str, shape: str, variant: str, make: Callable[[], Call]) -> None:
        """Keeps the host's time of a launched call, for which the device has less to do."""
        if not self.budget.fits(f"{operation}, {shape}, {variant}"):
            return
        row: dict[str, Any] = {"how": "host"}
        try:
            with self.budget.at_most(LIMIT):
                times = self._host_times(make())
            row |= {"seconds": statistics.median(times), "fastest": min(times)}
            row["rounds"] = len(times)
        except Exception as error:
            row["note"] = brief(error)
            self.errors.append(f"{operation}, {shape}, {variant}: {brief(error)}")
        self.measure.keep(Row(operation, shape, "", variant, **row))

    def _host_times(self, call: Call) -> list[float]:
        for _ in range(min(20, self.sizes.repeats)):
            call()
        times = []
        for index in range(self.sizes.repeats):
            if index % 20 == 0:  # the queue of the device never fills up
                self.device.synchronize()
            start = perf_counter()
            call()
            times.append(perf_counter() - start)
        return times

    def search(self, work: Callable[[], None]) -> None:
        """Runs work where cuDNN times its algorithms and takes the fastest.

        PyTorch keeps one algorithm a shape and thread. It takes that one whatever
        `torch.backends.cudnn.benchmark` says, so that after a step without a search a search would
        change nothing. Hence a thread of its own, in which backward runs too.
        """

        def run() -> None:
            before = torch.backends.cudnn.benchmark
            torch.backends.cudnn.benchmark = True
            try:
                with torch.autograd.set_multithreading_enabled(False):
                    work()
            finally:
                torch.backends.cudnn.benchmark = before

        self._searching.submit(run).result()


def built(make: Callable[[], Call]) -> Call:
    """A call that is made when it first runs, so that what building raises is a variant's too."""
    made: list[Call] = []

    def call() -> Any:
        if not made:
            made.append(make())
        return made[0]()

    return call
