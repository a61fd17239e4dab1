"""The attack of unreachable outputs: it reads a release in floating point, and not this one.

A sum m + y of two floating-point numbers does not take every value: where y is larger than the
result, the result lies on the coarser grid of y, shifted by m. An attacker who knows everything
but which of two neighbouring data sets was used asks of every released number whether any noise
leads to it from the mean m of the one and from the mean m' of the other. One "no" settles the
question, whatever epsilon was claimed (Mironov 2012; Haney et al. 2022; Jin et al. 2022).

The same attacker is let loose on three releases of the same two data sets: a float32 mean with
float32 noise; integer sums with rounded float32 noise; and `dpmmd.release`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import dpmmd
from dpmmd.encoders import Encoder
from dpmmd.functional import mean_embedding
from dpmmd.privacy import mechanism
from dpmmd.privacy.noise import rounded_gaussian
from dpmmd.privacy.sums import PrivateSums
from tests.conftest import TwoTaps, images

Floats = NDArray[np.float32]
Integers = NDArray[np.int64]
Reachable = Callable[[NDArray, NDArray], NDArray[np.bool_]]  # (released, hypothesis) -> per number

N = 300
RUNS = 4
Z = 5.0  # standard deviations: two-sided probability 6e-7


def neighbours(n: int) -> list[NDArray[np.uint8]]:
    """Two data sets that differ in their first image."""
    x, _ = images(n)
    other = x.copy()
    other[0] = 255 - other[0]
    return [x, other]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(
        TwoTaps(),
        name="two-taps",
        weights_sha256="0" * 64,
        image_size=64,  # D = 5632 numbers a release
        tap_signs={"a": "signed", "b": "nonnegative"},
    )


@pytest.fixture(scope="module")
def means(encoder: Encoder) -> list[Floats]:
    """The float32 mean embeddings of two neighbouring data sets, as an attacker computes them."""
    result = []
    for x in neighbours(N):
        with torch.no_grad():
            embedded, _ = mean_embedding(encoder(torch.from_numpy(x).float() / 255))
        result.append(embedded.flatten().numpy())
    return result


# ----------------------------------------------------------------------------- the attacker


def near(x: Floats) -> list[Floats]:
    """x and its four nearest neighbours on the float32 grid."""
    found = [x]
    for end in (np.float32(-np.inf), np.float32(np.inf)):
        y = x
        for _ in range(2):
            y = np.nextafter(y, end)
            found.append(y)
    return found


def reachable_in_float32(released: Floats, mean: Floats) -> NDArray[np.bool_]:
    """Whether fl(mean + y) = released for any float32 y.

    Only the float32 numbers next to released - mean can be such a y.
    """
    guess = (released.astype(np.float64) - mean).astype(np.float32)
    return np.any([mean + y == released for y in near(guess)], axis=0)


def reachable_by_a_product(sd: float) -> Reachable:
    """Whether fl(mean + fl(sd * z)) = released for any float32 z: what `sd * randn` can give."""
    scale = np.float32(sd)

    def reachable(released: Floats, mean: Floats) -> NDArray[np.bool_]:
        guess = (released.astype(np.float64) - mean).astype(np.float32)
        found = np.zeros(len(released), bool)
        for y in near(guess):
            draws = (y.astype(np.float64) / scale).astype(np.float32)
            drawn = np.any([scale * z == y for z in near(draws)], axis=0)
            found |= drawn & (mean + y == released)
        return found

    return reachable


def reachable_by_float32_on_integers(released: Integers, sums: Integers) -> NDArray[np.bool_]:
    """Whether released - sums, an integer, is a float32 number: what rounded float noise gives."""
    noise = (released - sums).astype(np.float64)  # exact below 2^53
    return noise == noise.astype(np.float32)


class Told(NamedTuple):
    """How often a number was possible in world 0 alone, and in world 1 alone."""

    only0: float
    only1: float


def attack(released: NDArray, worlds: list[Floats] | list[Integers], reachable: Reachable) -> Told:
    r0, r1 = (reachable(released, world) for world in worlds)
    return Told(float((r0 & ~r1).mean()), float((r1 & ~r0).mean()))


def assert_tells_nothing(in0: Told, in1: Told, n: int) -> None:
    """The two worlds give the same answers, up to chance in n numbers."""
    for a, b in zip(in0, in1, strict=True):
        p = (a + b) / 2
        assert abs(a - b) <= Z * (2 * p * (1 - p) / n) ** 0.5


# ----------------------------------------------------------------------------- float32 releases


@pytest.mark.parametrize("as_drawn", [False, True], ids=["any-float", "sd-times-randn"])
def test_a_float32_release_is_read_number_by_number(means: list[Floats], as_drawn: bool) -> None:
    """About every tenth number tells the data sets apart with certainty; none is ever wrong."""
    sd = 2 * dpmmd.privacy.calibrate(epsilon=1.0, delta=1e-5).sd_over_sensitivity / N
    reachable = reachable_by_a_product(sd) if as_drawn else reachable_in_float32
    rng = torch.Generator().manual_seed(0)
    for world in (0, 1):
        told = np.zeros(2)
        for _ in range(RUNS):
            noise = (torch.randn(len(means[world]), generator=rng) * sd).numpy()
            released = means[world] + noise
            assert released.dtype == np.float32
            told += attack(released, means, reachable)
        told /= RUNS
        assert 0.04 < told[world] < 0.3
        assert told[1 - world] == 0.0


def test_the_float32_attacker_misses_no_noise() -> None:
    """Its five guesses find what the whole neighbourhood finds."""
    rng = np.random.default_rng(0)
    mean = rng.normal(size=2000).astype(np.float32)
    released = (rng.normal(size=2000) * 2.0 ** rng.integers(-8, 3, 2000)).astype(np.float32)
    guess = (released.astype(np.float64) - mean).astype(np.float32)
    truth = mean + guess == released
    for end in (np.float32(-np.inf), np.float32(np.inf)):
        y = guess
        for _ in range(300):
            y = np.nextafter(y, end)
            truth |= mean + y == released
    assert 0.1 < truth.mean() < 0.9
    np.testing.assert_array_equal(reachable_in_float32(released, mean), truth)


def test_rounded_float32_noise_on_integers_is_read_as_well() -> None:
    """Integer sums do not help where the noise is a float32 number: its last bits are zero."""
    rng = np.random.default_rng(0)
    worlds = [rng.integers(-(2**38), 2**38, 5000) for _ in range(2)]
    noise = np.rint(rng.normal(size=5000).astype(np.float32) * np.float32(9e9)).astype(np.int64)
    told = attack(worlds[0] + noise, worlds, reachable_by_float32_on_integers)
    assert told.only0 > 0.9
    assert told.only1 == 0.0


# ----------------------------------------------------------------------------- this release


class Seen(NamedTuple):
    sums: Integers  # raw, as the attacker would know them
    released: Integers  # before they are scaled
    numbers: Floats  # as they stand in the file
    unit: float  # of the numbers in the file


def watched(x: NDArray[np.uint8], encoder: Encoder) -> Seen:
    """One release, with its raw sums and its noise copied on the way."""
    raw, noise = [], []

    def take(self: PrivateSums) -> tuple[torch.Tensor, torch.Tensor]:
        sums, shared = original(self)
        raw.append(sums.flatten().numpy().copy())
        return sums, shared

    def drawn(n: int, sd: float) -> Integers:
        noise.append(rounded_gaussian(n, sd))
        return noise[-1]

    original = PrivateSums.take
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PrivateSums, "take", take)
        patch.setattr(mechanism, "rounded_gaussian", drawn)
        release = dpmmd.release(
            (x, None), encoder, epsilon=1.0, delta=1e-5, adjacency="replace-one", progress=False
        )
    return Seen(
        raw[0], raw[0] + noise[0], release.sums.flatten().numpy(), release.metadata.clip / 2**30
    )


@pytest.fixture(scope="module")
def seen(encoder: Encoder) -> list[list[Seen]]:
    """Several releases of each of two neighbouring data sets."""
    return [[watched(x, encoder) for _ in range(RUNS)] for x in neighbours(N)]


def told_by(
    seen: list[list[Seen]],
    reachable: Reachable,
    of: Callable[[Seen], NDArray],
    under: Callable[[Seen], NDArray],
) -> tuple[Told, Told, int]:
    worlds = [under(runs[0]) for runs in seen]
    assert (worlds[0] != worlds[1]).mean() > 0.8  # the attack has something to find
    answers = [
        Told(*np.mean([attack(of(run), worlds, reachable) for run in runs], axis=0))
        for runs in seen
    ]
    return answers[0], answers[1], RUNS * len(worlds[0])


def test_every_integer_is_reachable_from_both_neighbours(seen: list[list[Seen]]) -> None:
    """Whatever was released: some draw of the noise, not even a rare one, leads to it from both."""
    sd = 2 * dpmmd.privacy.calibrate(epsilon=1.0, delta=1e-5).sd_over_sensitivity * 2.0**30

    def reachable(released: Integers, sums: Integers) -> NDArray[np.bool_]:
        return np.abs(released - sums) < 7 * sd

    in0, in1, _ = told_by(seen, reachable, lambda s: s.released, lambda s: s.sums)
    assert in0 == in1 == Told(0.0, 0.0)


def test_the_noise_takes_every_residue() -> None:
    """What lies behind "every integer": no residue of 2^k is left out, up to 2^14."""
    for sd in (3.0e4, 9.0e9):
        residues = rounded_gaussian(1_000_000, sd) & (2**14 - 1)
        counts = np.bincount(residues, minlength=2**14)  # Poisson of mean 61
        assert counts.min() > 0
        statistic = ((counts - 1e6 / 2**14) ** 2).sum() / (1e6 / 2**14)
        assert abs(statistic - 2**14) < Z * (2 * 2**14) ** 0.5


def test_last_bits_of_the_integers_tell_nothing(seen: list[list[Seen]]) -> None:
    in0, in1, n = told_by(
        seen, reachable_by_float32_on_integers, lambda s: s.released, lambda s: s.sums
    )
    assert 0 < in0.only0 < 0.05  # one in some hundreds of all integers is a float32 number
    assert_tells_nothing(in0, in1, n)


def test_every_number_in_the_file_is_reachable_from_both_neighbours(seen: list[list[Seen]]) -> None:
    """A float32 number in the file is the rounding of an integer, and of no other thing."""

    def reachable(numbers: Floats, sums: Integers) -> NDArray[np.bool_]:
        unit = seen[0][0].unit
        integers = np.rint(numbers.astype(np.float64) / unit).astype(np.int64)
        noise = integers - sums  # any integer is a possible draw
        return ((sums + noise) * unit).astype(np.float32) == numbers

    in0, in1, _ = told_by(seen, reachable, lambda s: s.numbers, lambda s: s.sums)
    assert in0 == in1 == Told(0.0, 0.0)
    for run in seen[0]:
        np.testing.assert_array_equal((run.released * run.unit).astype(np.float32), run.numbers)


def test_the_float32_attacker_learns_nothing_from_the_file(seen: list[list[Seen]]) -> None:
    """He finds "unreachable" numbers, since his picture of the noise is wrong: as many in both."""
    in0, in1, n = told_by(
        seen,
        reachable_in_float32,
        lambda s: s.numbers,
        lambda s: (s.sums * s.unit).astype(np.float32),
    )
    assert_tells_nothing(in0, in1, n)
