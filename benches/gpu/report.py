"""Results of a GPU run: the file, the table for a terminal, the targets, the README's section."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benches.backends import ON_GPU, compiled

RESULTS = Path(__file__).resolve().parent.parent / "results"
PROBE = "probe-"  # how the name of a probe's file begins: its rows are of other questions
NOT_MEASURED = (
    "Not measured yet: no result of `make bench-gpu` is committed, and the kernels have not run on "
    "a GPU."
)
_HEAD = ("operation", "shape", "dtype", "variant", "time", "of copy", "x eager", "x compile",
         "peak MB", "images/s", "how")  # fmt: skip
_PIECES = ("row statistics", "class sums", "row dots", "gradient")
_CORES = compiled(ON_GPU)[::-1]  # the library's own, of which the faster one counts
_SMALL = "VGG19 32 px, n=128, "
_ONE, _BOTH = _SMALL + "K=1, moments 1", _SMALL + "K=10, moments 1+2"
_STEP_SHAPE = "vgg19 32 px, n=128, K=10, moments 1+2"
_LARGE_STEP = "vgg19 128 px, n=64, K=10, moments 1+2"

Row = Mapping[str, Any]
Results = Mapping[str, Any]


def is_gpu(results: Results) -> bool:
    return "gpu" in results["machine"]


def is_dry(results: Results) -> bool:
    return bool(results["machine"].get("dry_run"))


def kind(machine: Mapping[str, Any]) -> str:
    """The name of a results file: the card's, and "dry-run" for what is no measurement."""
    if machine.get("dry_run"):
        return "dry-run"
    return re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower()).strip("-")


def is_for_measurements(folder: Path) -> bool:
    """Whether a folder is that of the committed measurements, or lies in it."""
    return folder.resolve().is_relative_to(RESULTS)


def save(folder: Path, results: Results, prefix: str = "") -> Path:
    """Writes <prefix><card>.json, a row a line, numbers to four digits.

    Raises:
        ValueError: a dry run, into a folder of measurements.
    """
    if is_dry(results) and is_for_measurements(folder):
        raise ValueError(f"{folder}: is for measurements, and this was a dry run on a CPU.")
    path = folder / f"{prefix}{kind(results['machine'])}.json"
    rows = ",\n  ".join(json.dumps(_short(row)) for row in results["rows"])
    rest = "".join(
        f",\n {json.dumps(key)}: {json.dumps(value)}"
        for key, value in results.items()
        if key not in ("machine", "rows")
    )
    text = (
        f'{{\n "machine": {json.dumps(results["machine"])},\n "rows": [\n  {rows}\n ]{rest}\n}}\n'
    )
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)  # a run that is killed leaves a whole file
    return path


def _short(row: Row) -> dict[str, Any]:
    return {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in row.items()
        if value not in (None, "", 0)
    }


# Targets -----------------------------------------------------------------------------------------


def _find(rows: Sequence[Row], operation: str, shape: str, dtype: str, variant: str) -> Row | None:
    wanted = (operation, shape, dtype, variant)
    return next(
        (
            row
            for row in rows
            if (row["operation"], row["shape"], row["dtype"], row["variant"]) == wanted
            and row.get("seconds")
        ),
        None,
    )


def copy_speed(rows: Sequence[Row]) -> float | None:
    """Bytes read and written a second."""
    row = next((r for r in rows if r["operation"] == "copy" and r.get("seconds")), None)
    return None if row is None else row["bytes"] / row["seconds"]


def _fastest(
    rows: Sequence[Row], operation: str, shape: str, dtype: str, ending: str = ""
) -> Row | None:
    found = [_find(rows, operation, shape, dtype, core + ending) for core in _CORES]
    return min((row for row in found if row), key=lambda row: row["seconds"], default=None)


def _fraction(rows: Sequence[Row], operation: str) -> float | None:
    """The least of the fractions of copy speed that an operation reaches in bfloat16."""
    speed = copy_speed(rows)
    rates = [
        row["bytes"] / row["seconds"]
        for row in rows
        if row["operation"] == operation and row["dtype"] == "bfloat16" and row.get("seconds")
    ]
    return min(rates) / speed if rates and speed else None


def _over(ours: Row | None, other: Row | None, key: str = "seconds") -> float | None:
    """other / ours."""
    if ours is None or other is None or not ours.get(key) or not other.get(key):
        return None
    return float(other[key] / ours[key])


def _added(rows: Sequence[Row], shape: str) -> float | None:
    """Milliseconds that the loss adds to a captured step in bfloat16, on the fastest core."""
    step = "training step, captured"
    base = _find(rows, step, shape, "bfloat16", "sum of the last tap")
    found = [_fastest(rows, step, shape, "bfloat16", ending) for ending in ("", ", injected")]
    ours = [row["seconds"] for row in found if row]
    return 1e3 * (min(ours) - base["seconds"]) if ours and base else None


