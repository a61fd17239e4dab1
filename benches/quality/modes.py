"""Modes, before the package has them: every class split by signs, and a release by class and mode.

python -m benches.quality.modes NAME --epsilon 10 --per-class 8      one run, into RUNS/NAME
python -m benches.quality.modes NAME --evaluate STEP                 an average saved on the way

Two releases whose mu^2 add. The first holds moments of pixels (its features have the weight 2^-20).
The leading directions of their covariance within classes cut each class about its mean into 2^J
cells; the second release has a row of features for every class and cell. Cells whose noised count
does not stand out are merged with the cell beside them. Batches hold some rows, several images of
each. Images are aligned by class with the first release.

Every release here is a real one. Accuracies are on the 10,000 real test images.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dpmmd
from dpmmd import align
from dpmmd.data import open_source
from dpmmd.encoders.pixels import transform
from dpmmd.evaluate import evaluate
from dpmmd.generators import build
from dpmmd.privacy import Release
from dpmmd.privacy.accounting import calibrate
from dpmmd.privacy.accounting import epsilon as epsilon_of
from dpmmd.recipe import GeneratorSection, TrainSection
from dpmmd.train import loop, save_png, step
from dpmmd.train.pictures import tile

RESULTS = Path(__file__).parents[1] / "results" / "quality" / "modes.jsonl"
DELTA = 1e-5
CLASSES = 10
SIDE = 28
RULES = ("pooled", "by-class", "weighted", "public")


@dataclass(frozen=True)
class Cells:
    """Cells of every class: signs along directions [G, J, d] about thresholds [K, J]."""

    directions: Tensor
    thresholds: Tensor

    def rows(self, images: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """k * C + cell of uint8 images; the first direction is the most significant bit."""
        x = torch.from_numpy(images).double().flatten(1) * 257
        y = torch.from_numpy(labels)
        groups, j = self.directions.shape[:2]
        per_group = torch.einsum("nd,gjd->gnj", x, self.directions.double())
        score = per_group[0] if groups == 1 else per_group[y, torch.arange(len(y))]
        bits = (score > self.thresholds[y].double()).long()
        powers = 2 ** torch.arange(j - 1, -1, -1)
        return (y * 2**j + (bits * powers).sum(1)).numpy()


def moments(first: Release) -> tuple[Tensor, Tensor, list[Tensor] | None]:
    """Class means [K, d], the covariance within classes [d, d], and that of each class or None."""
    released = align._Released(first, transform(1, SIDE, SIDE))
    means, shares = released.means, released.shares
    assert released.second is not None
    within = released.second - (means * shares[:, None]).T @ means
    each = None
    if released.by_class is not None:
        each = [s - torch.outer(m, m) for (s, _), m in zip(released.by_class, means, strict=True)]
    return means, within, each


def leading(covariance: Tensor, j: int, weighted: bool = False) -> Tensor:
    """Integer directions [J, d]; ``weighted``: leading where fine detail has more weight."""
    if weighted:
        f = transform(1, SIDE, SIDE)
        found = torch.linalg.eigh(f @ covariance @ f.T)[1].flip(1)[:, :j].T @ f
    else:
        found = torch.linalg.eigh(covariance)[1].flip(1)[:, :j].T
    return (found / found.abs().amax(1, keepdim=True) * 2**20).round()


def fit(first: Release, per_class: int, rule: str) -> Cells:
    """Cells by a rule of RULES; "public" looks at class means alone."""
    j = round(math.log2(per_class))
    means, within, each = moments(first)
    if rule == "by-class":
        assert each is not None
        directions = torch.stack([leading(covariance, j) for covariance in each])
    elif rule == "public":
        rng = torch.Generator().manual_seed(0)
        found = torch.randn(1, j, SIDE * SIDE, generator=rng, dtype=torch.float64)
        directions = (found / found.abs().amax(2, keepdim=True) * 2**20).round()
    else:
        directions = leading(within, j, weighted=rule == "weighted")[None]
    thresholds = torch.einsum("kjd,kd->kj", directions.expand(len(means), -1, -1), means * 65535)
    return Cells(directions, thresholds.round())


def grouped(counts: Tensor, least: float) -> list[list[int]]:
    """Cells [C] of a class in groups of at least ``least`` images, if the class has that many.

    A group that is too small joins the neighbour in the tree of bits: the smallest group of the
    half beside its own.
    """

    def of(cells: list[int]) -> list[list[int]]:
        if len(cells) == 1:
            return [cells]
        half = len(cells) // 2
        sides = [of(cells[:half]), of(cells[half:])]
        for own, other in ((0, 1), (1, 0)):
            size = [float(counts[group].sum()) for group in sides[other]]
            if all(sides) and float(counts[sides[own][0]].sum()) < least:
                sides[other][int(np.argmin(size))].extend(sides[own].pop(0))
        return sides[0] + sides[1]

    return of(list(range(len(counts))))


def merged(second: Release, per_class: int, errors: float, floor: float) -> tuple[Release, Tensor]:
    """The release of A rows, mode by mode and in each class by class; and their classes [A]."""
    m = second.metadata
    counted = next(b for b in m.blocks if b.kind == "counts")
    least = max(errors * m.sd / 2**m.grid_bits / counted.bound, floor)
    by_class = second.counts.view(-1, per_class)
    rows = []
    for k, counts in enumerate(by_class):
        for place, group in enumerate(grouped(counts, least)):
            rows.append((place, k, [k * per_class + cell for cell in group]))
    rows.sort(key=lambda row: row[:2])
    sums = torch.stack([second.sums[:, cells].double().sum(1) for *_, cells in rows], 1).float()
    counts = torch.stack([second.counts[cells].sum() for *_, cells in rows])
    changed = m.model_copy(update={"num_classes": len(rows), "class_names": None})
    classes = torch.tensor([k for _, k, _ in rows])
    return replace(second, sums=sums, counts=counts, metadata=changed), classes


def in_turn(rows_a_batch: int, repeats: int) -> Any:
    """Labels of a batch in place of `balanced_labels`: some rows in turn, several of each."""

    def labels(n: int, rows: int, offset: int = 0) -> Tensor:
        assert n == rows_a_batch * repeats
        first = offset // n * rows_a_batch
        return ((torch.arange(rows_a_batch) + first) % rows).repeat_interleave(repeats)

    return labels


def drawn(classes: Tensor, counts: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Rows [n] and their classes: classes in turn, rows of a class by their counts."""
    y = torch.arange(n) % CLASSES
    place = torch.arange(n) // CLASSES
    at = (place.double() + 0.5) * ((math.sqrt(5) - 1) / 2) % 1
    rows = torch.empty(n, dtype=torch.int64)
    for k in range(CLASSES):
        own = (classes == k).nonzero().flatten()
        ends = counts[own].cumsum(0) / counts[own].sum()
        found = torch.searchsorted(ends, at[y == k]).clamp(max=len(own) - 1)
        rows[y == k] = own[found]
    return rows, y


