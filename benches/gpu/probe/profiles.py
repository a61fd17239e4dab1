"""The kernels of a step by time: which ones cuDNN takes, and how many there are."""

from __future__ import annotations

from typing import Any

from torch.profiler import ProfilerActivity, profile

from benches.gpu.measure import Call
from benches.gpu.probe.rungs import LIMIT, Rungs
from benches.gpu.probe.step import FLOOR, INJECTED, Network, network_of
from benches.gpu.probe.variants import HALF, PRECISION, How, described, within

KEPT = 60  # kernels a step
WARM = 3  # steps


def profiles(rungs: Rungs) -> None:
    """What is left to save: launched steps, as they are and in the fastest way."""
    for size in rungs.sizes.deep:
        network = network_of(rungs, size)
        core = rungs.cores[0] + INJECTED if rungs.cores else FLOOR
        fastest = rungs.chosen.get(size, {PRECISION: HALF})
        for how, loss in (({}, rungs.cores[0] if rungs.cores else FLOOR), (fastest, core)):
            name = f"{network.shape}, {loss}: {described(how)}"
            if not rungs.budget.fits(name, WARM):
                continue
            with rungs.budget.at_most(LIMIT):
                rungs.kernels[name] = _profiled(rungs, network, how, loss)
            rungs.device.free()


def _profiled(
    rungs: Rungs, network: Network, how: How, loss: str
) -> list[tuple[str, float, float]]:
    """Name, launches a step and seconds a step of the kernels that take the most."""
    call: Call = within(how, network.step(how, loss))
    steps, dry = rungs.sizes.profiled, rungs.device.device.type == "cpu"
    for _ in range(WARM):
        call()
    rungs.device.synchronize()
    activity = ProfilerActivity.CPU if dry else ProfilerActivity.CUDA
    with profile(activities=[activity]) as found:
        for _ in range(steps):
            call()
        rungs.device.synchronize()

    def micros(event: Any) -> float:
        return float(event.self_cpu_time_total if dry else event.self_device_time_total)

    events = sorted(found.key_averages(), key=micros, reverse=True)
    rows = [(str(e.key)[:150], e.count / steps, 1e-6 * micros(e) / steps) for e in events]
    whole = sum(count for _, count, _ in rows), sum(seconds for *_, seconds in rows)
    return [("all of them", *whole), *rows[:KEPT]]
