"""Gaussian-DP accounting against 60-digit mpmath and against dp-accounting."""

from __future__ import annotations

import math

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from dpmmd.privacy import accounting

EPSILONS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
DELTAS = (1e-5, 1e-6, 1e-8)


def exact_delta(mu: float, epsilon: float) -> mpmath.mpf:
    with mpmath.workdps(60):
        m, e = mpmath.mpf(mu), mpmath.mpf(epsilon)
        return mpmath.ncdf(m / 2 - e / m) - mpmath.exp(e) * mpmath.ncdf(-m / 2 - e / m)


def test_golden() -> None:
    assert accounting.calibrate(epsilon=1, delta=1e-6).sd_over_sensitivity == pytest.approx(
        4.2246788893268, rel=2e-9
    )


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("delta", DELTAS)
def test_calibration_is_tight_and_on_the_safe_side(epsilon: float, delta: float) -> None:
    sd, mu = accounting.calibrate(epsilon=epsilon, delta=delta)
    assert mu == pytest.approx(1 / sd, rel=1e-15)
    assert exact_delta(mu, epsilon) <= delta
    assert exact_delta(mu * (1 + 3e-9), epsilon) > delta


@pytest.mark.parametrize("mu", [0.01, 0.2366, 1.0, 7.0, 40.0])
@pytest.mark.parametrize("delta", [1e-3, 1e-6, 1e-12, 1e-200])
def test_epsilon_is_tight_and_on_the_safe_side(mu: float, delta: float) -> None:
    found = accounting.epsilon(mu=mu, delta=delta)
    assert found > 0
    assert exact_delta(mu, found) <= delta
    assert exact_delta(mu, found * (1 - 3e-9)) > delta


@pytest.mark.parametrize("mu", [1e-7, 1e-5, 1e-2, 0.3, 1.0, 5.0, 50.0])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 0.1, 1.0, 10.0, 100.0])
def test_delta_against_mpmath(mu: float, epsilon: float) -> None:
    exact = exact_delta(mu, epsilon)
    if exact < mpmath.mpf(10) ** -290:
        assert accounting.delta(mu=mu, epsilon=epsilon) < 1e-280
        return
    ours = accounting.delta(mu=mu, epsilon=epsilon)
    assert exact <= ours or ours == 1.0
    assert ours == pytest.approx(float(exact), rel=3e-9)


@given(epsilon=st.floats(1e-3, 50), log_delta=st.floats(-60, -1))
def test_round_trip(epsilon: float, log_delta: float) -> None:
    delta = math.exp(log_delta)
    mu = accounting.calibrate(epsilon=epsilon, delta=delta).mu
    back = accounting.epsilon(mu=mu, delta=delta)
    # mu is rounded by a relative 1e-9, which moves epsilon by mu 1e-9 d epsilon / d mu
    t = epsilon / mu
    slope = math.exp(norm.logpdf(mu / 2 - t) - epsilon - norm.logcdf(-mu / 2 - t))
    assert abs(back - epsilon) <= 2e-9 * (mu * slope + epsilon) + 1e-12
    assert accounting.delta(mu=mu, epsilon=epsilon) <= delta * (1 + 3e-9)


def test_composition() -> None:
    assert accounting.compose([3.0, 4.0]) == pytest.approx(5.0, rel=1e-14)
    assert accounting.compose([0.7]) >= 0.7
    with pytest.raises(ValueError, match="at least one"):
        accounting.compose([])


def test_epsilon_is_zero_when_delta_covers_everything() -> None:
    assert accounting.epsilon(mu=0.01, delta=0.5) == 0.0


@pytest.mark.parametrize("epsilon", [0.5, 1.0, 5.0])
@pytest.mark.parametrize("delta", [1e-5, 1e-8])
def test_against_dp_accounting(epsilon: float, delta: float) -> None:
    import dp_accounting
    from dp_accounting import pld

    sd = accounting.calibrate(epsilon=epsilon, delta=delta).sd_over_sensitivity
    accountant = pld.PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE)
    accountant.compose(dp_accounting.GaussianDpEvent(sd))
    assert accountant.get_epsilon(delta) == pytest.approx(epsilon, rel=2e-4)


def test_dp_accountings_replace_one_conventions_differ() -> None:
    """Why we always pass it sensitivity 1 and ADD_OR_REMOVE_ONE: under REPLACE_ONE one of its
    accountants doubles the sensitivity and the other does not."""
    import dp_accounting
    from dp_accounting import pld, rdp

    one = dp_accounting.NeighboringRelation.REPLACE_ONE
    add = dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE

    def epsilon(make: type, relation: object) -> float:
        accountant = make(neighboring_relation=relation)
        accountant.compose(dp_accounting.GaussianDpEvent(4.0))
        return float(accountant.get_epsilon(1e-6))

    assert epsilon(pld.PLDAccountant, one) > 1.8 * epsilon(pld.PLDAccountant, add)
    assert epsilon(rdp.RdpAccountant, one) == pytest.approx(epsilon(rdp.RdpAccountant, add))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"epsilon": 0.0, "delta": 1e-5}, "epsilon"),
        ({"epsilon": -1.0, "delta": 1e-5}, "epsilon"),
        ({"epsilon": math.nan, "delta": 1e-5}, "epsilon"),
        ({"epsilon": math.inf, "delta": 1e-5}, "epsilon"),
        ({"epsilon": 1.0, "delta": 0.0}, "delta"),
        ({"epsilon": 1.0, "delta": 1.0}, "delta"),
        ({"epsilon": 1.0, "delta": math.nan}, "delta"),
    ],
)
def test_out_of_range(arguments: dict[str, float], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}="):
        accounting.calibrate(**arguments)
