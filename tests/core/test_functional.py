"""The differentiable operations: their arguments, and what traces and compiles."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpmmd import functional, reference
from dpmmd._cores import cpu
from dpmmd.bounds import BOUNDS

MAPS = [(3, 4, 5), (7, 2, 1), (1, 1, 3)]


def features(
    n: int, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *s, generator=rng, dtype=torch.float64).relu().to(dtype) for s in shapes]


def labels(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(seed))


def test_gradcheck() -> None:
    fs = [f.requires_grad_() for f in features(4, [(2, 2, 2), (3,)])]
    y = torch.tensor([0, 2, 0, 1])
    for bound in BOUNDS:
        assert torch.autograd.gradcheck(
            lambda *f, b=bound: functional.mean_embedding(
                f, y, 3, moments=(1, 2), bound=b, clip=1.3
            )[0],
            fs,
        )


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
def test_unusable_rows_are_zero_and_harm_nobody(bound: str, bad: float) -> None:
    fs = features(5, [(2, 3, 3), (4, 1, 1)])
    clean = [f.clone() for f in fs]
    for f in fs:
        f[2] = bad
    for f in clean:
        f[2] = 0.0
    inputs = [f.requires_grad_() for f in fs]
    means, counts = functional.mean_embedding(inputs, moments=(1, 2), bound=bound)
    expected, _ = functional.mean_embedding(clean, moments=(1, 2), bound=bound)
    torch.testing.assert_close(means, expected)
    assert counts.tolist() == [5.0]
    means.square().sum().backward()
    for f in inputs:
        assert f.grad is not None
        assert torch.isfinite(f.grad).all()
        assert not f.grad[2].any()
        assert f.grad[[0, 1, 3, 4]].flatten(1).any(dim=1).all()


def test_no_images_and_absent_classes() -> None:
    means, counts = functional.mean_embedding(features(0, MAPS), labels(0, 3), 3)
    assert means.shape == (1, 3, 60 + 14 + 3)
    assert not means.any()
    assert counts.tolist() == [0, 0, 0]
    fs = features(2, MAPS)
    means, counts = functional.mean_embedding(fs, torch.tensor([1, 1]), 3)
    assert counts.tolist() == [0, 2, 0]
    assert not means[0, 0].any()
    target = torch.ones_like(means)
    loss = functional.mmd_loss(means, counts, target)
    assert loss == pytest.approx(float(((target - means)[0, 1] ** 2).sum()))


def test_layout_does_not_matter_and_order_is_channels_last() -> None:
    (f,) = features(3, [(4, 5, 6)])
    contiguous, _ = functional.mean_embedding([f])
    channels_last, _ = functional.mean_embedding([f.contiguous(memory_format=torch.channels_last)])
    strided, _ = functional.mean_embedding([torch.cat([f, f], dim=1)[:, :4]])
    torch.testing.assert_close(channels_last, contiguous, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(strided, contiguous, rtol=1e-14, atol=1e-15)
    expected = (f / f.flatten(1).norm(dim=1)[:, None, None, None]).mean(0).permute(1, 2, 0)
    torch.testing.assert_close(contiguous[0, 0], expected.flatten())


def test_mmd_loss() -> None:
    means = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    counts = torch.tensor([1.0, 0.0, 4.0], dtype=torch.float64)
    target = torch.randn(2, 3, 5, dtype=torch.float64)
    loss = functional.mmd_loss(means, counts, target)
    assert loss.item() == pytest.approx(reference.mmd_loss(means, counts, target).item())
    (grad,) = torch.autograd.grad(loss, means)
    torch.testing.assert_close(grad[:, [0, 2]], -2 * (target - means)[:, [0, 2]].detach())
    assert not grad[:, 1].any()
    with pytest.raises(ValueError, match=r"target: shape \(1, 3, 5\)"):
        functional.mmd_loss(means, counts, target[:1])


def test_double_backward_is_refused() -> None:
    fs = [f.requires_grad_() for f in features(3, [(4,)])]
    means, _ = functional.mean_embedding(fs)
    (grad,) = torch.autograd.grad(means.square().sum(), fs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


GOOD = features(3, [(4,), (2, 2, 2)], torch.float32)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((GOOD[0],), {}, "features: expected a non-empty sequence"),
        (([],), {}, "features: expected a non-empty sequence"),
        (([torch.zeros(3, 4, dtype=torch.int64)],), {}, r"features\[0\]: expected a floating"),
        (([GOOD[0], GOOD[1][:2]],), {}, r"features\[1\]: torch.float32 \[2, 2, 2, 2\]"),
        (([GOOD[0], GOOD[1].double()],), {}, r"features\[1\]: torch.float64"),
        ((GOOD, None, 3), {}, "labels=None"),
        ((GOOD, torch.tensor([0, 1, 3]), 3), {}, r"labels: values from 0 to 3, expected 0\.\.2"),
        ((GOOD, torch.tensor([0, 1, -1]), 3), {}, "labels: values from -1"),
        ((GOOD, torch.tensor([0.0, 1, 2]), 3), {}, "labels: torch.float32"),
        ((GOOD, torch.tensor([0, 1]), 3), {}, r"labels: torch.int64 \[2\]"),
        ((GOOD, None, 0), {}, "num_classes=0"),
        ((GOOD,), {"moments": (3,)}, r"moments=\(3,\)"),
        ((GOOD,), {"bound": "cube"}, "bound='cube'"),
        ((GOOD,), {"clip": 0.0}, "clip=0.0"),
        ((GOOD,), {"joint_weight": 1.0}, "joint_weight=1.0"),
        (
            (GOOD,),
            {"joint_weight": 1.0, "moments": (1, 2), "bound": "ball-per-tap"},
            "joint_weight=.*bound .sphere. or .ball.",
        ),
        ((GOOD,), {"backend": "cuda"}, r"backend=.cuda.: cannot run torch.float32 on cpu"),
    ],
)
def test_refusals(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        functional.mean_embedding(*arguments, **options)


class Recorded(TorchDispatchMode):
    """Names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(cpu.missing is not None, reason="dpmmd._native is not built")
