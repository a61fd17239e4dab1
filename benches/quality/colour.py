"""Colour: what the images of `photos32` and `photos64` look like in numbers, beside real ones.

python -m benches.quality.colour RUN              measure a folder of `dpmmd run photos32`
python -m benches.quality.colour --picture RUN FILE          real and synthetic images, as a PNG
python -m benches.quality.colour --update docs/QUALITY.md    rewrite the tables there

For each class, of images in [0, 1]:

- saturation: the largest less the smallest of a pixel's three channels, in the mean;
- brightness: standard deviation over images of an image's mean;
- contrast: standard deviation of the pixels of a channel within an image, in the mean;
- across, down: mean square of the difference of neighbours in a row, and in a column.

A run is measured as its images are written, and as its generator makes them, before alignment.
Real images are those of the recipe's source. None of this is covered by the release's epsilon.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benches.rows import between
from dpmmd import recipe
from dpmmd.data import open_source, photographs
from dpmmd.train import load_generator, sample

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benches" / "results" / "quality" / "photos.jsonl"
MEASURES = ("saturation", "brightness", "contrast", "across", "down")
CLASSIFIERS = ("logistic_regression", "mlp", "cnn")
TITLES = ("logistic regression", "MLP", "CNN")
_COLUMNS = 8  # images of a class in a picture, real and synthetic
_GAP = 4  # pixels between the two

Images = NDArray[np.uint8]
Labels = NDArray[np.int64]


def measures(images: Images, labels: Labels) -> dict[str, list[float]]:
    """Each of `MEASURES` for every class, of uint8 images [n, 3, H, W]."""
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for k in range(int(labels.max()) + 1):
        x = images[labels == k].astype(np.float32) / 255
        grey = x.mean(axis=1)
        values = (
            (x.max(axis=1) - x.min(axis=1)).mean(),
            grey.mean(axis=(1, 2)).std(),
            x.std(axis=(2, 3)).mean(),
            np.square(np.diff(grey, axis=2)).mean(),
            np.square(np.diff(grey, axis=1)).mean(),
        )
        for name, value in zip(MEASURES, values, strict=True):
            found[name].append(round(float(value), 5))
    return found


def measure(run: Path) -> dict[str, Any]:
    """A row of the results."""
    settings, _ = recipe.read(run / "recipe.toml")
    side, epsilon = settings.data.image_size, settings.release.epsilon
    report = json.loads((run / "report.json").read_text())
    scores = report["accuracy"]
    trained = load_generator(run)
    made = sample(trained.generator, 11_000, trained.num_classes)
    with np.load(run / "synthetic.npz") as file:
        synthetic = measures(file["x"], file["y"])
    return {
        "row": f"{side}-{epsilon:g}",
        "side": side,
        "epsilon": f"{epsilon:g}",
        "steps": settings.train.steps,
        "accuracy": {name: scores[name]["synthetic"] for name in CLASSIFIERS},
        "real": {name: scores[name].get("real") for name in CLASSIFIERS},
        "measures": {
            "real": measures(*_real(settings)),
            "generated": measures(made[0], _labels(made[1])),
            "aligned": synthetic,
        },
    }


def _labels(labels: Labels | None) -> Labels:
    assert labels is not None
    return labels


def _real(settings: recipe.Recipe) -> tuple[Images, Labels]:
    data = settings.data
    source = open_source(data.source, split=data.split, **data.options())
    images, labels = source.arrays()
    return images.numpy(), labels.numpy()


def picture(run: Path, path: Path) -> None:
    """A row for each class: real images, and beside them as many synthetic ones."""
    settings, _ = recipe.read(run / "recipe.toml")
    with np.load(run / "synthetic.npz") as file:
        sets = [_real(settings), (file["x"], file["y"])]
    halves = [_tiles(*each) for each in sets]
    gap = np.full((len(halves[0]), _GAP, 3), 255, np.uint8)
    Image.fromarray(np.concatenate([halves[0], gap, halves[1]], axis=1)).save(path, optimize=True)


def _tiles(images: Images, labels: Labels) -> Images:
    """The first images of every class, as one image [K H, columns W, 3]."""
    rows = []
    for k in range(int(labels.max()) + 1):
        own = images[labels == k][:_COLUMNS].transpose(0, 2, 3, 1)
        rows.append(np.concatenate(list(own), axis=1))
    return np.concatenate(rows)


def read() -> list[dict[str, Any]]:
    """The rows that were measured."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def accuracies(rows: list[dict[str, Any]]) -> str:
    """The table of accuracies, as Markdown."""
    lines = [f"| delta = 1e-5 | steps | {' | '.join(TITLES)} |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = [f"{100 * row['accuracy'][c]:.1f}" for c in CLASSIFIERS]
        what = f"{row['side']} px, epsilon = {row['epsilon']}"
        lines.append(f"| {what} | {row['steps']} | {' | '.join(cells)} |")
    for side in sorted({row["side"] for row in rows}):
        real = next(row["real"] for row in rows if row["side"] == side)
        cells = [f"{100 * real[c]:.1f}" for c in CLASSIFIERS]
        lines.append(f"| {side} px, the real images instead | | {' | '.join(cells)} |")
    return "\n".join(lines)


def looks(rows: list[dict[str, Any]]) -> str:
    """The table of saturation and brightness by class, of images of 32 px, as Markdown."""
    rows = [row for row in rows if row["side"] == 32]
    if not rows:
        return ""
    sets = [("real", rows[0]["measures"]["real"])]
    for row in rows:
        sets.append((f"generated at {row['epsilon']}", row["measures"]["generated"]))
        sets.append((f"aligned at {row['epsilon']}", row["measures"]["aligned"]))
    head = ["class", *(f"{name[0:10]}, {title}" for name in MEASURES[:2] for title, _ in sets)]
    lines = [f"| {' | '.join(head)} |", "| " + " | ".join(["---"] * len(head)) + " |"]
    for k, title in enumerate(photographs.NAMES):
        cells = [f"{found[name][k]:.3f}" for name in MEASURES[:2] for _, found in sets]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path, nargs="?")
    parser.add_argument("--picture", type=Path, nargs=2, metavar=("RUN", "FILE"))
    parser.add_argument("--update", type=Path, metavar="FILE")
    options = parser.parse_args()
    if options.run is not None:
        found = measure(options.run)
        rows = [row for row in read() if row["row"] != found["row"]] + [found]
        RESULTS.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    if options.picture is not None:
        picture(*options.picture)
    if options.update is not None:
        text = options.update.read_text()
        for name, table in (("photos", accuracies(read())), ("looks", looks(read()))):
            begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
            text = between(text, begin, end, table)
        options.update.write_text(text)


if __name__ == "__main__":
    main()
