"""Triton's bounded integer sums against `dpmmd.privacy.sums.PrivateSums`, bit for bit."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpmmd import backends
from dpmmd.bounds import BOUNDS, Bound
from dpmmd.privacy.sums import PrivateSums
from tests.core import interpreted
from tests.core.interpreted import small_blocks  # noqa: F401

if not interpreted.ACTIVE:
    test_interpreted = interpreted.whole(__file__)
    test_interpreted_long = pytest.mark.long(interpreted.whole(__file__, "long"))
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

    def flat(fs: list[Tensor]) -> list[Tensor]:
        return [(f.permute(0, 2, 3, 1) if f.ndim == 4 else f).reshape(f.shape[0], -1) for f in fs]

    def truth(
        fs: list[Tensor], y: Tensor, valid: Tensor, limit: int = LIMIT, **options: Any
    ) -> Tensor:
        width = len(options["bound"].moments) * sum(f.shape[1:].numel() for f in fs)
        sums = PrivateSums(K, width)
        with backends.use("torch"):  # the definition
            sums.add(flat(fs), y, valid, torch.full_like(y, limit), **options)
        return sums.take()[0]

    def ours(fs: list[Tensor], y: Tensor, valid: Tensor, limits: Tensor, **options: Any) -> Tensor:
        width = len(options["bound"].moments) * sum(f.shape[1:].numel() for f in fs)
        sums = torch.zeros(K, width, dtype=torch.int64)
        bounded_sums(fs, y, valid, limits, sums=sums, **options)
        return sums

    def everyone(n: int) -> tuple[Tensor, Tensor, Tensor]:
        y = torch.arange(n) % (K - 1) * 2  # class 1 is absent
        return y, torch.ones(n, dtype=torch.bool), torch.full((n,), LIMIT)

    @pytest.mark.parametrize("bound", BOUNDS)
    @pytest.mark.parametrize("moments", [(1,), (2,), (1, 2)])
    @pytest.mark.parametrize(
        ("dtype", "nonnegative"),
        [(torch.float32, False), (torch.bfloat16, True)],
        ids=["fp32", "bf16-nonnegative"],
    )
    def test_same_bits(
        bound: str, moments: tuple[int, ...], dtype: torch.dtype, nonnegative: bool
    ) -> None:
        fs = features(7, dtype)
        fs[0][2:4] = fs[0][2:4].relu()
        y, valid, limits = everyone(7)
        valid[5] = False
        options = {"bound": Bound(moments, bound, 1.5, 0.3), "nonnegative": nonnegative}
        got = ours(fs, y, valid, limits, **options)
        expected = truth(fs, y, valid, **options)
        assert torch.equal(got, expected)
        assert expected[0].any()
        assert not expected[1].any()

    BOTH = Bound((1, 2), joint_weight=0.5)
    OPTIONS: dict[str, Any] = {"bound": BOTH, "nonnegative": False}

    @pytest.mark.parametrize("bound", ["sphere", "ball-per-tap"])
    @pytest.mark.parametrize(
        "bad", [0.0, math.nan, math.inf, -math.inf, 3e38, 1e-38, 1e-45], ids=str
    )
    def test_values_at_the_edges(bound: str, bad: float) -> None:
        fs = features(4)
        fs[0][1] = bad
        fs[1][2] = bad
        y, valid, limits = everyone(4)
        options = OPTIONS | {"bound": replace(BOTH, kind=bound)}
        assert torch.equal(ours(fs, y, valid, limits, **options), truth(fs, y, valid, **options))

    def test_what_must_not_contribute() -> None:
        """Labels and limits out of range, images that are not valid: nothing, and no error."""
        fs = features(6)
        y, valid, limits = everyone(6)
        y[0], y[1], limits[2], limits[3], valid[4] = -1, K, 0, LIMIT + 1, False
        only = valid & (torch.arange(6) == 5)
        got = ours(fs, y, valid, limits, **OPTIONS)
        assert torch.equal(got, truth(fs, y.clamp(0, K - 1), only, **OPTIONS))
        assert got.any()

    def test_limits_differ_and_sums_are_added_to() -> None:
        fs = features(4)
        y, valid, _ = everyone(4)
        limits = torch.tensor([LIMIT, LIMIT // 3, 7, 1])
        expected = torch.full((K, 46), 5)
        for i, limit in enumerate(limits.tolist()):
            one = [f[i : i + 1] for f in fs]
            expected += truth(one, y[i : i + 1], valid[:1], limit, **OPTIONS)
        sums = torch.full((K, 46), 5)
        bounded_sums(fs, y, valid, limits, sums=sums, **OPTIONS)
        assert torch.equal(sums, expected)

    @pytest.mark.parametrize("moments", [(1,), (1, 2)])
    @pytest.mark.parametrize("shared_taps", [1, 2])
    def test_shared_taps(moments: tuple[int, ...], shared_taps: int) -> None:
        fs = features(5)
        y, valid, limits = everyone(5)
        options = OPTIONS | {"bound": replace(BOTH, moments=moments)}
        expected = truth(fs, y, valid, **options).view(K, len(moments), -1)
        own = sum(f[0].numel() for f in fs[shared_taps:])
        sums = torch.zeros(K, len(moments) * own, dtype=torch.int64)
        shared = torch.zeros(1, len(moments) * (23 - own), dtype=torch.int64)
        bounded_sums(
            fs, y, valid, limits, sums=sums, shared=shared, shared_taps=shared_taps, **options
        )
        assert torch.equal(sums.view(K, len(moments), -1), expected[..., 23 - own :])
        assert torch.equal(shared.view(len(moments), -1), expected[..., : 23 - own].sum(dim=0))

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

    def test_no_images() -> None:
        fs = [f[:0] for f in features(2)]
        y, valid, limits = everyone(0)
        assert not ours(fs, y, valid, limits, **OPTIONS).any()

    @pytest.mark.long
    def test_one_image_many_columns() -> None:
        """More blocks than a finishing program takes at once; an odd number of columns."""
        fs = [torch.randn(1, 8 * 300 + 3, generator=torch.Generator().manual_seed(0))]
        y, valid, limits = everyone(1)
        options = OPTIONS | {"bound": Bound()}
        assert torch.equal(ours(fs, y, valid, limits, **options), truth(fs, y, valid, **options))

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
