"""Training a generator on a release. Nothing here sees private data."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dpmmd import precision
from dpmmd.devices import device_of
from dpmmd.distributed import Team, replicated, require_alike
from dpmmd.encoders import Encoder
from dpmmd.files import expanded, refuse_unwritable
from dpmmd.generators import build
from dpmmd.nn import MMDLoss
from dpmmd.privacy.release_file import Release
from dpmmd.recipe import GeneratorSection, TrainSection
from dpmmd.train import plan as planning
from dpmmd.train.checkpoint import CHECKPOINT, load_checkpoint, restore, save
from dpmmd.train.graph import graphed_stepper, is_graphed
from dpmmd.train.pictures import sample_grid
from dpmmd.train.plan import Limits, Plan, Target
from dpmmd.train.sampling import seeded
from dpmmd.train.selection import Selection
from dpmmd.train.state import State, Task, Trained, adam
from dpmmd.train.step import Stepper, rate

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_AGREE_EVERY = 10  # steps


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
    plan: Plan | None = None,
    progress: bool = True,
) -> Trained:
    """Trains a generator to match a release.

    Args:
        release: the noised embedding.
        encoder: the encoder it was made with.
        generator: any nn.Module called as ``generator(z, y)``, z float32 [n, z_dim], y int64 [n] or
            None, that returns images [n, C, H, W] in [0, 1] and has an attribute ``z_dim``.
            None: one built from ``generator_settings``. Of a release with modes, y are rows
            (`dpmmd.nn.MMDLoss`), ``release.num_rows`` of them.
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
        plan: how a step is done within a memory budget, for a process's part of the batch. None:
            `dpmmd.train.plan.make` makes one if there is ``settings.memory``.
        progress: show a progress bar on standard error.

    Returns:
        `Trained`.

    Raises:
        CheckpointError: the checkpoint in ``out`` cannot be used.
        ValueError: ``settings.graph=True`` elsewhere than on a CUDA device, over several processes
            or with a memory budget, ``settings.precision="bfloat16"`` on a device without it, a
            batch of fewer images than processes, processes that were not started alike, or, with
            modes, a generator for classes, shared taps or batches without two images of a row.
        TypeError: ``generator`` has no attribute ``z_dim``.
        PrivacyError: release and encoder do not belong together.
        PlanError: ``settings.memory`` is not enough for a step, or ``plan`` is one for another
            batch size, precision or device.
        KeyboardInterrupt: after a checkpoint has been written.
    """
    settings = settings or TrainSection()
    chosen = precision.of_generator(settings.precision, device_of(encoder))
    settings = settings.model_copy(update={"precision": chosen})  # a checkpoint says which
    look = (generator_settings or GeneratorSection()).completed(release.metadata.image_shape)
    team = Team(process_group, device_of(encoder))
    _check_team(team, release, encoder, settings, look, selection_encoder)
    graphed = is_graphed(settings, team.device, team, generator, planned=plan is not None)
    _check_rows(release, settings, generator)
    generator, record = _made(generator, look, release, settings.seed)
    generator = generator.to(team.device).train()
    plan = _planned(plan, team, release, encoder, generator, settings)
    if plan is not None and progress and team.rank == 0:
        print(plan, file=sys.stderr)
    limits = Limits.of(plan)
    if limits.recompute:
        generator.recompute = True  # type: ignore[assignment]
    loss = MMDLoss(
        release,
        encoder,
        estimator=settings.estimator,
        decay=settings.estimator_decay,
        lr=settings.estimator_lr,
        micro_batch=limits.encoded,
        state=limits.state,
        inject=settings.inject,
        process_group=process_group,
    ).train()
    loss._rows_known = True
    optimizer = adam(generator, settings, team.device, graphed)
    selection = None
    if selection_encoder is not None:
        selection = Selection(release, selection_encoder, team.device, limits)
    task = Task(release, settings, record, selection is not None, team)
    state = State(generator, optimizer, loss, settings, team.device)
    folder = None if out is None else expanded(out) / "checkpoints"
    if folder is not None:
        content = team.from_first(lambda: _found(folder / CHECKPOINT))
        if content is not None:
            restore(content, task, state, elastic=elastic)
    if state.step < settings.steps:
        if folder is not None:
            team.from_first(lambda: refuse_unwritable(folder / CHECKPOINT, overwrite=True))
        with _compiled([generator, encoder.backbone] if settings.compile else []):
            _loop(_stepper(task, state, graphed), selection, limits, folder, progress)
    return state.result(task, limits)


def _made(
    generator: nn.Module | None, look: GeneratorSection, release: Release, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """The caller's generator, or one built by its settings; and the record of it."""
    if generator is None:
        labelled = release.metadata.labelled or release.modes is not None
        rows = release.num_rows if labelled else None
        with seeded(seed):
            return build(**look.arguments(), num_classes=rows), look.model_dump(mode="json")
    if not isinstance(getattr(generator, "z_dim", None), int):
        raise TypeError(
            f"generator: {type(generator).__qualname__} has no integer attribute z_dim, the "
            "size of the latent vectors that it takes; set it."
        )
    return generator, {"name": type(generator).__qualname__}


