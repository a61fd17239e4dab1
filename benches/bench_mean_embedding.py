"""Class means of normalised features, against the formulas in plain torch and torch.compile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benches import baselines
from benches.backends import on_this_cpu
from benches.harness import MEMORY_LIMIT, Measure, floors, relative_error
from benches.shapes import Case
from dpmmd import functional, reference

CASES = [
    Case(compiled=True),
    Case(classes=10, moments=(1, 2), compiled=True),
    Case(classes=100),
    Case(dtype=torch.bfloat16),
    Case(n=1),
    Case(n=16, classes=10),
    Case(n=256, classes=10, moments=(1, 2)),
    Case(pixels=64, classes=10),
    Case(pixels=128, n=16, classes=10),
    Case(pixels=256, n=1),
    Case(pixels=256, n=16),
    Case(encoder="ResNet18", classes=10),
    Case(encoder="ResNet18", n=256, classes=10, moments=(1, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.shape}, {case.dtype_name}")
def test_forward(measure: Measure, case: Case) -> None:
    if measure.smoke:
        case = case.smaller()
    features, labels = case.features(), case.labels()

    def variant(function, **options):
        def run() -> Tensor:
            with torch.no_grad():
                return function(features, labels, case.classes, moments=case.moments, **options)[0]

        return run

    variants, left_out = {}, {}
    copies = 1 + 2 * len(case.moments)  # concatenation, squares, quotients
    if case.feature_bytes * copies > MEMORY_LIMIT:
        left_out["eager"] = "needs more than 6 GiB"
    else:
        variants["eager"] = variant(baselines.mean_embedding)
    if case.compiled and not measure.smoke:
        torch._dynamo.reset()
        variants["compile"] = variant(torch.compile(baselines.mean_embedding, dynamic=False))
    for backend in on_this_cpu():
        variants[backend] = variant(functional.mean_embedding, backend=backend)
    if not measure.smoke:
        variants |= floors(features)

    error = None
    if case.n * case.dim * 8 < 1 << 28:
        doubles = [f.double() for f in features]
        truth = truth_of(doubles, case)
        del doubles

        def error(means: Tensor) -> float:
            return relative_error([means], [truth])

    means = measure(
        "mean_embedding, forward",
        case.shape,
        variants,
        ours=on_this_cpu()[-1],
        dtype=case.dtype_name,
        min_bytes=case.feature_bytes + case.d_vector_bytes,
        error=error,
        left_out=left_out,
    )
    assert means.shape == (len(case.moments), case.classes, case.dim)
    assert means.any(dim=2).sum() == len(case.moments) * min(case.n, case.classes)
    assert not measure.smoke or (error is not None and error(means) < 1e-5)


def truth_of(doubles: list[Tensor], case: Case) -> Tensor:
    means, _ = reference.mean_embedding(doubles, case.labels(), case.classes, moments=case.moments)
    return means
