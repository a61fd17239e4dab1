"""Train classifiers on synthetic images, test them on real ones.

This reads real images directly. Its results are NOT covered by the (epsilon, delta) of the release,
and nothing in training looks at them.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

Labelled = tuple[NDArray[Any], NDArray[np.int64]]

LOGISTIC_ITERATIONS = 100
MLP_EPOCHS = 20
CNN_EPOCHS = 5


def evaluate(
    synthetic: Labelled,
    test: Labelled,
    real: Labelled | None = None,
    *,
    classifiers: Sequence[str] = ("logistic_regression", "mlp", "cnn"),
    num_train: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Test accuracy on real images of classifiers trained on synthetic and on real ones.

    Args:
        synthetic: images uint8 [n, C, H, W] and labels int64 [n], arrays or CPU tensors.
        test: real test images and labels; images of another side are compared at the synthetic
            images' (an error says so).
        real: real training images, for comparison, or None.
        classifiers: of ``"logistic_regression"`` and ``"mlp"`` (scikit-learn, on pixels / 255:
            L-BFGS with C = 1 and at most 100 iterations; 100 hidden units, Adam, 20 epochs) and
            ``"cnn"`` (two convolutional layers, Adam, 5 epochs).
        num_train: draw so many training images from each set (without replacement, as drawn by
            ``seed``); None: all.
        seed: of the draw and of the classifiers.
        progress: show a progress bar on standard error.

    Returns:
        ``{classifier: {"synthetic": accuracy, "real": accuracy}}``, ``"real"`` only if given.

    Raises:
        ValueError: unknown classifier, unlabelled or empty data, image shapes that differ,
            ``num_train`` below 1.
        ImportError: scikit-learn is not installed.
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
            predict = CLASSIFIERS[name](*sets[kind], seed)
            result[name][kind] = float((predict(test[0]) == test[1]).mean())
            bar.update()
    return result


def check_classifiers(classifiers: Sequence[str]) -> None:
    """Raises what `evaluate` would, for names it does not know or packages that are missing."""
    if not classifiers or any(c not in CLASSIFIERS for c in classifiers):
        raise ValueError(
            f"classifiers={list(classifiers)}: expected some of {', '.join(CLASSIFIERS)}."
        )
    if set(classifiers) != {"cnn"} and importlib.util.find_spec("sklearn") is None:
        raise ImportError(
            f"classifiers={list(classifiers)}: all but cnn need scikit-learn; "
            "try: pip install scikit-learn"
        )


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


Predictor = Callable[[NDArray[Any]], NDArray[np.int64]]


def _pixels(images: NDArray[Any]) -> NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)


def _logistic_regression(images: NDArray[Any], labels: NDArray[np.int64], seed: int) -> Predictor:
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=LOGISTIC_ITERATIONS, random_state=seed)
    return _fitted(model, images, labels)


def _mlp(images: NDArray[Any], labels: NDArray[np.int64], seed: int) -> Predictor:
    from sklearn.neural_network import MLPClassifier

    model = MLPClassifier(hidden_layer_sizes=(100,), max_iter=MLP_EPOCHS, random_state=seed)
    return _fitted(model, images, labels)


def _fitted(model: Any, images: NDArray[Any], labels: NDArray[np.int64]) -> Predictor:
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the caps on iterations are meant
        model.fit(_pixels(images), labels)
    return lambda test: model.predict(_pixels(test))


class _CNN(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 16, 128)
        self.out = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.conv1(x)), 2)
        h = F.adaptive_max_pool2d(F.relu(self.conv2(h)), 4).flatten(1)
        return self.out(F.dropout(F.relu(self.hidden(h)), 0.3, self.training))


def _cnn(images: NDArray[Any], labels: NDArray[np.int64], seed: int) -> Predictor:
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _CNN(x.shape[1], int(y.max()) + 1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        batch = 128
        steps = CNN_EPOCHS * -(-len(x) // batch)
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
        model.train()
        for _ in range(CNN_EPOCHS):
            for part in torch.randperm(len(x)).split(batch):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(_as_input(x[part])), y[part]).backward()
                optimizer.step()
                schedule.step()
    model.eval()

    @torch.no_grad()
    def predict(test: NDArray[Any]) -> NDArray[np.int64]:
        parts = torch.from_numpy(test).split(1000)
        return torch.cat([model(_as_input(p)).argmax(dim=1) for p in parts]).numpy()

    return predict


def _as_input(images: Tensor) -> Tensor:
    return images.float().div_(255).contiguous(memory_format=torch.channels_last)


CLASSIFIERS: dict[str, Callable[[NDArray[Any], NDArray[np.int64], int], Predictor]] = {
    "logistic_regression": _logistic_regression,
    "mlp": _mlp,
    "cnn": _cnn,
}
