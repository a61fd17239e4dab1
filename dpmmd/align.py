"""Alignment: images moved so that the first two moments of their pixels are those released.

A generator matches features. These leave the variances of fine detail free, on which a classifier
that is trained on its images relies. A release with ``pixel_moments`` holds noised means of the
pixels, class by class, and of their products, over all classes. (Without products, of weight 0, T
is the identity; with ``class_products`` every class has a T of its own, which follows the common
one unless that takes the class further from its own covariance.) `fit` finds an affine map of
images for each class, with one linear part for all,

    x  ->  T (x - m_k) + m'_k,

where T is the Monge-Kantorovich map from the covariance within the classes of generated images to
the released one: of all linear maps between them the one that changes images least in the mean
square (Peyre and Cuturi, "Computational optimal transport", 2019, remark 2.31). Only the release
and generated images are read: it costs no privacy.

The released numbers are noisy, and how noisy is known. Their differences from generated moments are
taken along the directions of the generated covariance, relative to its standard deviations there.
Each is multiplied by t / (t + s), s being the variance of its noise, and t that of the true
differences in the same groups of directions: what the squares have beyond s, less two standard
errors. A group in which nothing stands out from the noise is left as it is, but for numbers that
are beyond five standard deviations of their own noise.

Moments are weighted means, since the bound norms images: weights are 1 / |(u, c)| for class means
and 1 / |(u, c)|^2 for products (`dpmmd.encoders.pixels`), for released and generated images alike.
A covariance takes its mean by the weights of the products, which hold it too: class by class, or of
all classes together. In the second case the means of the classes lie about it as their means by the
first weights do, and the covariance within the classes is met approximately.

Where a background is black in all images of a class, real and generated, the map would paint into
it what noise is left in the class's mean, faint but the same in all of them: a classifier that is
trained on many such images takes that for the class. So a pixel at an end of [0, 1] stays there,
and one within two standard errors of the shift (of its class, at that pixel) changes less, unless
the released mean of that pixel is itself more than twice as far from the ends. An offset of each
pixel and class brings the means of the images that come out to those released, as far as pixels
change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpmmd.encoders.pixels import augmented, constant, transform
from dpmmd.privacy import PrivacyError, Release

_ERRORS = 2.0  # standard errors taken off an estimated variance, and within which changes fade
_MOST = 0.1  # of a relative difference: the variance that is believed of a group
_ALONE = 5.0  # standard deviations of its noise, at which a number is believed by itself
_LEAST = 0.02  # of the variance that is left of a direction
_ROUNDS = 10  # of finding offsets
_STEP = 0.05  # the most that an offset changes in one
_RIDGE = 0.01  # of the share of a pixel's images that change: below its root, offsets fade
_LEAST_EDGE = 1e-4  # of [0, 1], where there is no noise
_FLOOR = 1e-6  # of the largest variance: below it a direction is constant in generated images


class Alignment(nn.Module):
    """The map x -> T (x - m_k) + m'_k, on images brought to the release's side.

    Larger images keep their detail: what the map changes in the small image is enlarged and added.

    Attributes:
        matrix: T [d, d], or [K, d, d] where each class has its own.
        before, after: m and m' [K, d], m' less what clipping adds.
        edge: [K, d], how far from the ends of [0, 1] a pixel changes as it should.
        least: [K, d], how much of a change is made at the ends.
        shape: (C, h, w) of the small images, d = C * h * w.
    """

    matrix: Tensor
    before: Tensor
    after: Tensor
    edge: Tensor
    least: Tensor

    def __init__(
        self,
        matrix: Tensor,
        before: Tensor,
        after: Tensor,
        edge: Tensor,
        least: Tensor,
        shape: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("matrix", matrix)
        self.register_buffer("before", before)
        self.register_buffer("after", after)
        self.register_buffer("edge", edge)
        self.register_buffer("least", least)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images [n, C, H, W] in [0, 1], aligned, in [0, 1].

        Args:
            images: of the generator that this was fitted to.
            labels: int64 [n]; None: all of class 0.
        """
        if labels is None:
            labels = torch.zeros(len(images), dtype=torch.int64, device=images.device)
        x = _small(images, self.shape)
        moved = x - self.before[labels]
        if self.matrix.ndim == 2:
            moved = moved @ self.matrix.T
        else:
            for k in labels.unique().tolist():
                moved[labels == k] = moved[labels == k] @ self.matrix[k].T
        moved += self.after[labels]
        change = (moved - x).view(-1, *self.shape)
        edge, least = (each[labels].view_as(change) for each in (self.edge, self.least))
        if change.shape != images.shape:
            change, edge, least = (
                F.interpolate(each, images.shape[-2:], mode="bilinear", align_corners=False)
                for each in (change, edge, least)
            )
        return images + _room(images, edge, least) * ((images + change).clamp(0, 1) - images)


