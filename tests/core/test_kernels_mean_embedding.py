"""Triton's row statistics, class sums, row dots and gradient against `dpmmd.reference` in float64.

The error allowed is twice (gradients three times) that of plain float32 torch on the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from dpmmd import reference
from dpmmd._contract.protocol import Saved
from dpmmd.bounds import BOUNDS, MOMENTS, Bound
from tests.core import interpreted
from tests.core.interpreted import small_blocks  # noqa: F401

if not interpreted.ACTIVE:
    test_interpreted = interpreted.whole(__file__)
else:
    from dpmmd.kernels import mean_embedding, schedule, table
    from dpmmd.kernels.class_sums import class_sums
    from dpmmd.kernels.gradient import Terms, gradient_into
    from dpmmd.kernels.row_dots import row_dots
    from dpmmd.kernels.row_statistics import row_statistics
    from dpmmd.kernels.taps import Taps

    pytestmark = pytest.mark.usefixtures("small_blocks")

    SHAPES = [(2, 3, 3), (5,)]
    EPSILON = 2.0**-23
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

    def clip_of(fs: list[Tensor]) -> float:
        """Between norms: balls clip about half of the vectors."""
        norms = torch.cat([f.flatten(1).float() for f in fs], dim=1).norm(dim=1)
        return 1.01 * float(norms.median())

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

    def plain(
        fs: list[Tensor],
        y: Tensor | None,
        k: int,
        upstream: Tensor,
        dtype: torch.dtype,
        bound: Bound,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        inputs = [f.detach().clone().to(dtype).requires_grad_() for f in fs]
        means, counts = reference.mean_embedding(
            inputs,
            y,
            k,
            moments=bound.moments,
            bound=bound.kind,
            clip=bound.clip,
            joint_weight=bound.joint_weight,
        )
        (means * upstream.to(dtype)).sum().backward()
        return means.detach(), counts, [i.grad for i in inputs if i.grad is not None]

    def error(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        x, y = (torch.cat([t.double().flatten() for t in ts]) for ts in (a, b))
        return float((x - y).norm() / y.norm().clamp(min=1e-30))

    def compare(fs: list[Tensor], y: Tensor | None, k: int, bound: Bound) -> None:
        dim = sum(f[0].numel() for f in fs)
        rng = torch.Generator().manual_seed(2)
        upstream = torch.randn(len(bound.moments), k, dim, generator=rng)
        means, counts, grads = kernels(fs, y, k, upstream, bound)
        true_means, true_counts, true_grads = plain(fs, y, k, upstream, torch.float64, bound)
        rough_means, _, rough_grads = plain(fs, y, k, upstream, torch.float32, bound)
        assert torch.equal(counts.double(), true_counts)
        assert error([means], [true_means]) <= 2 * error([rough_means], [true_means]) + EPSILON
        assert error(grads, true_grads) <= 3 * error(rough_grads, true_grads) + EPSILON
        if y is not None:
            absent = true_counts == 0
            assert absent.any()
            assert not means[:, absent].any()

    @pytest.mark.parametrize("bound", BOUNDS)
    @pytest.mark.parametrize("moments", MOMENTS)
    @pytest.mark.parametrize(
        ("dtype", "k"), [(torch.float32, 1), (torch.float32, 3), (torch.bfloat16, 3)]
    )
    def test_values_and_gradients(
        bound: str, moments: tuple[int, ...], dtype: torch.dtype, k: int
    ) -> None:
        fs = features(6, dtype=dtype)
        compare(fs, labels(6, k), k, Bound(moments, bound, clip_of(fs)))

    @pytest.mark.parametrize("bound", ["sphere", "ball"])
    @pytest.mark.parametrize("k", [1, 3])
    def test_joint_bound(bound: str, k: int) -> None:
        fs = features(6)
        compare(fs, labels(6, k), k, Bound((1, 2), bound, 2.0, 0.3))

    @pytest.mark.parametrize("k", [1, 3, 50])
    def test_several_tiles_of_images(k: int) -> None:
        """Classes of more images than a tile has, and more classes than images."""
        n = 2 * table.TILE_ROWS + 5
        fs = features(n, [(3,), (9,)])
        compare(fs, labels(n, k), k, Bound((1, 2), "ball"))

    @pytest.mark.parametrize(
        "shapes", [[(1,)], [(8,)], [(17,)], [(2, 1, 1)] * 5, [(3,), (0,), (4,)]]
    )
    def test_shapes_nobody_likes(shapes: list[tuple[int, ...]]) -> None:
        """Odd D, whole blocks alone, many taps, a tap without columns."""
        fs = [f + 1 for f in features(3, shapes)]
        compare(fs, None, 1, Bound((1, 2), "ball-per-tap", clip_of(fs)))

    def test_one_image_and_none() -> None:
        fs = features(1)
        compare(fs, torch.tensor([1]), 3, BOTH)
        compare(fs, None, 1, BOTH)
        for y, k in ((None, 1), (torch.empty(0, dtype=torch.int64), 3)):
            empty = [f[:0] for f in fs]
            means, counts, saved = mean_embedding.forward(empty, y, k, BOTH)
            assert means.shape == (2, k, 23)
            assert not means.any()
            assert counts.tolist() == [0.0] * k
            upstream = torch.ones_like(means)
            grads = mean_embedding.backward(empty, y, k, BOTH, saved, upstream, [True, True])
            assert [g.shape for g in grads] == [f.shape for f in empty]

    @pytest.mark.parametrize("bound", ["sphere", "ball-per-tap"])
    @pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
    def test_unusable_rows_are_zero_and_harm_nobody(bound: str, bad: float) -> None:
        fs = [f + 0.25 for f in features(4)]
        clean = [f.clone() for f in fs]
        for f in fs:
            f[2] = bad
        for f in clean:
            f[2] = 0.0
        both = Bound((1, 2), bound)
        y = torch.tensor([0, 1, 1, 0])
        upstream = torch.randn(2, 2, 23, generator=torch.Generator().manual_seed(3))
        means, counts, grads = kernels(fs, y, 2, upstream, both)
        expected, _, expected_grads = kernels(clean, y, 2, upstream, both)
        assert torch.equal(means, expected)
        assert counts.tolist() == [2.0, 2.0]
        for grad, like in zip(grads, expected_grads, strict=True):
            assert torch.equal(grad, like)
            assert not grad[2].any()
            assert grad[[0, 1, 3]].flatten(1).any(dim=1).all()

    def test_one_bad_tap_spoils_only_itself_where_bounds_are_per_tap() -> None:
        fs = features(3)
        fs[0][1] = math.nan
        bound = Bound((1,), "sphere-per-tap")
        means, _, _ = kernels(fs, None, 1, torch.ones(1, 1, 23), bound)
        fs[0][1] = 0.0
        true_means, _ = reference.mean_embedding(
            [f.double() for f in fs], moments=(1,), bound="sphere-per-tap"
        )
        torch.testing.assert_close(means.double(), true_means, rtol=1e-6, atol=1e-7)

    def test_fourth_powers_that_overflow_leave_the_first_moment_alone() -> None:
        fs = [f * 1e10 for f in features(3)]
        means, _, grads = kernels(fs, None, 1, torch.ones(2, 1, 23), BOTH)
        true_means, _ = reference.mean_embedding([f.double() for f in fs], moments=(1,))
        torch.testing.assert_close(means[:1].double(), true_means, rtol=1e-6, atol=1e-7)
        assert not means[1].any()
        assert all(torch.isfinite(g).all() for g in grads)

    @pytest.mark.parametrize("k", [1, 3])
    def test_layouts(k: int) -> None:
        """Planes, views with gaps and expanded rows: same means, gradients in the tap's layout."""
        (f,) = features(4, [(4, 3, 5)])
        wide = torch.zeros(4, 8, 3, 5)
        wide[:, :4] = f
        y = labels(4, k)
        upstream = torch.randn(2, k, 60, generator=torch.Generator().manual_seed(4))
        results = []
        for tap in (
            f,
            f.contiguous(),
            wide[:, :4],
            f.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1),
        ):
            fs = [tap, torch.ones(4, 3)]
            up = torch.cat([upstream, upstream[..., :3]], dim=2)
            means, _, saved = mean_embedding.forward(fs, y, k, BOTH)
            grads = mean_embedding.backward(fs, y, k, BOTH, saved, up, [True, False])
            assert grads[0].shape == tap.shape
            assert grads[1].numel() == 0
            results.append((means, grads[0].contiguous()))
        assert results[0][1].is_contiguous()
        for means, grad in results[1:]:
            torch.testing.assert_close(means, results[0][0], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(grad, results[0][1], rtol=1e-5, atol=1e-7)
        first = Saved(saved.scale[:1].clone(), saved.projection[:1].clone(), saved.schedule)
        up = upstream[:1]
        grads = mean_embedding.backward([f.contiguous()], y, k, Bound(), first, up, [True])
        assert grads[0].stride() == f.contiguous().stride()

    def test_bfloat16_gradients() -> None:
        """Rounded to bfloat16 from float32 (the interpreter truncates: within one unit)."""
        fs = features(4, dtype=torch.bfloat16)
        upstream = torch.randn(2, 1, 23, generator=torch.Generator().manual_seed(3))
        _, _, expected = kernels(fs, None, 1, upstream, BOTH)
        _, _, saved = mean_embedding.forward(fs, None, 1, BOTH)
        grads = mean_embedding.backward(fs, None, 1, BOTH, saved, upstream, [True, True])
        for grad, like in zip(grads, expected, strict=True):
            assert grad.dtype == torch.bfloat16
            torch.testing.assert_close(grad.float(), like, rtol=2.0**-7, atol=1e-30)

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
