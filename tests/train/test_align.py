"""Alignment: moments become those released, as far as these are more than noise."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dpmmd
from dpmmd import align
from dpmmd.encoders import pixels
from dpmmd.privacy import PrivacyError, Release
from tests.conftest import no_noise, nonnegative_encoder

SIDE, CLASSES, N = 6, 3, 6000


def drawn(seed: int, scale: float, n: int = N, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Images of correlated pixels: the covariance and the means of classes depend on the seed."""
    rng = np.random.default_rng(seed)
    d = channels * SIDE * SIDE
    mixing = np.eye(d) + 0.3 * np.random.default_rng(7).normal(size=(d, d)) / math.sqrt(d)
    mixing = mixing + scale * rng.normal(size=(d, d)) / math.sqrt(d)
    centres = 0.5 + 0.02 * rng.normal(size=(CLASSES, d))
    y = rng.integers(0, CLASSES, n)
    x = centres[y] + 0.06 * rng.normal(size=(n, d)) @ mixing.T
    x = (x.clip(0, 1) * 255).round().astype(np.uint8)
    return x.reshape(n, channels, SIDE, SIDE), y


def released(data: Any, epsilon: float, **options: Any) -> Release:
    options = {"num_classes": CLASSES, "pixel_moments": SIDE, "delta": 1e-5, **options}
    return dpmmd.release(
        data,
        nonnegative_encoder(),
        epsilon=epsilon,
        adjacency="replace-one",
        progress=False,
        **{"weights": {"phi1": 2.0**-20}, **options},
    )


def seeded(seed: int) -> Any:
    """Noise of the same law as the sampler's but for its last bit, the same at every call."""
    rng = np.random.default_rng(seed)
    return lambda n, sd: np.rint(rng.normal(0, sd, n)).astype(np.int64)


def applied(fitted: align.Alignment, data: tuple[np.ndarray, np.ndarray]) -> Tensor:
    x, y = (torch.from_numpy(part) for part in data)
    return fitted(x.float() / 255, y)


def within(x: Tensor, y: np.ndarray) -> tuple[Tensor, Tensor]:
    """Class means [K, d], and the covariance within the classes [d, d]."""
    x = x.flatten(1).double()
    means = torch.stack([x[torch.from_numpy(y == k)].mean(0) for k in range(CLASSES)])
    rest = x - means[torch.from_numpy(y)]
    return means, rest.T @ rest / len(x)


