"""Training a generator on a release, and sampling from it. Nothing here sees private data."""

from __future__ import annotations

import contextlib
import inspect
import io
import math
import random
import signal
import sys
import threading
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from dpmmd import plan
from dpmmd.distributed import Team, require_alike, synchronise_batch_norm
from dpmmd.encoders import Encoder
from dpmmd.files import expanded, refuse_unwritable, write_atomically
from dpmmd.functional import mean_embedding
from dpmmd.generators import ConvGenerator, DCGANGenerator, ResNetGenerator, build
from dpmmd.nn import MMDLoss, check_encoder
from dpmmd.privacy.release_file import Release
from dpmmd.recipe import GeneratorSection, TrainSection

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

CHECKPOINT = "last.pt"
_FORMAT = 1
# On the result, but for rounding.
_WITHOUT_EFFECT = {
    "checkpoint_every",
    "log_every",
    "grid_every",
    "inject",
    "graph",
    "compile",
    "memory",
}
_GRAPHED_ON = ("cuda",)
# Every process computes the same running statistics. PyTorch 2.13 gave the argument a new name.
_BUFFERS_STAY: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)
_WARM_UP_STEPS = 3
_AGREE_EVERY = 10  # steps


class CheckpointError(ValueError):
    """A checkpoint that is corrupt, or belongs to another release or other settings."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained generator.

    Attributes:
        generator: in eval mode, with averaged weights if the settings ask for them.
        num_classes: K, or None if it takes no labels.
        selected_step: the step whose weights these are: the last, or the best by the release's
            selection block.
        private: False if the release was stamped NOT PRIVATE.
        step: steps done.
        seconds: spent on training, over all resumptions.
        class_names: of the classes 0..K-1, or None where the release has none.
    """

    generator: nn.Module
    num_classes: int | None
    private: bool
    step: int
    seconds: float
    selected_step: int
    class_names: tuple[str, ...] | None = None


