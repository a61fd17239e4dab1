"""What was tried for more varied pictures on Fashion-MNIST: predictions and measurements.

python -m benches.quality.ideas CHECK [CHECK ...]           checks that train nothing, minutes each
python -m benches.quality.ideas --train NAME --epsilon 0.2  a training on an encoder of `structure`

Checks read public images, and pictures of docs/; nothing here is private. Rows are appended to
benches/results/quality/ideas.jsonl; `python -m benches.quality --update` makes the table of them.

"Roughness" of an image is the root mean square of second differences in its middle, 12 x 12 px of
28 x 28, in percent of the range. It is of five classes that fill the middle: t-shirts, pullovers,
coats, shirts and bags.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.quality import structure

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results" / "quality" / "ideas.jsonl"
FULL = (0, 2, 4, 6, 8)  # classes whose objects fill the middle
MIDDLE = slice(8, 20)
NOISE = 0.0077  # of a number of a class mean at epsilon = 0.2: 1.4 in norm on SqueezeNet's 33,344

Features = Callable[[Tensor], Tensor]


def public(split: str, each: int, classes: tuple[int, ...] = tuple(range(10))) -> Tensor:
    """Images [classes, each, 1, 28, 28] in [0, 1]."""
    from dpmmd.data import open_source

    source = open_source("fashion-mnist", split=split, num_classes=10)
    images, labels = (torch.as_tensor(part) for part in source.arrays())
    return torch.stack([images[labels == k][:each] for k in classes]).float() / 255


def roughness(images: Tensor) -> Tensor:
    """Of images [n, 28, 28]: along rows, along columns and both [3, n], in percent."""
    x = images[:, MIDDLE, MIDDLE]
    along = (2 * x[:, :, 1:-1] - x[:, :, :-2] - x[:, :, 2:]) / 4
    down = (2 * x[:, 1:-1] - x[:, :-2] - x[:, 2:]) / 4
    both = (x[:, 1:, 1:] - x[:, 1:, :-1] - x[:, :-1, 1:] + x[:, :-1, :-1]) / 4
    return 100 * torch.stack([d.flatten(1).square().mean(1).sqrt() for d in (along, down, both)])


def pictured(path: Path) -> Tensor:
    """Images [100, 28, 28] in [0, 1] of a grid of ten by ten."""
    import numpy as np
    from PIL import Image

    grid = torch.from_numpy(np.array(Image.open(path).convert("L"))).float() / 255
    scale = len(grid) // 280
    return grid[::scale, ::scale].view(10, 28, 10, 28).transpose(1, 2).reshape(100, 28, 28)


def blurred(x: Tensor) -> Tensor:
    """Images [n, 1, H, W] without their detail."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0], dtype=x.dtype) / 16
    padded = F.pad(x, (2,) * 4, mode="replicate")
    return F.conv2d(padded, torch.outer(kernel, kernel)[None, None])


def cored(images: Tensor, power: float = 1.8) -> Tensor:
    """Images [n, 1, H, W] in [0, 1], weak detail made weaker and strong detail stronger.

    Detail is multiplied by (its local size / that of all images)^(power - 1), at most 1.5, and then
    by one number, so that its mean square over all images stays.
    """
    coarse = blurred(images)
    fine = images - coarse
    size = blurred(blurred(fine.square())).clamp(min=1e-8).sqrt()
    typical = size[size > 0.01].square().mean().sqrt()
    changed = fine * (size / typical).pow(power - 1).clamp(max=1.5)
    changed *= (fine.square().mean() / changed.square().mean()).sqrt()
    return (coarse + changed).clamp(0, 1)


def enclosed(images: Tensor) -> Tensor:
    """Of images [n, 28, 28]: dark area that the object encloses [n], in percent of the object."""
    from scipy.ndimage import binary_fill_holes

    found = []
    for image in images.numpy():
        bright = image > 0.15
        whole = binary_fill_holes(bright)
        found.append(100 * (whole & ~bright).sum() / max(1, whole.sum()))
    return torch.tensor(found)


