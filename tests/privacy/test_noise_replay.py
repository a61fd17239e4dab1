"""The sampler against a reference that knows its law and the words alone, decision by decision.

Exact where a statistical test would need millions of draws: the decision "U < p" is asked for on
both sides of p, at distances from 1e-6 down to a few cells of 2^-64, with p from 40-digit numbers.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from numpy.typing import NDArray

from dpmmd.privacy import noise

Words = NDArray[np.uint64]
# The greatest v ln 2 - (tau v)^2 / 2 is that of v = 0 up to 0.3 and at 1.62, 2 at 1.6, 1 elsewhere.
SDS = (2.0**-20, 0.3, 1.0, 1.6, 1.62, 33.3, 1000.0, 4.0e9, 2.0**60)
APART = (1e-6, 1e-9, 2.0**-39, 2.0**-41, 2.0**-44, 0.0)  # relative distances of U from p
CELLS = 16  # and so many cells of 2^-64, with what the unknown bits of u can move p by


class Law:
    """What the docstring of noise.py says, of one sd; mpmath's numbers have 40 digits."""

    def __init__(self, sd: float) -> None:
        self.sd = Fraction(sd)
        self.m = 0
        while Fraction(2) ** self.m < Fraction(62, 100) * self.sd:
            self.m += 1
        with mpmath.workdps(40):
            ratio = _mpf(Fraction(2) ** self.m / self.sd)
            terms = [v * mpmath.log(2) - (ratio * v) ** 2 / 2 for v in range(64)]
            self.k = max(terms)

    def acceptance(self, u: int, v: int, k: float) -> mpmath.mpf:
        """p of V = v and of u in the middle of its cell of 2^-63."""
        with mpmath.workdps(40):
            y = _mpf(2**self.m * (v + Fraction(2 * u + 1, 2**64)) / self.sd)
            return mpmath.exp(v * mpmath.log(2) - y * y / 2 - mpmath.mpf(k))

    def integer(self, bits: int, v: int) -> int:
        """The nearest to 2^m (v + u), with the sign of the lowest bit."""
        magnitude = math.floor(2**self.m * (v + Fraction(bits >> 1, 2**63)) + Fraction(1, 2))
        return -magnitude if bits & 1 else magnitude


def _mpf(value: Fraction) -> mpmath.mpf:
    return mpmath.mpf(value.numerator) / value.denominator


class Tape:
    """Gives out the words it was made of, then those of ``more``."""

    def __init__(self, words: Words, more: Callable[[int], Words]) -> None:
        self.words, self.more, self.asked = words, more, 0

    def __call__(self, n: int) -> Words:
        start, self.asked = self.asked, self.asked + n
        if start < len(self.words):
            assert self.asked <= len(self.words)
            return self.words[start : self.asked]
        return self.more(n)


class Found(Exception):
    pass


def constant(sd: float, monkeypatch: pytest.MonkeyPatch) -> float:
    """k, as the sampler uses it."""

    def one_round(size: int, sd: float, m: int, tau: float, k: float, *_: object) -> None:
        raise Found(k)

    with monkeypatch.context() as patch:
        patch.setattr(noise, "_round_of_proposals", one_round)
        with pytest.raises(Found) as found:
            noise.rounded_gaussian(1, sd)
    return float(found.value.args[0])


