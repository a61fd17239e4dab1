"""Everything that a checkpoint holds, and a step of it."""

from __future__ import annotations

import contextlib
import inspect
import math
import random
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from dpmmd.distributed import Team, synchronise_batch_norm
from dpmmd.nn import MMDLoss
from dpmmd.privacy.release_file import Release
from dpmmd.recipe import TrainSection
from dpmmd.train import graph
from dpmmd.train.checkpoint import CHECKPOINT, FORMAT, CheckpointError, Trained, load_into
from dpmmd.train.graph import is_ours, state_of_host, waiting_refused
from dpmmd.train.sampling import balanced_labels, seeded
from dpmmd.train.selection import Selection

# On the result, but for rounding.
WITHOUT_EFFECT = {
    "checkpoint_every",
    "log_every",
    "grid_every",
    "inject",
    "graph",
    "compile",
    "memory",
}
# Every process computes the same running statistics. PyTorch 2.13 gave the argument a new name.
_BUFFERS_STAY: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)
_WARM_UP_STEPS = 3


class Run:
    """Everything that a checkpoint holds."""

    def __init__(
        self,
        generator: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: MMDLoss,
        rng: torch.Generator,
        settings: TrainSection,
        release: Release,
        record: dict[str, Any],
        selection: Selection | None,
        team: Team,
        graphed: bool,
    ) -> None:
        self.generator, self.optimizer, self.loss = generator, optimizer, loss
        self.model, self.team = generator, team
        self.averaged = AveragedModel(generator, multi_avg_fn=self._average, use_buffers=True)
        self.rng, self.settings, self.graphed = rng, settings, graphed
        self.metadata, self.record = release.metadata, record
        self.labelled = release.metadata.labelled
        with seeded(settings.seed):
            self.global_rng = torch.get_rng_state()  # for dropout in a user's generator
        self.step, self.seconds = 0, 0.0
        self.selection = selection
        self.best: dict[str, Any] | None = None  # step, score and averaged weights

    def compare(self) -> float:
        """Scores the averaged weights by the selection block and keeps them if they are best."""
        assert self.selection is not None
        score = self.selection.score(self.averaged.module)
        if self.best is None or score < self.best["score"]:
            weights = {k: v.clone() for k, v in self.averaged.state_dict().items()}
            self.best = {"step": self.step, "score": score, "averaged": weights}
        return score

    def result(self) -> Trained:
        if self.best is not None:
            self.averaged.load_state_dict(self.best["averaged"])
        return Trained(
            self.averaged.module.eval(),
            self.metadata.num_classes if self.labelled else None,
            self.metadata.private,
            self.step,
            self.seconds,
            self.step if self.best is None else self.best["step"],
            self.metadata.class_names,
        )

    def spread(self) -> None:
        """Makes the generator that of all processes, whose weights are equal."""
        group = self.team.group
        if group is None:
            return
        synchronise_batch_norm(self.generator, group)
        with seeded_state(self):  # DistributedDataParallel may draw
            self.model = DistributedDataParallel(
                self.generator, process_group=group, **_BUFFERS_STAY
            )

    def prepare(self, device: torch.device, num_classes: int | None) -> None:
        """Before the first call of `advance`: places for a step's inputs, and its graph."""
        n = self.settings.batch_size
        whole = torch.zeros(n, int(self.generator.z_dim))  # type: ignore[arg-type]
        self.whole = whole.shape
        self.z = self.team.share(whole).to(device)
        self.y = None
        if num_classes is not None:
            self.y = self.team.share(balanced_labels(n, num_classes)).to(device)
        self.num_classes = num_classes
        self.decay = torch.zeros((), device=device)  # of the weights' average, in a graph
        self.value = torch.zeros((), device=device)
        self.work = self._work
        if self.graphed:
            self.work = self._captured()

    def advance(self) -> Tensor:
        """One step; returns the loss, on its device."""
        settings, n = self.settings, self.settings.batch_size
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate(settings, self.step))
            else:
                group["lr"] = rate(settings, self.step)
        self._fill(self.z, torch.randn(self.whole, generator=self.rng))
        if self.y is not None and self.num_classes is not None:
            self._fill(self.y, balanced_labels(n, self.num_classes, offset=self.step * n))
        first = int(self.averaged.n_averaged) == 0
        self.decay.fill_(0.0 if first else self._decay())
        self.work()
        if self.graphed:
            self.averaged.n_averaged += 1
        self.step += 1
        self.global_rng = torch.get_rng_state()
        return self.value

    def _fill(self, place: Tensor, whole: Tensor) -> None:
        """Copies from the host without waiting: pinned memory is not reused before it is read."""
        values = self.team.share(whole)
        if place.is_cuda:
            values = values.pin_memory()
        place.copy_(values, non_blocking=True)

    def _work(self) -> None:
        """What the device does in a step: the same kernels each time, and no reads by the host."""
        self.optimizer.zero_grad(set_to_none=True)
        value = self.loss(self.model(self.z, self.y), self.y)
        value.backward()
        self.optimizer.step()
        if self.graphed:
            self._average_on_device()
        else:
            self.averaged.update_parameters(self.generator)
        self.value.copy_(value.detach())

    def _captured(self) -> Callable[[], None]:
        """`_work` as one graph, whose warm-up leaves no trace.

        Where it was not asked for and cannot be, `_work` itself, with a warning.
        """
        device, asked = self.z.device, self.settings.graph
        forget, before = self._trace(), state_of_host(self.generator)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            graph.warm_up(self._work, device, _WARM_UP_STEPS)
            try:
                if not is_ours(self.generator):
                    self._rehearse(device, before)
                forget()
                return graph.record(self._work, device)
            except Exception as error:
                forget()
                why = _reason(error)
                if asked:
                    raise RuntimeError(
                        f"settings.graph=True: a step cannot be a CUDA graph ({why}). Leave "
                        "nothing of the generator's forward pass to the host, or leave graph out."
                    ) from error
        self.graphed = False
        state = self.optimizer.state_dict()
        self.optimizer = adam(self.generator, self.settings, device, graphed=False)
        self._restore_optimizer(state)
        warnings.warn(
            f"settings.graph: a step cannot be a CUDA graph ({why}). Its kernels are launched one "
            "by one, with the same result, but it may take several times as long; graph=False "
            "silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return self._work

    def _trace(self) -> Callable[[], None]:
        """What sets back everything that steps move, in place, but torch's random states."""
        held = [
            *self.generator.parameters(),
            *self.generator.buffers(),
            *self.averaged.module.parameters(),
            *self.averaged.module.buffers(),
            *(t for k, t in self.loss.state_dict().items() if not k.startswith("encoder.")),
        ]
        before = [t.detach().clone() for t in held]
        moments = {
            p: {k: v.clone() for k, v in self.optimizer.state[p].items()}
            for p in self.optimizer.state
        }
        drawn = random.getstate(), np.random.get_state()  # noqa: NPY002

        @torch.no_grad()
        def forget() -> None:
            for tensor, value in zip(held, before, strict=True):
                tensor.copy_(value)
            for p, state in self.optimizer.state.items():
                for key, tensor in state.items():
                    tensor.copy_(moments[p][key] if p in moments else torch.zeros_like(tensor))
            self.optimizer.zero_grad(set_to_none=True)
            random.setstate(drawn[0])
            np.random.set_state(drawn[1])  # noqa: NPY002

        return forget

    def _rehearse(self, device: torch.device, before: Mapping[Any, Any]) -> None:
        """One more step, which raises a RuntimeError if the host takes part in it.

        A replay would leave the host's part out: what it waits for cannot be captured, and what it
        counts, assigns or draws would stay as it was, without an error.

        Args:
            before: `state_of_host` before the warm-up.
        """
        with waiting_refused(device):
            graph.warm_up(self._work, device, 1)
        now = state_of_host(self.generator)
        for key in now.keys() | before.keys():
            if now.get(key) != before.get(key):
                raise RuntimeError(f"a forward pass changes {key[0]}")

    def _decay(self) -> float:
        """Of the moving average, whose memory is short at first: (1 + t) / (10 + t)."""
        return min(self.settings.ema_decay, (1 + self.step) / (10 + self.step))

    @torch.no_grad()
    def _average(self, averaged: Any, current: Any, _: Any) -> None:
        """Exponential moving average."""
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - self._decay())
        else:  # batch norm's counters
            for a, c in zip(averaged, current, strict=True):
                a.copy_(c)

    @torch.no_grad()
    def _average_on_device(self) -> None:
        """The same with the decay that is on the device."""
        theirs, ours = (
            [*module.parameters(), *module.buffers()]
            for module in (self.averaged.module, self.generator)
        )
        numbers = [(a, c) for a, c in zip(theirs, ours, strict=True) if a.is_floating_point()]
        averaged, current = ([pair[i] for pair in numbers] for i in (0, 1))
        distance = torch._foreach_sub(averaged, current)
        torch._foreach_mul_(distance, self.decay)
        torch._foreach_add_(distance, current)
        torch._foreach_copy_(averaged, distance)
        for a, c in zip(theirs, ours, strict=True):
            if not a.is_floating_point():
                a.copy_(c)

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        loss_state = {
            k: v for k, v in self.loss.state_dict().items() if not k.startswith("encoder.")
        }
        state = {
            "format": FORMAT,
            "step": self.step,
            "seconds": self.seconds,
            "processes": self.team.size,
            "private": self.metadata.private,
            "array_sha256": self.metadata.array_sha256,
            "num_classes": self.metadata.num_classes if self.labelled else None,
            "class_names": self.metadata.class_names,
            "settings": self.settings.model_dump(mode="json"),
            "generator_settings": self.record,
            "generator": self.generator.state_dict(),
            "averaged": self.averaged.state_dict(),
            "selection": self.selection is not None,
            "best": self.best,
            "optimizer": self.optimizer.state_dict(),
            "loss": loss_state,
            "rng": self.rng.get_state(),
            "global_rng": self.global_rng,
        }
        temporary = folder / f".{CHECKPOINT}.tmp"
        torch.save(state, temporary)
        temporary.replace(folder / CHECKPOINT)

    def restore(self, state: Mapping[str, Any], *, elastic: bool = False) -> None:
        written_by = state.get("processes", 1)
        if written_by != self.team.size and not elastic:
            raise CheckpointError(
                f"checkpoint: written by {written_by} process(es), now there are "
                f"{self.team.size}; start as many, or pass elastic=True (--elastic) to go on with "
                "another number."
            )
        if state["array_sha256"] != self.metadata.array_sha256:
            raise CheckpointError(
                "checkpoint: it belongs to another release; train in another folder, or remove "
                "the checkpoint."
            )
        wanted = self.settings.model_dump(mode="json")
        found = dict(state["settings"])
        if state["selection"] != (self.selection is not None):
            raise CheckpointError(
                f"checkpoint: made with{'' if state['selection'] else 'out'} a selection "
                "encoder; continue likewise, or train in another folder."
            )
        free = WITHOUT_EFFECT - ({"checkpoint_every"} if self.selection is not None else set())
        for key in sorted((set(wanted) | set(found)) - free):
            if wanted.get(key) != found.get(key):
                raise CheckpointError(
                    f"checkpoint: made with {key} = {found.get(key)!r}, now {wanted.get(key)!r}; "
                    "continue with the same settings, or train in another folder."
                )
        if state["generator_settings"] != self.record:
            raise CheckpointError(
                f"checkpoint: made with the generator {state['generator_settings']}, now "
                f"{self.record}; continue with the same, or train in another folder."
            )
        load_into(self.generator, state["generator"])
        load_into(self.averaged, state["averaged"])
        self._restore_optimizer(state["optimizer"])
        self.loss.load_state_dict(state["loss"], strict=False)
        self.best = state["best"] if self.selection is not None else None
        self.rng.set_state(state["rng"])
        self.global_rng = state["global_rng"]
        self.step, self.seconds = int(state["step"]), float(state["seconds"])

    def _restore_optimizer(self, state: Mapping[str, Any]) -> None:
        """Moments and steps from the checkpoint; how Adam runs stays as it is here."""
        own = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(dict(state))
        for group, kept in zip(self.optimizer.param_groups, own, strict=True):
            group.update({key: kept[key] for key in ("lr", "capturable", "foreach")})
            for p in group["params"]:
                if p in self.optimizer.state:
                    held = self.optimizer.state[p]
                    held["step"] = held["step"].to(p.device if group["capturable"] else "cpu")


def rate(settings: TrainSection, step: int) -> float:
    """Learning rate of a step (0-based): linear warm-up, then the schedule down to zero."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }[settings.schedule]
    return settings.lr * factor


def adam(
    generator: nn.Module, settings: TrainSection, device: torch.device, graphed: bool
) -> torch.optim.Optimizer:
    """Adam; for a graph, whose replays read the rate from the device, with a tensor as rate."""
    parameters = generator.parameters()
    if not graphed:
        return torch.optim.Adam(parameters, lr=settings.lr, betas=settings.betas, foreach=True)
    return torch.optim.Adam(
        parameters,
        lr=torch.tensor(settings.lr, device=device),
        betas=settings.betas,
        capturable=device.type == "cuda",
    )


def _reason(error: BaseException) -> str:
    """The first error's first line, and where it was; others follow it when a capture ends."""
    while error.__context__ is not None:
        error = error.__context__
    text = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    places = [p for p in traceback.extract_tb(error.__traceback__)[-1:] if p.filename != __file__]
    return ", ".join([text, *(f"{place.filename}:{place.lineno}" for place in places)])


@contextlib.contextmanager
def seeded_state(run: Run) -> Iterator[None]:
    """Within the block torch's global generator is the run's own."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(run.global_rng)
        yield
