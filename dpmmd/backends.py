"""Which implementation runs an operation: by argument, context manager or environment variable.

``auto`` takes the fastest one available for the tensors at hand and may fall back; every explicit
choice runs as chosen or raises.

- ``"cpu"``: the native core (csrc/), for float32 and bfloat16 tensors on the CPU;
- ``"cuda"``: the CUDA core (csrc/cuda/), for float32 and bfloat16 tensors on a CUDA device of
  compute capability 8.0 or more, where dpmmd was installed with nvcc at hand. It needs no Triton
  and compiles nothing when it runs;
- ``"triton"``: the kernels in dpmmd.kernels, for the same tensors. Triton compiles them at their
  first launch, and needs a C compiler for that;
- ``"torch"``: plain PyTorch, for every floating dtype and device.

On a CUDA device ``auto`` decides by the table in `dpmmd._fastest`, which holds the measurements it
rests on: Triton's kernels for steps that become a CUDA graph (`captured`) and for launched ones
from 0.8 GB of features on, the CUDA core for smaller ones, and the other of the two where one is
missing.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch

from dpmmd._contract.capturing import captured as captured
from dpmmd._contract.capturing import is_captured
from dpmmd._contract.protocol import Core
from dpmmd._contract.taps import DTYPES
from dpmmd._cores import CORES, cpu, cuda, named, triton
from dpmmd._fastest import EMBEDDING, LARGE, check_operation, fastest

BACKENDS = ("auto", *CORES)
ENVIRONMENT_VARIABLE = "DPMMD_BACKEND"

_chosen: ContextVar[str | None] = ContextVar("dpmmd_backend", default=None)
_warned: set[str] = set()


def resolve(
    backend: str = "auto",
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    operation: str = EMBEDDING,
    size: int = 0,
    inject: bool = False,
) -> str:
    """The implementation that will run: ``"torch"``, ``"cpu"``, ``"triton"`` or ``"cuda"``.

    An argument other than ``"auto"`` wins, then `use`, then the variable DPMMD_BACKEND. Under
    torch.compile the choice is made once, when a graph is compiled.

    Args:
        backend: one of BACKENDS.
        device: type of the device that the tensors are on, e.g. ``"cpu"``.
        dtype: theirs.
        operation: ``"mean embedding"``, ``"estimator"`` or ``"integer sums"``.
        size: bytes of all features together.
        inject: whether it is to run with injection (`dpmmd.injection`).

    Raises:
        ValueError: the name is unknown to this build, an explicit choice cannot run, or there is no
            such operation.
    """
    check_operation(operation)
    origin, backend = requested(backend)
    if backend != "auto":
        named(backend).check(origin, device, dtype)
        return backend
    if dtype not in DTYPES or device not in ("cpu", "cuda"):
        return "torch"
    if device == "cuda":
        return fastest_on_cuda(operation, is_captured(), size >= LARGE, inject)[0]
    if cpu.missing is None:
        return "cpu"
    _warn_once(
        f"dpmmd._native did not load ({cpu.missing}): plain PyTorch runs in its place, "
        "many times slower. Install dpmmd with a C++ compiler at hand."
    )
    return "torch"


def core(backend: str, device: str, dtype: torch.dtype, **options: Any) -> Core:
    """The core that `resolve` names; options are its keywords."""
    return named(resolve(backend, device, dtype, **options))


# What torch.compiler.assume_constant_result does, whose import would take seconds: torch.compile
# runs the function while it traces, where it could not trace the context variables.
resolve._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


@lru_cache
def fastest_on_cuda(
    operation: str, capture: bool, large: bool, inject: bool | None
) -> tuple[str, bool]:
    """The fastest that runs on every CUDA device that is visible, and whether it injects."""
    found = fastest(operation, _present(), captured=capture, large=large, inject=inject)
    return found or ("torch", bool(inject))


def _present() -> tuple[str, ...]:
    """The cores that run on every CUDA device that is visible; warns if there is none."""
    for i in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(i)
        if (major, minor) < (8, 0):
            _warn_once(
                f"{torch.cuda.get_device_name(i)} (cuda:{i}) is of compute capability "
                f"{major}.{minor}, and the kernels need 8.0: plain PyTorch runs in their place, "
                "many times slower. Leave the device out with CUDA_VISIBLE_DEVICES if it is not "
                "the one you use."
            )
            return ()
    if not torch.cuda.device_count():
        return ()
    reasons = {"cuda": cuda.hindrance(), "triton": triton.hindrance()}
    if all(reasons.values()):
        _warn_once(
            f"no kernels for the GPU ({'; '.join(map(str, reasons.values()))}): plain PyTorch runs "
            "in their place, many times slower."
        )
    return tuple(name for name, reason in reasons.items() if reason is None)


def _warn_once(message: str) -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message, RuntimeWarning, stacklevel=6)


@contextmanager
def use(backend: str) -> Iterator[None]:
    """Within the block, calls with ``backend="auto"`` run ``backend``."""
    requested(backend)
    token = _chosen.set(backend)
    try:
        yield
    finally:
        _chosen.reset(token)
