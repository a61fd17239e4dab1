"""A recipe from private images to a report, in one folder, resumable at every stage.

The folder: ``recipe.toml``, ``release.safetensors``, ``privacy.json``, ``checkpoints/``,
``samples.png``, ``synthetic.npz``, ``README.md`` (the set's card), ``report.json``; and
``NOT_PRIVATE`` where the release was made without noise or with test noise.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpmmd import encoders, generators, metrics, plan, recipe, train
from dpmmd.data import open_source
from dpmmd.devices import choose_device, device_of
from dpmmd.encoders import Encoder
from dpmmd.errors import RunError
from dpmmd.evaluate import check_classifiers
from dpmmd.files import expanded, write_atomically
from dpmmd.nn import check_encoder
from dpmmd.privacy import Release
from dpmmd.privacy import release as make_release
from dpmmd.privacy.printed import up
from dpmmd.privacy.release_file import unit_of
from dpmmd.privacy.report import facts
from dpmmd.run.evaluation import accuracies, check_test, compared, load_extractors, sets_of, test_of
from dpmmd.run.folder import Measured
from dpmmd.run.report import NO_NOISE_EPSILON, make_report, stated_epsilon
from dpmmd.run.samples import write_samples

Say = Callable[[str], None]


def no_noise(n: int, sd: float) -> np.ndarray:
    """In place of the sampler, for ``epsilon = inf``: nothing is added, NOT PRIVATE."""
    return np.zeros(n, np.int64)


def run(
    recipe_name: str | Path,
    out: str | Path,
    *,
    say: Say,
    changes: Sequence[str] = (),
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Runs a recipe: release, train, sample, evaluate. Stages that are finished are re-used.

    A finished release is never made again: that would cost privacy a second time.

    Args:
        recipe_name: the path of a TOML file, or the name of one of `dpmmd.recipe.names()`.
        out: the run's folder; created, or continued if it holds a run of the same recipe.
        say: called with one line of text at each stage.
        changes: keys to set anew, as `dpmmd.recipe.with_changes` takes them; the folder's
            ``recipe.toml`` has them in it.
        device: see `choose_device`.
        progress: show progress bars on standard error.

    Returns:
        The content of ``report.json``.

    Raises:
        RecipeError, RunError: before any image is read.
    """
    where = choose_device(device)
    settings, text = recipe.read(recipe_name)
    if changes:
        settings, text = recipe.with_changes(text, changes, str(recipe_name))
    out = expanded(out)
    kept = out / "recipe.toml"
    if kept.exists():
        if recipe.parse(kept.read_text("utf-8"), str(kept)) != settings:
            raise RunError(
                f"{out}: holds a run of another recipe ({kept}). Choose another folder with --out, "
                "or go on with that recipe."
            )
    elif out.is_symlink() and not out.exists():
        raise RunError(f"{out}: a link to a folder that is not there; choose another with --out.")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: exists and is not a run folder; choose another with --out.")
    _check_before_release(settings, where)
    encoder = encoders.load(**settings.encoder.arguments()).to(where)
    selection = (
        None
        if settings.selection is None
        else encoders.load(**settings.selection.arguments()).to(where)
    )
    extractors = []
    if settings.metrics is not None and not (out / "report.json").exists():
        extractors = load_extractors(
            settings.metrics, trained_against_of(settings), side(settings), where
        )

    new = not kept.exists()
    if new:
        write_atomically(kept, text.encode())
    measured = Measured(out / "measured.json")
    try:
        released = _release(settings, encoder, selection, out, measured, say, progress)
    except Exception:
        # Nothing was released: leave no folder that a corrected recipe could not use.
        if new and not (out / "release.safetensors").exists():
            kept.unlink()
            out.rmdir()
        raise
    trained = _train(settings, released, encoder, selection, out, measured, say, progress)
    _sample(settings, released, trained, out, measured, say, progress)
    return _evaluate(settings, released, extractors, out, measured, say, where, progress)


def trained_against_of(settings: recipe.Recipe) -> tuple[str, ...]:
    both = (settings.encoder, settings.selection)
    return tuple(section.name for section in both if section is not None)


def side(settings: recipe.Recipe) -> int:
    """Side of the synthetic images as far as the recipe tells, else of those the encoder sees."""
    size = settings.generator.image_size or settings.data.image_size or settings.encoder.image_size
    return size if isinstance(size, int) else max(size)


