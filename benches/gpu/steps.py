"""Whole training steps: against the step without the loss, against the authors' procedure.

The paper's generator, VGG19 with random weights (which cost what others would), both moments by
class, the "adam" estimator and Adam. The floor is the same step with the sum of the last tap as
loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dpmmd
from benches.baselines import AuthorsStep
from benches.gpu import operations
from benches.gpu.checks import loss_options
from benches.gpu.device import brief, tf32
from benches.gpu.inputs import Scale
from benches.gpu.measure import Call, Measure, Row
from dpmmd import backends
from dpmmd.devices import device_of
from dpmmd.encoders import Encoder
from dpmmd.nn import MMDLoss
from dpmmd.recipe import GeneratorSection, TrainSection
from dpmmd.run import no_noise

STEP, CAPTURED, TRAIN = "training step", "training step, captured", "dpmmd train, a step"
FLOOR = "sum of the last tap"
AUTHORS = {"eager, TF32 off": False, "eager, TF32 on": True}
INJECTED = ", injected"
NEEDS = {"forward", "backward", "difference", "step"}


class Step:
    """Generator, encoder, loss, backward, Adam."""

    def __init__(
        self,
        generator: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        batch: int,
        classes: int,
        capturable: bool,
    ) -> None:
        self.generator, self.loss, self.batch, self.classes = generator, loss, batch, classes
        self.device = device_of(generator)
        capturable = capturable and self.device.type == "cuda"
        self.optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3, capturable=capturable)

    def __call__(self) -> None:
        z = torch.randn(self.batch, int(self.generator.z_dim), device=self.device)  # type: ignore[arg-type]
        y = torch.arange(self.batch, device=self.device) % self.classes
        self.optimizer.zero_grad()
        self.loss(self.generator(z, y), y).backward()
        self.optimizer.step()


def encoder_of(scale: Scale, pixels: int, precision: str, device: torch.device) -> Encoder:
    found = dpmmd.encoders.load(
        scale.encoder,
        image_size=pixels,
        taps=scale.encoder_taps,
        weights="random",
        precision=precision,
    )
    return found.to(device)


def release_of(encoder: Encoder, classes: int, moments: tuple[int, ...] = (1, 2)) -> dpmmd.Release:
    """Of a few random images, without noise: what a step costs depends on neither."""
    side = encoder.image_size[0]
    images = np.random.default_rng(0).integers(0, 256, (20, 3, side, side), dtype=np.uint8)
    return dpmmd.release(
        (images, np.arange(20) % classes), encoder, epsilon=1.0, delta=1e-5,
        adjacency="replace-one", num_classes=classes, moments=moments, batch_size=20,
        progress=False, insecure_test_noise=no_noise,
    )  # fmt: skip


def generator_of(scale: Scale, pixels: int, device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return (
        dpmmd.generators.build(
            "resnet",
            num_classes=scale.classes,
            image_size=pixels,
            channels=3,
            base_channels=scale.width,
        )
        .to(device)
        .train()
    )


def steps(
    measure: Measure, scale: Scale, present: Sequence[str], broken: set[tuple[str, str]]
) -> None:
    sound = [b for b in present if not {(b, o) for o in NEEDS} & broken]
    for pixels, batch in scale.step:
        small = pixels == scale.step[0][0]
        for precision in scale.precisions:
            what = f"{STEP}, {pixels} px, {precision}"
            if not measure.budget.fits(what):
                continue
            try:
                replayable = operations.capturable(sound, broken)
                _steps(measure, scale, pixels, batch, precision, sound, replayable, broken, small)
            except torch.OutOfMemoryError:
                measure.budget.skip(what, "out of memory")
            except Exception as error:
                measure.budget.skip(what, brief(error))
                measure.errors.append(f"{what}: {brief(error)}")
            measure.device.free()


def _steps(
    measure: Measure,
    scale: Scale,
    pixels: int,
    batch: int,
    precision: str,
    sound: Sequence[str],
    replayable: Sequence[str],
    broken: set[tuple[str, str]],
    small: bool,
) -> None:
    device = measure.device
    where, classes = device.device, scale.classes
    before = device.allocated()
    encoder = encoder_of(scale, pixels, precision, where)
    release = release_of(encoder, classes)
    shared = device.allocated() - before
    shape = f"{scale.encoder} {pixels} px, n={batch}, K={classes}, moments 1+2"
    variants: dict[str, list[Call]] = {}
    captured: dict[str, list[Call]] = {}
    peaks: dict[str, int | None] = {}

    def add(name: str, make: Callable[[], Call], own: int = 0, operation: str = STEP) -> None:
        """Builds a variant, and finds how much memory a step of it takes."""
        start = device.allocated()
        try:
            call = make()
            call()
            peak = device.peak(call)
        except torch.OutOfMemoryError:
            device.free()
            measure.keep(Row(operation, shape, precision, name, note="out of memory"))
            return
        if operation == CAPTURED:
            captured[name] = [call]
            return
        variants[name] = [call]
        peaks[name] = None if peak is None else peak - start + own

    def last(x: Tensor, y: Tensor) -> Tensor:
        return encoder(x)[-1].float().sum()

    def ours(loss: Callable[[], Any], capturable: bool) -> Callable[[], Call]:
        def make() -> Call:  # the loss too, so that its memory is counted with the step's
            step = Step(generator_of(scale, pixels, where), loss(), batch, classes, capturable)
            return exact(step, precision)

        return make

    losses: dict[str, Callable[[], Any]] = {FLOOR: lambda: last}
    for backend in sound:
        options: dict[str, dict[str, Any]] = {backend: {}}
        if backend != "torch":
            more = {o for o in loss_options(backend) if (backend, o) not in broken}
            if "step, injected" in more:
                options[backend + INJECTED] = {"inject": True}
            if "step, in parts" in more:
                part = max(1, batch // 4)
                options[f"{backend}, {part} images at a time"] = {"micro_batch": part}
        for name, chosen in options.items():
            losses[name] = lambda backend=backend, chosen=chosen: MMDLoss(  # type: ignore[misc]
                release, encoder, estimator="adam", backend=backend, **chosen
            ).train()
    kinds = () if device.dry else (FLOOR, *replayable, *(b + INJECTED for b in replayable))
    for name, loss in losses.items():
        for operation in (STEP, CAPTURED) if name in kinds else (STEP,):
            try:
                add(name, ours(loss, operation == CAPTURED), shared, operation)
            except Exception as error:
                measure.keep(Row(operation, shape, precision, name, note=brief(error)))
                measure.errors.append(f"{operation}, {name}: {brief(error)}")
                break
    if precision == scale.precisions[0] and scale.authors:
        for name, allowed in AUTHORS.items():

            def authors(allowed: bool = allowed) -> Call:
                step = AuthorsStep(
                    generator_of(scale, pixels, where), release.target.to(where), batch, classes
                )

                def run() -> None:
                    with tf32(allowed):
                        step()

                return run

            add(name, authors)
    measure(
        STEP,
        shape,
        precision,
        variants,
        theirs=tuple(AUTHORS),
        peaks=peaks,
        items=batch,
    )
    if captured:
        measure(CAPTURED, shape, precision, captured, graph=captured, items=batch)
    if small and precision == scale.precisions[0] and sound:
        _trained(measure, scale, shape, precision, release, encoder, batch, sound[-1])


def exact(call: Call, precision: str) -> Call:
    """The step as its precision says: where that is float32, without TF32."""
    if precision != "float32":
        return call

    def run() -> None:
        with tf32(False):
            call()

    return run


def _trained(
    measure: Measure,
    scale: Scale,
    shape: str,
    precision: str,
    release: dpmmd.Release,
    encoder: Encoder,
    batch: int,
    backend: str,
) -> None:
    """A step of `dpmmd.train.train`, by the difference of a long and a short run."""
    few, many = scale.train_steps
    kinds: dict[str, dict[str, Any]] = {backend: {}}
    if device_of(encoder).type == "cuda":  # both, whatever the default does
        kinds = {f"{backend}, graph = {str(g).lower()}": {"graph": g} for g in (False, True)}
    for name, chosen in kinds.items():

        def run(steps: int, chosen: dict[str, Any] = chosen) -> float:
            settings = TrainSection(steps=steps, batch_size=batch, estimator="adam", **chosen)
            generator = GeneratorSection(name="resnet", base_channels=scale.width)
            with backends.use(backend):
                done = dpmmd.train.train(
                    release, encoder, None, settings, generator_settings=generator, progress=False
                )
            return done.seconds

        if not measure.budget.fits(f"{TRAIN}, {name}"):
            continue
        try:
            times = [run(many) - run(few) for _ in range(3 if many > 10 else 1)]
        except Exception as error:
            measure.keep(Row(TRAIN, shape, precision, name, note=brief(error)))
            measure.errors.append(f"{TRAIN}, {name}: {brief(error)}")
            continue
        a_step = [max(t, 0.0) / (many - few) for t in times]
        measure.keep(
            Row(
                TRAIN, shape, precision, name, statistics.median(a_step), min(a_step), len(a_step),
                "graph" if chosen.get("graph") else "launches", items=batch,
            )
        )  # fmt: skip
