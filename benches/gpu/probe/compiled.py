"""torch.compile inside the captured step: what it saves, and what compiling takes."""

from __future__ import annotations

from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from benches.gpu.measure import Call
from benches.gpu.probe.rungs import Rungs
from benches.gpu.probe.step import OPERATION, Network, network_of
from benches.gpu.probe.variants import ALGORITHMS, HALF, PRECISION, How, described, within

GENERATOR, ENCODER = "generator", "encoder"
COMPILING = 60.0  # seconds that it may take


def compiled(rungs: Rungs) -> None:
    """Whether a training is long enough to pay for compiling (3): after how many steps it is.

    Without the loss, whose operations torch.compile leaves as they are; in the way that was fastest
    without compiling, but for cuDNN's search.
    """
    if not rungs.sizes.compile:
        rungs.budget.skip("all of it", "a dry run does not compile")
        return
    seen: set[Sequence[str]] = set()
    for size in rungs.sizes.deep:
        network = network_of(rungs, size)
        how = dict(rungs.chosen.get(size, {PRECISION: HALF}))
        how.pop(ALGORITHMS, None)
        before = network.time(f"{described(how)}; nothing compiled", how)
        apart = () if seen else ((GENERATOR,), (ENCODER,))
        for modules in (*apart, (GENERATOR, ENCODER)):
            # After the two apart, both together come from torch.compile's cache.
            _time(network, how, modules, before, cold=not (apart and len(modules) > 1))
            seen.add(modules)


def _time(
    network: Network, how: How, modules: Sequence[str], before: float | None, *, cold: bool
) -> None:
    spent: list[float] = []

    def make() -> Call:
        torch._dynamo.reset()
        step = network.step(how)
        started = perf_counter()
        if GENERATOR in modules:
            step.generator.compile(dynamic=False)
        if ENCODER in modules:
            network.encoder.backbone.compile(dynamic=False)
        call = within(how, step)
        call()
        network.rungs.device.synchronize()
        spent.append(perf_counter() - started)
        return call

    variant = f"{described(how)}; compiled: {' and '.join(modules)}"
    given = OPERATION, network.shape, network.precision, {variant: make}
    more: dict[str, Any] = {"items": network.batch, "before": before, "modules": list(modules)}
    try:
        found = network.rungs(*given, theirs=True, limit=COMPILING, **more)
    finally:
        network.encoder.backbone._compiled_call_impl = None
    if found and cold:
        network.rungs.rows[-1]["compiling"] = spent[0]
