"""First and second moments of pixels, as an encoder: what `dpmmd.release(pixel_moments=)` sums.

x is an image brought to side x side, all its d values in [0, 1], and u = F x: its cosine transform,
each channel's, with the frequency (a, b) times (1 + sqrt(a^2 + b^2))^(1/2). Amplitudes in images
fall about as 1 / frequency (Field, "Relations between the statistics of natural images", 1987); so
weighted, fine detail has more of the bound, and less noise against its signal.

v = (u, sqrt(d / 8)) divided by its own norm is of norm 1 and tells x apart from any other image.
The row (sqrt(a) v v', sqrt(1 - a) v), with the products above the diagonal times sqrt(2) and those
below left out, is of norm sqrt(a |v|^4 + (1 - a) |v|^2) = 1: nothing is clipped.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpmmd.encoders.base import Encoder

# Of a row's squared norm; the means have the rest.
PRODUCTS_SHARE = 0.5
LARGEST = 1024  # pixel values of an image; the row has half the square of it


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


class _PixelMoments(nn.Module):
    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.channels = channels
        matrix = transform(channels, side, side)
        size = len(matrix) + 1
        firsts = [i * size - i * (i - 1) // 2 for i in range(size)]  # where row i begins
        self.register_buffer("matrix", matrix.float())
        self.register_buffer("diagonal", torch.tensor(firsts))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = images[:, : self.channels].flatten(1)
        v = augmented(x @ self.matrix.T)  # type: ignore[operator]
        n, d = v.shape
        left = v * math.sqrt(2 * PRODUCTS_SHARE)
        products = v.new_empty(n, d * (d + 1) // 2)
        begin = 0
        for i in range(d):
            torch.mul(left[:, i : i + 1], v[:, i:], out=products[:, begin : begin + d - i])
            begin += d - i
        products[:, self.diagonal] *= math.sqrt(0.5)  # type: ignore[index]
        pixels = v * math.sqrt(1 - PRODUCTS_SHARE)
        return {"products": products[:, :, None, None], "pixels": pixels[:, :, None, None]}


def pixel_moments(side: int, channels: int) -> Encoder:
    """The encoder of the block of pixel moments; taps "products" and "pixels".

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
            f"{math.isqrt(LARGEST // channels)} for {channels} channels (the products of "
            f"{LARGEST} values an image at most)."
        )
    return Encoder(
        _PixelMoments(channels, side),
        name=f"pixel moments of {channels} channels",
        weights_sha256="",
        image_size=side,
        tap_signs={"products": "signed", "pixels": "signed"},
    )


def unpacked(products: Tensor, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """E[v v'] [d, d] and E[v] [..., d], from means of the two taps [d (d + 1) / 2] and [..., d]."""
    d = pixels.shape[-1]
    second = products.new_zeros(d, d)
    rows, columns = torch.triu_indices(d, d, device=products.device)
    second[rows, columns] = products / math.sqrt(2 * PRODUCTS_SHARE)
    second = second + second.T
    second.diagonal().mul_(math.sqrt(0.5))
    return second, pixels / math.sqrt(1 - PRODUCTS_SHARE)
