"""A recipe from private images to a report, in one folder, resumable at every stage.

The folder: ``recipe.toml``, ``release.safetensors``, ``privacy.json``, ``checkpoints/``,
``samples.png``, ``synthetic.npz``, ``README.md`` (the set's card), ``report.json``; and
``NOT_PRIVATE`` where the release was made without noise or with test noise.
"""

from __future__ import annotations

import contextlib
import json
import math
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from dpmmd import align, encoders, export, metrics, plan, recipe, train
from dpmmd._memory import peak_memory, return_freed_memory
from dpmmd.data import ImageSource, open_source
from dpmmd.encoders import Encoder
from dpmmd.evaluate import check_classifiers, evaluate, sets
from dpmmd.files import expanded, write_atomically
from dpmmd.nn import check_encoder
from dpmmd.privacy import Release
from dpmmd.privacy import release as make_release
from dpmmd.privacy.metadata import unit_of
from dpmmd.privacy.printed import up
from dpmmd.privacy.report import facts

Say = Callable[[str], None]


# What a release without noise is calibrated to: accounting takes nothing larger. It is stamped NOT
# PRIVATE like every release made with test noise, and its report promises nothing.
NO_NOISE_EPSILON = 9999.0
_FITTED = 20_000  # images that an alignment is fitted to


class RunError(ValueError):
    """A folder that cannot be used for this run."""


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
    encoder = load_encoder(settings.encoder).to(where)
    selection = None if settings.selection is None else load_encoder(settings.selection).to(where)
    extractors = []
    if settings.metrics is not None and not (out / "report.json").exists():
        extractors = load_extractors(
            settings.metrics, _trained_against(settings), side(settings), where
        )

    new = not kept.exists()
    if new:
        write_atomically(kept, text.encode())
    measured = _Measured(out / "measured.json")
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


def _trained_against(settings: recipe.Recipe) -> tuple[str, ...]:
    both = (settings.encoder, settings.selection)
    return tuple(section.name for section in both if section is not None)


def side(settings: recipe.Recipe) -> int:
    """Side of the synthetic images as far as the recipe tells, else of those the encoder sees."""
    size = settings.generator.image_size or settings.data.image_size or settings.encoder.image_size
    return size if isinstance(size, int) else max(size)


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


def choose_device(name: str) -> torch.device:
    """``"auto"``: a GPU if PyTorch sees one, else the CPU; any other name as it is.

    Raises:
        RunError: no such device in this machine, or PyTorch was built without it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device, reason = None, ""
    try:
        device, reason = torch.device(name), "integer sums and float64 run on CPUs and CUDA"
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        device, reason = None, (str(error).splitlines() or [""])[0]
    if device is None or device.type not in ("cpu", "cuda"):
        raise RunError(
            f"device={name!r}: cannot be used here ({reason}); expected 'auto', 'cpu', 'cuda' or "
            "'cuda:1'. Use 'cpu', or install a PyTorch with CUDA and its driver."
        )
    return device


def load_encoder(settings: recipe.EncoderSection) -> Encoder:
    """The encoder that a recipe's ``[encoder]`` section describes."""
    return encoders.load(
        settings.name,
        image_size=settings.image_size,
        taps=settings.taps,
        pool=settings.pool,
        weights=settings.weights,
        precision=settings.precision,
    )


