"""Triton's row statistics, class sums, row dots and gradient, kernel by kernel."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dpmmd.bounds import BOUNDS, MOMENTS, Bound
from tests.core import conformance, interpreted
from tests.core.interpreted import small_blocks  # noqa: F401

if not interpreted.ACTIVE:
    test_interpreted = interpreted.whole(__file__)
else:
    from dpmmd.kernels import mean_embedding, schedule, table
    from dpmmd.kernels.class_sums import class_sums
    from dpmmd.kernels.gradient import Terms, gradient_into
    from dpmmd.kernels.row_dots import row_dots
    from dpmmd.kernels.row_statistics import rectify, row_statistics
    from dpmmd.kernels.taps import Taps

    pytestmark = pytest.mark.usefixtures("small_blocks")

    SHAPES = [(2, 3, 3), (5,)]
    BOTH = Bound((1, 2))

    def features(
        n: int,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> list[Tensor]:
        rng = torch.Generator().manual_seed(seed)
        return [
            torch.randn(n, *shape, generator=rng)
            .relu()
            .to(dtype)
            .contiguous(
                memory_format=torch.channels_last if len(shape) == 3 else torch.contiguous_format
            )
            for shape in shapes
        ]

    def labels(n: int, k: int) -> Tensor | None:
        if k == 1:
            return None
        y = torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(1))
        return torch.where(y == k // 2, 0, y)  # one class is absent

    def kernels(
        fs: list[Tensor], y: Tensor | None, k: int, upstream: Tensor, bound: Bound
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Means, counts and float32 gradients (the interpreter cannot round to bfloat16)."""
        means, counts, saved = mean_embedding.forward(fs, y, k, bound)
        taps = Taps(fs)
        terms = Terms(bound, saved, row_dots(taps, y, bound, saved, upstream), upstream)
        grads = [torch.full_like(f, math.nan, dtype=torch.float32) for f in fs]
        gradient_into(taps, terms, grads)
        return means, counts, grads

    @pytest.mark.parametrize("bound", BOUNDS)
    @pytest.mark.parametrize("moments", MOMENTS)
    def test_bfloat16_before_it_is_rounded(bound: str, moments: tuple[int, ...]) -> None:
        """Through the public API the interpreter's own rounding hides what float32 found."""
        batch = conformance.Batch(6, ((2, 3, 3), (5,)), torch.bfloat16, 4)
        fs = batch.features()
        clipped = conformance.clipped(fs, Bound(moments, bound))
        upstream = batch.upstream(moments)
        means, _, grads = kernels(fs, batch.labels(), 4, upstream, clipped)
        truth, rough = (
            conformance.define(batch, fs, clipped, t) for t in (torch.float64, torch.float32)
        )
        for times, found, plain, true in (
            (2, [means], [rough.means], [truth.means]),
            (3, grads, rough.gradients, truth.gradients),
        ):
            allowed = times * conformance.distance(plain, true) + conformance.EPSILON
            assert conformance.distance(found, true) <= allowed

    @pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (300, 4), (40, 300)])
    def test_schedule(n: int, k: int) -> None:
        """The stable order of the labels, where classes begin, and tiles that hold every image."""
        y = torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(n))
        taps = Taps([torch.ones(n, 1)])
        (_, _, order), counts = row_statistics(taps, y, k, Bound())
        truth = torch.bincount(y, minlength=k)
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), truth.cumsum(0)])
        assert torch.equal(order[:n].long(), torch.argsort(y, stable=True))
        assert torch.equal(order[n : n + k + 1].long(), starts)
        assert torch.equal(counts.long(), truth)
        tiles = order[n + k + 1 :].view(-1, 4)
        assert len(tiles) == schedule.count_tiles(n, k)
        held = []
        for label, first, rows, count in tiles.tolist():
            if rows:
                assert rows <= table.TILE_ROWS
                assert count == truth[label]
                assert starts[label] <= first
                assert first + rows <= starts[label + 1]
                held += range(first, first + rows)
        assert sorted(held) == list(range(n))

    def test_refusals() -> None:
        fs, y, bound = features(3), torch.tensor([0, 1, 1]), Bound()
        with pytest.raises(ValueError, match=r"labels: torch\.int32 \[3\] on cpu, expected int64"):
            mean_embedding.forward(fs, y.int(), 2, bound)
        means, _, saved = mean_embedding.forward(fs, y, 2, bound)
        for name, bad in (
            ("upstream", means[..., 1:]),
            ("upstream", means.double()),
            ("scale", saved.scale[:, 1:]),
            ("projection", saved.projection.double()),
            ("schedule", saved.schedule[1:]),
        ):
            upstream = bad if name == "upstream" else means
            of_forward = saved if name == "upstream" else saved._replace(**{name: bad})
            with pytest.raises(ValueError, match=f"{name}: torch"):
                mean_embedding.backward(fs, y, 2, bound, of_forward, upstream, [True, True])
        terms = Terms(bound, saved, saved.scale, means)
        with pytest.raises(ValueError, match=r"gradients\[1\]: torch\.float32 \[3, 6\]"):
            gradient_into(Taps(fs), terms, [None, torch.empty(3, 6)])

    def test_same_bits_again() -> None:
        taps = Taps(features(40))
        saved, _ = row_statistics(taps, labels(40, 3), 3, BOTH)
        once, again = (class_sums(taps, 3, BOTH, saved) for _ in range(2))
        assert torch.equal(once, again)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ceiling", [None, 0.5])
    @pytest.mark.parametrize("bias", [True, False])
    def test_rectify(
        monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, ceiling: float | None, bias: bool
    ) -> None:
        """Statistics of what is stored, NaN kept, rows and blocks cut anywhere."""
        interpreted.set_blocks(monkeypatch, 64)  # 3 blocks, the last of them not whole
        rng = torch.Generator().manual_seed(0)
        x = torch.randn(5, 10, 3, 5, generator=rng).to(dtype)
        x[2, 0, 0, 0] = float("nan")
        x = x.contiguous(memory_format=torch.channels_last)
        b = torch.randn(10, generator=rng).to(dtype) if bias else None
        exact = x.double() if b is None else x.double() + b.double()[:, None, None]
        exact = exact.relu() if ceiling is None else exact.clamp(0, ceiling)
        partials = rectify(x, b, ceiling, Bound((1, 2)), 150)
        assert partials.shape == (2, 5, 3)
        # The interpreter cuts bfloat16 where a GPU rounds.
        rtol = 1e-6 if dtype == torch.float32 else 2**-7
        torch.testing.assert_close(x, exact.to(dtype), rtol=rtol, atol=1e-6, equal_nan=True)
        for moment, sums in zip((2, 4), partials.sum(dim=2), strict=True):
            expected = (x.double() ** moment).flatten(1).sum(dim=1)
            torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=0, equal_nan=True)
            assert sums.isnan().tolist() == [False, False, True, False, False]
