"""The audit: the real release reaches its claim and keeps it; broken ones are caught.

A true claim is refuted with probability below 1e-6 a test, and every "at least" below is more than
five standard deviations away from what is expected.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import dpmmd
from dpmmd import cli
from dpmmd.data import Batch, ImageSource
from dpmmd.privacy import Audit, Release, accounting, audit
from dpmmd.privacy.canaries import GAIN, lower_bound_by_means, lower_bound_by_thresholds
from dpmmd.privacy.noise import rounded_gaussian
from tests.conftest import no_noise

ADJACENCIES = ("replace-one", "zero-out", "add-remove")
CLAIM: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5}
MU = accounting.calibrate(**CLAIM).mu


def audited(
    make_release: Callable[..., Release] | None = None, canaries: int = 10_000, **options: Any
) -> Audit:
    return audit(make_release, **{**CLAIM, "canaries": canaries, **options})


# ----------------------------------------------------------------------------- the real release


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("sign", ["signed", "nonnegative"])
def test_the_release_keeps_its_claim_and_the_audit_nearly_reaches_it(
    adjacency: str, sign: str
) -> None:
    result = audited(adjacency=adjacency, sign=sign)
    assert result.verdict == "consistent"
    assert 0.85 <= result.epsilon_lower <= result.epsilon_claimed == 1.0
    assert result.mu_lower_thresholds > 0.8 * result.mu_claimed
    assert result.mu_claimed == MU
    assert 0.99 < result.sensitivity_reached <= 1.0


@pytest.mark.long
@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_a_million_canaries_come_within_two_percent(adjacency: str) -> None:
    result = audited(adjacency=adjacency, canaries=1_000_000)
    assert result.verdict == "consistent"
    assert 0.98 <= result.epsilon_lower <= 1.0


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_both_moments(adjacency: str) -> None:
    result = audited(adjacency=adjacency, sign="nonnegative", moments=(1, 2))
    assert result.verdict == "consistent"
    assert result.epsilon_lower >= 0.85
    assert result.sensitivity_reached > 0.99
    second = audited(adjacency=adjacency, moments=(2,))
    assert second.verdict == "consistent"
    assert second.epsilon_lower >= 0.85


def test_the_claim_of_both_signed_moments_under_replace_one_is_not_reached() -> None:
    """No orthogonal pair is antipodal in f and orthogonal in f * f: 2 of Delta = sqrt(6)."""
    result = audited(adjacency="replace-one", moments=(1, 2))
    assert result.sensitivity_reached == pytest.approx((4 / 6) ** 0.5, rel=1e-6)
    assert 0.65 < result.epsilon_lower < 0.85


@pytest.mark.parametrize("copies", [1, 3])
def test_fewer_copies_are_valid_and_weaker(copies: int) -> None:
    few = audited(adjacency="zero-out", copies=copies)
    assert few.verdict == "consistent"
    assert few.copies == copies
    assert few.mu_lower < 0.98 * MU


@pytest.mark.parametrize("epsilon", [0.2, 5.0])
def test_other_claims(epsilon: float) -> None:
    result = audited(adjacency="add-remove", canaries=4000, epsilon=epsilon, delta=1e-6)
    assert result.verdict == "consistent"
    assert result.epsilon_lower > 0.75 * epsilon


@pytest.mark.parametrize("bound", ["ball", "sphere-per-tap", "ball-per-tap"])
def test_every_bound(bound: str) -> None:
    def make(source: object, encoder: Any, **options: Any) -> Release:
        return dpmmd.release(source, encoder, bound=bound, **options)

    result = audited(make, adjacency="replace-one")
    assert result.verdict == "consistent"
    assert result.epsilon_lower >= 0.85


@pytest.mark.filterwarnings("ignore:modes")
@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_rows_of_modes_keep_the_claim_and_nearly_reach_it(adjacency: str) -> None:
    """All canaries are of the first mode of their class; the second has noise alone."""

    def make(source: object, encoder: Any, **options: Any) -> Release:
        thresholds = torch.zeros(options["num_classes"], 1, dtype=torch.int64)
        modes = dpmmd.Modes(1, 3, torch.zeros(1, 1, 3, dtype=torch.int64), thresholds)
        released = dpmmd.release(source, encoder, modes=modes, **options)
        return dataclasses.replace(released, sums=released.sums[:, ::2].contiguous())

    result = audited(make, adjacency=adjacency)
    assert result.verdict == "consistent"
    assert result.epsilon_lower >= 0.85
    assert result.sensitivity_reached > 0.99


# ----------------------------------------------------------------------------- broken releases


def half_the_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "dpmmd.privacy.mechanism.rounded_gaussian", lambda n, sd: rounded_gaussian(n, sd / 2)
    )


def slightly_too_little_noise(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "dpmmd.privacy.mechanism.rounded_gaussian", lambda n, sd: rounded_gaussian(n, sd * 0.75)
    )


def heavy_tails_instead_of_a_gaussian(patch: pytest.MonkeyPatch) -> None:
    """Cauchy noise of a fifteenth of the scale: no mean, no variance; thresholds alone see it."""

    def cauchy(n: int, sd: float) -> np.ndarray:
        draws = np.random.default_rng().standard_cauchy(n) * sd / 15
        return np.clip(draws, -(2.0**50), 2.0**50).astype(np.int64)

    patch.setattr("dpmmd.privacy.mechanism.rounded_gaussian", cauchy)


def noise_missing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("dpmmd.privacy.mechanism.rounded_gaussian", no_noise)


def _unbounded(group: list[Tensor], limits: Tensor, ball: bool, clip: float) -> list[Tensor]:
    return [(v * (limits / clip)[:, None]).trunc().to(torch.int64) for v in group]


def _uncertified(
    integers: list[Tensor], limits: Tensor, *, nonnegative: bool
) -> tuple[list[Tensor], Tensor]:
    return integers, torch.stack([q.abs().amax(dim=1) for q in integers]).amax(dim=0) > 0


def no_bound_and_no_certificate(patch: pytest.MonkeyPatch) -> None:
    patch.setenv("DPMMD_BACKEND", "torch")  # the definition, which can be broken
    patch.setattr("dpmmd.privacy.sums._quantise", _unbounded)
    patch.setattr("dpmmd.privacy.sums.certify", _uncertified)


def sensitivity_of_one_moment_for_two(patch: pytest.MonkeyPatch) -> None:
    from dpmmd.privacy import sensitivity as right

    def wrong(adjacency: str, blocks: list[Any]) -> float:
        return right(adjacency, [b for b in blocks if b.name != "phi2"])

    patch.setattr("dpmmd.privacy.mechanism.sensitivity", wrong)


BROKEN = [
    half_the_noise,
    slightly_too_little_noise,
    heavy_tails_instead_of_a_gaussian,
    noise_missing,
    no_bound_and_no_certificate,
]


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("fault", BROKEN, ids=lambda f: f.__name__)
def test_a_broken_release_is_rejected(
    fault: Callable[[pytest.MonkeyPatch], None], adjacency: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fault(monkeypatch)
    result = audited(adjacency=adjacency)
    assert result.verdict == "VIOLATED"
    assert result.mu_lower > 1.1 * MU
    assert result.epsilon_lower > 1.1


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_a_forgotten_second_moment_is_rejected(
    adjacency: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sensitivity_of_one_moment_for_two(monkeypatch)
    result = audited(adjacency=adjacency, sign="nonnegative", moments=(1, 2))
    assert result.verdict == "VIOLATED"
    assert 1.2 * MU < result.mu_lower < 2**0.5 * MU
    assert result.sensitivity_reached > 1.4


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_known_noise_is_rejected(adjacency: str) -> None:
    """Two releases with the noise of one seed: their difference is the data."""

    def make(source: ImageSource, encoder: Any, **options: Any) -> Release:
        def seeded(n: int, sd: float) -> np.ndarray:
            return np.rint(np.random.default_rng(7).normal(size=n) * sd).astype(np.int64)

        options["insecure_test_noise"] = seeded
        first = dpmmd.release(source, encoder, **options)
        second = dpmmd.release(_Black(), encoder, **options)
        return dataclasses.replace(first, sums=first.sums - second.sums)

    result = audited(make, adjacency=adjacency, canaries=1000)
    assert result.verdict == "VIOLATED"
    assert result.epsilon_lower > 5


class _Black(ImageSource):
    """One black image, which contributes zero."""

    name, identity, num_images, image_shape = "black", "0" * 64, 1, (3, 1, 64)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        valid = torch.arange(batch_size) < 1
        yield Batch(
            torch.zeros(batch_size, *self.image_shape),
            torch.zeros(batch_size, dtype=torch.int64),
            valid,
        )


def test_the_certificate_alone_keeps_the_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that nothing bounds are above the certificate's limit and contribute zero."""
    assert GAIN > 1
    monkeypatch.setenv("DPMMD_BACKEND", "torch")
    monkeypatch.setattr("dpmmd.privacy.sums._quantise", _unbounded)
    result = audited(adjacency="zero-out")
    assert result.verdict == "consistent"
    assert result.mu_lower < 0.1 * MU


