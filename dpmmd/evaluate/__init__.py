"""Train classifiers on synthetic images, test them on real ones.

This reads real images directly. Its results are NOT covered by the (epsilon, delta) of the release,
and nothing in training looks at them.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from dpmmd.evaluate.classical import MODELS, PACKAGES, Predictor, fit
from dpmmd.evaluate.networks import NETWORKS

Labelled = tuple[NDArray[Any], NDArray[np.int64]]

CLASSIFIERS = (*MODELS, *NETWORKS)


def evaluate(
    synthetic: Labelled,
    test: Labelled,
    real: Labelled | None = None,
    *,
    classifiers: Sequence[str] = ("logistic_regression", "mlp", "cnn"),
    num_train: int | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Test accuracy on real images of classifiers trained on synthetic and on real ones.

    Args:
        synthetic: images uint8 [n, C, H, W] and labels int64 [n], arrays or CPU tensors. Labels are
            taken as they are, of all sets alike; `dpmmd.evaluate.sets` reads sets with class names.
        test: real test images and labels; images of another side are compared at the synthetic
            images' (an error says so).
        real: real training images, for comparison, or None.
        classifiers: of `CLASSIFIERS`: the suite of twelve on pixels / 255 (`classical`; logistic
            regression with at most 100 iterations, an MLP of 100 hidden units for 20 epochs, ...),
            ``"cnn"`` (two convolutional layers, Adam, 5 epochs) and ``"wrn28_10"`` (50 epochs; for
            a GPU).
        num_train: draw so many training images from each set (without replacement, as drawn by
            ``seed``); None: all.
        seed: of the draw and of the classifiers.
        device: where the networks are trained.
        progress: show a progress bar on standard error.

    Returns:
        ``{classifier: {"synthetic": accuracy, "real": accuracy}}``, ``"real"`` only if given.

    Raises:
        ValueError: unknown classifier, unlabelled or empty data, image shapes that differ,
            ``num_train`` below 1.
        ImportError: scikit-learn, or xgboost where it is asked for, is not installed.
    """
    check_classifiers(classifiers)
    if num_train is not None and num_train < 1:
        raise ValueError(f"num_train={num_train}: expected None or at least 1.")
    synthetic, test = _arrays(synthetic), _arrays(test)
    real = None if real is None else _arrays(real)
    sets = {"synthetic": synthetic} | ({} if real is None else {"real": real})
    for name, (images, labels) in {**sets, "test": test}.items():
        _check(name, images, labels, synthetic[0].shape[1:])
    if num_train is not None:
        sets = {name: _draw(pair, num_train, seed) for name, pair in sets.items()}
    result: dict[str, dict[str, float]] = {name: {} for name in classifiers}
    jobs = [(name, kind) for name in classifiers for kind in sets]
    with tqdm(total=len(jobs), desc="evaluate", unit="classifier", disable=not progress) as bar:
        for name, kind in jobs:
            bar.set_postfix_str(f"{name} on {kind}")
            predict = _trained(name, *sets[kind], seed, device)
            result[name][kind] = float((predict(test[0]) == test[1]).mean())
            bar.update()
    return result


def check_classifiers(classifiers: Sequence[str]) -> None:
    """Raises what `evaluate` would, for names it does not know or packages that are missing."""
    if not classifiers or any(c not in CLASSIFIERS for c in classifiers):
        raise ValueError(
            f"classifiers={list(classifiers)}: expected some of {', '.join(CLASSIFIERS)}."
        )
    for name in classifiers:
        if name in NETWORKS:
            continue
        for module, distribution in (("sklearn", "scikit-learn"), PACKAGES.get(name, (None, ""))):
            if module is not None and importlib.util.find_spec(module) is None:
                raise ImportError(
                    f"classifiers={list(classifiers)}: {name} needs {distribution}; "
                    f"try: pip install {distribution}"
                )


def _trained(
    name: str, images: NDArray[Any], labels: NDArray[np.int64], seed: int, device: str
) -> Predictor:
    if name in NETWORKS:
        return NETWORKS[name](images, labels, seed, device)
    return fit(name, images, labels, seed)


def _check(
    name: str, images: NDArray[Any], labels: NDArray[np.int64], shape: tuple[int, ...]
) -> None:
    if images.ndim == 0 or labels.ndim != 1 or len(labels) != len(images) or not len(images):
        raise ValueError(
            f"{name}: images {images.shape} with labels {labels.shape}; expected at least one "
            "image, and a label for each."
        )
    if images.dtype != np.uint8 or images.ndim != 4:
        raise ValueError(f"{name}: {images.dtype} {images.shape}, expected uint8 [n, C, H, W].")
    if images.shape[1:] != shape:
        raise ValueError(
            f"{name}: images are {images.shape[1:]}, the synthetic ones {shape}; give image_size "
            "and channels that match."
        )


def _arrays(pair: Labelled) -> Labelled:
    return np.asarray(pair[0]), np.asarray(pair[1])


def _draw(pair: Labelled, n: int, seed: int) -> Labelled:
    chosen = np.random.default_rng(seed).permutation(len(pair[1]))[:n]
    return pair[0][chosen], pair[1][chosen]
