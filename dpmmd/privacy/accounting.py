"""Gaussian differential privacy in closed form: (epsilon, delta) <-> mu <-> noise.

One release adds N(0, sd^2) to every coordinate of a vector whose L2 sensitivity is Delta. All of
its privacy is the one number ``mu = Delta / sd`` (Dong, Roth, Su 2022, "Gaussian differential
privacy", Thm 2.7): telling two neighbouring data sets apart is exactly as hard as telling N(0, 1)
from N(mu, 1). The curve ``delta(epsilon)`` of that test is Balle and Wang 2018 (Thm 8),

    delta(eps) = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu),

exact, neither a bound nor a composition theorem's slack. k releases compose to
``mu = sqrt(mu_1^2 + ... + mu_k^2)`` (Dong et al., Cor. 3.3), again exactly.

Rounding. Every result is on the safe side of the true value, for all inputs, and within a relative
1e-9 of it (tests compare with 60-digit arithmetic). Doubles only guess; `_Curve` decides, which
encloses delta between two numbers. Since e^eps phi(b) = phi(a) for a = eps/mu - mu/2 and
b = eps/mu + mu/2, with phi the normal density and R(x) = (1 - Phi(x)) / phi(x),

    delta(eps) = phi(a) (R(a) - R(b)),   d delta / d mu = phi(a),   d delta / d eps = -phi(a) R(b).

R is enclosed in one of two ways. *Series*: Phi(x) - 1/2 = phi(x) S(x) with
S(x) = x + x^3/3 + x^5/(3 5) + ..., so R(x) = 1 / (2 phi(x)) - S(x). For x > 0 all terms are
positive, and from the n-th on, n >= 2 x^2, each is at most half of the one before it: what comes
after a term is at most that term. *Tail*: R(x) is the integral of e^(-xt) e^(-t^2/2) over t > 0,
and e^(-t^2/2) lies between any two successive partial sums of 1 - t^2/2 + (t^2/2)^2/2! - ...;
integrated, R(x) lies between any two successive partial sums of 1/x - 1/x^3 + 3/x^5 - 15/x^7 + ....
Sums are of integers, rounded down for the lower and up for the upper end; the rest is interval
arithmetic of 256 bits, with an exponential that is widened by far more than its error.
`delta` returns the upper end; `epsilon` and `calibrate` move away from their guess until the upper
end is at most delta.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any, NamedTuple

import mpmath  # and scipy where it is used: it takes half a second to import

_SQRT2 = math.sqrt(2.0)
_MU_MIN, _MU_MAX = 1e-8, 1e4
_MARGIN = 1e-12  # of calibrated noise: room for what is composed or printed of it
UP = 1 + 1e-15  # a product of it is above the true value after four roundings of doubles
_BITS = 256
_IV = mpmath.iv.__class__()  # a context of its own: its precision never changes
_IV.prec = _BITS
_WIDER = 1 + _IV.mpf([-1, 1]) / 2 ** (_BITS - 16)
_ROOT = _IV.sqrt(2 * _IV.pi)
_TAIL = 12  # from here on the tail encloses R(x), to a relative e^-72
_CERTAIN = -9  # where a is below, 1 - delta < 2 (1 - Phi(9)) < 2^-54: the next double is 1


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


class _Curve:
    """delta(epsilon) of a mu-GDP mechanism at one point, enclosed; see the proof above.

    Attributes:
        delta: encloses it.
        by_epsilon, by_mu: enclose its derivatives.
    """

    def __init__(self, mu: float, epsilon: float) -> None:
        centre, half = Fraction(epsilon) / Fraction(mu), Fraction(mu) / 2
        a, b = centre - half, centre + half
        self.certain = a < _CERTAIN
        if self.certain:
            return
        self.by_mu = _density(_interval(a))
        tail = _mills(b)
        self.by_epsilon = -self.by_mu * tail
        self.delta = self.by_mu * (_mills(a) - tail)

    @property
    def upper(self) -> float:
        """A double that is at least delta, and at most 1."""
        value = 1.0 if self.certain else float(self.delta.mid)
        while value < 1 and not self.delta.b <= value:
            value = math.nextafter(value, math.inf)
        return min(1.0, value)

    def meets(self, delta: float) -> bool:
        """Whether delta(epsilon) <= ``delta``, for certain."""
        return not self.certain and bool(self.delta.b <= delta)


def _interval(x: Fraction) -> Any:
    low = math.floor(x * 2**_BITS)
    return _IV.mpf([low, low + 1]) / 2**_BITS


def _density(x: Any) -> Any:
    """phi of an interval, enclosed."""
    return _IV.exp(-x * x / 2) * _WIDER / _ROOT


def _mills(x: Fraction) -> Any:
    """R(x), enclosed."""
    inside = _interval(x)
    if x < _TAIL:
        low = math.floor(x * 2**_BITS)
        ends = [_series(low, up=False), _series(low + 1, up=True)]
        return 1 / (2 * _density(inside)) - _IV.mpf(ends) / 2**_BITS
    term, total, square, n = 1 / inside, _IV.mpf(0), inside * inside, 1
    while n < _TAIL**2 and abs(term).b > 2.0**-_BITS:
        total, term, n = total + term, -term * n / square, n + 2
    return total + term * _IV.mpf([0, 1])


def _series(x: int, *, up: bool) -> int:
    """At most, or at least, S(x); both in units of 2^-_BITS."""
    if x < 0:
        return -_series(-x, up=not up)
    sign = -1 if up else 1  # sign * (sign * v // w) is v / w, rounded down or up
    square = sign * (sign * x * x >> _BITS)
    term, total, n = x, x, 1
    while n << _BITS < 2 * square or term > 1:
        n += 2
        term = sign * (sign * term * square // (n << _BITS))
        total += term
    return total + term if up else total


def _log_delta(mu: float, epsilon: float) -> float:
    """log delta(epsilon) of a mu-GDP mechanism, to about eight digits: a first guess.

    With t = eps/mu both normal tails share the factor exp(-(t - mu/2)^2 / 2), since
    e^eps * exp(-(t + mu/2)^2 / 2) = exp(-(t - mu/2)^2 / 2). What is left is a difference of two
    values of the scaled tail erfcx, which loses no digits to a large exponent.
    """
    from scipy.special import erfcx, log_ndtr

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


def _solved(
    guess: float, at: Callable[[float], _Curve], slope: str, delta: float, low: float, high: float
) -> float:
    """Where delta(...) is ``delta``, between ``low`` and ``high``: Newton's steps from a guess."""
    x, rising = guess, slope == "by_mu"
    for _ in range(100):
        curve = at(x)
        if curve.meets(delta) == rising:
            low = max(low, x)
        else:
            high = min(high, x)
        step = math.inf
        if not curve.certain:
            step = float(((delta - curve.delta) / getattr(curve, slope)).mid)
        after = x + step
        if not low <= after <= high:
            after = (low + high) / 2
        if abs(after - x) <= 1e-9 * x:
            return after
        x = after
    return x