@pytest.mark.parametrize("sd", SDS)
def test_the_acceptance_never_passes_one_and_wastes_nothing(
    sd: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """p <= 1 for every proposal: where p would be above 1 the law is cut off."""
    k = constant(sd, monkeypatch)
    with mpmath.workdps(40):
        assert Law(sd).k <= mpmath.mpf(k) <= Law(sd).k + mpmath.mpf("1.1e-9")


@pytest.mark.parametrize("sd", SDS)
def test_decisions_next_to_the_threshold(sd: float, monkeypatch: pytest.MonkeyPatch) -> None:
    law, k = Law(sd), constant(sd, monkeypatch)
    rng = np.random.default_rng(11)
    proposals: list[tuple[int, int, int]] = []
    expected: list[int] = []
    for i in range(96):
        y = rng.uniform(0.02, 1.5 if i % 2 else 6.0)
        v, rest = divmod(Fraction(y) * law.sd / 2**law.m, 1)
        bits = (int(rest * 2**63) << 1) | int(rng.integers(2))
        with mpmath.workdps(40):
            p = law.acceptance(bits >> 1, int(v), k) * 2**64
            unknown = p * y * float(2**law.m / law.sd) * 2.0**-62
            away = p * mpmath.mpf(APART[i % len(APART)]) + unknown + CELLS
            below, above = int(mpmath.floor(p - away)), int(mpmath.ceil(p + away))
        geometric = (int(rng.integers(2**20)) * 2 + 1) << int(v)
        if below >= 0:
            proposals.append((bits, geometric, below))
            expected.append(law.integer(bits, int(v)))
        if above < 2**64:
            proposals.append((bits, geometric, above))
    size = int(len(expected) * 1.5) + 64  # of a round
    proposals += [(0, 1, 2**64 - 1)] * (size - len(proposals))  # U is above any p
    words = np.array(proposals, dtype=np.uint64).T.flatten()
    tape = Tape(words, lambda _: pytest.fail("one of the others was taken for above p"))
    drawn = noise.rounded_gaussian(len(expected), sd, words=tape)
    assert len(expected) > 50
    assert drawn.tolist() == expected


@pytest.mark.parametrize("sd", [0.5, 1.3, 1e5])
def test_a_recorded_stream_is_read_as_the_law_says(sd: float) -> None:
    """Every proposal of a stream of random words: taken or not, in order, and what it becomes."""
    law, rng, asked = Law(sd), np.random.default_rng(3), []

    def words(n: int) -> Words:
        asked.append(rng.integers(0, 2**64, n, dtype=np.uint64))
        return asked[-1]

    drawn = noise.rounded_gaussian(200, sd, words=words).tolist()
    expected: list[int] = []
    for part in asked:
        for bits, geometric, uniform in part.reshape(3, -1).T.tolist():
            v = (geometric & -geometric).bit_length() - 1
            with mpmath.workdps(40):
                p = law.acceptance(bits >> 1, v, float(law.k) + 1e-9)
                u = mpmath.mpf(uniform) / 2**64
                assert abs(u / p - 1) > 1e-12  # else further bits would be needed
            if u < p:
                expected.append(law.integer(bits, v))
    assert drawn == expected[:200]


ONES = 2**64 - 1


@pytest.mark.parametrize(
    ("of_u", "of_w", "accepted"), [(0, 0, True), (0, ONES, False), (ONES, 0, False)]
)
def test_the_cell_that_holds_p_is_decided_by_further_bits(
    of_u: int, of_w: int, accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The 64 bits of U are those of p at the low end of u's cell, and not at the high end."""
    sd = 4.2
    law, k = Law(sd), constant(sd, monkeypatch)
    rng = np.random.default_rng(4)
    proposals: list[tuple[int, int, int]] = []
    expected: list[int] = []
    while len(expected) < 30:
        bits, v = int(rng.integers(2**63)) << 1, int(rng.integers(3))
        ends = []
        with mpmath.workdps(60):
            for u in (Fraction(bits >> 1, 2**63), Fraction((bits >> 1) + 1, 2**63)):
                y = _mpf(2**law.m * (v + u) / law.sd)
                ends.append(mpmath.exp(v * mpmath.log(2) - y * y / 2 - mpmath.mpf(k)) * 2**64)
            w = int(ends[0])
            if not (0.01 < ends[0] - w < 0.99 and ends[1] - w < -0.01):
                continue
        proposals.append((bits, 1 << v, w))
        expected.append(law.integer(bits, v))
    size = int(len(expected) * 1.5) + 64
    further = np.array([of_u, of_w] * len(expected), dtype=np.uint64)
    proposals += [(0, 1, 2**64 - 1)] * (size - len(proposals))
    words = np.array(proposals, dtype=np.uint64).T.flatten()
    extra = iter(further)
    tape = Tape(words, lambda n: np.array([next(extra)]))
    found = noise._round_of_proposals(
        size, sd, law.m, math.ldexp(1.0, law.m) / sd, k, tape, noise.MARGIN
    )
    assert found.tolist() == (expected if accepted else [])
    assert next(extra, None) is None  # two further words for each


# ----------------------------------------------------------------------------- the words


def stream(key: bytes) -> Callable[[int], Words]:
    """ChaCha20's stream of one key as 64-bit words; every word is given out once."""
    cipher = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()
    return lambda n: np.frombuffer(cipher.update(bytes(8 * n)), dtype=np.uint64)


def test_every_draw_reads_a_key_of_32_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the draw, not at the import; all of the key counts, and nothing else."""
    keys: list[bytes] = []
    source = np.random.default_rng(5)

    def urandom(n: int) -> bytes:
        keys.append(source.bytes(n))
        return keys[-1]

    monkeypatch.setattr(os, "urandom", urandom)
    for i in range(4):
        drawn = noise.rounded_gaussian(40, 1e6)
        assert [len(key) for key in keys] == [32] * (i + 1)
        np.testing.assert_array_equal(drawn, noise.rounded_gaussian(40, 1e6, words=stream(keys[i])))


def test_no_word_is_used_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Over many rounds of one draw the words are those of one stream, one after the other."""
    key = bytes(range(32))
    monkeypatch.setattr(os, "urandom", lambda n: key[:n])
    n = 3 * noise._CHUNK
    drawn = noise.rounded_gaussian(n, 2.0**40)
    np.testing.assert_array_equal(drawn, noise.rounded_gaussian(n, 2.0**40, words=stream(key)))
    assert len(np.unique(drawn)) > n - 20  # a word read twice would repeat whole rounds