def _check_before_release(settings: recipe.Recipe, device: torch.device) -> None:
    """Refuses what would only fail after privacy has been spent."""
    train.is_graphed(settings.train, device)  # raises where a graph is asked for and cannot be
    if settings.evaluate is None:
        return
    if settings.data.num_classes is None:
        raise RunError("evaluate: needs labels; set data.num_classes or leave out [evaluate].")
    if settings.data.num_classes == 1:
        raise RunError(
            "evaluate: with data.num_classes = 1 every classifier is right; leave out [evaluate]."
        )
    check_classifiers(settings.evaluate.classifiers)


def _release(
    settings: recipe.Recipe,
    encoder: Encoder,
    selection: Encoder | None,
    out: Path,
    measured: Measured,
    say: Say,
    progress: bool,
) -> Release:
    path = out / "release.safetensors"
    data, wanted = settings.data, settings.release
    if path.exists():
        released = Release.load(path)
        _check_release(released, settings, encoder, selection, path)
        say(f"release: found {path}, finished; re-used, no further privacy is spent")
    else:
        say(
            f"release: {data.source} ({data.split}), encoder {encoder.name}, D = {encoder.dim}, "
            f"epsilon = {up(wanted.epsilon)}, delta = {up(wanted.delta)}, {wanted.adjacency}"
        )
        if math.isinf(wanted.epsilon):
            say("release: epsilon = inf adds NO NOISE: NOT PRIVATE, for comparison only")
        with measured.stage("release"):
            source = open_source(
                data.source,
                split=data.split,
                num_classes=data.num_classes,
                group_by=data.group_by,
                allow_empty=wanted.adjacency == "add-remove",
                **data.options(),
            )
            if data.num_images is not None and source.num_images != data.num_images:
                raise RunError(
                    f"data.num_images = {data.num_images}: {data.source} ({data.split}) holds "
                    f"{source.num_images} images; is it the right one, and whole? If so, correct "
                    "the key or leave it out."
                )
            generator = settings.generator.completed(source.image_shape)
            model = generators.build(
                **generator.arguments(), num_classes=data.num_classes
            )  # before privacy is spent
            if (budget := settings.train.memory) is not None:
                model = model.to(device_of(encoder))
                plan.before_release(settings, budget, encoder, model, source.image_shape[0])
            del model
            side = generator.image_size
            made = (generator.channels, side, side)
            if wanted.pixel_moments is not None and generator.channels != source.image_shape[0]:
                raise RunError(
                    f"release.pixel_moments: {data.source} has {source.image_shape[0]} channels, "
                    f"the generator makes {generator.channels}; alignment needs them equal. Set "
                    "channels in [generator] or [data], or leave pixel_moments out."
                )
            compared_with_real = settings.evaluate is not None or settings.metrics is not None
            if compared_with_real and source.image_shape != made:
                raise RunError(
                    f"generator: makes images (C, H, W) = {made}, those of {data.source} are "
                    f"{source.image_shape}; evaluation needs them equal. Set image_size and "
                    "channels in [generator] or [data]."
                )
            if compared_with_real:
                check_test(settings, source)
            released = make_release(
                source,
                encoder,
                epsilon=min(wanted.epsilon, NO_NOISE_EPSILON),
                insecure_test_noise=no_noise if math.isinf(wanted.epsilon) else None,
                delta=wanted.delta,
                adjacency=wanted.adjacency,
                num_classes=data.num_classes,
                moments=wanted.moments,
                bound=wanted.bound,
                clip=wanted.clip,
                joint_weight=wanted.joint_weight,
                weights=wanted.weights,
                pixel_moments=wanted.pixel_moments,
                selection=selection,
                shared_taps=wanted.shared_taps,
                batch_size=wanted.batch_size,
                partial_sums=wanted.partial_sums,
                ledger=wanted.ledger,
                budget=wanted.budget,
                population=wanted.population,
                out=path,
                progress=progress,
            )
    if not released.metadata.private:
        stamp = f"{facts(released)['promise']}\n"
        write_atomically(out / "NOT_PRIVATE", stamp.encode(), overwrite=True)
    privacy = json.dumps(facts(released), indent=2) + "\n"
    write_atomically(out / "privacy.json", privacy.encode(), overwrite=True)
    return released


def _side(pixel_encoder: dict[str, Any] | None) -> int | None:
    return None if pixel_encoder is None else int(pixel_encoder["image_size"][0])


