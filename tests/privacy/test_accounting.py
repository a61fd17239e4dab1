"""Gaussian-DP accounting against 60-digit mpmath and against dp-accounting."""

from __future__ import annotations

import math
from fractions import Fraction

import mpmath
import pytest
from hypothesis import given, settings
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
        4.2246788893268, rel=1e-9
    )


@pytest.mark.parametrize("epsilon", EPSILONS)
@pytest.mark.parametrize("delta", DELTAS)
def test_calibration_is_tight_and_on_the_safe_side(epsilon: float, delta: float) -> None:
    sd, mu = accounting.calibrate(epsilon=epsilon, delta=delta)
    assert mu == pytest.approx(1 / sd, rel=3e-15)
    assert Fraction(mu) * Fraction(sd) >= 1 + Fraction(9, 10**16)  # the mechanism may round sd
    assert exact_delta(mu, epsilon) <= delta
    assert exact_delta(mu * (1 + 1e-9), epsilon) > delta


# Where doubles cancel, underflow or saturate, and all over the ranges.
EXTREME = (
    (1e-7, 1e-5), (1e-7, 0.999), (1e-6, 1e-300), (1e-3, 1e-12), (1.0, 1e-300), (1e3, 1e-5),
    (9999.0, 1e-300), (9999.0, 0.5), (9999.0, 0.999999), (0.01, 1 - 2.0**-53), (30.0, 1e-17),
)  # fmt: skip
MUS = (1e-8, 1.2345e-7, 3e-6, 0.01, 0.7, 1e2, 1e4)


def check_calibration(epsilon: float, delta: float) -> None:
    sd, mu = accounting.calibrate(epsilon=epsilon, delta=delta)
    assert exact_delta(mu, epsilon) <= delta
    assert exact_delta(mu * (1 + 1e-9), epsilon) > delta
    assert Fraction(mu) * Fraction(sd) > 1


def check_epsilon(mu: float, delta: float) -> None:
    found = accounting.epsilon(mu=mu, delta=delta)
    assert exact_delta(mu, found) <= delta
    assert found == 0 or exact_delta(mu, found * (1 - 1e-9)) > delta


def check_delta(mu: float, epsilon: float) -> None:
    exact, found = exact_delta(mu, epsilon), accounting.delta(mu=mu, epsilon=epsilon)
    assert exact <= found <= max(exact * (1 + mpmath.mpf(10) ** -9), 1e-300)


@pytest.mark.parametrize(("epsilon", "delta"), EXTREME)
def test_rounding_is_directed_at_extremes(epsilon: float, delta: float) -> None:
    check_calibration(epsilon, delta)
    for mu in MUS:
        check_epsilon(mu, delta)
        check_delta(mu, epsilon)


LOG_EPSILON, LOG_DELTA = st.floats(-7, 3.9999), st.floats(-300, -1e-4)


@settings(deadline=None, max_examples=30)
@given(LOG_EPSILON, LOG_DELTA | st.floats(-12, -1e-4), st.floats(-8, 4))
def test_rounding_is_directed(log_epsilon: float, log_delta: float, log_mu: float) -> None:
    epsilon, delta, mu = 10.0**log_epsilon, 10.0**log_delta, 10.0**log_mu
    if exact_delta(1.001e-8, epsilon) < delta:  # else no mu in the range is small enough
        check_calibration(epsilon, delta)
    check_epsilon(mu, delta)
    check_delta(mu, epsilon)


@given(st.floats(-9, 45))
def test_the_mills_ratio_is_enclosed(x: float) -> None:
    found = accounting._mills(Fraction(x))
    with mpmath.workdps(250):
        exact = mpmath.ncdf(-mpmath.mpf(x)) / mpmath.npdf(mpmath.mpf(x))
        low, high = (mpmath.mpf(mpmath.mp.make_mpf(end)) for end in found._mpi_)
        assert low < exact < high
        assert high - low < exact * mpmath.mpf(10) ** -28


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
    assert ours == pytest.approx(float(exact), rel=1e-9)


@settings(deadline=None, max_examples=40)
@given(epsilon=st.floats(1e-3, 50), log_delta=st.floats(-60, -1))
def test_round_trip(epsilon: float, log_delta: float) -> None:
    delta = math.exp(log_delta)
    mu = accounting.calibrate(epsilon=epsilon, delta=delta).mu
    back = accounting.epsilon(mu=mu, delta=delta)
    # mu is rounded by a relative 1e-9 at most, which moves epsilon by mu 1e-9 d epsilon / d mu
    t = epsilon / mu
    slope = math.exp(norm.logpdf(mu / 2 - t) - epsilon - norm.logcdf(-mu / 2 - t))
    assert abs(back - epsilon) <= 2e-9 * (mu * slope + epsilon) + 1e-12
    assert accounting.delta(mu=mu, epsilon=epsilon) <= delta


def test_composition() -> None:
    assert accounting.compose([3.0, 4.0]) == pytest.approx(5.0, rel=1e-14)
    assert accounting.compose([0.7]) >= 0.7
    for n in range(1, 40):
        mus = [0.1 * k + 1 / 3 for k in range(n)]
        square = sum(Fraction(mu) ** 2 for mu in mus)
        assert (
            square <= Fraction(accounting.compose(mus)) ** 2 <= square * (1 + Fraction(1, 10**14))
        )
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
