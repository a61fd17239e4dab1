"""The exact rounded Gaussian. Thresholds are at about 1e-6, so that a failure means something."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2, norm

from dpmmd.privacy import noise

ALPHA = 1e-6


def chi_square(sample: np.ndarray, sd: float) -> float:
    """p-value of a sample against the rounded Gaussian, in up to 200 cells."""
    width = max(1, int(np.ceil(8 * sd / 200)))
    low, high = int(np.floor(-4 * sd)), int(np.ceil(4 * sd))
    inner = np.arange(low, high + 1, width) - 0.5
    edges = np.concatenate([[-np.inf], inner, [np.inf]])
    p = np.diff(norm.cdf(edges / sd))
    observed = np.bincount(np.searchsorted(inner, sample), minlength=len(p))
    keep = p * len(sample) >= 10
    p = np.append(p[keep], p[~keep].sum())
    observed = np.append(observed[keep], observed[~keep].sum())
    p, observed = p[p > 0], observed[p > 0]
    statistic = ((observed - p * len(sample)) ** 2 / (p * len(sample))).sum()
    return float(chi2.sf(statistic, len(p) - 1))


@pytest.mark.parametrize("sd", [0.3, 0.62, 1.0, 1.7, 4.2, 33.3, 1000.0, 1e6])
def test_distribution(sd: float) -> None:
    assert chi_square(noise.rounded_gaussian(400_000, sd), sd) > ALPHA


@pytest.mark.parametrize("sd", [0.7, 4.2])
def test_distribution_of_the_exact_path(sd: float) -> None:
    sample = noise.rounded_gaussian(20_000, sd, margin=1e9)
    assert chi_square(sample, sd) > ALPHA


def test_the_exact_path_decides_as_the_fast_one() -> None:
    rng = np.random.default_rng(1)
    data = rng.integers(0, 2**64, 3 * 2000, dtype=np.uint64)

    def replay() -> object:
        stream = iter([data])
        extra = np.random.default_rng(2)
        return lambda n: (
            next(stream, None) if n == 6000 else extra.integers(0, 2**64, n, dtype=np.uint64)
        )

    def proposals(margin: float) -> np.ndarray:
        m, sd = 3, 10.0
        tau = 2.0**m / sd
        k = max(v * np.log(2) - (tau * v) ** 2 / 2 for v in range(64)) + 1e-9
        return noise._round_of_proposals(2000, sd, m, tau, k, replay(), margin)  # type: ignore[arg-type]

    np.testing.assert_array_equal(proposals(noise.MARGIN), proposals(1e9))


def test_moments_and_tails_at_the_releases_scale() -> None:
    sd, n = 4.0e9, 4_000_000
    x = noise.rounded_gaussian(n, sd) / sd
    z = -norm.ppf(ALPHA / 2)
    assert abs(x.mean()) < z / np.sqrt(n)
    assert abs((x**2).mean() - 1) < z * np.sqrt(2 / n)
    assert abs((x**3).mean()) < z * np.sqrt(15 / n)
    assert abs((x**4).mean() - 3) < z * np.sqrt(96 / n)
    for t in (3.0, 4.0):
        expected = 2 * norm.sf(t) * n
        assert abs((np.abs(x) > t).sum() - expected) < z * np.sqrt(expected)


def test_low_bits_are_fair_and_coordinates_independent() -> None:
    n = 1_000_000
    x = noise.rounded_gaussian(n, 4.0e9)
    z = -norm.ppf(ALPHA / 40)
    for bit in range(16):
        assert abs(((x >> bit) & 1).mean() - 0.5) < z * 0.5 / np.sqrt(n)
    y = x / 4.0e9
    for lag in (1, 2, 3, 10922):
        assert abs((y[:-lag] * y[lag:]).mean()) < z / np.sqrt(n - lag)


def test_runs_differ() -> None:
    assert not np.array_equal(noise.rounded_gaussian(100, 1e9), noise.rounded_gaussian(100, 1e9))


def test_zero_words_extend_the_geometric() -> None:
    """A zero word has probability 2^-64: V must go on counting in the next one."""
    calls = iter(
        [np.array([2, 0, 0], np.uint64), np.array([0], np.uint64), np.array([4], np.uint64)]
    )
    sample = noise._round_of_proposals(
        1, 2.0**62, 0, 1.0, -1e3, lambda n: next(calls), noise.MARGIN
    )
    assert sample.tolist() == [64 + 64 + 2]


@pytest.mark.parametrize("sd", [0.0, -1.0, float("nan"), float("inf"), 2.0**61])
def test_refuses_sd(sd: float) -> None:
    with pytest.raises(ValueError, match="sd="):
        noise.rounded_gaussian(1, sd)


def test_refuses_a_smaller_margin() -> None:
    with pytest.raises(ValueError, match="margin="):
        noise.rounded_gaussian(1, 1.0, margin=0.0)


def test_empty() -> None:
    assert noise.rounded_gaussian(0, 1.0).shape == (0,)


def test_small_uniforms_are_decided_exactly() -> None:
    """Below 2^-23 the 64 known bits of U are coarser than the margin: further bits decide."""
    m, sd = 0, 1.0
    tau, k = 1.0, max(v * np.log(2) - v * v / 2 for v in range(64)) + 1e-9
    rejected = 0
    for i in range(100):
        bits = np.uint64((1 << 63) + 2 * i * 10**15)  # u about 1/2, a little further each time
        v = 8
        y = float(bits >> np.uint64(1)) * 2.0**-63 + v
        p = np.exp(v * np.log(2) - y * y / 2 - k)
        assert 2.0**-45 < p < 2.0**-23
        w = np.uint64(int(p * 2.0**64))  # the cell that holds p
        first = np.array([bits, 1 << v, w], np.uint64)
        full = np.array([2**64 - 1], np.uint64)  # further bits all ones: U at the end of its cell
        stream = iter([first])
        accepted = noise._round_of_proposals(
            1, sd, m, tau, k, lambda n, s=stream, f=full: next(s, f), noise.MARGIN
        )
        exact = noise._exact_decision(
            int(bits >> np.uint64(1)), v, int(w), m, sd, k, lambda n, f=full: f
        )
        assert len(accepted) == int(exact)
        rejected += not exact
    assert rejected > 20  # a decision in double would have accepted about half of the cells
