"""Which implementation runs an operation: by argument, context manager or environment variable.

``auto`` takes the fastest one available for the tensors at hand and may fall back; every explicit
choice runs as chosen or raises.

- ``"cpu"``: the native core (csrc/), for float32 and bfloat16 tensors on the CPU;
- ``"cuda"``: the CUDA core (csrc/cuda/), for float32 and bfloat16 tensors on a CUDA device of
  compute capability 8.0 or more, where dpmmd was installed with nvcc at hand. It needs no Triton
  and compiles nothing when it runs;
- ``"triton"``: the kernels in dpmmd.kernels, for the same tensors; ``auto`` takes them where there
  is no CUDA core. Triton compiles them at their first launch, and needs a C compiler for that;
- ``"torch"``: plain PyTorch, for every floating dtype and device.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

import torch

from dpmmd._contract.protocol import Core
from dpmmd._contract.taps import DTYPES
from dpmmd._cores import CORES, cpu, cuda, named

BACKENDS = ("auto", *CORES)
ENVIRONMENT_VARIABLE = "DPMMD_BACKEND"

_chosen: ContextVar[str | None] = ContextVar("dpmmd_backend", default=None)
_warned: set[str] = set()


def resolve(backend: str = "auto", device: str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """The implementation that will run: ``"torch"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    An argument other than ``"auto"`` wins, then `use`, then the variable DPMMD_BACKEND. Under
    torch.compile the choice is made once, when a graph is compiled.

    Args:
        backend: one of BACKENDS.
        device: type of the device that the tensors are on, e.g. ``"cpu"``.
        dtype: theirs.

    Raises:
        ValueError: the name is unknown to this build, or an explicit choice cannot run.
    """
    origin, backend = requested(backend)
    if backend != "auto":
        named(backend).check(origin, device, dtype)
        return backend
    if dtype not in DTYPES or device not in ("cpu", "cuda"):
        return "torch"
    if device == "cuda":
        return _on_cuda()
    if cpu.missing is None:
        return "cpu"
    _warn_once(
        f"dpmmd._native did not load ({cpu.missing}): plain PyTorch runs in its place, "
        "many times slower. Install dpmmd with a C++ compiler at hand."
    )
    return "torch"


# What torch.compiler.assume_constant_result does, whose import would take seconds: torch.compile
# runs the function while it traces, where it could not trace the context variable.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def core(backend: str, device: str, dtype: torch.dtype) -> Core:
    """The core that `resolve` names."""
    return named(resolve(backend, device, dtype))


def requested(backend: str) -> tuple[str, str]:
    """Where the choice comes from, and the choice, which this build has."""
    origin = "backend"
    if backend == "auto":
        inner = _chosen.get()
        if inner is not None:
            backend = inner
        elif ENVIRONMENT_VARIABLE in os.environ:
            backend, origin = os.environ[ENVIRONMENT_VARIABLE], ENVIRONMENT_VARIABLE
    if backend not in BACKENDS:
        raise ValueError(
            f"{origin}={backend!r}: this build has {', '.join(map(repr, BACKENDS))}. "
            "Use 'auto' to let the library choose."
        )
    return origin, backend


@lru_cache(maxsize=1)
def _on_cuda() -> str:
    """The fastest that runs on every CUDA device that is visible."""
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if (major, minor) < (8, 0):
            _warn_once(
                f"{torch.cuda.get_device_name(i)} (cuda:{i}) is of compute capability "
                f"{major}.{minor}, and the kernels need 8.0: plain PyTorch runs in their place, "
                "many times slower. Leave the device out with CUDA_VISIBLE_DEVICES if it is not "
                "the one you use."
            )
            return "torch"
    if not torch.cuda.device_count():
        return "torch"
    without_cuda = cuda.hindrance()
    if without_cuda is None:
        return "cuda"
    without_triton = triton_hindrance()
    if without_triton is None:
        return "triton"
    _warn_once(
        f"no kernels for the GPU ({without_cuda}; {without_triton}): plain PyTorch runs in "
        "their place, many times slower."
    )
    return "torch"


def triton_hindrance() -> str | None:
    """Why Triton's kernels cannot be compiled on this machine; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if not any(map(shutil.which, (os.environ.get("CC") or "cc", "gcc", "clang"))):
        return "Triton finds no C compiler"
    return None


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=5)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Within the block, calls with ``backend="auto"`` run ``backend``."""
    requested(backend)
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)
