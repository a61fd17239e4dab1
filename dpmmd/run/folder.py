"""A run's folder: what was measured of its stages, and the release that is in it."""

from __future__ import annotations

import json
from pathlib import Path
from time import perf_counter

from dpmmd._memory import peak_memory, return_freed_memory
from dpmmd.errors import RunError
from dpmmd.files import write_atomically
from dpmmd.privacy import Release
from dpmmd.train import CHECKPOINT, load_checkpoint


def release_of(checkpoint: Path, given: Path | None) -> Release | None:
    """The release that a checkpoint was trained on: the file given, or the run folder's.

    Raises:
        RunError: the file given is another release.
    """
    folder = checkpoint if checkpoint.is_dir() else checkpoint.parent.parent
    path = given or folder / "release.safetensors"
    if given is None and not path.exists():
        return None
    file = folder / "checkpoints" / CHECKPOINT if checkpoint.is_dir() else checkpoint
    released = Release.load(path)
    if released.metadata.array_sha256 != load_checkpoint(file)["array_sha256"]:
        raise RunError(f"{path}: is not the release that {file} was trained on.")
    return released


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
    def __init__(self, measured: Measured, name: str) -> None:
        self.measured, self.name = measured, name

    def __enter__(self) -> None:
        self.started = perf_counter()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.measured.seconds[self.name] = perf_counter() - self.started
            self.measured.write()
