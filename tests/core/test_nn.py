"""The loss: what its estimators follow, what it refuses, and that it trains."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpmmd
from dpmmd import functional
from dpmmd.nn import ESTIMATORS, MMDLoss
from dpmmd.privacy import PrivacyError, Release
from tests.conftest import TwoTaps, images, small_encoder


def make_release(encoder: dpmmd.encoders.Encoder | None = None, **options: Any) -> Release:
    arguments = {
        "epsilon": 5.0,
        "delta": 1e-3,
        "adjacency": "replace-one",
        "num_classes": 3,
        "progress": False,
    }
    return dpmmd.release(images(200), encoder or small_encoder(), **{**arguments, **options})


def batch(n: int = 12, seed: int = 0, classes: int = 3) -> tuple[Tensor, Tensor]:
    x, y = images(n, seed, classes)
    return torch.from_numpy(x).float() / 255, torch.from_numpy(y)


def value_and_gradient(loss: MMDLoss, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x, y)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def difference(loss: MMDLoss, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    """target - means, straight from the functional layer, and the counts."""
    means, counts = functional.mean_embedding(
        loss.encoder(x),
        y,
        loss.num_classes,
        moments=loss.bound.moments,
        bound=loss.bound.kind,
        clip=loss.bound.clip,
        joint_weight=loss.bound.joint_weight,
    )
    return functional.mean_difference(means, counts, loss.by_class.target.to(means.dtype)), counts


RELEASES = {
    "phi1": {},
    "phi2": {"moments": (2,)},
    "phi1 and phi2": {"moments": (1, 2)},
    "joint": {"moments": (1, 2), "joint_weight": 0.5},
    "ball": {"bound": "ball", "clip": 3.0},
    "per tap": {"bound": "sphere-per-tap", "clip": 2.0},
    "unlabelled": {"num_classes": None},
}


@pytest.mark.parametrize("options", RELEASES.values(), ids=RELEASES)
def test_batch_is_the_squared_mmd_and_its_gradient(options: dict[str, Any]) -> None:
    encoder = small_encoder()
    release = make_release(encoder, **options)
    x, labels = batch()
    y = labels if release.metadata.labelled else None
    value, gradient = value_and_gradient(MMDLoss(release, encoder, estimator="batch"), x, y)

    pixels = x.clone().requires_grad_()
    means, counts = functional.mean_embedding(
        encoder(pixels),
        y,
        release.num_classes,
        **{k: v for k, v in options.items() if k != "num_classes"},
    )
    truth = functional.mmd_loss(means, counts, release.target)
    truth.backward()
    assert value > 0
    torch.testing.assert_close(value, truth.detach())
    assert pixels.grad is not None
    assert pixels.grad.abs().amax() > 0
    torch.testing.assert_close(gradient, pixels.grad)


def test_ema_without_memory_has_half_the_gradient_of_batch() -> None:
    """v = d, and the gradient of <v, d> is half that of |d|^2."""
    encoder = small_encoder()
    release = make_release(encoder)
    x, y = batch()
    plain, wanted = value_and_gradient(MMDLoss(release, encoder, estimator="batch"), x, y)
    loss = MMDLoss(release, encoder, estimator="ema", decay=0.0)
    value_and_gradient(loss, *batch(seed=5))  # leaves no trace
    value, gradient = value_and_gradient(loss, x, y)
    torch.testing.assert_close(value, plain)
    torch.testing.assert_close(2 * gradient, wanted)


def test_ema_is_the_weighted_mean_of_the_differences_seen() -> None:
    """Bias-corrected for each class by the steps in which that class was seen."""
    encoder = small_encoder()
    loss = MMDLoss(make_release(encoder), encoder, estimator="ema", decay=0.7).double()
    seen: list[list[Tensor]] = [[], [], []]
    for step, present in enumerate(([0, 1, 2], [0, 1], [0, 1], [2, 0])):
        x, y = batch(9, seed=step)
        y = torch.tensor(present)[y % len(present)]
        d, _ = difference(loss, x.double(), y)
        for k in set(y.tolist()):
            seen[k].append(d[:, k])
        value = loss(x.double(), y)
    expected = torch.zeros((), dtype=torch.float64)
    for k in (0, 2):  # those of the last batch
        weights = 0.7 ** torch.arange(len(seen[k]) - 1, -1, -1, dtype=torch.float64)
        v = sum(w * d for w, d in zip(weights / weights.sum(), seen[k], strict=True))
        expected = expected + (v * seen[k][-1]).sum()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0.0)
    assert loss.by_class.steps.tolist() == [4, 3, 2]


@pytest.mark.parametrize("options", [{}, {"moments": (1, 2)}])
def test_adam_is_torchs_adam_on_the_squared_distance(options: dict[str, Any]) -> None:
    """Each class has its own optimiser in the truth, stepped when the class is in the batch."""
    encoder = small_encoder()
    loss = MMDLoss(make_release(encoder, **options), encoder, estimator="adam", lr=1e-2).double()
    rows = [torch.zeros_like(loss.by_class.target[:, k]).requires_grad_() for k in range(3)]
    optimizers = [torch.optim.Adam([row], lr=1e-2) for row in rows]
    for step, present in enumerate(([0, 1, 2], [0, 1], [1], [0, 2], [0, 1, 2])):
        x, y = batch(9, seed=step)
        x, y = x.double(), torch.tensor(present)[y % len(present)]
        before = loss.by_class.difference.clone()
        d, counts = difference(loss, x, y)
        value = loss(x, y)
        for k in torch.nonzero(counts)[:, 0].tolist():
            optimizers[k].zero_grad()
            ((rows[k] - d[:, k]).square().sum() / d.numel()).backward()
            optimizers[k].step()
        truth = torch.stack([row.detach() for row in rows], dim=1)
        torch.testing.assert_close(loss.by_class.difference, truth, rtol=1e-9, atol=1e-15)
        torch.testing.assert_close(value, (truth * d).sum(), rtol=1e-9, atol=1e-15)
        absent = counts == 0
        assert torch.equal(loss.by_class.difference[:, absent], before[:, absent])
        assert not torch.equal(loss.by_class.difference[:, ~absent], before[:, ~absent])
    assert loss.by_class.steps.tolist() == [4, 4, 3]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_eval_mode_moves_nothing_and_training_mode_does(estimator: str) -> None:
    encoder = small_encoder()
    loss = MMDLoss(make_release(encoder), encoder, estimator=estimator)
    value_and_gradient(loss, *batch())
    before = copy.deepcopy(loss.state_dict())
    loss.eval()
    first, _ = value_and_gradient(loss, *batch(seed=1))
    again, _ = value_and_gradient(loss, *batch(seed=1))
    assert torch.equal(first, again)
    assert all(torch.equal(before[key], value) for key, value in loss.state_dict().items())
    loss.train()
    value_and_gradient(loss, *batch(seed=1))
    moved = [key for key, value in loss.state_dict().items() if not torch.equal(before[key], value)]
    assert bool(moved) == (estimator in ("ema", "adam"))
    assert all(not key.startswith("encoder.") for key in moved)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_state_dict_round_trip(estimator: str) -> None:
    encoder = small_encoder()
    release = make_release(encoder)
    loss = MMDLoss(release, encoder, estimator=estimator)
    for seed in range(3):
        value_and_gradient(loss, *batch(seed=seed))
    other = MMDLoss(release, small_encoder(), estimator=estimator)
    other.load_state_dict(copy.deepcopy(loss.state_dict()))
    for seed in range(3, 5):
        value, gradient = value_and_gradient(loss, *batch(seed=seed))
        value2, gradient2 = value_and_gradient(other, *batch(seed=seed))
        assert torch.equal(value, value2)
        assert torch.equal(gradient, gradient2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_it_lowers_the_mmd_in_a_plain_training_loop(estimator: str) -> None:
    encoder = small_encoder()
    release = make_release(encoder, epsilon=1000.0)
    pixels = nn.Parameter(torch.randn(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)))
    labels = torch.arange(12) % 3
    loss = MMDLoss(release, encoder, estimator=estimator, lr=0.05)
    optimizer = torch.optim.Adam([pixels], lr=0.01)
    truth = MMDLoss(release, encoder, estimator="batch")
    start = truth(pixels.sigmoid(), labels).item()
    for _ in range(80):
        optimizer.zero_grad()
        loss(pixels.sigmoid(), labels).backward()
        optimizer.step()
    assert truth(pixels.sigmoid(), labels).item() < 0.25 * start


def other_weights() -> dpmmd.encoders.Encoder:
    return dpmmd.encoders.Encoder(
        TwoTaps(),
        name="two-taps",
        weights_sha256="1" * 64,
        image_size=8,
        tap_signs={"a": "signed", "b": "nonnegative"},
    )


MISMATCHES = {
    "taps": (lambda: small_encoder(taps=["a"]), r"its taps is a, .*made with a, b"),
    "order": (lambda: small_encoder(taps=["b", "a"]), r"its taps is b, a, .*made with a, b"),
    "image_size": (lambda: _resized(16), r"its image_size is \[16, 16\], .*\[8, 8\]"),
    "pool": (lambda: small_encoder(pool=2), "its pool is 2, .*None"),
    "weights": (other_weights, "its weights_sha256 is '111.*'000"),
    "precision": (lambda: small_encoder().double(), "its precision is 'float64', .*'float32'"),
}


def _resized(side: int) -> dpmmd.encoders.Encoder:
    return dpmmd.encoders.Encoder(
        TwoTaps(),
        name="two-taps",
        weights_sha256="0" * 64,
        image_size=side,
        tap_signs={"a": "signed", "b": "nonnegative"},
    )


@pytest.mark.parametrize(("make", "message"), MISMATCHES.values(), ids=MISMATCHES)
def test_another_encoder_is_refused_by_the_field_that_differs(make: Any, message: str) -> None:
    with pytest.raises(PrivacyError, match=f"encoder: {message}.*from_spec"):
        MMDLoss(make_release(), make())


def test_labels_must_go_with_the_release() -> None:
    encoder = small_encoder()
    x, y = batch()
    with pytest.raises(ValueError, match=r"labels=None: the release is labelled; pass"):
        MMDLoss(make_release(encoder), encoder)(x)
    with pytest.raises(ValueError, match=r"labels=given: the release is unlabelled; leave out"):
        MMDLoss(make_release(encoder, num_classes=None), encoder)(x, y)
    with pytest.raises(ValueError, match=r"labels: values from 0 to 3, expected 0\.\.2"):
        MMDLoss(make_release(encoder), encoder)(x, y.clamp(max=1) * 3)
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        MMDLoss(make_release(encoder), encoder)(2 * x - 1, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"estimator": "mean"},
            "estimator='mean': expected one of 'batch', 'unbiased', 'ema', 'adam'",
        ),
        ({"decay": 1.0}, r"decay=1.0: expected a number in \[0, 1\)"),
        ({"lr": 0.0}, r"lr=0.0: expected a number in \(0, 1\)"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MMDLoss(make_release(), small_encoder(), **options)


def test_only_the_images_get_a_gradient_and_the_encoder_stays_in_eval_mode() -> None:
    encoder = small_encoder()
    loss = MMDLoss(make_release(encoder), encoder).train()
    value_and_gradient(loss, *batch())
    assert not [p for p in loss.parameters() if p.requires_grad or p.grad is not None]
    assert not encoder.training


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"moments": (1, 2)},
        {"moments": (1, 2), "joint_weight": 0.5},
        {"bound": "sphere-per-tap"},
    ],
)
def test_unbiased_is_the_mean_over_distinct_pairs(options: dict[str, Any]) -> None:
    encoder = small_encoder().double()
    release = make_release(encoder, **options)
    loss = MMDLoss(release, encoder, estimator="unbiased")
    x, _ = batch(7)
    x, y = x.double().requires_grad_(), torch.tensor([0, 0, 0, 0, 1, 1, 0])
    value = loss(x, y)

    def embedding(i: int) -> Tensor:
        means, _ = functional.mean_embedding(
            encoder(x[i : i + 1]),
            moments=release.metadata.moments,
            bound=release.metadata.bound,
            joint_weight=release.metadata.joint_weight,
        )
        return means.flatten()

    phi = torch.stack([embedding(i) for i in range(7)])
    expected = torch.zeros((), dtype=torch.float64)
    for k in (0, 1):
        members = [i for i in range(7) if y[i] == k]
        target = release.target[:, k].double().flatten()
        pairs = [phi[i] @ phi[j] for i in members for j in members if i != j]
        expected = expected + target @ target - 2 * target @ phi[members].mean(dim=0)
        expected = expected + torch.stack(pairs).mean()
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-10)
    (ours,) = torch.autograd.grad(value, x, retain_graph=True)
    (truth,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-11)


def test_unbiased_needs_a_sphere() -> None:
    with pytest.raises(ValueError, match=r"estimator='unbiased'.*bound='ball'"):
        MMDLoss(make_release(bound="ball"), small_encoder(), estimator="unbiased")
