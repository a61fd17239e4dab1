"""All that touches CUDA: events, graphs, memory statistics, the card. A CPU for dry runs."""

from __future__ import annotations

import gc
import os
import platform
import re
import subprocess
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from benches.gpu import ambient

_COMMIT = ("--always", "--exclude=*", "--abbrev=7", "--dirty=-changed")
GRAPH = "graph"  # the operation of a check that a CUDA graph holds a step


class NoGraph(RuntimeError):
    """A function that cannot be captured, and why."""


class Cuda:
    """The current CUDA device, as it is found: nothing of its settings is changed."""

    dry = False

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        found = torch.cuda.get_device_properties(self.device)
        self.cache_bytes = int(found.L2_cache_size)
        self.memory_bytes = int(found.total_memory)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], Any]) -> float:
        """Of the device's time, from before the first to after the last of the call's kernels."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        """A function that replays what `run` does as a CUDA graph and returns its (same) result.

        Raises:
            NoGraph: it cannot be captured.
        """
        from dpmmd import backends

        with backends.captured() as held:
            graph, result = self._captured(run)

        def replay() -> Any:
            graph.replay()
            return result

        replay.held = held  # type: ignore[attr-defined]  # what it reads of the library's caches
        return replay

    def _captured(self, run: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                result = run()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self.synchronize()
            raise NoGraph(brief(error)) from error
        return graph, result

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak(self, run: Callable[[], Any]) -> int:
        """The most memory that tensors had while `run` ran."""
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device)

    def free(self) -> None:
        """Gives memory without an owner back."""
        gc.collect()
        torch.cuda.empty_cache()

    def describe(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(self.device)
        return {
            "gpu": found.name,
            "capability": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "memory_gb": round(found.total_memory / 1e9),
            "l2_mb": round(self.cache_bytes / 1e6),
            "driver": _driver(),
            "cuda": torch.version.cuda or "",
            **_software(),
        }


class Host:
    """A CPU in the place of the device: a wall clock, no graphs, no memory statistics."""

    dry = True

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.cache_bytes = 0
        self.memory_bytes = 1 << 30

    def synchronize(self) -> None:
        pass

    def seconds(self, run: Callable[[], Any]) -> float:
        start = perf_counter()
        run()
        return perf_counter() - start

    def capture(self, run: Callable[[], Any]) -> Callable[[], Any]:
        raise NoGraph("a CPU has no CUDA graphs")

    def allocated(self) -> int:
        return 0

    def peak(self, run: Callable[[], Any]) -> int | None:
        run()
        return None

    def free(self) -> None:
        gc.collect()

    def describe(self) -> dict[str, Any]:
        return {"gpu": "none, a dry run on a CPU", "dry_run": True, **_software()}


def brief(error: BaseException) -> str:
    """An error on one line, without the names of places on this machine."""
    text = " ".join(str(error).split()) or type(error).__name__
    text = text.replace(str(ambient.ROOT), ".").replace(os.path.expanduser("~"), "~")
    text = re.sub(r"(?<![\w.])/(?:[\w.+-]+/)+", "", text)
    return f"{type(error).__name__}: {text}"[:200]


def _software() -> dict[str, str]:
    return {
        "commit": _said(["git", "-C", str(ambient.ROOT), "describe", *_COMMIT]),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
    }


def _version(package: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _driver() -> str:
    return _said(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])


def _said(command: list[str]) -> str:
    """The first word that a program prints; "" where there is no such program, or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (done.stdout.split() or [""])[0] if done.returncode == 0 else ""