# ----------------------------------------------------------------------------- the bounds


@pytest.mark.parametrize("mu", [0.3, 1.0, 3.0])
def test_the_bounds_hold_with_their_confidence(mu: float) -> None:
    """4000 experiments at alpha = 0.05: the bound passes the truth in at most 5 % of them."""
    rng = np.random.default_rng(int(10 * mu))
    runs, n, alpha = 4000, 150, 0.05
    means = thresholds = 0
    for _ in range(runs):
        inside, outside = rng.normal(mu, 1, n), rng.normal(0, 1, n)
        means += lower_bound_by_means(inside * 7 + 3, outside * 7 + 3, alpha) > mu
        grid = [mu * t for t in (0.0, 0.25, 0.5, 0.75, 1.0)]
        thresholds += lower_bound_by_thresholds(inside, outside, grid, alpha) > mu
    allowed = alpha * runs + 5 * (alpha * runs) ** 0.5
    assert 0 < means <= allowed
    assert thresholds <= allowed


def test_the_bounds_at_their_ends() -> None:
    same = np.zeros(50)
    for bound in (
        lower_bound_by_means,
        lambda a, b, alpha: lower_bound_by_thresholds(a, b, [0.5], alpha),
    ):
        assert bound(same, same, 0.01) == 0.0
        assert bound(same, same + 1, 0.01) == 0.0  # the wrong way round
        assert bound(same[:0], same, 0.01) == 0.0
        assert bound(same, same[:0], 0.01) == 0.0
        assert bound(same + 1, same, 0.01) > 2.0
    assert lower_bound_by_means(same + 1, same, 0.01) == 1e4