def holes() -> list[dict[str, Any]]:
    """Dark area that shirts, pullovers and coats enclose, of real ones and of pictures in docs/."""
    tops = FULL[:4]
    rows = []
    for what, name in (("real", ""), ("the demo's (docs/demo.png)", "demo.png")):
        images = public("test", 200, tops)
        if name:
            images = pictured(ROOT / "docs" / name).view(10, 10, 28, 28)[list(tops)]
        area = enclosed(images.reshape(-1, 28, 28))
        many = 100 * float((area > 2).float().mean())
        found = {"mean": float(area.mean()), "percent of images with more than 2": many}
        what = f"dark area that tops enclose, in percent of the object: {what}"
        rows.append(
            {"what": what, "predicted": "more in the demo's" if name else "", **_rounded(found, 1)}
        )
    return rows


def spread() -> list[dict[str, Any]]:
    """Roughness over images, of real ones and of pictures in docs/: low, middle and high."""
    sets = {"real": public("test", 200, FULL).view(-1, 28, 28)}
    for name, what in (
        ("demo.png", "the demo's (docs/demo.png)"),
        ("samples-epsilon-1.png", "64 px, 6,000 steps (docs/samples-epsilon-1.png)"),
    ):
        images = pictured(ROOT / "docs" / name).view(10, 10, 28, 28)
        sets[what] = images[list(FULL)].reshape(-1, 28, 28)
    rows = []
    for what, images in sets.items():
        rough = roughness(images).square().sum(0).sqrt()
        low, middle, high = rough.quantile(torch.tensor([0.1, 0.5, 0.9])).tolist()
        found = {"mean": rough.mean().item(), "low": low, "middle": middle, "high": high}
        rows.append({"what": f"roughness of images: {what}", "predicted": "", **_rounded(found)})
    return rows


def _features(encoder: Any, moment: int = 1) -> Features:
    """Bounded features [n, D] of images."""

    @torch.no_grad()
    def features(images: Tensor) -> Tensor:
        parts = []
        for part in images.split(100):
            taps = encoder(part)
            raw = torch.cat([tap.permute(0, 2, 3, 1).flatten(1) for tap in taps], dim=1)
            parts.append(F.normalize(raw**moment, dim=1))
        return torch.cat(parts)

    return features


_PREDICTED = {
    ("squeezenet", 2): "levelled images stand out more",
    ("histograms", 1): "levelled images stand out as rougher ones do",
}


def penalty() -> list[dict[str, Any]]:
    """How far class means of features move where images have another roughness.

    "levelled": every image gets the mean roughness of its class, so that the mean is right and the
    spread is gone. "rougher", "smoother": half as much again, and half. In standard deviations of
    an image's features within its class.
    """
    x = public("train", 60, FULL).view(-1, 1, 28, 28)
    middle = torch.zeros(28, 28)
    middle[MIDDLE, MIDDLE] = 1
    fine = (x - blurred(x)) * middle
    size = fine.flatten(1).norm(dim=1)
    level = size.view(len(FULL), -1).mean(1, keepdim=True).expand(-1, 60).flatten()
    factors = {"levelled": (level / size).clamp(max=8), "rougher": 1.5, "smoother": 0.5}
    rows = []
    for name, moment in (
        ("squeezenet", 1),
        ("squeezenet", 2),
        ("gradients", 1),
        ("histograms", 1),
        ("beside-histograms", 1),
    ):
        features = _features(structure.load(name), moment)
        before = features(x).view(len(FULL), 60, -1)
        within = (before - before.mean(1, keepdim=True)).square().sum(2).mean().sqrt()
        found = {}
        for what, factor in factors.items():
            scale = torch.as_tensor(factor).expand(len(x)).view(-1, 1, 1, 1)
            changed = (x + (scale - 1) * fine).clamp(0, 1)
            moved = features(changed).view(len(FULL), 60, -1).mean(1) - before.mean(1)
            found[what] = float(moved.square().sum(1).mean().sqrt() / within)
        what = f"what class means see of roughness: {name}{', phi2' if moment == 2 else ''}"
        predicted = _PREDICTED.get((name, moment), "")
        rows.append({"what": what, "predicted": predicted, **_rounded(found, 3)})
    return rows