def targets(results: Results) -> list[tuple[str, float | None, str, bool | None]]:
    """Name, what was measured (None: nothing was), bound in words, whether it is kept."""
    rows = [] if is_dry(results) else results["rows"]
    found: list[tuple[str, float | None, str, bool | None]] = []

    def add(name: str, measured: float | None, bound: float, least: bool, unit: str = "") -> None:
        kept = None
        if measured is not None:
            kept = measured >= bound if least else measured <= bound
        found.append((name, measured, f"at {'least' if least else 'most'} {bound:g}{unit}", kept))

    for piece in _PIECES:
        name = f"{piece}, bfloat16, over its own bytes, of copy speed (least of all sizes)"
        add(name, _fraction(rows, piece), 0.85, True)
    loss, bf16 = "mmd_loss, forward + backward", "bfloat16"
    for shape in (_ONE, _BOTH):
        ours = _fastest(rows, loss, shape, bf16)
        name = f"loss, forward + backward, {shape.removeprefix(_SMALL)}, against compile"
        add(name, _over(ours, _find(rows, loss, shape, bf16, "compile")), 2.5, True)
    replayed = _fastest(rows, f"{loss}, replayed", _ONE, bf16)
    name = "loss, forward + backward, all launches, VGG19 32 px, n=128, bfloat16"
    add(name, None if replayed is None else replayed["seconds"] * 1e3, 0.12, False, " ms")
    floor = "sum of the last tap"
    for step in ("training step", "training step, captured"):
        base = _find(rows, step, _STEP_SHAPE, bf16, floor)
        for ending, bound in (("", 1.10), (", injected", 1.05)):
            ours = _fastest(rows, step, _STEP_SHAPE, bf16, ending)
            ratio = _over(base, ours)
            add(f"{step}{ending}, over the step with a trivial loss", ratio, bound, False)
    for shape, most in ((_STEP_SHAPE, 0.10), (_LARGE_STEP, 1.1)):
        name = f"captured step less the step with a trivial loss, {shape.removeprefix('vgg19 ')}"
        add(name, _added(rows, shape), most, False, " ms")
    # The authors' procedure is launched in both: captured is how `dpmmd train` runs by itself.
    for step, name in (
        ("training step", "training step against"),
        ("training step, captured", "training step, captured, against"),
    ):
        ours = _fastest(rows, step, _STEP_SHAPE, bf16)
        for other, bound in (("eager, TF32 off", 6.0), ("eager, TF32 on", 4.0)):
            ratio = _over(ours, _find(rows, "training step", _STEP_SHAPE, bf16, other))
            add(f"{name} the authors' procedure ({other})", ratio, bound, True)
    release = "release, encoder and sums"
    for dtype in ("bfloat16", "float32"):
        shape = next(
            (r["shape"] for r in rows if r["operation"] == release and r["dtype"] == dtype), ""
        )
        ours, alone = (
            _fastest(rows, release, shape, dtype),
            _find(rows, release, shape, dtype, "encoder alone"),
        )
        name = f"release throughput over that of the encoder alone, {dtype}"
        add(name, _over(ours, alone), 0.95, True)
    peak = _over(
        _find(rows, "training step", _STEP_SHAPE, bf16, "eager, TF32 off"),
        _fastest(rows, "training step", _STEP_SHAPE, bf16),
        "peak_bytes",
    )
    add("peak memory of a step over the authors' procedure", peak, 1 / 3, False)
    return found


def launch_costs(results: Results) -> list[str]:
    """What launching the loss's kernels one by one costs over replaying them as a graph."""
    loss, rows = "mmd_loss, forward + backward", results["rows"]
    said = []
    for core in _CORES:
        launched = _find(rows, loss, _ONE, "bfloat16", core)
        replayed = _find(rows, f"{loss}, replayed", _ONE, "bfloat16", core)
        if launched and replayed and replayed.get("how") == "graph":
            one, two = time_text(launched["seconds"]), time_text(replayed["seconds"])
            said.append(f"launches, {core}: the loss takes {one} launched, {two} replayed ({_ONE})")
    return said


# Tables ------------------------------------------------------------------------------------------


def time_text(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e6:.1f} us" if seconds < 1e-3 else f"{seconds * 1e3:.2f} ms"