def _room(x: Tensor, edge: Tensor, least: Tensor) -> Tensor:
    """What is done of a change of x in [0, 1]: ``least`` at the ends, 1 from ``edge`` on."""
    return (torch.minimum(x, 1 - x) / edge + least).clamp(0, 1)


def fit(release: Release, images: NDArray[np.uint8], labels: NDArray[np.int64] | None) -> Alignment:
    """The alignment of a generator's images with a release.

    Args:
        release: made with ``pixel_moments``.
        images: uint8 [n, C, H, W], many (20,000) of the generator's, as they are to be sampled.
        labels: int64 [n], or None.

    Raises:
        PrivacyError: the release has no pixel moments.
        ValueError: images of another number of channels, or a class without any.
    """
    if release.pixels is None:
        raise PrivacyError(
            "release: it holds no moments of pixels; make one with pixel_moments=SIDE, or sample "
            "without alignment."
        )
    spec = release.metadata.pixel_encoder or {}
    d = release.pixels.shape[1] - 1
    height, width = spec["image_size"]
    shape = (d // (height * width), height, width)
    classes = release.num_classes
    if images.shape[1] != shape[0]:
        raise ValueError(f"images: {images.shape[1]} channels, the release's have {shape[0]}.")
    y = torch.zeros(len(images), dtype=torch.int64)
    if labels is not None:
        y = torch.from_numpy(labels)
    n = torch.bincount(y, minlength=classes)
    if len(n) != classes or not bool((n > 1).all()):
        raise ValueError(f"labels: {n.tolist()} images by class, expected some of all {classes}.")

    matrix = transform(*shape)
    released = _Released(release, matrix)
    made = _Generated(images, y, shape, matrix, released.shares, released.by_class is not None)
    spread, directions = torch.linalg.eigh(made.within)  # ascending
    spread = spread.clamp(min=_FLOOR * float(spread[-1]))
    groups = list(_groups(d))

    # Class means, relative to the standard deviations of generated images.
    gap = (released.means - made.means) @ directions / spread.sqrt()  # [K, d]
    noise = released.mean_noise(directions) / spread  # [K, d]
    error = torch.zeros_like(gap)  # variance of the noise that is left
    for group in groups:
        signal = _signal(gap[:, group], noise[:, group])
        believed = _believed(gap[:, group], noise[:, group], signal)
        gap[:, group] *= believed
        error[:, group] = believed.square() * noise[:, group]
    shift = (gap * spread.sqrt()) @ directions.T
    edge = _ERRORS * ((error * spread) @ directions.square().T).sqrt()  # [K, d]

    linear = torch.eye(d, dtype=torch.float64)
    if released.products is not None:
        gap = released.products.covariance(made.centres + shift, made.shares) - made.within
        noise = released.noise(released.products, directions)
        gap = directions.T @ gap @ directions
        linear = _transport(spread, directions, _shrunk(gap, noise, spread, groups))
    maps = linear
    if released.by_class is not None:
        maps = torch.stack(
            [
                _of_class(released, each, made.within_class(k), linear, groups)
                for k, each in enumerate(released.by_class)
            ]
        )
    wanted = (made.means + shift).float()
    edge = edge.clamp(min=_LEAST_EDGE).float()
    least = (torch.minimum(wanted, 1 - wanted) / edge - 1).clamp(0, 1)
    fitted = Alignment(maps.float(), made.means.float(), wanted.clone(), edge, least, shape)
    for k in range(classes):
        small = _small(torch.from_numpy(images[(y == k).numpy()]).float() / 255, shape)
        linear = fitted.matrix if fitted.matrix.ndim == 2 else fitted.matrix[k]
        moved = (small - fitted.before[k]) @ linear.T
        room = _room(small, edge[k], least[k])
        _offset(fitted.after[k], small, moved, room, wanted[k], matrix.float())
    return fitted


def _of_class(
    released: _Released,
    own: _Products,
    within: Tensor,
    linear: Tensor,
    groups: list[NDArray[np.int64]],
) -> Tensor:
    """T [d, d] of one class, which follows the common T only where that brings the class nearer.

    What the common T changes is a mean over classes. A class that varies in another way, such as a
    grey one among coloured ones, may be left further from its own covariance than it was, along
    many directions by too little each to stand out from the noise. All of them together may do so:
    the class does not follow where that takes it further away by more than a standard error.

    Args:
        own: what is released of the class.
        within: its generated covariance.
        linear: the common T.
    """
    wanted, moved = own.covariance(), linear @ within @ linear
    _, directions = torch.linalg.eigh(within)
    noise = released.noise(own, directions)
    still, after = (directions.T @ (wanted - each) @ directions for each in (within, moved))
    gained = ((still.square() - after.square()) / noise).sum()
    error = (8 * (still - after).square() / noise).sum().sqrt()  # every number occurs twice
    if gained < -error:
        linear, moved = torch.eye(len(linear), dtype=linear.dtype), within
    spread, directions = torch.linalg.eigh(moved)
    spread = spread.clamp(min=_FLOOR * float(spread[-1]))
    noise = released.noise(own, directions)
    gap = directions.T @ (wanted - moved) @ directions
    return _transport(spread, directions, _shrunk(gap, noise, spread, groups)) @ linear


def _offset(
    after: Tensor, small: Tensor, moved: Tensor, room: Tensor, wanted: Tensor, matrix: Tensor
) -> None:
    """Changes ``after`` [d] so that the weighted mean of what comes out of ``small`` is ``wanted``.

    Args:
        small: images [n, d].
        moved: the same through the linear part, to which ``after`` is added.
        room: how much of a change is made of each, [n, d].
        wanted: [d].
        matrix: of `dpmmd.encoders.pixels.transform`, for the weights.
    """
    first = after.clone()
    for _ in range(_ROUNDS):
        x = moved + after
        out = small + room * (x.clamp(0, 1) - small)
        size = constant(len(matrix)) ** 2 + (out @ matrix.T).square().sum(1)
        weights = F.normalize(size.rsqrt(), p=1, dim=0)
        share = weights @ (room * ((x > 0) & (x < 1)))
        left = wanted.clamp(0, 1) - weights @ out + share * (after - first)
        after += (share * left / (share.square() + _RIDGE) - (after - first)).clamp(-_STEP, _STEP)


def _shrunk(gap: Tensor, noise: Tensor, spread: Tensor, groups: list[NDArray[np.int64]]) -> Tensor:
    """A covariance relative to the generated one, 1 + gap, with what is believed of the gap.

    Args:
        gap: released less generated covariance [d, d] along directions of ``spread`` [d].
        noise: its variances.
    """
    scale = spread.sqrt()[:, None] * spread.sqrt()
    gap, noise = (gap + gap.T) / 2 / scale, noise / scale.square()
    diagonal = gap.diagonal().clone()
    for one in groups:
        for other in groups:
            part = np.ix_(one, other)
            off = ~torch.eye(len(gap), dtype=torch.bool)[part]
            signal = _signal(gap[part][off], noise[part][off], times=2)
            gap[part] *= _believed(gap[part], noise[part], signal)
        own, error = diagonal[one], noise.diagonal()[one]
        of_mean = 1 / (1 / error).sum()
        mean = (own / error).sum() * of_mean
        signal = (mean.square() - _ERRORS**2 * of_mean).clamp(0, _MOST)
        mean *= signal / (signal + of_mean)
        signal = _signal(own - mean, error)
        diagonal[one] = mean + _believed(own - mean, error, signal) * (own - mean)
    gap.diagonal().copy_(diagonal)
    return torch.eye(len(gap), dtype=gap.dtype) + gap


@dataclass(frozen=True, eq=False)
class _Products:
    """What released products of pixels say, by the weights 1 / |(u, c)|^2 that they have.

    Attributes:
        second: the mean of x x' [d, d].
        centre: the mean of x [d], by the same weights: the row of products with c.
        variance: of the noise of a number of E[v v'] on the diagonal; off it, it is half of that.
    """

    second: Tensor
    centre: Tensor
    variance: float

    def covariance(self, centres: Tensor | None = None, shares: Tensor | None = None) -> Tensor:
        """Of x [d, d]; with centres [K, d] of classes, which have these shares [K], within them.

        The centres are moved, all alike, so that their mean is that of the products.
        """
        if centres is None or shares is None:
            return self.second - torch.outer(self.centre, self.centre)
        centres = centres + self.centre - shares @ centres
        return self.second - (centres * shares[:, None]).T @ centres


class _Released:
    """What a release says of pixels, with its noise; float64."""

    def __init__(self, release: Release, matrix: Tensor) -> None:
        assert release.pixels is not None
        m = release.metadata
        # Of a number that is released; of products, of those on the diagonal.
        sd = {b.name: m.sd / 2**m.grid_bits / b.bound for b in m.blocks}
        counts, sums = release.class_counts, release.pixels.double()
        self.shares = counts / counts.sum()
        self._back = torch.linalg.inv(matrix)
        # A class mean of v over that of its last entry is a mean of u, with weights 1 / |(u, c)|;
        # the products likewise, with the squares of the weights.
        self._c = constant(len(matrix))
        weights = sums[:, -1:] / self._c
        self.means = sums[:, :-1] / weights @ self._back.T
        self._mean_variance = (sd["pixels"] / weights).square()  # of a number of u
        self._along = self.means / self._c
        self.products: _Products | None = None
        self.by_class: list[_Products] | None = None
        pooled = []  # sums of products and the variance of their noise
        if release.products is not None:
            pooled.append((release.products.double(), sd["products"] ** 2))
        if release.class_products is not None:
            sums, square = release.class_products.double(), sd["class_products"] ** 2
            self.by_class = [self._mean(each, square) for each in sums]
            pooled.append((sums.sum(0), square * len(sums)))
        if pooled:
            precision = sum(1 / square for _, square in pooled)
            whole = sum(each / square for each, square in pooled) / precision
            self.products = self._mean(whole, 1 / precision)

    def _mean(self, sums: Tensor, variance: float) -> _Products:
        """Of sums of v v'."""
        weight = float(sums[-1, -1]) / self._c**2
        second = self._back @ sums[:-1, :-1] @ self._back.T / weight
        return _Products(
            second, self._back @ sums[:-1, -1] / self._c / weight, variance / weight**2
        )

    def mean_noise(self, directions: Tensor) -> Tensor:
        """Variance of the class means [K, d] along directions; that of the weights is in it."""
        own = (self._back.T @ directions).square().sum(0)
        return self._mean_variance * (own + (self._along @ directions).square())

    def noise(self, products: _Products, directions: Tensor) -> Tensor:
        """Variance of a covariance [d, d] along directions; those of centre and weights are in it.

        Along e the covariance is a' E[v v'] a over the weight, a being (e, -e' centre / c).
        """
        g = self._back.T @ directions
        behind = products.centre @ directions / self._c
        inner = g.T @ g + torch.outer(behind, behind)
        own = inner.diagonal()
        along = (directions.T @ products.covariance() @ directions / self._c**2).square()
        return products.variance * ((own[:, None] * own + inner.square()) / 2 + along)


class _Generated:
    """The same of generated images, weighted likewise; classes in the proportions of the data."""

    def __init__(
        self,
        images: NDArray[np.uint8],
        y: Tensor,
        shape: tuple[int, int, int],
        matrix: Tensor,
        shares: Tensor,
        by_class: bool,
    ) -> None:
        classes, d = len(shares), len(matrix)
        sums = torch.zeros(classes, d + 1, dtype=torch.float64)
        last = torch.zeros_like(sums)  # of each class's products, the last column
        second = torch.zeros(d + 1, d + 1, dtype=torch.float64)
        seconds = torch.zeros(classes if by_class else 0, d + 1, d + 1, dtype=torch.float64)
        for k in range(classes):
            own = images[(y == k).numpy()]
            for part in torch.from_numpy(own).split(1000):
                v = augmented(_small(part.double() / 255, shape) @ matrix.T)
                products = v.T @ v * (shares[k] / len(own))
                sums[k] += v.sum(0)
                second += products
                last[k] += products[:, -1]
                if by_class:
                    seconds[k] += products
        back, c = torch.linalg.inv(matrix), constant(d)
        weights = last[:, -1] / c**2
        self.means = c * sums[:, :-1] / sums[:, -1:] @ back.T
        self.shares = weights / weights.sum()
        self.centres = last[:, :-1] / c / weights[:, None] @ back.T
        self.seconds = [
            back @ own[:-1, :-1] @ back.T / weight
            for own, weight in zip(seconds, weights, strict=False)
        ]
        whole = back @ second[:-1, :-1] @ back.T / weights.sum()
        self.within = whole - (self.centres * self.shares[:, None]).T @ self.centres

    def within_class(self, k: int) -> Tensor:
        """The covariance [d, d] of a class, where covariances are taken by class."""
        return self.seconds[k] - torch.outer(self.centres[k], self.centres[k])


def _small(images: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """[n, d]: images brought to the release's side as its encoder does."""
    if images.shape[-2:] != shape[-2:]:
        images = F.interpolate(images, shape[-2:], mode="bilinear", align_corners=False)
    return images.flatten(1)


def _groups(d: int) -> Iterator[NDArray[np.int64]]:
    """Indices of directions in ascending order of variance: the last 4, the 12 before, 48, ..."""
    order, begin, root = np.arange(d)[::-1], 0, 2
    while begin < d:
        yield order[begin : root * root].copy()
        begin, root = root * root, root * 2 if root < 8 else root + 4


def _believed(values: Tensor, noise: Tensor, signal: Tensor) -> Tensor:
    """The share of each value that is believed, where its group has true values of this variance.

    A value far beyond its own noise is no matter of its group, and of more than _MOST at that.
    """
    share = signal / (signal + noise)
    alone = 1 - noise / values.square()
    return torch.where(values.square() > _ALONE**2 * noise, torch.maximum(share, alone), share)


def _signal(values: Tensor, noise: Tensor, times: int = 1) -> Tensor:
    """Variance [] of the true values behind noisy ones, two standard errors below its estimate.

    At most _MOST, so that what stands out by chance in much noise does little.
    The estimate weighs every square by the inverse variance it has where there is noise alone.
    ``times``: how often each value occurs, as in a symmetric matrix.
    """
    if not values.numel():
        return values.new_zeros(())
    precision = noise.square().reciprocal()
    estimate = ((values.square() - noise) * precision).sum() / precision.sum()
    return (estimate - _ERRORS * (2 * times / precision.sum()).sqrt()).clamp(0, _MOST)


def _transport(spread: Tensor, directions: Tensor, relative: Tensor) -> Tensor:
    """T with T S T = S^(1/2) R S^(1/2), S = V diag(spread) V', R in the same directions.

    Noise makes R indefinite. Without its negative part every direction has more variance than R
    says, up to several times as much, so the rest is scaled back to the diagonal of R.
    """
    values, vectors = torch.linalg.eigh(relative)
    positive = (vectors * values.clamp(min=_LEAST)) @ vectors.T
    kept = (relative.diagonal().clamp(min=_LEAST) / positive.diagonal()).sqrt()
    root = spread.sqrt()
    scale = root * kept
    wanted = scale[:, None] * positive * scale
    values, vectors = torch.linalg.eigh(root[:, None] * wanted * root)
    inner = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return (directions / root) @ inner @ (directions / root).T
