"""Pixels as features: what `dpmmd.release(pixel_moments=)` sums, once and in products.

x is an image brought to side x side, all its d values in [0, 1], and u = F x: its cosine transform,
each channel's, with the frequency (a, b) times (1 + sqrt(a^2 + b^2))^(1/2). Amplitudes in images
fall about as 1 / frequency (Field, "Relations between the statistics of natural images", 1987); so
weighted, fine detail has more of the bound, and less noise against its signal.

v = (u, sqrt(d / 8)) divided by its own norm is of norm 1 and tells x apart from any other image.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpmmd.encoders.base import Encoder

LARGEST = 3072  # pixel values of an image: there are half the square of it in products


def transform(channels: int, height: int, width: int) -> Tensor:
    """F [d, d], float64."""
    cosines = [_cosines(side) for side in (height, width)]
    rows, columns = (torch.arange(side, dtype=torch.float64) for side in (height, width))
    weights = (1 + (rows[:, None].square() + columns.square()).sqrt()).sqrt()
    one = weights.flatten()[:, None] * torch.kron(*cosines)
    return torch.block_diag(*[one] * channels)


def _cosines(n: int) -> Tensor:
    """The orthonormal cosine transform (DCT-II) [n, n]."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = (math.pi / n * (k + 0.5) * k[:, None]).cos() * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def constant(d: int) -> float:
    """What stands behind u, before both are normed."""
    return math.sqrt(d / 8)


def augmented(u: Tensor) -> Tensor:
    """v [n, d + 1] of u [n, d]."""
    behind = u.new_full((len(u), 1), constant(u.shape[1]))
    return F.normalize(torch.cat((u, behind), dim=1), dim=1)


def means_of(sums: Tensor, channels: int, side: int) -> Tensor:
    """Means of x [K, d], float64, of sums of v [K, d + 1]; weighted by 1 / |(u, c)|."""
    back = torch.linalg.inv(transform(channels, side, side))
    own = sums.double()
    return own[:, :-1] * (constant(len(back)) / own[:, -1:]) @ back.T


def products_of(sums: Tensor, channels: int, side: int) -> tuple[Tensor, Tensor]:
    """The mean of x x' [d, d] and that of x [d], float64, of sums of v v' [d + 1, d + 1].

    Both are weighted by 1 / |(u, c)|^2, so that a covariance follows from them.
    """
    back = torch.linalg.inv(transform(channels, side, side))
    own, c = sums.double(), constant(len(back))
    own = own / own[-1, -1]
    return back @ own[:-1, :-1] @ back.T * c**2, back @ own[:-1, -1] * c


class _Pixels(nn.Module):
    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.channels = channels
        self.register_buffer("matrix", transform(1, side, side).float())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = images[:, : self.channels].flatten(2)
        v = augmented((x @ self.matrix.T).flatten(1))  # type: ignore[operator]
        return {"pixels": v[:, :, None, None]}


def pixel_moments(side: int, channels: int) -> Encoder:
    """The encoder of the blocks "pixels" and "products": v, as its one tap "pixels".

    Args:
        side: to which images are brought.
        channels: 1 or 3, of the images.

    Raises:
        ValueError: ``side`` is not a positive int, or more than 1,024 values an image.
    """
    values = channels * side * side if type(side) is int and side > 0 else 0
    if not 0 < values <= LARGEST:
        raise ValueError(
            f"pixel_moments={side!r}: expected the side that images are brought to, 1 to "
            f"{math.isqrt(LARGEST // channels)} for {channels} channels (at most {LARGEST:,} "
            "values an image)."
        )
    return Encoder(
        _Pixels(channels, side),
        name=f"pixels of {channels} channels",
        weights_sha256="",
        image_size=side,
        tap_signs={"pixels": "signed"},
    )
