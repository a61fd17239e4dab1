"""The native estimators: threads, upstream gradients, what traces and compiles."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dpmmd import functional
from dpmmd._contract.protocol import Step
from dpmmd._cores import cpu
from dpmmd._cores.matching import CORE

pytestmark = pytest.mark.skipif(cpu.missing is not None, reason="dpmmd._native is not built")

ESTIMATORS = ("batch", "ema", "adam")


def problem(shape: tuple[int, int, int], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Means, counts (class 1 absent in even steps) and target."""
    rng = torch.Generator().manual_seed(step)
    means, target = (torch.randn(shape, generator=rng) for _ in range(2))
    counts = torch.randint(1, 5, shape[1:2], generator=rng).float()
    if shape[1] > 1 and step % 2 == 0:
        counts[1] = 0
    return means, counts, target


def loss_of(
    estimator: str, shape: tuple[int, int, int], dtype: torch.dtype, backend: str
) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """An estimator with fresh state: loss(means, counts, target, update), and the state."""
    if estimator == "batch":
        return lambda m, c, t, _: functional.mmd_loss(m, c, t, backend=backend), {}
    names = ["estimate"] if estimator == "ema" else ["estimate", "first_moment", "second_moment"]
    state = {name: torch.zeros(shape, dtype=dtype) for name in names}
    state["steps"] = torch.zeros(shape[1], dtype=dtype)
    if estimator == "ema":
        return (
            lambda m, c, t, update: functional.ema_loss(
                m, c, t, **state, decay=0.9, update=update, backend=backend
            ),
            state,
        )
    return (
        lambda m, c, t, update: functional.adam_loss(
            m, c, t, **state, lr=1e-2, update=update, backend=backend
        ),
        state,
    )


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_same_bits_for_any_number_of_threads(estimator: str) -> None:
    shape = (2, 3, 40_001)
    results = []
    for threads in (1, 2, 16):
        _, state = loss_of(estimator, shape, torch.float32, "cpu")
        state = {name: value.clone() for name, value in state.items()}
        for step in range(2):
            means, counts, target = problem(shape, step)
            moved = Step(estimator, decay=0.9, lr=1e-2, **state)
            out = CORE.estimate(means, counts, target, moved, threads=threads)
        results.append([*out, *state.values()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_gradient_times_upstream() -> None:
    means, counts, target = problem((1, 3, 50), 1)
    means.requires_grad_()
    loss = functional.mmd_loss(means, counts, target, backend="cpu")
    (once,) = torch.autograd.grad(loss, means, retain_graph=True)
    (twice,) = torch.autograd.grad(2 * loss, means, retain_graph=True)
    (again,) = torch.autograd.grad(loss, means)
    torch.testing.assert_close(twice, 2 * once)
    assert torch.equal(once, again)
    torch.testing.assert_close(once, -2 * (target - means.detach()))


def test_double_backward_is_refused() -> None:
    means, counts, target = problem((1, 3, 50), 1)
    means.requires_grad_()
    loss = functional.mmd_loss(means, counts, target, backend="cpu")
    (grad,) = torch.autograd.grad(loss, means, create_graph=True)
    torch.testing.assert_close(grad.detach(), -2 * (target - means.detach()))
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.square().sum().backward()


def test_what_the_native_core_does_not_take_runs_in_torch() -> None:
    means, counts, target = problem((1, 3, 50), 1)
    target.requires_grad_()
    functional.mmd_loss(means, counts, target).backward()
    assert target.grad is not None
    with pytest.raises(ValueError, match=r"backend='cpu': cannot run torch.float64"):
        functional.mmd_loss(means.double(), counts.double(), target.double(), backend="cpu")


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_opcheck(estimator: str) -> None:
    means, counts, target = problem((2, 3, 20), 1)
    if estimator == "batch":
        torch.library.opcheck(torch.ops.dpmmd.squared_mmd.default, (means, counts, target, "cpu"))
        arguments = (means.clone().requires_grad_(), torch.tensor(2.0), torch.rand(means.shape))
        torch.library.opcheck(torch.ops.dpmmd.with_gradient.default, arguments)
        return
    _, state = loss_of(estimator, (2, 3, 20), torch.float32, "cpu")
    op = getattr(torch.ops.dpmmd, f"{estimator}_step").default
    numbers = (None,) if estimator == "adam" else ()
    torch.library.opcheck(op, (means, counts, target, *state.values(), 0.9, *numbers, True, "cpu"))


def test_compiles_in_one_graph() -> None:
    results = []
    for compiled in (False, True):
        loss, state = loss_of("adam", (2, 3, 20), torch.float32, "auto")
        if compiled:
            loss = torch.compile(loss, fullgraph=True, backend="aot_eager")
        out = []
        for step in range(2):
            means, counts, target = problem((2, 3, 20), step)
            means.requires_grad_()
            value = loss(means, counts, target, True)
            out += [value.detach(), *torch.autograd.grad(value, means)]
        results.append([*out, *(value.clone() for value in state.values())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
