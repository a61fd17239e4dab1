"""The certificate at its limit and one above it, and what is summed: the definition in torch.

Nothing before the certificate is trusted, so what comes before is replaced here by integers of
choice. The native twin is tested at its limit in tests/core/test_native_mutations.py, where it is
compiled without the guard that keeps every vector away from the limit.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpmmd import backends
from dpmmd.bounds import Bound
from dpmmd.privacy import sums as module
from dpmmd.privacy.sums import GRID_BITS, PrivateSums, bounded_integers, certify, factors

LIMIT = 1 << 30
OPTIONS: dict[str, Any] = {"bound": Bound(), "nonnegative": False}


def certified(
    rows: list[list[list[int]]], limits: list[int], *, nonnegative: bool = False
) -> list[bool]:
    """Which images pass; one list of rows a tap. What passes stays, and what does not is zero."""
    taps = [torch.tensor(tap, dtype=torch.int64) for tap in rows]
    before = [tap.clone() for tap in taps]
    integers, within = certify(taps, torch.tensor(limits), nonnegative=nonnegative)
    for q, tap in zip(integers, before, strict=True):
        assert torch.equal(q, torch.where(within[:, None], tap, 0))
    return [bool(w) for w in within]


@pytest.mark.parametrize("limit", [1, 5, 2**15 + 1, LIMIT - 1, LIMIT])
def test_a_vector_of_the_limit_passes_and_one_above_it_does_not(limit: int) -> None:
    at, above = [limit, 0], [limit, 1]  # squares limit^2 and limit^2 + 1
    below = [limit - 1, 1] if limit > 1 else [0, 1]
    rows = [at, above, below, [-limit, 0], [limit, -1], [limit + 1, 0], [0, 0]]
    passes = [True, False, True, True, False, False, False]
    assert certified([rows], [limit] * 7) == passes
    # Each entry in a tap of its own: the taps count together.
    assert certified([[[r[0]] for r in rows], [[r[1]] for r in rows]], [limit] * 7) == passes
    # Each image has a limit of its own.
    assert certified([[at, at, at]], [limit - 1, limit, limit + 1]) == [False, True, True]


def test_squares_that_overflow_do_not_pass() -> None:
    """Sums of squares that are 0 or 1 modulo 2^64, of one entry or of many."""
    huge = [[2**32, 1], [2**62, 1], [-(2**63), 1], [2**63 - 1, 0], [2**31, 1], [3037000500, 0]]
    assert certified([huge], [LIMIT] * 6) == [False] * 6
    four = [[2**31] * 4 + [1]]
    assert certified([four], [LIMIT]) == [False]
    assert certified([[[2**31]]] * 4 + [[[1]]], [LIMIT]) == [False]


def test_a_negative_entry_of_any_tap_fails_a_nonnegative_block() -> None:
    taps = [[[1, 0], [1, 0], [1, -1], [0, 0]], [[0], [-1], [5], [0]]]
    assert certified(taps, [LIMIT] * 4, nonnegative=True) == [True, False, False, False]
    assert certified(taps, [LIMIT] * 4) == [True, True, True, False]
    assert certified([[[1]], [[]]], [LIMIT], nonnegative=True) == [True]


# ----------------------------------------------------------------------------- it is asked


def replace_by(patch: pytest.MonkeyPatch, integers: Tensor) -> None:
    """Makes the quantised vectors ``integers`` [n, d], whatever the features are."""
    patch.setattr(module, "_quantise", lambda *_: [integers.clone()])


def test_what_is_summed_has_passed(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.tensor([[LIMIT, 0], [LIMIT, 1], [3, 4], [5, 1]])
    limits = torch.tensor([LIMIT, LIMIT, 5, 5])
    replace_by(monkeypatch, q)
    integers, within = bounded_integers([torch.ones(4, 2)], limits, **OPTIONS)
    assert within.tolist() == [True, False, True, False]
    assert integers[0][:, 0].tolist() == [LIMIT, 0, 3, 0]
    sums = PrivateSums(1, 2)
    with backends.use("torch"):
        sums.add(
            [torch.ones(4, 2)], torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool),
            limits, **OPTIONS,
        )  # fmt: skip
    assert sums.take()[0].tolist() == [[LIMIT + 3, 4]]


def test_the_vectors_of_products_are_certified_to_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their first certificate let pass, and whatever the rounding made of it."""
    half = GRID_BITS // 2
    fine = torch.tensor([[2**half, 0], [2**half, 1], [5, 0], [2, 2]]) << half
    fine[3] = (2 << half) + (1 << half >> 1)  # rounds up to (3, 3), 18 > 4^2
    monkeypatch.setattr(
        module, "bounded_integers", lambda *_, **__: ([fine.clone()], torch.ones(4, dtype=bool))
    )
    q, within = factors(torch.ones(4, 2), torch.tensor([LIMIT, LIMIT, 25, 17]))
    assert within.tolist() == [True, False, True, False]
    assert q.tolist() == [[2**half, 0], [0, 0], [5, 0], [0, 0]]


