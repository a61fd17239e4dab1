"""python3 -m benches.gpu: checks, timings, one table and benches/results/<card>.json.

With --probe, instead: where a step's time goes, and <results>/probe-<card>.json.

Exit codes: 0 done, 1 a check or the library's own code failed, 2 wrong use or no CUDA device.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benches.backends import KERNELS, ON_GPU, compiled
from benches.gpu import ambient, probe

# In order, with the seconds that each may take: more than it took on an H200, and together what the
# default budget has.
SECTIONS = {
    "checks": 95.0, "sanitizer": 35.0, "copy": 5.0, "kernels": 30.0, "loss": 40.0, "steps": 125.0,
    "release": 40.0, "cores": 40.0,
}  # fmt: skip
BUDGET = 420.0
CHECK_PROCESSES = 6


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python3 -m benches.gpu", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="smallest sizes: for a dry run")
    parser.add_argument("--budget", type=float, metavar="SECONDS")
    parser.add_argument("--sections", metavar="A,B", help=f"of {', '.join(SECTIONS)}")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="FOLDER",
        help="where to write <card>.json; default: nowhere",
    )
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument(
        "--probe",
        action="store_true",
        help="measure instead where a step's time goes and what each change saves, in "
        f"{probe.BUDGET:g} seconds; its sections: {', '.join(probe.SECTIONS)}",
    )
    instead.add_argument(
        "--sweep", action="store_true", help="search launch parameters instead, print a table"
    )
    parser.add_argument("--part", help=argparse.SUPPRESS)  # K/N/START or "sanitize": a worker
    found = parser.parse_args(argv)
    known, budget = (probe.SECTIONS, probe.BUDGET) if found.probe else (SECTIONS, BUDGET)
    found.budget = budget if found.budget is None else found.budget
    wanted = known if found.sections is None else found.sections.split(",")
    found.sections = [name for name in wanted if name]
    for name in found.sections:
        if name not in known:
            parser.error(f"--sections: {name!r}, expected of {', '.join(known)}")
    if found.device == "cpu" and not found.tiny:
        parser.error("--device cpu: a dry run; give --tiny too, the other sizes would take hours")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    stood_in = ambient.prepare()
    import torch

    from benches.gpu import device as devices

    device: Any
    if options.device == "cpu":
        device = devices.Host()
    elif torch.cuda.is_available():
        device = devices.Cuda()
    else:
        what = "--probe " if options.probe else ""
        print(
            f"--device cuda: no CUDA device (torch {torch.__version__}). Run it on a machine "
            "with a GPU, with a Python whose PyTorch is built for CUDA; `python3 -m benches.gpu "
            f"{what}--device cpu --tiny` is a dry run that measures nothing.",
            file=sys.stderr,
        )
        return 2
    if options.results is not None and device.dry:
        from benches.gpu import report

        if report.is_for_measurements(options.results):
            print(f"--results {options.results}: not for dry runs.", file=sys.stderr)
            return 2
    if options.part is not None:
        return worker(device, options)
    if options.sweep:
        return sweep(device, options)
    if options.probe:
        from benches.gpu.probe import program

        return program.run(device, options, stood_in)
    return run(device, options, stood_in)


def worker(device: Any, options: argparse.Namespace) -> int:
    """Runs a share of the checks in this process, which another one has begun."""
    from benches.gpu import checks, inputs

    sanitized = options.part == "sanitize"
    # There only what launches kernels of ours: torch's own are not ours, and take minutes to patch.
    names = compiled(ON_GPU) if sanitized else ON_GPU
    present, _ = inputs.library(device.device, names)
    all_of_them = checks.all_checks(device, present, options.tiny)
    if sanitized:
        selection = [c for c in all_of_them if c.short][::5]
        return int(checks.share(selection, 0, 1, 0, sys.stdout) > 0)
    part, parts, start = map(int, options.part.split("/"))
    checks.share(all_of_them, part, parts, start, sys.stdout)
    return 0


def sweep(device: Any, options: argparse.Namespace) -> int:
    from benches.gpu import inputs
    from benches.gpu import sweep as sweeps
    from benches.gpu.budget import Budget

    present, missing = inputs.library(device.device)
    if KERNELS not in present:
        print(f"--sweep: needs Triton: {missing[KERNELS]}", file=sys.stderr)
        return 2
    budget = Budget(options.budget)
    scale = inputs.TINY if options.tiny else inputs.FULL
    print(sweeps.sweep(device, budget, scale, lambda line: print(line, flush=True)))
    for what in budget.skipped:
        print(f"left out: {what}")
    return 0


def run(device: Any, options: argparse.Namespace, stood_in: Sequence[str] = ()) -> int:
    """All sections; returns the exit code."""
    from benches.gpu import checks, inputs, operations, released, report, sanitizer, steps
    from benches.gpu.budget import Budget, Section
    from benches.gpu.measure import Measure

    scale = inputs.TINY if options.tiny else inputs.FULL
    budget = Budget(options.budget)
    measure = Measure(device, budget, scale.rounds, scale.seconds)
    present, missing = inputs.library(device.device)
    inputs.note_missing(missing, stood_in, budget, measure.errors)
    results: dict[str, Any] = {
        "machine": device.describe(),
        "rows": measure.rows,
        "checks": {"passed": 0},
        "sanitizer": {},
        "errors": measure.errors,
        "skipped": budget.skipped,
        "seconds": budget.took,
    }
    broken: set[tuple[str, str]] = set()
    same = ["--device", options.device, *(["--tiny"] if options.tiny else [])]

    def check() -> None:
        wanted = checks.all_checks(device, present, options.tiny)
        left = lambda: budget.left  # noqa: E731
        if options.tiny:
            outcome = checks.here(wanted, left)
        else:
            processes = min(CHECK_PROCESSES, max(1, (os.cpu_count() or 2) - 2))
            outcome = checks.spread(wanted, processes, same, left)
        broken.update(outcome.broken)
        kept = ("passed", "failed", "missed", "unreached")
        results["checks"] = {name: getattr(outcome, name) for name in kept}

    def sanitize() -> None:
        results["sanitizer"], errors = sanitizer.sanitize(same, lambda: budget.left)
        measure.errors.extend(f"compute-sanitizer {error}" for error in errors)

    def kernels() -> None:
        if KERNELS in present:
            operations.pieces(measure, scale, broken)
        else:
            budget.skip("all of it", "no Triton")

    run_of = {
        "checks": check,
        "sanitizer": sanitize,
        "copy": lambda: operations.copy(measure, scale),
        "kernels": kernels,
        "loss": lambda: operations.loss(measure, scale, present, broken),
        "steps": lambda: steps.steps(measure, scale, present, broken),
        "release": lambda: released.released(measure, scale, present, broken),
        "cores": lambda: operations.cores(measure, scale, present, broken),
    }
    written: list[Path] = []

    def write() -> None:
        name, seconds = list(budget.took.items())[-1]
        print(f"{name}: {seconds:.0f} s, {budget.spent:.0f} in all", file=sys.stderr, flush=True)
        if options.results is not None:
            written[:] = [report.save(options.results, results)]

    sections = [
        Section(name, seconds, run_of[name])
        for name, seconds in SECTIONS.items()
        if name in options.sections
    ]
    budget.run(sections, write)
    print(report.text(results))
    print(f"\n{budget.spent:.0f} s" + "".join(f", written: {path}" for path in written))
    return int(any((results["checks"].get("failed"), measure.errors, budget.failed)))


if __name__ == "__main__":
    sys.exit(main())
