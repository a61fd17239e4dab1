"""What is printed: no bound looks better than it is, and no name is more than text."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import mpmath
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dpmmd
from dpmmd import cli, export
from dpmmd.privacy import Ledger, PrivacyError, Release, accounting, printed, report
from dpmmd.privacy.composition import Entry, composed, fitting
from tests.conftest import images, small_encoder

HOSTILE = (
    "\x1b]0;owned\x07\x1b[31m[bold red]ward 3[/bold red] :smile: <script>x</script> | a\n"
    "| epsilon | 0.001 |\u202e \x85 http://e.org ![i](j) `c` & \u2028"
)
POSITIVE = st.floats(min_value=5e-324, max_value=1.7e308)


@given(value=POSITIVE, digits=st.integers(1, 12))
def test_a_printed_bound_is_on_its_side(value: float, digits: int) -> None:
    above, below = printed.up(value, digits), printed.down(value, digits)
    assert float(below) <= value <= float(above)
    for text in (above, below):
        assert len(re.sub(r"e.*|\.", "", text).strip("0")) <= digits
        if value > 1e-290 and float(text) < math.inf:
            assert float(text) == pytest.approx(value, rel=1.0001 * 10.0 ** (1 - digits))


@given(value=st.floats(0, 1), places=st.integers(0, 6))
def test_a_printed_share_is_at_least_the_share(value: float, places: int) -> None:
    shown = Fraction(printed.percent(value, places)[:-1])
    assert 0 <= shown - 100 * Fraction(repr(value)) < Fraction(1, 10**places)


@pytest.mark.parametrize(
    ("value", "above", "below"),
    [
        (1.0000004, "1.00001", "1"),
        (1.0, "1", "1"),
        (1e-5, "1e-05", "1e-05"),
        (0.1, "0.1", "0.1"),
        (1.00000001e-6, "1.00001e-06", "1e-06"),
        (999999.5, "1e+06", "999999"),
        (123456.0, "123456", "123456"),
        (0.0, "0", "0"),
        (math.inf, "inf", "inf"),
        (math.nan, "nan", "nan"),
    ],
)
def test_bounds_as_they_are_printed(value: float, above: str, below: str) -> None:
    assert (printed.up(value), printed.down(value)) == (above, below)


def test_shares_as_they_are_printed() -> None:
    assert printed.percent(0.09611, 1) == "9.7%"
    assert printed.percent(1.0, 1) == "100.0%"
    assert printed.percent(1e-9, 2) == "0.01%"


@given(st.floats(-8, 4), st.sampled_from([0.01, 0.001]))
def test_the_attackers_rates_are_upper_bounds(log_mu: float, rate: float) -> None:
    mu = 10.0**log_mu
    found = report.true_positives(mu, rate)
    with mpmath.workdps(40):
        quantile = mpmath.sqrt(2) * mpmath.erfinv(2 * mpmath.mpf(repr(rate)) - 1)
        exact = mpmath.ncdf(mu + quantile)
        assert exact <= found <= exact * (1 + mpmath.mpf(10) ** -9)


def just_above() -> Release:
    """A release whose every number is just above one with few digits."""
    return dpmmd.release(
        images(40),
        small_encoder(),
        epsilon=1.0000004,
        delta=1.00000004e-6,
        adjacency="replace-one",
        num_classes=3,
        progress=False,
    )


def test_the_report_rounds_outward() -> None:
    release = just_above()
    f = report.facts(release)
    table = dict(report.rows(f))
    assert table["(epsilon, delta)"] == "(1.00001, 1.00001e-06)"
    assert "(1.00001, 1.00001e-06)-differentially private" in release.report()
    assert "epsilon=1.00001, delta=1.00001e-06" in repr(release)
    assert float(table["mu (Gaussian DP)"]) >= f["mu"]
    assert float(table["zCDP rho"]) >= f["zcdp_rho"] >= Fraction(f["mu"]) ** 2 / 2
    assert table["L2 sensitivity"] == "2"
    assert float(table["L2 sensitivity"]) >= f["sensitivity"]
    assert float(table["noise sd / sensitivity"]) <= f["sd_over_sensitivity"]
    for key, epsilon in f["epsilon_at"].items():
        assert float(key) in (1e-5, 1e-6, release.metadata.delta)  # exactly
        if float(key) != release.metadata.delta:
            assert float(table[f"epsilon at delta = {printed.up(float(key))}"]) >= epsilon
    share = re.findall(r"[\d.]+(?=%)", table["attacker's advantage"])[0]
    assert float(share) >= 100 * f["attacker_advantage"] > float(share) - 0.1001
    rates = re.findall(r"at most ([\d.]+)%", table["attacker's true-positive rate"])
    for shown, rate in zip(rates, f["attacker_true_positive_rate_at"].values(), strict=True):
        assert float(shown) >= 100 * rate
    for adjacency in ("zero-out",):
        numbers = re.findall(r"= ([\d.e-]+)", table[f"the same release under {adjacency}"])
        at = f["by_adjacency"][adjacency]
        assert float(numbers[0]) >= at["epsilon"]
        assert float(numbers[1]) >= f["delta"]
        assert float(numbers[2]) >= at["mu"]
    json.dumps(f, allow_nan=False)


def test_the_ledgers_messages_round_outward(tmp_path: Path) -> None:
    path = tmp_path / "ledger"
    release = dpmmd.release(
        images(40), small_encoder(), epsilon=1.0000004, delta=1e-6, adjacency="replace-one",
        num_classes=3, progress=False, ledger=path,
    )  # fmt: skip
    f = report.facts(release, Ledger(path))
    shown = dict(report.rows(f))["all of them, replace-one"]
    mu, epsilon, _ = map(float, re.findall(r"= ([\d.e-]+)", shown))
    assert mu >= f["ledger"]["mu"]["replace-one"]
    assert epsilon >= f["ledger"]["epsilon"]["replace-one"]
    options = {"identity": "1" * 64, "source": "s", "adjacency": "replace-one", "unit": "image"}
    level = accounting.calibrate(epsilon=3.0, delta=1e-6)
    with pytest.raises(PrivacyError) as caught:
        Ledger(path, budget=(2.0, 1e-6)).spend(
            mu=level.mu, epsilon=3.0, delta=1e-6, private=True, **options
        )
    spent, limit, takes = re.findall(
        r"mu = ([\d.]+) of ([\d.]+) .* takes ([\d.]+)", str(caught.value)
    )[0]
    assert float(spent) >= f["mu"]
    assert float(limit) <= accounting.calibrate(epsilon=2.0, delta=1e-6).mu
    assert float(takes) >= level.mu


@given(st.floats(0.01, 9), st.floats(0.005, 0.999))
def test_the_epsilon_that_is_said_to_fit_fits(total: float, share: float) -> None:
    level = accounting.calibrate(epsilon=total, delta=1e-6)
    one = Entry("", "", None, True, level.mu * share, 1.0, 1e-6, "replace-one", "image", "", "", "")
    room = level.mu * math.sqrt(1 - share * share)
    fits = fitting((total, 1e-6), [one], one, room)
    if fits is None:
        return
    mu = accounting.calibrate(epsilon=float(fits), delta=1e-6).mu
    after = composed([one, Entry(**{**one.__dict__, "mu": mu})], "replace-one", "image")
    assert accounting.delta(mu=after, epsilon=total) <= 1e-6


Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dpmmd", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), *capfd.readouterr()

    return run


def test_the_command_line_rounds_outward(call: Call) -> None:
    code, out, _ = call("calibrate", "--epsilon", 1.00000000004, "--delta", 1.00000000004e-6)
    cells = dict(re.findall(r"│ ([a-z_ ]+?) +│ ([\d.e-]+)", out))
    level = accounting.calibrate(epsilon=1.00000000004, delta=1.00000000004e-6)
    assert code == 0
    assert cells["epsilon"] == "1.000000001"
    assert cells["delta"] == "1.000000001e-06"
    assert float(cells["sd over sensitivity"]) >= level.sd_over_sensitivity
    assert float(cells["mu"]) == level.mu
    _, out, _ = call("calibrate", "--sd", 3, "--delta", 1e-6, "--json")
    assert json.loads(out)["mu"] > 1 / 3
    assert json.loads(out)["sd_over_sensitivity"] == 3


# ----------------------------------------------------------------------------- names of others


def hostile(path: Path, **changes: Any) -> Path:
    release = just_above()
    spec = {**release.metadata.encoder, "name": HOSTILE}
    spec["taps"] = [{**tap, "name": f"{HOSTILE}{i}"} for i, tap in enumerate(spec["taps"])]
    told = {"source": HOSTILE, "encoder": spec, "version": HOSTILE, **changes}
    metadata = release.metadata.model_copy(update=told)
    return Release(release.sums, release.counts, metadata).save(path)


def harmless(text: str) -> None:
    for line in text.split("\n"):
        assert line.isprintable(), ascii(line)
    assert "| epsilon | 0.001 |" not in text.splitlines()


def test_hostile_names_are_text_on_a_terminal(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = hostile(tmp_path / "r.safetensors")
    monkeypatch.setenv("COLUMNS", "3000")
    code, out, err = call("privacy", path)
    assert (code, err) == (0, "")
    harmless(out)
    assert r"\x1b[31m[bold red]ward 3[/bold red] :smile:" in out
    code, out, err = call("train", path, "--out", tmp_path / "run")
    assert code == 2
    harmless(err)
    code, out, _ = call("privacy", path, "--json")
    assert json.loads(out)["source"] == HOSTILE  # JSON escapes for itself
    assert out.isascii()


def test_hostile_names_are_text_in_markdown(call: Call, tmp_path: Path) -> None:
    release = Release.load(hostile(tmp_path / "r.safetensors"))
    card = export.card(
        release, name="a", format="npz", shape=(9, 1, 8, 8), step=1, temperature=1.0, seed=0
    )
    code, out, _ = call("privacy", tmp_path / "r.safetensors", "--markdown")
    assert code == 0
    for text in (release.report(), card, out):
        harmless(text)
        assert not re.search(r"<script|://|(?<!\\)(\[bold|\[i\]|`c`)", text)
        table = [line for line in text.splitlines() if line.startswith("|")]
        for line in table:
            assert len(re.findall(r"(?<!\\)\|", line)) == 3, line


def test_a_long_name_is_cut(tmp_path: Path) -> None:
    path = hostile(tmp_path / "r.safetensors", source="x" * 100_000)
    release = Release.load(path)
    assert max(map(len, release.report().splitlines())) < 1000
    assert len(report.facts(release)["source"]) == 100_000


def test_names_in_messages_are_text(tmp_path: Path) -> None:
    release = Release.load(hostile(tmp_path / "r.safetensors"))
    with pytest.raises(PrivacyError) as caught:
        dpmmd.nn.MMDLoss(release, small_encoder())
    harmless(str(caught.value))
    path = hostile(tmp_path / "u.safetensors", unit=HOSTILE)
    with pytest.raises(PrivacyError, match="unit = ") as caught:
        Release.load(path)
    harmless(str(caught.value))