def spread_by_class(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The first class at half the contrast, the last at half as much again."""
    x, y = drawn(seed, 0.5)
    factor = np.array([0.5, 1.0, 1.5])[y][:, None, None, None]
    return ((x - 127.5) * factor + 127.5).clip(0, 255).round().astype(np.uint8), y


@pytest.mark.parametrize("pooled", [0.7, 0])
def test_classes_have_covariances_of_their_own(pooled: float) -> None:
    data, made = spread_by_class(1), drawn(2, 0.5)
    weights = {"phi1": 2.0**-20, "products": pooled}
    distances = {}
    for own in (0, 0.7):
        release = released(
            data, 50.0, insecure_test_noise=seeded(0), weights={**weights, "class_products": own}
        )
        fitted = align.fit(release, *made)
        assert fitted.matrix.ndim == (3 if own else 2)
        after = applied(fitted, made).flatten(1).double()
        distances[own] = [
            float(
                (after[torch.from_numpy(made[1] == k)].T.cov() - of_class(data, k).T.cov()).norm()
            )
            for k in (0, 2)
        ]
    for own, common in zip(distances[0.7], distances[0], strict=True):
        assert own < 0.7 * common


def lit(grey: float, others: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A grey class, the brightness of whose images varies by ``grey``, and coloured ones.

    The brightness of each channel varies by ``others`` in these, whatever the other two do.
    """
    rng = np.random.default_rng(seed)
    y = rng.integers(0, CLASSES, N)
    own = np.where(
        (y == 0)[:, None], grey * rng.normal(size=(N, 1)), others * rng.normal(size=(N, 3))
    )
    x = 0.5 + own[:, :, None, None] + 0.01 * rng.normal(size=(N, 1, SIDE, SIDE))
    return (255 * x).clip(0, 255).round().astype(np.uint8), y


def brightness(x: Tensor, y: np.ndarray, k: int) -> float:
    """Its standard deviation over the images of a class."""
    return float(x[torch.from_numpy(y == k)].flatten(1).mean(1).std())


@pytest.mark.parametrize("own", [0, 0.7])
def test_brightness_varies_as_is_released(own: float) -> None:
    """The bound norms images: a bright one weighs less in products, and a mean must weigh alike."""
    data, made = lit(0.15, 0.15, 1), lit(0.05, 0.05)
    weights = {"phi1": 2.0**-20, "class_products": own}
    release = released(data, 100.0, insecure_test_noise=seeded(0), weights=weights)
    after = applied(align.fit(release, *made), made)
    for k in range(CLASSES):
        true = brightness(torch.from_numpy(data[0]) / 255, data[1], k)
        generated = brightness(torch.from_numpy(made[0]) / 255, made[1], k)
        assert generated < 0.5 * true
        if own or k:  # one covariance for all classes is not that of the grey one
            assert brightness(after, made[1], k) == pytest.approx(true, rel=0.15)


def test_what_is_far_off_and_far_beyond_its_noise_is_believed() -> None:
    """A generator that hardly varies: noise is large beside its variance, and the data's larger."""
    data, made = lit(0.1, 0.1, 1), lit(0.01, 0.01)
    weights = {"phi1": 2.0**-20, "class_products": 0.7}
    release = released(data, 10.0, insecure_test_noise=seeded(0), weights=weights)
    after = applied(align.fit(release, *made), made)
    true = brightness(torch.from_numpy(data[0]) / 255, data[1], 0)
    assert brightness(after, made[1], 0) > 0.7 * true
    values, noise = torch.tensor([10.0, 3.0, 0.1]), torch.ones(3)
    found = align._believed(values, noise, torch.tensor(0.1))
    torch.testing.assert_close(found, torch.tensor([0.99, 1 / 11, 1 / 11]))


def test_a_class_that_varies_little_is_not_moved_as_the_others_are() -> None:
    data, made = lit(0.02, 0.15, 1), lit(0.02, 0.05)
    spread = {}
    for own in (0, 0.7):
        weights = {"phi1": 2.0**-20, "class_products": own}
        release = released(data, 20.0, insecure_test_noise=seeded(0), weights=weights)
        after = applied(align.fit(release, *made), made)
        spread[own] = brightness(after, made[1], 0)
    assert spread[0] > 0.04
    assert spread[0.7] < 1.25 * brightness(torch.from_numpy(data[0]) / 255, data[1], 0)
    saturation = (after.amax(1) - after.amin(1))[torch.from_numpy(made[1] == 0)]
    assert float(saturation.mean()) < 0.005


def of_class(data: tuple[np.ndarray, np.ndarray], k: int) -> Tensor:
    return torch.from_numpy(data[0][data[1] == k]).flatten(1).double() / 255


@pytest.mark.parametrize("channels", [1, 3])
def test_without_noise_the_moments_are_those_released(channels: int) -> None:
    data, made = drawn(1, 0.5, channels=channels), drawn(2, 0.5, channels=channels)
    release = released(data, 9999.0, insecure_test_noise=no_noise)
    known = release.metadata.model_copy(update={"sd": 1.0})  # of numbers of 2^30: no noise
    fitted = align.fit(replace(release, metadata=known), *made)
    wanted = within(torch.from_numpy(data[0]).float() / 255, data[1])
    before = within(torch.from_numpy(made[0]).float() / 255, made[1])
    after = within(applied(fitted, made), made[1])
    for one, other, target in zip(before, after, wanted, strict=True):
        away, still = (float((m - target).norm() / target.norm()) for m in (one, other))
        assert away > 0.05
        assert still < 0.25 * away  # images are weighted
    matrix = fitted.matrix.double()
    assert torch.allclose(matrix, matrix.T, atol=1e-5)  # Monge-Kantorovich: symmetric, positive
    assert float(torch.linalg.eigvalsh(matrix)[0]) > 0


def test_without_products_images_are_moved_by_their_means_alone() -> None:
    data, made = drawn(1, 0.5), drawn(2, 0.5)
    options = {"insecure_test_noise": seeded(0), "weights": {"phi1": 2.0**-20, "products": 0}}
    fitted = align.fit(released(data, 10.0, **options), *made)
    assert torch.equal(fitted.matrix, torch.eye(SIDE * SIDE))
    target, before = (within(torch.from_numpy(x).float() / 255, y)[0] for x, y in (data, made))
    after, _ = within(applied(fitted, made), made[1])
    assert float((after - target).norm()) < 0.2 * float((before - target).norm())
    also = released(data, 10.0, insecure_test_noise=seeded(0))
    assert also.metadata.sensitivity > released(data, 10.0, **options).metadata.sensitivity


def test_noise_alone_changes_nothing() -> None:
    """At an epsilon at which nothing stands out, images stay as they are."""
    data, made = drawn(1, 0.5), drawn(2, 0.5)
    changed = [
        align.fit(released(data, 1e-3, insecure_test_noise=seeded(i)), *made) for i in range(5)
    ]
    for fitted in changed:
        assert float((fitted.matrix - torch.eye(SIDE * SIDE)).norm()) < 1.0
    still = [torch.allclose(fitted.before, fitted.after, atol=1e-5) for fitted in changed]
    assert sum(still) >= 3


def test_less_noise_brings_the_images_nearer() -> None:
    data, made = drawn(1, 0.5), drawn(2, 0.5)
    target = within(torch.from_numpy(data[0]).float() / 255, data[1])

    def distances(x: Tensor) -> list[float]:
        found = within(x, made[1])
        return [float((a - b).norm() / b.norm()) for a, b in zip(found, target, strict=True)]

    def medians(epsilon: float) -> list[float]:
        """Of nine releases, relative to the images as they were."""
        found = []
        for seed in range(9):
            release = released(data, epsilon, insecure_test_noise=seeded(seed))
            found.append(distances(applied(align.fit(release, *made), made)))
        return (np.median(found, axis=0) / before).tolist()

    before = distances(torch.from_numpy(made[0]).float() / 255)
    means, covariances = zip(*map(medians, (0.1, 1.0, 10.0, 100.0)), strict=True)
    assert means[0] < 1.05
    assert means[3] < means[2] < 0.1 < means[1] < 0.6
    assert max(covariances[:2]) < 1.2
    assert covariances[3] < 0.4 < covariances[2] < 0.9


def test_the_noise_is_what_it_takes_it_for() -> None:
    """Variances along directions, over 60 releases, within six standard deviations."""
    data, runs, d = drawn(1, 0.5, n=300), 60, SIDE * SIDE
    matrix = pixels.transform(1, SIDE, SIDE)
    exact = align._Released(released(data, 20.0, delta=1e-6, insecure_test_noise=no_noise), matrix)
    noisy = [
        align._Released(released(data, 20.0, delta=1e-6, insecure_test_noise=seeded(i)), matrix)
        for i in range(runs)
    ]
    directions = torch.linalg.qr(torch.randn(d, d, dtype=torch.float64, generator=_rng()))[0]
    means = torch.stack([(r.means - exact.means) @ directions for r in noisy])
    assert exact.products is not None
    ratio = means.square() / exact.mean_noise(directions)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.1)
    found = torch.stack([_covariance(r) - _covariance(exact) for r in noisy])
    ratio = (directions.T @ found @ directions).square()
    ratio = ratio / exact.noise(exact.products, directions)
    assert float(ratio.mean()) == pytest.approx(1, abs=0.1)
    assert float(torch.diagonal(ratio, dim1=1, dim2=2).mean()) == pytest.approx(1, abs=0.2)


