"""Builds a training step in one of the ways of `variants`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benches.gpu import steps
from benches.gpu.measure import Call
from benches.gpu.probe.rungs import Rungs
from benches.gpu.probe.sizes import Size
from benches.gpu.probe.variants import (
    FOREACH,
    OPTIMIZER,
    OURS,
    PRECISION,
    SEARCHED,
    How,
    is_trial,
    within,
)
from dpmmd.encoders import Encoder
from dpmmd.nn import MMDLoss
from dpmmd.train.state import Average

FLOOR = steps.FLOOR  # the loss that costs nothing
INJECTED = steps.INJECTED
OPERATION = steps.CAPTURED

Value = Callable[[Tensor, Tensor], Tensor]


def network_of(rungs: Rungs, size: Size) -> Network:
    """Made once a size."""
    found: Network = rungs.networks.get(size) or Network(rungs, size)
    rungs.networks[size] = found
    return found


class Network:
    """The encoder of one size of images, and what makes steps with it.

    Args:
        rungs: what measures.
        size: side and batch.
    """

    def __init__(self, rungs: Rungs, size: Size) -> None:
        self.rungs, (self.pixels, self.batch) = rungs, size
        self.scale, self.device = rungs.sizes.scale, rungs.device.device
        self.precision = self.scale.precisions[0]
        self.encoder: Encoder = steps.encoder_of(
            self.scale, self.pixels, self.precision, self.device
        )
        rungs.settle()

    @property
    def shape(self) -> str:
        return f"{self.scale.encoder} {self.pixels} px, n={self.batch}, K={self.scale.classes}"

    def generator(self) -> nn.Module:
        with self.device:  # weights are drawn there: on the host it takes longer than a step
            return steps.generator_of(self.scale, self.pixels, self.device)

    def step(self, how: How, loss: str = FLOOR) -> steps.Step:
        """A step of the loss by name: FLOOR, a backend, or a backend with INJECTED."""
        value = self.last if loss == FLOOR else self.loss(loss)
        precision = precision_of(how)
        given = self.generator(), value, self.batch, self.scale.classes, True, precision
        step = steps.Step(*given)
        if how.get(OPTIMIZER) == FOREACH:
            step.optimizer = foreach_adam(step.generator, self.device)
        return step

    def last(self, x: Tensor, y: Tensor) -> Tensor:
        return self.encoder(x)[-1].float().sum()

    def loss(self, name: str, **options: Any) -> MMDLoss:
        """The library's, of both moments by class, for a target of random numbers."""
        backend = name.removesuffix(INJECTED)
        release = played_release(self.encoder, self.scale.classes)
        given: dict[str, Any] = {"backend": backend, "inject": name.endswith(INJECTED)}
        return MMDLoss(release, self.encoder, estimator="adam", **given, **options).train()

    def time(
        self, variant: str, how: How, loss: str = FLOOR, *, average: bool = False, **more: Any
    ) -> float | None:
        """Seconds of a captured step.

        Args:
            variant: the name of its row.
            how: in which way it is done.
            loss: as in `step`.
            average: whether the weights' average is a part of it.
            more: of the row.
        """

        def make() -> Call:
            step = self.step(how, loss)
            return within(how, averaged(step) if average else step)

        searched = SEARCHED in how.values()
        more = {"theirs": is_trial(how), "searched": searched, "items": self.batch} | more
        given = OPERATION, self.shape, self.precision, {variant: make}
        return self.rungs(*given, **more).get(variant)


def precision_of(how: How) -> str | None:
    """Of the generator; None: as the package chooses."""
    found = how.get(PRECISION, OURS)
    return None if found == OURS else found


def foreach_adam(generator: nn.Module, device: torch.device) -> torch.optim.Adam:
    """An operation a kernel, and the rate on the device, as a captured step needs it."""
    options: dict[str, Any] = {"foreach": True, "capturable": device.type == "cuda"}
    rate = torch.tensor(1e-3, device=device) if device.type == "cuda" else 1e-3
    return torch.optim.Adam(generator.parameters(), lr=rate, **options)


def averaged(step: steps.Step) -> Call:
    """The step, and the average of its generator's weights as `dpmmd.train` keeps it in a graph."""
    average = Average(step.generator, 0.999, step.device)
    average.begin(100)

    def call() -> None:
        step()
        average.update_on_device(step.generator)

    return call


def played_release(encoder: Encoder, classes: int, moments: tuple[int, ...] = (1, 2)) -> Any:
    """What `MMDLoss` asks of a release, of which making one takes gigabytes at 256 px."""
    device = next(encoder.parameters()).device
    target = torch.rand(len(moments), classes, encoder.dim, device=device)
    metadata = SimpleNamespace(
        moments=moments, bound="sphere", clip=1.0, joint_weight=None, num_classes=classes,
        labelled=True, features_of=encoder.spec(), array_sha256="",
    )  # fmt: skip
    target.mul_(2 / encoder.dim**0.5)
    return SimpleNamespace(
        metadata=metadata, target=target, shared_target=None, shared=None, modes=None,
        num_classes=classes, num_rows=classes,
    )  # fmt: skip