def sight() -> list[dict[str, Any]]:
    """How far features of real images move where a pattern of period 2 is added to the object.

    Its root mean square is 0.06; in standard deviations of features within a class.
    """
    x = public("train", 40, (0, 1, 2, 7)).view(-1, 1, 28, 28)
    inside = F.avg_pool2d(x, 3, 1, 1) > 0.15
    stripes = (-1.0) ** torch.arange(28)
    rng = torch.Generator().manual_seed(0)
    patterns = {
        "columns": stripes.expand(28, 28),
        "rows": stripes[:, None].expand(28, 28),
        "checkers": torch.outer(stripes, stripes),
        "white": torch.randn(x.shape, generator=rng),
    }
    rows = []
    for size in (32, 64):
        from dpmmd.encoders import load

        features = _features(load("squeezenet1.1", image_size=size))
        before = features(x)
        own = before.view(4, 40, -1)
        within = (own - own.mean(1, keepdim=True)).square().sum(2).mean().sqrt()
        found = {}
        for name, pattern in patterns.items():
            moved = features((x + 0.06 * pattern * inside).clamp(0, 1)) - before
            found[name] = float(moved.square().sum(1).mean().sqrt() / within)
        what = f"what SqueezeNet at {size} px sees of patterns of period 2"
        predicted = "nearly nothing, if its stride is the cause"
        rows.append({"what": what, "predicted": predicted, **_rounded(found)})
    return rows


def modes() -> list[dict[str, Any]]:
    """How much of the variance of roughness within a class lies between modes by signs.

    Signs along the leading directions of the pixels' covariance within classes, exact ones.
    """
    x = public("train", 2000)
    flat = x.view(10, 2000, -1)
    centred = flat - flat.mean(1, keepdim=True)
    whole = centred.view(-1, centred.shape[2])
    _, directions = torch.linalg.eigh(whole.T @ whole)
    directions = directions.flip(1)
    rough = roughness(x.view(-1, 28, 28)).square().sum(0).sqrt().view(10, 2000)
    bright = flat.mean(2)
    rows = []
    for bits in (1, 3, 5):
        signs = (centred @ directions[:, :bits] > 0).long()
        mode = (signs * 2 ** torch.arange(bits)).sum(2)
        found = {}
        for name, values in (("roughness", rough), ("brightness", bright)):
            shares = [between(values[k], mode[k], 2**bits) for k in FULL]
            found[name] = sum(shares) / len(shares)
        what = f"share of the variance within a class that {2**bits} modes by signs explain"
        rows.append({"what": what, "predicted": "", **_rounded(found)})
    return rows


def between(values: Tensor, groups: Tensor, count: int) -> float:
    """The share of the variance of ``values`` [n] that lies between ``groups`` int64 [n]."""
    members = F.one_hot(groups, count).to(values.dtype)
    means = members.T @ values / members.sum(0).clamp(min=1)
    return 1 - float((values - means[groups]).square().mean() / values.var(unbiased=False))


def nearest() -> list[dict[str, Any]]:
    """Accuracy of the nearest class mean, exact and with noise, on 2,000 real test images."""
    x, test = public("train", 600), public("test", 200)
    truth = torch.arange(10).repeat_interleave(200)
    rows = []
    for name in ("squeezenet", "squeezenet-pooled", "gradients", "histograms", "beside-histograms"):
        encoder = structure.load(name)
        features = _features(encoder)
        means = features(x.view(-1, 1, 28, 28)).view(10, 600, -1).mean(1)
        own = features(test.view(-1, 1, 28, 28))
        found: dict[str, float] = {"D": encoder.dim, "noise": NOISE * math.sqrt(encoder.dim)}
        for key, sd in (("exact", 0.0), ("at 0.2", NOISE), ("at 0.1", 2 * NOISE)):
            scores = []
            for seed in range(5):
                rng = torch.Generator().manual_seed(seed)
                noised = means + sd * torch.randn(means.shape, generator=rng)
                norms = noised.square().sum(1) - encoder.dim * sd**2
                scores.append(
                    float(((own @ noised.T - norms / 2).argmax(1) == truth).double().mean())
                )
            found[key] = 100 * sum(scores) / len(scores)
        what = f"nearest class mean, {name}"
        predicted = "gains where there is noise" if name == "squeezenet-pooled" else ""
        rows.append({"what": what, "predicted": predicted, **_rounded(found, 2)})
    return rows


