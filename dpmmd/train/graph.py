"""A whole step as a CUDA graph: where it can be one, how it is captured, what stands against it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpmmd import _capture
from dpmmd._capture import CaptureError
from dpmmd.distributed import Team
from dpmmd.generators import ConvGenerator, DCGANGenerator, ResNetGenerator
from dpmmd.recipe import TrainSection
from dpmmd.train.state import State, Task, adam, take_over
from dpmmd.train.step import Stepper


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
    elif device.type not in _capture.GRAPHED_ON:
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
    try:
        graphed.capture()
        return graphed
    except CaptureError as error:
        why = str(error)
        if task.settings.graph:
            raise RuntimeError(
                f"settings.graph=True: a step cannot be a CUDA graph ({why}). Leave "
                "nothing of the generator's forward pass to the host, or leave graph out."
            ) from error
    moved = state.optimizer.state_dict()
    state.optimizer = adam(state.generator, task.settings, task.team.device, graphed=False)
    take_over(state.optimizer, moved)
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

    def capture(self) -> None:
        """Records `_work`; warming up leaves no trace.

        Raises:
            CaptureError: it cannot be a graph.
        """
        generator, forget = self.state.generator, _trace(self.state)
        watched = None if _is_ours(generator) else generator
        self._replay = _capture.recorded(self._work, self.z.device, forget, watched)


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


def _trace(state: State) -> Callable[[], None]:
    """What sets back everything that steps move, in place, but torch's random states."""
    generator, averaged, optimizer = state.generator, state.averaged.module, state.optimizer
    tensors = _capture.traced(
        [
            *generator.parameters(),
            *generator.buffers(),
            *averaged.parameters(),
            *averaged.buffers(),
            *state.estimate().values(),
        ]
    )
    moments = {p: {k: v.clone() for k, v in optimizer.state[p].items()} for p in optimizer.state}

    @torch.no_grad()
    def forget() -> None:
        tensors()
        for p, values in optimizer.state.items():
            for key, tensor in values.items():
                tensor.copy_(moments[p][key] if p in moments else torch.zeros_like(tensor))
        optimizer.zero_grad(set_to_none=True)

    return forget
