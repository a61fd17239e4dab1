"""What classifiers learn from the synthetic images, on Fashion-MNIST: releases, and what was tried.

python -m benches.quality                   measure what is not measured yet (hours); --only NAME
python -m benches.quality --device cuda --at-once 4 --limit 480 --results out/fashion-mnist.json
                                            the same on a GPU that is lent for minutes
python -m benches.quality --update docs/QUALITY.md     rewrite the tables there
python -m benches.quality --plot docs/quality.png      accuracy against epsilon (needs matplotlib)

Every row is a run of a recipe with some keys changed, in a process of its own, on one thread, with
a release of its own noise; or, for statistics that the package does not have, of
`benches.quality.statistics`. Accuracies are on the 10,000 real test images, of classifiers trained
on 60,000 synthetic ones.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from benches.quality import ideas, modes, rounded
from benches.rows import between

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benches" / "results" / "quality" / "fashion-mnist.json"
CLASSIFIERS = ("logistic_regression", "mlp", "cnn")
TITLES = ("logistic regression", "MLP", "CNN")
# Harder et al. 2023, logistic regression and MLP: the better of phi1 and phi1 + phi2, delta = 1e-5
PAPER = {"10": (75.7, 76.0), "1": (76.2, 75.0), "0.2": (72.5, 70.4)}


@dataclass(frozen=True)
class Row:
    """One setting.

    Attributes:
        name: its key in the results.
        what: in words, for the table.
        epsilon: of the release; "inf": no noise.
        changes: SECTION.KEY=VALUE over the recipe.
        statistic: options of `benches.quality.statistics`, which is run instead.
        repeats: releases, each with its own noise; seeds of training differ likewise.
        predicted: what was expected of it, where it is an experiment.
        recipe: by name or path.
    """

    name: str
    what: str
    epsilon: str = "inf"
    changes: tuple[str, ...] = ()
    statistic: tuple[str, ...] = ()
    repeats: int = 1
    predicted: str = ""
    recipe: str = "fashion-eps1"


_UNALIGNED = "benches/quality/unaligned.toml"
_SMALL = (
    "encoder.image_size=32",
    "release.weights={pixels = 0.5, products = 0}",
    "train.steps=3000",
)
_PLAIN = ("encoder.image_size=32", "sample.temperature=1")
_OF_MODES = "release.weights={products = 0.5, class_products = 0.5}"
_BY_CLASS = "release.weights={phi1 = 0.3, products = 0.5, class_products = 0.5}"
CLAIMS = (
    # Noise on the features costs nothing here: most of the bound goes to the moments of pixels.
    # A covariance of each class stands out from the noise, too.
    Row("epsilon-10", "epsilon = 10", "10", (_BY_CLASS,), repeats=3),
    # How many a class: by the public rule.
    Row("modes-10", "the same, with modes", "10", (_OF_MODES, "modes={share = 0.5}"), repeats=3),
    Row("unaligned-10", "the same, not aligned", "10", recipe=_UNALIGNED),
    Row("epsilon-1", "epsilon = 1", "1", repeats=3),
    Row(
        "modes-1",
        "the same, with modes",
        "1",
        (_OF_MODES, "modes={share = 0.49}"),
        repeats=3,
    ),
    Row("unaligned-1", "the same, not aligned", "1", repeats=2, recipe=_UNALIGNED),
    # A quarter of the numbers: half the noise on the whole vector, at the same norm. Features need
    # most of the bound here, and products would be nothing but noise. Trained longer, a generator
    # learns the noise of the features.
    Row(
        "epsilon-0.2",
        "epsilon = 0.2, 32 px",
        "0.2",
        _SMALL,
        repeats=3,
    ),
    Row("unaligned-0.2", "the same, not aligned", "0.2", _PLAIN, recipe=_UNALIGNED),
)
TRIED = (
    Row(
        "equal-0.2",
        "32 px, aligned, features and pixels of equal weight",
        "0.2",
        _PLAIN[:1],
        predicted="better than not aligned",
    ),
    Row(
        "products-0.2",
        "32 px, aligned, products of pixels at half the weight of features",
        "0.2",
        (*_PLAIN[:1], "release.weights={pixels = 0.35, products = 0.35}"),
        predicted="worse than without products: they are noise",
    ),
    Row(
        "steps-6000-0.2",
        "32 px, aligned, 6,000 steps instead of 3,000",
        "0.2",
        _SMALL[:2],
        predicted="better: trained longer",
    ),
    Row(
        "steps-1500-0.2",
        "32 px, aligned, 1,500 steps instead of 3,000",
        "0.2",
        (*_SMALL[:2], "train.steps=1500"),
        predicted="better: less of the noise is learnt",
    ),
    Row(
        "by-class-1",
        "64 px, aligned, the covariance of each class, too",
        "1",
        ("release.weights={products = 0.7, class_products = 0.7}",),
        predicted="a little better: class by class it hardly stands out from the noise",
    ),
    Row(
        "pooled-10",
        "64 px, aligned, one covariance for all classes",
        "10",
        ("release.weights={phi1 = 0.3}",),
        predicted="worse than class by class",
    ),
    Row(
        "steps-3000-10",
        "the same, 3,000 steps instead of 6,000",
        "10",
        ("release.weights={phi1 = 0.3}", "train.steps=3000"),
        predicted="as good: little noise to learn, little left to gain",
    ),
)
# Without noise, and short (the recipe of the demo): what limits the images when noise does not.
_LIKE_DEMO = (
    "encoder.image_size=32",
    "train.steps=2000",
    "train.ema_decay=0.998",
    "sample.temperature=1",
    "evaluate.num_train=20000",
)
_DEMO = "fashion-demo"
ABLATIONS = (
    Row("demo", "the demo: aligned, 32 px, batch 100, 2,000 steps, width 32", recipe=_DEMO),
    Row(
        "demo-unaligned",
        "not aligned",
        changes=_LIKE_DEMO,
        predicted="worse, most of all the linear one",
        recipe=_UNALIGNED,
    ),
    *(
        Row(f"demo-{name}", what, changes=changes, predicted=predicted, recipe=_DEMO)
        for name, what, changes, predicted in (
            (
                "by-class",
                "aligned class by class",
                ("release.weights={products = 0.5, class_products = 0.5}",),
                "better",
            ),
            ("steps-6000", "6,000 steps", ("train.steps=6000", "train.ema_decay=0.999"), "better"),
            ("size-64", "input of 64 px", ("encoder.image_size=64",), "finer detail: better"),
            ("batch-50", "batch 50", ("train.batch_size=50",), "worse: noisier gradients"),
            ("batch-200", "batch 200", ("train.batch_size=200",), "a little better"),
            ("width-16", "width 16", ("generator.base_channels=16",), "worse"),
            ("width-64", "width 64", ("generator.base_channels=64",), "better"),
            ("cosine", "cosine schedule", ("train.schedule=cosine",), "better: quieter at the end"),
            ("no-average", "no average of weights", ("train.ema_decay=0",), "worse"),
            ("batch-means", "estimator batch", ("train.estimator=batch",), "less variety: worse"),
            ("phi2", "phi1 and phi2", ("release.moments=[1,2]",), "more variety: better"),
            ("lite0", "EfficientNet-Lite0", ("encoder.name=efficientnet-lite0",), "as good"),
            ("warm", "temperature 1.3", ("sample.temperature=1.3",), "no better once aligned"),
        )
    ),
    *(
        Row(
            f"demo-{name}",
            f"not aligned, and matching the {name.replace('-', ' ')}",
            statistic=("--statistic", name),
            predicted=predicted,
        )
        for name, predicted in (
            ("pixel-covariance", "linear classifiers better"),
            ("pixel-fourier", "more modes: better"),
            ("feature-covariance", "more modes: better"),
        )
    ),
)


@dataclass(frozen=True)
class Where:
    """Where rows are measured, and what becomes of them.

    Attributes:
        device: of the runs, as `dpmmd run` takes it.
        at_once: how many runs share the device.
        limit: seconds after which no further run begins, and runs that are under way are stopped.
        results: the file that rows are added to.
    """

    device: str = "cpu"
    at_once: int = 1
    limit: float | None = None
    results: Path = RESULTS

    @property
    def threads(self) -> int:
        """Of each run: one on a CPU, whose figures are by the core; beside a GPU a fair part."""
        return 1 if self.device == "cpu" else max(1, (os.cpu_count() or 1) // self.at_once)

    def facts(self, seconds: float) -> dict[str, Any]:
        """What a result says of its training. Runs that share a GPU wait for one another."""
        if self.device == "cpu":
            return {"seconds": round(seconds)}
        import torch

        return {"seconds": None, "device": torch.cuda.get_device_name()}


def run(row: Row, repeat: int, folder: Path, where: Where, left: float | None) -> dict[str, Any]:
    """Accuracies, seconds of training and the peak of memory, of one release.

    Raises:
        subprocess.TimeoutExpired: it takes longer than the seconds that are ``left``.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(where.threads)}
    if row.statistic:
        command = [sys.executable, "-m", "benches.quality.statistics", *row.statistic]
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, env=environment, timeout=left
        )
        found = json.loads(done.stdout.splitlines()[-1])
        (accuracy,) = found["accuracy"].values()
        return {"accuracy": accuracy, "seconds": found["seconds"]}
    command = [sys.executable, "-m", "dpmmd", "run", row.recipe, "--out", str(folder)]
    command += ["--device", where.device]
    command += ["--epsilon", row.epsilon, "--quiet", "--set", f"train.seed={repeat}"]
    for change in row.changes:
        command += ["--set", change]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=left
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stderr}")
    report = json.loads((folder / "report.json").read_text())
    return {
        "accuracy": {name: report["accuracy"][name]["synthetic"] for name in CLASSIFIERS},
        **where.facts(report["seconds"]["train"]),
        "peak_rss_bytes": report["peak_rss_bytes"],
    }


