"""What the records of a source say of themselves: headers, decoding, contents.

Nothing here is private in any sense: it is for `dpmmd inspect`, and the data holder's eyes alone.
"""

from __future__ import annotations

import copy
import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dpmmd.data.arrays import ArraySource
from dpmmd.data.dataset import DatasetSource
from dpmmd.data.folder import FolderSource
from dpmmd.data.heads import FIRST, Head, beginning, head_of, plain_head
from dpmmd.data.items import EncodedSource
from dpmmd.data.look import first_look
from dpmmd.data.pixels import Encoded, Unusable, reason_of
from dpmmd.data.remote import opened
from dpmmd.data.silence import quiet
from dpmmd.data.source import ImageSource
from dpmmd.data.tars import TarSource

_AT_ONCE = 64  # records that are decoded at a time
_ITEMS = 256  # items of a Dataset that are looked at, unless all are


@dataclass
class Survey:
    """What the records say of themselves, counted."""

    source: ImageSource
    everything: bool
    progress: bool
    looked_at: int = 0
    decoded: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    formats: Counter[str] = field(default_factory=Counter)
    transparent: int = 0
    several: int = 0
    unusable: Counter[str] = field(default_factory=Counter)
    labels: Counter[int] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        labels: Tensor | None = getattr(self.source, "_labels", None)
        if labels is not None:
            values, counts = np.unique(labels.numpy(), return_counts=True)
            self.labels.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))

    def heads(self) -> None:
        """Go through the headers, or what stands for them."""
        for head, count in self._bar(_heads(self.source, self.everything, self.labels), "headers"):
            self.looked_at += count
            if isinstance(head, Unusable):
                self.unusable[head.reason] += count
                continue
            self.sizes[head.width, head.height] += count
            self.modes[head.mode] += count
            self.formats[head.format] += count
            self.transparent += count * head.transparent
            self.several += count * (head.frames > 1)

    def decode(self) -> None:
        """Decode the records, all or, where headers tell too little, some."""
        if self.everything:
            reasons: Counter[str] = Counter()
            for outcome in self._bar(_outcomes(self.source), "decoding"):
                self.decoded += 1
                if outcome is not None:
                    reasons[outcome.reason] += 1
            self.unusable = reasons
        elif not isinstance(self.source, EncodedSource) and self.source.num_images:
            look = first_look(self.source)
            self.decoded, self.unusable = look.seen, Counter(look.reasons)

    def suspicions(self) -> Counter[str]:
        found: Counter[str] = Counter()
        if isinstance(self.source, FolderSource):
            what = "copies, by name and bytes, of a file of another class or group; they count"
            found[what] = self.source.copies_elsewhere()
        if self.everything and isinstance(self.source, EncodedSource):
            contents = Counter(self._bar(_digests(self.source), "comparing"))
            contents.pop(b"", None)
            found["records whose bytes are those of another record"] = contents.total() - len(
                contents
            )
        return +found

    def _bar(self, values: Iterable[Any], what: str) -> Iterable[Any]:
        return tqdm(
            values,
            total=self.source.num_images,
            desc=what,
            unit="image",
            disable=not self.progress,
            leave=False,
        )


def _heads(
    source: ImageSource, everything: bool, labels: Counter[int]
) -> Iterator[tuple[Head | Unusable, int]]:
    """Headers, each with the number of records that it stands for."""
    if isinstance(source, ArraySource):
        channels, height, width = source._images.shape[1:]
        mode = f"{channels} channel{'s' if channels > 1 else ''}"
        kind = str(source._images.dtype).removeprefix("torch.")
        yield Head(width, height, mode, f"array of {kind}"), source.num_images
    elif isinstance(source, EncodedSource):
        with quiet():
            for head in _beginnings(source):
                yield head, 1
    elif isinstance(source, DatasetSource):
        number = source.num_images if everything else min(source.num_images, _ITEMS)
        step = max(1, source.num_images // max(1, number))
        known = bool(labels)
        for head, label in _items(source, range(0, source.num_images, step)[:number]):
            if label is not None and not known:
                labels[label] += 1
            yield head, 1


def _beginnings(source: EncodedSource) -> Iterator[Head | Unusable]:
    numbers = source.records(range(source.num_images))
    firsts: Iterable[Encoded]
    if isinstance(source, TarSource):
        firsts = source.beginnings(numbers, FIRST)
    elif isinstance(source, FolderSource):
        firsts = (b"" if n in source.copies else beginning(source.paths[n]) for n in numbers)
    else:
        yield from map(_outcome, source.encoded(numbers))
        return
    for number, first in zip(numbers, firsts, strict=True):
        head = plain_head(first) if isinstance(first, bytes) else None
        yield head or _outcome(next(source.encoded([number])))


def _outcome(encoded: Encoded) -> Head | Unusable:
    try:
        return head_of(encoded)
    except Exception as error:
        return Unusable(reason_of(error))


def _items(
    source: DatasetSource, positions: Sequence[int]
) -> Iterator[tuple[Head | Unusable, int | None]]:
    """Headers and labels of a data set's items, as they are before they are brought to a size."""
    reader = copy.copy(source)
    with reader.reading():
        for record in reader.records(positions):
            reader._begun().rekey(record)
            try:
                image, label = reader._split(reader._dataset[record])
                yield _item_head(image), reader._label(label)
            except Exception as error:
                yield Unusable(reason_of(error)), None


def _item_head(image: Any) -> Head:
    if isinstance(image, bytes):
        return head_of(image)
    if isinstance(image, Image.Image):
        return Head(*image.size, image.mode, "PIL image", 1, image.has_transparency_data)
    if not isinstance(image, Tensor | np.ndarray) or image.ndim not in (2, 3):
        raise Unusable(f"an item of type {type(image).__name__}, not an image")
    shape = tuple(image.shape) if image.ndim == 3 else (1, *image.shape)
    if shape[0] not in (1, 3) and shape[2] in (1, 3):
        shape = (shape[2], *shape[:2])
    kind = str(image.dtype).removeprefix("torch.")
    mode = f"{shape[0]} channel{'s' if shape[0] > 1 else ''}"
    return Head(shape[2], shape[1], mode, f"array of {kind}")


def _outcomes(source: ImageSource) -> Iterator[Unusable | None]:
    """Of every record, whether it can be used."""
    for start in range(0, source.num_images, _AT_ONCE):
        positions = range(start, min(start + _AT_ONCE, source.num_images))
        found = source.look(positions)
        if found is None:
            yield from _outcomes_of_batches(source)
            return
        yield from found


def _outcomes_of_batches(source: ImageSource) -> Iterator[Unusable | None]:
    left = source.num_images
    for batch in source.batches(_AT_ONCE):
        for ok in batch.valid[:left].tolist():
            yield None if ok else Unusable("its batches say that the record is not valid")
        left -= _AT_ONCE


def _digests(source: EncodedSource) -> Iterator[bytes]:
    for encoded in source.encoded(source.records(range(source.num_images))):
        if isinstance(encoded, bytes):
            yield hashlib.sha256(encoded).digest()
        elif isinstance(encoded, os.PathLike):
            yield _digest(encoded)
        else:
            yield b""


def _digest(path: str | os.PathLike[str]) -> bytes:
    try:
        with opened(Path(path)) as file:
            return hashlib.sha256(file.read()).digest()
    except (OSError, Unusable):
        return b""
