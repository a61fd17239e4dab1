"""The classifiers on pixels: the suite of DP-MERF, DP-HP and DP-MEPF for 28-px images.

Settings are those of the suite's published code where scikit-learn still takes them; what differs
is said beside it. Pixels are divided by 255 and flattened.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Predictor = Callable[[NDArray[Any]], NDArray[np.int64]]

LOGISTIC_ITERATIONS = 100  # the suite's: 5,000
MLP_EPOCHS = 20  # the suite's: 200


def _logistic_regression(seed: int) -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=LOGISTIC_ITERATIONS, random_state=seed)


def _random_forest(seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier

    return RandomForestClassifier(n_estimators=100, class_weight="balanced", random_state=seed)


def _gaussian_nb(seed: int) -> Any:
    from sklearn.naive_bayes import GaussianNB

    return GaussianNB()


def _bernoulli_nb(seed: int) -> Any:
    from sklearn.naive_bayes import BernoulliNB

    return BernoulliNB(binarize=0.5)


def _linear_svm(seed: int) -> Any:
    from sklearn.svm import LinearSVC

    return LinearSVC(max_iter=10_000, tol=1e-8, loss="hinge", random_state=seed)


def _decision_tree(seed: int) -> Any:
    from sklearn.tree import DecisionTreeClassifier

    return DecisionTreeClassifier(class_weight="balanced", random_state=seed)


def _lda(seed: int) -> Any:
    from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

    return LinearDiscriminantAnalysis(solver="eigen", tol=1e-8, shrinkage=0.5)


def _adaboost(seed: int) -> Any:
    from sklearn.ensemble import AdaBoostClassifier

    # the suite's algorithm is SAMME.R, which scikit-learn has dropped; this is SAMME
    return AdaBoostClassifier(n_estimators=100, random_state=seed)


def _mlp(seed: int) -> Any:
    from sklearn.neural_network import MLPClassifier

    return MLPClassifier(hidden_layer_sizes=(100,), max_iter=MLP_EPOCHS, random_state=seed)


def _bagging(seed: int) -> Any:
    from sklearn.ensemble import BaggingClassifier

    return BaggingClassifier(max_samples=0.1, n_estimators=20, random_state=seed)


def _gbm(seed: int) -> Any:
    from sklearn.ensemble import GradientBoostingClassifier

    return GradientBoostingClassifier(subsample=0.1, n_estimators=50, random_state=seed)


def _xgboost(seed: int) -> Any:
    from xgboost import XGBClassifier

    return XGBClassifier(colsample_bytree=0.1, n_estimators=50, random_state=seed)


MODELS: dict[str, Callable[[int], Any]] = {
    "logistic_regression": _logistic_regression,
    "random_forest": _random_forest,
    "gaussian_nb": _gaussian_nb,
    "bernoulli_nb": _bernoulli_nb,
    "linear_svm": _linear_svm,
    "decision_tree": _decision_tree,
    "lda": _lda,
    "adaboost": _adaboost,
    "mlp": _mlp,
    "bagging": _bagging,
    "gbm": _gbm,
    "xgboost": _xgboost,
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
