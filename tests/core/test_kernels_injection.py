"""Gradient injection on Triton's kernels, under its interpreter, against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpmmd.bounds import BOUNDS, Bound
from dpmmd.nn import MMDLoss
from tests.core import interpreted

if not interpreted.ACTIVE:
    test_interpreted = interpreted.whole(__file__)
    test_interpreted_all = pytest.mark.long(interpreted.whole(__file__, "long"))
else:
    from dpmmd.kernels import table
    from dpmmd.kernels.row_statistics import rectify
    from tests.core.test_injection import KINDS, LABELS, encoder_of, release_of

    @pytest.fixture(autouse=True)
    def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
        """Small enough that taps have several blocks, the last of them not whole."""

        def lookup(operation: str, *_: object) -> table.Config:
            rows = table.TILE_ROWS if operation in ("row_dots", "gradient") else 4
            return table.Config(64, rows, 4, 1, 255)

        monkeypatch.setattr(table, "lookup", lookup)

    def results(
        kind: str, options: dict[str, Any], labels: Tensor | None, **more: Any
    ) -> list[list[Tensor]]:
        """Loss and image gradients on Triton in float32, and plainly in float64, two steps."""
        arguments = {"estimator": "batch", **more}
        encoder = encoder_of(kind, **arguments.pop("encoder", {}))
        release = release_of(encoder.float(), **options)
        ours = MMDLoss(release, encoder, backend="triton", inject=True, **arguments)
        found = [step(ours, labels, torch.float32) for _ in range(2)]
        encoder.double()
        object.__setattr__(
            release, "metadata", release.metadata.model_copy(update={"encoder": encoder.spec()})
        )
        plain = MMDLoss(release, encoder, backend="torch", **arguments).double()
        truth = [step(plain, labels, torch.float64) for _ in range(2)]
        return [found, truth]

    def step(loss: MMDLoss, labels: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        x = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
        x.requires_grad_()
        value = loss(x, labels)
        value.backward()
        assert x.grad is not None
        return [value.detach().double(), x.grad.double()]

    def compare(found: list[Any], truth: list[Any]) -> None:
        for (value, gradient), (expected, exact) in zip(found, truth, strict=True):
            torch.testing.assert_close(value, expected, rtol=2e-5, atol=1e-6)
            assert float((gradient - exact).norm()) <= 2e-5 * float(exact.norm())

    @pytest.mark.parametrize(
        ("kind", "bound"),
        [
            pytest.param(kind, bound, marks=[] if i % 4 == j else pytest.mark.long)
            for i, kind in enumerate(KINDS)
            for j, bound in enumerate(BOUNDS)
        ],
    )
    def test_bounds(kind: str, bound: str) -> None:
        options = {"bound": bound, "clip": 2.0, "moments": (1, 2)}
        compare(*results(kind, options, LABELS))

    @pytest.mark.parametrize(("moments", "classes"), [((1,), None), ((2,), 3)])
    def test_moments_and_labels(moments: tuple[int, ...], classes: int | None) -> None:
        options = {"moments": moments, "num_classes": classes}
        compare(*results("vgg", options, None if classes is None else LABELS))

    def test_a_joint_bound() -> None:
        options = {"moments": (1, 2), "joint_weight": 0.5}
        compare(*results("fire", options, LABELS))

    @pytest.mark.long
    @pytest.mark.parametrize("estimator", ["unbiased", "ema", "adam"])
    def test_estimators(estimator: str) -> None:
        compare(*results("vgg", {}, LABELS, estimator=estimator, lr=1e-2))

    def test_a_pooled_tap_takes_the_plain_path() -> None:
        compare(*results("vgg", {}, LABELS, encoder={"pool": 4}))

    def test_micro_batches() -> None:
        compare(*results("vgg", {}, LABELS, micro_batch=3))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("ceiling", [None, 0.5])
    @pytest.mark.parametrize("bias", [True, False])
    def test_rectify(dtype: torch.dtype, ceiling: float | None, bias: bool) -> None:
        """Statistics of what is stored, NaN kept, rows and blocks cut anywhere."""
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