def _rounded(found: dict[str, float], digits: int = 2) -> dict[str, Any]:
    return {"measured": {key: round(value, digits) for key, value in found.items()}}


def trained(options: argparse.Namespace) -> dict[str, Any]:
    """LR, MLP and CNN, of a training as the demo's, of batches of 50."""
    import dpmmd
    from dpmmd import align
    from dpmmd.data import open_source
    from dpmmd.evaluate import evaluate
    from dpmmd.recipe import GeneratorSection, TrainSection
    from dpmmd.run.noiseless import NO_NOISE_EPSILON, no_noise
    from dpmmd.train import sample, train

    encoder = structure.load(options.train)
    noiseless = math.isinf(options.epsilon)
    released = dpmmd.release(
        open_source("fashion-mnist", num_classes=10),
        encoder,
        epsilon=NO_NOISE_EPSILON if noiseless else options.epsilon,
        delta=1e-5,
        adjacency="replace-one",
        num_classes=10,
        pixel_moments=28,
        weights=None if options.products else {"pixels": 0.5, "products": 0},
        insecure_test_noise=no_noise if noiseless else None,
        progress=False,
    )
    settings = TrainSection(
        steps=options.steps,
        batch_size=50,
        lr=4e-3,
        schedule="constant",
        estimator="unbiased",
        ema_decay=0.998,
    )
    look = GeneratorSection(base_channels=32)
    started = perf_counter()
    generator = train(
        released, encoder, settings=settings, generator_settings=look, progress=False
    ).generator
    seconds = round(perf_counter() - started)
    test = open_source("fashion-mnist", split="test", num_classes=10).arrays()
    alignment = align.fit(released, *sample(generator, options.images, 10, seed=1))
    sets = {
        "as generated": sample(generator, options.images, 10),
        "aligned": sample(generator, options.images, 10, alignment=alignment),
    }
    images, labels = sets["aligned"]
    weaker = cored(torch.from_numpy(images).float() / 255).mul(255).round().to(torch.uint8)
    sets["aligned, detail cored"] = weaker.numpy(), labels
    found = {}
    for name, made in sets.items():
        scores = evaluate(made, test)  # type: ignore[arg-type]
        found[name] = [round(100 * each["synthetic"], 1) for each in scores.values()]
    what = (
        f"{options.train}, epsilon = {options.epsilon:g}, {options.steps} steps of 50 images, "
        f"trained on {options.images:,} images"
    )
    return {
        "what": what,
        "predicted": options.predicted,
        "measured": found,
        "seconds": seconds,
    }


CHECKS = {check.__name__: check for check in (spread, holes, penalty, sight, modes, nearest)}


def read() -> list[dict[str, Any]]:
    """The rows, in the order in which they were measured."""
    if not RESULTS.exists():
        return []
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| what | predicted | measured |", "| --- | --- | --- |"]
    for row in rows:
        cells = [f"{key} {_cell(value)}" for key, value in row["measured"].items()]
        lines.append(f"| {row['what']} | {row['predicted']} | {', '.join(cells)} |")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if isinstance(value, list):
        return " / ".join(f"{each:.1f}" for each in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checks", nargs="*", choices=[[], *CHECKS])
    parser.add_argument("--train", metavar="NAME")
    parser.add_argument("--epsilon", type=float, default=math.inf)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--products", action="store_true", help="align with a covariance, too")
    parser.add_argument("--predicted", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for name in options.checks for row in CHECKS[name]()]
    if options.train:
        rows.append(trained(options))
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    print(table(rows))


if __name__ == "__main__":
    main()
