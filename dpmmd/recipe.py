"""Recipes: one TOML file that says everything about a run, checked before any image is read."""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dpmmd.bounds import Bound

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


GENERATED_AT_ONCE = 500  # images, where a set is sampled


class RecipeError(ValueError):
    """A recipe that cannot be found, read or used."""


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    def arguments(self) -> dict[str, Any]:
        """The section as keywords of the function that it describes a call of."""
        return {key: getattr(self, key) for key in type(self).model_fields}


_S = TypeVar("_S", bound=_Section)


class DataSection(_Section):
    """The private images, and the real test images that only the final evaluation reads."""

    source: str
    split: str = "train"
    test_source: str | None = None  # default: `source`
    test_split: str = "test"
    root: str | None = None
    image_size: int | tuple[int, int] | None = None
    channels: Literal[1, 3] | None = None
    crop: Literal["center"] | None = None
    background: str | None = None  # behind transparent images; default: white
    num_classes: int | None = Field(default=None, ge=1)  # None: unlabelled
    num_images: int | None = Field(default=None, ge=1)  # what the source must hold, where public
    image_key: str | None = None
    label_key: str | None = None
    workers: int = Field(default=0, ge=0)
    group_by: str | None = None  # images of one group together are the unit of privacy

    def options(self) -> dict[str, Any]:
        """What `dpmmd.data.open_source` takes, but for source, split and num_classes."""
        keys = ("root", "image_size", "channels", "crop", "background", "image_key", "label_key")
        return {key: getattr(self, key) for key in (*keys, "workers")}


