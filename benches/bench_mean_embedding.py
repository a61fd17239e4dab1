"""Class means of normalised features, and their gradient, against the formulas in plain torch.

`plain` concatenates and normalises the features in memory, as the method is usually written;
`read` is the time to read the features once, the least any forward pass can take.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benches.conftest import make_features
from dpmmd import functional, reference

N, CLASSES = 64, 10
IMPLEMENTATIONS: dict[str, Callable] = {
    "dpmmd": functional.mean_embedding,
    "plain": reference.mean_embedding,
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("moments", [(1,), (1, 2)], ids=["m1", "m12"])
def test_forward(
    benchmark: BenchmarkFixture, encoder_name: str, moments: tuple[int, ...], implementation: str
) -> None:
    features = make_features(encoder_name, N)
    labels = torch.arange(N) % CLASSES
    benchmark.group = f"forward {encoder_name} {moments}"
    function = IMPLEMENTATIONS[implementation]
    with torch.no_grad():
        means, _ = benchmark(function, features, labels, CLASSES, moments=moments)
    assert means.shape[:2] == (len(moments), CLASSES)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("moments", [(1,), (1, 2)], ids=["m1", "m12"])
def test_forward_and_backward(
    benchmark: BenchmarkFixture, encoder_name: str, moments: tuple[int, ...], implementation: str
) -> None:
    features = [f.requires_grad_() for f in make_features(encoder_name, N)]
    labels = torch.arange(N) % CLASSES
    function = IMPLEMENTATIONS[implementation]
    benchmark.group = f"forward + backward {encoder_name} {moments}"

    def step() -> tuple[torch.Tensor, ...]:
        means, counts = function(features, labels, CLASSES, moments=moments)
        loss = functional.mmd_loss(means, counts, torch.zeros_like(means))
        return torch.autograd.grad(loss, features)

    grads = benchmark(step)
    assert all(g.any() for g in grads)


def test_read(benchmark: BenchmarkFixture, encoder_name: str) -> None:
    features = make_features(encoder_name, N)
    benchmark.group = f"forward {encoder_name} (1,)"
    total = benchmark(lambda: sum(float(f.sum()) for f in features))
    assert total > 0