def _cells(row: Row, rows: Sequence[Row]) -> tuple[str, ...]:
    head = (row["operation"], row["shape"], row["dtype"], row["variant"])
    seconds = row.get("seconds")
    if not seconds:
        return (*head, "", "", "", "", "", "", row.get("note", ""))
    speed = copy_speed(rows)
    of_copy = row["bytes"] / seconds / speed if row.get("bytes") and speed else None

    def ratio(variant: str, operation: str = head[0]) -> str:
        value = _over(row, _find(rows, operation, *head[1:3], variant))
        return "" if value is None else f"{value:.2f}"

    # A captured step too stands against the authors', which is launched.
    eager = ratio("eager") or ratio("eager, TF32 on", head[0].removesuffix(", captured"))
    return (
        *head,
        time_text(seconds),
        "" if of_copy is None else f"{of_copy:.0%}",
        eager,
        ratio("compile"),
        "" if not row.get("peak_bytes") else f"{row['peak_bytes'] / 1e6:.0f}",
        "" if not row.get("items") else f"{row['items'] / seconds:.0f}",
        "; ".join(t for t in (row.get("how", ""), row.get("note", "")) if t),
    )


def machine_line(results: Results) -> str:
    m = results["machine"]
    if is_dry(results):
        head = "DRY RUN on a CPU: these numbers are no measurement of anything"
    else:
        head = (
            f"{m['gpu']}, {m['multiprocessors']} multiprocessors, {m['memory_gb']} GB, "
            f"L2 {m['l2_mb']} MB; driver {m['driver']}, CUDA {m['cuda']}"
        )
    speed = copy_speed(results["rows"])
    copy = "" if speed is None or is_dry(results) else f"; copy {speed / 1e12:.2f} TB/s"
    triton = f", triton {m['triton']}" if m["triton"] else ""
    commit = f"; commit {m['commit']}" if m.get("commit") else ""
    return f"{head}; torch {m['torch']}{triton}, Python {m['python']}{copy}{commit}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


def _verdicts(results: Results, dashes: bool) -> list[tuple[str, str, str, str]]:
    met = {True: "met", False: "not met" if dashes else "NOT MET", None: "not measured"}
    return [
        (name, bound, "" if value is None else f"{value:.3g}", met[kept])
        for name, value, bound, kept in targets(results)
    ]


def text(results: Results) -> str:
    """Everything, for a terminal; the verdicts last, since a log may be cut at its head."""
    rows = results["rows"]
    lines: list[tuple[str, ...]] = [_HEAD]
    before: tuple[str, ...] = ()
    for row in rows:
        cells = _cells(row, rows)
        lines.append(("", "", "", *cells[3:]) if cells[:3] == before else cells)
        before = cells[:3]
    parts = [machine_line(results), aligned(lines)]
    if costs := launch_costs(results):
        parts.append("\n".join(costs))
    parts.append(aligned([("target", "bound", "measured", ""), *_verdicts(results, False)]))
    checks = results.get("checks", {})
    said = [f"checks: {checks.get('passed', 0)} passed, {len(checks.get('failed', {}))} failed"]
    if checks.get("missed"):
        said[0] += f", {checks['missed']} not reached"
    said += [f"  not reached  {name}: {n}" for name, n in checks.get("unreached", {}).items()]
    said += [f"  FAILED  {name}: {why}" for name, why in checks.get("failed", {}).items()]
    said += [
        f"compute-sanitizer {name}: {what}" for name, what in results.get("sanitizer", {}).items()
    ]
    said += [f"error: {what}" for what in results.get("errors", [])]
    said += [f"left out: {what}" for what in results.get("skipped", [])]
    return "\n\n".join([*parts, "\n".join(said)])


def markdown(results: Results, short: bool = False) -> str:
    """The targets, and unless `short` every row.

    Raises:
        ValueError: a dry run.
    """
    if is_dry(results):
        raise ValueError("a dry run on a CPU is no measurement: it belongs into no table.")
    lines = [machine_line(results) + ".", ""]
    lines += [_line(("target", "bound", "measured", "")), _line(["---"] * 4)]
    lines += [_line(cells) for cells in _verdicts(results, True)]
    if costs := launch_costs(results):
        lines += ["", *(f"- {line}." for line in costs)]
    checks = results.get("checks", {})
    failed = len(checks.get("failed", {}))
    said = f"Checks before it: {checks.get('passed', 0)} passed, {failed} failed"
    missed = f", {checks['missed']} not reached in time" if checks.get("missed") else ""
    lines += ["", f"{said}{missed}."]
    if not short:
        rows = results["rows"]
        lines += ["", _line(_HEAD), _line(["---"] * len(_HEAD))]
        lines += [_line(_cells(row, rows)) for row in rows]
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def section(found: Sequence[Results], make: Callable[[Results], str] = markdown) -> str:
    """What stands between a document's GPU markers."""
    return "\n\n".join(make(results) for results in found) if found else NOT_MEASURED
