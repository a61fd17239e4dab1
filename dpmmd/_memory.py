"""What the allocator does with freed memory, and how much this process uses."""

from __future__ import annotations

import ctypes
import gc
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `dpmmd --help` need not import it
    import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of <malloc.h>


def keep_freed_memory() -> None:
    """Tells glibc to take large blocks from the heap and to return none to the system.

    By default every tensor above a size is mapped anew, and the kernel clears its pages one by one
    as they are first written: a fifth of a training step on a CPU. For a process whose steps ask
    for the same blocks again and again; the command line calls it. In a program of your own the
    environment variables MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=-1 do the same. Gradients
    come from the heap too: blocks of their own would only add to it. Elsewhere than on glibc
    nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        _keep_blocks(False)
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Gives what is free back to the system, between stages that ask for other blocks.

    That includes the memory of a loss's gradients, which otherwise stays after the last backward
    pass on the CPU (`dpmmd._cores.blocks`).
    """
    if (native := _native()) is not None:
        native.return_blocks()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def return_memory_at_once() -> None:
    """Tells glibc to map every large block by itself and to unmap it when it is freed.

    Resident memory is then the sum of the tensors that are alive. By default, and more so after
    `keep_freed_memory`, the blocks of a step leave holes that others do not fit into: two to three
    times as much. The price is that pages are cleared again.
    """
    _keep_blocks(False)
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 65536)
        libc.mallopt(_M_MMAP_THRESHOLD, 1 << 17)
        libc.mallopt(_M_TRIM_THRESHOLD, 1 << 17)
        libc.malloc_trim(0)


def _keep_blocks(kept: bool) -> None:
    """Whether memory of gradients stays with the native core; it does at first."""
    if (native := _native()) is not None:
        native.keep_blocks(kept)


def _native() -> ModuleType | None:
    try:
        from dpmmd import _native
    except ImportError:  # a build without the extension
        return None
    return _native


def peak_memory() -> int | None:
    """The greatest resident memory of this process so far, in bytes; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


class Meter:
    """Memory in use: resident on the CPU (Linux), in tensors on a CUDA device.

    Raises:
        OSError: this system does not tell (only Linux does, for the CPU).
    """

    def __init__(self, device: torch.device) -> None:
        import torch

        self.device, self._cuda = device, torch.cuda
        if device.type != "cuda":
            if sys.platform != "linux":
                raise OSError("memory: only Linux tells how much a process uses; leave it out.")
            self._reset()

    def used(self) -> int:
        """Bytes now."""
        if self.device.type == "cuda":
            return self._cuda.memory_allocated(self.device)
        return _status("VmRSS")

    def free(self) -> int:
        """Bytes that this process could have besides."""
        if self.device.type == "cuda":
            cached = self._cuda.memory_reserved(self.device) - self.used()
            return self._cuda.mem_get_info(self.device)[0] + cached
        text = Path("/proc/meminfo").read_text()
        found = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
        available = int(found[1]) << 10 if found else 0
        try:  # a container's own limit
            group = Path("/sys/fs/cgroup")
            limit = int((group / "memory.max").read_text())  # "max": none
            return min(available, limit - int((group / "memory.current").read_text()))
        except (OSError, ValueError):
            return available

    def __call__(self, run: Callable[[], Any]) -> tuple[int, float, Any]:
        """Bytes at the highest while ``run`` runs, its seconds, and what it returns."""
        self.settle()
        self._reset()
        started = perf_counter()
        result = run()
        if self.device.type == "cuda":
            self._cuda.synchronize(self.device)
        return self.peak(), perf_counter() - started, result

    def settle(self) -> None:
        """Lets go of what nobody needs."""
        gc.collect(1)  # what measuring itself left; the oldest generation takes long
        if self.device.type == "cuda":
            self._cuda.synchronize(self.device)
        else:
            return_freed_memory()

    def peak(self) -> int:
        """Bytes at the highest since the last call began."""
        if self.device.type == "cuda":
            return self._cuda.max_memory_allocated(self.device)
        return _status("VmHWM")

    def _reset(self) -> None:
        if self.device.type == "cuda":
            self._cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS


def _status(key: str) -> int:
    text = Path("/proc/self/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB", text, re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {key}")
    return int(found[1]) << 10