def train(
    release: Release,
    encoder: Encoder,
    generator: nn.Module | None = None,
    settings: TrainSection | None = None,
    *,
    generator_settings: GeneratorSection | None = None,
    selection_encoder: Encoder | None = None,
    out: str | Path | None = None,
    process_group: ProcessGroup | None = None,
    elastic: bool = False,
    progress: bool = True,
) -> Trained:
    """Trains a generator to match a release.

    Args:
        release: the noised embedding.
        encoder: the encoder it was made with.
        generator: any nn.Module called as ``generator(z, y)``, z float32 [n, z_dim], y int64 [n] or
            None, that returns images [n, C, H, W] in [0, 1] and has an attribute ``z_dim``.
            None: one built from ``generator_settings``.
        settings: steps, batch size, rates, estimator, seed.
        generator_settings: which generator to build where ``generator`` is None.
        selection_encoder: the encoder of the release's selection block. The weights kept are then
            those with the least squared MMD to that block, compared every
            ``settings.checkpoint_every`` steps; the private data are not looked at again.
        out: folder for ``checkpoints/last.pt`` and TensorBoard logs. A checkpoint found there is
            resumed from; on a CPU the result is the same bit for bit as without interruption.
        process_group: train over all its processes, each of which calls this with the same
            arguments. They share every batch (``settings.batch_size`` is that of all together), and
            what is trained is what one process would, up to rounding: class means, batch norms and
            gradients go over the whole batch. The first process writes ``out``; the others need not
            see that folder.
        elastic: go on from a checkpoint that another number of processes has written.
        progress: show a progress bar on standard error.

    Returns:
        `Trained`.

    Raises:
        CheckpointError: the checkpoint in ``out`` cannot be used.
        ValueError: ``settings.graph=True`` elsewhere than on a CUDA device, over several processes
            or with ``settings.memory``, a batch of fewer images than processes, or processes that
            were not started alike.
        TypeError: ``generator`` has no attribute ``z_dim``.
        PrivacyError: release and encoder do not belong together.
        PlanError: ``settings.memory`` is not enough for a step.
        KeyboardInterrupt: after a checkpoint has been written.
    """
    settings = settings or TrainSection()
    generator_settings = (generator_settings or GeneratorSection()).completed(
        release.metadata.image_shape
    )
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    team = Team(process_group, device)
    _check_team(team, release, encoder, settings, generator_settings, selection_encoder)
    graphed = is_graphed(settings, device, team, generator)
    num_classes = release.num_classes if release.metadata.labelled else None
    rng = torch.Generator().manual_seed(settings.seed)
    if generator is None:
        with _seeded(settings.seed):
            generator = build_generator(generator_settings, num_classes)
        record: dict[str, Any] = generator_settings.model_dump(mode="json")
    else:
        if not isinstance(getattr(generator, "z_dim", None), int):
            raise TypeError(
                f"generator: {type(generator).__qualname__} has no integer attribute z_dim, the "
                "size of the latent vectors that it takes; set it."
            )
        record = {"name": type(generator).__qualname__}
    generator = generator.to(device).train()
    planned: dict[str, Any] = {}
    if settings.memory is not None:
        statement = {key: getattr(release.metadata, key) for key in plan.STATEMENT}
        own = settings.model_copy(update={"batch_size": settings.batch_size // team.size})
        budget, model = settings.memory, generator
        chosen = team.each(lambda: plan.make(budget, encoder, model, statement, own))
        if progress and team.rank == 0:
            print(chosen, file=sys.stderr)
        planned = {"micro_batch": chosen.micro_batch, "state": chosen.state}
        if chosen.recompute:
            generator.recompute = True  # type: ignore[assignment]
    loss = MMDLoss(
        release,
        encoder,
        estimator=settings.estimator,
        decay=settings.estimator_decay,
        lr=settings.estimator_lr,
        inject=settings.inject,
        process_group=process_group,
        **planned,
    ).train()
    optimizer = _adam(generator, settings, device, graphed)
    selection = None
    if selection_encoder is not None:
        selection = _Selection(release, selection_encoder, device)
        if "micro_batch" in planned:
            selection.at_once = min(selection.at_once, planned["micro_batch"])
    run = _Run(generator, optimizer, loss, rng, settings, release, record, selection, team, graphed)
    folder = None if out is None else expanded(out) / "checkpoints"
    if folder is not None:
        state = team.from_first(lambda: _found(folder / CHECKPOINT))
        if state is not None:
            run.restore(state, elastic=elastic)
    if run.step < settings.steps:
        if folder is not None:
            team.from_first(lambda: refuse_unwritable(folder / CHECKPOINT, overwrite=True))
        run.spread()
        with _compiled([generator, encoder.backbone] if settings.compile else []):
            _loop(run, device, num_classes, folder, progress)
    return run.result()


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
        return _is_ours(generator) if settings.graph is None else settings.graph
    if settings.graph:
        raise ValueError(f"settings.graph=True {why}")
    return False


def _is_ours(generator: nn.Module | None) -> bool:
    return generator is None or type(generator) in (ConvGenerator, DCGANGenerator, ResNetGenerator)


def _check_team(
    team: Team,
    release: Release,
    encoder: Encoder,
    settings: TrainSection,
    generator_settings: GeneratorSection,
    selection: Encoder | None,
) -> None:
    """Refuses, in every process, processes that would not train one thing together."""
    if team.group is None:
        return
    require_alike(
        release,
        encoder,
        team.group,
        settings=settings.model_dump(mode="json"),
        generator_settings=generator_settings.model_dump(mode="json"),
        selection_encoder=None if selection is None else selection.spec(),
    )
    if settings.batch_size < team.size:
        raise ValueError(
            f"settings.batch_size={settings.batch_size}: expected at least one image for each of "
            f"the {team.size} processes; start fewer, or use larger batches."
        )


def _found(checkpoint: Path) -> dict[str, Any] | None:
    return load_checkpoint(checkpoint) if checkpoint.exists() else None


def build_generator(settings: GeneratorSection, num_classes: int | None) -> nn.Module:
    """The generator that a recipe's ``[generator]`` section describes."""
    if settings.name is None or settings.image_size is None or settings.channels is None:
        raise ValueError(
            f"settings: {settings}, expected a name, an image_size and channels; fill them in with "
            "settings.completed(release.metadata.image_shape)."
        )
    return build(
        settings.name,
        num_classes=num_classes,
        image_size=settings.image_size,
        channels=settings.channels,
        z_dim=settings.z_dim,
        base_channels=settings.base_channels,
    )


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


def _adam(
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


@contextlib.contextmanager
def _compiled(modules: list[nn.Module]) -> Iterator[None]:
    """Within the block the modules run compiled by torch.compile."""
    for module in modules:
        module.compile(dynamic=False)
    try:
        yield
    finally:
        for module in modules:
            module._compiled_call_impl = None


def balanced_labels(n: int, num_classes: int, offset: int = 0) -> Tensor:
    """int64 [n]: the classes in turn, starting with ``offset``."""
    return (torch.arange(n) + offset) % num_classes


def _loop(
    run: _Run,
    device: torch.device,
    num_classes: int | None,
    folder: Path | None,
    progress: bool,
) -> None:
    settings, team = run.settings, run.team
    if team.rank:  # the first process alone writes
        folder, progress = None, False
    logs = _Logs(None if folder is None else folder.parent / "tensorboard", run.step)
    started, before = perf_counter(), run.seconds
    bar = tqdm(
        total=settings.steps,
        initial=run.step,
        desc="train",
        unit="step",
        disable=not progress,
    )
    run.prepare(device, num_classes)
    with bar, logs, _seeded_state(run), _deferred_interrupt() as interrupted:
        if team.rank:  # each its own, for dropout in a user's generator
            torch.manual_seed(settings.seed + 1_000_003 * team.rank + run.step)
        stop = False
        while run.step < settings.steps and not stop:
            value = run.advance()
            bar.update()
            due = run.step == settings.steps or run.step % settings.checkpoint_every == 0
            # Processes stop at the same step, or those left would wait for the others.
            if team.size == 1 or run.step % _AGREE_EVERY == 0 or due:
                stop = team.any(bool(interrupted))
            if run.step % settings.log_every == 0:
                number = value.item()
                bar.set_postfix(loss=f"{number:.4f}", refresh=False)
                logs.scalars(run.step, loss=number, lr=rate(settings, run.step - 1))
            if run.step % settings.grid_every == 0 and logs.active:
                at_once = settings.batch_size if settings.memory is not None else None
                logs.grid(run.step, sample_grid(run.averaged.module, num_classes, device, at_once))
            run.seconds = before + perf_counter() - started
            if due and run.selection is not None:
                logs.scalars(run.step, selection=run.compare())
            if folder is not None and (due or stop):
                run.save(folder)
    team.wait()  # for the checkpoint
    if stop:
        raise KeyboardInterrupt


class _Selection:
    """Squared MMD between generated images and the release's noised selection block."""

    def __init__(self, release: Release, encoder: Encoder, device: torch.device) -> None:
        check_encoder(release, encoder, selection=True)
        target = release.selection_target
        assert target is not None
        self.target, self.encoder = target[None].to(device), encoder  # [1, K, D']
        self.num_classes = release.num_classes
        self.labelled = release.metadata.labelled
        self.at_once = 250  # images through the encoder; twice as many through the generator

    @torch.no_grad()
    def score(self, generator: nn.Module, per_class: int = 200) -> float:
        """The same latent points at every call: differences are the generator's."""
        n = per_class * self.num_classes
        classes = self.num_classes if self.labelled else None
        images, y = sample(generator, n, classes, batch_size=2 * self.at_once, seed=1)
        labels = torch.zeros(n, dtype=torch.int64) if y is None else torch.from_numpy(y)
        sums, device = torch.zeros_like(self.target), self.target.device
        for x, part in zip(
            torch.from_numpy(images).split(self.at_once),
            labels.to(device).split(self.at_once),
            strict=True,
        ):
            features = self.encoder(x.to(device).float() / 255)
            means, counts = mean_embedding(features, part, self.num_classes)
            sums += means * counts[None, :, None]
        return float((self.target - sums / per_class).square().sum())


class _Run:
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
        selection: _Selection | None,
        team: Team,
        graphed: bool,
    ) -> None:
        self.generator, self.optimizer, self.loss = generator, optimizer, loss
        self.model, self.team = generator, team
        self.averaged = AveragedModel(generator, multi_avg_fn=self._average, use_buffers=True)
        self.rng, self.settings, self.graphed = rng, settings, graphed
        self.metadata, self.record = release.metadata, record
        self.labelled = release.metadata.labelled
        with _seeded(settings.seed):
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
        with _seeded_state(self):  # DistributedDataParallel may draw
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
        forget, before = self._trace(), _state_of_host(self.generator)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            _warm_up(self._work, device, _WARM_UP_STEPS)
            try:
                if not _is_ours(self.generator):
                    self._rehearse(device, before)
                forget()
                return _record(self._work, device)
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
        self.optimizer = _adam(self.generator, self.settings, device, graphed=False)
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
            before: `_state_of_host` before the warm-up.
        """
        with _waiting_refused(device):
            _warm_up(self._work, device, 1)
        now = _state_of_host(self.generator)
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
            "format": _FORMAT,
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
        free = _WITHOUT_EFFECT - ({"checkpoint_every"} if self.selection is not None else set())
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
        _load(self.generator, state["generator"])
        _load(self.averaged, state["averaged"])
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
    text = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
    places = [p for p in traceback.extract_tb(error.__traceback__)[-1:] if p.filename != __file__]
    return ", ".join([text, *(f"{place.filename}:{place.lineno}" for place in places)])


def _warm_up(work: Callable[[], None], device: torch.device, steps: int) -> None:
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


def _record(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
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


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, nothing executed.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, corrupt or of another format.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; make one with `dpmmd train`.")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser of damaged bytes may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({reason}); remove it to start training again "
            "from the release, which costs no privacy."
        ) from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this version of dpmmd; use the version that wrote it, "
            "or remove it to start training again, which costs no privacy."
        )
    return state


def _load(module: nn.Module, state: Mapping[str, Any]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            "checkpoint: its weights are not those of the generator given; pass the same "
            f"generator, or train in another folder. {' '.join(str(error).split())}"
        ) from None


def load_generator(path: str | Path, generator: nn.Module | None = None) -> Trained:
    """The trained generator of a checkpoint, ready to sample.

    Args:
        path: a checkpoint, or a run folder that holds one.
        generator: an untrained instance, for a generator of your own.

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: it is corrupt, or its weights are not those of ``generator``.
    """
    path = expanded(path)
    if path.is_dir():
        path = path / "checkpoints" / CHECKPOINT
    state = load_checkpoint(path)
    if generator is None:
        record = state["generator_settings"]
        if set(record) != set(GeneratorSection.model_fields):
            raise CheckpointError(
                f"{path}: holds a generator of your own ({record.get('name')}); "
                "pass an instance as generator=..."
            )
        generator = build_generator(GeneratorSection(**record), state["num_classes"])
    averaged = AveragedModel(generator, use_buffers=True)
    kept = state["best"] or {"step": state["step"], "averaged": state["averaged"]}
    _load(averaged, kept["averaged"])
    return Trained(
        averaged.module.eval(),
        state["num_classes"],
        bool(state["private"]),
        int(state["step"]),
        float(state["seconds"]),
        int(kept["step"]),
        None if (names := state.get("class_names")) is None else tuple(names),
    )


@torch.no_grad()
def sample(
    generator: nn.Module,
    num_images: int,
    num_classes: int | None,
    *,
    batch_size: int = 500,
    temperature: float = 1.0,
    alignment: nn.Module | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Synthetic images: free of privacy cost, any number.

    Args:
        generator: as returned by `train` or `load_generator`.
        num_images: how many.
        num_classes: K, to draw the classes in equal parts, or None for an unlabelled generator.
        temperature: standard deviation of the latent points, 1 in training. Above it images are
            more varied and less typical, below it the other way round.
        alignment: images go through it, with their labels: `dpmmd.align.fit`, of images sampled
            at the same temperature.

    Returns:
        images uint8 [n, C, H, W] and labels int64 [n] (None if unlabelled).
    """
    rng = torch.Generator().manual_seed(seed)
    device = next(generator.parameters()).device
    generator.eval()
    parts = []
    bar = tqdm(total=num_images, desc="sample", unit="image", disable=not progress)
    with bar, _seeded(seed):  # a generator may draw random numbers of its own
        for start in range(0, num_images, batch_size):
            n = min(batch_size, num_images - start)
            z = torch.randn(n, int(generator.z_dim), generator=rng).mul_(temperature).to(device)  # type: ignore[arg-type]
            y = None
            if num_classes is not None:
                y = balanced_labels(n, num_classes, offset=start).to(device)
            images = generator(z, y).clamp(0, 1)
            if alignment is not None:
                images = alignment(images, y)
            parts.append(images.mul(255).round().to(torch.uint8).cpu().numpy())
            bar.update(n)
    labels = None
    if num_classes is not None:
        labels = balanced_labels(num_images, num_classes).numpy()
    return np.concatenate(parts), labels


def sample_grid(
    generator: nn.Module,
    num_classes: int | None,
    device: torch.device,
    at_once: int | None = None,
    columns: int = 10,
    temperature: float = 1.0,
    alignment: nn.Module | None = None,
) -> np.ndarray:
    """uint8 [C, H', W']: a row per class (or ten rows), the same latent points on every call.

    ``at_once`` images go through the generator together; None: all. ``temperature`` is the latent
    points' standard deviation, ``alignment`` as in `sample`. The generator's mode and torch's
    global random state stay as they are.
    """
    rows = num_classes or 10
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(rows * columns, int(generator.z_dim), generator=rng)  # type: ignore[arg-type]
    z = z.mul_(temperature).to(device)
    y = None
    if num_classes is not None:
        y = torch.arange(rows).repeat_interleave(columns).to(device)
    training = generator.training
    generator.eval()
    with torch.no_grad(), _seeded(0):
        size = at_once or len(z)
        parts = [
            generator(part, None if y is None else y[i * size : (i + 1) * size])
            for i, part in enumerate(z.split(size))
        ]
        made = torch.cat(parts).clamp(0, 1)
        if alignment is not None:
            made = alignment(made, y)
        images = made.mul(255).round().to(torch.uint8).cpu().numpy()
    generator.train(training)
    return tile(images, columns)


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 images [rows * columns, C, H, W] as one picture [C, rows * H, columns * W]."""
    n, c, h, w = images.shape
    grid = images.reshape(n // columns, columns, c, h, w).transpose(2, 0, 3, 1, 4)
    return grid.reshape(c, n // columns * h, columns * w)


def save_png(path: str | Path, picture: np.ndarray, scale: int = 2) -> None:
    """Writes uint8 [1 or 3, H, W] as a PNG, each pixel ``scale`` x ``scale``."""
    array = picture[0] if picture.shape[0] == 1 else picture.transpose(1, 2, 0)
    array = array.repeat(scale, axis=0).repeat(scale, axis=1)
    data = io.BytesIO()
    Image.fromarray(array).save(data, format="PNG")
    write_atomically(expanded(path), data.getvalue(), overwrite=True)


class _Logs:
    """TensorBoard scalars and grids, where TensorBoard is installed and there is a folder."""

    def __init__(self, folder: Path | None, step: int) -> None:
        self._writer: Any = None
        if folder is not None:
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(folder), purge_step=step + 1)
        self.active = self._writer is not None

    def scalars(self, step: int, **values: float) -> None:
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def grid(self, step: int, picture: np.ndarray) -> None:
        if self._writer is not None:
            self._writer.add_image("samples", picture, step)

    def __enter__(self) -> _Logs:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within the block torch's global generator starts from seed; outside it is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@contextlib.contextmanager
def _seeded_state(run: _Run) -> Iterator[None]:
    """Within the block torch's global generator is the run's own."""
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(run.global_rng)
        yield


@contextlib.contextmanager
def _deferred_interrupt() -> Iterator[list[int]]:
    """Within the block Ctrl-C and SIGTERM fill the list instead of breaking a step in two.

    A second Ctrl-C interrupts at once. Outside the main thread signals are left alone.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    previous = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