class EncoderSection(_Section):
    """Arguments of `dpmmd.encoders.load`."""

    name: str = "squeezenet1.1"
    image_size: int | tuple[int, int] = 32
    taps: list[str] | None = None
    pool: int | None = Field(default=None, ge=1)
    weights: str | None = None
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    constant: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class ReleaseSection(_Section):
    """Arguments of `dpmmd.release`. epsilon, delta and adjacency have no default.

    ``epsilon = inf`` adds no noise: the release, the folder and the report say NOT PRIVATE.
    """

    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    adjacency: Literal["replace-one", "zero-out", "add-remove"]
    moments: tuple[Literal[1, 2], ...] = (1,)
    bound: Literal["sphere", "ball", "sphere-per-tap", "ball-per-tap"] = "sphere"
    clip: float = Field(default=1.0, gt=0)
    joint_weight: float | None = Field(default=None, gt=0)
    weights: dict[str, float] | None = None
    pixel_moments: int | None = Field(default=None, ge=1)
    shared_taps: int = Field(default=0, ge=0)
    batch_size: int | None = Field(default=None, ge=1)  # None: what fits into memory
    partial_sums: str | None = None
    ledger: str | None = None
    budget: tuple[float, float] | None = None  # (epsilon, delta) of all releases in the ledger
    population: str | None = None  # declared disjoint from the others in the ledger

    @field_validator("budget", "population")
    @classmethod
    def _needs_a_ledger(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and info.data.get("ledger") is None:
            raise ValueError("needs 'ledger', the file that remembers what was spent")
        return value


class ModesSection(_Section):
    """How classes are split into modes (`dpmmd.modes`), by a first release of pixel moments.

    ``per_class`` modes a class, a power of two (None: by `dpmmd.modes.suggest`). ``share`` is that
    of the first release in mu^2; both releases together are (release.epsilon, release.delta)-DP.
    """

    per_class: int | None = Field(default=None, ge=2)
    share: float = Field(default=0.5, gt=0, lt=1)

    @field_validator("per_class")
    @classmethod
    def _a_power_of_two(cls, value: int | None) -> int | None:
        if value is not None and value & (value - 1):
            raise ValueError("expected a power of two, such as 8: each direction halves the modes")
        return value


class GeneratorSection(_Section):
    """Arguments of `dpmmd.generators.build`. What is left out follows from the released images."""

    name: str | None = None  # default: conv up to 32 px, else resnet
    image_size: int | None = Field(default=None, ge=8)
    channels: Literal[1, 3] | None = None
    z_dim: int = Field(default=100, ge=1)
    base_channels: int = Field(default=32, ge=1)

    def completed(self, image_shape: tuple[int, int, int]) -> GeneratorSection:
        """With the blanks filled in for images of (C, H, W).

        Raises:
            RecipeError: the images are not square and ``image_size`` is left out.
        """
        channels, height, width = image_shape
        size = self.image_size
        if size is None:
            if height != width:
                raise RecipeError(
                    f"generator.image_size: the released images are {height} x {width}; generators "
                    "make square ones, say of which size."
                )
            size = height
        name = self.name or ("conv" if size <= 32 else "resnet")
        given = {"name": name, "image_size": size, "channels": self.channels or channels}
        return self.model_copy(update=given)

    def arguments(self) -> dict[str, Any]:
        """Keywords of `dpmmd.generators.build`, but for num_classes.

        Raises:
            ValueError: there are blanks left.
        """
        if self.name is None or self.image_size is None or self.channels is None:
            raise ValueError(
                f"settings: {self}, expected a name, an image_size and channels; fill them in with "
                "settings.completed(release.metadata.image_shape)."
            )
        return super().arguments()


class TrainSection(_Section):
    """How a generator is trained on a release.

    ``images_per_row``: a batch has that many images of each row that is in it, rows of the release
    in turn (None: 10 with modes; without, images of all classes in turn). ``lr`` decays to zero
    over the steps by ``schedule``; ``ema_decay`` averages the weights that
    images are sampled from (0: the last weights). ``inject`` is an argument of
    `dpmmd.nn.MMDLoss` (None: where the step is a graph); ``graph`` records the whole step once as a
    CUDA graph and replays it (None: on a CUDA device, in one process and without ``memory``, where
    the generator is one of `dpmmd.generators`); ``compile`` runs generator and encoder through
    torch.compile. ``precision`` is that of the generator's passes in training, over float32
    weights: see `dpmmd.precision` (None: "tf32" on a CUDA device, "float32" elsewhere). ``memory``
    is a budget for a step, such as "8GiB", or a fraction of what is free, "0.8": see
    `dpmmd.train.plan`.
    """

    steps: int = Field(default=2000, ge=1)
    batch_size: int = Field(default=100, ge=1)
    lr: float = Field(default=3e-3, gt=0)
    betas: tuple[float, float] = (0.5, 0.999)
    schedule: Literal["constant", "linear", "cosine"] = "cosine"
    warmup: int = Field(default=0, ge=0)
    images_per_row: int | None = Field(default=None, ge=1)  # of the rows that are in a batch
    estimator: Literal["batch", "unbiased", "ema", "adam"] = "batch"
    estimator_decay: float = Field(default=0.9, ge=0, lt=1)
    estimator_lr: float = Field(default=1e-3, gt=0, lt=1)
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    precision: Literal["float32", "tf32", "bfloat16"] | None = None
    inject: bool | None = None
    graph: bool | None = None
    compile: bool = False
    seed: int = 0
    checkpoint_every: int = Field(default=500, ge=1)
    log_every: int = Field(default=20, ge=1)
    grid_every: int = Field(default=500, ge=1)
    memory: str | None = Field(default=None, pattern=r"^\s*[\d.]+\s*([KMGT]i?B)?\s*$")

    @model_validator(mode="after")
    def _batches_hold_rows(self) -> TrainSection:
        wanted = self.images_per_row
        if wanted is not None and wanted > self.batch_size:
            raise ValueError(
                f"train.images_per_row = {wanted}: more than train.batch_size = {self.batch_size}; "
                "expected at most that many"
            )
        if wanted == 1 and self.estimator == "unbiased":
            raise ValueError(
                "train.images_per_row = 1 with train.estimator = 'unbiased': that estimator takes "
                "pairs of images of a row; use at least 2, or 'batch'"
            )
        return self


class SampleSection(_Section):
    """How many images the synthetic set holds (classes in equal parts).

    With ``modes`` the set says of which mode of its class each image is.
    """

    num_images: int = Field(default=60_000, ge=1)
    modes: bool = False
    batch_size: int = Field(default=GENERATED_AT_ONCE, ge=1)
    temperature: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    seed: int = 0


class EvaluateSection(_Section):
    """Which classifiers are trained on synthetic (and on real) images and tested on real ones."""

    classifiers: tuple[str, ...] = ("logistic_regression", "mlp", "cnn")
    num_train: int | None = Field(default=None, ge=1)  # images of each set; None: all
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)  # one training of each classifier

    @model_validator(mode="before")
    @classmethod
    def _one_seed(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or "seed" not in given or "seeds" in given:
            return given
        warnings.warn(
            "evaluate.seed is now evaluate.seeds, a list: write seeds = [0]",
            DeprecationWarning,
            stacklevel=2,
        )
        rest = {key: value for key, value in given.items() if key != "seed"}
        return {**rest, "seeds": (given["seed"],)}


class MetricsSection(_Section):
    """Figures that compare synthetic with real images in feature spaces (`dpmmd.metrics`).

    An encoder that the generator was not trained against is added where ``features`` has none.
    """

    features: tuple[str, ...] = ("inception-v3",)  # and names of `dpmmd.encoders.available`
    weights: dict[str, str] = {}  # weight files, by feature extractor, if not found by themselves
    num_images: int = Field(default=10_000, ge=2)  # at most so many of each set
    seed: int = 0


class Recipe(_Section):
    """A run from private images to an evaluated synthetic set."""

    description: str = ""
    data: DataSection
    encoder: EncoderSection = EncoderSection()
    selection: EncoderSection | None = None  # encoder of the selection block, if there is to be one
    release: ReleaseSection
    modes: ModesSection | None = None
    generator: GeneratorSection = GeneratorSection()
    train: TrainSection = TrainSection()
    sample: SampleSection = SampleSection()
    evaluate: EvaluateSection | None = None
    metrics: MetricsSection | None = None

    @model_validator(mode="after")
    def _the_number_of_images_may_be_private(self) -> Recipe:
        if self.data.num_images is None:
            return self
        if self.release.adjacency == "add-remove" or self.data.group_by is not None:
            why = "with data.group_by" if self.data.group_by else "under add-remove adjacency"
            raise ValueError(
                f"data.num_images = {self.data.num_images}: the number of images is private {why}, "
                "and a recipe is public; leave the key out"
            )
        return self

    @model_validator(mode="after")
    def _modes_suit_the_release(self) -> Recipe:
        if self.modes is None:
            if self.sample.modes:
                raise ValueError(
                    "sample.modes = true: there are none without a section [modes]; add one, or "
                    "leave the key out"
                )
            return self
        wanted, per_class = self.release, self.modes.per_class
        if wanted.pixel_moments is None:
            raise ValueError(
                "modes: they follow from moments of pixels, for which release.pixel_moments asks; "
                "set it, e.g. pixel_moments = 28, or leave [modes] out"
            )
        if (wanted.weights or {}).get("products") == 0 and not (wanted.weights or {}).get(
            "class_products"
        ):
            raise ValueError(
                "modes: they lie along the covariance of pixels, and release.weights leaves "
                "products out; give products a weight, or leave [modes] out"
            )
        if wanted.shared_taps:
            raise ValueError(
                f"modes with release.shared_taps = {wanted.shared_taps}: shared taps are matched "
                "by the mean over a batch, which has some of the modes alone; use one of the two"
            )
        if self.train.estimator == "unbiased" and self.train.batch_size < 2:
            raise ValueError(
                f"modes with train.estimator = 'unbiased' and train.batch_size = "
                f"{self.train.batch_size}: that estimator takes pairs of images of a mode; use "
                "batches of at least 2 images, better 100, or 'batch'"
            )
        if per_class is None and (
            wanted.adjacency == "add-remove" or self.data.group_by is not None
        ):
            why = "with data.group_by" if self.data.group_by else "under add-remove adjacency"
            raise ValueError(
                f"modes.per_class is missing: it would follow from the number of images, which is "
                f"private {why}; set it, e.g. per_class = 4"
            )
        return self

    @model_validator(mode="after")
    def _training_suits_the_release(self) -> Recipe:
        """What would else be refused when privacy has been spent."""
        wanted = self.release
        if self.train.estimator == "unbiased":
            if Bound.of(wanted).ball:
                raise ValueError(
                    f"train.estimator = 'unbiased' with release.bound = {wanted.bound!r}: it holds "
                    "for spheres; use 'batch'"
                )
            if wanted.shared_taps:
                raise ValueError(
                    f"train.estimator = 'unbiased' with release.shared_taps = "
                    f"{wanted.shared_taps}: an image's own term is not constant there; use 'batch'"
                )
        if self.train.graph and self.train.memory is not None:
            raise ValueError(
                f"train.graph with train.memory = {self.train.memory!r}: micro-batches are cut on "
                "the host, which a graph leaves out; choose one of the two"
            )
        return self


def names() -> tuple[str, ...]:
    """The recipes that come with the package."""
    folder = resources.files("dpmmd") / "recipes"
    return tuple(
        sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))
    )


