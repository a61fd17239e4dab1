"""One file, one record: whatever names a file has, it is counted once.

A file is its device and inode (for storage that fsspec reaches: its URL), not its name. Links, bind
mounts, a folder that is reached twice and a shard that a pattern names twice give further names to
a file that is counted already, and these names are passed over.

*Why this keeps the claim.* Let F be the files that some name leads to. A source counts the set F,
each file with the one label and the one group that all its names agree on; where they do not agree,
the source is refused. If one file is exchanged for another, or loses all its names, F loses at most
one element and gains at most one. So the vectors that are summed differ in at most one that left
and one that came, which is the exchange, or the removal, whose sensitivity is declared. Which of a
file's names is the first decides the order of the records only, and the sums do not depend on the
order.

What this cannot see: two files with the same content (an image that was copied). They are two
records, except where their names say that they are copies (`dpmmd.data.folder`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import ConcatDataset, Subset, TensorDataset

from dpmmd.data.leftovers import family_of, leftover, listed, other_extension
from dpmmd.data.pixels import Unusable
from dpmmd.data.remote import AnyPath, RemotePath, opened

SECOND_NAME = "a second name of a file that is counted already"
SECOND_WAY = "a second way into a folder that was entered already"

_PIECE = 1 << 20  # bytes read at a time where files are compared

FileKey = tuple[int, int] | str


def key_of(path: str | os.PathLike[str], status: os.stat_result) -> FileKey:
    """What stands for a file, whichever name led to it."""
    if status.st_ino:
        return status.st_dev, status.st_ino
    return os.path.realpath(path)  # file systems that do not number their files


def shard_key(path: AnyPath) -> FileKey:
    """The key of a shard, local or remote."""
    return key_of(path, os.stat(path)) if isinstance(path, Path) else str(path)


def without_second_names(files: Sequence[AnyPath]) -> tuple[list[AnyPath], dict[str, int]]:
    """The shards, each once and in order, and how many names were passed over."""
    found: dict[FileKey, AnyPath] = {}
    for file in files:
        found.setdefault(shard_key(file), file)
    passed = len(files) - len(found)
    return list(found.values()), {SECOND_NAME: passed} if passed else {}


def refuse_second_names(paths: Sequence[str], name: str) -> None:
    """Raise ValueError where a list of files names one file several times."""
    found: set[FileKey] = set()
    for path in paths:
        try:
            key = key_of(path, os.stat(path))
        except OSError:  # an image that cannot be decoded
            continue
        if key in found:
            raise ValueError(
                f"source {name!r}: the list of its files names one file several times; expected "
                "each image once, so that it counts once. Remove links and further lines from it."
            )
        found.add(key)


def refuse_repeated_items(dataset: Any, name: str) -> None:
    """Raise ValueError where a data set has one record several times, as far as it shows.

    Seen are repeated indices of a `Subset`; one data set twice in a `ConcatDataset`, or two data
    sets over one array; and one file under several names in lists of files (``samples``, as
    torchvision's ImageFolder has), also of different parts.
    """
    composed = isinstance(dataset, Subset | ConcatDataset)
    if not composed and not isinstance(getattr(dataset, "samples", None), list):
        return  # by its number each record is another one
    keys = _items(dataset, np.arange(len(dataset)))
    if len(np.unique(keys, axis=0)) < len(keys):
        raise ValueError(
            f"source {name!r} has one record several times (indices that repeat in a Subset, data "
            "sets over the same images or files in a ConcatDataset, several names of one file); "
            "expected each record once, as an image that counts twice has twice the privacy loss "
            "that is stated."
        )


def _items(dataset: Any, positions: np.ndarray) -> np.ndarray:
    """Which record of which data set stands at each position: int64 ``[n, 2]``."""
    if isinstance(dataset, Subset):
        return _items(dataset.dataset, np.asarray(list(dataset.indices), np.int64)[positions])
    if isinstance(dataset, ConcatDataset):
        positions = positions % max(1, len(dataset))
        ends = np.asarray(dataset.cumulative_sizes, np.int64)
        parts = np.searchsorted(ends, positions, side="right")
        starts = np.concatenate([[0], ends[:-1]])
        found = np.zeros((len(positions), 2), np.int64)
        for part in np.unique(parts):
            here = parts == part
            found[here] = _items(dataset.datasets[part], positions[here] - starts[part])
        return found
    positions = positions % max(1, len(dataset))
    samples = getattr(dataset, "samples", None)
    if isinstance(samples, list) and len(samples) == len(dataset):
        return np.array([_file_of(dataset, samples[i], i) for i in positions], np.int64)
    whole = np.full(len(positions), _images_of(dataset), np.int64)
    return np.stack([whole, positions], axis=1) if len(positions) else np.zeros((0, 2), np.int64)


def _file_of(dataset: Any, sample: Any, index: int) -> tuple[int, int]:
    """The file that a sample (path, label) names, or the sample itself."""
    path = sample[0] if isinstance(sample, tuple) and sample else None
    if isinstance(path, str | os.PathLike):
        with contextlib.suppress(OSError, ValueError):
            status = os.stat(path)
            if status.st_ino:
                return status.st_dev % 2**62, status.st_ino % 2**63
    return -_images_of(dataset) - 1, index  # below zero, as no device is


def _images_of(dataset: Any) -> int:
    """Where the images of a data set lie in memory, if it shows them; else the data set itself."""
    attributes = getattr(dataset, "__dict__", {})
    for value in dataset.tensors if isinstance(dataset, TensorDataset) else attributes.values():
        if isinstance(value, torch.Tensor | np.ndarray) and value.ndim >= 3:
            if len(value) != len(dataset) or not value.nbytes:
                continue
            return value.data_ptr() if isinstance(value, torch.Tensor) else value.ctypes.data
    return id(dataset)


def shards_in(folder: AnyPath, suffix: str) -> tuple[list[AnyPath], dict[str, int]]:
    """The shards in a folder, sorted, each once; and what else is there, by reason."""
    found: list[AnyPath] = []
    passed: Counter[str] = Counter()
    for entry in folder.iterdir():
        reason = leftover(entry.name)
        if reason is None and entry.suffix != suffix:
            reason = "a folder beside the shards" if entry.is_dir() else other_extension(entry.name)
        if reason is None:
            found.append(entry)
        else:
            passed[reason] += 1
    shards, twice = without_second_names(sorted(found))
    return shards, dict(passed + Counter(twice))


def refuse_copied_shards(files: Sequence[AnyPath], name: str) -> None:
    """Raise ValueError where a shard is a copy of another, by its name and by its bytes.

    Compared are the shards of one family (`dpmmd.data.leftovers.family_of`).

    *Why a copy is not passed over.* If it were, an exchange of one record in one of the two shards
    would make them differ, and all records of the other would come in. So the source is refused
    before anything is spent; what is opened counts each record of each shard, and no record decides
    whether another one counts.
    """
    families: dict[str, list[AnyPath]] = {}
    for file in files:
        families.setdefault(family_of(str(file)), []).append(file)
    for family in families.values():
        for copy, first in copies_in(family).items() if len(family) > 1 else ():
            raise ValueError(
                f"source {name!r}: the shard {listed([str(family[copy])])} is a copy of "
                f"{listed([str(family[first])])}, by its name and by its bytes, and each of its "
                "images would count twice; expected each shard once: remove the copy."
            )


def copies_in(files: Sequence[AnyPath]) -> dict[int, int]:
    """Files with the bytes of an earlier one: position -> position of the first of its bytes.

    Only files of one size are read. Empty files, and what cannot be read, are no copies.
    """
    sizes = [_size(file) for file in files]
    counts = Counter(sizes)
    seen: dict[bytes, int] = {}
    copies = {}
    for position, (file, size) in enumerate(zip(files, sizes, strict=True)):
        if size and counts[size] > 1 and (digest := _digest(file)):
            first = seen.setdefault(digest, position)
            if first != position:
                copies[position] = first
    return copies


def _size(file: AnyPath) -> int:
    try:
        if isinstance(file, Path):
            return os.stat(file).st_size
        with opened(file) as handle:
            return handle.seek(0, 2)
    except OSError:
        return 0


def _digest(file: AnyPath) -> bytes:
    try:
        found = hashlib.sha256()
        with opened(file) as handle:
            while piece := handle.read(_PIECE):
                found.update(piece)
        return found.digest()
    except (OSError, Unusable):
        return b""


def inside(folder: AnyPath, name: str) -> tuple[AnyPath, FileKey] | None:
    """The regular file that `name`, read from a container, stands for; None where there is none.

    A container may name files inside `folder` only: no absolute path, no ``..``, and no link that
    leads outside. `folder` is given with its links resolved.
    """
    if isinstance(folder, RemotePath):
        parts = name.split("/")
        if "::" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
            return None
        return folder / name, str(folder / name)
    parts = name.replace("\\", "/").split("/")
    if not name or "\0" in name or os.path.isabs(name) or ".." in parts or ":" in parts[0]:
        return None
    try:
        path = (folder / name).resolve(strict=True)
        status = os.stat(path)
    except (OSError, ValueError, RuntimeError):  # RuntimeError: links in a circle, before 3.13
        return None
    if not path.is_relative_to(folder) or not stat.S_ISREG(status.st_mode):
        return None
    return path, key_of(path, status)
