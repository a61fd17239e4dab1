"""Variants of what is matched that are not in the package, on Fashion-MNIST without noise.

python -m benches.quality.statistics --statistic pixel-covariance --weight 1

Beside the class means of the encoder's features (weight 1) a second statistic of every image is
matched, by the U-statistic of its own squared MMD; each is of norm 1 for every image:

- none;
- pixel-covariance: v v', v the image averaged down to 14 x 14 and normed;
- pixel-fourier: 4,096 random Fourier features of v, of a Gaussian kernel of bandwidth 0.5;
- feature-covariance: v v', v the taps averaged down to 2 x 2, each normed, concatenated, projected
  at random to 128 numbers and normed.

An experiment on public data: targets are computed here, outside the release, and are not private.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10
Statistic = Callable[[Tensor, Sequence[Tensor]], Tensor]  # images, taps -> [n, d]


def _unit(x: Tensor) -> Tensor:
    return F.normalize(x, dim=1, eps=1e-6)


def _pixels(images: Tensor, _: Sequence[Tensor]) -> Tensor:
    return _unit(F.adaptive_avg_pool2d(images, 14).flatten(1))  # [n, 196]


def _outer(inner: Statistic) -> Statistic:
    def statistic(images: Tensor, taps: Sequence[Tensor]) -> Tensor:
        v = inner(images, taps)
        return (v[:, :, None] * v[:, None, :]).flatten(1)

    return statistic


def _fourier(inner: Statistic, size: int, rng: torch.Generator) -> Statistic:
    frequencies = torch.randn(size, 2048, generator=rng) / 0.5

    def statistic(images: Tensor, taps: Sequence[Tensor]) -> Tensor:
        phase = inner(images, taps) @ frequencies
        return torch.cat([phase.cos(), phase.sin()], dim=1) / math.sqrt(2048)

    return statistic


def _projected(size: int, rng: torch.Generator) -> Statistic:
    projection = torch.randn(size, 128, generator=rng) / math.sqrt(128)

    def statistic(_: Tensor, taps: Sequence[Tensor]) -> Tensor:
        parts = [_unit(F.adaptive_avg_pool2d(tap, 2).flatten(1)) for tap in taps]
        return _unit(torch.cat(parts, dim=1) / math.sqrt(len(parts)) @ projection)

    return statistic


def choose(name: str, encoder: nn.Module) -> Statistic | None:
    """The statistic of a name; "none": None."""
    rng = torch.Generator().manual_seed(1234)
    pooled = sum(tap.shape[0] * 4 for tap in encoder.taps)  # type: ignore[union-attr]
    return {
        "none": lambda: None,
        "pixel-covariance": lambda: _outer(_pixels),
        "pixel-fourier": lambda: _fourier(_pixels, 196, rng),
        "feature-covariance": lambda: _outer(_projected(pooled, rng)),
    }[name]()


def u_statistic(target: Tensor, values: Tensor, labels: Tensor) -> Tensor:
    """Squared MMD [] to class means ``target`` [K, d], of the pairs of different images."""
    members = F.one_hot(labels, CLASSES).to(values.dtype)
    counts = members.sum(0)
    means = members.T @ values / counts.clamp(min=1)[:, None]
    own = members.T @ values.square().sum(1) / counts.clamp(min=1)
    pairs = (counts * means.square().sum(1) - own) / (counts - 1).clamp(min=1)
    return (pairs - 2 * (means * target).sum(1) + target.square().sum(1))[counts > 0].sum()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Trains and evaluates; accuracies by temperature."""
    import dpmmd
    from dpmmd._memory import keep_freed_memory
    from dpmmd.data import open_source
    from dpmmd.evaluate import evaluate
    from dpmmd.functional import mean_embedding
    from dpmmd.generators import build
    from dpmmd.recipe import GeneratorSection
    from dpmmd.train import sample

    keep_freed_memory()
    encoder = dpmmd.encoders.load("squeezenet1.1", image_size=options.image_size)
    statistic = choose(options.statistic, encoder)

    def embed(images: Tensor, labels: Tensor) -> list[Tensor]:
        taps = encoder(images)
        means, _ = mean_embedding(taps, labels, CLASSES)
        return [means, *([] if statistic is None else [statistic(images, taps)])]

    images, labels = (
        torch.as_tensor(part) for part in open_source("fashion-mnist", num_classes=CLASSES).arrays()
    )
    target = torch.zeros(())
    richer = torch.zeros(())
    counts = torch.bincount(labels, minlength=CLASSES)
    with torch.no_grad():
        for x, y in zip(images.split(250), labels.split(250), strict=True):
            means, *more = embed(x.float() / 255, y)
            present = torch.bincount(y, minlength=CLASSES)
            target = target + means * (present / counts)[None, :, None]
            for values in more:
                richer = richer + F.one_hot(y, CLASSES).float().T @ values / counts[:, None]

    torch.manual_seed(options.seed)
    rng = torch.Generator().manual_seed(options.seed)
    look = GeneratorSection(base_channels=32).completed((1, 28, 28))
    generator = build(**look.arguments(), num_classes=CLASSES).train()
    average = build(**look.arguments(), num_classes=CLASSES)
    average.load_state_dict(generator.state_dict())
    optimizer = torch.optim.Adam(generator.parameters(), lr=4e-3, betas=(0.5, 0.999))
    batch, started = options.batch_size, perf_counter()
    for step in range(options.steps):
        z = torch.randn(batch, 100, generator=rng)
        y = (torch.arange(batch) + step * batch) % CLASSES
        means, *more = embed(generator(z, y), y)
        n = torch.bincount(y, minlength=CLASSES)
        missing = (means.square().sum(2) - 1) / (n.clamp(min=2) - 1)  # the sphere's own pairs
        loss = (target - means)[:, n > 0].square().sum() + missing[:, n > 1].sum()
        for values in more:
            loss = loss + options.weight * u_statistic(richer, values, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate = 1 - min(0.998, (1 + step) / (10 + step))
        with torch.no_grad():
            ours, theirs = average.state_dict().values(), generator.state_dict().values()
            for a, b in zip(ours, theirs, strict=True):
                a.copy_(torch.lerp(a, b, rate) if a.is_floating_point() else b)
    seconds = perf_counter() - started
    test = open_source("fashion-mnist", split="test", num_classes=CLASSES).arrays()
    accuracy = {}
    for temperature in options.temperatures:
        made = sample(average, 60_000, CLASSES, temperature=temperature)
        scores = evaluate(made, test, num_train=20_000)  # type: ignore[arg-type]
        accuracy[f"{temperature:g}"] = {
            k: round(100 * v["synthetic"], 2) for k, v in scores.items()
        }
    return {**vars(options), "seconds": round(seconds), "accuracy": accuracy}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    names = ("none", "pixel-covariance", "pixel-fourier", "feature-covariance")
    parser.add_argument("--statistic", choices=names, default="none")
    parser.add_argument("--weight", type=float, default=1.0)
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[1.0])
    parser.add_argument("--seed", type=int, default=0)
    print(json.dumps(measure(parser.parse_args())))


if __name__ == "__main__":
    main()
