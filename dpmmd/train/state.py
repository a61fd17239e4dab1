"""What is trained: what stays the same (`Task`), what steps move (`State`), what comes of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from dpmmd.distributed import Team
from dpmmd.nn import MMDLoss
from dpmmd.privacy.release_file import Release
from dpmmd.recipe import TrainSection
from dpmmd.train.plan import Limits
from dpmmd.train.sampling import IMAGES_PER_ROW, Mixture, mark, seeded


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained generator.

    Attributes:
        generator: in eval mode, with averaged weights if the settings ask for them.
        num_classes: K, or None if it knows no classes.
        selected_step: the step whose weights these are: the last, or the best by the release's
            selection block.
        private: False if the release was stamped NOT PRIVATE.
        step: steps done.
        seconds: spent on training, over all resumptions.
        class_names: of the classes 0..K-1, or None where the release has none.
        limits: of the plan that it was trained by.
        modes: which labels of the generator make up each class; None: labels are classes.
    """

    generator: nn.Module
    num_classes: int | None
    private: bool
    step: int
    seconds: float
    selected_step: int
    class_names: tuple[str, ...] | None = None
    limits: Limits = field(default_factory=Limits)
    modes: Mixture | None = None

    def __post_init__(self) -> None:
        if self.modes is not None:
            mark(self.generator, self.modes)


@dataclass(frozen=True, eq=False)
class Task:
    """What a training is of: a checkpoint of another one is not gone on from.

    Attributes:
        release: what is matched.
        settings: how.
        record: of the generator: its settings, or the name of its class.
        selection: whether weights are selected by the release's selection block.
        team: the processes that train.
    """

    release: Release
    settings: TrainSection
    record: dict[str, Any]
    selection: bool
    team: Team

    @property
    def num_classes(self) -> int | None:
        """K; None without labels."""
        m = self.release.metadata
        return m.num_classes if m.labelled else None

    @cached_property
    def modes(self) -> Mixture | None:
        return Mixture.of(self.release)

    @property
    def num_rows(self) -> int | None:
        """How many labels the generator has; None: it takes none."""
        return self.num_classes if self.modes is None else len(self.modes.classes)

    @property
    def images_per_row(self) -> int | None:
        """Of the rows that are in a batch; None: all rows are, image by image in turn."""
        wanted = self.settings.images_per_row
        if wanted is None and self.modes is not None:
            wanted = min(IMAGES_PER_ROW, self.settings.batch_size)
        return wanted


class Average(AveragedModel):
    """Exponential moving average of a generator's weights and buffers.

    Its memory is short at first: the decay of step t (0-based) is at most (1 + t) / (10 + t).
    """

    def __init__(self, generator: nn.Module, decay: float, device: torch.device) -> None:
        super().__init__(generator, multi_avg_fn=self._blend, use_buffers=True)
        self.longest = self.decay = decay
        self.on_device = torch.zeros((), device=device)  # the decay, in a graph

    def begin(self, step: int) -> None:
        """Sets the decay of a step."""
        self.decay = min(self.longest, (1 + step) / (10 + step))
        self.on_device.fill_(0.0 if int(self.n_averaged) == 0 else self.decay)

    @torch.no_grad()
    def _blend(self, averaged: Any, current: Any, _: Any) -> None:
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - self.decay)
        else:  # batch norm's counters
            for a, c in zip(averaged, current, strict=True):
                a.copy_(c)

    @torch.no_grad()
    def update_on_device(self, generator: nn.Module) -> None:
        """As `update_parameters`, with the decay that is on the device; counts nothing."""
        theirs, ours = (
            [*module.parameters(), *module.buffers()] for module in (self.module, generator)
        )
        numbers = [(a, c) for a, c in zip(theirs, ours, strict=True) if a.is_floating_point()]
        averaged, current = ([pair[i] for pair in numbers] for i in (0, 1))
        torch._foreach_sub_(averaged, current)  # in place: eight passes, and no memory of its own
        torch._foreach_mul_(averaged, self.on_device)
        torch._foreach_add_(averaged, current)
        for a, c in zip(theirs, ours, strict=True):
            if not a.is_floating_point():
                a.copy_(c)


class State:
    """What steps move: all of it is in a checkpoint.

    Attributes:
        generator, optimizer, loss: as they train.
        averaged: the generator's average.
        rng: draws the latent points.
        global_rng: where torch's global generator is, for dropout in a user's generator.
        step, seconds: done and spent, over all resumptions.
        best: step, score and averaged weights of the best step so far; None without selection.
    """

    def __init__(
        self,
        generator: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: MMDLoss,
        settings: TrainSection,
        device: torch.device,
    ) -> None:
        self.generator, self.optimizer, self.loss = generator, optimizer, loss
        self.averaged = Average(generator, settings.ema_decay, device)
        self.rng = torch.Generator().manual_seed(settings.seed)
        with seeded(settings.seed):
            self.global_rng = torch.get_rng_state()
        self.step, self.seconds = 0, 0.0
        self.best: dict[str, Any] | None = None

    def estimate(self) -> dict[str, Tensor]:
        """The loss's state, without its encoder."""
        state = self.loss.state_dict()
        return {key: value for key, value in state.items() if not key.startswith("encoder.")}

    def consider(self, score: float) -> None:
        """Keeps the averaged weights if their score is the best so far."""
        if self.best is None or score < self.best["score"]:
            weights = {k: v.clone() for k, v in self.averaged.state_dict().items()}
            self.best = {"step": self.step, "score": score, "averaged": weights}

    @contextlib.contextmanager
    def seeded(self) -> Iterator[None]:
        """Within the block torch's global generator is the training's own."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self.global_rng)
            yield

    def result(self, task: Task, limits: Limits) -> Trained:
        if self.best is not None:
            self.averaged.load_state_dict(self.best["averaged"])
        return Trained(
            self.averaged.module.eval(),
            task.num_classes,
            task.release.metadata.private,
            self.step,
            self.seconds,
            self.step if self.best is None else self.best["step"],
            task.release.metadata.class_names,
            limits,
            task.modes,
        )


def adam(
    generator: nn.Module, settings: TrainSection, device: torch.device, graphed: bool
) -> torch.optim.Optimizer:
    """Adam; for a graph, whose replays read the rate from the device, with a tensor as rate.

    On a CUDA device one kernel does all of it (`fused`), where ``foreach`` falls apart into one for
    each operation. On a CPU it stays ``foreach``: fused gains less than a hundredth of a step
    there, and rounds in other places.
    """
    on_gpu = device.type == "cuda"
    fused = on_gpu and all(p.is_floating_point() for p in generator.parameters())
    return torch.optim.Adam(
        generator.parameters(),
        lr=torch.tensor(settings.lr, device=device) if graphed else settings.lr,
        betas=settings.betas,
        foreach=None if fused or graphed else True,
        fused=fused or None,
        capturable=graphed and on_gpu,
    )


def take_over(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Moments and steps from another Adam's state; how this one runs stays as it is."""
    own = [dict(group) for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group.update({key: kept[key] for key in ("lr", "capturable", "foreach", "fused")})
        on_device = group["capturable"] or group["fused"]
        for p in group["params"]:
            if p in optimizer.state:
                held = optimizer.state[p]
                held["step"] = held["step"].to(p.device if on_device else "cpu")
