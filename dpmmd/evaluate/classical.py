"""The classifiers on pixels: the suite of DP-MERF, DP-HP and DP-MEPF for 28-px images.

Settings are those of the suite's published code where scikit-learn still takes them; what differs
is said beside it. Pixels are divided by 255 and flattened.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Predictor = Callable[[NDArray[Any]], NDArray[np.int64]]

LOGISTIC_ITERATIONS = 100  # the suite's: 5,000
MLP_EPOCHS = 20  # the suite's: 200


class _Model(NamedTuple):
    module: str
    name: str
    options: dict[str, Any]
    draws: bool = True  # whether it takes a seed

    def __call__(self, seed: int) -> Any:
        drawn = {"random_state": seed} if self.draws else {}
        return getattr(import_module(self.module), self.name)(**self.options, **drawn)


MODELS = {
    "logistic_regression": _Model(
        "sklearn.linear_model", "LogisticRegression", {"max_iter": LOGISTIC_ITERATIONS}
    ),
    "random_forest": _Model(
        "sklearn.ensemble",
        "RandomForestClassifier",
        {"n_estimators": 100, "class_weight": "balanced"},
    ),
    "gaussian_nb": _Model("sklearn.naive_bayes", "GaussianNB", {}, draws=False),
    "bernoulli_nb": _Model("sklearn.naive_bayes", "BernoulliNB", {"binarize": 0.5}, draws=False),
    "linear_svm": _Model(
        "sklearn.svm", "LinearSVC", {"max_iter": 10_000, "tol": 1e-8, "loss": "hinge"}
    ),
    "decision_tree": _Model("sklearn.tree", "DecisionTreeClassifier", {"class_weight": "balanced"}),
    "lda": _Model(
        "sklearn.discriminant_analysis",
        "LinearDiscriminantAnalysis",
        {"solver": "eigen", "tol": 1e-8, "shrinkage": 0.5},
        draws=False,
    ),
    # The suite's algorithm is SAMME.R, which scikit-learn has dropped; this is SAMME.
    "adaboost": _Model("sklearn.ensemble", "AdaBoostClassifier", {"n_estimators": 100}),
    "mlp": _Model(
        "sklearn.neural_network",
        "MLPClassifier",
        {"hidden_layer_sizes": (100,), "max_iter": MLP_EPOCHS},
    ),
    "bagging": _Model(
        "sklearn.ensemble", "BaggingClassifier", {"max_samples": 0.1, "n_estimators": 20}
    ),
    "gbm": _Model(
        "sklearn.ensemble", "GradientBoostingClassifier", {"subsample": 0.1, "n_estimators": 50}
    ),
    "xgboost": _Model("xgboost", "XGBClassifier", {"colsample_bytree": 0.1, "n_estimators": 50}),
}
PACKAGES = {"xgboost": ("xgboost", "xgboost")}  # what else than scikit-learn a model needs


def fit(name: str, images: NDArray[Any], labels: NDArray[np.int64], seed: int) -> Predictor:
    """The classifier trained on uint8 images [n, C, H, W]; predicts labels of such images."""
    from sklearn.exceptions import ConvergenceWarning

    model = MODELS[name](seed)
    present, classes = np.unique(labels, return_inverse=True)  # xgboost wants 0..K-1 without gaps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the caps on iterations are meant
        model.fit(_pixels(images), classes)
    return lambda test: present[model.predict(_pixels(test))]


def _pixels(images: NDArray[Any]) -> NDArray[np.float32]:
    return images.reshape(len(images), -1).astype(np.float32) / np.float32(255)
