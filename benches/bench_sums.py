"""Integer sums of one private batch: quantised, certified and added exactly."""

from __future__ import annotations

import pytest
import torch

from benches.backends import on_this_cpu
from benches.harness import Measure, floors
from benches.shapes import Case
from dpmmd import backends
from dpmmd.bounds import Bound
from dpmmd.encoders.pixels import augmented
from dpmmd.privacy.sums import GRID_BITS, PrivateSums

CASES = [
    Case(classes=10),
    Case(classes=10, moments=(1, 2)),
    Case(classes=100),
    Case(pixels=128, n=4, classes=10),
    Case(encoder="ResNet18", n=256, classes=10),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.shape)
def test_class_sums(measure: Measure, case: Case) -> None:
    if measure.smoke:
        case = case.smaller()
    maps = case.features()
    features = [f.permute(0, 2, 3, 1).flatten(1) for f in maps]  # views
    labels, valid = torch.arange(case.n) % case.classes, torch.ones(case.n, dtype=torch.bool)
    limits = torch.full((case.n,), 1 << GRID_BITS)
    sums = {name: PrivateSums(case.classes, case.dim * len(case.moments)) for name in on_this_cpu()}

    def variant(name: str):
        def run() -> None:
            with backends.use(name):
                sums[name].add(
                    features,
                    labels,
                    valid,
                    limits,
                    bound=Bound(case.moments, joint_weight=1.0),
                    nonnegative=True,
                )

        return run

    variants = {name: variant(name) for name in sums}
    if not measure.smoke:
        variants |= floors(maps)
    ours = on_this_cpu()[-1]
    measure(
        "release, integer class sums",
        case.shape,
        variants,
        ours=ours,
        # The features are read; the sums are read and written, 8 bytes an entry.
        min_bytes=case.feature_bytes
        + 16 * case.dim * len(case.moments) * min(case.n, case.classes),
    )
    totals, _ = sums[ours].take()
    assert int(totals.ne(0).any(dim=1).sum()) == min(case.n, case.classes)


def test_products(measure: Measure) -> None:
    """Products of the pixels of 28-px images, against a row of them made of every image."""
    n, d = (8, 50) if measure.smoke else (256, 785)
    vectors = augmented(torch.rand(n, d - 1, generator=torch.Generator().manual_seed(0)))
    labels, valid = torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.bool)
    limits = torch.full((n,), 1 << GRID_BITS)
    rows, columns = torch.triu_indices(d, d)
    sums, general = PrivateSums(d, d), PrivateSums(1, len(rows))
    double = vectors.double()

    def as_features() -> None:
        general.add(
            [vectors[:, rows] * vectors[:, columns]],
            labels,
            valid,
            limits,
            bound=Bound(),
            nonnegative=False,
        )

    measure(
        "release, sums of products",
        f"n={n}, d={d}",
        {
            "a row of products an image": as_features,
            "one matrix product, not bounded": lambda: double.T @ double,
            "dpmmd": lambda: sums.add_products(vectors, labels, valid, limits),
        },
        ours="dpmmd",
        dtype="float32",
    )
    total = sums.take()[0].double()
    expected = double.T @ double
    apart = total / total.trace() - expected / expected.trace()
    assert float(apart.norm()) < 1e-3 * float(expected.norm() / expected.trace())