@pytest.mark.parametrize("estimator", ["batch", "ema", "adam"])
def test_what_traces_sees_the_operators_and_gets_the_same(estimator: str) -> None:
    y, target = torch.tensor([0, 1, 1]), torch.rand(1, 2, 20)
    inputs = torch.rand(3, 2, 2, 2), torch.rand(3, 12)

    def step() -> list[Tensor]:
        fs = [f.clone().requires_grad_() for f in inputs]
        means, counts = functional.mean_embedding(fs, y, 2, backend="cpu")
        states = {
            "batch": (),
            "ema": ("estimate",),
            "adam": ("estimate", "first_moment", "second_moment"),
        }[estimator]
        state = {name: torch.zeros(1, 2, 20) for name in states}
        if state:
            state["steps"] = torch.zeros(2)
        options = {"batch": {}, "ema": {"decay": 0.5}, "adam": {"lr": 0.1}}[estimator]
        kind = "mmd_loss" if estimator == "batch" else f"{estimator}_loss"
        loss = getattr(functional, kind)(means, counts, target, **state, **options, backend="cpu")
        assert all(tensor._version > 0 for tensor in state.values())  # changed in place
        return [loss.detach(), *torch.autograd.grad(loss, fs), *state.values()]

    plain = step()
    with Recorded() as seen:
        traced = step()
    for a, b in zip(plain, traced, strict=True):
        assert torch.equal(a, b)
    ours = {name for name in seen.names if name.startswith("dpmmd::")}
    value = "squared_mmd" if estimator == "batch" else f"{estimator}_step"
    wanted = ("mean_embedding", "mean_embedding_backward", value, "with_gradient")
    assert ours == {f"dpmmd::{name}" for name in wanted}


@pytest.mark.skipif(cpu.missing is not None, reason="dpmmd._native is not built")
@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16, torch.device("meta")])
def test_torchs_defaults_do_not_matter(kind: torch.dtype | torch.device) -> None:
    f, y, target = torch.rand(3, 5), torch.tensor([0, 1, 1]), torch.rand(1, 2, 5)

    def step() -> list[Tensor]:
        x = f.clone().requires_grad_()
        means, counts = functional.mean_embedding([x], y, 2, backend="cpu")
        loss = functional.mmd_loss(means, counts, target, backend="cpu")
        return [means.detach(), counts, loss.detach(), *torch.autograd.grad(loss, x)]

    expected = step()
    before = torch.get_default_dtype()
    try:
        if isinstance(kind, torch.dtype):
            torch.set_default_dtype(kind)
            found = step()
        else:
            with kind:
                found = step()
    finally:
        torch.set_default_dtype(before)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.skipif(cpu.missing is not None, reason="dpmmd._native is not built")
def test_maps_without_channels() -> None:
    f = torch.rand(3, 5)
    expected, _ = functional.mean_embedding([f], backend="cpu")
    found, _ = functional.mean_embedding([torch.empty(3, 0, 2, 2), f], backend="cpu")
    assert torch.equal(found, expected)


@pytest.mark.skipif(cpu.missing is not None, reason="dpmmd._native is not built")
def test_tracing() -> None:
    def step(f: Tensor) -> Tensor:
        return functional.mean_embedding([f * 2], backend="cpu")[0]

    f = torch.rand(3, 5)
    assert torch.equal(torch.jit.trace(step, f)(f), step(f))
