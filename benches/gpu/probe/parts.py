"""What the device can do, and what the parts of a step take: each a graph of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from benches.gpu.measure import Call
from benches.gpu.probe.rungs import Rungs
from benches.gpu.probe.step import Network, foreach_adam, network_of
from benches.gpu.probe.variants import CHOICES, OURS, PRECISION, How, within
from benches.gpu.suite import conformance
from dpmmd import precision
from dpmmd.recipe import TrainSection
from dpmmd.train.state import Average, adam

COPY, PRODUCT, LAUNCH = "copy", "matrix product", "kernel without work, in a graph"
PART = "part of a step"


def ceilings(rungs: Rungs) -> None:
    """The device's copy, its products in each precision, and a launch in a graph: the floors."""
    sizes, device = rungs.sizes, rungs.device.device

    def copy() -> Call:
        source = torch.empty(sizes.copied // 4, device=device).normal_()
        to = torch.empty_like(source)
        return lambda: to.copy_(source)

    size = f"{sizes.copied / 1e9:.1f} GB"
    rungs(COPY, size, "float32", {COPY: copy}, least=2 * sizes.copied)
    m = sizes.matrix

    def product(dtype: torch.dtype, allowed: bool) -> Call:
        a, b = (torch.randn(m, m, device=device, dtype=dtype) for _ in range(2))

        def call() -> None:
            with conformance.tf32(allowed):
                torch.mm(a, b)

        return call

    for name, dtype, allowed in (
        ("bfloat16", torch.bfloat16, False), ("tf32", torch.float32, True),
        ("float32", torch.float32, False),
    ):  # fmt: skip
        make = partial(product, dtype, allowed)
        rungs(PRODUCT, f"{m} x {m}", name, {PRODUCT: make}, flops=2 * m**3)

    def empty() -> Call:
        one = torch.zeros(1, device=device)
        return lambda: [one.add_(1) for _ in range(sizes.empty)]

    rungs(LAUNCH, f"{sizes.empty} of them", "float32", {LAUNCH: empty})


def parts(rungs: Rungs) -> None:
    """Generator, encoder, Adam and the average: where the milliseconds are (1, 4)."""
    for size in rungs.sizes.deep:
        network = network_of(rungs, size)
        for option in CHOICES[PRECISION]:
            _time(network, option, _generator(network, {PRECISION: option}))
        _time(network, network.precision, _encoder(network))
        _time(network, "float32", _optimizers(network))


def _time(network: Network, dtype: str, variants: Mapping[str, Callable[[], Call]]) -> None:
    network.rungs(PART, network.shape, dtype, variants)


def _generator(network: Network, how: How) -> dict[str, Callable[[], Call]]:
    def build(backward: bool) -> Call:
        step = network.step(how)
        y = torch.arange(network.batch, device=network.device) % network.scale.classes
        weights = list(step.generator.parameters())
        with torch.no_grad():
            upstream = torch.randn_like(step.images(y))

        def call() -> Any:
            if backward:
                images = step.images(y)
                with precision.products(step.precision, step.device):
                    return torch.autograd.grad(images, weights, upstream)
            with torch.no_grad():
                return step.images(y)

        return within(how, call)

    return {
        "generator, forward": partial(build, False),
        "generator, forward + backward": partial(build, True),
    }


def _encoder(network: Network) -> dict[str, Callable[[], Call]]:
    def build(backward: bool) -> Call:
        images = torch.rand(network.batch, 3, *2 * (network.pixels,), device=network.device)
        y = torch.zeros(network.batch, dtype=torch.int64, device=network.device)

        def call() -> Any:
            if backward:
                return torch.autograd.grad(network.last(images, y), images)
            with torch.no_grad():
                return network.encoder(images)

        images.requires_grad_()
        return call

    return {
        "encoder, forward": partial(build, False),
        "encoder, forward + backward": partial(build, True),
    }


def _optimizers(network: Network) -> dict[str, Callable[[], Call]]:
    """Adam with its rate on the device, as in a captured training, and the weights' average."""

    def optimizer(make: Callable[[nn.Module], torch.optim.Optimizer]) -> Call:
        generator = network.generator()
        for p in generator.parameters():
            p.grad = torch.randn_like(p)
        return make(generator).step

    def average() -> Call:
        generator = network.generator()
        found = Average(generator, 0.999, network.device)
        found.begin(100)
        return partial(found.update_on_device, generator)

    settings = TrainSection()
    return {
        f"Adam, {OURS}": lambda: optimizer(lambda g: adam(g, settings, network.device, True)),
        "Adam, foreach": lambda: optimizer(lambda g: foreach_adam(g, network.device)),
        f"weights' average, {OURS}": average,
    }