def delta(*, mu: float, epsilon: float) -> float:
    """The least delta for which a mu-GDP mechanism is (epsilon, delta)-DP (Balle, Wang 2018).

    Rounded up, by a relative 1e-9 at most.
    """
    mu, epsilon = _check_mu(mu), float(epsilon)
    if not 0.0 <= epsilon < 1e8:
        raise ValueError(f"epsilon={epsilon!r}: expected a number in [0, 1e8).")
    return _Curve(mu, epsilon).upper


def epsilon(*, mu: float, delta: float) -> float:
    """The least epsilon for which a mu-GDP mechanism is (epsilon, delta)-DP.

    Args:
        mu: sensitivity / noise sd, in [1e-8, 1e4].
        delta: in [1e-300, 1).

    Returns:
        epsilon >= 0, rounded up by a relative 1e-9 at most.
    """
    from scipy.optimize import brentq

    mu, delta = _check_mu(mu), _check_delta(delta)
    if _Curve(mu, 0.0).meets(delta):
        return 0.0
    target = math.log(delta)
    high = mu * mu / 2 + mu * math.sqrt(2 * -target) + mu  # Chernoff bound of the normal tail
    guess = 0.0
    if _log_delta(mu, 0.0) > target:
        guess = brentq(lambda e: _log_delta(mu, e) - target, 0.0, high, xtol=1e-15, rtol=1e-14)
    root = _solved(float(guess), lambda e: _Curve(mu, e), "by_epsilon", delta, 0.0, high)
    return _moved(root, 4e-15, lambda e: _Curve(mu, e).meets(delta))


def _moved(root: float, by: float, meets: Callable[[float], bool]) -> float:
    """``root``, moved by a relative ``by`` or, where that does not meet the target, by more."""
    while not meets(root * (1 + by)):
        by *= 2
    return root * (1 + by)


def calibrate(*, epsilon: float, delta: float) -> Calibration:
    """The least noise with which one Gaussian release is (epsilon, delta)-DP.

    Args:
        epsilon: privacy-loss bound, in (0, 10000).
        delta: failure probability, in [1e-300, 1); below 1 / N to mean anything.

    Returns:
        ``Calibration(sd_over_sensitivity, mu)``: add N(0, (sd_over_sensitivity * Delta)^2) to every
        coordinate. mu is rounded down, by a relative 1e-9 at most, and sd_over_sensitivity is
        above 1 / mu by more than the rounding of that product.

    Raises:
        ValueError: epsilon or delta out of range, or no sensible noise level meets them.

    Example:
        >>> round(calibrate(epsilon=1.0, delta=1e-6).sd_over_sensitivity, 6)
        4.224679
    """
    from scipy.optimize import brentq

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
    guess = math.exp(brentq(excess, low, high, xtol=1e-14, rtol=1e-14))
    root = _solved(guess, lambda mu: _Curve(mu, epsilon), "by_mu", delta, 0.0, 2 * _MU_MAX)
    mu = _moved(root, -_MARGIN, lambda mu: _Curve(mu, epsilon).meets(delta))
    return Calibration(sd_over_sensitivity=UP / mu, mu=mu)


def compose(mus: Iterable[float]) -> float:
    """mu of several Gaussian releases of the same data: the root of the sum of squares.

    Rounded up: `math.hypot` is off by less than one unit in the last place.
    """
    values = [_check_mu(mu) for mu in mus]
    if not values:
        raise ValueError("mus=[]: expected the mu of at least one release.")
    return math.hypot(*values) * UP
