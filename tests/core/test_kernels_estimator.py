"""Triton's estimators against plain torch in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpmmd import functional
from dpmmd._contract.protocol import Step
from tests.core import interpreted
from tests.core.interpreted import small_blocks  # noqa: F401

if not interpreted.ACTIVE:
    test_interpreted = interpreted.whole(__file__)
else:
    from dpmmd.kernels.estimator import estimate

    pytestmark = pytest.mark.usefixtures("small_blocks")

    COUNTS = [torch.tensor(c) for c in ([2.0, 0.0, 1.0], [3.0, 3.0, 0.0], [0.0, 1.0, 1.0])]

    def state(estimator: str, shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Tensor]:
        names = {"batch": (), "ema": ("estimate",)}.get(
            estimator, ("estimate", "first_moment", "second_moment")
        )
        tensors = {name: torch.zeros(shape, dtype=dtype) for name in names}
        return tensors | ({"steps": torch.zeros(shape[1], dtype=dtype)} if names else {})

    def truth(
        estimator: str,
        means: Tensor,
        counts: Tensor,
        target: Tensor,
        tensors: dict[str, Tensor],
        dtype: torch.dtype,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        m = means.to(dtype).requires_grad_()
        arguments = (m, counts.to(dtype), target.to(dtype))
        if estimator == "batch":
            loss = functional.mmd_loss(*arguments, backend="torch")
        elif estimator == "ema":
            options.pop("lr")
            loss = functional.ema_loss(*arguments, **tensors, **options, backend="torch")
        else:
            options.pop("decay")
            loss = functional.adam_loss(*arguments, **tensors, **options, backend="torch")
        (grad,) = torch.autograd.grad(loss, m)
        return loss.detach(), grad

    def error(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b).norm() / b.norm().clamp(min=1e-30))

    @pytest.mark.parametrize(
        ("estimator", "decay"),
        [("batch", 0.0), ("ema", 0.0), ("ema", 0.3), ("ema", 0.999), ("adam", 0.0)],
    )
    @pytest.mark.parametrize("columns", [1, 16, 21])
    def test_steps(estimator: str, columns: int, decay: float) -> None:
        """Three steps, the last without update; classes come and go."""
        rng = torch.Generator().manual_seed(0)
        shape = (2, 3, columns)
        ours = state(estimator, shape, torch.float32)
        rough, exact = (state(estimator, shape, t) for t in (torch.float32, torch.float64))
        for step, counts in enumerate(COUNTS):
            means, target = (torch.randn(shape, generator=rng) for _ in range(2))
            options: dict[str, Any] = {"decay": decay, "lr": 1e-2, "update": step < 2}
            if estimator == "adam":
                options["numbers"] = 1000
            value, grad = estimate(means, counts, target, Step(estimator, **ours, **options))
            rough_value, rough_grad = truth(
                estimator, means, counts, target, rough, torch.float32, **options
            )
            true_value, true_grad = truth(
                estimator, means, counts, target, exact, torch.float64, **options
            )
            slack = 2.0**-22  # two roundings, where plain torch happens to make none
            assert value.shape == ()
            assert error(value, true_value) <= 2 * error(rough_value, true_value) + slack
            assert error(grad, true_grad) <= 3 * error(rough_grad, true_grad) + slack
            assert not grad[:, counts == 0].any()
            for name, tensor in ours.items():
                assert error(tensor, exact[name]) <= 2 * error(rough[name], exact[name]) + slack
                if name == "steps":
                    assert torch.equal(tensor.double(), exact[name])

    def test_no_columns() -> None:
        tensors = state("ema", (1, 3, 0), torch.float32)
        nothing = torch.zeros(1, 3, 0)
        step = Step("ema", decay=0.5, **tensors)
        value, grad = estimate(nothing, COUNTS[0], nothing.clone(), step)
        assert value == 0
        assert grad.shape == (1, 3, 0)
        assert tensors["steps"].tolist() == [1.0, 0.0, 1.0]

    def test_refusals() -> None:
        means = torch.zeros(1, 3, 4)
        with pytest.raises(ValueError, match=r"target: torch.float32 \[1, 3, 5\]"):
            estimate(means, COUNTS[0], torch.zeros(1, 3, 5), Step())
        with pytest.raises(ValueError, match=r"means: torch.float64"):
            estimate(means.double(), COUNTS[0], means, Step())
        its_own = Step("ema", estimate=means, steps=torch.zeros(3), decay=0.5)
        with pytest.raises(ValueError, match="estimate: shares memory with means"):
            estimate(means, COUNTS[0], means.clone(), its_own)