def _check_rows(release: Release, settings: TrainSection, generator: nn.Module | None) -> None:
    """Refuses what does not go with the rows of a release with modes."""
    if release.modes is None:
        return
    rows, built = release.num_rows, getattr(generator, "num_classes", None)
    if isinstance(built, int) and built != rows:
        raise ValueError(
            f"generator: it has num_classes={built}; the release has modes, {rows} rows of "
            f"{release.num_classes} classes, and rows are the labels. Build it with "
            f"num_classes=release.num_rows ({rows})."
        )
    if release.shared is not None:
        raise ValueError(
            f"release: it has both modes and shared_taps={release.metadata.shared_taps}; those are "
            "matched by the mean over a batch, and a batch has some of the rows alone, in equal "
            "parts. Make one with shared_taps=0, or train in a loop of your own with rows in "
            "proportion to release.rows.counts."
        )
    if settings.estimator == "unbiased" and settings.batch_size < 2:
        raise ValueError(
            f"settings.batch_size={settings.batch_size} with settings.estimator='unbiased': it "
            "takes pairs of images of a row; use batches of at least 2 images, better 100, or the "
            "estimator 'batch'."
        )


def _planned(
    given: Plan | None,
    team: Team,
    release: Release,
    encoder: Encoder,
    generator: nn.Module,
    settings: TrainSection,
) -> Plan | None:
    """The plan that was given, if it is one for this training, else one for the settings."""
    own = settings.model_copy(update={"batch_size": settings.batch_size // team.size})
    if given is not None:
        team.each(lambda: given.check(own, team.device))
        return given
    if settings.memory is None:
        return None
    budget, target = settings.memory, Target.of(release)
    return team.each(lambda: planning.make(budget, encoder, generator, target, own))


def _stepper(task: Task, state: State, graphed: bool) -> Stepper:
    """What does the steps; a capture counts as training."""
    started, model = perf_counter(), state.generator
    if (group := task.team.group) is not None:
        with state.seeded():  # DistributedDataParallel may draw
            model = replicated(state.generator, group)
    make = graphed_stepper if graphed else Stepper
    stepper = make(task, state, model)
    state.seconds += perf_counter() - started
    return stepper


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
        team.group,
        release=release.metadata.array_sha256,
        encoder=encoder.spec(),
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


def _loop(
    stepper: Stepper,
    selection: Selection | None,
    limits: Limits,
    folder: Path | None,
    progress: bool,
) -> None:
    task, state = stepper.task, stepper.state
    settings, team = task.settings, task.team
    if team.rank:  # the first process alone writes
        folder, progress = None, False
    logs = _Logs(None if folder is None else folder.parent / "tensorboard", state.step)
    started, before = perf_counter(), state.seconds
    bar = tqdm(
        total=settings.steps,
        initial=state.step,
        desc="train",
        unit="step",
        disable=not progress,
    )
    with bar, logs, state.seeded(), _deferred_interrupt() as interrupted:
        if team.rank:  # each its own, for dropout in a user's generator
            torch.manual_seed(settings.seed + 1_000_003 * team.rank + state.step)
        stop = False
        while state.step < settings.steps and not stop:
            value = stepper.advance()
            bar.update()
            due = state.step == settings.steps or state.step % settings.checkpoint_every == 0
            # Processes stop at the same step, or those left would wait for the others.
            if team.size == 1 or state.step % _AGREE_EVERY == 0 or due:
                stop = team.any(bool(interrupted))
            generator = state.averaged.module
            logged = state.step % settings.log_every == 0
            if logged or due or stop:
                stepper.check()
            if logged:
                number = value.item()
                bar.set_postfix(loss=f"{number:.4f}", refresh=False)
                logs.scalars(state.step, loss=number, lr=rate(settings, state.step - 1))
            if state.step % settings.grid_every == 0 and logs.active:
                grid = sample_grid(
                    generator, task.num_classes, team.device, limits.generated, modes=task.modes
                )
                logs.grid(state.step, grid)
            state.seconds = before + perf_counter() - started
            if due and selection is not None:
                score = selection.score(generator)
                state.consider(score)
                logs.scalars(state.step, selection=score)
            if folder is not None and (due or stop):
                save(folder, task, state)
    team.wait()  # for the checkpoint
    if stop:
        raise KeyboardInterrupt


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
