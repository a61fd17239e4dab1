"""Freed memory stays with the process while a stage runs: its steps then fault in no pages."""

from __future__ import annotations

import ctypes
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of <malloc.h>


def keep_freed_memory() -> None:
    """Tells glibc to take large blocks from the heap and to return none to the system.

    By default every tensor above a size is mapped anew, and the kernel clears its pages one by one
    as they are first written: a fifth of a training step on a CPU. For a process whose steps ask
    for the same blocks again and again; the command line calls it. In a program of your own the
    environment variables MALLOC_MMAP_MAX_=0 and MALLOC_TRIM_THRESHOLD_=-1 do the same. Elsewhere
    than on glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def return_freed_memory() -> None:
    """Gives what is free back to the system, between stages that ask for other blocks."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
