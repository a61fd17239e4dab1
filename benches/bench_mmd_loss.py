"""The squared MMD's gradient in the features: forward and backward, against plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benches import baselines
from benches.backends import on_this_cpu
from benches.harness import MEMORY_LIMIT, Measure, floors, relative_error
from benches.shapes import Case, gradients
from dpmmd import functional, reference

CASES = [
    Case(compiled=True),
    Case(classes=10, moments=(1, 2), compiled=True),
    Case(classes=100),
    Case(classes=10, dtype=torch.bfloat16),
    Case(n=1),
    Case(n=16, classes=10),
    Case(n=256, classes=10),
    Case(pixels=64, classes=10),
    Case(pixels=128, n=16, classes=10, moments=(1, 2)),
    Case(pixels=256, n=16),
    Case(encoder="ResNet18", classes=10),
    Case(encoder="ResNet18", n=256, classes=10, moments=(1, 2)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.shape}, {case.dtype_name}")
def test_forward_and_backward(measure: Measure, case: Case) -> None:
    if measure.smoke:
        case = case.smaller()
    features, target = [f.requires_grad_() for f in case.features()], case.target()
    variants, left_out = {}, {}
    copies = 1 + 4 * len(case.moments) + len(case.moments)  # phis, their gradients, squares
    if case.feature_bytes * copies > MEMORY_LIMIT:
        left_out["eager"] = "needs more than 6 GiB"
    else:
        variants["eager"] = _variant(baselines.mean_embedding, features, case, target)
    if case.compiled and not measure.smoke:
        torch._dynamo.reset()
        compiled = torch.compile(_authors_loss, dynamic=False)
        labels = case.labels()

        def run_compiled() -> tuple[Tensor, ...]:
            loss = compiled(features, labels, case.classes, case.moments, target)
            return torch.autograd.grad(loss, features)

        variants["compile"] = run_compiled
    for backend in on_this_cpu():

        def embed(*args, backend=backend, **options):
            return functional.mean_embedding(*args, backend=backend, **options)

        variants[backend] = _variant(embed, features, case, target, functional.mmd_loss)
    if not measure.smoke:
        variants |= floors(features, backward=True)

    error = None
    if case.n * case.dim * 8 < 1 << 28:
        doubles = [f.detach().double().requires_grad_() for f in features]
        truth = gradients(
            reference.mean_embedding, doubles, case, target.double(), reference.mmd_loss
        )
        del doubles

        def error(grads: tuple[Tensor, ...]) -> float:
            return relative_error(grads, truth)

    grads = measure(
        "mmd_loss, forward + backward",
        case.shape,
        variants,
        ours=on_this_cpu()[-1],
        dtype=case.dtype_name,
        min_bytes=3 * case.feature_bytes + 3 * case.d_vector_bytes,
        error=error,
        left_out=left_out,
        gradient_bytes=case.feature_bytes,
        d_vector_bytes=case.d_vector_bytes,
    )
    assert all(g.any() for g in grads)
    if measure.smoke:
        assert error is not None
        assert error(grads) < (1e-2 if case.dtype == torch.bfloat16 else 1e-5)


def _variant(embed, features, case, target, loss=baselines.mmd_loss):
    return lambda: gradients(embed, features, case, target, loss)


def _authors_loss(features, labels, num_classes, moments, target):
    means, counts = baselines.mean_embedding(features, labels, num_classes, moments=moments)
    return baselines.mmd_loss(means, counts, target)
