"""Whole steps, captured: what each change saves, and the fastest combination of them.

Decides the generator's precision (1), which kernels a captured step takes (2), the fused kernels
and the form of the upsampled convolution (3), Adam and the average of weights (4), and whether
cuDNN is to search its algorithms (6).
"""

from __future__ import annotations

from typing import Any

from benches.backends import KERNELS, PLAIN
from benches.gpu.probe.rungs import Rungs
from benches.gpu.probe.sizes import Size
from benches.gpu.probe.step import INJECTED, Network, network_of
from benches.gpu.probe.variants import CHOICES, FIRST, HALF, LAST, OURS, How, described
from dpmmd import injection

WORTH = 0.99  # of the time: what saves less is not chosen
CHOSEN, AVERAGED = "the fastest of each", "the fastest of each, with the weights' average"


def ladder(rungs: Rungs, size: Size) -> None:
    """Every option alone and the best ones together, without the loss and with it."""
    network = network_of(rungs, size)
    losses = _losses(rungs)
    plain = network.time(described({}), {})
    times = {loss: network.time(f"{loss}, {OURS}", {}, loss) for loss in losses}
    how: How = {}
    for choice in CHOICES:
        if choice != LAST:
            how, plain = _option(network, choice, how, plain)
    how, plain = _option(network, LAST, how, plain)
    rungs.chosen[size] = how
    _together(network, how, times)


def brief_ladder(rungs: Rungs, size: Size) -> None:
    """As it is, and in the way that was fastest for the size before it; neither searched."""
    network = network_of(rungs, size)
    near = min(rungs.chosen, key=lambda other: abs(other[0] - size[0]), default=None)
    how = {FIRST: HALF} if near is None else dict(rungs.chosen[near])
    how.pop(LAST, None)
    network.time(described({}), {})
    times = {loss: network.time(f"{loss}, {OURS}", {}, loss) for loss in _losses(rungs)}
    rungs.chosen[size] = how
    _together(network, how, times)


def _losses(rungs: Rungs) -> list[str]:
    """Every core, and with injection where it is the kernels'."""
    names = rungs.cores or [PLAIN]
    injected = [name + INJECTED for name in names if name == KERNELS in injection.BACKENDS]
    return [*names, *injected]


def _option(
    network: Network, choice: str, how: How, plain: float | None
) -> tuple[How, float | None]:
    """The fastest option of a choice, on top of those that are made; the time with it."""
    best = how, plain
    for option in CHOICES[choice]:
        if option == OURS:
            continue
        tried = {**how, choice: option}
        more: dict[str, Any] = {"choice": choice, "option": option}
        more |= {"on": described(how), "before": plain}
        seconds = network.time(f"{choice}: {option}", tried, **more)
        limit = best[1] if best[1] is None or best[0] is not how else best[1] * WORTH
        if seconds is not None and limit is not None and seconds < limit:
            best = tried, seconds
    return best


def _together(network: Network, how: How, times: dict[str, float | None]) -> None:
    """What was chosen, without the loss and with the loss that is fastest."""
    network.time(CHOSEN, how, combination=described(how))
    for loss in times:
        network.time(f"{loss}, {CHOSEN}", how, loss, combination=described(how))
    measured = {loss: seconds for loss, seconds in times.items() if seconds is not None}
    if measured:
        loss = min(measured, key=lambda name: measured[name])
        network.time(f"{loss}, {AVERAGED}", how, loss, average=True, combination=described(how))
