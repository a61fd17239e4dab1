"""Runs the sections of a probe and keeps what they found."""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benches.backends import ON_CPU, ON_GPU
from benches.backends import compiled as kernels_of
from benches.gpu import inputs, report
from benches.gpu.budget import Budget, Section
from benches.gpu.probe import SECTIONS, sizes
from benches.gpu.probe.answers import text
from benches.gpu.probe.compiled import compiled
from benches.gpu.probe.convolutions import convolutions
from benches.gpu.probe.cores import cores
from benches.gpu.probe.host import host
from benches.gpu.probe.ladder import brief_ladder, ladder
from benches.gpu.probe.one_pass import one_pass
from benches.gpu.probe.parts import ceilings, parts
from benches.gpu.probe.profiles import profiles
from benches.gpu.probe.recipe import recipe
from benches.gpu.probe.rungs import Rungs
from benches.gpu.probe.variants import described

RUN: dict[str, Callable[[Rungs], None]] = {
    "ceilings": ceilings, "parts": parts, "one_pass": one_pass, "cores": cores, "host": host,
    "recipe": recipe, "convolutions": convolutions, "profile": profiles, "compiled": compiled,
}  # fmt: skip


def run(device: Any, options: argparse.Namespace, stood_in: Sequence[str] = ()) -> int:
    """All sections of ``options.sections``; returns the exit code."""
    chosen = sizes.TINY if options.tiny else sizes.FULL
    budget = Budget(options.budget)
    names = ON_CPU if device.dry else ON_GPU  # interpreted, the kernels would take minutes
    present, missing = inputs.library(device.device, kernels_of(names))
    rungs = Rungs(device, budget, chosen, present)
    inputs.note_missing(missing, stood_in, budget, rungs.errors)
    results: dict[str, Any] = {
        "machine": device.describe(),
        "rows": rungs.rows,
        "chosen": {},
        "kernels": rungs.kernels,
        "errors": rungs.errors,
        "skipped": budget.skipped,
        "seconds": budget.took,
    }
    written: list[Path] = []

    def write() -> None:
        name, seconds = list(budget.took.items())[-1]
        print(f"{name}: {seconds:.0f} s, {budget.spent:.0f} in all", file=sys.stderr, flush=True)
        results["chosen"] = {str(px): described(how) for (px, _), how in rungs.chosen.items()}
        if options.results is not None:
            written[:] = [report.save(options.results, results, report.PROBE)]

    rungs.settle()
    budget.run(_sections(rungs, options.sections), write)
    gc.unfreeze()
    print(report.machine_line(results))
    print(text(results))
    print(f"\n{budget.spent:.0f} s" + "".join(f", written: {path}" for path in written))
    return int(any((rungs.errors, budget.failed)))


def _sections(rungs: Rungs, names: Sequence[str]) -> list[Section]:
    """Those of a name that is asked for, in order."""
    deep = {f"ladder{pixels}" for pixels, _ in rungs.sizes.deep}
    work: dict[str, Callable[[], None]] = {name: partial(run, rungs) for name, run in RUN.items()}
    for name, size in rungs.sizes.steps.items():
        work[name] = partial(ladder if name in deep else brief_ladder, rungs, size)
    return [
        Section(name, seconds, work[name])
        for name, seconds in SECTIONS.items()
        if name in names and name in work
    ]