def _release(
    settings: recipe.Recipe,
    encoder: Encoder,
    selection: Encoder | None,
    out: Path,
    measured: _Measured,
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
            model = train.build_generator(generator, data.num_classes)  # before privacy is spent
            if (budget := settings.train.memory) is not None:
                model = model.to(next(p.device for p in encoder.parameters()))
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
                _check_test(settings, source)
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


def _check_test(settings: recipe.Recipe, source: ImageSource) -> None:
    """Opens the test images before privacy is spent, and refuses what evaluation would."""
    where, split = _test_of(settings)
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


def _side(pixel_encoder: dict[str, Any] | None) -> int | None:
    return None if pixel_encoder is None else int(pixel_encoder["image_size"][0])


def _stated(m: Any) -> float:
    """The epsilon of a release's metadata; inf where there is no noise."""
    return math.inf if not m.private and m.epsilon == NO_NOISE_EPSILON else m.epsilon


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
        "epsilon": (_stated(m), wanted.epsilon),
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
    measured: _Measured,
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
    measured: _Measured,
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


def write_samples(
    trained: train.Trained,
    path: Path,
    num_images: int,
    num_classes: int | None,
    *,
    picture: Path,
    card: Path | None = None,
    release: Release | None = None,
    format: str = "npz",
    batch_size: int = 500,
    temperature: float = 1.0,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Writes a synthetic set (`dpmmd.export.write`), a grid of samples (PNG) and a card (Markdown).

    The card says what ``release`` promises; without it there is none. If it holds moments of
    pixels, the images are aligned with them.
    """
    draw = partial(
        train.sample,
        trained.generator,
        num_classes=num_classes,
        batch_size=batch_size,
        temperature=temperature,
    )
    device = next(trained.generator.parameters()).device
    classes = trained.class_names
    if classes is None and release is not None:  # trained by a version that kept no names
        classes = release.metadata.class_names
    alignment = None
    if release is not None and release.pixels is not None:
        alignment = align.fit(release, *draw(_FITTED, seed=seed + 1)).to(device)
    images, labels = draw(num_images, alignment=alignment, seed=seed, progress=progress)
    grid = train.sample_grid(
        trained.generator,
        num_classes,
        device,
        batch_size,
        temperature=temperature,
        alignment=alignment,
    )
    train.save_png(picture, grid)
    if release is not None and card is not None:
        told = export.card(
            release,
            name=path.name,
            format=format,
            shape=images.shape,
            step=trained.selected_step,
            temperature=temperature,
            seed=seed,
        )
        write_atomically(card, told.encode(), overwrite=True)
    export.write(path, images, labels, format=format, classes=classes, overwrite=overwrite)


def _evaluate(
    settings: recipe.Recipe,
    released: Release,
    extractors: list[metrics.Extractor],
    out: Path,
    measured: _Measured,
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
    test = _test_of(settings)
    wanted = settings.evaluate is not None or settings.metrics is not None
    with measured.stage("evaluate") if wanted else contextlib.nullcontext():
        if wanted:
            found, reason = _sets(settings, out / "synthetic.npz")
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
                trained_against=_trained_against(settings),
                progress=progress,
            )
    report = make_report(released, accuracy, measured, figures, told)
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    return report


def _sets(settings: recipe.Recipe, synthetic: Path) -> tuple[sets.Sets, str]:
    """The sets of a run's evaluation; and why there are no real training images among them, if so.

    What is wrong with the private images does not lose the figures of a finished run.
    """
    data = settings.data
    labelled = settings.evaluate is not None
    options = {
        "test": _test_of(settings),
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


def _test_of(settings: recipe.Recipe) -> tuple[str, str]:
    """Source and split of the real test images."""
    data = settings.data
    return data.test_source or data.source, data.test_split


def release_of(checkpoint: Path, given: Path | None) -> Release | None:
    """The release that a checkpoint was trained on: the file given, or the run folder's.

    Raises:
        RunError: the file given is another release.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent.parent
    path = given or folder / "release.safetensors"
    if given is None and not path.exists():
        return None
    file = folder / "checkpoints" / train.CHECKPOINT if checkpoint.is_dir() else checkpoint
    released = Release.load(path)
    if released.metadata.array_sha256 != train.load_checkpoint(file)["array_sha256"]:
        raise RunError(f"{path}: is not the release that {file} was trained on.")
    return released


def encoders_of(path: Path) -> tuple[str, ...]:
    """Names of the encoders that a release was made with."""
    m = Release.load(path).metadata
    return tuple(spec["name"] for spec in (m.encoder, m.selection_encoder) if spec is not None)


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


EVALUATION_NOTE = (
    "Accuracies, metrics, run times and memory come from real images: they are not covered by "
    "(epsilon, delta), and publishing them says something about those images."
)


def make_report(
    released: Release,
    accuracy: dict[str, Any],
    measured: _Measured,
    figures: dict[str, Any],
    told: dict[str, Any],
) -> dict[str, Any]:
    m = released.metadata
    privacy = {key: getattr(m, key) for key in ("epsilon", "delta", "mu", "adjacency", "unit")}
    if math.isinf(_stated(m)):
        privacy |= {"epsilon": None, "mu": None}  # no noise: there is no number
    return {
        "private": m.private,
        "privacy": privacy,
        "accuracy": accuracy,
        "metrics": figures,
        **told,
        "accuracy_note": EVALUATION_NOTE,
        "seconds": {k: round(v, 2) for k, v in measured.seconds.items()},
        "peak_rss_bytes": measured.peak(),
        "version": m.version,
    }


class _Measured:
    """Seconds of each stage and the greatest resident memory, kept over resumptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        self._peak: int | None = None
        if path.exists():
            kept = json.loads(path.read_text("utf-8"))
            self.seconds, self._peak = kept["seconds"], kept["peak_rss_bytes"]

    def stage(self, name: str) -> _Stage:
        return _Stage(self, name)

    def peak(self) -> int | None:
        """Bytes; None where the system does not tell."""
        used = peak_memory()
        self._peak = self._peak if used is None else max(self._peak or 0, used)
        return self._peak

    def write(self) -> None:
        return_freed_memory()  # a stage is done: the next asks for other blocks
        data = {"seconds": self.seconds, "peak_rss_bytes": self.peak()}
        write_atomically(self.path, (json.dumps(data) + "\n").encode(), overwrite=True)


class _Stage:
    def __init__(self, measured: _Measured, name: str) -> None:
        self.measured, self.name = measured, name

    def __enter__(self) -> None:
        self.started = perf_counter()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.measured.seconds[self.name] = perf_counter() - self.started
            self.measured.write()


def metric_rows(figures: dict[str, dict[str, Any]]) -> list[tuple[str, ...]]:
    """The figures of `dpmmd.metrics.compare`, for a table: the heads, then a line a figure."""
    kinds = {None: "", True: " (not trained against)", False: " (trained against)"}
    heads = ("figure", *(f"{name}{kinds[f['held_out']]}" for name, f in figures.items()))
    return [
        heads,
        *(
            (key.replace("_", " "), *(f"{f[key]:.4g}" for f in figures.values()))
            for key in _FIGURES
        ),
    ]


def summarise(folders: Sequence[str | Path]) -> dict[str, Any]:
    """Mean, standard deviation (n - 1) and n of the figures of several finished runs.

    Each run counts once, with the mean over its classifiers' seeds.

    Args:
        folders: run folders with the same privacy statement.

    Raises:
        RunError: no report in a folder, a folder twice, or runs of different (epsilon, delta).
    """
    paths = [expanded(folder) for folder in folders]
    if len({path.resolve() for path in paths}) < max(len(paths), 1):
        raise RunError(f"folders={[str(p) for p in paths]}: expected different run folders.")
    reports = []
    for path in paths:
        if not (path / "report.json").is_file():
            raise RunError(f"{path}: has no report.json; finish its run first (`dpmmd run`).")
        reports.append(json.loads((path / "report.json").read_text("utf-8")))
    first = reports[0]
    for path, report in zip(paths, reports, strict=True):
        if (report["private"], report["privacy"]) != (first["private"], first["privacy"]):
            raise RunError(
                f"{path}: its privacy is {report['privacy']}, that of {paths[0]} is "
                f"{first['privacy']}; summarise runs that promise the same."
            )
    collected: dict[str, list[float]] = {}
    for report in reports:
        for name, figures in {**report["accuracy"], **report.get("metrics", {})}.items():
            for key, value in figures.items():
                if key in ("synthetic", "real") or key in _FIGURES:
                    collected.setdefault(f"{name}.{key}", []).append(value)
    return {
        "runs": [str(path) for path in paths],
        "private": first["private"],
        "privacy": first["privacy"],
        "figures": {
            name: {
                "mean": statistics.fmean(values),
                "sd": statistics.stdev(values) if len(values) > 1 else None,
                "n": len(values),
            }
            for name, values in collected.items()
        },
        "accuracy_note": EVALUATION_NOTE,
    }


_FIGURES = ("frechet_distance", "kid", "precision", "recall", "density", "coverage")


def accuracy_rows(accuracy: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """classifier, trained on synthetic, trained on real: for a table."""

    def percent(classifier: dict[str, Any], kind: str) -> str:
        value = classifier.get(kind)
        if value is None or math.isnan(value):
            return ""
        seeds = classifier.get("seeds", {}).get(kind, ())
        spread = f" ± {100 * statistics.stdev(seeds):.1f} (n = {len(seeds)})" if seeds else ""
        return f"{100 * value:.1f}{spread} %"

    return [
        (name.replace("_", " "), percent(a, "synthetic"), percent(a, "real"))
        for name, a in accuracy.items()
    ]
