"""The releases of a run: the one stage that reads private images and spends privacy.

One release, ``release.safetensors``. With [modes] two: ``moments.safetensors``, moments of pixels,
to which modes are fitted and images aligned, and ``release.safetensors``, features by mode. Both
together are what the recipe says, (epsilon, delta)-DP; each is made once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpmmd import generators, modes
from dpmmd.data import ImageSource, open_source
from dpmmd.errors import RunError
from dpmmd.files import expanded
from dpmmd.nn import check_encoder
from dpmmd.privacy import Ledger, Release, calibrate, split_epsilon
from dpmmd.privacy import release as make_release
from dpmmd.privacy.blocks import KINDS
from dpmmd.privacy.layout import Asked, bound_of, lay_out
from dpmmd.privacy.metadata import Metadata, unit_of
from dpmmd.privacy.modes import MOST_BITS
from dpmmd.privacy.printed import up
from dpmmd.privacy.rows import LEAST
from dpmmd.recipe import ModesSection, Recipe
from dpmmd.run import evaluation
from dpmmd.run.folder import MOMENTS, RELEASE, Released, Running
from dpmmd.run.noiseless import NO_NOISE_EPSILON, no_noise, stated_epsilon
from dpmmd.train import CHECKPOINT, ahead

# The counts are blocks of both.
_OF_PIXELS = {name for name, kind in KINDS.items() if kind.encoder == "pixel_encoder"}
_OF_FEATURES = set(KINDS) - _OF_PIXELS


@dataclass(frozen=True)
class _Part:
    """One release of a run.

    Attributes:
        stage: what it is called.
        path: its file.
        epsilon: its part of the recipe's; infinite without noise.
        arguments: of `dpmmd.release`, beside epsilon, source and modes.
    """

    stage: str
    path: Path
    epsilon: float
    arguments: Mapping[str, Any]


@dataclass
class Releasing(Running):
    """Makes the releases of a recipe in its folder, or finds them there."""

    _opened: ImageSource | None = field(default=None, init=False)

    def __call__(self) -> Released:
        """What the recipe asks for; what is finished is re-used.

        Raises:
            RunError, ValueError: what would only fail later, before anything is spent.
        """
        self._check_trained()
        wanted = self.settings.modes
        if wanted is None:
            return Released(self._made(self._whole()))
        per_class = self._per_class(wanted)
        if per_class == 1:
            self.say(
                "modes: none, by the public rule: the noise on the mean of a mode would be too "
                "large. One release, with moments of pixels"
            )
            return Released(self._made(self._whole()))
        self._check_files()
        one, other = self._parts(wanted)
        if not one.path.exists():
            self._check_both(other, per_class)
        first = self._made(one, per_class=per_class)
        most = max(2, modes.largest(float(first.class_counts.max()) / LEAST))
        if per_class > most:  # noise made the classes look smaller than they are
            self.say(f"modes: {most} a class, not {per_class}: by the first release's counts")
            per_class = most
        second = self._made(other, first, per_class=per_class)
        self.say(
            f"modes: {per_class} a class; the release has {second.num_rows} rows of "
            f"{second.num_classes}, after those that do not stand out from their noise were merged"
        )
        return Released(second, first)

    def _whole(self) -> _Part:
        """The one release of a recipe without modes."""
        wanted = self.settings.release
        arguments = wanted.arguments() | {"encoder": self.encoder, "selection": self.selection}
        del arguments["epsilon"]
        return _Part("release", self.folder / RELEASE, wanted.epsilon, arguments)

    def _parts(self, wanted: ModesSection) -> tuple[_Part, _Part]:
        """Moments of pixels, and features by mode."""
        asked, whole = self.settings.release, self._whole()
        weights = asked.weights or {}
        pixels = {name: value for name, value in weights.items() if name not in _OF_FEATURES}
        features = {name: value for name, value in weights.items() if name not in _OF_PIXELS}
        own = ("moments", "bound", "clip", "joint_weight", "shared_taps", "selection")
        first = {name: value for name, value in whole.arguments.items() if name not in own}
        first |= {"encoder": None, "weights": pixels or None}
        second = {**whole.arguments, "pixel_moments": None, "weights": features or None}
        epsilons = math.inf, math.inf
        if math.isfinite(asked.epsilon):
            epsilons = split_epsilon(asked.epsilon, asked.delta, wanted.share)
        return (
            _Part("moments", self.folder / MOMENTS, epsilons[0], first),
            _Part("release", self.folder / RELEASE, epsilons[1], second),
        )

    def _made(self, part: _Part, first: Release | None = None, *, per_class: int = 1) -> Release:
        """A release: found, or made, which spends privacy; by modes that ``first`` suggests."""
        if part.path.exists():
            released = Release.load(part.path)
            self._check_release(released, part, _told(first, per_class))
            self.say(
                f"{part.stage}: found {part.path}, finished; re-used, no further privacy is spent"
            )
            return released
        self._announce(part)
        with self.measured.stage(part.stage):
            source = self._source()
            self._make_plan(source, per_class)
            rule = None
            if first is not None:  # it is spent: modes are merged, rather than refused
                rule = modes.along(first, per_class.bit_length() - 1)
            return make_release(
                source,
                **part.arguments,
                epsilon=min(part.epsilon, NO_NOISE_EPSILON),
                insecure_test_noise=no_noise if math.isinf(part.epsilon) else None,
                num_classes=self.settings.data.num_classes,
                modes=rule,
                out=part.path,
                progress=self.progress,
            )

    def _announce(self, part: _Part) -> None:
        data, wanted, encoder = self.settings.data, self.settings.release, part.arguments["encoder"]
        what = f"moments of pixels at {wanted.pixel_moments} x {wanted.pixel_moments}"
        if encoder is not None:
            what = f"encoder {encoder.name}, D = {encoder.dim}"
        together = ""
        if part.epsilon != wanted.epsilon:
            together = f"; epsilon = {up(wanted.epsilon)} for both releases together"
        self.say(
            f"{part.stage}: {data.source} ({data.split}), {what}, epsilon = {up(part.epsilon)}, "
            f"delta = {up(wanted.delta)}, {wanted.adjacency}{together}"
        )
        if math.isinf(wanted.epsilon):
            self.say(f"{part.stage}: epsilon = inf adds NO NOISE: NOT PRIVATE, for comparison only")

    def _source(self) -> ImageSource:
        """The private images, opened once; refuses what would only fail after a spend."""
        if self._opened is None:
            data, wanted = self.settings.data, self.settings.release
            self._opened = open_source(
                data.source,
                split=data.split,
                num_classes=data.num_classes,
                group_by=data.group_by,
                allow_empty=wanted.adjacency == "add-remove",
                **data.options(),
            )
            _check_source(self.settings, self._opened)
        return self._opened

    def _make_plan(self, source: ImageSource, per_class: int) -> None:
        """The memory plan, once, before privacy is spent."""
        settings, channels = self.settings, source.image_shape[0]
        if self.plan is not None or (budget := settings.train.memory) is None:
            return
        look = settings.generator.completed(source.image_shape)
        labels = ahead.labels(settings, per_class)
        model = generators.build(**look.arguments(), num_classes=labels).to(self.device)
        self.plan = ahead.before_release(settings, budget, self.encoder, model, channels, per_class)

    def _per_class(self, wanted: ModesSection) -> int:
        """C: the recipe's, or by the public rule, which is asked once: what is made has its word.

        Where another version's rule made the first release, there are two: one that holds moments
        again, at the whole epsilon, would exceed what the recipe says.
        """
        if wanted.per_class is not None:
            return wanted.per_class
        if (self.folder / RELEASE).exists():
            return Release.load(self.folder / RELEASE).metadata.per_class
        n, shape = self._public()
        asked, classes = self.settings.release, self.settings.data.num_classes
        assert n is not None  # else the recipe says how many
        found = modes.by_rule(
            torch.full((classes or 1,), n / (classes or 1)),
            shape,
            self.encoder,
            num_classes=classes,
            adjacency=asked.adjacency,
            grouped=False,
            epsilon=min(self._parts(wanted)[1].epsilon, NO_NOISE_EPSILON),
            delta=asked.delta,
            moments=asked.moments,
            selection=self.selection,
        )
        least = 2 if (self.folder / MOMENTS).exists() else 1
        return max(least, min(found, self._directions(shape)))

    def _directions(self, shape: tuple[int, int, int]) -> int:
        """The modes that there are directions for: each halves a class."""
        side = self.settings.release.pixel_moments
        assert side is not None  # the recipe was checked
        return 1 << min(MOST_BITS, shape[0] * side**2)

    def _public(self) -> tuple[int | None, tuple[int, int, int]]:
        """N, where it is public, and the shape of images: of a release, or else of the source."""
        for name in (RELEASE, MOMENTS):
            if (self.folder / name).exists():
                m = Release.load(self.folder / name).metadata
                return m.num_units, m.image_shape
        source, asked = self._source(), self.settings.release
        private = asked.adjacency == "add-remove" or source.group_by is not None
        return None if private else source.num_images, source.image_shape

    def _check_trained(self) -> None:
        """Refuses a folder that trained on a release which is there no more."""
        path, checkpoint = self.folder / RELEASE, self.folder / "checkpoints" / CHECKPOINT
        if checkpoint.exists() and not path.exists():
            raise RunError(
                f"{path}: is not there, and {checkpoint} was trained on it; restore it from a "
                "copy, or choose another folder with --out. Releasing the data again costs privacy "
                "again."
            )

    def _check_files(self) -> None:
        """Refuses a folder whose second release is there without the first."""
        moments, path = self.folder / MOMENTS, self.folder / RELEASE
        if path.exists() and not moments.exists():
            if Release.load(path).modes is None:
                raise RunError(
                    f"{path}: made without modes, the recipe asks for some. Choose another folder "
                    "with --out."
                )
            raise RunError(
                f"{moments}: is not there, and the modes of {path} were fitted to it; restore it "
                "from a copy. Releasing the data again costs privacy again."
            )

    def _check_both(self, other: _Part, per_class: int) -> None:
        """Refuses, before the first release, what the second or both together would fail at."""
        data, asked, source = self.settings.data, self.settings.release, self._source()
        n, shape = self._public()
        if per_class > (most := self._directions(shape)):
            raise RunError(
                f"modes.per_class = {per_class}: images of {asked.pixel_moments} x "
                f"{asked.pixel_moments} (release.pixel_moments) have directions for {most} modes "
                "of a class at most; lower the one or raise the other."
            )
        if n is not None:
            most = modes.largest(n / LEAST)  # one class may have nearly all images
            if per_class > most:
                raise RunError(
                    f"modes.per_class = {per_class}: no mode could stand out: there are {n} "
                    f"images, and a mode needs {LEAST:.0f}; "
                    + (f"at most {most} can." if most > 1 else "leave [modes] out.")
                )
        with torch.inference_mode():
            for used in (self.encoder, self.selection):
                if used is not None:
                    used(torch.zeros(1, *shape, device=self.device))
        given = other.arguments
        wanted = ("adjacency", "weights", "pixel_moments", "selection", "shared_taps", "batch_size")
        bound = (given[key] for key in ("moments", "bound", "clip", "joint_weight"))
        lay_out(
            Asked(
                **{key: given[key] for key in wanted},
                encoder=self.encoder,
                bound=bound_of(self.encoder, *bound),
                num_classes=data.num_classes,
                modes=None,
            ).check(asked.clip),
            shape,
            grouped=source.group_by is not None,
        )
        if asked.ledger is None:
            return
        # Where the first release was interrupted and left its sums, its part is spent already.
        epsilon = min(other.epsilon if self._begun else asked.epsilon, NO_NOISE_EPSILON)
        Ledger(asked.ledger, budget=asked.budget).check(
            identity=source.identity,
            source=source.name,
            private=math.isfinite(asked.epsilon),
            mu=calibrate(epsilon=epsilon, delta=asked.delta).mu,
            epsilon=epsilon,
            delta=asked.delta,
            adjacency=asked.adjacency,
            unit=unit_of(data.group_by),
            population=asked.population,
        )

    @property
    def _begun(self) -> bool:
        """Whether the first release was interrupted, and will go on from its partial sums."""
        named = self.settings.release.partial_sums
        folder = None if named is None else expanded(named)
        return folder is not None and folder.is_dir() and any(folder.iterdir())

    def _check_release(self, released: Release, part: _Part, split: str | None) -> None:
        """Refuses a release that the recipe would not have made; ``split``: how into modes."""
        m, wanted = released.metadata, part.arguments
        side = None if m.pixel_encoder is None else int(m.pixel_encoder["image_size"][0])
        same = ("moments", "bound", "clip", "joint_weight", "shared_taps")
        pairs = {
            "epsilon": (stated_epsilon(released), part.epsilon),
            **{key: (getattr(m, key), wanted[key]) for key in ("delta", "adjacency")},
            **{key: (getattr(m, key), wanted[key]) for key in same if key in wanted},
            "pixel_moments": (side, wanted["pixel_moments"]),
            "unit": (m.unit, unit_of(self.settings.data.group_by)),
            "num_classes": (m.num_classes, self.settings.data.num_classes or 1),
            "modes": (_found(m), split),
        }
        for name, (found, asked) in pairs.items():
            if found != asked:
                raise RunError(
                    f"{part.path}: made with {name} = {found!r}, the recipe asks for {asked!r}. "
                    "Choose another folder with --out."
                )
        if wanted["encoder"] is not None:
            check_encoder(released, wanted["encoder"])
        elif m.encoder is not None:
            raise RunError(
                f"{part.path}: holds features, and not moments of pixels alone. Choose another "
                "folder with --out."
            )
        if wanted.get("selection") is not None:
            check_encoder(released, wanted["selection"], selection=True)


def _told(first: Release | None, per_class: int) -> str | None:
    """How a release is to be split into modes."""
    return None if first is None else _split(per_class, first.metadata.array_sha256)


def _found(m: Metadata) -> str | None:
    """How a release is split. The rule itself is not compared: its last bits are a machine's."""
    if m.modes is None:
        return None
    return _split(m.per_class, "" if m.modes.origin is None else m.modes.origin.array_sha256)


