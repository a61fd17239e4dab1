"""Triton's bounded integer sums, kernel by kernel, and what they refuse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dpmmd.bounds import Bound
from tests.core import interpreted
from tests.core.interpreted import small_blocks  # noqa: F401

if not interpreted.ACTIVE:
    test_interpreted = interpreted.whole(__file__)
else:
    from dpmmd.kernels import bounded_sums as kernels
    from dpmmd.kernels import table
    from dpmmd.kernels.bounded_sums import bounded_sums
    from dpmmd.kernels.taps import Taps, bits_of, launch

    pytestmark = pytest.mark.usefixtures("small_blocks")

    LIMIT = 2**30
    K = 3

    def features(n: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
        rng = torch.Generator().manual_seed(seed)
        maps = torch.randn(n, 2, 3, 3, generator=rng) * torch.logspace(-3, 3, n).view(-1, 1, 1, 1)
        return [
            maps.to(dtype).contiguous(memory_format=torch.channels_last),
            torch.randn(n, 5, generator=rng).relu().to(dtype),
        ]

    def ours(fs: list[Tensor], y: Tensor, valid: Tensor, limits: Tensor, **options: Any) -> Tensor:
        width = len(options["bound"].moments) * sum(f.shape[1:].numel() for f in fs)
        sums = torch.zeros(K, width, dtype=torch.int64)
        bounded_sums(fs, y, valid, limits, sums=sums, **options)
        return sums

    def everyone(n: int) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.arange(n) % (K - 1) * 2  # class 1 is absent
        return y, torch.ones(n, dtype=torch.bool), torch.full((n,), LIMIT)

    BOTH = Bound((1, 2), joint_weight=0.5)
    OPTIONS: dict[str, Any] = {"bound": BOTH, "nonnegative": False}

    def test_planes_are_taken_in_channels_last_order() -> None:
        fs = features(3)
        y, valid, limits = everyone(3)
        planes = [f.contiguous() for f in fs]
        assert torch.equal(
            ours(planes, y, valid, limits, **OPTIONS), ours(fs, y, valid, limits, **OPTIONS)
        )

    def within(rows: list[list[float]], limit: int, nonnegative: bool) -> list[int]:
        """Step 4 alone, on integers that no earlier step would let through."""
        taps = Taps([torch.tensor(rows)])
        n, config = taps.n, table.lookup("bounded_sums", taps.device, taps.dtype, taps.dim)
        (piece,) = taps.launches(config.block)
        one = torch.ones(1, n, 1, dtype=torch.float64)
        partials = torch.empty(2, n, piece.blocks, dtype=torch.int64)
        launch(
            kernels.partial_certificate, (piece.blocks, -(-n // config.rows)), taps.device,
            piece.addresses, piece.records, one, one, partials, n, 1, piece.blocks, bits_of(1.0),
            TYPE=taps.type, VECTOR=1, MOMENTS=1, NORMS=1, PER_TAP=0,
            NONNEGATIVE=int(nonnegative), ROWS=config.rows, BLOCK=config.block,
        )  # fmt: skip
        result = torch.full((n,), -1, dtype=torch.int32)
        launch(
            kernels.finish_certificate, (n,), taps.device, partials,
            torch.ones(n, dtype=torch.uint8), torch.full((n,), limit), result, n, piece.blocks,
        )  # fmt: skip
        return result.tolist()

    def test_certificate() -> None:
        nothing = [0.0] * 10
        rows = [
            [3.0, 4.0, *nothing],
            [3.0, 4.0, *nothing[:9], 1.0],
            [0.0, 0.0, *nothing],
            [-3.0, 4.0, *nothing],
            [2.0**32, 3.0, *nothing],
            [-(2.0**32), 3.0, *nothing],
            [2.0**62, 0.0, *nothing],
        ]
        assert within(rows, 5, False) == [1, 0, 0, 1, 0, 0, 0]
        assert within(rows, 5, True) == [1, 0, 0, 0, 0, 0, 0]
        assert within(rows, 6, False) == [1, 1, 0, 1, 0, 0, 0]
        # Low parts that carry: 3 (2^16 - 1)^2 is above 2^33.
        carry = [[65535.0] * 3, [65535.0] * 2 + [0.0]]
        assert within(carry, math.isqrt(3 * 65535**2), False) == [0, 1]
        assert within(carry, math.isqrt(3 * 65535**2) + 1, False) == [1, 1]
        top = [[2.0**30, 0.0], [2.0**30, 1.0], [2.0**30 + 128, 0.0]]
        assert within(top, 2**30, False) == [1, 0, 0]
        assert within(top[:1], 2**30 + 1, False) == [0]  # the limit itself is out of range

    def test_squares_are_rounded_up() -> None:
        """Step 2 alone: every term of s, never below g^2 2^b."""
        f = torch.rand(5, 11, generator=torch.Generator().manual_seed(0)) * 2 - 1
        f[1] = 0.5
        taps = Taps([f])
        config = table.lookup("bounded_sums", taps.device, taps.dtype, taps.dim)
        (piece,) = taps.launches(config.block)
        partials = torch.empty(1, 5, piece.blocks, dtype=torch.int64)
        launch(
            kernels.partial_squares, (piece.blocks, 2), taps.device, piece.addresses,
            piece.records, torch.ones(1, 5, 1, dtype=torch.float64),
            torch.tensor([4], dtype=torch.int32), partials, 5, 1, piece.blocks, bits_of(1.0),
            TYPE=taps.type, VECTOR=1, MOMENTS=1, NORMS=1, PER_TAP=0, ROWS=config.rows,
            BLOCK=config.block,
        )  # fmt: skip
        expected = (f.double() ** 2 * 2**4).ceil().long().sum(dim=1)
        assert torch.equal(partials.sum(dim=(0, 2)), expected)

    def test_refusals() -> None:
        fs = features(2)
        y, valid, limits = everyone(2)
        sums = torch.zeros(K, 46, dtype=torch.int64)
        with pytest.raises(ValueError, match=r"sums: torch\.int32"):
            bounded_sums(fs, y, valid, limits, sums=sums.int(), **OPTIONS)
        with pytest.raises(ValueError, match="shared_taps=3"):
            bounded_sums(fs, y, valid, limits, sums=sums, shared_taps=3, **OPTIONS)
        with pytest.raises(ValueError, match="give both or neither"):
            bounded_sums(
                fs, y, valid, limits, sums=sums[:, :10].contiguous(), shared_taps=1, **OPTIONS
            )
        with pytest.raises(ValueError, match=r"features\[0\]: torch.float64"):
            bounded_sums([f.double() for f in fs], y, valid, limits, sums=sums, **OPTIONS)
