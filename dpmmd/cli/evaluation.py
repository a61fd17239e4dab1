"""The command `evaluate`, and how its figures are printed."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dpmmd.cli.console import (
    Background,
    Channels,
    Crop,
    Device,
    Json,
    Quiet,
    print_json,
    print_table,
    say,
)

if TYPE_CHECKING:
    from dpmmd.recipe import EvaluateSection, MetricsSection


def evaluate(
    synthetic: Annotated[
        Path, typer.Argument(help="Synthetic set: *.npz, *.parquet, or a folder of images.")
    ],
    test: Annotated[str, typer.Option(help="Real test images: a path or a data set's name.")],
    num_classes: Annotated[
        int | None,
        typer.Option(
            help="Number of classes of the synthetic set; without it no classifiers are trained."
        ),
    ] = None,
    test_split: Annotated[str, typer.Option(help="Split of the test images.")] = "test",
    real: Annotated[
        str | None, typer.Option(help="Real training images to compare with (split 'train').")
    ] = None,
    classifiers: Annotated[
        str,
        typer.Option(
            help="Comma-separated: cnn, wrn28_10, or of the suite of twelve: logistic_regression, "
            "random_forest, gaussian_nb, bernoulli_nb, linear_svm, decision_tree, lda, adaboost, "
            "mlp, bagging, gbm, xgboost."
        ),
    ] = "logistic_regression,mlp,cnn",
    num_train: Annotated[
        int | None, typer.Option(help="Training images of each set. Default: all.")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="Side to bring real images to.")] = None,
    channels: Channels = None,
    crop: Crop = None,
    background: Background = None,
    seeds: Annotated[
        str, typer.Option("--seeds", "--seed", help="Seeds of the classifiers, comma-separated.")
    ] = "0",
    features: Annotated[
        str | None,
        typer.Option(
            help="Also FID, KID, precision, recall, density and coverage, on these features "
            "(comma-separated): inception-v3 or an encoder's name."
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option(help="NAME=FILE, weights of a feature extractor; may be repeated."),
    ] = None,
    num_compared: Annotated[
        int, typer.Option(help="At most so many images of each set for --features.")
    ] = 10_000,
    release: Annotated[
        Path | None,
        typer.Option(
            help="The set's release: --features then has one encoder that the generator was not "
            "trained against."
        ),
    ] = None,
    device: Device = "auto",
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train classifiers on a synthetic set, test them on real images; compare the images.

    Classes are matched by their names where both sets have names, else by number. It says how many
    images of each set it used, and refuses sets of which too much is missing.

    Reads real images: what it prints is NOT covered by the release's (epsilon, delta).
    """
    from dpmmd import run as runs
    from dpmmd.devices import choose_device

    if num_classes is None and features is None:
        raise ValueError("give --num-classes, to train classifiers, or --features, or both.")
    where = choose_device(device)
    settings = _classifiers(classifiers, num_train, seeds)
    compared, against = None, None
    if features is not None:
        compared = _comparison(features, weights or (), num_compared)
        against = None if release is None else runs.encoders_of(release)
        extractors = runs.load_extractors(compared, against or (), image_size or 32, where)
    found = runs.read_sets(
        synthetic,
        test=(test, test_split),
        real=None if real is None or num_classes is None else (real, "train"),
        num_classes=num_classes,
        image_size=image_size,
        channels=channels,
        crop=crop,
        background=background,
    )
    result: dict[str, Any] = {"accuracy": {}, "metrics": {}, **found.facts()}
    if not as_json:
        for line in found.lines():
            say(line)
    if compared is not None:
        result["metrics"] = runs.compared(
            found,
            compared,
            extractors=extractors,
            test=(test, test_split),
            trained_against=against,
            progress=not quiet,
        )
    if num_classes is not None:
        result["accuracy"] = runs.accuracies(found, settings, device=str(where), progress=not quiet)
    if as_json:
        print_json({**result, "accuracy_note": runs.EVALUATION_NOTE})
    else:
        print_figures(result)


def _classifiers(names: str, num_train: int | None, seeds: str) -> "EvaluateSection":
    from dpmmd import recipe as recipes
    from dpmmd.evaluate import check_classifiers

    try:
        numbers = tuple(int(part) for part in seeds.split(","))
    except ValueError:
        raise ValueError(f"--seeds {seeds!r}: expected whole numbers, e.g. 0,1,2.") from None
    found = recipes.revised(
        recipes.EvaluateSection(),
        {"classifiers": _words(names), "num_train": num_train, "seeds": numbers},
    )
    check_classifiers(found.classifiers)
    return found


def _comparison(features: str, weights: Sequence[str], most: int) -> "MetricsSection":
    from dpmmd import recipe as recipes

    files = {name: path for name, _, path in (pair.partition("=") for pair in weights)}
    return recipes.revised(
        recipes.MetricsSection(),
        {"features": _words(features), "weights": files, "num_images": most},
    )


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(","))


def print_figures(report: dict[str, Any]) -> None:
    """Accuracies and metrics, with what they are figures of."""
    from dpmmd import run as runs

    if not report["accuracy"] and not report["metrics"]:
        return
    if report["accuracy"]:
        print_table(
            runs.accuracy_rows(report["accuracy"]),
            *("classifier", "trained on synthetic", "trained on real"),
            title="Accuracy on real images",
        )
    if report["metrics"]:
        heads, *rows = runs.metric_rows(report["metrics"])
        print_table(rows, *heads, title="Synthetic against real images")
        f = next(iter(report["metrics"].values()))
        libraries = ", ".join(f"{name} {number}" for name, number in f["libraries"].items())
        say(
            f"{f['synthetic_images']} synthetic and {f['real_images']} real images "
            f"({f['real']}, {f['split']}); {libraries}"
        )
    say(runs.EVALUATION_NOTE)
