"""What modes are worth on Fashion-MNIST: how much of a class's variety they name, and trainings.

python -m benches.quality.modes            how much of the variety within classes modes explain

Trainings are those of results/quality/modes.jsonl. They were made before the package had modes, by
the script that this file was at commit 7872ab9. Its arithmetic is that of the package: two real
releases whose mu^2 add, the first of moments of pixels; cells by signs along their leading
directions; batches of some rows, ten images of each; images drawn by released counts, and aligned
by class with the first release. Cells were merged by their counts alone. Accuracies are of
classifiers trained on 20,000 synthetic images. A line without data is of the generator above it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results" / "quality"
TRAININGS, EXPLAINED = RESULTS / "modes.jsonl", RESULTS / "modes-explained.jsonl"
PER_CLASS = (2, 4, 8, 16)
KINDS = {
    "class by class": {"products": 0.5, "class_products": 0.5},
    "of all classes": {"class_products": 0.0},
}
DELTA = 1e-5
# Without modes, by the same settings and one covariance for all classes: one run each, of a sketch
# outside the repository; the second is of another release than the trainings here.
WITHOUT = {
    10.0: ((75.8, 75.6, 78.9), (80.5, 79.8, 80.3)),
    1.0: ((75.5, 76.0, 78.5), (79.2, 79.7, 79.9)),
}


def explained(rows: Any, features: Any, labels: Any) -> float:
    """The share of the variance of features [n, D] within classes that rows [n] explain."""
    import torch

    within = sum(float(centred(features[labels == k]).square().sum()) for k in labels.unique())
    left = sum(float(centred(features[rows == row]).square().sum()) for row in torch.unique(rows))
    return 1 - left / within


def centred(values: Any) -> Any:
    return values - values.mean(0)


def keep(epsilon: float | None, kind: str, shares: dict[str, float]) -> None:
    """Appends a line of results."""
    line = json.dumps({"epsilon": epsilon, "covariance": kind, "explained": shares})
    print(line, flush=True)
    with EXPLAINED.open("a") as file:
        file.write(line + "\n")


def compared(images: Any, features: Any, labels: Any) -> None:
    """Appends two lines: random directions, which need no release, and what no release can do."""
    import torch
    from sklearn.cluster import KMeans

    import dpmmd

    rng = torch.Generator().manual_seed(0)
    directions = torch.randint(-(1 << 18), 1 << 18, (1, 4, 28 * 28), generator=rng)
    pixels = (65535 * images.flatten(1)).round().double()
    means = torch.stack([pixels[labels == k].mean(0) for k in range(10)])
    thresholds = (means @ directions[0].double().T).round().long()  # as a release would have them
    drawn, found = {}, {}
    for bits, per_class in enumerate(PER_CLASS, 1):
        modes = dpmmd.Modes(28, 1, directions[:, :bits], thresholds[:, :bits])
        rows = modes.rows(images, labels)
        drawn[str(per_class)] = round(explained(rows, features, labels), 3)
        for k in range(10):
            own = KMeans(per_class, n_init=1, random_state=0).fit_predict(features[labels == k])
            rows[labels == k] = k * per_class + torch.from_numpy(own).long()
        found[str(per_class)] = round(explained(rows, features, labels), 3)
    keep(None, "none: random directions", drawn)
    keep(None, "none: k-means on the features, not private", found)


def measure() -> None:
    """Appends a line for every epsilon and kind of covariance: a first release, and its modes."""
    import torch

    import dpmmd
    from dpmmd.data import open_source
    from dpmmd.privacy import split_epsilon

    source = open_source("fashion-mnist", num_classes=10)
    x, y = (torch.as_tensor(part) for part in source.arrays())
    images, labels = x[:10_000].float() / 255, y[:10_000]
    encoder = dpmmd.encoders.load("squeezenet1.1", image_size=32)
    with torch.inference_mode():
        features = torch.cat(
            [torch.cat([f.flatten(1) for f in encoder(part)], 1) for part in images.split(250)]
        )
    features = features / features.norm(dim=1, keepdim=True)
    compared(images, features, labels)
    for epsilon in (10.0, 1.0, 0.2):
        for kind, weights in KINDS.items():
            first = dpmmd.release(
                source,
                None,
                epsilon=split_epsilon(epsilon, DELTA, 0.5)[0],
                delta=DELTA,
                adjacency="replace-one",
                num_classes=10,
                pixel_moments=28,
                weights=weights,
                progress=False,
            )
            shares = {}
            for per_class in PER_CLASS:
                rows = dpmmd.modes.fit(first, per_class).rows(images, labels)
                shares[str(per_class)] = round(explained(rows, features, labels), 3)
            keep(epsilon, kind, shares)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def explained_table() -> str:
    """How much of the variety within classes modes explain, as Markdown."""
    head = ["epsilon of both", "covariance of pixels", *(f"{c} modes" for c in PER_CLASS)]
    lines = [
        [
            "" if r["epsilon"] is None else f"{r['epsilon']:g}",
            r["covariance"],
            *(f"{r['explained'][str(c)]:.2f}" for c in PER_CLASS),
        ]
        for r in read(EXPLAINED)
    ]
    return _markdown([head, ["---"] * len(head), *lines])


def trainings_table() -> str:
    """Trainings with modes beside those without, as Markdown."""
    head = ["data", "epsilon", "modes a class", "rows", "as generated", "aligned"]
    lines = []
    for r in read(TRAININGS):
        if r["data"] == "fashion-mnist":
            made, aligned = WITHOUT[r["epsilon"]]
            lines.append(
                [r["data"], f"{r['epsilon']:g}", "none", "10", _scores(made), _scores(aligned)]
            )
        cells = [_scores(r["generated"]), _scores(r["aligned"])]
        lines.append(
            [r["data"], f"{r['epsilon']:g}", str(r["per_class"]), str(r["row_count"]), *cells]
        )
        for again in r.get("realigned", ()):
            lines.append(["", "", "", "", again["what"], _scores(again["aligned"])])
    return _markdown([head, ["---"] * len(head), *lines])


def _scores(values: Any) -> str:
    return " / ".join(f"{value:.1f}" for value in values)


def _markdown(lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    measure()
