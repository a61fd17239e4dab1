"""A run's folder: whether a recipe may use it, what was measured, the release that is in it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import torch

from dpmmd import recipe
from dpmmd._memory import peak_memory, return_freed_memory
from dpmmd.encoders import Encoder
from dpmmd.errors import RunError
from dpmmd.files import write_atomically
from dpmmd.privacy import Release
from dpmmd.recipe import Recipe
from dpmmd.train import CHECKPOINT, load_checkpoint
from dpmmd.train.plan import Plan

Say = Callable[[str], None]

RELEASE = "release.safetensors"
MOMENTS = "moments.safetensors"  # of pixels, where they are a release of their own


def is_new(folder: Path, settings: Recipe) -> bool:
    """Whether a run in the folder begins, rather than goes on.

    Raises:
        RunError: the folder holds another recipe's run, or something else.
    """
    kept = folder / "recipe.toml"
    if kept.exists():
        if recipe.parse(kept.read_text("utf-8"), str(kept)) != settings:
            raise RunError(
                f"{folder}: holds a run of another recipe ({kept}). Choose another folder with "
                "--out, or go on with that recipe."
            )
        return False
    if folder.is_symlink() and not folder.exists():
        raise RunError(
            f"{folder}: a link to a folder that is not there; choose another with --out."
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunError(f"{folder}: exists and is not a run folder; choose another with --out.")
    return True


@dataclass
class Running:
    """A recipe that runs in a folder.

    Attributes:
        settings: the recipe.
        folder: where everything is written.
        device: where everything is computed.
        encoder, selection: on the device; the second is None without a selection block.
        measured: seconds and memory of the stages.
        say: called with one line of text at each stage.
        progress: whether to show progress bars.
        plan: of training; made, with a memory budget, before privacy is spent.
    """

    settings: Recipe
    folder: Path
    device: torch.device
    encoder: Encoder
    selection: Encoder | None
    measured: Measured
    say: Say
    progress: bool
    plan: Plan | None = None


@dataclass(frozen=True, eq=False)
class Released:
    """What a run has released.

    Attributes:
        release: of features: what a generator is trained on.
        moments: of pixels, to which its modes were fitted; None: ``release`` has no modes, or
            (of a folder that a run did not make) their file is not there.
    """

    release: Release
    moments: Release | None = None

    @property
    def unaligned(self) -> bool:
        """Whether images could be aligned if the file of moments were there."""
        modes = self.release.modes
        fitted = modes is not None and modes.origin is not None
        return fitted and self.moments is None and self.release.pixels is None


def releases_of(checkpoint: Path, given: Path | None) -> Released | None:
    """What a checkpoint was trained on: the file given, or the run folder's; None: neither.

    The moments are looked for in the same folder.

    Raises:
        RunError: the file given is another release.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent.parent
    path = given or folder / RELEASE
    if given is None and not path.exists():
        return None
    file = folder / "checkpoints" / CHECKPOINT if checkpoint.is_dir() else checkpoint
    released = Release.load(path)
    if released.metadata.array_sha256 != load_checkpoint(file)["array_sha256"]:
        raise RunError(f"{path}: is not the release that {file} was trained on.")
    beside = path.parent / MOMENTS
    origin = None if released.modes is None else released.modes.origin
    if origin is not None and beside.exists():
        moments = Release.load(beside)
        if moments.metadata.array_sha256 == origin.array_sha256:
            return Released(released, moments)
    return Released(released)


def encoders_of(path: Path) -> tuple[str, ...]:
    """Names of the encoders that a release was made with."""
    m = Release.load(path).metadata
    return tuple(spec["name"] for spec in (m.encoder, m.selection_encoder) if spec is not None)


class Measured:
    """Seconds of each stage and the greatest resident memory, kept over resumptions."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.seconds: dict[str, float] = {}
        self._peak: int | None = None
        if path.exists():
            kept = json.loads(path.read_text("utf-8"))
            self.seconds, self._peak = kept["seconds"], kept["peak_rss_bytes"]

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Times the block, unless it raises."""
        started = perf_counter()
        yield
        self.seconds[name] = perf_counter() - started
        self.write()

    def peak(self) -> int | None:
        """Bytes; None where the system does not tell."""
        used = peak_memory()
        self._peak = self._peak if used is None else max(self._peak or 0, used)
        return self._peak

    def write(self) -> None:
        return_freed_memory()  # a stage is done: the next asks for other blocks
        data = {"seconds": self.seconds, "peak_rss_bytes": self.peak()}
        write_atomically(self.path, (json.dumps(data) + "\n").encode(), overwrite=True)
