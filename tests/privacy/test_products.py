"""Sums of products q q': the norm of each and their inner products, exactly; and the sums."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from dpmmd.privacy.sensitivity import Block, sensitivity
from dpmmd.privacy.sums import PrivateSums, factors


def products(vectors: Tensor, limits: Tensor, valid: Tensor | None = None) -> Tensor:
    """The sums, int64 [d, d]."""
    d = vectors.shape[1]
    sums = PrivateSums(d, d)
    valid = torch.ones(len(vectors), dtype=torch.bool) if valid is None else valid
    sums.add_products(vectors, torch.zeros_like(limits), valid, limits)
    return sums.take()[0]


def square(matrix: Tensor) -> int:
    """Squared norm of the diagonal and sqrt(2) times what is above it, in Python's integers."""
    rows = [[int(value) for value in row] for row in matrix]
    return sum(
        (1 if i == j else 2) * row[j] ** 2 for i, row in enumerate(rows) for j in range(i, len(row))
    )


def difficult(d: int) -> Tensor:
    """Vectors on which rounding could lengthen q, and some that no encoder should make."""
    rng = torch.Generator().manual_seed(d)
    one = torch.zeros(d)
    one[0] = 1
    return torch.stack(
        [
            one,
            -one,
            one * 1e30,
            one * 1e-30,
            torch.ones(d),
            torch.arange(d) % 2 - 0.5,
            torch.linspace(0.5, 1.5, d),  # entries that round up and down
            torch.full((d,), 2.0**-15 * 1.5),
            *torch.randn(20, d, generator=rng),
            torch.zeros(d),
            torch.full((d,), torch.inf),
            torch.full((d,), torch.nan),
        ]
    )


@pytest.mark.parametrize("d", [1, 2, 50, 785])
@pytest.mark.parametrize("limit", [1, 5, 1000, 2**20 + 7, 2**29, 2**30])
def test_norms_keep_to_the_limit(d: int, limit: int) -> None:
    vectors = difficult(d)
    q, within = factors(vectors, torch.full((len(vectors),), limit))
    norms = [sum(int(value) ** 2 for value in row) for row in q]
    assert max(norms) <= limit
    assert not within[-3:].any()  # zero, infinite, not a number
    assert not q[~within].any()
    if limit >= 2**29:
        assert within[:-3].all()
        assert min(norms[:-3]) > 0.99 * limit * (1 - d**0.5 / 2**13)
        unit = vectors[:-3].double() / vectors[:-3].double().norm(dim=1, keepdim=True)
        away = q[:-3].double() / q[:-3].double().norm(dim=1, keepdim=True) - unit
        assert float(away.abs().max()) < 1.1 * (limit**-0.5)  # to the nearest, and rescaled


def test_sums_are_exact_in_any_batches() -> None:
    rng = torch.Generator().manual_seed(0)
    vectors, limits = torch.randn(300, 40, generator=rng), torch.full((300,), 2**30)
    valid = torch.rand(300, generator=rng) < 0.8
    q, _ = factors(vectors, limits)
    exact = sum(np.outer(row, row).astype(object) for row in q[valid].numpy())
    assert (products(vectors, limits, valid).numpy().astype(object) == exact).all()
    sums = PrivateSums(40, 40)
    for part in (torch.arange(0, 7), torch.arange(299, 150, -1), torch.arange(7, 151)):
        sums.add_products(vectors[part], torch.zeros_like(part), valid[part], limits[part])
    assert torch.equal(sums.take()[0], products(vectors, limits, valid))
    with pytest.raises(RuntimeError, match="taken"):
        sums.add_products(vectors, torch.zeros_like(limits), valid, limits)


def test_classes_have_matrices_of_their_own() -> None:
    rng = torch.Generator().manual_seed(0)
    vectors, limits = torch.randn(60, 5, generator=rng), torch.full((60,), 2**30)
    labels, valid = torch.arange(60) % 3, torch.arange(60) % 7 > 0
    sums = PrivateSums(20, 5)
    sums.add_products(vectors, labels, valid, limits)
    for k, found in enumerate(sums.take()[0].view(4, 5, 5)):
        own = valid & (labels == k)
        assert torch.equal(found, products(vectors[own], limits[own]))


@pytest.mark.parametrize("adjacency", ["replace-one", "zero-out", "add-remove"])
def test_the_sensitivity_is_reached_and_not_passed(adjacency: str) -> None:
    """All pairs of directions in the plane and of images that contribute nothing."""
    limit = 1 << 30
    angles = torch.arange(24) * torch.pi / 12
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    vectors = torch.cat((vectors, torch.zeros(1, 2)))
    each = [products(v[None], torch.tensor([limit])) for v in vectors]
    pairs = itertools.product(each, each)
    if adjacency != "replace-one":
        pairs = ((one, each[-1]) for one in each)  # type: ignore[assignment]
    largest = max(square(a - b) for a, b in pairs) ** 0.5
    delta = sensitivity(adjacency, [Block("products", "sums", limit, True, True)])
    assert 0.999 * delta < largest <= delta


def test_a_group_counts_as_one() -> None:
    """Groups of three against groups of two, each image with its share of the limit."""
    rng, limit = torch.Generator().manual_seed(1), 1 << 30
    delta = sensitivity("replace-one", [Block("products", "sums", limit, True, True)])
    largest = 0.0
    for kind in range(40):
        a, b = (torch.randn(g, 3, generator=rng) for g in (3, 2))
        if kind % 2:  # the same image over and over: the longest that a group can be
            a[:], b[:] = torch.eye(3)[0], torch.eye(3)[1]
        one, other = (products(v, torch.full((len(v),), limit // len(v))) for v in (a, b))
        assert square(one) ** 0.5 <= limit
        largest = max(largest, square(one - other) ** 0.5)
    assert 0.999 * delta < largest <= delta
