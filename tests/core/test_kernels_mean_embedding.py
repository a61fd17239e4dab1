"""Triton's row statistics, class sums, row dots and gradient against `dpmmd.reference` in float64.

The error allowed is twice (gradients three times) that of plain float32 torch on the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from dpmmd import reference
from dpmmd.bounds import BOUNDS, MOMENTS
from tests.core import interpreted
from tests.core.interpreted import small_blocks  # noqa: F401

if not interpreted.ACTIVE:
    test_interpreted = interpreted.whole(__file__)
else:
    from dpmmd.kernels import class_sums, mean_embedding, row_statistics, schedule, table
    from dpmmd.kernels import gradient as gradients
    from dpmmd.kernels.row_dots import row_dots
    from dpmmd.kernels.taps import Taps

    pytestmark = pytest.mark.usefixtures("small_blocks")

    SHAPES = [(2, 3, 3), (5,)]
    EPSILON = 2.0**-23

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
        fs: list[Tensor], y: Tensor | None, k: int, upstream: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Means, counts and float32 gradients (the interpreter cannot round to bfloat16)."""
        means, counts, scale, projection, order = mean_embedding.forward(fs, y, k, **options)
        taps = Taps(fs)
        kind = {"moments": options["moments"], "joint_weight": options["joint_weight"]}
        coefficients = row_dots(taps, y, order, scale, projection, upstream, **kind)
        grads = [torch.full_like(f, math.nan, dtype=torch.float32) for f in fs]
        gradients.gradient_into(taps, order, scale, coefficients, upstream, gradients=grads, **kind)
        return means, counts, grads

    def plain(
        fs: list[Tensor],
        y: Tensor | None,
        k: int,
        upstream: Tensor,
        dtype: torch.dtype,
        **options: Any,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        inputs = [f.detach().clone().to(dtype).requires_grad_() for f in fs]
        means, counts = reference.mean_embedding(inputs, y, k, **options)
        (means * upstream.to(dtype)).sum().backward()
        return means.detach(), counts, [i.grad for i in inputs if i.grad is not None]

    def error(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
        x, y = (torch.cat([t.double().flatten() for t in ts]) for ts in (a, b))
        return float((x - y).norm() / y.norm().clamp(min=1e-30))

    def compare(fs: list[Tensor], y: Tensor | None, k: int, **options: Any) -> None:
        dim = sum(f[0].numel() for f in fs)
        rng = torch.Generator().manual_seed(2)
        upstream = torch.randn(len(options["moments"]), k, dim, generator=rng)
        means, counts, grads = kernels(fs, y, k, upstream, **options)
        true_means, true_counts, true_grads = plain(fs, y, k, upstream, torch.float64, **options)
        rough_means, _, rough_grads = plain(fs, y, k, upstream, torch.float32, **options)
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
        compare(
            fs, labels(6, k), k, moments=moments, bound=bound, clip=clip_of(fs), joint_weight=None
        )

    @pytest.mark.parametrize("bound", ["sphere", "ball"])
    @pytest.mark.parametrize("k", [1, 3])
    def test_joint_bound(bound: str, k: int) -> None:
        fs = features(6)
        compare(fs, labels(6, k), k, moments=(1, 2), bound=bound, clip=2.0, joint_weight=0.3)

    @pytest.mark.parametrize("k", [1, 3, 50])
    def test_several_tiles_of_images(k: int) -> None:
        """Classes of more images than a tile has, and more classes than images."""
        n = 2 * table.TILE_ROWS + 5
        fs = features(n, [(3,), (9,)])
        compare(fs, labels(n, k), k, moments=(1, 2), bound="ball", clip=1.0, joint_weight=None)

    @pytest.mark.parametrize(
        "shapes", [[(1,)], [(8,)], [(17,)], [(2, 1, 1)] * 5, [(3,), (0,), (4,)]]
    )
    def test_shapes_nobody_likes(shapes: list[tuple[int, ...]]) -> None:
        """Odd D, whole blocks alone, many taps, a tap without columns."""
        fs = [f + 1 for f in features(3, shapes)]
        clip = clip_of(fs)
        compare(fs, None, 1, moments=(1, 2), bound="ball-per-tap", clip=clip, joint_weight=None)

    def test_one_image_and_none() -> None:
        fs = features(1)
        options: dict[str, Any] = {
            "moments": (1, 2), "bound": "sphere", "clip": 1.0, "joint_weight": None
        }  # fmt: skip
        compare(fs, torch.tensor([1]), 3, **options)
        compare(fs, None, 1, **options)
        for y, k in ((None, 1), (torch.empty(0, dtype=torch.int64), 3)):
            empty = [f[:0] for f in fs]
            means, counts, scale, projection, order = mean_embedding.forward(empty, y, k, **options)
            assert means.shape == (2, k, 23)
            assert not means.any()
            assert counts.tolist() == [0.0] * k
            grads = mean_embedding.backward(
                empty,
                y,
                moments=(1, 2),
                joint_weight=None,
                scale=scale,
                projection=projection,
                schedule=order,
                upstream=torch.ones_like(means),
            )
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
        options: dict[str, Any] = {
            "moments": (1, 2), "bound": bound, "clip": 1.0, "joint_weight": None
        }  # fmt: skip
        y = torch.tensor([0, 1, 1, 0])
        upstream = torch.randn(2, 2, 23, generator=torch.Generator().manual_seed(3))
        means, counts, grads = kernels(fs, y, 2, upstream, **options)
        expected, _, expected_grads = kernels(clean, y, 2, upstream, **options)
        assert torch.equal(means, expected)
        assert counts.tolist() == [2.0, 2.0]
        for grad, like in zip(grads, expected_grads, strict=True):
            assert torch.equal(grad, like)
            assert not grad[2].any()
            assert grad[[0, 1, 3]].flatten(1).any(dim=1).all()

    def test_one_bad_tap_spoils_only_itself_where_bounds_are_per_tap() -> None:
        fs = features(3)
        fs[0][1] = math.nan
        options: dict[str, Any] = {
            "moments": (1,), "bound": "sphere-per-tap", "clip": 1.0, "joint_weight": None
        }  # fmt: skip
        means, _, _ = kernels(fs, None, 1, torch.ones(1, 1, 23), **options)
        fs[0][1] = 0.0
        true_means, _ = reference.mean_embedding(
            [f.double() for f in fs], moments=(1,), bound="sphere-per-tap"
        )
        torch.testing.assert_close(means.double(), true_means, rtol=1e-6, atol=1e-7)

    def test_fourth_powers_that_overflow_leave_the_first_moment_alone() -> None:
        fs = [f * 1e10 for f in features(3)]
        options: dict[str, Any] = {
            "moments": (1, 2), "bound": "sphere", "clip": 1.0, "joint_weight": None
        }  # fmt: skip
        means, _, grads = kernels(fs, None, 1, torch.ones(2, 1, 23), **options)
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
        options: dict[str, Any] = {
            "moments": (1, 2), "bound": "sphere", "clip": 1.0, "joint_weight": None
        }  # fmt: skip
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
            means, _, scale, projection, order = mean_embedding.forward(fs, y, k, **options)
            grads = mean_embedding.backward(
                fs,
                y,
                moments=(1, 2),
                joint_weight=None,
                scale=scale,
                projection=projection,
                schedule=order,
                upstream=up,
                needed=[True, False],
            )
            assert grads[0].shape == tap.shape
            assert grads[1].numel() == 0
            results.append((means, grads[0].contiguous()))
        assert results[0][1].is_contiguous()
        for means, grad in results[1:]:
            torch.testing.assert_close(means, results[0][0], rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(grad, results[0][1], rtol=1e-5, atol=1e-7)
        grads = mean_embedding.backward(
            [f.contiguous()],
            y,
            moments=(1,),
            joint_weight=None,
            scale=scale[:1].contiguous(),
            projection=projection[:1].contiguous(),
            schedule=order,
            upstream=upstream[:1],
        )
        assert grads[0].stride() == f.contiguous().stride()

    def test_bfloat16_gradients() -> None:
        """Rounded to bfloat16 from float32 (the interpreter truncates: within one unit)."""
        fs = features(4, dtype=torch.bfloat16)
        options: dict[str, Any] = {
            "moments": (1, 2), "bound": "sphere", "clip": 1.0, "joint_weight": None
        }  # fmt: skip
        upstream = torch.randn(2, 1, 23, generator=torch.Generator().manual_seed(3))
        _, _, expected = kernels(fs, None, 1, upstream, **options)
        _, _, scale, projection, order = mean_embedding.forward(fs, None, 1, **options)
        grads = mean_embedding.backward(
            fs,
            None,
            moments=(1, 2),
            joint_weight=None,
            scale=scale,
            projection=projection,
            schedule=order,
            upstream=upstream,
        )
        for grad, like in zip(grads, expected, strict=True):
            assert grad.dtype == torch.bfloat16
            torch.testing.assert_close(grad.float(), like, rtol=2.0**-7, atol=1e-30)

    @pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (300, 4), (40, 300)])
    def test_schedule(n: int, k: int) -> None:
        """The stable order of the labels, where classes begin, and tiles that hold every image."""
        y = torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(n))
        taps = Taps([torch.ones(n, 1)])
        _, _, counts, order = row_statistics.row_statistics(
            taps, y, k, moments=(1,), bound="sphere", clip=1.0, joint_weight=None
        )
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
        fs, y = features(3), torch.tensor([0, 1, 1])
        options: dict[str, Any] = {"moments": (1,), "joint_weight": None}
        with pytest.raises(ValueError, match=r"labels: torch\.int32 \[3\] on cpu, expected int64"):
            mean_embedding.forward(fs, y.int(), 2, bound="sphere", clip=1.0, **options)
        means, _, scale, projection, order = mean_embedding.forward(
            fs, y, 2, bound="sphere", clip=1.0, **options
        )
        good = {"scale": scale, "projection": projection, "schedule": order, "upstream": means}
        for name, bad in (
            ("upstream", means[..., 1:]),
            ("upstream", means.double()),
            ("scale", scale[:, 1:]),
            ("projection", projection.double()),
            ("schedule", order[1:]),
        ):
            with pytest.raises(ValueError, match=f"{name}: torch"):
                mean_embedding.backward(fs, y, **options, **{**good, name: bad})
        with pytest.raises(ValueError, match=r"gradients\[1\]: torch\.float32 \[3, 6\]"):
            gradients.gradient_into(
                Taps(fs), order, scale, scale, means, gradients=[None, torch.empty(3, 6)], **options
            )

    def test_same_bits_again() -> None:
        fs, y = features(40), labels(40, 3)
        taps = Taps(fs)
        options: dict[str, Any] = {"moments": (1, 2), "joint_weight": None}
        scale, _, _, order = row_statistics.row_statistics(
            taps, y, 3, bound="sphere", clip=1.0, **options
        )
        once, again = (class_sums.class_sums(taps, order, scale, 3, **options) for _ in range(2))
        assert torch.equal(once, again)
