"""Train on synthetic, test on real: right numbers on problems whose answer is known."""

from __future__ import annotations

import importlib.util
import warnings

import numpy as np
import pytest
import torch

from dpmmd.evaluate import CLASSIFIERS, evaluate, networks
from dpmmd.evaluate.classical import MODELS
from dpmmd.evaluate.networks import WideResNet

pytest.importorskip("sklearn")
NEEDS_XGBOOST = pytest.mark.skipif(
    importlib.util.find_spec("xgboost") is None, reason="xgboost is not installed"
)
ALL = [
    pytest.param(name, marks=NEEDS_XGBOOST) if name == "xgboost" else name
    for name in CLASSIFIERS
    if name != "wrn28_10"  # has a test of its own
]


def bars(n: int, seed: int, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noisy 12 x 12 images with a bright bar whose place is the class, of three."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 120, (n, 1, 12, 12), dtype=np.uint8)
    y = np.arange(n, dtype=np.int64) % 3
    for i, k in enumerate((y + shift) % 3):
        x[i, 0, 4 * k : 4 * k + 3] += 100
    return x, y


def noise(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images that know nothing of their class."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (n, 1, 12, 12), dtype=np.uint8), rng.integers(0, 3, n)


FLOORS = {"decision_tree": 0.7, "bagging": 0.7, "adaboost": 0.7, "gbm": 0.7, "xgboost": 0.7}


@pytest.mark.parametrize("classifier", ALL)
def test_a_good_synthetic_set_scores_high_and_a_meaningless_one_at_chance(classifier: str) -> None:
    test = bars(300, seed=1)
    good = evaluate(bars(600, seed=2), test, noise(600, seed=3), classifiers=(classifier,))
    assert set(good) == {classifier}
    assert good[classifier]["synthetic"] > FLOORS.get(classifier, 0.9)
    assert good[classifier]["real"] < 0.55


@pytest.mark.parametrize("classifier", ALL)
def test_wrong_labels_score_low(classifier: str) -> None:
    result = evaluate(bars(600, seed=2, shift=1), bars(300, seed=1), classifiers=(classifier,))
    assert result[classifier]["synthetic"] < 1 - FLOORS.get(classifier, 0.9)


def test_synthetic_and_real_are_not_mixed_up() -> None:
    test, good, bad = bars(300, seed=1), bars(300, seed=2), bars(300, seed=3, shift=1)
    one = ("logistic_regression",)
    a = evaluate(good, test, bad, classifiers=one)["logistic_regression"]
    b = evaluate(bad, test, good, classifiers=one)["logistic_regression"]
    assert a == {"synthetic": b["real"], "real": b["synthetic"]}
    assert a["synthetic"] > 0.9 > 0.1 > a["real"]


def test_without_real_images_there_is_no_real_accuracy() -> None:
    result = evaluate(bars(90, 0), bars(30, 1), classifiers=("logistic_regression",))
    assert set(result["logistic_regression"]) == {"synthetic"}


def test_the_same_seed_gives_the_same_numbers() -> None:
    sets = bars(120, 0), noise(90, 1), bars(120, 2)
    assert evaluate(*sets, num_train=100, seed=5) == evaluate(*sets, num_train=100, seed=5)


def test_num_train_limits_both_sets() -> None:
    # The first half is right, the second wrong: a draw is not the first num_train images.
    right, wrong = bars(300, 0), bars(300, 1, shift=1)
    mixed = (np.concatenate([right[0], wrong[0]]), np.concatenate([right[1], wrong[1]]))
    test, one = bars(300, 2), ("logistic_regression",)
    drawn = evaluate(mixed, test, mixed, classifiers=one, num_train=200)["logistic_regression"]
    assert drawn["synthetic"] == drawn["real"] < 0.9
    few = evaluate(bars(600, 3), test, classifiers=one, num_train=2)["logistic_regression"]
    assert few["synthetic"] < 0.75  # two images cannot show three classes


def test_inputs_are_left_as_they_are() -> None:
    synthetic, test = bars(60, 0), bars(30, 1)
    before = [a.copy() for a in (*synthetic, *test)]
    evaluate(synthetic, test, num_train=50)
    for a, b in zip(before, (*synthetic, *test), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_caps_on_iterations_do_not_warn_and_other_warnings_pass() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(noise(300, 0), noise(30, 1))


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    evaluate(bars(30, 0), bars(30, 1), classifiers=("logistic_regression",), progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "logistic_regression on synthetic" in err


def test_unknown_classifier_is_refused_and_the_known_named() -> None:
    with pytest.raises(ValueError, match=r"'svm'.*logistic_regression, .*linear_svm, .*cnn, wrn"):
        evaluate(bars(9, 0), bars(9, 1), classifiers=("svm",))
    with pytest.raises(ValueError, match="classifiers="):
        evaluate(bars(9, 0), bars(9, 1), classifiers=())


@pytest.mark.parametrize("which", ["synthetic", "test", "real"])
@pytest.mark.parametrize("fault", ["empty", "lengths", "float", "rank", "size"])
def test_data_that_do_not_fit_are_refused_by_name(which: str, fault: str) -> None:
    sets = {"synthetic": bars(30, 0), "test": bars(30, 1), "real": bars(30, 2)}
    x, y = sets[which]
    sets[which] = {
        "empty": (x[:0], y[:0]),
        "lengths": (x, y[:-1]),
        "float": (x.astype(np.float32), y),
        "rank": (x[:, 0], y),
        "size": (x[:, :, :8, :8], y),
    }[fault]
    named = which if fault != "size" or which != "synthetic" else "test|real"
    with pytest.raises(ValueError, match=f"^({named}):"):
        evaluate(sets["synthetic"], sets["test"], sets["real"])


@pytest.mark.parametrize("which", [0, 1, 2])
def test_an_unlabelled_set_is_refused(which: int) -> None:
    sets: list[tuple[np.ndarray, np.ndarray | None]] = [bars(30, i) for i in range(3)]
    sets[which] = (sets[which][0], None)
    with pytest.raises(ValueError, match="a label for each"):
        evaluate(*sets)  # type: ignore[arg-type]


def test_num_train_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="num_train=0"):
        evaluate(bars(30, 0), bars(30, 1), num_train=0)


def test_missing_scikit_learn_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        evaluate(bars(30, 0), bars(30, 1), classifiers=("mlp",))
    assert evaluate(bars(30, 0), bars(30, 1), classifiers=("cnn",))


def test_missing_xgboost_is_named_before_anything_is_trained(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n: None if n == "xgboost" else real(n))
    with pytest.raises(ImportError, match=r"xgboost needs xgboost; try: pip install xgboost"):
        evaluate(bars(30, 0), bars(30, 1), classifiers=("mlp", "xgboost"))


def test_the_suite_of_twelve() -> None:
    assert len(MODELS) == 12
    assert set(CLASSIFIERS) == {*MODELS, "cnn", "wrn28_10"}


@NEEDS_XGBOOST
def test_a_class_that_is_missing_is_never_predicted() -> None:
    x, y = bars(300, 0)
    kept = y != 1
    result = evaluate((x[kept], y[kept]), (x, y), classifiers=("xgboost", "gaussian_nb"))
    for accuracy in result.values():
        assert 0.6 < accuracy["synthetic"] <= 2 / 3


def test_wrn_28_10_is_the_papers() -> None:
    """36.5 million parameters for CIFAR-10 (Zagoruyko, Komodakis 2016, table 4)."""
    with torch.device("meta"):
        network = WideResNet(3, 10)
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in network.parameters()) == 36_479_194
    assert len(network.blocks) == 12


def test_a_wide_resnet_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        networks, "WideResNet", lambda c, k: WideResNet(c, k, depth=10, width=1, dropout=0.1)
    )
    monkeypatch.setattr(networks, "WRN_EPOCHS", 8)
    result = evaluate(bars(600, 2), bars(300, 1), classifiers=("wrn28_10",))
    assert result["wrn28_10"]["synthetic"] > 0.9


@pytest.mark.long
def test_wrn_28_10_itself_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "WRN_EPOCHS", 6)
    result = evaluate(bars(600, 2), bars(60, 1), classifiers=("wrn28_10",))
    assert result["wrn28_10"]["synthetic"] > 0.9


def test_the_callers_random_state_is_left_alone() -> None:
    before = torch.get_rng_state()
    evaluate(bars(30, 0), bars(30, 1))
    assert torch.equal(before, torch.get_rng_state())
