"""Whole training steps: against the step without the loss, against the authors' procedure.

The paper's generator, VGG19 with random weights (which cost what others would), both moments by
class, the "adam" estimator and Adam. The floor is the same step with the sum of the last tap as
loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

import dpmmd
from benches.backends import compiled
from benches.baselines import AuthorsStep
from benches.gpu import operations
from benches.gpu.device import brief
from benches.gpu.inputs import Scale
from benches.gpu.measure import Call, Measure, Row
from benches.gpu.suite import conformance
from benches.shapes import small_release
from dpmmd import backends, injection
from dpmmd import precision as precisions
from dpmmd.devices import device_of
from dpmmd.encoders import Encoder
from dpmmd.nn import MMDLoss
from dpmmd.recipe import GeneratorSection, TrainSection
from dpmmd.train.state import adam

STEP, CAPTURED, TRAIN = "training step", "training step, captured", "dpmmd train, a step"
FLOOR = "sum of the last tap"
AUTHORS = {"eager, TF32 off": False, "eager, TF32 on": True}
INJECTED = ", injected"
NEEDS = {conformance.EMBEDDING, conformance.ESTIMATOR, conformance.MATCHING, conformance.STEP}


class Step:
    """Generator, encoder, loss, backward, Adam.

    Args:
        capturable: whether a CUDA graph is to hold it. Adam is then that of `dpmmd.train`, else as
            users write it.
        precision: of the generator; None: as `dpmmd.train` chooses.
    """

    def __init__(
        self,
        generator: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        batch: int,
        classes: int,
        capturable: bool,
        precision: str | None = None,
    ) -> None:
        self.generator, self.loss, self.batch, self.classes = generator, loss, batch, classes
        self.device = device_of(generator)
        self.precision = precision or precisions.of_generator(None, self.device)
        self.optimizer: torch.optim.Optimizer = torch.optim.Adam(generator.parameters(), lr=1e-3)
        if capturable:
            self.optimizer = adam(generator, TrainSection(lr=1e-3), self.device, graphed=True)

    def images(self, y: Tensor) -> Tensor:
        """Generated images of the classes y [n], float32."""
        z = torch.randn(self.batch, int(self.generator.z_dim), device=self.device)  # type: ignore[arg-type]
        return precisions.generated(self.generator, z, y, self.precision, self.device)

    def __call__(self) -> None:
        """As `dpmmd.train` does it: the generator's backward pass has its precision too."""
        y = torch.arange(self.batch, device=self.device) % self.classes
        self.optimizer.zero_grad()
        images = self.images(y)
        leaf = images.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self.loss(leaf, y), leaf)
        with precisions.products(self.precision, self.device):
            images.backward(gradient)
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
    for size, precision in product(scale.step, scale.precisions):
        what = f"{STEP}, {size[0]} px, {precision}"
        if not measure.budget.fits(what):
            continue
        try:
            timed = Steps(measure, scale, size, precision)
            timed.add(timed.losses(sound, broken), operations.capturable(sound, broken))
            if precision == scale.precisions[0] and scale.authors:
                timed.add_authors()
            timed.measure()
            if size == scale.step[0] and precision == scale.precisions[0] and sound:
                timed.trained(sound[-1], with_and_without_graph(sound[-1], measure.device))
        except torch.OutOfMemoryError:
            measure.budget.skip(what, "out of memory")
        except Exception as error:
            measure.budget.skip(what, brief(error))
            measure.errors.append(f"{what}: {brief(error)}")
        timed = None
        measure.device.free()