def _check_release(
    released: Release,
    settings: recipe.Recipe,
    encoder: Encoder,
    selection: Encoder | None,
    path: Path,
) -> None:
    """Refuses a release that the recipe would not have made."""
    m, wanted = released.metadata, settings.release
    pairs = {
        "epsilon": (stated_epsilon(m), wanted.epsilon),
        "delta": (m.delta, wanted.delta),
        "adjacency": (m.adjacency, wanted.adjacency),
        "moments": (m.moments, wanted.moments),
        "bound": (m.bound, wanted.bound),
        "clip": (m.clip, wanted.clip),
        "joint_weight": (m.joint_weight, wanted.joint_weight),
        "shared_taps": (m.shared_taps, wanted.shared_taps),
        "pixel_moments": (_side(m.pixel_encoder), wanted.pixel_moments),
        "unit": (m.unit, unit_of(settings.data.group_by)),
        "num_classes": (m.num_classes, settings.data.num_classes or 1),
    }
    for name, (found, asked) in pairs.items():
        if found != asked:
            raise RunError(
                f"{path}: made with {name} = {found!r}, the recipe asks for {asked!r}. "
                "Choose another folder with --out."
            )
    check_encoder(released, encoder)
    if selection is not None:
        check_encoder(released, selection, selection=True)


def _train(
    settings: recipe.Recipe,
    released: Release,
    encoder: Encoder,
    selection: Encoder | None,
    out: Path,
    measured: Measured,
    say: Say,
    progress: bool,
) -> train.Trained:
    checkpoint = out / "checkpoints" / train.CHECKPOINT
    step = int(train.load_checkpoint(checkpoint)["step"]) if checkpoint.exists() else 0
    if step >= settings.train.steps:
        say(f"train: found {checkpoint}, finished; re-used")
    else:
        origin = f"resumes at step {step} of" if step else "starts:"
        say(f"train: {origin} {settings.train.steps} steps, batch {settings.train.batch_size}")
    trained = train.train(
        released,
        encoder,
        settings=settings.train,
        generator_settings=settings.generator,
        selection_encoder=selection,
        out=out,
        progress=progress,
    )
    measured.seconds["train"] = trained.seconds
    measured.write()
    return trained


def _sample(
    settings: recipe.Recipe,
    released: Release,
    trained: train.Trained,
    out: Path,
    measured: Measured,
    say: Say,
    progress: bool,
) -> None:
    path = out / "synthetic.npz"
    if path.exists():
        say(f"sample: found {path}, finished; re-used")
        return
    say(f"sample: {settings.sample.num_images} images")
    at_once = settings.sample.batch_size
    if settings.train.memory is not None:
        at_once = min(at_once, settings.train.batch_size)
    with measured.stage("sample"):
        write_samples(
            trained,
            path,
            settings.sample.num_images,
            settings.data.num_classes,
            picture=out / "samples.png",
            card=out / "README.md",
            release=released,
            batch_size=at_once,
            temperature=settings.sample.temperature,
            seed=settings.sample.seed,
            progress=progress,
        )


def _evaluate(
    settings: recipe.Recipe,
    released: Release,
    extractors: list[metrics.Extractor],
    out: Path,
    measured: Measured,
    say: Say,
    where: torch.device,
    progress: bool,
) -> dict[str, Any]:
    path = out / "report.json"
    if path.exists():
        say(f"evaluate: found {path}, finished; re-used")
        report: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return report
    accuracy: dict[str, Any] = {}
    figures: dict[str, Any] = {}
    told: dict[str, Any] = {}
    test = test_of(settings)
    wanted = settings.evaluate is not None or settings.metrics is not None
    with measured.stage("evaluate") if wanted else contextlib.nullcontext():
        if wanted:
            found, reason = sets_of(settings, out / "synthetic.npz")
            told = found.facts() | ({"real_not_compared": reason} if reason else {})
            if reason:
                say(f"evaluate: {reason} Classifiers are not trained on real images.")
            for line in found.lines():
                say(f"evaluate: {line}")
        if settings.evaluate is not None:
            say(f"evaluate: {', '.join(settings.evaluate.classifiers)}, on real test images")
            accuracy = accuracies(found, settings.evaluate, device=str(where), progress=progress)
        if settings.metrics is not None:
            say(f"metrics: {', '.join(e.name for e in extractors)}, on real test images")
            figures = compared(
                found,
                settings.metrics,
                extractors=extractors,
                test=test,
                trained_against=trained_against_of(settings),
                progress=progress,
            )
    report = make_report(released, accuracy, measured, figures, told)
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    return report
