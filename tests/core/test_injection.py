"""The loss through the encoder's own ReLUs: what plain autograd gives."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dpmmd
from dpmmd._contract.slot import Slot
from dpmmd._cores import cpu
from dpmmd._cores.calls import Buffers
from dpmmd.bounds import Bound
from dpmmd.encoders import Encoder
from dpmmd.nn import MMDLoss
from tests.conftest import small_encoder
from tests.core.conformance import KINDS, LABELS, encoder_of, release_of


def step(loss: MMDLoss, labels: Tensor | None, n: int = 7) -> tuple[Tensor, Tensor]:
    x = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x.requires_grad_()
    value = loss(x, labels)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def compare(
    encoder: Encoder, release: dpmmd.Release, labels: Tensor | None, **options: Any
) -> None:
    plain = MMDLoss(release, encoder, backend="torch", **options).double()
    ours = MMDLoss(release, encoder, backend="torch", inject=True, **options).double()
    for _ in range(2):
        (value, gradient), (expected, truth) = step(ours, labels), step(plain, labels)
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
        assert float(truth.flatten(1).norm(dim=1).min()) > 0
        assert float((gradient - truth).norm()) <= 1e-12 * float(truth.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_say_which_taps_are_relus(kind: str) -> None:
    assert encoder_of(kind).rectified == ("one", "two", "three")
    assert encoder_of(kind, pool=4).rectified == ("two", "three")  # the first is pooled
    assert encoder_of(kind, taps=["linear", "one"]).rectified == ("one",)


def test_auto_takes_the_native_core() -> None:
    encoder = encoder_of("fire")
    release = release_of(encoder)
    found = []
    for backend in ("auto", "cpu"):
        loss = MMDLoss(release, encoder_of("fire"), backend=backend, inject=True).float()
        found.append(step(loss, LABELS)[1])
    assert torch.equal(*found)


def test_a_backbone_without_such_stages() -> None:
    encoder = small_encoder().double()
    assert encoder.rectified == ()
    compare(encoder, release_of(encoder), LABELS)


@pytest.mark.parametrize("name", ["squeezenet1.1", "efficientnet-lite0", "vgg11", "resnet18"])
def test_the_encoders_that_come_with_it(name: str) -> None:
    weights = "random" if name in ("vgg11", "resnet18") else None
    encoder = dpmmd.encoders.load(name, weights=weights, precision="float64")
    assert len(encoder.rectified) == {"efficientnet-lite0": 2}.get(name, len(encoder.taps))
    compare(encoder, release_of(encoder, moments=(1, 2)), LABELS)


def test_two_passes_at_once_do_not_mix() -> None:
    encoder = encoder_of("vgg")
    release = release_of(encoder)
    loss = MMDLoss(release, encoder, estimator="batch", backend="torch", inject=True).double()
    plain = MMDLoss(release, encoder, estimator="batch", backend="torch").double()
    xs = [
        torch.rand(7, 3, 8, 8, dtype=torch.float64).requires_grad_(),
        torch.rand(7, 3, 8, 8, dtype=torch.float64).requires_grad_(),
    ]
    loss(torch.rand(7, 3, 8, 8, dtype=torch.float64, requires_grad=True), LABELS)  # abandoned
    values = [loss(x, LABELS) for x in xs]
    for x, value in zip(reversed(xs), reversed(values), strict=True):
        (expected,) = torch.autograd.grad(plain(x, LABELS), x)
        (found,) = torch.autograd.grad(3 * value, x)
        torch.testing.assert_close(found, 3 * expected, rtol=1e-11, atol=1e-15)
        with pytest.raises(RuntimeError, match="second time"):
            value.backward()


def test_features_may_have_another_use_too() -> None:
    """What comes in from elsewhere is added; without a loss the ReLUs are ordinary ones."""
    encoder = encoder_of("vgg")
    x = torch.rand(4, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    slots = {name: Slot(Bound(), encoder.dim) for name in encoder.rectified}
    (expected,) = torch.autograd.grad(sum(f.square().sum() for f in encoder(x)), x)
    maps = encoder(x, slots)
    (found,) = torch.autograd.grad(sum(f.square().sum() for f in maps), x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_the_loss_writes_no_gradient_of_a_feature_that_its_relu_makes() -> None:
    encoder = encoder_of("vgg")
    release = release_of(encoder)
    handed: dict[bool, list[int]] = {}
    for inject in (False, True):
        loss = MMDLoss(release, encoder, estimator="batch", backend="torch", inject=inject).double()
        value = loss(torch.rand(7, 3, 8, 8, dtype=torch.float64, requires_grad=True), LABELS)
        nodes = [value.grad_fn]
        for node in nodes:
            assert node is not None
            if "MeanEmbedding" in node.name():
                break
            nodes += [following for following, _ in node.next_functions if following is not None]

        def note(grads: Any, _: Any, inject: bool = inject) -> None:
            handed[inject] = [0 if g is None else g.numel() for g in grads[-4:]]

        node.register_hook(note)
        value.backward()
    sizes = [7 * tap.size for tap in encoder.taps]
    assert handed[False] == sizes
    assert handed[True] == [0, 0, sizes[2], 0]  # but for the linear one


def test_what_has_no_injection_is_refused() -> None:
    encoder = encoder_of("vgg").float()
    release = release_of(encoder)
    with pytest.raises(ValueError, match=r"inject=True with backend='cuda': expected"):
        MMDLoss(release, encoder, backend="cuda", inject=True)
    with pytest.raises(ValueError, match=r"labels: torch.int64 \[7\]"):
        MMDLoss(release, encoder, inject=True)(torch.rand(3, 3, 8, 8), LABELS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ceiling", [None, 0.7])
@pytest.mark.parametrize("arriving", [True, False])
@pytest.mark.parametrize("shape", [(5, 3, 2, 7), (2, 70, 9, 8), (1, 1, 1, 1)])
def test_the_cores_gradient_of_a_relu(
    dtype: torch.dtype, ceiling: float | None, arriving: bool, shape: tuple[int, ...]
) -> None:
    """Of every element, with rows that have no scale and values that are no numbers."""
    rng = torch.Generator().manual_seed(0)
    n, columns = shape[0], prod(shape[1:])
    f = torch.randn(shape, generator=rng).clamp(0, ceiling).to(dtype)
    f = f.contiguous(memory_format=torch.channels_last)
    scale, projection = torch.rand(2, n, generator=rng), torch.rand(2, n, generator=rng)
    coefficients = torch.rand(2, n, generator=rng)
    for factor in (scale, projection, coefficients):
        factor[:, n - 1] = 0 if n > 1 else 1
    if n > 1:
        f[n - 1, 0, 0, 0] = torch.inf
    labels = torch.arange(n) % 2
    upstream = torch.randn(2, 3, columns, generator=rng)
    incoming = torch.randn(shape, generator=rng).to(dtype) if arriving else None  # another layout
    buffers = Buffers(scale, projection, upstream=upstream, coefficients=coefficients)
    found = cpu.rectified_gradient(f, incoming, ceiling, labels, 3, Bound((1, 2)), buffers)
    assert found.is_contiguous(memory_format=torch.channels_last)
    x = f.double().permute(0, 2, 3, 1).reshape(n, -1)
    of_class = upstream.double()[:, labels] / torch.bincount(labels, minlength=3)[labels][:, None]
    s, e = scale.double()[:, :, None], coefficients.double()[:, :, None]
    own = s[0] * of_class[0] - e[0] * x + 2 * x * (s[1] * of_class[1] - e[1] * x * x)
    if n > 1:
        own[n - 1] = 0
    expected = own.view(n, shape[2], shape[3], shape[1]).permute(0, 3, 1, 2)
    if incoming is not None:
        expected = expected + incoming.double()
    passes = (f > 0) & (f < (torch.inf if ceiling is None else ceiling))
    expected = torch.where(passes, expected, 0)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    assert bool((found[~passes] == 0).all())


def test_the_cores_gradient_refuses_what_does_not_fit() -> None:
    f, one, upstream = torch.rand(2, 3, 2, 2), torch.ones(1, 2), torch.ones(1, 1, 12)
    given = Buffers(one, one, upstream=upstream, coefficients=one)
    for changed, message in (
        ({"upstream": torch.ones(1, 1, 11)}, r"upstream: .*expected torch.float32 \[1, 1, 12\]"),
        ({"scale": torch.ones(2, 2)}, r"scale: .*expected torch.float32 \[1, 2\]"),
    ):
        with pytest.raises(ValueError, match=message):
            cpu.rectified_gradient(f, None, None, None, 1, Bound(), given._replace(**changed))
    with pytest.raises(ValueError, match=r"incoming: torch\.float64"):
        cpu.rectified_gradient(f, f.double(), None, None, 1, Bound(), given)
    with pytest.raises(ValueError, match="ceiling=0"):
        cpu.rectified_gradient(f, None, 0.0, None, 1, Bound(), given)
    y = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"labels: torch.int64 \[3\]"):
        cpu.rectified_gradient(f, None, None, y, 1, Bound(), given)


def test_statistics_are_of_what_is_stored() -> None:
    slot = Slot(Bound((1, 2)), 0)
    x = torch.randn(3, 4, 2, 2).to(torch.bfloat16)
    f = slot(x.clone(), torch.tensor([0.1, 0.2, -0.3, 0.0], dtype=torch.bfloat16), None)
    rows = f.double().flatten(1).numpy()
    for moment, square in zip((2, 4), slot.squares, strict=True):
        np.testing.assert_allclose(square.numpy(), (rows**moment).sum(axis=1), rtol=1e-5)
