"""How much of a run's shortfall is noise on its moments of pixels, on Fashion-MNIST.

python -m benches.quality.ceiling RUN      a folder of `dpmmd run fashion-eps1`

The run's generator, sampled without alignment, aligned with the run's release, and aligned with
moments without noise (NOT PRIVATE): accuracies of classifiers on the 10,000 real test images.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import dpmmd
from dpmmd import align
from dpmmd.data import open_source
from dpmmd.evaluate import evaluate
from dpmmd.run import NO_NOISE_EPSILON, no_noise
from dpmmd.train import load_generator, sample


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    run = parser.parse_args().run
    trained = load_generator(run)
    classes = trained.num_classes or 1
    exact = dpmmd.release(
        "fashion-mnist",
        dpmmd.encoders.load("squeezenet1.1", taps=["conv1"]),
        epsilon=NO_NOISE_EPSILON,
        delta=1e-5,
        adjacency="replace-one",
        num_classes=classes,
        weights={"phi1": 2.0**-20},
        pixel_moments=28,
        insecure_test_noise=no_noise,
    )
    test = open_source("fashion-mnist", split="test", num_classes=classes).arrays()
    fitted = sample(trained.generator, 20_000, classes, seed=1)
    releases = {
        "not aligned": None,
        "aligned": dpmmd.Release.load(run / "release.safetensors"),
        "aligned without noise": exact,
    }
    for name, release in releases.items():
        alignment = None if release is None else align.fit(release, *fitted)
        made = sample(trained.generator, 60_000, classes, alignment=alignment)
        accuracy = evaluate(made, test)  # type: ignore[arg-type]
        scores = {key: round(100 * both["synthetic"], 1) for key, both in accuracy.items()}
        print(json.dumps({"images": name, **scores}), flush=True)


if __name__ == "__main__":
    main()
