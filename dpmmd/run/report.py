"""What a run found, as report.json and as tables, and the mean of several runs."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpmmd.errors import RunError
from dpmmd.files import expanded
from dpmmd.privacy import Release
from dpmmd.privacy.composition import epsilon_of, together
from dpmmd.run.folder import Measured
from dpmmd.run.noiseless import stated_epsilon

EVALUATION_NOTE = (
    "Accuracies, metrics, run times and memory come from real images: they are not covered by "
    "(epsilon, delta), and publishing them says something about those images."
)
_FIGURES = ("frechet_distance", "kid", "precision", "recall", "density", "coverage")


def make_report(
    released: Release,
    accuracy: dict[str, Any],
    measured: Measured,
    figures: dict[str, Any],
    told: dict[str, Any],
) -> dict[str, Any]:
    m = released.metadata
    return {
        "private": m.private,
        "privacy": _privacy(released),
        "accuracy": accuracy,
        "metrics": figures,
        **told,
        "accuracy_note": EVALUATION_NOTE,
        "seconds": {k: round(v, 2) for k, v in measured.seconds.items()},
        "peak_rss_bytes": measured.peak(),
        "version": m.version,
    }


def _privacy(released: Release) -> dict[str, Any]:
    """What a run promises: with modes both releases together, and each of them."""
    m = released.metadata
    origin = None if m.modes is None else m.modes.origin
    parts = [m.statement] if origin is None else [origin, m.statement]
    told: list[dict[str, float | None]] = [
        {"epsilon": part.epsilon, "delta": part.delta, "mu": part.mu} for part in parts
    ]
    whole = told[0]
    if len(parts) > 1:
        mu = together(m)
        whole = {"epsilon": epsilon_of(mu, m.delta), "delta": m.delta, "mu": mu}
    if math.isinf(stated_epsilon(released)):  # no noise: there is no number
        whole, *told = ({**each, "epsilon": None, "mu": None} for each in (whole, *told))
    of = {"adjacency": m.adjacency, "unit": m.unit}
    return {**whole, **of, **({"releases": told} if len(parts) > 1 else {})}


def metric_rows(figures: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The figures of `dpmmd.metrics.compare`, for a table: the heads, then a line a figure."""
    kinds = {None: "", True: " (not trained against)", False: " (trained against)"}
    heads = ("figure", *(f"{name}{kinds[f['held_out']]}" for name, f in figures.items()))
    return [
        heads,
        *(
            (key.replace("_", " "), *(f"{f[key]:.4g}" for f in figures.values()))
            for key in _FIGURES
        ),
    ]


def accuracy_rows(accuracy: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """classifier, trained on synthetic, trained on real: for a table."""

    def percent(classifier: dict[str, Any], kind: str) -> str:
        value = classifier.get(kind)
        if value is None or math.isnan(value):
            return ""
        seeds = classifier.get("seeds", {}).get(kind, ())
        spread = f" ± {100 * statistics.stdev(seeds):.1f} (n = {len(seeds)})" if seeds else ""
        return f"{100 * value:.1f}{spread} %"

    return [
        (name.replace("_", " "), percent(a, "synthetic"), percent(a, "real"))
        for name, a in accuracy.items()
    ]


def summarise(folders: Sequence[str | Path]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and n of the figures of several finished runs.

    Each run counts once, with the mean over its classifiers' seeds.

    Args:
        folders: run folders with the same privacy statement.

    Raises:
        RunError: no report in a folder, a folder twice, or runs of different (epsilon, delta).
    """
    paths = [expanded(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < max(len(paths), 1):
        raise RunError(f"folders={[str(p) for p in paths]}: expected different run folders.")
    reports = []
    for path in paths:
        if not (path / "report.json").is_file():
            raise RunError(f"{path}: has no report.json; finish its run first (`dpmmd run`).")
        reports.append(json.loads((path / "report.json").read_text("utf-8")))
    first = reports[0]
    for path, report in zip(paths, reports, strict=True):
        if (report["private"], report["privacy"]) != (first["private"], first["privacy"]):
            raise RunError(
                f"{path}: its privacy is {report['privacy']}, that of {paths[0]} is "
                f"{first['privacy']}; summarise runs that promise the same."
            )
    collected: dict[str, list[float]] = {}
    for report in reports:
        for name, figures in {**report["accuracy"], **report.get("metrics", {})}.items():
            for key, value in figures.items():
                if key in ("synthetic", "real") or key in _FIGURES:
                    collected.setdefault(f"{name}.{key}", []).append(value)
    return {
        "runs": [str(path) for path in paths],
        "private": first["private"],
        "privacy": first["privacy"],
        "figures": {
            name: {
                "mean": statistics.fmean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else None,
                "n": len(values),
            }
            for name, values in collected.items()
        },
        "accuracy_note": EVALUATION_NOTE,
    }
