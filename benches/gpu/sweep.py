"""Searches launch parameters near those of kernels/table.py and prints the table with the best.

From an entry of the table to a neighbour (half or twice the block, the rows or the warps, one stage
more or less), as long as one is faster by more than `GAIN`, and its result is that of the entry.
What is printed is to be pasted into kernels/table.py, and held to its register budgets by
`python -m tests.core.kernels_aot`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benches.gpu import inputs
from benches.gpu.budget import Budget, OutOfTimeError
from benches.gpu.device import NoGraph, brief
from benches.gpu.inputs import Scale
from benches.gpu.measure import Call, sets_of
from benches.shapes import Case
from dpmmd._contract.protocol import Step
from dpmmd.bounds import Bound

GAIN = 0.02
BLOCKS, ROWS, WARPS, STAGES = (64, 4096), (1, 64), (1, 16), (1, 4)
FIXED_ROWS = ("row_dots", "gradient", "estimator")  # table.TILE_ROWS, or without rows

Found = dict[tuple[str, torch.dtype], dict[int, Any]]  # columns -> Config


@contextmanager
def table_of(operation: str, config: Any) -> Iterator[None]:
    """Within the block an operation is launched with these parameters."""
    from dpmmd.kernels import table

    before = table.lookup

    def lookup(name: str, *arguments: Any) -> Any:
        return config if name == operation else before(name, *arguments)

    table.lookup = lookup
    try:
        yield
    finally:
        table.lookup = before


def neighbours(operation: str, config: Any) -> list[Any]:
    """One parameter changed, by one notch."""
    changes: list[dict[str, int]] = []
    for key, (least, most), notches in (
        ("block", BLOCKS, (config.block // 2, config.block * 2)),
        ("rows", ROWS, (config.rows // 2, config.rows * 2)),
        ("num_warps", WARPS, (config.num_warps // 2, config.num_warps * 2)),
        ("num_stages", STAGES, (config.num_stages - 1, config.num_stages + 1)),
    ):
        if key != "rows" or operation not in FIXED_ROWS:
            changes += [{key: value} for value in notches if least <= value <= most]
    return [replace(config, **change) for change in changes]


def operations(
    device: Any, like: Case
) -> dict[str, tuple[list[Call], Callable[[], Sequence[Tensor]]]]:
    """Operation of the table -> calls on each set of inputs, and their last results."""
    from dpmmd.kernels.bounded_sums import bounded_sums
    from dpmmd.kernels.class_sums import class_sums_into
    from dpmmd.kernels.estimator import estimate
    from dpmmd.kernels.gradient import Terms, gradient_into
    from dpmmd.kernels.row_dots import row_dots_into
    from dpmmd.kernels.row_statistics import row_statistics, row_statistics_into
    from dpmmd.kernels.taps import Taps

    where = device.device
    labels, upstream = like.labels(where), like.target(where)
    y = (torch.arange(like.n) % like.classes).to(where)
    valid = torch.ones(like.n, dtype=torch.bool, device=where)
    limits = torch.full((like.n,), 1 << 30, device=where)
    bound = Bound(like.moments)
    calls: dict[str, list[Call]] = {}
    results: dict[str, Callable[[], Sequence[Tensor]]] = {}
    means = torch.empty_like(upstream)
    sums = torch.zeros(like.classes, len(like.moments) * like.dim, dtype=torch.int64, device=where)
    counts = torch.ones(like.classes, device=where)
    for seed in range(sets_of(like.feature_bytes, device.cache_bytes)):
        maps = like.features(where, seed)
        taps = Taps(maps)
        saved, found = row_statistics(taps, labels, like.classes, bound)
        coefficients, gradients = torch.zeros_like(saved.scale), [torch.empty_like(f) for f in maps]
        terms = Terms(bound, saved, coefficients, upstream)
        a_call: dict[str, Call] = {
            "row_statistics": partial(row_statistics_into, taps, labels, bound, saved, found),
            "class_sums": partial(class_sums_into, taps, bound, saved, means),
            "row_dots": partial(row_dots_into, taps, labels, bound, saved, upstream, coefficients),
            "gradient": partial(gradient_into, taps, terms, gradients),
            "bounded_sums": partial(
                bounded_sums, maps, y, valid, limits, bound=bound, nonnegative=True, sums=sums
            ),
        }
        results |= {
            "row_statistics": lambda s=saved: [s.scale, s.projection],  # type: ignore[misc]
            "class_sums": lambda: [means],
            "row_dots": lambda c=coefficients: [c],  # type: ignore[misc]
            "gradient": lambda g=gradients: g,  # type: ignore[misc]
            "bounded_sums": lambda: [sums],
        }
        for name, call in a_call.items():
            calls.setdefault(name, []).append(call)
    if like.dtype == torch.float32:
        names = ("estimate", "first_moment", "second_moment")
        state = {name: torch.zeros_like(upstream) for name in names}
        state["steps"] = torch.zeros_like(counts)
        step = Step("adam", lr=1e-3, **state)
        calls["estimator"] = [partial(estimate, upstream, counts, upstream * 0.9, step)]
        results["estimator"] = lambda: list(state.values())
    return {name: (calls[name], results[name]) for name in calls}


def seconds(device: Any, calls: Sequence[Call], rounds: int = 7) -> float:
    """Median time of a call."""

    def once() -> None:
        for call in calls:
            call()

    once()
    repeats = max(1, int(1e-3 / max(device.seconds(once), 1e-9))) if not device.dry else 1

    def many() -> None:
        for _ in range(repeats):
            once()

    try:
        timed = device.capture(many)
    except NoGraph:
        timed = many
    return statistics.median(device.seconds(timed) for _ in range(rounds)) / repeats / len(calls)


def results_of(
    operation: str, calls: Sequence[Call], results: Callable[[], Sequence[Tensor]]
) -> list[Tensor]:
    """What a call leaves, from a state of zeros where it adds to what is there."""
    if operation in ("bounded_sums", "estimator"):
        for tensor in results():
            tensor.zero_()
    calls[-1]()
    return [t.detach().double().cpu() for t in results()]


def climb(
    device: Any,
    budget: Budget,
    operation: str,
    config: Any,
    calls: list[Call],
    results: Any,
    say: Callable[[str], None],
) -> Any:
    """The best parameters found, from a table's."""
    with table_of(operation, config):
        truth = results_of(operation, calls, results)
        best = first = seconds(device, calls)
    tried = {config}
    improved = True
    while improved:
        improved = False
        for candidate in neighbours(operation, config):
            if candidate in tried or budget.left <= 0:
                continue
            tried.add(candidate)
            try:
                with budget.at_most(20), table_of(operation, candidate):
                    got = results_of(operation, calls, results)
                    if not all(map(_alike, got, truth)):
                        say(f"  {candidate}: another result")
                        continue
                    time = seconds(device, calls)
            except OutOfTimeError:
                continue
            except Exception as error:  # too much shared memory, too many registers
                say(f"  {candidate}: {brief(error)}")
                continue
            if time < best * (1 - GAIN):
                config, best, improved = candidate, time, True
                break
    say(f"  {best * 1e6:.1f} us with {config}, {first * 1e6:.1f} us with the table's")
    return config


