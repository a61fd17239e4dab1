"""Comparing a synthetic set with real images, which no guarantee covers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dpmmd import metrics, recipe
from dpmmd.data import ImageSource, open_source
from dpmmd.errors import RunError
from dpmmd.evaluate import evaluate, sets


def load_extractors(
    settings: recipe.MetricsSection,
    trained_against: Sequence[str],
    image_size: int,
    device: str | torch.device = "cpu",
) -> list[metrics.Extractor]:
    """The extractors that ``[metrics]`` asks for, and one that was not trained against."""
    unused = set(settings.weights) - set(settings.features)
    if unused:
        raise RunError(
            f"metrics.weights: {', '.join(sorted(unused))} is not among metrics.features = "
            f"{list(settings.features)}."
        )
    return [
        metrics.load(name, image_size=image_size, weights=settings.weights.get(name), device=device)
        for name in metrics.with_held_out(settings.features, trained_against)
    ]


def extractors_of(settings: recipe.Recipe, device: torch.device) -> list[metrics.Extractor]:
    """`load_extractors` for a recipe with a section [metrics]."""
    if settings.metrics is None:
        return []
    # As far as the recipe tells; else the side of the images that the encoder sees.
    size = settings.generator.image_size or settings.data.image_size or settings.encoder.image_size
    side = size if isinstance(size, int) else max(size)
    return load_extractors(settings.metrics, trained_against(settings), side, device)


def trained_against(settings: recipe.Recipe) -> tuple[str, ...]:
    """Names of the encoders that a recipe's generator is trained and selected by."""
    both = (settings.encoder, settings.selection)
    return tuple(section.name for section in both if section is not None)


def read_sets(
    synthetic: str | Path,
    *,
    test: tuple[str, str],
    real: tuple[str, str] | None,
    num_classes: int | None,
    **options: Any,
) -> sets.Sets:
    """The sets of an evaluation, with classes matched (`dpmmd.evaluate.sets`).

    Reads real images directly: nothing of it is covered by the release's guarantee.

    Args:
        synthetic: as `write_samples` writes it.
        test: source and split of the real test images.
        real: source and split of real training images for comparison, or None.
        num_classes: K, where classifiers are to be trained; None: labels are not looked at.
        **options: of `dpmmd.data.open_source`, for the real images.

    Raises:
        EvaluationError: classes that cannot be matched, or too many images that cannot be used.
    """
    labelled = num_classes is not None
    return sets.matched(
        sets.read("synthetic", synthetic, "train", labelled=labelled),
        sets.read("test", *test, labelled=labelled, **options),
        None if real is None else sets.read("real", *real, labelled=labelled, **options),
        num_classes,
    )


def accuracies(
    found: sets.Sets,
    settings: recipe.EvaluateSection,
    *,
    device: str = "cpu",
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """Accuracies {classifier: {"synthetic", "real"}} on real test images: means over the seeds.

    With several seeds each classifier also has ``"seeds"``: {"synthetic": [...], "real": [...]}.

    Args:
        found: from `read_sets`.
        settings: classifiers, sizes, seeds.
        device: where networks are trained.
    """
    pairs = [(each.images, each.labels) for each in found.all()]
    runs = [
        evaluate(
            *pairs,
            classifiers=settings.classifiers,
            num_train=settings.num_train,
            seed=seed,
            device=device,
            progress=progress,
        )
        for seed in settings.seeds
    ]
    result: dict[str, dict[str, Any]] = {}
    for name in settings.classifiers:
        values = {kind: [run[name][kind] for run in runs] for kind in runs[0][name]}
        result[name] = {kind: sum(each) / len(each) for kind, each in values.items()}
        if len(runs) > 1:
            result[name]["seeds"] = values
    return result


def compared(
    found: sets.Sets,
    settings: recipe.MetricsSection,
    *,
    extractors: Sequence[metrics.Extractor],
    test: tuple[str, str],
    trained_against: Sequence[str] | None,
    progress: bool = True,
) -> dict[str, dict[str, Any]]:
    """`dpmmd.metrics.compare` of the synthetic and the test images of `read_sets`."""
    return metrics.compare(
        found.synthetic.images,
        found.test.images,
        extractors,
        num_images=settings.num_images,
        seed=settings.seed,
        trained_against=trained_against,
        told={"real": test[0], "split": test[1]},
        progress=progress,
    )


def sets_of(settings: recipe.Recipe, synthetic: Path) -> tuple[sets.Sets, str]:
    """The sets of a run's evaluation; and why there are no real training images among them, if so.

    What is wrong with the private images does not lose the figures of a finished run.
    """
    data = settings.data
    labelled = settings.evaluate is not None
    options = {
        "test": real_test(settings),
        "num_classes": data.num_classes if labelled else None,
        **data.options(),
    }
    if not labelled:
        return read_sets(synthetic, real=None, **options), ""
    try:
        return read_sets(synthetic, real=(data.source, data.split), **options), ""
    except sets.EvaluationError as error:
        if error.kind != "real":
            raise
        return read_sets(synthetic, real=None, **options), str(error)


def real_test(settings: recipe.Recipe) -> tuple[str, str]:
    """Source and split of the real test images."""
    data = settings.data
    return data.test_source or data.source, data.test_split


def check_test(settings: recipe.Recipe, source: ImageSource) -> None:
    """Opens the test images before privacy is spent, and refuses what evaluation would."""
    where, split = real_test(settings)
    test = open_source(where, split=split, **settings.data.options())
    if test.image_shape != source.image_shape:
        raise RunError(
            f"data.test_source: images of {where} ({split}) are (C, H, W) = {test.image_shape}, "
            f"those of {settings.data.source} {source.image_shape}; set image_size and channels in "
            "[data]."
        )
    if settings.evaluate is None or settings.data.num_classes is None:
        return
    if test.identity == source.identity:
        raise sets.same_source("data.source", "data.test_source", source.name)
    names = None if source.class_names is None else tuple(source.class_names)
    made = sets.Classes("synthetic", source.name, names, settings.data.num_classes)
    sets.match(made, sets.Classes.of("test", test))
