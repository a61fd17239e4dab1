"""Modes of a release: how each class is split, fitted to an earlier release of pixel moments.

A release of class means says what a class looks like on average, and nothing of its variety. A
release with modes has a mean for every cell of a partition, so that generated images are asked to
be as varied as the cells are. The partition must not read private images. `fit` takes it from what
an earlier release holds: cells are the signs about the class mean along the directions in which
the pixels of images vary most within their classes (Pearson's principal components).

    first = dpmmd.release(data, None, pixel_moments=28, num_classes=10, epsilon=4, ...)
    modes = dpmmd.modes.fit(first, 8)
    second = dpmmd.release(data, encoder, modes=modes, num_classes=10, epsilon=8, ...)

Both are computed from the first release's numbers alone, so they cost no privacy. The second
release costs its own, and both together are stated by it (`dpmmd.privacy.split_epsilon`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dpmmd.encoders import Encoder
from dpmmd.encoders.pixels import means_of, products_of
from dpmmd.privacy import PrivacyError, Release, calibrate, sensitivity
from dpmmd.privacy.layout import Asked, bound_of, lay_out
from dpmmd.privacy.modes import LEVELS, MOST_BITS, Modes
from dpmmd.privacy.rows import LEAST
from dpmmd.privacy.sensitivity import check_adjacency

_WEIGHT = 1 << 20  # that the largest entry of a direction becomes
_MOST = 1 << 49
# Modes are suggested up to this norm of the noise on a row's mean, relative to its bound. A split
# pays while the offsets between the halves, from the mean of both, are above what noise it adds: on
# Fashion-MNIST up to norms of 0.8 to 1.8 (`benches.quality.modes`); above 16 modes they add little.
NOISE = 1.0
SUGGESTED = 16


def fit(release: Release, per_class: int) -> Modes:
    """The modes that a release of pixel moments suggests.

    Args:
        release: made with ``pixel_moments``, of the data that the next release is to be made of.
        per_class: C, a power of two from 2 on.

    Returns:
        `Modes` whose ``origin`` states what the release promises: one that is made with them
        states the total of both. With a block "class_products" every class has directions of its
        own, else all classes have the same.

    Raises:
        TypeError: it is no Release: modes are fitted to released numbers, never to images.
        PrivacyError: the release has no moments of pixels, or modes of its own.
        ValueError: ``per_class`` is no power of two from 2 on, or so large that no mode could
            stand out from the noise of its count.
    """
    if not isinstance(release, Release):
        raise TypeError(
            f"release: a {type(release).__name__}, expected the dpmmd.Release that the modes are "
            "fitted to; images, private or generated, are no release. Make one with "
            "dpmmd.release(source, None, pixel_moments=SIDE, ...)."
        )
    if release.modes is not None:
        raise PrivacyError(
            "release: it has modes of its own, which come from an earlier release. Fit modes to "
            "that one: the total of three releases is stated nowhere."
        )
    if release.pixels is None or (release.products is None and release.class_products is None):
        raise PrivacyError(
            "release: it holds no moments of pixels, or no products of them; make one with "
            "dpmmd.release(source, None, pixel_moments=SIDE, ...), without weights of 0."
        )
    return along(release, _bits(release, per_class))


def along(release: Release, bits: int) -> Modes:
    """The modes of `fit`, 2^``bits`` a class, whether they would stand out from the noise or not.

    Those that do not are merged where the next release is used. It is for whoever has made the
    first release already, and goes on with whatever its noise left.
    """
    assert release.pixels is not None
    channels = release.metadata.image_shape[0]
    side = math.isqrt((release.pixels.shape[1] - 1) // channels)
    means = means_of(release.pixels, channels, side).nan_to_num(0.5).clamp(0, 1)  # [K, d]
    if release.class_products is not None:
        products = [products_of(own, channels, side) for own in release.class_products]
        within = torch.stack([second - torch.outer(mean, mean) for second, mean in products])
    else:
        assert release.products is not None
        shares = release.counts / release.counts.sum()
        second, mean = products_of(release.products, channels, side)
        centres = means + mean - shares @ means  # by the weights of the products in all
        within = (second - (centres * shares[:, None]).T @ centres)[None]
    directions = torch.stack([_leading(own, bits) for own in within])  # [G, J, d]
    scores = torch.einsum("gjd,kd->kgj", directions.double(), LEVELS * means)
    own = torch.arange(len(means)) if len(directions) > 1 else 0
    thresholds = scores[torch.arange(len(means)), own].round().clamp(-_MOST, _MOST)
    return Modes(side, channels, directions, thresholds.long(), release.metadata.statement)


def _bits(release: Release, per_class: int) -> int:
    """J of C = 2^J."""
    if type(per_class) is not int or per_class < 2 or per_class & (per_class - 1):
        raise ValueError(
            f"per_class={per_class!r}: expected a power of two, 2, 4, 8, ...: each direction "
            "halves a class. For no modes leave them out."
        )
    assert release.pixels is not None
    most = float(release.class_counts.max())
    values = release.pixels.shape[1] - 1
    if per_class > 1 << min(values, MOST_BITS):
        raise ValueError(
            f"per_class={per_class}: each direction halves a class, and images of {values} values "
            f"have at most {min(values, MOST_BITS)} of them; at most {1 << min(values, MOST_BITS)} "
            "modes can be."
        )
    bits = int(math.log2(max(1.0, most / LEAST)))
    bits = min(bits, MOST_BITS, values)
    if per_class > 1 << bits:
        largest = f"at most {1 << bits}" if bits else "no modes"
        raise ValueError(
            f"per_class={per_class}: no mode would stand out, since the largest class has about "
            f"{most:.0f} images and a mode needs {LEAST:.0f}; {largest} can."
        )
    return per_class.bit_length() - 1


def _leading(within: Tensor, bits: int) -> Tensor:
    """The leading eigenvectors of a covariance [d, d] as whole numbers, int64 [J, d]."""
    from scipy.linalg import eigh

    d = len(within)
    symmetric = ((within + within.T) / 2).nan_to_num(0.0).numpy()
    _, vectors = eigh(symmetric, subset_by_index=[d - bits, d - 1])  # ascending
    found = torch.from_numpy(vectors.T.copy()).flip(0)
    largest = found.gather(1, found.abs().argmax(1, keepdim=True))  # its sign is free: make it +
    return (found / largest * _WEIGHT).round().long()


def suggest(
    first: Release,
    encoder: Encoder,
    *,
    epsilon: float,
    delta: float,
    moments: int | Sequence[int] = (1,),
    selection: Encoder | None = None,
) -> int:
    """How many modes a class should have: C, a power of two; 1 for none.

    The rule reads the first release and what is public. Of the powers of two it takes the largest
    with which the noise on the mean of a row, were all classes and modes of one size, has a norm of
    at most `NOISE` times the bound on that mean; at most `SUGGESTED`.

    Args:
        first: a release of pixel moments of the same data.
        encoder, epsilon, delta, moments, selection: as the second release is to be made.

    Raises:
        TypeError: ``first`` is no Release, or ``encoder`` no encoder.
        ValueError: epsilon, delta or moments out of range.
    """
    for name, value, kind in (("first", first, Release), ("encoder", encoder, Encoder)):
        if not isinstance(value, kind):
            raise TypeError(
                f"{name}: a {type(value).__name__}, expected a {kind.__name__}: give the release "
                "of pixel moments, and the encoder (dpmmd.encoders.load) of the one with modes."
            )
    m = first.metadata
    return by_rule(
        first.class_counts,
        m.image_shape,
        encoder,
        num_classes=m.num_classes if m.labelled else None,
        adjacency=m.adjacency,
        grouped=m.unit != "image",
        epsilon=epsilon,
        delta=delta,
        moments=moments,
        selection=selection,
    )


def by_rule(
    counts: Tensor,
    image_shape: tuple[int, int, int],
    encoder: Encoder,
    *,
    num_classes: int | None,
    adjacency: str,
    grouped: bool,
    epsilon: float,
    delta: float,
    moments: int | Sequence[int] = (1,),
    selection: Encoder | None = None,
) -> int:
    """What `suggest` says of classes with so many images, [K], without a release."""
    asked = Asked(
        encoder=encoder,
        adjacency=check_adjacency(adjacency),
        bound=bound_of(encoder, moments, "sphere", 1.0, None),
        num_classes=num_classes,
        weights=None,
        pixel_moments=None,
        selection=selection,
        shared_taps=0,
        modes=None,
        batch_size=1,
    )
    blocks = lay_out(asked, image_shape, grouped=grouped).blocks
    sd = sensitivity(adjacency, blocks.all())
    sd *= calibrate(epsilon=epsilon, delta=delta).sd_over_sensitivity
    square = sum(part.dim * (sd * part.unit) ** 2 for part in blocks.parts if part.is_phi)
    fitting = NOISE * float(counts.mean()) / math.sqrt(square)
    return min(SUGGESTED, largest(min(fitting, float(counts.max()) / LEAST)))


def largest(parts: float) -> int:
    """The largest power of two that is no more than so many modes; 1: none."""
    return 1 << min(MOST_BITS, max(0, math.floor(math.log2(max(1.0, parts)))))
