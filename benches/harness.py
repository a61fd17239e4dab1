"""One measurement: variants of an operation, timed in turn within one process.

pytest-benchmark times the library's variant; in the untimed setup of each of its rounds every other
variant runs once and is timed by hand, so that all of them meet the same machine. A row of results
is one variant.
"""

from __future__ import annotations

import gc
import os
import platform
import re
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dpmmd._memory import return_freed_memory

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

Variant = Callable[[], Any]

BUDGET_SECONDS = 4.0  # of one measurement, all variants and rounds
ROUNDS = (5, 25)  # fewest, most
MEMORY_LIMIT = 6 << 30  # bytes; a variant expected to need more is left out
READ, COPY, READ_READ_WRITE = "read once", "copy", "two reads + one write"
FLOORS = (READ, COPY, READ_READ_WRITE)


@dataclass(frozen=True)
class Row:
    """One variant of one operation on one shape.

    Attributes:
        operation: what is computed.
        shape: n, K, moments, encoder and size, as text.
        dtype: of the features.
        variant: a backend of the library, "eager", "compile", a floor, or what else it is.
        ours: whether it is the library's choice, which the ratios are about.
        seconds, fastest: median and least over the rounds.
        rounds: how many.
        bytes: the fewest that the operation must move; None where memory is not what bounds it.
        error: relative L2 error against float64.
        peak_bytes: resident memory at its highest, over that before the call: outputs included.
        d_vectors: of peak_bytes what is neither features nor their gradients, in vectors of D
            float32 for each moment and class.
        note: why there is no time, if there is none.
    """

    operation: str
    shape: str
    dtype: str
    variant: str
    ours: bool
    seconds: float | None = None
    fastest: float | None = None
    rounds: int = 0
    bytes: int | None = None
    error: float | None = None
    peak_bytes: int | None = None
    d_vectors: float | None = None
    note: str = ""


class Measure:
    """What a benchmark calls, once: times variants and keeps the rows."""

    def __init__(self, benchmark: BenchmarkFixture, rows: list[dict[str, Any]]) -> None:
        self._benchmark, self._rows = benchmark, rows

    @property
    def smoke(self) -> bool:
        """Whether nothing is timed (--benchmark-disable): use small shapes and no compiler."""
        return not self._benchmark.enabled

    def __call__(
        self,
        operation: str,
        shape: str,
        variants: Mapping[str, Variant],
        *,
        ours: str,
        dtype: str = "float32",
        min_bytes: int | None = None,
        error: Callable[[Any], float] | None = None,
        left_out: Mapping[str, str] | None = None,
        gradient_bytes: int = 0,
        d_vector_bytes: int | None = None,
    ) -> Any:
        """Times the variants and returns what `ours` computed.

        Args:
            operation, shape, dtype: what the row is called.
            variants: name -> function without arguments.
            ours: the variant that pytest-benchmark times.
            min_bytes: see `Row`.
            error: of a variant's result, against float64; not asked of floors.
            left_out: name -> reason, for variants that do not run here.
            gradient_bytes: of the peak, what belongs to gradients of features.
            d_vector_bytes: moments * classes * D * 4, to express extra memory in.
        """
        others = {name: run for name, run in variants.items() if name != ours}
        if self.smoke:
            for run in others.values():
                run()
            return self._benchmark(variants[ours])

        rows, slowest = [], 0.0
        for name, run in variants.items():
            peak, wrong, seconds = _warm(run, error, isinstance(run, Floor))
            extra = None
            if peak is not None and d_vector_bytes is not None:
                extra = (peak - gradient_bytes) / d_vector_bytes
            moved = run.bytes if isinstance(run, Floor) else min_bytes
            measured = {"bytes": moved, "error": wrong, "peak_bytes": peak, "d_vectors": extra}
            rows.append(Row(operation, shape, dtype, name, name == ours, **measured))
            slowest += seconds
        gc.collect()
        rounds = min(max(int(BUDGET_SECONDS / slowest), ROUNDS[0]), ROUNDS[1])
        times: dict[str, list[float]] = {name: [] for name in others}

        def others_in_turn() -> None:
            for name, run in others.items():
                times[name].append(_seconds(run))

        result = self._benchmark.pedantic(variants[ours], setup=others_in_turn, rounds=rounds)
        times[ours] = list(self._benchmark.stats.stats.data)
        for row in rows:
            taken = times[row.variant]
            median, fastest = statistics.median(taken), min(taken)
            self._keep(replace(row, seconds=median, fastest=fastest, rounds=rounds))
        for name, reason in (left_out or {}).items():
            self._keep(Row(operation, shape, dtype, name, False, note=reason))
        return result

    def _keep(self, row: Row) -> None:
        record = asdict(row)
        self._rows.append(record)
        self._benchmark.extra_info.setdefault("variants", []).append(record)


