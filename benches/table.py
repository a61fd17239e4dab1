"""Results as a table a person can read, and the README's as Markdown.

python -m benches.table                       the table of every committed file
python -m benches.table --update FILE         rewrite what stands between FILE's markers
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benches.gpu import report
from benches.harness import COPY, FLOORS, READ, READ_READ_WRITE

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"  # all measurements
SHORT_BEGIN, SHORT_END = "<!-- speed: begin -->", "<!-- speed: end -->"  # those with a target
GPU_BEGIN, GPU_END = "<!-- gpu: begin -->", "<!-- gpu: end -->"  # all, on GPUs
GPU_SHORT_BEGIN, GPU_SHORT_END = "<!-- gpu speed: begin -->", "<!-- gpu speed: end -->"  # targets

_HEAD = (
    "operation",
    "shape",
    "dtype",
    "backend",
    "ms",
    "x eager",
    "x compile",
    "GB/s",
    "of copy",
    "error",
    "peak MB",
    "D-vectors",
)
_VGG = "VGG19 32 px, n=64, "
_FORWARD, _BOTH, _STEP = "mean_embedding, forward", "mmd_loss, forward + backward", "training step"
_SUMS = "release, integer class sums"
_LAST_TAP = "sum of the last tap"
_HOST, _BARE = "host, forward + backward", "bare node"
# Row, operation, shape, what the library's time is compared with, bound; a speed-up must be at
# least that, a multiple of a floor at most.
TARGETS = (
    ("forward, against eager", _FORWARD, "K=1, moments 1", "eager", 15.0),
    ("forward, against torch.compile", _FORWARD, "K=1, moments 1", "compile", 8.0),
    ("forward + backward, against eager", _BOTH, "K=1, moments 1", "eager", 14.0),
    ("forward + backward, against torch.compile", _BOTH, "K=1, moments 1", "compile", 3.5),
    ("forward + backward, moments 1 and 2, 10 classes, against eager", _BOTH, "K=10, moments 1+2",
     "eager", 20.0),
    ("forward + backward, moments 1 and 2, 10 classes, against torch.compile", _BOTH,
     "K=10, moments 1+2", "compile", 4.0),
    ("forward, over reading the features once", _FORWARD, "K=1, moments 1", READ, 2.0),
    ("forward + backward, over two reads + one write", _BOTH, "K=1, moments 1", READ_READ_WRITE,
     1.8),
    ("quantised release sums, over reading the features once", _SUMS, "K=10, moments 1", READ, 3.0),
    ("training step, over the step with the sum of the last tap as loss", _STEP, "", _LAST_TAP,
     1.10),
    ("training step, against the authors' procedure", _STEP, "", "eager", 1.8),
    ("host: 16 taps of 8 numbers, over a bare node that allocates as many gradients", _HOST, "",
     _BARE, 1.9),
)  # fmt: skip
_MEMORY = "extra memory of forward + backward, in D-vectors for each moment and class"
_MEMORY_BOUND = 4.0


def load(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def measured(folder: Path) -> list[Path]:
    """The files of a folder that hold measurements for the tables: a probe's are for decisions."""
    return [p for p in sorted(folder.glob("*.json")) if not p.name.startswith(report.PROBE)]


def save(path: Path, results: Mapping[str, Any]) -> None:
    """One row a line, numbers to four digits: small, and differences can be read."""
    rows = ",\n  ".join(json.dumps(_brief(row)) for row in results["rows"])
    text = f'{{\n "machine": {json.dumps(results["machine"])},\n "rows": [\n  {rows}\n ]\n}}\n'
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def _brief(row: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: float(f"{value:.4g}") if isinstance(value, float) else value
        for key, value in row.items()
        if value not in (None, "")
    }


