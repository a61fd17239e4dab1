"""Gaussian differential privacy in closed form: (epsilon, delta) <-> mu <-> noise.

One release adds N(0, sd^2) to every coordinate of a vector whose L2 sensitivity is Delta. All of
its privacy is the one number ``mu = Delta / sd`` (Dong, Roth, Su 2022, "Gaussian differential
privacy", Thm 2.7): telling two neighbouring data sets apart is exactly as hard as telling N(0, 1)
from N(mu, 1). The curve ``delta(epsilon)`` of that test is Balle and Wang 2018 (Thm 8),

    delta(eps) = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu),

exact, neither a bound nor a composition theorem's slack. k releases compose to
``mu = sqrt(mu_1^2 + ... + mu_k^2)`` (Dong et al., Cor. 3.3), again exactly.

Every conversion rounds to the safe side by a relative 1e-9, far above the error of the arithmetic
(tests compare with 60-digit mpmath) and far below anything that matters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from scipy.optimize import brentq
from scipy.special import erfcx, log_ndtr

SAFETY = 1e-9
_SQRT2 = math.sqrt(2.0)
_MU_MIN, _MU_MAX = 1e-8, 1e4


class Calibration(NamedTuple):
    """Noise that meets a target: ``sd_over_sensitivity`` (sd / Delta) and ``mu`` (its inverse)."""

    sd_over_sensitivity: float
    mu: float


def _check_epsilon(epsilon: float) -> float:
    epsilon = float(epsilon)
    if not (0.0 < epsilon < 1e4) or math.isnan(epsilon):
        raise ValueError(
            f"epsilon={epsilon!r}: expected a number in (0, 10000); "
            "values between 0.1 and 10 are usual."
        )
    return epsilon


def _check_delta(delta: float) -> float:
    delta = float(delta)
    if not (1e-300 <= delta < 1.0):
        raise ValueError(
            f"delta={delta!r}: expected a number in [1e-300, 1); "
            "use less than 1 / N for N private images, e.g. 1e-5 or 1e-6."
        )
    return delta


def _check_mu(mu: float) -> float:
    mu = float(mu)
    if not (_MU_MIN <= mu <= _MU_MAX):
        raise ValueError(
            f"mu={mu!r}: expected sensitivity / noise sd in [{_MU_MIN:g}, {_MU_MAX:g}]."
        )
    return mu


def _log_delta(mu: float, epsilon: float) -> float:
    """log delta(epsilon) of a mu-GDP mechanism.

    With t = eps/mu both normal tails share the factor exp(-(t - mu/2)^2 / 2), since
    e^eps * exp(-(t + mu/2)^2 / 2) = exp(-(t - mu/2)^2 / 2). What is left is a difference of two
    values of the scaled tail erfcx, which loses no digits to a large exponent.
    """
    t = epsilon / mu
    u = (t - mu / 2) / _SQRT2
    v = (t + mu / 2) / _SQRT2
    if u > -5.0:
        # For mu -> 0 the difference erfcx(u) - erfcx(v) itself cancels: use the slope there.
        if mu < 1e-6:
            mid = t / _SQRT2
            slope = 2 / math.sqrt(math.pi) - 2 * mid * erfcx(mid)  # -erfcx'(mid)
            gap = mu / _SQRT2 * slope
        else:
            gap = erfcx(u) - erfcx(v)
        if gap <= 0.0:
            return -math.inf
        return -u * u + math.log(gap / 2)
    first = float(log_ndtr(-u * _SQRT2))
    second = epsilon + float(log_ndtr(-v * _SQRT2))
    return first + math.log1p(-math.exp(min(second - first, -1e-300)))


def delta(*, mu: float, epsilon: float) -> float:
    """The least delta for which a mu-GDP mechanism is (epsilon, delta)-DP (Balle, Wang 2018)."""
    mu, epsilon = _check_mu(mu), float(epsilon)
    if not 0.0 <= epsilon < 1e4:
        raise ValueError(f"epsilon={epsilon!r}: expected a number in [0, 10000).")
    return min(1.0, math.exp(_log_delta(mu, epsilon)) * (1 + SAFETY))


def epsilon(*, mu: float, delta: float) -> float:
    """The least epsilon for which a mu-GDP mechanism is (epsilon, delta)-DP.

    Args:
        mu: sensitivity / noise sd, in [1e-8, 1e4].
        delta: in [1e-300, 1).

    Returns:
        epsilon >= 0, rounded up by a relative 1e-9.
    """
    mu, delta = _check_mu(mu), _check_delta(delta)
    target = math.log(delta)
    if _log_delta(mu, 0.0) <= target:
        return 0.0
    high = mu * mu / 2 + mu * math.sqrt(2 * -target) + mu  # Chernoff bound of the normal tail
    root = brentq(lambda e: _log_delta(mu, e) - target, 0.0, high, xtol=1e-15, rtol=1e-14)
    return float(root) * (1 + SAFETY)


def calibrate(*, epsilon: float, delta: float) -> Calibration:
    """The least noise with which one Gaussian release is (epsilon, delta)-DP.

    Args:
        epsilon: privacy-loss bound, in (0, 10000).
        delta: failure probability, in [1e-300, 1); below 1 / N to mean anything.

    Returns:
        ``Calibration(sd_over_sensitivity, mu)``: add N(0, (sd_over_sensitivity * Delta)^2) to every
        coordinate. Rounded to the safe side by a relative 1e-9.

    Raises:
        ValueError: epsilon or delta out of range, or no sensible noise level meets them.

    Example:
        >>> round(calibrate(epsilon=1.0, delta=1e-6).sd_over_sensitivity, 6)
        4.224679
    """
    epsilon, delta = _check_epsilon(epsilon), _check_delta(delta)
    target = math.log(delta)

    def excess(log_mu: float) -> float:
        return max(_log_delta(math.exp(log_mu), epsilon), -1e6) - target

    low, high = math.log(_MU_MIN), math.log(_MU_MAX)
    if excess(low) > 0 or excess(high) < 0:
        raise ValueError(
            f"epsilon={epsilon!r}, delta={delta!r}: no noise level with mu in "
            f"[{_MU_MIN:g}, {_MU_MAX:g}] meets them; choose less extreme values."
        )
    mu = math.exp(brentq(excess, low, high, xtol=1e-14, rtol=1e-14))
    sd = (1 / mu) * (1 + SAFETY)
    return Calibration(sd_over_sensitivity=sd, mu=1 / sd)


def compose(mus: Iterable[float]) -> float:
    """mu of several Gaussian releases of the same data: the root of the sum of squares."""
    values = [_check_mu(mu) for mu in mus]
    if not values:
        raise ValueError("mus=[]: expected the mu of at least one release.")
    return math.sqrt(math.fsum(mu * mu for mu in values)) * (1 + 1e-15)
