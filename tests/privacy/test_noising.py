"""What the noise is added to: every released number has a draw of its own, of the declared sd.

The sampler is replaced by a counter: its numbers are all different and so large that the released
numbers show them. This is exact where a test of real noise needs many releases.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dpmmd
from dpmmd.privacy import mechanism, noising
from tests.conftest import images, small_encoder, small_modes

UNIT = 2.0**40  # between two draws, in grid units; far above the sums of a few images
PIECE = 1 << 22


class Counter:
    """A sampler whose draws are 1, 2, 3, ... times ``unit``."""

    def __init__(self, unit: float = UNIT) -> None:
        self.unit, self.drawn = int(unit), 0
        self.sds: list[tuple[int, float]] = []  # how many, at each call

    def __call__(self, n: int, sd: float) -> np.ndarray:
        values = np.arange(self.drawn + 1, self.drawn + n + 1)
        self.drawn += n
        self.sds.append((n, sd))
        return values * self.unit

    def sd_of(self, draws: Tensor) -> Tensor:
        """The sd that each of these draws was asked for with."""
        sds = torch.repeat_interleave(
            torch.tensor([sd for _, sd in self.sds], dtype=torch.float64),
            torch.tensor([n for n, _ in self.sds]),
        )
        return sds[draws.flatten() - 1]


def draws_of(values: Tensor | None, bound: float, clip: float = 1.0) -> Tensor:
    """Which draw each number got, from the released numbers and their block's bound."""
    assert values is not None
    exact = values.double() * bound * 2**30 / clip / UNIT
    draws = exact.round().to(torch.int64)
    torch.testing.assert_close(exact, draws.double(), rtol=1e-6, atol=0.05)  # the unit is right
    return draws


CASES: dict[str, dict[str, Any]] = {
    "everything": {
        "moments": (1, 2), "shared_taps": 1, "pixel_moments": 5,
        "weights": {"class_products": 0.4, "phi2": 0.5},
    },
    "joint": {"moments": (1, 2), "joint_weight": 0.5, "clip": 3.0},
    "unlabelled": {"num_classes": None, "adjacency": "add-remove"},
    "modes": {"modes": small_modes(), "pixel_moments": 5, "moments": (1, 2)},
    "pixels alone": {"encoder": None, "selection": None, "pixel_moments": 5},
}  # fmt: skip


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_every_released_number_has_a_draw_of_its_own(
    options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = Counter()
    monkeypatch.setattr(mechanism, "rounded_gaussian", counter)
    arguments: dict[str, Any] = {
        "epsilon": 1.0, "delta": 1e-9, "adjacency": "replace-one", "num_classes": 3,
        "progress": False, "selection": small_encoder(), **options,
    }  # fmt: skip
    used = arguments.pop("encoder", small_encoder())
    released = dpmmd.release(images(12), used, **arguments)
    m = released.metadata
    assert m.private
    bounds = {block.name: block.bound for block in m.blocks}
    plain = []
    if m.joint_weight is not None:
        plain.append(draws_of(released.sums, bounds["phi1+phi2"], m.clip))
    else:
        for row, moment in enumerate(m.moments):
            plain.append(draws_of(released.sums[row], bounds[f"phi{moment}"], m.clip))
            if released.shared is not None:
                plain.append(draws_of(released.shared[row], bounds[f"phi{moment}"], m.clip))
    if "selection" in bounds:
        plain.append(draws_of(released.selection, bounds["selection"]))
    plain.append(draws_of(released.counts, bounds["counts"]))
    above = []
    if m.pixel_encoder is not None:
        plain.append(draws_of(released.pixels, bounds["pixels"]))
        for name in bounds.keys() & {"products", "class_products"}:
            values = getattr(released, name)
            draws = draws_of(values, bounds[name])
            assert torch.equal(values, values.transpose(-1, -2))
            plain.append(draws.diagonal(dim1=-2, dim2=-1))
            rows, columns = torch.triu_indices(*draws.shape[-2:], 1)
            above.append(draws[..., rows, columns])
    everything = torch.cat([draws.flatten() for draws in plain + above]).sort().values
    assert torch.equal(everything, torch.arange(1, counter.drawn + 1))  # once each, and no other
    assert {float(sd) for draws in plain for sd in counter.sd_of(draws)} == {m.sd}
    for draws in above:
        torch.testing.assert_close(
            counter.sd_of(draws), torch.full((draws.numel(),), m.sd / 2**0.5).double()
        )


def test_a_vector_of_several_pieces_has_a_draw_for_every_number() -> None:
    counter = Counter(16)
    raw = torch.full((2, PIECE + 3), 7)  # two whole pieces and a few numbers
    result = noising.with_noise(raw, 5.0, counter, 0.5, torch.float64)
    assert counter.drawn == raw.numel()
    assert {sd for _, sd in counter.sds} == {5.0}
    expected = torch.arange(1, raw.numel() + 1, dtype=torch.float64).mul_(16).add_(7).mul_(0.5)
    assert torch.equal(result.flatten(), expected)


def test_the_sampler_is_asked_for_the_declared_sd_of_every_block(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """sd is Delta / mu of the calibration, rounded up by less than a part in 10^8."""
    counter = Counter()
    monkeypatch.setattr(mechanism, "rounded_gaussian", counter)
    released = dpmmd.release(
        images(12), small_encoder(), epsilon=1.0, delta=1e-9, adjacency="zero-out", num_classes=3,
        weights={"counts": 0.25}, progress=False,
    )  # fmt: skip
    moved = 2**30 * (1 + 0.25**2) ** 0.5  # by hand
    needed = moved / dpmmd.privacy.calibrate(epsilon=1.0, delta=1e-9).mu
    assert {sd for _, sd in counter.sds} == {released.metadata.sd}
    assert 1 - 1e-12 < released.metadata.sd / needed < 1 + 1e-8