def _covariance(released: align._Released) -> Tensor:
    assert released.products is not None
    return released.products.covariance()


def _rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_the_row_is_of_norm_one_and_the_transform_has_an_inverse() -> None:
    x = torch.rand(5, 3, 9, 9, generator=_rng())
    x[0], x[1] = 0, 1
    encoder = pixels.pixel_moments(9, 3)
    (row,) = (tap.flatten(1) for tap in encoder(x))
    torch.testing.assert_close(row.norm(dim=1), torch.ones(5), rtol=1e-5, atol=0)
    matrix = pixels.transform(3, 9, 9)
    torch.testing.assert_close(torch.linalg.inv(matrix) @ matrix, torch.eye(243).double())
    assert float(torch.linalg.cond(matrix)) < 4  # weights are 1 to (1 + 8 sqrt(2))^(1/2)


def test_larger_images_keep_their_detail() -> None:
    data, made = drawn(1, 0.0), drawn(1, 0.0)
    fitted = align.fit(released(data, 9999.0, insecure_test_noise=no_noise), *made)
    x = torch.rand(4, 1, 24, 24, generator=_rng()) * 0.4 + 0.3
    x = x - F.interpolate(
        F.interpolate(x, (SIDE, SIDE), mode="bilinear"), (24, 24), mode="bilinear"
    )
    out = fitted(0.5 + 0.1 * x, torch.zeros(4, dtype=torch.int64))
    assert out.shape == x.shape
    fine = out - F.avg_pool2d(out, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    assert float(fine.square().mean()) > 0.5 * float((0.1 * x).square().mean())


def test_unlabelled() -> None:
    (x, _), made = drawn(1, 0.5), drawn(2, 0.5)
    release = released((x, None), 9999.0, num_classes=None, insecure_test_noise=no_noise)
    fitted = align.fit(release, made[0], None)
    out = fitted(torch.from_numpy(made[0]).float() / 255).double()
    mean = torch.from_numpy(x).double().mean(0) / 255
    assert float((out.mean(0) - mean).norm()) < 0.1 * float(
        (torch.from_numpy(made[0]).double().mean(0) / 255 - mean).norm()
    )


def test_what_is_refused() -> None:
    data = drawn(1, 0.5, n=300)
    with pytest.raises(PrivacyError, match="pixel_moments=SIDE"):
        align.fit(released(data, 1.0, pixel_moments=None), *data)
    release = released(data, 1.0)
    with pytest.raises(ValueError, match="3 channels, the release's have 1"):
        align.fit(release, *drawn(1, 0.5, n=30, channels=3))
    with pytest.raises(ValueError, match="some of all 3"):
        align.fit(release, data[0], np.zeros(300, np.int64))


def test_what_noise_makes_indefinite_does_not_add_variance() -> None:
    rng = torch.Generator().manual_seed(0)
    d = 40
    directions, _ = torch.linalg.qr(torch.randn(d, d, generator=rng, dtype=torch.float64))
    spread = torch.linspace(0.1, 2, d, dtype=torch.float64)
    noise = torch.randn(d, d, generator=rng, dtype=torch.float64) / 4
    relative = torch.eye(d, dtype=torch.float64) + (noise + noise.T) / 2
    assert torch.linalg.eigvalsh(relative)[0] < -0.5
    linear = align._transport(spread, directions, relative)
    covariance = linear @ (directions * spread) @ directions.T @ linear.T
    found = (directions.T @ covariance @ directions).diagonal()
    torch.testing.assert_close(found, spread * relative.diagonal())


def test_the_means_of_clipped_images_are_those_released() -> None:
    """Dark pixels that are made to vary more are clipped at 0, and yet do not get brighter."""
    rng = np.random.default_rng(0)
    levels = np.linspace(0.02, 0.5, SIDE * SIDE)
    x, made = (
        (levels + spread * rng.normal(size=(N, SIDE * SIDE))).clip(0, 1) for spread in (0.06, 0.02)
    )
    y = np.arange(N) % CLASSES
    x, made = (
        (255 * part).round().astype(np.uint8).reshape(N, 1, SIDE, SIDE) for part in (x, made)
    )
    fitted = align.fit(released((x, y), 9e3, insecure_test_noise=no_noise), made, y)
    dark = levels < 0.1
    expected = x.reshape(N, -1).mean(0)[dark] / 255
    plain = (made.reshape(N, -1) / 255 - fitted.before.mean(0).numpy()) @ fitted.matrix.T.numpy()
    without = (plain + x.reshape(N, -1).mean(0) / 255).clip(0, 1).mean(0)[dark]
    found = applied(fitted, (made, y)).flatten(1).mean(0).numpy()[dark]
    assert abs(without - expected).max() > 3e-3
    assert abs(found - expected).max() < 1e-3


@pytest.mark.parametrize("epsilon", [1.0, 9e3])
def test_what_is_black_in_a_class_stays_black(epsilon: float) -> None:
    """Noise in a class's mean would be painted into its background, the same in all images."""
    rng = np.random.default_rng(3)
    y = np.arange(N) % CLASSES
    shape, black = (N, SIDE * SIDE), np.arange(SIDE * SIDE) < 12
    sets = []
    for level in (0.5, 0.4):
        x = (level + 0.15 * rng.normal(size=shape)).clip(0, 1)
        x[np.ix_(y == 0, black)] = 0
        x[:, 24:] *= ~(rng.random((N, 12)) < 0.5)  # black in half of the images
        sets.append((255 * x).round().astype(np.uint8).reshape(N, 1, SIDE, SIDE))
    fitted = align.fit(released((sets[0], y), epsilon, insecure_test_noise=seeded(1)), sets[1], y)
    assert epsilon > 1 or float((fitted.after - fitted.before)[0, black].abs().max()) > 1 / 255
    found = applied(fitted, (sets[1], y)).flatten(1)
    assert not found[y == 0][:, black].any()
    # What is black in some images alone is moved where the mean is known.
    before = torch.from_numpy(sets[1]).flatten(1) / 255
    at_ends = (before == 0)[:, 24:]
    assert bool((found[:, 24:][at_ends] > 0).any())
