"""Figures in feature spaces: right where the answer is known, and stated with what they rest on."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import linalg

from dpmmd import metrics
from dpmmd._torchvision import import_torchvision
from dpmmd.encoders import WeightsError, WeightsNotFoundError
from dpmmd.metrics import Extractor, compare, load, with_held_out

if any(importlib.util.find_spec(name) is None for name in ("torch_fidelity", "prdc")):
    pytest.skip("the metrics' packages are not installed", allow_module_level=True)
FIGURES = {"frechet_distance", "kid", "kid_sd", "precision", "recall", "density", "coverage"}


def pixels() -> Extractor:
    """An extractor of ours: the mean of each quarter of the red channel, 0 to 255."""

    def extract(images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images[:, 0].float(), 2).flatten(1)

    return Extractor("pixels", "4 means", "none", "none", extract)


def images(n: int, seed: int, low: int = 0, high: int = 200) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (n, 3, 8, 8), dtype=np.uint8)


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) (Dowson, Landau 1982)."""
    s, t = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = linalg.sqrtm(s @ t).real
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root))


def test_the_frechet_distance_is_its_formula() -> None:
    a, b = images(400, 0), images(300, 1, 20, 240)
    result = compare(a, b, [pixels()])["pixels"]
    features = [pixels().extract(torch.from_numpy(x)).double().numpy() for x in (a, b)]
    assert result["frechet_distance"] == pytest.approx(frechet(*features), rel=1e-6)
    assert result["frechet_distance"] > 100