def _seconds(run: Variant) -> float:
    start = perf_counter()
    run()
    return perf_counter() - start


def _warm(
    run: Variant, error: Callable[[Any], float] | None, floor: bool
) -> tuple[int | None, float | None, float]:
    """A variant's peak memory, its error, and the time of a call that is not the first."""
    peak = None if floor else peak_bytes(run)
    start = perf_counter()
    result = run()
    seconds = perf_counter() - start
    wrong = None if error is None or floor else error(result)
    del result
    if peak is not None and seconds < 1:  # the least of two: other threads allocate too
        peak = min(peak, peak_bytes(run) or peak)
    return peak, wrong, seconds


_READS: tuple[Callable[[Tensor], Tensor], ...] = (lambda f: torch.dot(f, f), torch.sum)


class Floor:
    """Moves the memory of tensors and does nothing else: the least time a pass can take."""

    def __init__(self, tensors: Sequence[Tensor], reads: int, writes: int) -> None:
        # As float32 whatever the dtype: nothing of torch reads faster.
        self._flat = [_memory(t) for t in tensors]
        self._out = [torch.zeros_like(f) for f in self._flat] if writes else []
        self._reads = reads - writes  # a copy reads as well
        self._read = min(_READS, key=self._least_seconds)
        self.bytes = (reads + writes) * sum(f.numel() * 4 for f in self._flat)

    def _least_seconds(self, read: Callable[[Tensor], Tensor]) -> float:
        return min(_seconds(lambda: [read(f) for f in self._flat]) for _ in range(5))

    def __call__(self) -> None:
        for _ in range(self._reads):
            for f in self._flat:
                self._read(f)
        for out, f in zip(self._out, self._flat, strict=False):
            out.copy_(f)


def floors(features: Sequence[Tensor], *, backward: bool = False) -> dict[str, Floor]:
    """Reading the features once, copying them and, for backward, reading twice and writing once."""
    wanted = {READ: Floor(features, 1, 0), COPY: Floor(features, 1, 1)}
    if backward:
        wanted[READ_READ_WRITE] = Floor(features, 2, 1)
    return wanted


def _memory(t: Tensor) -> Tensor:
    t = t.detach()
    t = t.permute(0, 2, 3, 1) if t.ndim == 4 else t
    return t.reshape(-1).view(torch.float32) if t.numel() % 2 == 0 else t.reshape(-1).float()


def peak_bytes(run: Variant) -> int | None:
    """Resident memory at its highest during one call, over that before it; None if unknown."""
    gc.collect()
    try:
        return_freed_memory()  # or memory that was freed before hides use
        before = _status("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
    except OSError:
        return None
    result = run()
    peak = _status("VmHWM")
    del result
    return max(0, peak - before)


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found[1]) * 1024


def machine() -> dict[str, Any]:
    """What the figures depend on: no name, no address, no path.

    "load" is the mean number of processes that ran or waited in the last minute: before a run it is
    what others do to the figures.
    """
    model = platform.machine()
    if sys.platform == "linux":
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        model = found[1].strip() if found else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "freed_memory": "kept" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "returned",
        "load": round(os.getloadavg()[0], 2),
    }


def kind(machine: Mapping[str, Any]) -> str:
    """A short name for machines like this one, fit for a file name."""
    slug = re.sub(r"[^a-z0-9]+", "-", machine["cpu"].lower()).strip("-")
    kept = "-memory-kept" if machine["freed_memory"] == "kept" else ""
    return f"{slug}-{machine['cores']}-cores{kept}"


def relative_error(got: Sequence[Tensor], truth: Sequence[Tensor]) -> float:
    """L2 norm of the difference over that of the float64 truth."""
    wrong = sum(float((a.double() - b).square().sum()) for a, b in zip(got, truth, strict=True))
    norm = sum(float(b.square().sum()) for b in truth)
    return (wrong / norm) ** 0.5