def measure(only: str | None, where: Where) -> None:
    """Measures what is not measured yet, in the order of the tables."""
    done = {(r["row"], r["repeat"]) for r in (*_read(), *_read(where.results))}
    wanted = [
        (row, repeat)
        for row in (*CLAIMS, *TRIED, *ABLATIONS)
        if only in (None, row.name)
        for repeat in range(row.repeats)
        if (row.name, repeat) not in done
    ]
    writing, end = threading.Lock(), None if where.limit is None else monotonic() + where.limit

    def one(row: Row, repeat: int) -> None:
        left = None if end is None else end - monotonic()
        name = f"{row.name}, release {repeat}"
        if left is not None and left <= 0:
            print(f"{name}: no time left", flush=True)
            return
        with tempfile.TemporaryDirectory(prefix="quality-") as place:
            folder = Path(place) / "run"
            try:
                result = run(row, repeat, folder, where, left)
            except subprocess.TimeoutExpired:
                print(f"{name}: no time left", flush=True)
                return
            found = {"row": row.name, "repeat": repeat, **result}
            with writing:
                _keep(found, where.results)
                if row in CLAIMS and row.recipe != _UNALIGNED and repeat == 0:
                    pictures = ROOT / "docs" if where.results == RESULTS else where.results.parent
                    shutil.copy(folder / "samples.png", pictures / f"samples-{row.name}.png")
            print(_json([found]), flush=True)

    with ThreadPoolExecutor(where.at_once) as pool:
        for job in [pool.submit(one, *each) for each in wanted]:
            job.result()


