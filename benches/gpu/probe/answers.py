"""What a probe found, as tables: whole steps beside their floors, and each question's numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from benches.gpu.probe.cores import LAUNCHED
from benches.gpu.probe.ladder import AVERAGED, CHOSEN
from benches.gpu.probe.parts import COPY, PRODUCT
from benches.gpu.probe.step import OPERATION
from benches.gpu.report import aligned, time_text

Row = Mapping[str, Any]
Results = Mapping[str, Any]

# Of a captured step: GFLOP of the encoder (forward and by its input) and of the generator (forward
# and both gradients), and the least seconds on an H200, all in bfloat16. The seconds are derived,
# not measured: arithmetic at 800 TFLOP/s, and at 4.24 TB/s about nine passes over the maps of both
# networks and seven over M K D numbers of the loss. For VGG19, the generator of width 64, K = 10
# and both moments.
FLOORS = {
    (32, 128): (204 + 171, 0.8e-3),
    (64, 128): (815 + 850, 3.4e-3),
    (128, 64): (1631 + 1783, 7.1e-3),
    (256, 16): (1631 + 1804, 9.5e-3),
}
_HEAD = ("operation", "shape", "dtype", "variant", "time", "of copy", "TFLOP/s", "how")
_STEPS = ("step", "floor", "arithmetic", "as it is", "fastest", "over floor", "loss, as it is",
          "loss, fastest", "with average", "combination")  # fmt: skip


def text(results: Results) -> str:
    """Everything, for a terminal; the answers last, since a log may be cut at its head."""
    rows = results["rows"]
    parts = [aligned([_HEAD, *_lines(rows)])]
    parts += [_kernels(name, found) for name, found in results["kernels"].items()]
    if saved := list(_saved(rows)):
        head = ("step", "dtype", "choice", "option", "before", "after", "saved", "on top of")
        parts.append(aligned([head, *saved]))
    if launched := list(_launched(rows)):
        parts.append(aligned([("features", "shape", "fastest launched", "ahead by"), *launched]))
    if compiling := list(_compiling(rows)):
        compiled = ("step", "compiled", "saves", "takes", "pays after")
        parts.append(aligned([compiled, *compiling]))
    if steps := list(_steps(rows)):
        parts.append(aligned([_STEPS, *steps]))
    said = [f"error: {what}" for what in results["errors"]]
    said += [f"left out: {what}" for what in results["skipped"]]
    return "\n\n".join([*parts, "\n".join(said)])


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """A row a line; what it has in common with the one above is left out."""
    speed = rate(rows, COPY, "bytes")
    before: tuple[str, ...] = ()
    for row in rows:
        seconds = row.get("seconds")
        cells = row["operation"], row["shape"], row["dtype"]
        share = row["bytes"] / seconds / speed if seconds and speed and row.get("bytes") else None
        flops = row["flops"] / seconds / 1e12 if seconds and row.get("flops") else None
        yield (
            *(("", "", "") if cells == before else cells),
            row["variant"],
            time_text(seconds) if seconds else "",
            "" if share is None else f"{share:.0%}",
            "" if flops is None else f"{flops:.0f}",
            "; ".join(t for t in (row.get("how", ""), row.get("note", "")) if t),
        )
        before = cells


def _kernels(name: str, found: Sequence[Sequence[Any]]) -> str:
    lines = [(f"{seconds * 1e6:.1f} us", f"x {count:g}", key) for key, count, seconds in found[:12]]
    return f"kernels of a step, {name}\n{aligned(lines)}"


def rate(rows: Sequence[Row], operation: str, key: str, dtype: str | None = None) -> float | None:
    """Bytes or operations a second of the first row of an operation."""
    for row in rows:
        fits = row["operation"] == operation and dtype in (None, row["dtype"])
        if fits and row.get("seconds"):
            return float(row[key] / row["seconds"])
    return None


def seconds_of(rows: Sequence[Row], shape: str, variant: str) -> float | None:
    """Of a captured step; the last time that it was measured counts."""
    found = [
        row["seconds"]
        for row in rows
        if (row["operation"], row["shape"], row["variant"]) == (OPERATION, shape, variant)
        and row.get("seconds")
    ]
    return float(found[-1]) if found else None


def _saved(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """What each option of the ladder saves, on top of those that were chosen before it."""
    for row in rows:
        if row.get("option") and row.get("seconds") and row.get("before"):
            before, after = row["before"], row["seconds"]
            cells = row["shape"], row["dtype"], row["choice"], row["option"]
            times = time_text(before), time_text(after), _signed(before - after)
            yield (*cells, *times, row["on"])


def _launched(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Which core is the faster one to launch, by bytes of features."""
    of: dict[tuple[int, str], dict[str, float]] = {}
    for row in rows:
        if row["operation"] == LAUNCHED and row.get("seconds"):
            of.setdefault((row["features"], row["shape"]), {})[row["variant"]] = row["seconds"]
    last: tuple[float, float, str] | None = None
    for (size, shape), times in sorted(of.items()):
        first, *others = sorted(times, key=lambda core: times[core])
        ahead = times[others[0]] / times[first] if others else 1.0
        if last is not None and last[2] != first:  # a line between the logarithms
            whole = math.log(last[1]) + math.log(ahead)
            place = math.log(last[1]) / whole if whole else 0.5
            crossing = math.exp((1 - place) * math.log(last[0]) + place * math.log(size))
            yield f"{crossing / 1e9:.2f} GB", "about here", f"{last[2]} = {first}", "1.00"
        yield f"{size / 1e9:.2f} GB", shape, first, f"{ahead:.2f}"
        last = size, ahead, first


