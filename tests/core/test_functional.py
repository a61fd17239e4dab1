"""The differentiable operations against `dpmmd.reference` in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dpmmd import functional, reference
from dpmmd._cores import cpu
from dpmmd.bounds import BOUNDS, MOMENTS

SHAPES = {
    "maps": [(3, 4, 5), (7, 2, 1), (1, 1, 3)],
    "one flat tap": [(33,)],
    "odd": [(1,), (5, 3), (2, 1, 1)],
    "fifty": [(2, 1, 1)] * 50,
}


def features(
    n: int, shapes: list[tuple[int, ...]], dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *s, generator=rng, dtype=torch.float64).relu().to(dtype) for s in shapes]


def labels(n: int, k: int, seed: int = 1) -> Tensor:
    return torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(seed))


def both(fs: list[Tensor], y: Tensor | None, k: int, **options: object) -> tuple[Tensor, ...]:
    """Values and gradients of a random linear function of the means: ours, then the reference."""
    out = []
    weight = None
    for function in (functional.mean_embedding, reference.mean_embedding):
        truth = function is reference.mean_embedding
        inputs = [(f.double() if truth else f).detach().requires_grad_() for f in fs]
        means, counts = function(inputs, y, k, **options)  # type: ignore[operator]
        if weight is None:
            weight = torch.randn(means.shape, generator=torch.Generator().manual_seed(2))
        (means * weight.to(means.dtype)).sum().backward()
        grads = torch.cat([i.grad.double().flatten() for i in inputs if i.grad is not None])
        out += [means.detach().double(), counts.double(), grads]
    return tuple(out)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("moments", MOMENTS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(
    bound: str, moments: tuple[int, ...], shapes: list[tuple[int, ...]]
) -> None:
    fs = features(9, shapes)
    norms = torch.cat([f.flatten(1) for f in fs], dim=1).norm(dim=1)
    clip = 1.01 * float(norms.median())  # balls clip about half of the vectors, none at the edge
    means, counts, grads, true_means, true_counts, true_grads = both(
        fs, labels(9, 4), 4, moments=moments, bound=bound, clip=clip
    )
    torch.testing.assert_close(means, true_means, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(counts, true_counts)
    torch.testing.assert_close(grads, true_grads, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("bound", ["sphere", "ball"])
def test_joint_bound(bound: str) -> None:
    fs = features(8, SHAPES["maps"])
    result = both(fs, labels(8, 3), 3, moments=(1, 2), bound=bound, clip=2.0, joint_weight=0.3)
    torch.testing.assert_close(result[0], result[3], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(result[2], result[5], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("moments", MOMENTS)
def test_lower_precision_is_no_worse_than_plain_torch(
    dtype: torch.dtype, moments: tuple[int, ...]
) -> None:
    """Error at most twice (gradients thrice) that of the plain formulas in the same precision."""
    fs = features(32, [(8, 6, 6), (16, 3, 3)], dtype)
    y = labels(32, 4)
    means, _, grads, true_means, _, true_grads = both(fs, y, 4, moments=moments)
    inputs = [f.detach().requires_grad_() for f in fs]
    plain, _ = reference.mean_embedding(inputs, y, 4, moments=moments)
    weight = torch.randn(plain.shape, generator=torch.Generator().manual_seed(2))
    (plain * weight.to(plain.dtype)).sum().backward()
    plain_grads = torch.cat([i.grad.double().flatten() for i in inputs if i.grad is not None])

    def error(a: Tensor, b: Tensor) -> float:
        return float((a.detach().double() - b).norm() / b.norm())

    assert error(means, true_means) <= 2 * error(plain, true_means) + 1e-7
    assert error(grads, true_grads) <= 3 * error(plain_grads, true_grads) + 1e-7
    assert torch.nn.functional.cosine_similarity(grads, true_grads, dim=0) > 0.999


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


def test_each_image_alone_is_the_truth() -> None:
    fs = features(6, SHAPES["maps"])
    y = labels(6, 2)
    means, counts = functional.mean_embedding(fs, y, 2)
    total = torch.zeros_like(means)
    for i in range(6):
        one, _ = functional.mean_embedding([f[i : i + 1] for f in fs], y[i : i + 1], 2)
        assert one.norm() == pytest.approx(1.0)
        total += one
    torch.testing.assert_close(means * counts[None, :, None], total, rtol=1e-12, atol=1e-14)


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
    means, counts = functional.mean_embedding(features(0, SHAPES["maps"]), labels(0, 3), 3)
    assert means.shape == (1, 3, 60 + 14 + 3)
    assert not means.any()
    assert counts.tolist() == [0, 0, 0]
    fs = features(2, SHAPES["maps"])
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


@pytest.mark.parametrize("scale", [1e-12, 1e-7, 1e-3, 1e3, 1e4])
@pytest.mark.parametrize("moments", [(1,), (2,)])
def test_gradients_of_small_and_large_features_are_finite(
    scale: float, moments: tuple[int, ...]
) -> None:
    """The scale of a small vector is large; its cube overflows float32."""
    if moments == (2,) and scale < 1e-8:
        scale = 1e-8  # below that the squares themselves leave float32
    fs = [(f * scale).requires_grad_() for f in features(4, [(5,), (3,)], torch.float32)]
    means, _ = functional.mean_embedding(fs, moments=moments)
    means.square().sum().backward()
    grads = torch.cat([f.grad.flatten() for f in fs if f.grad is not None])
    assert torch.isfinite(grads).all()
    assert grads.any()


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