def read(recipe: str | Path) -> tuple[Recipe, str]:
    """The recipe and its text, by path or by the name of one that comes with the package.

    Raises:
        RecipeError: not found, not TOML, an unknown key or a value out of range; the message names
            the key.
    """
    path = Path(recipe)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise RecipeError(f"recipe {str(recipe)!r}: there is no such file.")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RecipeError(f"{recipe}: not a text file in UTF-8: {error}") from None
    elif str(recipe) in names():
        text = (resources.files("dpmmd") / "recipes" / f"{recipe}.toml").read_text("utf-8")
    else:
        raise RecipeError(
            f"recipe {str(recipe)!r}: neither a .toml file nor one of {', '.join(names())}."
        )
    return parse(text, str(recipe)), text


def parse(text: str, name: str = "recipe") -> Recipe:
    """A recipe from TOML text; raises as `read`."""
    try:
        return Recipe.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{name}: not valid TOML: {error}") from None
    except ValidationError as error:
        problems = "; ".join(_problem(e) for e in error.errors())
        raise RecipeError(f"{name}: {problems}") from None


def with_changes(text: str, changes: Sequence[str], name: str = "recipe") -> tuple[Recipe, str]:
    """A recipe with some keys set anew, and its text: the whole of what is run.

    Args:
        text: the recipe's TOML.
        changes: ``"section.key=value"``, the value in TOML; a bare word is taken as a string.
        name: what messages call the recipe.

    Raises:
        RecipeError: a change without ``=``, or what `parse` refuses.
    """
    parse(text, name)
    content = tomllib.loads(text)
    for change in changes:
        path, equals, value = change.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise RecipeError(f"{change!r}: expected SECTION.KEY=VALUE, e.g. release.epsilon=0.5.")
        section = content
        for key in keys[:-1]:
            section = section.setdefault(key, {})
            if not isinstance(section, dict):
                raise RecipeError(f"{change!r}: {key} is a value, not a section.")
        try:
            section[keys[-1]] = tomllib.loads(f"value = {value}")["value"]
        except tomllib.TOMLDecodeError:
            section[keys[-1]] = value.strip()
    written = _toml(content)
    return parse(written, name), written


