"""Shared helpers: small encoders and releases that need no weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import dpmmd
from dpmmd.encoders import Encoder
from dpmmd.run import no_noise as no_noise  # shows the integer sums themselves


class TwoTaps(nn.Module):
    """A small fixed backbone with one signed and one non-negative tap."""

    def __init__(self) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(7)
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=rng) * 0.4

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a = self.first(x - 0.5)
        b = self.second(a.relu()).relu()
        return {"a": a, "b": b}


def small_encoder(signs: tuple[str, ...] = ("signed", "nonnegative"), **options: object) -> Encoder:
    return Encoder(
        TwoTaps(),
        name="two-taps",
        weights_sha256="0" * 64,
        image_size=8,
        tap_signs=dict(zip(("a", "b"), signs, strict=False)),
        **options,  # type: ignore[arg-type]
    )


def nonnegative_encoder() -> Encoder:
    return Encoder(
        TwoTaps(),
        name="two-taps",
        weights_sha256="0" * 64,
        image_size=8,
        tap_signs={"b": "nonnegative"},
    )


def images(n: int, seed: int = 0, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return (
        rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8),
        rng.integers(0, classes, n, dtype=np.int64),
    )


def small_modes(
    bits: int = 2, classes: int = 3, side: int = 8, channels: int = 1, **options: object
) -> dpmmd.Modes:
    """Modes by random directions, about the mean of random images."""
    rng = torch.Generator().manual_seed(bits)
    d = channels * side * side
    directions = torch.randint(-1000, 1000, (1, bits, d), generator=rng)
    thresholds = (directions[0].sum(1) * 65535 // 2).expand(classes, bits)
    return dpmmd.Modes(side, channels, directions, thresholds, **options)  # type: ignore[arg-type]


@pytest.fixture
def encoder() -> Encoder:
    return small_encoder()


@pytest.fixture
def released(encoder: Encoder) -> dpmmd.Release:
    return dpmmd.release(
        images(200),
        encoder,
        epsilon=5.0,
        delta=1e-3,
        adjacency="replace-one",
        num_classes=3,
        progress=False,
    )
