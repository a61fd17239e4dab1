"""A recipe from private images to a report, in one folder, resumable at every stage.

The folder: ``recipe.toml``, ``release.safetensors``, ``privacy.json``, ``checkpoints/``,
``samples.png``, ``synthetic.npz``, ``report.json``.
"""

from __future__ import annotations

import json
import math
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from dpmmd import encoders, recipe, train
from dpmmd._memory import return_freed_memory
from dpmmd.data import open_source
from dpmmd.encoders import Encoder
from dpmmd.evaluate import check_classifiers, evaluate
from dpmmd.files import write_atomically
from dpmmd.nn import check_encoder
from dpmmd.privacy import Release
from dpmmd.privacy import release as make_release
from dpmmd.privacy.release_file import unit_of
from dpmmd.privacy.report import facts

Say = Callable[[str], None]


class RunError(ValueError):
    """A folder that cannot be used for this run."""


def run(
    recipe_name: str | Path,
    out: str | Path,
    *,
    say: Say,
    device: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Runs a recipe: release, train, sample, evaluate. Stages that are finished are re-used.

    A finished release is never made again: that would cost privacy a second time.

    Args:
        recipe_name: the path of a TOML file, or the name of one of `dpmmd.recipe.names()`.
        out: the run's folder; created, or continued if it holds a run of the same recipe.
        say: called with one line of text at each stage.
        device: see `choose_device`.
        progress: show progress bars on standard error.

    Returns:
        The content of ``report.json``.

    Raises:
        RecipeError, RunError: before any image is read.
    """
    where = choose_device(device)
    settings, text = recipe.read(recipe_name)
    out = Path(out)
    kept = out / "recipe.toml"
    if kept.exists():
        if recipe.parse(kept.read_text("utf-8"), str(kept)) != settings:
            raise RunError(
                f"{out}: holds a run of another recipe ({kept}). Choose another folder with --out, "
                "or go on with that recipe."
            )
    elif out.exists() and any(out.iterdir()):
        raise RunError(f"{out}: exists and is not a run folder; choose another with --out.")
    _check_before_release(settings)
    encoder = load_encoder(settings.encoder).to(where)
    selection = None if settings.selection is None else load_encoder(settings.selection).to(where)

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
    _sample(settings, trained, out, measured, say, progress)
    return _evaluate(settings, released, out, measured, say, progress)


def _check_before_release(settings: recipe.Recipe) -> None:
    """Refuses what would only fail after privacy has been spent."""
    if settings.evaluate is None:
        return
    if settings.data.num_classes is None:
        raise RunError("evaluate: needs labels; set data.num_classes or leave out [evaluate].")
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
            f"epsilon = {wanted.epsilon:g}, delta = {wanted.delta:g}, {wanted.adjacency}"
        )
        with measured.stage("release"):
            source = open_source(
                data.source,
                split=data.split,
                num_classes=data.num_classes,
                group_by=data.group_by,
                allow_empty=wanted.adjacency == "add-remove",
                **data.options(),
            )
            generator = settings.generator.completed(source.image_shape)
            train.build_generator(generator, data.num_classes)  # refused before privacy is spent
            side = generator.image_size
            made = (generator.channels, side, side)
            if settings.evaluate is not None and source.image_shape != made:
                raise RunError(
                    f"generator: makes images (C, H, W) = {made}, those of {data.source} are "
                    f"{source.image_shape}; [evaluate] needs them equal. Set image_size and "
                    "channels in [generator] or [data]."
                )
            released = make_release(
                source,
                encoder,
                epsilon=wanted.epsilon,
                delta=wanted.delta,
                adjacency=wanted.adjacency,
                num_classes=data.num_classes,
                moments=wanted.moments,
                bound=wanted.bound,
                clip=wanted.clip,
                joint_weight=wanted.joint_weight,
                weights=wanted.weights,
                selection=selection,
                shared_taps=wanted.shared_taps,
                batch_size=wanted.batch_size,
                partial_sums=wanted.partial_sums,
                ledger=wanted.ledger,
                budget=wanted.budget,
                out=path,
                progress=progress,
            )
    privacy = json.dumps(facts(released), indent=2) + "\n"
    write_atomically(out / "privacy.json", privacy.encode(), overwrite=True)
    return released


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
        "epsilon": (m.epsilon, wanted.epsilon),
        "delta": (m.delta, wanted.delta),
        "adjacency": (m.adjacency, wanted.adjacency),
        "moments": (m.moments, wanted.moments),
        "bound": (m.bound, wanted.bound),
        "clip": (m.clip, wanted.clip),
        "joint_weight": (m.joint_weight, wanted.joint_weight),
        "shared_taps": (m.shared_taps, wanted.shared_taps),
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
            batch_size=at_once,
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
    batch_size: int = 500,
    seed: int = 0,
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Writes a synthetic set (.npz with x uint8 [n, C, H, W] and y) and a grid of samples (PNG)."""
    from dpmmd.data import write_npz

    images, labels = train.sample(
        trained.generator,
        num_images,
        num_classes,
        batch_size=batch_size,
        seed=seed,
        progress=progress,
    )
    device = next(trained.generator.parameters()).device
    grid = train.sample_grid(trained.generator, num_classes, device, batch_size)
    train.save_png(picture, grid)
    write_npz(path, images, labels, overwrite=overwrite)


def _evaluate(
    settings: recipe.Recipe,
    released: Release,
    out: Path,
    measured: _Measured,
    say: Say,
    progress: bool,
) -> dict[str, Any]:
    path = out / "report.json"
    if path.exists():
        say(f"evaluate: found {path}, finished; re-used")
        report: dict[str, Any] = json.loads(path.read_text("utf-8"))
        return report
    accuracy: dict[str, dict[str, float]] = {}
    if settings.evaluate is not None:
        say(f"evaluate: {', '.join(settings.evaluate.classifiers)}, on real test images")
        data = settings.data
        with measured.stage("evaluate"):
            accuracy = evaluate_files(
                out / "synthetic.npz",
                test=(data.test_source or data.source, data.test_split),
                real=(data.source, data.split),
                num_classes=data.num_classes,
                settings=settings.evaluate,
                progress=progress,
                **data.options(),
            )
    report = make_report(released, accuracy, measured)
    write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
    return report


def evaluate_files(
    synthetic: str | Path,
    *,
    test: tuple[str, str],
    real: tuple[str, str] | None,
    num_classes: int | None,
    settings: recipe.EvaluateSection,
    progress: bool = True,
    **options: Any,
) -> dict[str, dict[str, float]]:
    """Accuracies {classifier: {"synthetic", "real"}} on real test images.

    Reads real images directly: what it returns is NOT covered by the release's guarantee.

    Args:
        synthetic: .npz as `write_samples` writes it.
        test: source and split of the real test images.
        real: source and split of real training images for comparison, or None.
        num_classes: K.
        settings: classifiers, sizes, seed.
        **options: of `dpmmd.data.open_source`, for the real images.
    """

    def arrays(source: str | Path, split: str, **more: Any) -> Any:
        return open_source(source, split=split, num_classes=num_classes, **more).arrays()

    return evaluate(
        arrays(synthetic, "train"),
        arrays(test[0], test[1], **options),
        None if real is None else arrays(real[0], real[1], **options),
        classifiers=settings.classifiers,
        num_train=settings.num_train,
        seed=settings.seed,
        progress=progress,
    )


EVALUATION_NOTE = (
    "Accuracies, run times and memory come from real images: they are not covered by "
    "(epsilon, delta), and publishing them says something about those images."
)


def make_report(
    released: Release, accuracy: dict[str, dict[str, float]], measured: _Measured
) -> dict[str, Any]:
    m = released.metadata
    return {
        "private": m.private,
        "privacy": {
            key: getattr(m, key) for key in ("epsilon", "delta", "mu", "adjacency", "unit")
        },
        "accuracy": accuracy,
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
        self._peak = 0
        if path.exists():
            kept = json.loads(path.read_text("utf-8"))
            self.seconds, self._peak = kept["seconds"], kept["peak_rss_bytes"]

    def stage(self, name: str) -> _Stage:
        return _Stage(self, name)

    def peak(self) -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self._peak = max(self._peak, used)
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


def accuracy_rows(accuracy: dict[str, dict[str, float]]) -> list[tuple[str, str, str]]:
    """classifier, trained on synthetic, trained on real: for a table."""

    def percent(value: float | None) -> str:
        return "" if value is None or math.isnan(value) else f"{100 * value:.1f} %"

    return [
        (name.replace("_", " "), percent(a.get("synthetic")), percent(a.get("real")))
        for name, a in accuracy.items()
    ]