def _keep(found: dict[str, Any], results: Path) -> None:
    kept = [*_read(results), found]  # another process may have written meanwhile
    kept.sort(key=lambda r: (r["row"], r["repeat"]))
    results.parent.mkdir(parents=True, exist_ok=True)
    results.write_text(_json(kept))


def _read(results: Path | None = None) -> list[dict[str, Any]]:
    """Of a file; None: what the tables show."""
    path = results or RESULTS
    return json.loads(path.read_text()) if path.exists() else []  # type: ignore[no-any-return]


def _json(found: list[dict[str, Any]]) -> str:
    return "[\n" + ",\n".join(json.dumps(each) for each in found) + "\n]\n"


def _scores(name: str) -> dict[str, list[float]]:
    """Accuracies of a row's releases, in percent, by classifier."""
    found = [r["accuracy"] for r in _read() if r["row"] == name]
    return {c: [100 * each[c] for each in found] for c in CLASSIFIERS if found}


def _cell(values: list[float]) -> str:
    mean = f"{statistics.mean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


def claims() -> str:
    """The table of epsilons, as Markdown."""
    lines = [
        f"| delta = 1e-5 | {' | '.join(TITLES)} | releases | training, one core |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in CLAIMS:
        scores = _scores(row.name)
        if not scores:
            continue
        seconds = [r["seconds"] for r in _read() if r["row"] == row.name]
        longest = max(s for s in seconds if s is not None)  # null: suspended meanwhile, or on a GPU
        cells = [_cell(scores[c]) for c in CLASSIFIERS]
        lines.append(
            f"| {row.what} | {' | '.join(cells)} | {len(seconds)} | {longest / 60:.0f} min |"
        )
        if row.recipe != _UNALIGNED:
            continue
        paper = PAPER[row.epsilon]
        lines.append(f"| the paper at {row.epsilon} | {paper[0]} | {paper[1]} | | | |")
    return "\n".join(lines)


def tried() -> str:
    """The table of experiments at some epsilon, as Markdown; empty while none is measured."""
    return _experiments(TRIED)


def ablations() -> str:
    """The table of experiments without noise, likewise."""
    return _experiments(ABLATIONS)


def _experiments(rows: tuple[Row, ...]) -> str:
    noisy = any(row.epsilon != "inf" for row in rows)
    head = ["what", *(["epsilon"] if noisy else []), "predicted", *TITLES]
    lines = []
    for row in rows:
        if scores := _scores(row.name):
            named = [row.what, *([row.epsilon] if noisy else []), row.predicted]
            lines.append([*named, *(_cell(scores[c]) for c in CLASSIFIERS)])
    if not lines:
        return ""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *lines))


