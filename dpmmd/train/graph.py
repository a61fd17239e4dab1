"""A whole step as a CUDA graph: where it can be one, how it is captured, what stands against it."""

from __future__ import annotations

import contextlib
import random
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpmmd.distributed import Team
from dpmmd.errors import first_line
from dpmmd.generators import ConvGenerator, DCGANGenerator, ResNetGenerator
from dpmmd.recipe import TrainSection
from dpmmd.train.state import State, Task, adam, take_over
from dpmmd.train.step import Stepper

_GRAPHED_ON = ("cuda",)
_WARM_UP_STEPS = 3


def is_graphed(
    settings: TrainSection,
    device: torch.device,
    team: Team | None = None,
    generator: nn.Module | None = None,
    *,
    planned: bool = False,
) -> bool:
    """Whether a step is to be a CUDA graph: if asked for, or with a generator of the package's.

    Of another generator it cannot be known what it leaves to the host, which replays leave out.

    Args:
        generator: None, or one of the caller's.
        planned: whether a memory plan is given, instead of ``settings.memory``.

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
    elif planned or settings.memory is not None:
        given = "a plan" if planned else f"settings.memory={settings.memory!r}"
        why = (
            f"with {given}: micro-batches are cut on the host, which a graph leaves out; choose "
            "one of the two."
        )
    else:
        return _is_ours(generator) if settings.graph is None else settings.graph
    if settings.graph:
        raise ValueError(f"settings.graph=True {why}")
    return False


def _is_ours(generator: nn.Module | None) -> bool:
    return generator is None or type(generator) in (ConvGenerator, DCGANGenerator, ResNetGenerator)


def graphed_stepper(task: Task, state: State, model: nn.Module) -> Stepper:
    """A stepper that replays one graph.

    Where it was not asked for and cannot be, an ordinary one with an ordinary Adam, and a warning.

    Raises:
        RuntimeError: it was asked for and cannot be.
    """
    graphed = GraphedStepper(task, state, model)
    error = graphed.capture()
    if error is None:
        return graphed
    why = _reason(error)
    if task.settings.graph:
        raise RuntimeError(
            f"settings.graph=True: a step cannot be a CUDA graph ({why}). Leave "
            "nothing of the generator's forward pass to the host, or leave graph out."
        ) from error
    moved = state.optimizer.state_dict()
    state.optimizer = adam(state.generator, task.settings, task.team.device, graphed=False)
    take_over(state.optimizer, moved)
    state.loss.inject = bool(task.settings.inject)
    warnings.warn(
        f"settings.graph: a step cannot be a CUDA graph ({why}). Its kernels are launched one "
        "by one, with the same result, but it may take several times as long; graph=False "
        "silences this.",
        RuntimeWarning,
        stacklevel=2,
    )
    return Stepper(task, state, model)


class GraphedStepper(Stepper):
    """Steps whose work is one graph, once it is captured.

    Of a generator of the package's the graph leaves out what the host can do: the counters of batch
    norms, and a look for images that are not in [0, 1], where a sigmoid has none but those that are
    not a number.
    """

    def __init__(self, task: Task, state: State, model: nn.Module) -> None:
        super().__init__(task, state, model)
        self.ours = _is_ours(state.generator)
        modules = [state.generator, state.averaged.module]
        if not self.ours or task.settings.compile:  # compiled modules count inside
            modules = []
        self.norms = [_counting(module) for module in modules]
        self.counters = [_counters(norms) for norms in self.norms]
        self.images = torch.zeros(())  # of the last step, where the graph has them

    def check(self) -> None:
        if self.ours and bool(self.images.sum().isnan()):
            raise ValueError(
                f"step {self.state.step}: the generator's images are not numbers: training has "
                "diverged. Take a lower train.lr, and train in another folder or remove the last "
                "checkpoint; it costs no privacy."
            )

    def _run(self) -> None:
        self._replay()
        self.state.averaged.n_averaged += 1
        if self.counters:
            own, averaged = self.counters
            torch._foreach_add_(own, 1)
            torch._foreach_copy_(averaged, own)

    def _work(self) -> None:
        encoder = self.state.loss.encoder
        with _counted_elsewhere([norm for norms in self.norms for norm in norms]):
            encoder._range_known = self.ours
            try:
                super()._work()
            finally:
                encoder._range_known = False

    def _generated(self) -> Tensor:
        images = super()._generated()
        self.images = images.detach()
        return images

    def _average(self) -> None:
        self.state.averaged.update_on_device(self.state.generator)

    def capture(self) -> Exception | None:
        """Records `_work`; warming up leaves no trace. Returns why it cannot be done."""
        device, generator = self.z.device, self.state.generator
        forget, before = _trace(self.state), _state_of_host(generator)
        drawing = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with drawing, _kernels_searched():
            warm_up(self._work, device, _WARM_UP_STEPS)
            try:
                if not _is_ours(generator):
                    self._rehearse(device, before)
                forget()
                self._replay = record(self._work, device)
            except Exception as error:
                forget()
                return error
        return None

    def _rehearse(self, device: torch.device, before: Mapping[Any, Any]) -> None:
        """One more step, which raises a RuntimeError if the host takes part in it.

        A replay would leave the host's part out: what it waits for cannot be captured, and what it
        counts, assigns or draws would stay as it was, without an error.

        Args:
            before: `_state_of_host` before the warm-up.
        """
        with _waiting_refused(device):
            warm_up(self._work, device, 1)
        now = _state_of_host(self.state.generator)
        for key in now.keys() | before.keys():
            if now.get(key) != before.get(key):
                raise RuntimeError(f"a forward pass changes {key[0]}")


def _counting(module: nn.Module) -> list[_BatchNorm]:
    """The batch norms that count batches without reading how many there were."""
    return [
        norm
        for norm in module.modules()
        if isinstance(norm, _BatchNorm)
        and norm.num_batches_tracked is not None
        and norm.momentum is not None
    ]


def _counters(norms: Sequence[_BatchNorm]) -> list[Tensor]:
    return [n for norm in norms if (n := norm.num_batches_tracked) is not None]


@contextlib.contextmanager
def _counted_elsewhere(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Within the block the norms count on the host, for nothing."""
    held = _counters(norms)
    for norm in norms:
        norm.num_batches_tracked = torch.zeros((), dtype=torch.int64)
    try:
        yield
    finally:
        for norm, counter in zip(norms, held, strict=True):
            norm.num_batches_tracked = counter


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


def _trace(state: State) -> Callable[[], None]:
    """What sets back everything that steps move, in place, but torch's random states."""
    generator, averaged, optimizer = state.generator, state.averaged.module, state.optimizer
    held = [
        *generator.parameters(),
        *generator.buffers(),
        *averaged.parameters(),
        *averaged.buffers(),
        *state.estimate().values(),
    ]
    before = [t.detach().clone() for t in held]
    moments = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in optimizer.state}
    drawn = random.getstate(), np.random.get_state()  # noqa: NPY002

    @torch.no_grad()
    def forget() -> None:
        for tensor, value in zip(held, before, strict=True):
            tensor.copy_(value)
        for p, values in optimizer.state.items():
            for key, tensor in values.items():
                tensor.copy_(moments[p][key] if p in moments else torch.zeros_like(tensor))
        optimizer.zero_grad(set_to_none=True)
        random.setstate(drawn[0])
        np.random.set_state(drawn[1])  # noqa: NPY002

    return forget


def _state_of_host(module: nn.Module) -> dict[tuple[str, int], Any]:
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
