"""How synthetic images compare with real ones in a feature space, by other people's code.

FID (Fréchet distance) and KID are computed by torch-fidelity, precision, recall, density and
coverage by prdc (Naeem et al. 2020), on features of Inception v3 (torch-fidelity's, with its
weights) or of any encoder of this package. It reads real images directly: what it returns is NOT
covered by the (epsilon, delta) of a release.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from dpmmd import encoders
from dpmmd._torchvision import import_torchvision
from dpmmd.encoders.weights import StrPath, WeightsError, WeightsNotFoundError, existing_file
from dpmmd.errors import first_line

INCEPTION = "inception-v3"
HELD_OUT = ("efficientnet-lite0", "squeezenet1.1")  # come with packages, small enough for a CPU
NEAREST = 5  # neighbours, as in prdc's paper
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # torch-fidelity's


@dataclass(frozen=True)
class Extractor:
    """Features of images.

    Attributes:
        name: of `names()`.
        features: which features these are.
        resize: what happens to the images first.
        weights: sha256 of the weight file, or who vouches for it.
        extract: uint8 [n, 3, H, W] to float [n, d].
    """

    name: str
    features: str
    resize: str
    weights: str
    extract: Callable[[Tensor], Tensor]


def names() -> tuple[str, ...]:
    """The feature extractors that `load` knows."""
    return (INCEPTION, *encoders.available())


def with_held_out(features: Sequence[str], trained_against: Sequence[str]) -> tuple[str, ...]:
    """The features, and one that the generator was not trained against if there is none among them.

    Raises:
        ValueError: unknown or repeated names, or every small encoder was trained against.
    """
    unknown = [name for name in features if name not in names()]
    if unknown or len(set(features)) < len(features) or not features:
        raise ValueError(
            f"metrics.features={list(features)}: expected different ones of {', '.join(names())}."
        )
    if set(features) - set(trained_against):
        return tuple(features)
    for name in HELD_OUT:
        if name not in trained_against:
            return (*features, name)
    raise ValueError(
        f"metrics.features={list(features)}: the generator was trained against all of them; add "
        f"one that it was not trained against, e.g. {INCEPTION!r}."
    )


def load(
    name: str,
    *,
    image_size: int = 32,
    weights: StrPath | None = None,
    device: str | torch.device = "cpu",
) -> Extractor:
    """A feature extractor with its weights.

    Args:
        name: ``"inception-v3"``, or an encoder of `dpmmd.encoders.available`.
        image_size: side of the images to compare; an encoder sees them at that side, or at 32.
        weights: a weight file; None for torch-fidelity's cache or download, or the encoder's own.
        device: where it runs.

    Raises:
        WeightsNotFoundError, WeightsError: the weights are not there, or are others.
        ImportError: torch-fidelity or prdc is not installed.
    """
    for module, distribution in (("torch_fidelity", "torch-fidelity"), ("prdc", "prdc")):
        if importlib.util.find_spec(module) is None:
            raise ImportError(
                f"metrics need the package {distribution}: pip install torch-fidelity prdc, or "
                "leave out [metrics]."
            )
    if name == INCEPTION:
        return _inception(weights, torch.device(device))
    side = max(32, image_size)
    encoder = encoders.load(name, image_size=side, weights=weights).to(device)
    last = encoder.taps[-1]

    def extract(images: Tensor) -> Tensor:
        return encoder(images.to(device).float() / 255)[-1].float().mean(dim=(2, 3))

    return Extractor(
        name,
        f"mean over positions of tap {last.name}, {last.shape[0]} numbers",
        f"{side} x {side}, bilinear, not anti-aliased",
        encoder.weights_sha256,
        extract,
    )


def _inception(weights: StrPath | None, device: torch.device) -> Extractor:
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import (
        URL_INCEPTION_V3,
        FeatureExtractorInceptionV3,
    )

    file = URL_INCEPTION_V3.rpartition("/")[2]
    remedy = (
        f"download {URL_INCEPTION_V3} and give its path, metrics.weights = "
        f'{{{INCEPTION} = "PATH/{file}"}} in a recipe, or leave out {INCEPTION!r}'
    )
    path = None if weights is None else str(existing_file(weights, remedy))
    try:
        model = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=path
        )
    except Exception as error:  # a file of another kind, or no network, can raise nearly anything
        reason = first_line(error)
        if path is None:
            raise WeightsNotFoundError(
                f"{INCEPTION}: its weights are neither in torch's cache nor could they be fetched "
                f"({reason}); {remedy}"
            ) from None
        raise WeightsError(
            f"weights={path!r}: not torch-fidelity's weights of {INCEPTION} ({reason}); {remedy}"
        ) from None
    model.to(device).eval()
    return Extractor(
        INCEPTION,
        "pool3 of the 2015 TensorFlow Inception v3, 2048 numbers",
        "299 x 299, torch-fidelity's bilinear like TensorFlow 1",
        file if path is None else path,
        lambda images: model(images.to(device))[0],
    )


def compare(
    synthetic: NDArray[np.uint8] | Tensor,
    real: NDArray[np.uint8] | Tensor,
    extractors: Sequence[Extractor],
    *,
    num_images: int | None = None,
    seed: int = 0,
    trained_against: Sequence[str] | None = (),
    told: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, dict[str, Any]]:
    """The figures for each extractor, with what they were computed from.

    Args:
        synthetic, real: uint8 [n, 1 or 3, H, W]; grey is repeated to three channels.
        extractors: from `load`.
        num_images: at most so many of each set, drawn without replacement by ``seed``.
        trained_against: names of the encoders that the generator was trained with; None where
            nobody says.
        told: more to state with each figure, e.g. the source and split of ``real``.
        progress: show a progress bar on standard error.

    Returns:
        ``{extractor: {frechet_distance, kid, kid_sd, precision, recall, density, coverage,
        held_out, ...}}``; the same seed gives the same numbers.

    Raises:
        ValueError: shapes that differ, or fewer images than nearest neighbours need.
    """
    sets = [_drawn(torch.as_tensor(images), num_images, seed) for images in (synthetic, real)]
    if sets[0].shape[1:] != sets[1].shape[1:]:
        raise ValueError(
            f"real images are {tuple(sets[1].shape[1:])}, the synthetic ones "
            f"{tuple(sets[0].shape[1:])}; give image_size and channels that match."
        )
    least = min(len(images) for images in sets)
    if least < NEAREST + 2:
        raise ValueError(f"metrics: {least} images, expected at least {NEAREST + 2} of each set.")
    stated = {
        "synthetic_images": len(sets[0]),
        "real_images": len(sets[1]),
        "kid_subset_size": min(KID_SUBSET_SIZE, least // 2),
        "kid_subsets": KID_SUBSETS,
        "nearest_neighbours": NEAREST,
        "seed": seed,
        "libraries": {name: version(name) for name in ("torch-fidelity", "prdc")},
        **(told or {}),
    }
    result = {}
    with tqdm(extractors, desc="metrics", unit="extractor", disable=not progress) as bar:
        for extractor in bar:
            bar.set_postfix_str(extractor.name)
            ours, theirs = (_features(extractor, images) for images in sets)
            result[extractor.name] = {
                **_figures(ours, theirs, seed),
                "held_out": None
                if trained_against is None
                else extractor.name not in trained_against,
                "features": extractor.features,
                "resize": extractor.resize,
                "weights": extractor.weights,
                **stated,
            }
    return result


def _drawn(images: Tensor, n: int | None, seed: int) -> Tensor:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(
            f"images are {images.dtype} {list(images.shape)}, expected uint8 [n, C, H, W]."
        )
    if n is not None and n < len(images):
        images = images[np.random.default_rng(seed).permutation(len(images))[:n]]
    return images


@torch.no_grad()
def _features(extractor: Extractor, images: Tensor, batch: int = 100) -> Tensor:
    parts = [extractor.extract(x.expand(-1, 3, -1, -1)).cpu() for x in images.split(batch)]
    return torch.cat(parts).double()  # [n, d]


def _figures(synthetic: Tensor, real: Tensor, seed: int) -> dict[str, float]:
    """From features [n, d] and [n', d], float64 on the CPU."""
    import_torchvision()
    from prdc import compute_prdc
    from torch_fidelity import KEY_METRIC_FID, KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric

    frechet = fid_statistics_to_metric(
        fid_features_to_statistics(synthetic), fid_features_to_statistics(real), verbose=False
    )
    kid = kid_features_to_metric(
        synthetic,
        real,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=min(KID_SUBSET_SIZE, min(len(synthetic), len(real)) // 2),
        rng_seed=seed,
        verbose=False,
    )
    with contextlib.redirect_stdout(io.StringIO()):  # prdc prints
        manifold = compute_prdc(real.float().numpy(), synthetic.float().numpy(), NEAREST)
    return {
        "frechet_distance": float(frechet[KEY_METRIC_FID]),
        "kid": float(kid[KEY_METRIC_KID_MEAN]),
        "kid_sd": float(kid[KEY_METRIC_KID_STD]),
        **{key: float(value) for key, value in manifold.items()},
    }