def plot(path: Path) -> None:
    """Accuracy against epsilon: this recipe's releases, and the paper's figures."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.2, 3.6))
    for i, (classifier, title) in enumerate(zip(CLASSIFIERS, TITLES, strict=True)):
        for recipe, style in (("fashion-eps1", "-"), (_UNALIGNED, "--")):
            found = [(r, _scores(r.name)) for r in CLAIMS if r.recipe == recipe]
            rows = sorted((float(r.epsilon), scores[classifier]) for r, scores in found if scores)
            x, y = [e for e, _ in rows], [statistics.mean(v) for _, v in rows]
            named = {"label": title} if style == "-" else {}
            axes.plot(x, y, color=f"C{i}", marker="o", linestyle=style, **named)
            for e, values in rows:
                axes.plot([e] * len(values), values, color=f"C{i}", marker="_", linestyle="none")
        if i < 2:
            points = sorted((float(e), v[i]) for e, v in PAPER.items())
            axes.plot(*zip(*points, strict=True), color=f"C{i}", linestyle=":", marker="x")
    axes.plot([], [], color="grey", linestyle="--", marker="o", label="not aligned")
    axes.plot([], [], color="grey", linestyle=":", marker="x", label="the paper's figures")
    axes.set(xscale="log", xlabel="epsilon (delta = 1e-5)", ylabel="accuracy on real images, %")
    axes.set_xticks([0.2, 1, 10], ["0.2", "1", "10"])
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def update(path: Path) -> None:
    text = path.read_text()
    tables = {"claims": claims(), "tried": tried(), "ablations": ablations()}
    tables["rounded"] = rounded.table(rounded.read())
    tables["ideas"] = ideas.table(ideas.read())
    tables["explained"], tables["modes"] = modes.explained_table(), modes.trainings_table()
    for name, table in tables.items():
        begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
        if table:
            text = between(text, begin, end, table)
    path.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", metavar="NAME")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--at-once", type=int, default=1, metavar="RUNS")
    parser.add_argument("--limit", type=float, metavar="SECONDS")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--update", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.update:
        update(arguments.update)
    elif arguments.plot:
        plot(arguments.plot)
    else:
        where = Where(arguments.device, arguments.at_once, arguments.limit, arguments.results)
        measure(arguments.only, where)


if __name__ == "__main__":
    main()