def _split(per_class: int, origin: str) -> str:
    return f"{per_class} a class, fitted to the release {origin[:12]}"


def _check_source(settings: Recipe, source: ImageSource) -> None:
    """Refuses what would only fail after privacy has been spent."""
    data, channels = settings.data, source.image_shape[0]
    if data.num_images is not None and source.num_images != data.num_images:
        raise RunError(
            f"data.num_images = {data.num_images}: {data.source} ({data.split}) holds "
            f"{source.num_images} images; is it the right one, and whole? If so, correct "
            "the key or leave it out."
        )
    look = settings.generator.completed(source.image_shape)
    generators.build(**look.arguments(), num_classes=data.num_classes)
    if settings.release.pixel_moments is not None and look.channels != channels:
        raise RunError(
            f"release.pixel_moments: {data.source} has {channels} channels, "
            f"the generator makes {look.channels}; alignment needs them equal. Set "
            "channels in [generator] or [data], or leave pixel_moments out."
        )
    if settings.evaluate is None and settings.metrics is None:
        return
    made = (look.channels, look.image_size, look.image_size)
    if source.image_shape != made:
        raise RunError(
            f"generator: makes images (C, H, W) = {made}, those of {data.source} are "
            f"{source.image_shape}; evaluation needs them equal. Set image_size and "
            "channels in [generator] or [data]."
        )
    evaluation.check_test(settings, source)