def _cases(rows: Iterable[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Rows of the same measurement together, the library's choice first and floors last."""
    cases: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        cases.setdefault((row["operation"], row["shape"], row["dtype"]), []).append(row)
    return [
        sorted(case, key=lambda row: (not row["ours"], row["variant"] in FLOORS))
        for case in cases.values()
    ]


def _time(case: Iterable[Mapping[str, Any]], variant: str, key: str = "seconds") -> float | None:
    return next((row.get(key) for row in case if row["variant"] == variant), None)


def _cells(row: Mapping[str, Any], case: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    seconds = row.get("seconds")
    head = (row["operation"], row["shape"], row["dtype"], row["variant"])
    if seconds is None:
        return (*head, "", "", "", "", "", "", "", row["note"])
    rate = row["bytes"] / seconds / 1e9 if row.get("bytes") else None
    copy_seconds = _time(case, COPY)
    copy_rate = None
    if copy_seconds:
        copy_rate = _time(case, COPY, "bytes") / copy_seconds / 1e9  # type: ignore[operator]
    return (
        *head,
        f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}",
        _ratio(_time(case, "eager"), seconds),
        _ratio(_time(case, "compile"), seconds),
        "" if rate is None else f"{rate:.1f}",
        "" if rate is None or copy_rate is None else f"{rate / copy_rate:.0%}",
        "" if row.get("error") is None else f"{row['error']:.1e}",
        "" if row.get("peak_bytes") is None else f"{row['peak_bytes'] / 1e6:.0f}",
        "" if row.get("d_vectors") is None else f"{row['d_vectors']:.1f}",
    )


def _ratio(other: float | None, seconds: float) -> str:
    return "" if other is None else f"{other / seconds:.2f}"


def targets(results: Mapping[str, Any]) -> list[tuple[str, float, float, str, bool]]:
    """Row, ratio of medians, ratio of least times, bound and whether it is kept by the medians.

    Rows whose measurement is not among the results are left out.
    """
    found = []
    cases = {(c[0]["operation"], c[0]["shape"]): c for c in reversed(_cases(results["rows"]))}
    for name, operation, shape, other, bound in TARGETS:
        wanted = next(
            (
                c
                for (o, s), c in cases.items()
                if o == operation and (not shape or s == _VGG + shape)
            ),
            [],
        )
        ours = next((row for row in wanted if row["ours"]), None)
        against = next((row for row in wanted if row["variant"] == other), None)
        if ours is None or against is None or against.get("seconds") is None:
            continue
        at_least = other in ("eager", "compile")
        ratios = [
            against[key] / ours[key] if at_least else ours[key] / against[key]
            for key in ("seconds", "fastest")
        ]
        kept = ratios[0] >= bound if at_least else ratios[0] <= bound
        found.append((name, *ratios, f"at {'least' if at_least else 'most'} {bound:g}", kept))
    rows = [r for r in results["rows"] if r["operation"] == _BOTH and r["ours"]]
    rows = [r for r in rows if r["shape"].startswith(_VGG) and r["dtype"] == "float32"]
    memory = [r["d_vectors"] for r in rows if r.get("d_vectors") is not None]
    if memory:
        most = max(memory)
        found.append((_MEMORY, most, most, f"at most {_MEMORY_BOUND:g}", most <= _MEMORY_BOUND))
    return found


def _machine(results: Mapping[str, Any]) -> str:
    m = results["machine"]
    load = f"load before {m['load']:g}"
    if m["load"] > 0.25 * m["cores"]:
        load += " (others were at work: these figures are disturbed)"
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads, {m['instructions']}; "
        f"torch {m['torch']}, Python {m['python']}; freed memory {m['freed_memory']}; {load}"
    )


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join(
            [cell.ljust(w) if i < 4 else cell.rjust(w) for i, (cell, w) in enumerate(pairs)]
            + [row[-1]]
        ).rstrip()
        for row in rows
        for pairs in [list(zip(row, widths, strict=False))]
    )