@torch.no_grad()
def made(
    generator: Any, rows: Tensor, y: Tensor, seed: int, alignment: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Images of rows, through the alignment with their classes."""
    rng = torch.Generator().manual_seed(seed)
    generator.eval()
    parts = []
    for r, k in zip(rows.split(500), y.split(500), strict=True):
        images = generator(torch.randn(len(r), generator.z_dim, generator=rng), r).clamp(0, 1)
        images = images if alignment is None else alignment(images, k)
        parts.append(images.mul(255).round().to(torch.uint8).numpy())
    return np.concatenate(parts), y.numpy()


def picture(generator: Any, classes: Tensor, counts: Tensor, alignment: Any, path: Path) -> None:
    """A row of sixteen images for each class, as they are drawn."""
    rows, y = drawn(classes, counts, 16 * CLASSES)
    order = torch.argsort(y, stable=True)
    images, _ = made(generator, rows[order], y[order], 7, alignment)
    save_png(path, tile(images, 16))


@dataclass
class Run:
    """One setting in its folder: releases, training, accuracies; what is there is used again."""

    options: argparse.Namespace
    folder: Path

    def releases(self) -> tuple[Release, Release | None]:
        """The first, and the second of K * C rows; without modes one release is both."""
        o, paths = self.options, [self.folder / f"{n}.safetensors" for n in ("first", "second")]
        images, labels = open_source(o.data, num_classes=CLASSES).arrays()
        images, labels = np.asarray(images), np.asarray(labels)
        common: dict[str, Any] = {"delta": DELTA, "adjacency": "replace-one", "progress": False}
        mu = calibrate(epsilon=o.epsilon, delta=DELTA).mu
        if not paths[0].exists():
            weights = {"phi1": 2.0**-20, "pixels": o.pixels, "products": o.products}
            dpmmd.release(
                (images, labels),
                dpmmd.encoders.load("squeezenet1.1", image_size=32, taps=["conv1"], pool=1),
                epsilon=epsilon_of(mu=mu * math.sqrt(o.share), delta=DELTA),
                num_classes=CLASSES,
                pixel_moments=SIDE,
                weights=weights | {"class_products": o.class_products},
                out=paths[0],
                **common,
            )
        first = Release.load(paths[0])
        if not paths[1].exists():
            rows = labels
            if o.per_class > 1:
                rows = fit(first, o.per_class, o.rule).rows(images, labels)
            dpmmd.release(
                (images, rows),
                self.encoder(),
                epsilon=epsilon_of(mu=mu * math.sqrt(1 - o.share), delta=DELTA),
                num_classes=CLASSES * o.per_class,
                out=paths[1],
                **common,
            )
        return first, Release.load(paths[1])

    def encoder(self) -> Any:
        return dpmmd.encoders.load("squeezenet1.1", image_size=self.options.side)

    def train(self, second: Release) -> float:
        """Trains, keeping the average every 500 steps; seconds."""
        o = self.options
        step.balanced_labels = in_turn(o.rows, o.repeats)
        kept = loop.save

        def save(folder: Path, task: Any, state: Any) -> None:
            kept(folder, task, state)
            torch.save(state.averaged.module.state_dict(), self.folder / f"step-{state.step}.pt")
            print(f"{o.name}: step {state.step}, {state.seconds:.0f} s", flush=True)

        loop.save = save
        settings = TrainSection(
            steps=o.steps,
            batch_size=o.rows * o.repeats,
            lr=o.lr,
            schedule="constant",
            estimator="unbiased",
            ema_decay=o.ema,
            seed=o.seed,
        )
        look = GeneratorSection(base_channels=o.width)
        trained = loop.train(
            second,
            self.encoder(),
            settings=settings,
            generator_settings=look,
            out=self.folder,
            progress=False,
        )
        return trained.seconds

    def evaluate(self, first: Release, rows: Release, classes: Tensor, at: int) -> dict[str, Any]:
        """Accuracies of the average of a step, as generated and aligned, in percent."""
        o = self.options
        look = GeneratorSection(base_channels=o.width).completed((1, SIDE, SIDE))
        generator = build(**look.arguments(), num_classes=rows.metadata.num_classes)
        generator.load_state_dict(torch.load(self.folder / f"step-{at}.pt"))
        test = open_source(o.data, split="test", num_classes=CLASSES).arrays()
        test = np.asarray(test[0]), np.asarray(test[1])
        many = drawn(classes, rows.counts, o.num_train)
        fitted = made(generator, *drawn(classes, rows.counts, 20_000), 1)
        found = {}
        for kind, release in self.alignments(first):
            alignment = None if release is None else align.fit(release, *fitted)
            picture(generator, classes, rows.counts, alignment, self.folder / f"{kind}-{at}.png")
            scores = evaluate(made(generator, *many, 0, alignment), test)
            found[kind] = [round(100 * scores[c]["synthetic"], 1) for c in scores]
            print(o.name, at, kind, found[kind], flush=True)
        return found

    def alignments(self, first: Release) -> Iterator[tuple[str, Release | None]]:
        yield "generated", None
        yield "aligned", first
        if first.class_products is not None:  # as if there were none, for comparison
            yield "aligned_pooled", replace(first, class_products=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--data", default="fashion-mnist")
    parser.add_argument("--epsilon", type=float, default=10.0)
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--per-class", type=int, default=8)
    parser.add_argument("--rule", choices=RULES, default="pooled")
    parser.add_argument("--pixels", type=float, default=0.7)
    parser.add_argument("--products", type=float, default=0.7)
    parser.add_argument("--class-products", type=float, default=0.0)
    parser.add_argument("--errors", type=float, default=4.0)
    parser.add_argument("--floor", type=float, default=30.0)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--num-train", type=int, default=20_000)
    parser.add_argument("--evaluate", type=int, metavar="STEP")
    options = parser.parse_args()
    from dpmmd._memory import keep_freed_memory

    keep_freed_memory()
    torch.set_num_threads(1)
    run = Run(options, options.runs / options.name)
    run.folder.mkdir(parents=True, exist_ok=True)
    started = perf_counter()
    first, second = run.releases()
    assert second is not None
    print(f"{options.name}: releases, {perf_counter() - started:.0f} s", flush=True)
    rows, classes = merged(second, options.per_class, options.errors, options.floor)
    print(f"{options.name}: {len(classes)} rows, least {float(rows.counts.min()):.0f}", flush=True)
    seconds = None
    at = options.evaluate
    if at is None:
        seconds, at = round(run.train(rows)), options.steps
    found = run.evaluate(first, rows, classes, at)
    told = {k: v for k, v in vars(options).items() if k not in ("runs", "evaluate")}
    line = {**told, "row_count": len(classes), "step": at, "seconds": seconds, **found}
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