def _alike(a: Tensor, b: Tensor) -> bool:
    return float((a - b).norm()) <= 1e-2 * float(b.norm())  # false for NaN


def sweep(device: Any, budget: Budget, scale: Scale, say: Callable[[str], None] = print) -> str:
    """Searches every operation, dtype and size that there is time for; the table, as text."""
    from dpmmd.kernels import table

    found: Found = {}
    for pixels in scale.pixels[:3:2] if len(scale.pixels) > 2 else scale.pixels:
        for dtype in (torch.bfloat16, torch.float32):
            like = inputs.case(scale, pixels, dtype, scale.classes, (1, 2))
            for name, (calls, results) in operations(device, like).items():
                what = f"{name}, {like.dtype_name}, D={like.dim}"
                if not budget.fits(what):
                    continue
                say(what)
                config = table.lookup(name, device.device, dtype, like.dim)
                found.setdefault((name, dtype), {})[like.dim] = climb(
                    device, budget, name, config, calls, results, say
                )
            device.free()
    return paste(found, table)


def paste(found: Mapping[tuple[str, torch.dtype], Mapping[int, Any]], table: Any) -> str:
    """The entries as they stand in kernels/table.py; sizes in between go to the smaller one's."""
    lines = []
    for title, dtype in (("_BF16", torch.bfloat16), ("_FP32", torch.float32)):
        lines.append(f"{title} = {{")
        for (name, of), sizes in found.items():
            if of != dtype:
                continue
            ordered = sorted(sizes.items())
            entries = []
            for i, (_, config) in enumerate(ordered):
                last = i + 1 == len(ordered)
                if not last and config == ordered[i + 1][1]:
                    continue
                most = 'float("inf")' if last else str(ordered[i + 1][0] - 1)
                entries.append(f"({most}, {_config(name, config, table)})")
            lines.append(f'    "{name}": ({", ".join(entries)},),')
        lines.append("}")
    return "\n".join(lines)


def _config(name: str, config: Any, table: Any) -> str:
    tiled = name in ("row_dots", "gradient") and config.rows == table.TILE_ROWS
    rows = "TILE_ROWS" if tiled else config.rows
    values = (config.block, rows, config.num_warps, config.num_stages, config.registers)
    return f"Config({', '.join(map(str, values))})"
