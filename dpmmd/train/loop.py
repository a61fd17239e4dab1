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

from dpmmd import plan
from dpmmd.distributed import Team, require_alike
from dpmmd.encoders import Encoder
from dpmmd.files import expanded, refuse_unwritable
from dpmmd.nn import MMDLoss
from dpmmd.privacy.release_file import Release
from dpmmd.recipe import GeneratorSection, TrainSection
from dpmmd.train.checkpoint import CHECKPOINT, Trained, build_generator, load_checkpoint
from dpmmd.train.graph import is_graphed
from dpmmd.train.pictures import sample_grid
from dpmmd.train.sampling import seeded
from dpmmd.train.selection import Selection
from dpmmd.train.state import Run, adam, rate, seeded_state

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
        with seeded(settings.seed):
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
    optimizer = adam(generator, settings, device, graphed)
    selection = None
    if selection_encoder is not None:
        selection = Selection(release, selection_encoder, device)
        if "micro_batch" in planned:
            selection.at_once = min(selection.at_once, planned["micro_batch"])
    run = Run(generator, optimizer, loss, rng, settings, release, record, selection, team, graphed)
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
    run: Run,
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
    with bar, logs, seeded_state(run), _deferred_interrupt() as interrupted:
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
