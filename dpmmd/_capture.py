"""How work becomes a CUDA graph: warm-up, rehearsal and capture, none of which leaves a trace."""

from __future__ import annotations

import contextlib
import random
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dpmmd._contract.capturing import captured
from dpmmd.errors import first_line

GRAPHED_ON = ("cuda",)
_WARM_UP_STEPS = 3

Work = Callable[[], None]


class CaptureError(RuntimeError):
    """Work that cannot be a CUDA graph; the message is the reason."""


@dataclass(frozen=True, eq=False)
class Recording:
    """Work that is one graph; a call runs it.

    Attributes:
        replay: runs the graph.
        held: what the graph reads by its address, and nothing else keeps alive.
    """

    replay: Work
    held: list[object]

    def __call__(self) -> None:
        self.replay()


def recorded(
    work: Work, device: torch.device, forget: Work, watched: nn.Module | None = None
) -> Recording:
    """Captures work in a graph.

    Args:
        work: the same kernels each time, and no reads by the host.
        device: where it runs.
        forget: sets back, in place, everything that work moves, but torch's random states. It is
            called after the warm-up, and again if the capture fails.
        watched: a module of the caller's, whose part in the work may be the host's: a rehearsal
            looks for that. None: there is none.

    Raises:
        CaptureError: the work cannot be a graph; from the error that says so.
        Exception: whatever the first run of the work raises, which is no matter of graphs.
    """
    before = {} if watched is None else state_of_host(watched)
    devices = [device] if device.type == "cuda" else []
    with captured() as held, torch.random.fork_rng(devices=devices), _kernels_searched():
        try:
            warm_up(work, device, _WARM_UP_STEPS)
        except BaseException:
            forget()
            raise
        try:
            if watched is not None:
                _rehearse(work, device, watched, before)
            forget()
            return Recording(record(work, device), held)
        except Exception as error:
            forget()
            raise CaptureError(_reason(error)) from error


def _rehearse(
    work: Work, device: torch.device, watched: nn.Module, before: Mapping[Any, Any]
) -> None:
    """One more run, which raises a RuntimeError if the host takes part in it.

    A replay would leave the host's part out: what it waits for cannot be captured, and what it
    counts, assigns or draws would stay as it was, without an error.

    Args:
        before: `state_of_host` before the warm-up.
    """
    with _waiting_refused(device):
        warm_up(work, device, 1)
    now = state_of_host(watched)
    for key in now.keys() | before.keys():
        if now.get(key) != before.get(key):
            raise RuntimeError(f"a forward pass changes {key[0]}")


def traced(held: Iterable[Tensor]) -> Work:
    """What sets tensors back, in place, to what they are now, and the host's random states too."""
    tensors = list(held)
    before = [t.detach().clone() for t in tensors]
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002

    @torch.no_grad()
    def forget() -> None:
        for tensor, value in zip(tensors, before, strict=True):
            tensor.copy_(value)
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002

    return forget


def state_of_host(module: nn.Module) -> dict[tuple[str, int], Any]:
    """Attributes of the modules that are no tensors' values, and where random generators are.

    Of numbers, flags and strings the value, of parameters and buffers which they are.
    """
    numpy: dict[str, Any] = np.random.get_state(legacy=False)  # noqa: NPY002
    found: dict[tuple[str, int], Any] = {
        ("the host's random numbers: torch's", 0): torch.get_rng_state().tolist(),
        ("the host's random numbers: Python's", 0): random.getstate(),
        ("the host's random numbers: NumPy's", 0): numpy["state"]["key"].tobytes(),
        ("the host's random numbers: NumPy's", 1): numpy["state"]["pos"],
    }
    for part in module.modules():
        named = {**part._parameters, **part._buffers}
        held = {name: id(tensor) for name, tensor in named.items()}
        plain = {n: v for n, v in vars(part).items() if type(v) in (bool, int, float, str)}
        for name, value in {**plain, **held}.items():
            found[f"{type(part).__qualname__}.{name}", id(part)] = value
    return found


def _reason(error: BaseException) -> str:
    """The first error's first line, and where it was; others follow it when a capture ends."""
    while error.__context__ is not None:
        error = error.__context__
    text = first_line(error).rstrip(".")
    places = [p for p in traceback.extract_tb(error.__traceback__)[-1:] if p.filename != __file__]
    return ", ".join([text, *(f"{place.filename}:{place.lineno}" for place in places)])


def warm_up(work: Work, device: torch.device, steps: int) -> None:
    """Runs steps on a side stream: libraries choose kernels and allocate then."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with warnings.catch_warnings(), torch.cuda.stream(side):
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        for _ in range(steps):
            work()
    torch.cuda.current_stream(device).wait_stream(side)


@contextlib.contextmanager
def _kernels_searched() -> Iterator[None]:
    """Within the block cuDNN times its kernels for a shape that is new, and takes the fastest.

    Which one that is may differ from run to run: not where PyTorch is to be deterministic.
    """
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark
    fixed = torch.are_deterministic_algorithms_enabled() or cudnn.deterministic
    cudnn.benchmark = before or not fixed
    try:
        yield
    finally:
        cudnn.benchmark = before


@contextlib.contextmanager
def _waiting_refused(device: torch.device) -> Iterator[None]:
    """Within the block operations of PyTorch that wait for a GPU raise a RuntimeError."""
    if device.type != "cuda":
        yield
        return
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def record(work: Work, device: torch.device) -> Work:
    """Captures work in a CUDA graph, without running it; returns what runs it."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
    try:
        # A capture that fails leaves its stream the current one; the outer block does not.
        with torch.cuda.stream(stream), torch.cuda.graph(graph, stream=stream):
            work()
    except BaseException:
        torch.cuda.synchronize(device)
        # It also leaves the random generator as if it were going on; a copy of its state is not.
        generator = torch.cuda.default_generators[stream.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        raise
    return graph.replay