@pytest.mark.parametrize("limit", [1, 2, 24, 25, 26, 2**30 - 1, 2**30])
def test_the_limit_of_a_products_vector(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """|q| is at most floor(sqrt(limit)), and what is asked for is shorter by half sqrt(d)."""
    asked: list[int] = []

    def record(_: object, limits: Tensor, **options: Any) -> tuple[list[Tensor], Tensor]:
        asked.extend(limits.tolist())
        assert options == {"bound": Bound(), "nonnegative": False}
        return [torch.zeros(1, 9, dtype=torch.int64)], torch.zeros(1, dtype=torch.bool)

    monkeypatch.setattr(module, "bounded_integers", record)
    factors(torch.ones(1, 9), torch.tensor([limit]))
    root = int(limit**0.5)
    assert root * root <= limit < (root + 1) ** 2
    assert asked == [max(0, root - 2) << (GRID_BITS // 2)]  # ceil(sqrt(9) / 2) = 2


# ----------------------------------------------------------------------------- it is summed


def test_every_image_has_its_own_limit_label_and_validity(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over the pieces that images are taken in, each counts as it does alone."""
    rng = torch.Generator().manual_seed(0)
    taps = [torch.randn(17, 3, generator=rng), torch.randn(17, 5, generator=rng)]
    labels = torch.randint(0, 3, (17,), generator=rng)
    valid = torch.rand(17, generator=rng) < 0.7
    limits = torch.randint(1, LIMIT, (17,), generator=rng)
    options: dict[str, Any] = {**OPTIONS, "bound": Bound((1, 2), joint_weight=0.5)}

    def summed(parts: list[slice], shared: int) -> tuple[Tensor, Tensor]:
        sums = PrivateSums(3, 2 * (8 - 3 * shared), 2 * 3 * shared)
        with backends.use("torch"):
            for part in parts:
                sums.add(
                    [tap[part] for tap in taps], labels[part], valid[part], limits[part],
                    shared_taps=shared, **options,
                )  # fmt: skip
        return sums.take()

    alone = [summed([slice(i, i + 1)], 0)[0] for i in range(17)]
    for i, one in enumerate(alone):
        square = sum(int(q) ** 2 for q in one.flatten())
        assert one[torch.arange(3) != labels[i]].count_nonzero() == 0
        if valid[i]:
            assert 0.999 * int(limits[i]) ** 2 < square <= int(limits[i]) ** 2
        else:
            assert square == 0
    whole = torch.stack(alone).sum(dim=0)
    assert torch.equal(summed([slice(None)], 0)[0], whole)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 4 * 16)  # four images at a time
    assert torch.equal(summed([slice(None)], 0)[0], whole)
    own, shared = summed([slice(None)], 1)
    by_tap = whole.view(3, 2, 8)
    assert torch.equal(own, by_tap[:, :, 3:].flatten(1))
    assert torch.equal(shared, by_tap[:, :, :3].sum(dim=0).flatten()[None])


def test_counts_are_of_valid_images_in_their_classes() -> None:
    sums = PrivateSums(3, 1)
    valid = torch.tensor([True, True, False, True])
    taus = torch.tensor([10, 20, 40, 80])
    sums.add_counts(torch.tensor([0, 2, 1, 2]), valid, taus)
    sums.add_counts(torch.tensor([1]), valid[:1], taus[:1])
    assert sums.take()[0].tolist() == [[10], [10], [100]]


def test_products_are_of_valid_images_in_their_classes() -> None:
    vectors = torch.eye(3)[[0, 1, 2, 0, 1]]
    labels, valid = torch.tensor([0, 1, 1, 1, 0]), torch.tensor([True, True, False, True, True])
    limits = torch.tensor([LIMIT, LIMIT, LIMIT, LIMIT // 4, LIMIT])
    sums = PrivateSums(6, 3)
    sums.add_products(vectors, labels, valid, limits)
    found = sums.take()[0].view(2, 3, 3).double() / LIMIT
    expected = torch.stack([torch.tensor([1.0, 1, 0]).diag(), torch.tensor([0.25, 1, 0]).diag()])
    torch.testing.assert_close(found, expected.double(), rtol=0, atol=2e-4)


def test_products_are_summed_where_float64_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most 2^30 each, and so few at once that every partial sum is below 2^53."""
    assert module._EXACTLY << GRID_BITS <= 1 << 53
    assert 2 * module._HALF == GRID_BITS
    monkeypatch.setattr(module, "_EXACTLY", 3)
    taken: list[int] = []
    product = Tensor.__matmul__

    def watch(self: Tensor, other: Tensor) -> Tensor:
        taken.append(other.shape[0])
        assert self.dtype == other.dtype == torch.float64
        return product(self, other)

    monkeypatch.setattr(Tensor, "__matmul__", watch)
    sums = PrivateSums(2, 2)
    sums.add_products(
        torch.ones(8, 2), torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=torch.bool),
        torch.full((8,), LIMIT),
    )  # fmt: skip
    assert taken == [3, 3, 2]
    assert sums.take()[0].min() > 0.99 * 4 * LIMIT