def test_figures_of_sets_that_are_equal_alike_and_apart() -> None:
    a = images(300, 0)
    equal = compare(a, a, [pixels()])["pixels"]
    assert equal["frechet_distance"] == pytest.approx(0, abs=1e-6)
    assert (equal["precision"], equal["recall"], equal["coverage"]) == (1, 1, 1)
    alike = compare(a, images(300, 1), [pixels()])["pixels"]
    # features have variance 58^2 / 16, so that two means of 300 differ by 4 * 2 * 208 / 300 = 5.6
    assert alike["frechet_distance"] < 30
    assert min(alike["precision"], alike["recall"], alike["coverage"]) > 0.8
    apart = compare(a // 8, images(300, 1, 200, 255), [pixels()])["pixels"]
    assert apart["frechet_distance"] > 10_000
    assert (apart["precision"], apart["recall"], apart["coverage"]) == (0, 0, 0)
    assert apart["kid"] > alike["kid"] + 1


def test_synthetic_and_real_are_not_mixed_up() -> None:
    """A narrow synthetic set has precision and no recall; a broad one the other way round."""
    broad = np.repeat(np.random.default_rng(0).integers(0, 256, (300, 1, 1, 1), np.uint8), 3, 1)
    broad = np.broadcast_to(broad, (300, 3, 8, 8)) // 2 + images(300, 1, 0, 60)
    narrow = images(300, 2, 0, 60) + np.uint8(60)
    result = compare(narrow, broad, [pixels()])["pixels"]
    swapped = compare(broad, narrow, [pixels()])["pixels"]
    assert result["precision"] > 0.9 > 0.5 > result["recall"]
    assert swapped["recall"] == pytest.approx(result["precision"])
    assert swapped["precision"] == pytest.approx(result["recall"])


def test_what_a_figure_rests_on_is_stated_beside_it() -> None:
    result = compare(
        images(50, 0), images(40, 1), [pixels()], num_images=45, seed=7,
        trained_against=("pixels",), told={"real": "some", "split": "test"},
    )["pixels"]  # fmt: skip
    assert set(result) > FIGURES
    assert (result["synthetic_images"], result["real_images"]) == (45, 40)
    assert result["held_out"] is False
    assert (result["real"], result["split"], result["seed"]) == ("some", "test", 7)
    assert (result["features"], result["resize"]) == ("4 means", "none")
    assert result["kid_subset_size"] == 20
    assert set(result["libraries"]) == {"torch-fidelity", "prdc"}
    assert compare(images(50, 0), images(40, 1), [pixels()])["pixels"]["held_out"] is True


def test_the_same_seed_gives_the_same_figures_and_grey_is_three_channels(
    capfd: pytest.CaptureFixture[str],
) -> None:
    sets = images(60, 0)[:, :1], images(50, 1)[:, :1]
    first = compare(*sets, [pixels()], num_images=40, seed=3)
    assert first == compare(*sets, [pixels()], num_images=40, seed=3)
    assert first != compare(*sets, [pixels()], num_images=40, seed=4)
    assert first == compare(*(x.repeat(3, axis=1) for x in sets), [pixels()], num_images=40, seed=3)
    assert capfd.readouterr().out == ""  # prdc prints


def test_an_encoder_of_the_package() -> None:
    extractor = load("squeezenet1.1", image_size=28)
    x = torch.from_numpy(images(3, 0))
    features = extractor.extract(x)
    assert features.shape == (3, 512)
    assert "fire9, 512 numbers" in extractor.features
    assert extractor.resize.startswith("32 x 32, bilinear")
    assert extractor.weights.startswith("f286bbf4")
    torch.testing.assert_close(extractor.extract(x[1:2]), features[1:2], rtol=1e-4, atol=1e-5)
    assert compare(images(12, 0), images(9, 1), [extractor])["squeezenet1.1"]["kid"]


@pytest.mark.parametrize(
    ("features", "trained", "expected"),
    [
        (["squeezenet1.1"], ["squeezenet1.1"], ("squeezenet1.1", "efficientnet-lite0")),
        (["efficientnet-lite0"], ["efficientnet-lite0"], ("efficientnet-lite0", "squeezenet1.1")),
        (["inception-v3"], ["vgg19"], ("inception-v3",)),
        (["vgg19"], ["vgg19"], ("vgg19", "efficientnet-lite0")),
        (["squeezenet1.1"], ["squeezenet1.1", "vgg19"], ("squeezenet1.1", "efficientnet-lite0")),
    ],
)
def test_one_encoder_is_never_one_that_was_trained_against(
    features: list[str], trained: list[str], expected: tuple[str, ...]
) -> None:
    assert with_held_out(features, trained) == expected


def test_extractors_that_cannot_be_had_are_refused() -> None:
    for features in (["inception"], [], ["vgg19", "vgg19"]):
        with pytest.raises(ValueError, match=r"metrics\.features=.*inception-v3, .*vgg19"):
            with_held_out(features, [])
    both = ["squeezenet1.1", "efficientnet-lite0"]
    with pytest.raises(ValueError, match=r"trained against all of them; add.*inception-v3"):
        with_held_out(both, both)


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install torch-fidelity prdc"):
        load("squeezenet1.1")


def test_inceptions_weights_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(WeightsNotFoundError, match=r"absent\.pth': no such file; download https"):
        load("inception-v3", weights=tmp_path / "absent.pth")
    (tmp_path / "other.pth").write_bytes(b"not weights")
    with pytest.raises(WeightsError, match=r"other\.pth': not torch-fidelity's weights"):
        load("inception-v3", weights=tmp_path / "other.pth")
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "another.pth")
    with pytest.raises(WeightsError, match=r"another\.pth': not torch-fidelity's weights"):
        load("inception-v3", weights=tmp_path / "another.pth")

    def offline(*_: object, **__: object) -> None:
        raise OSError("no network")

    import_torchvision()
    from torch_fidelity import feature_extractor_inceptionv3

    monkeypatch.setattr(feature_extractor_inceptionv3, "load_state_dict_from_url", offline)
    with pytest.raises(WeightsNotFoundError, match=r"no network.*metrics\.weights"):
        load("inception-v3")


def test_inception_from_a_file_of_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With random weights of the right shapes: the file is read, and the features are its own."""
    import_torchvision()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    torch.save({}, tmp_path / "empty.pth")
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        model = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=tmp_path / "empty.pth"
        )
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    extractor = load("inception-v3", weights=tmp_path / "weights.pth")
    assert extractor.weights == str(tmp_path / "weights.pth")
    x = torch.from_numpy(images(2, 0))
    features = metrics._features(extractor, x)
    assert features.shape == (2, 2048)
    model.eval()
    torch.testing.assert_close(features, model(x)[0].double())


@pytest.mark.parametrize(
    ("synthetic", "real", "message"),
    [
        (images(9, 0), images(9, 1)[:, :, :4], "give image_size and channels"),
        (images(9, 0), images(6, 1), "6 images, expected at least 7"),
        (images(9, 0) / 255, images(9, 1), "expected uint8"),
        (images(9, 0)[0], images(9, 1), "expected uint8"),
    ],
)
def test_sets_that_cannot_be_compared_are_refused(
    synthetic: np.ndarray, real: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(synthetic, real, [pixels()])