def _compiling(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """After how many steps compiling has paid for itself."""
    for row in rows:
        if row.get("compiling") and row.get("before") and row.get("seconds"):
            saved, takes = row["before"] - row["seconds"], row["compiling"]
            steps = f"{takes / saved:.0f} steps" if saved > 0 else "never"
            cells = row["shape"], " and ".join(row["modules"])
            yield (*cells, _signed(saved), time_text(takes), steps)


def _steps(rows: Sequence[Row]) -> Iterator[tuple[str, ...]]:
    """Captured steps over their floors, and what the loss adds to the step without it."""
    peak = rate(rows, PRODUCT, "flops", "bfloat16")
    for shape in dict.fromkeys(row["shape"] for row in rows if row["operation"] == OPERATION):
        of = [row for row in rows if row["operation"] == OPERATION and row["shape"] == shape]
        plain, chosen = seconds_of(of, shape, "as it is"), seconds_of(of, shape, CHOSEN)
        first = _fastest(of, "as it is", plain)
        last = _fastest(of, CHOSEN, chosen)
        average = next((r for r in of if r["variant"].endswith(AVERAGED) and r.get("seconds")), {})
        gflop, floor = next(
            (v for (px, n), v in FLOORS.items() if f" {px} px, n={n}," in shape), (0, 0.0)
        )
        yield (
            shape,
            time_text(floor) if floor else "",
            time_text(gflop * 1e9 / peak) if gflop and peak else "",
            *(time_text(first[0]) if first else "", time_text(last[0]) if last else ""),
            f"{last[0] / floor:.2f}" if last and floor else "",
            *(_signed(found[1]) if found else "" for found in (first, last)),
            time_text(average["seconds"]) if average else "",
            next((f"{last[2]}; {r['combination']}" for r in of if last and r.get("combination")),
                 ""),
        )  # fmt: skip


def _fastest(
    rows: Sequence[Row], way: str, without: float | None
) -> tuple[float, float, str] | None:
    """Seconds of the step whose loss is fastest, what the loss adds, and which loss it is."""
    found = [
        (row["seconds"], row["variant"].removesuffix(f", {way}"))
        for row in rows
        if row["variant"].endswith(f", {way}") and row.get("seconds")
    ]
    if not found or without is None:
        return None
    seconds, loss = min(found)
    return seconds, seconds - without, loss


def _signed(seconds: float) -> str:
    return f"{seconds * 1e3:+.3f} ms"