def text(results: Mapping[str, Any]) -> str:
    """The whole table and the targets, for a terminal."""
    lines: list[tuple[str, ...]] = [_HEAD]
    for case in _cases(results["rows"]):
        for i, row in enumerate(case):
            cells = _cells(row, case)
            lines.append(cells if i == 0 else ("", "", "", *cells[3:]))
    parts = [_machine(results), _aligned(lines)]
    if goals := targets(results):
        head = ("target", "", "", "", "measured", "of least times", "bound", "")
        body = [
            (name, "", "", "", f"{median:.2f}", f"{least:.2f}", bound, "met" if kept else "NOT MET")
            for name, median, least, bound, kept in goals
        ]
        parts.append(_aligned([head, *body]))
    return "\n\n".join(parts)


def markdown(results: Mapping[str, Any]) -> str:
    """The library's row of every measurement, and the targets."""
    lines = [_machine(results) + ".", ""]
    columns = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
    lines += [_row(_HEAD[i] for i in columns), _row("---" for _ in columns)]
    for case in _cases(results["rows"]):
        cells = _cells(case[0], case)
        lines.append(_row(cells[i] for i in columns))
    if goals := targets(results):
        lines += ["", _row(("target", "bound", "measured", "")), _row(["---"] * 4)]
        lines += [
            _row((name, bound, f"{median:.2f}", "met" if kept else "not met"))
            for name, median, _, bound, kept in goals
        ]
    return "\n".join(lines)


def short(results: Mapping[str, Any]) -> str:
    """The measurements that have a target, for people with little time."""
    lines = [_machine(results) + ".", ""]
    lines += [_row(("operation", "shape", "ms", "x eager", "x torch.compile")), _row(["---"] * 5)]
    for case in _cases(results["rows"]):
        cells = _cells(case[0], case)
        wanted = {(o, _VGG + s if s else cells[1]) for _, o, s, _, _ in TARGETS}
        if cells[2] != "bfloat16" and (cells[0], cells[1]) in wanted:
            against = _time(case, "eager") or _time(case, "torch")
            eager = _ratio(against, case[0]["seconds"])
            lines.append(_row((*cells[:2], cells[4], eager, cells[6])))
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def updated(document: str, folder: Path = RESULTS) -> str:
    """The document with what stands between its markers made anew from the committed results.

    Raises:
        ValueError: the document has no pair of markers, or one more than once; a result is that of
            a dry run.
    """
    results = [load(path) for path in measured(folder)]
    on_cpus = [r for r in results if not report.is_gpu(r)]
    on_gpus = [r for r in results if report.is_gpu(r)]
    tables = {
        (BEGIN, END): "\n\n".join(map(markdown, on_cpus)),
        (SHORT_BEGIN, SHORT_END): "\n\n".join(map(short, on_cpus)),
        (GPU_BEGIN, GPU_END): report.section(on_gpus),
        (GPU_SHORT_BEGIN, GPU_SHORT_END): report.section(
            on_gpus, lambda r: report.markdown(r, short=True)
        ),
    }
    counts = {pair: (document.count(pair[0]), document.count(pair[1])) for pair in tables}
    if not any(map(any, counts.values())) or any(
        count not in ((0, 0), (1, 1)) for count in counts.values()
    ):
        raise ValueError(
            "expected one line BEGIN and, behind it, one line END, for one or several of "
            f"{', '.join(f'{begin} {end}' for begin, end in tables)}"
        )
    for (begin, end), table in tables.items():
        if counts[begin, end] == (1, 1):
            before, rest = document.split(begin)
            after = rest.split(end)[1]
            document = before + "\n".join([begin, *([table] if table else []), end]) + after
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--update", type=Path, metavar="FILE", help="document with the markers")
    document = parser.parse_args().update
    if document is not None:
        document.write_text(updated(document.read_text("utf-8")), encoding="utf-8")
        return
    for path in measured(RESULTS):
        results = load(path)
        print((report.text if report.is_gpu(results) else text)(results), end="\n\n")


if __name__ == "__main__":
    main()
