"""The trusted core's throughput: exact noise, and integer class sums of one batch."""

from __future__ import annotations

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benches.conftest import make_features
from dpmmd.privacy.noise import rounded_gaussian
from dpmmd.privacy.sums import GRID_BITS, PrivateSums


def test_rounded_gaussian(benchmark: BenchmarkFixture) -> None:
    """A million variates at a release's noise level (sd about 2^32)."""
    noise = benchmark(rounded_gaussian, 1_000_000, 4.0e9)
    assert noise.std() > 3.9e9


def test_class_sums(benchmark: BenchmarkFixture, encoder_name: str) -> None:
    n, classes = 64, 10
    features = [f.permute(0, 2, 3, 1).flatten(1) for f in make_features(encoder_name, n)]
    labels = torch.arange(n) % classes
    sums = PrivateSums(classes, sum(f.shape[1] for f in features))
    benchmark.group = f"class sums {encoder_name}, {n} images"
    benchmark(
        sums.add,
        features,
        labels,
        torch.ones(n, dtype=torch.bool),
        torch.full((n,), 1 << GRID_BITS),
        moments=(1,),
        joint_weight=1.0,
        bound="sphere",
        clip=1.0,
        nonnegative=True,
    )
    assert sums.take()[0].any(dim=1).all()
