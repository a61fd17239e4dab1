"""The recipe of the README, fashion-eps1, whose encoder and generator are small."""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

import dpmmd
from benches.gpu import steps
from benches.gpu.measure import Call
from benches.gpu.probe.rungs import Rungs
from benches.gpu.probe.step import played_release, precision_of
from benches.gpu.probe.variants import (
    ALGORITHMS,
    HALF,
    OURS,
    PRECISION,
    SEARCHED,
    How,
    patched,
    within,
)
from dpmmd.encoders import squeezenet
from dpmmd.nn import MMDLoss

RECIPE = "step of the recipe, captured"
CLASSES, WIDTH, PIXELS = 10, 32, 28
ESTIMATOR, MOMENTS = "unbiased", (1,)
# Fires of SqueezeNet 1.1 by number: channels of the squeeze, and of each of the expansions.
FIRES = dict(enumerate(((16, 64), (16, 64), (32, 128), (32, 128), (48, 192), (48, 192),
                        (64, 256), (64, 256)), 2))  # fmt: skip


def recipe(rungs: Rungs) -> None:
    """The encoder's and the generator's precision where neither keeps the device busy (1, 2, 6)."""
    core = rungs.cores[0] if rungs.cores else "torch"
    precisions = rungs.sizes.precisions
    generators = (OURS, HALF) if HALF in precisions else (OURS,)
    for encoder, generator in product(precisions, generators):
        _time(rungs, core, encoder, {PRECISION: generator}, inject=False)
    best = precisions[-1], {PRECISION: generators[-1]}
    for name in rungs.cores:
        _time(rungs, name, *best, inject=name == core)
    _time(rungs, core, best[0], {**best[1], ALGORITHMS: SEARCHED}, inject=False)


def _time(rungs: Rungs, core: str, precision: str, how: How, *, inject: bool) -> None:
    side, batch = rungs.sizes.recipe
    options = [f"{choice} {option}" for choice, option in how.items() if option != OURS]
    variant = ", ".join([f"encoder {precision}", *options, core + steps.INJECTED * inject])
    make = partial(_step, rungs, core, precision, how, inject)
    shape = f"squeezenet1.1 {side} px, n={batch}, K={CLASSES}"
    searched = SEARCHED in how.values()
    rungs(RECIPE, shape, precision, {variant: make}, searched=searched, items=batch)


def _step(rungs: Rungs, core: str, precision: str, how: How, inject: bool) -> Call:
    side, batch = rungs.sizes.recipe
    device = rungs.device.device
    with patched(squeezenet, "read_weights", random_weights):
        encoder = dpmmd.encoders.load("squeezenet1.1", image_size=side, precision=precision)
    encoder = encoder.to(device)
    release = played_release(encoder, CLASSES, MOMENTS)
    options: dict[str, Any] = {"estimator": ESTIMATOR, "backend": core, "inject": inject}
    loss = MMDLoss(release, encoder, **options).train()
    generator = dpmmd.generators.build(
        "conv", num_classes=CLASSES, image_size=PIXELS, channels=1, base_channels=WIDTH
    )
    given = generator.to(device).train(), loss, batch, CLASSES, True
    return within(how, steps.Step(*given, precision_of(how)))


def random_weights(_: Any = None) -> dict[str, tuple[Tensor, Tensor]]:
    """As `squeezenet.read_weights`: a machine that is lent has no weights, and time needs none."""
    generator = torch.Generator().manual_seed(0)
    layers: dict[str, tuple[Tensor, Tensor]] = {}

    def add(name: str, outputs: int, inputs: int, kernel: int) -> None:
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator)
        layers[name] = weight * (2 / (inputs * kernel**2)) ** 0.5, torch.zeros(outputs)

    channels = 64
    add("conv1", channels, 3, 3)
    for number, (squeeze, expand) in FIRES.items():
        add(f"fire{number}/squeeze1x1", squeeze, channels, 1)
        add(f"fire{number}/expand1x1", expand, squeeze, 1)
        add(f"fire{number}/expand3x3", expand, squeeze, 3)
        channels = 2 * expand
    return layers
