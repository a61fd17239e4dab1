"""A run: release, train, sample, evaluate, each stage once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from dpmmd import precision, recipe, train
from dpmmd.devices import choose_device
from dpmmd.errors import RunError
from dpmmd.evaluate import check_classifiers
from dpmmd.files import expanded, write_atomically
from dpmmd.metrics import Extractor
from dpmmd.privacy.report import facts
from dpmmd.recipe import Recipe
from dpmmd.run import evaluation
from dpmmd.run.folder import MOMENTS, RELEASE, Measured, Released, Running, Say, is_new
from dpmmd.run.releases import Releasing
from dpmmd.run.report import make_report
from dpmmd.run.samples import write_samples
from dpmmd.train import CHECKPOINT, Trained, ahead


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
    folder = expanded(out)
    new = is_new(folder, settings)
    job = Job.of(settings, folder, where, say, progress)
    say(job.precision)
    if new:
        write_atomically(folder / "recipe.toml", text.encode())
    try:
        released = job.release()
    except Exception:
        # Nothing was released: leave no folder that a corrected recipe could not use.
        if new and not job.has_released:
            (folder / "recipe.toml").unlink()
            folder.rmdir()
        raise
    trained = job.train(released)
    job.sample(released, trained)
    return job.evaluate(released)


@dataclass
class Job(Running):
    """A recipe's run in its folder: four stages, each of which re-uses what is finished.

    Attributes:
        extractors: of the evaluation's metrics.
    """

    extractors: list[Extractor] = field(default_factory=list)

    @classmethod
    def of(
        cls, settings: Recipe, folder: Path, device: torch.device, say: Say, progress: bool
    ) -> Job:
        """Loads what the stages need.

        Raises:
            RunError, ValueError: settings that would only fail after privacy has been spent.
        """
        _check(settings, device)
        encoder, selection = ahead.loaded(settings, device)
        finished = (folder / "report.json").exists()
        extractors = [] if finished else evaluation.extractors_of(settings, device)
        measured = Measured(folder / "measured.json")
        return cls(
            settings,
            folder,
            device,
            encoder,
            selection,
            measured,
            say,
            progress,
            extractors=extractors,
        )

    @property
    def precision(self) -> str:
        """One line that says in which precision everything is computed."""
        trained = precision.of_generator(self.settings.train.precision, self.device)
        released = (self.folder / RELEASE).exists()
        return precision.told(self.encoder.precision, trained, self.device, released=released)

    @property
    def has_released(self) -> bool:
        """Whether something was released."""
        return any((self.folder / name).exists() for name in (MOMENTS, RELEASE))

    def release(self) -> Released:
        """The one stage that reads private images and spends privacy."""
        releasing = Releasing(**{each.name: getattr(self, each.name) for each in fields(Running)})
        released = releasing()
        self.plan = releasing.plan
        told = facts(released.release)
        if not told["private"]:
            stamp = f"{told['promise']}\n"
            write_atomically(self.folder / "NOT_PRIVATE", stamp.encode(), overwrite=True)
        privacy = json.dumps(told, indent=2) + "\n"
        write_atomically(self.folder / "privacy.json", privacy.encode(), overwrite=True)
        return released

    def train(self, released: Released) -> Trained:
        """A generator; costs no privacy."""
        checkpoint = self.folder / "checkpoints" / CHECKPOINT
        step = int(train.load_checkpoint(checkpoint)["step"]) if checkpoint.exists() else 0
        wanted = self.settings.train
        if step >= wanted.steps:
            self.say(f"train: found {checkpoint}, finished; re-used")
        else:
            origin = f"resumes at step {step} of" if step else "starts:"
            self.say(f"train: {origin} {wanted.steps} steps, batch {wanted.batch_size}")
        trained = train.train(
            released.release,
            self.encoder,
            settings=wanted,
            generator_settings=self.settings.generator,
            selection_encoder=self.selection,
            out=self.folder,
            plan=self.plan,
            progress=self.progress,
        )
        self.measured.seconds["train"] = trained.seconds
        self.measured.write()
        return trained

    def sample(self, released: Released, trained: Trained) -> None:
        """The synthetic set, its card and a picture; costs no privacy."""
        path = self.folder / "synthetic.npz"
        if path.exists():
            self.say(f"sample: found {path}, finished; re-used")
            return
        self.say(f"sample: {self.settings.sample.num_images} images")
        with self.measured.stage("sample"):
            write_samples(
                trained,
                path,
                self.settings.sample,
                picture=self.folder / "samples.png",
                card=self.folder / "README.md",
                release=released.release,
                moments=released.moments,
                progress=self.progress,
            )

    def evaluate(self, released: Released) -> dict[str, Any]:
        """The content of ``report.json``. Reads real images, which the release does not cover."""
        path = self.folder / "report.json"
        if path.exists():
            self.say(f"evaluate: found {path}, finished; re-used")
            report: dict[str, Any] = json.loads(path.read_text("utf-8"))
            return report
        accuracy: dict[str, Any] = {}
        figures: dict[str, Any] = {}
        told: dict[str, Any] = {}
        if self._compares:
            with self.measured.stage("evaluate"):
                accuracy, figures, told = self._compared()
        report = make_report(released.release, accuracy, self.measured, figures, told)
        write_atomically(path, (json.dumps(report, indent=2) + "\n").encode())
        return report

    @property
    def _compares(self) -> bool:
        """Whether the synthetic set is compared with real images."""
        return self.settings.evaluate is not None or self.settings.metrics is not None

    def _compared(self) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Accuracies, metrics, and what is said of the sets."""
        settings, accuracy, figures = self.settings, {}, {}
        found, reason = evaluation.sets_of(settings, self.folder / "synthetic.npz")
        told = found.facts() | ({"real_not_compared": reason} if reason else {})
        if reason:
            self.say(f"evaluate: {reason} Classifiers are not trained on real images.")
        for line in found.lines():
            self.say(f"evaluate: {line}")
        if settings.evaluate is not None:
            names = ", ".join(settings.evaluate.classifiers)
            self.say(f"evaluate: {names}, on real test images")
            accuracy = evaluation.accuracies(
                found, settings.evaluate, device=str(self.device), progress=self.progress
            )
        if settings.metrics is not None:
            names = ", ".join(extractor.name for extractor in self.extractors)
            self.say(f"metrics: {names}, on real test images")
            figures = evaluation.compared(
                found,
                settings.metrics,
                extractors=self.extractors,
                test=evaluation.real_test(settings),
                trained_against=evaluation.trained_against(settings),
                progress=self.progress,
            )
        return accuracy, figures, told


def _check(settings: Recipe, device: torch.device) -> None:
    """Refuses, before anything is loaded, what would only fail after privacy has been spent."""
    train.is_graphed(settings.train, device)  # raises where a graph is asked for and cannot be
    precision.of_generator(settings.train.precision, device)  # or where the device has no bfloat16
    if settings.evaluate is None:
        return
    if settings.data.num_classes is None:
        raise RunError("evaluate: needs labels; set data.num_classes or leave out [evaluate].")
    if settings.data.num_classes == 1:
        raise RunError(
            "evaluate: with data.num_classes = 1 every classifier is right; leave out [evaluate]."
        )
    check_classifiers(settings.evaluate.classifiers)