class Steps:
    """Steps of one size, in one precision: variants by name, and what a step of each takes.

    Args:
        of: what times them.
        size: (side, images of a batch).
    """

    def __init__(self, of: Measure, scale: Scale, size: tuple[int, int], precision: str) -> None:
        self.of, self.scale, self.precision = of, scale, precision
        self.pixels, self.batch = size
        before = of.device.allocated()
        self.encoder = encoder_of(scale, self.pixels, precision, of.device.device)
        self.release = small_release(self.encoder, scale.classes)
        self.shared = of.device.allocated() - before
        head = f"{scale.encoder} {self.pixels} px, n={self.batch}, K={scale.classes}"
        self.shape = f"{head}, moments 1+2"
        self.calls: dict[str, dict[str, list[Call]]] = {STEP: {}, CAPTURED: {}}
        self.peaks: dict[str, int | None] = {}

    def losses(
        self, sound: Sequence[str], broken: set[tuple[str, str]]
    ) -> dict[str, Callable[[], Any]]:
        """What makes the loss of each of the library's variants, and of the floor."""
        part = max(1, self.batch // 4)
        wanted: dict[str, tuple[str, dict[str, Any]]] = {b: (b, {}) for b in sound}
        for backend in compiled(sound):
            if backend in injection.BACKENDS and (backend, conformance.INJECTED) not in broken:
                wanted[backend + INJECTED] = backend, {"inject": True}
            if (backend, conformance.IN_PARTS) not in broken:
                wanted[f"{backend}, {part} images at a time"] = backend, {"micro_batch": part}

        def last(x: Tensor, y: Tensor) -> Tensor:
            return self.encoder(x)[-1].float().sum()

        def made(backend: str, options: dict[str, Any]) -> MMDLoss:
            given = {"estimator": "adam", "backend": backend, "inject": False, **options}
            return MMDLoss(self.release, self.encoder, **given).train()

        ours = {name: partial(made, *what) for name, what in wanted.items()}
        return {FLOOR: lambda: last, **ours}

    def add(self, losses: Mapping[str, Callable[[], Any]], replayable: Sequence[str]) -> None:
        """Builds the library's variants; those that can be, to be captured as well."""
        kinds = {FLOOR, *replayable, *(backend + INJECTED for backend in replayable)}
        for name, loss in losses.items():
            twice = name in kinds and not self.of.device.dry
            for operation in (STEP, CAPTURED) if twice else (STEP,):
                try:
                    make = partial(self._ours, loss, operation == CAPTURED)
                    self._build(name, make, self.shared, operation)
                except Exception as error:
                    self._keep(operation, name, brief(error))
                    self.of.errors.append(f"{operation}, {name}: {brief(error)}")
                    break

    def add_authors(self) -> None:
        for name, allowed in AUTHORS.items():
            self._build(name, partial(self._authors, allowed), 0, STEP)

    def _ours(self, loss: Callable[[], Any], capturable: bool) -> Call:
        """The loss is made here, so that its memory is counted with the step's."""
        given = self._generator(), loss(), self.batch, self.scale.classes, capturable
        exactly = "float32" if self.precision == "float32" else None
        return exact(Step(*given, exactly), self.precision)

    def _authors(self, allowed: bool) -> Call:
        target = self.release.target.to(self.of.device.device)
        step = AuthorsStep(self._generator(), target, self.batch, self.scale.classes)

        def run() -> None:
            with conformance.tf32(allowed):
                step()

        return run

    def _generator(self) -> nn.Module:
        return generator_of(self.scale, self.pixels, self.of.device.device)

    def _build(self, name: str, make: Callable[[], Call], own: int, operation: str) -> None:
        """A variant, and how much memory a step of it takes."""
        device = self.of.device
        start = device.allocated()
        try:
            call = make()
            call()
            peak = device.peak(call)
        except torch.OutOfMemoryError:
            device.free()
            self._keep(operation, name, "out of memory")
            return
        self.calls[operation][name] = [call]
        if operation == STEP:
            self.peaks[name] = None if peak is None else peak - start + own

    def _keep(self, operation: str, name: str, note: str) -> None:
        self.of.keep(Row(operation, self.shape, self.precision, name, note=note))

    def measure(self) -> None:
        given = STEP, self.shape, self.precision, self.calls[STEP]
        self.of(*given, theirs=tuple(AUTHORS), peaks=self.peaks, items=self.batch)
        if again := self.calls[CAPTURED]:
            self.of(CAPTURED, self.shape, self.precision, again, graph=again, items=self.batch)

    def trained(self, backend: str, ways: Mapping[str, Mapping[str, Any]]) -> None:
        """A step of `dpmmd.train.train`, by the difference of a long and a short run.

        Args:
            ways: name -> settings of the [train] section.
        """
        few, many = self.scale.train_steps
        for name, chosen in ways.items():
            if not self.of.budget.fits(f"{TRAIN}, {name}"):
                continue
            try:
                times = [
                    self._seconds(many, backend, chosen) - self._seconds(few, backend, chosen)
                    for _ in range(3 if many > 10 else 1)
                ]
            except Exception as error:
                self._keep(TRAIN, name, brief(error))
                self.of.errors.append(f"{TRAIN}, {name}: {brief(error)}")
                continue
            a_step = [max(t, 0.0) / (many - few) for t in times]
            how = "graph" if chosen.get("graph") else "launches"
            row = Row(TRAIN, self.shape, self.precision, name, how=how, items=self.batch)
            median, fastest = statistics.median(a_step), min(a_step)
            self.of.keep(replace(row, seconds=median, fastest=fastest, rounds=len(a_step)))

    def _seconds(self, steps: int, backend: str, chosen: Mapping[str, Any]) -> float:
        settings = TrainSection(steps=steps, batch_size=self.batch, estimator="adam", **chosen)
        generator = GeneratorSection(name="resnet", base_channels=self.scale.width)
        more: dict[str, Any] = {"generator_settings": generator, "progress": False}
        with backends.use(backend):
            return dpmmd.train.train(self.release, self.encoder, None, settings, **more).seconds


def with_and_without_graph(backend: str, device: Any) -> dict[str, dict[str, Any]]:
    """Settings of a training: on a GPU both, whatever the default does."""
    if device.device.type != "cuda":
        return {backend: {}}
    return {f"{backend}, graph = {str(graph).lower()}": {"graph": graph} for graph in (False, True)}


def exact(call: Call, precision: str) -> Call:
    """The step as its precision says: where that is float32, without TF32."""
    if precision != "float32":
        return call

    def run() -> None:
        with conformance.tf32(False):
            call()

    return run
