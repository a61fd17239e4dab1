"""How much of a run's shortfall is noise on its moments of pixels, on Fashion-MNIST.

python -m benches.quality.ceiling RUN      a folder of `dpmmd run fashion-eps1`

The run's generator, sampled without alignment, aligned with the run's release, with moments as
noisy of which those of second order are half of all classes and half class by class (a release
beside the run's: an experiment, not covered by its epsilon), with means without noise, and with
both moments without noise (both NOT PRIVATE): accuracies of classifiers on the 10,000 real test
images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import dpmmd
from dpmmd import align
from dpmmd.data import open_source
from dpmmd.evaluate import evaluate
from dpmmd.run import NO_NOISE_EPSILON, no_noise
from dpmmd.train import load_generator, sample

NAMES = (
    "not aligned",
    "aligned",
    "aligned by class",
    "means without noise",
    "aligned without noise",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", metavar="NAME", choices=NAMES)
    options = parser.parse_args()
    run = options.run
    trained = load_generator(run)
    classes = trained.num_classes or 1
    encoder = dpmmd.encoders.load("squeezenet1.1", taps=["conv1"])
    released = dpmmd.Release.load(run / "release.safetensors")

    def moments(epsilon: float, weights: dict[str, float], **noise: Any) -> dpmmd.Release:
        return dpmmd.release(
            "fashion-mnist",
            encoder,
            epsilon=epsilon,
            delta=1e-5,
            adjacency="replace-one",
            num_classes=classes,
            weights=weights,
            pixel_moments=28,
            **noise,
        )

    def by_class() -> dpmmd.Release:
        of_features = released.metadata.blocks[0].bound
        weights = {"phi1": of_features, "products": 0.5, "class_products": 0.5}
        return moments(released.metadata.epsilon, weights)

    def exact(**weights: float) -> dpmmd.Release:
        weights = {"phi1": 2.0**-20, **weights}
        return moments(NO_NOISE_EPSILON, weights, insecure_test_noise=no_noise)

    def exact_means() -> dpmmd.Release:
        return exact(products=0)

    test = open_source("fashion-mnist", split="test", num_classes=classes).arrays()
    fitted = sample(trained.generator, 20_000, classes, seed=1)
    releases = (lambda: None, lambda: released, by_class, exact_means, exact)
    for name, make in zip(NAMES, releases, strict=True):
        if options.only not in (None, name):
            continue
        release = make()
        alignment = None if release is None else align.fit(release, *fitted)
        made = sample(trained.generator, 60_000, classes, alignment=alignment)
        accuracy = evaluate(made, test)  # type: ignore[arg-type]
        scores = {key: round(100 * both["synthetic"], 1) for key, both in accuracy.items()}
        print(json.dumps({"images": name, **scores}), flush=True)


if __name__ == "__main__":
    main()
