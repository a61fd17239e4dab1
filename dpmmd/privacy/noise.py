"""Exact sampling of the rounded Gaussian: round(sd * N(0, 1)) on the integers, no approximation.

Textbook samplers add a float to a float: which doubles can come out then depends on the secret, and
that alone can tell neighbours apart (Mironov 2012). Here the noise is an integer whose law is
*exactly* that of a real Gaussian rounded to the nearest integer, so an integer vector plus this
noise is a function of the ideal real-valued mechanism's output, and its guarantee carries over.

Method: rejection from a dyadic proposal. Write |X| = 2^m (V + u) with V geometric (P(V = v) =
2^-(v+1)) and u uniform in [0, 1), so |X| has density 2^-(m + 1 + floor(|x| / 2^m)). Accept with
probability

    p = exp(-(y^2 / 2 - V ln 2 + k)),   y = |X| / sd,   k = max_v (v ln 2 - (2^m v / sd)^2 / 2),

which makes the accepted density proportional to exp(-y^2 / 2), and p <= 1 since y >= 2^m V / sd.
V comes from the trailing zeros of random words; u is a 63-bit integer standing for an infinite
stream of bits of which the first 63 are known. Rounding |X| to an integer needs m + 1 <= 62 of
them. The decision "U < p" is made in double precision when U is further than a relative 2^-40 from
p (the error of the arithmetic is below 2^-43) and U is above 2^-23, where its 64 bits are finer
than that margin; else with interval arithmetic and as many further random bits as it takes. Hence
no step approximates.

Randomness: ChaCha20 (the `cryptography` package) keyed by 256 fresh bits of the operating system
for every `NoiseSource`. There is no seed argument.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable

import mpmath
import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

MARGIN = 2.0**-40
SD_MAX = 2.0**60
_LN2 = math.log(2.0)
_CHUNK = 1 << 15  # proposals a round: all arrays of a round stay in the L2 cache
_TINY = 2.0**-23  # below this 64 bits of a uniform are coarser than the margin


def operating_system_words() -> Callable[[int], NDArray[np.uint64]]:
    """A stream of uniform 64-bit words: ChaCha20 keyed by the operating system's entropy."""
    cipher = Cipher(ChaCha20(os.urandom(32), b"\0" * 16), mode=None).encryptor()

    def words(n: int) -> NDArray[np.uint64]:
        return np.frombuffer(cipher.update(bytes(8 * n)), dtype=np.uint64)

    return words


def rounded_gaussian(
    n: int,
    sd: float,
    *,
    words: Callable[[int], NDArray[np.uint64]] | None = None,
    margin: float = MARGIN,
) -> NDArray[np.int64]:
    """n independent draws of round(sd * N(0, 1)), exact.

    Args:
        n: how many.
        sd: standard deviation before rounding, in [2^-20, 2^60].
        words: source of uniform 64-bit words. None, the only choice for a private release, is the
            operating system's. Tests pass their own.
        margin: relative distance from the acceptance threshold under which the decision is made in
            exact arithmetic. Tests force it wide; smaller than the default is refused.

    Returns:
        int64 array [n].

    Raises:
        ValueError: sd out of range or margin below the default.
    """
    if not (2.0**-20 <= sd <= SD_MAX):
        raise ValueError(f"sd={sd!r}: expected a number in [2^-20, 2^60] grid units.")
    if margin < MARGIN:
        raise ValueError(f"margin={margin!r}: expected at least {MARGIN!r} (2^-40).")
    words = words or operating_system_words()
    m = max(0, math.ceil(math.log2(0.62 * sd)))
    tau = math.ldexp(1.0, m) / sd
    # 1e-9 above the maximum: covers the rounding of the maximum itself. The same double is used in
    # the exact path, so the law does not depend on its last digits.
    k = max(v * _LN2 - (tau * v) ** 2 / 2 for v in range(64)) + 1e-9

    out = np.empty(n, dtype=np.int64)
    done = 0
    while done < n:
        size = min(_CHUNK, int((n - done) * 1.5) + 64)
        accepted = _round_of_proposals(size, sd, m, tau, k, words, margin)
        take = min(len(accepted), n - done)
        out[done : done + take] = accepted[:take]
        done += take
    return out


def _round_of_proposals(
    size: int,
    sd: float,
    m: int,
    tau: float,
    k: float,
    words: Callable[[int], NDArray[np.uint64]],
    margin: float,
) -> NDArray[np.int64]:
    """Draws `size` proposals and returns the accepted integers, in order."""
    bits, geometric, uniform = words(3 * size).reshape(3, size)
    negative = (bits & np.uint64(1)).astype(bool)
    u63 = bits >> np.uint64(1)
    lowest = geometric & (~geometric + np.uint64(1))
    v = np.frexp(lowest.astype(np.float64))[1].astype(np.int64) - 1  # exact: a power of two
    for i in np.flatnonzero(geometric == 0):  # probability 2^-64: go on to the next words
        v[i] = 64
        while True:
            word = int(words(1)[0])
            if word:
                v[i] += (word & -word).bit_length() - 1
                break
            v[i] += 64

    y = tau * (u63.astype(np.float64) * 2.0**-63 + v)
    p = np.exp(_LN2 * v - 0.5 * y * y - k)
    w = uniform.astype(np.float64) * 2.0**-64
    accept = w < p * (1.0 - margin)
    unsure = (~accept & (w <= p * (1.0 + margin))) | (w < _TINY)
    for i in np.flatnonzero(unsure):
        accept[i] = _exact_decision(int(u63[i]), int(v[i]), int(uniform[i]), m, sd, k, words)

    # |X| = 2^m (v + u): its nearest integer needs the first m + 1 bits of u. A tie has measure 0.
    half_bits = (u63 >> np.uint64(62 - m)).astype(np.int64)
    magnitude = (v << m) + ((half_bits + 1) >> 1)
    signed = np.where(negative, -magnitude, magnitude)
    kept: NDArray[np.int64] = signed[accept]
    return kept


def _exact_decision(
    u: int,
    v: int,
    w: int,
    m: int,
    sd: float,
    k: float,
    words: Callable[[int], NDArray[np.uint64]],
) -> bool:
    """Whether W < p for the infinite bit streams that start with u (63 bits) and w (64 bits)."""
    u_bits, w_bits = 63, 64
    iv = mpmath.iv.__class__()  # a context of its own: precision is not shared with anybody
    iv.prec = 192
    while True:
        unit = iv.mpf(1)
        u_in = (iv.mpf([u, u + 1])) * unit / iv.mpf(2) ** u_bits
        y = iv.mpf(2) ** m * (u_in + v) / iv.mpf(sd)
        p = iv.exp(iv.log(2) * v - y * y / 2 - iv.mpf(k))
        w_in = iv.mpf([w, w + 1]) / iv.mpf(2) ** w_bits
        if w_in.b <= p.a:
            return True
        if w_in.a >= p.b:
            return False
        u, u_bits = (u << 64) | int(words(1)[0]), u_bits + 64
        w, w_bits = (w << 64) | int(words(1)[0]), w_bits + 64
        iv.prec += 192