def test_clopper_pearson_by_hand() -> None:
    """All of 100 in, none of 100 out: each probability is bounded by 0.005^(1/100)."""
    from scipy.stats import norm

    ones, zeros = np.ones(100), np.zeros(100)
    p = 0.005 ** (1 / 100)
    expected = 2 * norm.ppf(p)
    assert lower_bound_by_thresholds(ones, zeros, [0.5], 0.01) == pytest.approx(expected)


# ----------------------------------------------------------------------------- arguments, command


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"canaries": 99}, "canaries=99"),
        ({"canaries": 1e4}, "canaries=10000.0"),
        ({"copies": 0}, "copies=0"),
        ({"sign": "positive"}, "sign='positive'"),
        ({"confidence": 1.0}, "confidence=1.0"),
        ({"adjacency": "neighbours"}, "adjacency='neighbours'"),
        ({"moments": (3,)}, r"moments=\(3,\)"),
        ({"epsilon": -1.0}, "epsilon=-1.0"),
        ({"delta": 0.0}, "delta=0.0"),
    ],
)
def test_refusals(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audited(**{"adjacency": "zero-out", **options})


def test_it_says_nothing_while_it_works(
    capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    audited(adjacency="replace-one", canaries=1000, delta=0.1)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_the_command_prints_one_json_object() -> None:
    done = CliRunner().invoke(cli.app, ["audit", "--canaries", "1000", "--json", "--quiet"])
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert {
        "epsilon_lower",
        "epsilon_claimed",
        "mu_lower",
        "mu_claimed",
        "canaries",
        "confidence",
        "adjacency",
        "verdict",
    } <= set(result)
    assert result["canaries"] == 1000
    assert result["verdict"] == "consistent"
    assert 0.4 < result["epsilon_lower"] <= result["epsilon_claimed"] == 1.0


def test_the_command_fails_on_a_violated_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    noise_missing(monkeypatch)
    arguments = ["audit", "--canaries", "1000", "--adjacency", "zero-out", "--quiet"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 2
    assert "VIOLATED: epsilon is at least" in done.stderr
    done = CliRunner().invoke(cli.app, [*arguments, "--json"])
    assert done.exit_code == 2
    assert json.loads(done.stdout)["verdict"] == "VIOLATED"
