"""A whole step as a CUDA graph."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from dpmmd.distributed import Team
from dpmmd.generators import ConvGenerator, DCGANGenerator, ResNetGenerator
from dpmmd.recipe import TrainSection

_GRAPHED_ON = ("cuda",)


def is_graphed(
    settings: TrainSection,
    device: torch.device,
    team: Team | None = None,
    generator: nn.Module | None = None,
) -> bool:
    """Whether a step is to be a CUDA graph: if asked for, or with a generator of the package's.

    Of another generator it cannot be known what it leaves to the host, which replays leave out.

    Args:
        generator: None, or one of the caller's.

    Raises:
        ValueError: ``settings.graph`` is True where it cannot be.
    """
    if team is not None and team.group is not None:
        why = (
            f"with {team.size} processes: a graph holds the step of one process alone; leave graph "
            "out, or train in one process."
        )
    elif device.type not in _GRAPHED_ON:
        why = (
            f"with the encoder on {device}: only CUDA devices have graphs; move the encoder there, "
            "or leave graph out."
        )
    elif settings.memory is not None:
        why = (
            f"with settings.memory={settings.memory!r}: micro-batches are cut on the host, which a "
            "graph leaves out; choose one of the two."
        )
    else:
        return is_ours(generator) if settings.graph is None else settings.graph
    if settings.graph:
        raise ValueError(f"settings.graph=True {why}")
    return False


def is_ours(generator: nn.Module | None) -> bool:
    return generator is None or type(generator) in (ConvGenerator, DCGANGenerator, ResNetGenerator)


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


def warm_up(work: Callable[[], None], device: torch.device, steps: int) -> None:
    """Runs steps on a side stream: libraries choose kernels and allocate then."""
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with warnings.catch_warnings(), torch.cuda.stream(side):
        warnings.filterwarnings("ignore", "This instance was constructed with capturable=True")
        for _ in range(steps):
            work()
    torch.cuda.current_stream(device).wait_stream(side)


@contextlib.contextmanager
def waiting_refused(device: torch.device) -> Iterator[None]:
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


def record(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Captures a step in a CUDA graph, without running it; returns what runs it."""
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