def _toml(content: Mapping[str, Any]) -> str:
    """TOML of nested dictionaries of strings, numbers, booleans, and lists of them."""

    def key(name: str) -> str:
        return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)

    def value(item: Any) -> str:
        if isinstance(item, list):
            return f"[{', '.join(map(value, item))}]"
        if isinstance(item, dict):
            return f"{{{', '.join(f'{key(k)} = {value(v)}' for k, v in item.items())}}}"
        if isinstance(item, float) and not math.isfinite(item):
            return str(item)  # inf, -inf, nan
        return json.dumps(item, ensure_ascii=False).replace("\x7f", "\\u007f")

    tables = {k: v for k, v in content.items() if isinstance(v, dict)}
    lines = [f"{key(k)} = {value(v)}" for k, v in content.items() if k not in tables]
    for name, table in tables.items():
        lines += ["", f"[{key(name)}]", *(f"{key(k)} = {value(v)}" for k, v in table.items())]
    return "\n".join(lines).lstrip("\n") + "\n"


def revised(section: _S, changes: Mapping[str, Any]) -> _S:
    """The section with some values changed (None: kept), checked like one from a file.

    Raises:
        RecipeError: a value out of range.
    """
    kept = section.model_dump()
    kept.update({key: value for key, value in changes.items() if value is not None})
    try:
        return type(section).model_validate(kept)
    except ValidationError as error:
        raise RecipeError("; ".join(_problem(e) for e in error.errors())) from None


def _problem(error: Any) -> str:
    where = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in error["loc"][:-1]:
            annotation = section.model_fields[part].annotation
            section = next(
                (a for a in getattr(annotation, "__args__", ()) if hasattr(a, "model_fields")),
                annotation,
            )
        known = ", ".join(section.model_fields)
        return f"unknown key {where!r} (known here: {known})"
    if error["type"] == "missing":
        return f"{where!r} is missing"
    if error["type"] == "value_error" and not where:  # a rule of the recipe as a whole
        return str(error["ctx"]["error"])
    return f"{where} = {error['input']!r}: {error['msg'].lower()}"
