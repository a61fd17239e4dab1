"""What is there, before anything is spent: for the data holder's eyes alone.

`inspect` looks at a source as `dpmmd.data.open_source` would open it, and says what it found: how
many images of which classes, sizes and formats, what cannot be read and why, what was passed over
and why, how large the groups are, and what a release would still have to be told. Nothing here is
private in any sense: show it to nobody. Nothing is written anywhere, and nothing is downloaded.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import shlex
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from dpmmd.data.arrays import ArraySource
from dpmmd.data.dataset import DatasetSource
from dpmmd.data.folder import FolderSource, forbidden_left_out
from dpmmd.data.heads import FIRST, Head, beginning, head_of, plain_head
from dpmmd.data.items import EncodedSource
from dpmmd.data.leftovers import listed
from dpmmd.data.look import first_look
from dpmmd.data.open import open_source
from dpmmd.data.parquet import ParquetSource
from dpmmd.data.pixels import Encoded, Unusable, quiet, reason_of
from dpmmd.data.remote import opened
from dpmmd.data.source import ImageSource
from dpmmd.data.tars import TarSource

YOURS = (
    "For the data holder's eyes alone: what follows depends on private images, and no epsilon "
    "covers it. Show it to nobody, and do not choose published settings by it beyond what everyone "
    "may know."
)
NEXT = "A release of what is there, to be read before it is run:"
_AT_ONCE = 64  # records that are decoded at a time
_SHOWN = 20  # lines of a row
_ITEMS = 256  # items of a Dataset that are looked at, unless all are
_SIDES = (8, 16, 28, 32, 48, 64, 96, 128, 192, 224, 256, 384, 512)
_GREY = ("1", "L", "LA", "La", "F", "I", "I;16", "I;16L", "I;16B", "I;16N", "1 channel")
_PERSONS = ("patient", "subject", "person", "identity", "individual", "participant", "user", "case")
_DELTA = 1e-5
_DROPPED = ("num_classes", "group_by")  # what a source may refuse, in the order of trying without
_RELEASE = (  # what a release's command line takes
    *("split", "image_size", "channels", "crop", "background"),
    *("image_key", "label_key", "num_classes", "group_by"),
)
# A shape for opening a source whose own shape is not known yet: nothing is resized to it.
_PLACE_HOLDER = {"image_size": 64, "channels": 3}


@dataclass(frozen=True)
class Sizes:
    """Widths and heights: by the number of pixels the least, the middle and the greatest."""

    least: tuple[int, int]
    median: tuple[int, int]
    greatest: tuple[int, int]
    different: int
    commonest: Mapping[str, int]  # "64 x 48" -> images


@dataclass(frozen=True)
class Groups:
    """How many groups there are, and how many of each number of images."""

    by: str
    number: int
    largest: int
    sizes: Mapping[int, int]  # images -> groups


@dataclass(frozen=True)
class Inspection:
    """What was found in a source. For the data holder's eyes alone.

    Attributes:
        source: what was inspected.
        kind: what kind of source it is.
        records: the number of records N, those included that cannot be used.
        looked_at: the records whose headers (of a Dataset: items) were read.
        decoded: the records that were decoded, to find what cannot be used.
        labelled: whether there are labels.
        classes: records of each class, by its name; empty where there are no labels.
        sizes: None where no size could be read.
        modes: records of each mode as Pillow calls it, or of each type of an array.
        formats: records of each format.
        transparent: records with transparency, which is composed on a background.
        several_frames: records with several pictures, of which the first counts.
        unusable: records that contribute nothing, by reason, as far as they were looked at.
        passed_over: files and members that are no records, by reason.
        suspicions: what may be one image under two names, and is counted twice.
        groups: None without ``group_by``.
        refused: why a release with the options given would be refused.
        guesses: options that a release needs, with what was found there.
        command: a command line with these options.
    """

    source: str
    kind: str
    records: int
    looked_at: int
    decoded: int
    labelled: bool
    classes: Mapping[str, int]
    sizes: Sizes | None
    modes: Mapping[str, int]
    formats: Mapping[str, int]
    transparent: int
    several_frames: int
    unusable: Mapping[str, int]
    passed_over: Mapping[str, int]
    suspicions: Mapping[str, int]
    groups: Groups | None
    refused: tuple[str, ...]
    guesses: Mapping[str, str]
    command: str

    def facts(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        found = asdict(self)
        if self.groups is not None:
            found["groups"]["sizes"] = {str(size): n for size, n in self.groups.sizes.items()}
        return {"for": YOURS, **found}


def inspect(
    source: Any,
    *,
    everything: bool = False,
    progress: bool = False,
    **options: Any,
) -> Inspection:
    """Look at a source, also where `dpmmd.data.open_source` would refuse it.

    Args:
        source: as for `dpmmd.data.open_source`.
        everything: decode every record and compare the content of files. By default headers are
            read, of a Dataset 256 items.
        progress: whether to show a progress bar.
        **options: those of `dpmmd.data.open_source`. What it refuses (mixed sizes, another number
            of classes, folders without permission) is reported in ``refused``.

    Raises:
        ValueError, TypeError, OSError: the source cannot be opened whatever is declared.
    """
    refused: list[str] = []
    kept = dict(options)
    found = _open(source, kept, refused)
    return inspect_source(
        found,
        everything=everything,
        progress=progress,
        options=kept,
        refused=refused,
        shown=source if isinstance(source, str | os.PathLike) else None,
    )


def inspect_source(
    source: ImageSource,
    *,
    everything: bool = False,
    progress: bool = False,
    options: Mapping[str, Any] | None = None,
    refused: Iterable[str] = (),
    shown: str | os.PathLike[str] | None = None,
) -> Inspection:
    """`inspect` for an open source. `shown`: what the command line calls it."""
    options = options or {}
    survey = _Survey(source, everything, progress)
    survey.heads()
    problems = [*refused, *_mixed(survey, options)]
    try:
        survey.decode()
    except (TypeError, ValueError) as error:  # a mistake of the data set, not of a record
        problems.append(str(error))
    guesses = _guesses(source, survey, options)
    name = os.fspath(shown) if shown is not None else source.name
    if not source.num_images:
        problems.append(f"source {source.name!r} holds no images.")
    return Inspection(
        source=name,
        kind=_kind(source),
        records=source.num_images,
        looked_at=survey.looked_at,
        decoded=survey.decoded,
        labelled=bool(survey.labels),
        classes=_classes(source, survey.labels),
        sizes=_sizes(survey.sizes),
        modes=_by_count(survey.modes),
        formats=_by_count(survey.formats),
        transparent=survey.transparent,
        several_frames=survey.several,
        unusable=_by_count(survey.unusable),
        passed_over=_by_count(Counter(source.passed_over)),
        suspicions=_by_count(survey.suspicions()),
        groups=_groups(source),
        refused=tuple(dict.fromkeys(problems)),
        guesses={option: why for option, (_, why) in guesses.items()},
        command=_command(name, source, options, guesses),
    )


def rows(found: Inspection) -> Iterator[tuple[str, str]]:
    """What to print: pairs of a name and a text, which may have several lines."""

    def several(counts: Mapping[Any, int]) -> str:
        lines = [f"{count:,} x {listed([str(what)])}" for what, count in counts.items()]
        return "\n".join([*lines[:_SHOWN], *(["..."] if len(lines) > _SHOWN else [])])

    yield "source", f"{listed([found.source])} ({found.kind})"
    yield "records", f"{found.records:,}"
    yield "looked at", f"{found.looked_at:,} headers or items; {found.decoded:,} records decoded"
    if found.classes:
        yield f"{len(found.classes)} classes", several(found.classes)
    else:
        yield "classes", "no labels"
    if found.sizes is not None:
        s = found.sizes
        ends = " to ".join(f"{w} x {h}" for w, h in (s.least, s.greatest))
        middle = f"{s.median[0]} x {s.median[1]}"
        yield "width x height", f"{ends}, {middle} in the middle; {s.different:,} different"
        yield "the commonest", several(s.commonest)
    yield "modes", several(found.modes) or "none could be read"
    yield "formats", several(found.formats) or "none could be read"
    if found.transparent:
        yield "transparent", f"{found.transparent:,}, composed on the background"
    if found.several_frames:
        yield "several pictures", f"{found.several_frames:,}, of which the first one counts"
    if found.groups is not None:
        g = found.groups
        groups = several({f"groups of {size:,}": number for size, number in g.sizes.items()})
        yield f"groups by {listed([g.by])}", f"{g.number:,}, the largest of {g.largest:,}\n{groups}"
    so_far = "" if found.decoded == found.records else " (as far as it was looked at)"
    yield f"unusable{so_far}", several(found.unusable) or "none"
    yield "passed over", several(found.passed_over) or "nothing"
    if found.suspicions:
        yield "counted twice?", several(found.suspicions)
    for problem in found.refused:
        yield "a release is refused", problem
    for option, why in found.guesses.items():
        yield f"guess: {option}", why


def _open(source: Any, options: dict[str, Any], refused: list[str]) -> ImageSource:
    """The source, opened with as much of `options` as it allows; what it refuses is left out."""
    if isinstance(source, ImageSource):
        return source
    opening = ExitStack()
    with opening, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # `passed_over` says it
        while True:
            declared = {name: v for name, v in options.items() if v is not None}
            try:
                return open_source(
                    source, **{"download": False, "allow_empty": True, **_PLACE_HOLDER, **declared}
                )
            except PermissionError as error:
                if str(error) in refused:
                    raise
                refused.append(str(error))
                opening.enter_context(forbidden_left_out())
            except (ValueError, TypeError) as error:
                dropped = next((o for o in _DROPPED if o in declared), None)
                if dropped is None:
                    raise
                refused.append(str(error))
                options[dropped] = None


@dataclass
class _Survey:
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


def _kind(source: ImageSource) -> str:
    kinds = {
        "FolderSource": "folder of images",
        "FileSource": "list of image files",
        "TarSource": "WebDataset shards",
        "ParquetSource": "parquet",
        "LmdbSource": "LMDB databases",
        "ArraySource": "arrays",
        "DatasetSource": "torch Dataset",
    }
    return kinds.get(type(source).__name__, type(source).__name__)


def _classes(source: ImageSource, labels: Counter[int]) -> dict[str, int]:
    names = source.class_names
    if not labels and names is None:
        return {}
    known = range(len(names)) if names is not None else ()
    numbers = sorted({*labels, *known})
    return {
        names[k] if names is not None and 0 <= k < len(names) else str(k): labels[k]
        for k in numbers
    }


def _sizes(found: Counter[tuple[int, int]]) -> Sizes | None:
    if not found:
        return None
    ordered = sorted(found, key=lambda size: (size[0] * size[1], size))
    middle, seen = found.total() / 2, 0
    median = ordered[-1]
    for size in ordered:
        seen += found[size]
        if seen >= middle:
            median = size
            break
    commonest = {f"{w} x {h}": n for (w, h), n in found.most_common(5)}
    return Sizes(ordered[0], median, ordered[-1], len(found), commonest)


def _by_count(found: Counter[str]) -> dict[str, int]:
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))


def _groups(source: ImageSource) -> Groups | None:
    if source.groups is None or source.group_by is None:
        return None
    sizes = torch.unique(source.groups, return_counts=True)[1].tolist()
    histogram = dict(sorted(Counter(sizes).items()))
    return Groups(source.group_by, len(sizes), max(sizes, default=0), histogram)


# ------------------------------------------------------------------ what a release has to be told
def _mixed(survey: _Survey, options: Mapping[str, Any]) -> Iterator[str]:
    if len(survey.sizes) > 1 and options.get("image_size") is None:
        yield "images of mixed sizes and no image_size: see the guess below."
    grey = [mode in _GREY for mode in survey.modes]
    if any(grey) and not all(grey) and options.get("channels") is None:
        yield "both grey and colour images and no channels: see the guess below."


def _guesses(
    source: ImageSource, survey: _Survey, options: Mapping[str, Any]
) -> dict[str, tuple[str, str]]:
    """Option -> (its value on the command line, why)."""
    found: dict[str, tuple[str, str]] = {}
    names = source.class_names
    if options.get("num_classes") is None and survey.labels:
        number = len(names) if names is not None else max(survey.labels) + 1
        shown = f": {listed(list(names))}" if names is not None else ""
        found["--num-classes"] = (str(number), f"{number} classes{shown}; leave it out for none")
    if options.get("image_size") is None and survey.sizes:
        side, why = _side(survey.sizes)
        if side is not None:
            found["--image-size"] = (str(side), why)
            if _elongated(survey.sizes) and options.get("crop") is None:
                why = "sides of different lengths, which would be stretched to a square"
                found["--crop"] = ("center", why)
    if options.get("channels") is None and survey.modes:
        grey = all(mode in _GREY for mode in survey.modes)
        found["--channels"] = ("1", "all are grey") if grey else ("3", "colour images")
    by = _persons(source)
    if options.get("group_by") is None and by is not None:
        found["--group-by"] = (by, "if these are persons who have several images each")
    return found


def _side(sizes: Counter[tuple[int, int]]) -> tuple[int | None, str]:
    if len(sizes) == 1:
        ((width, height),) = sizes
        if width == height:
            return width, "all images have this size"
        return None, ""
    shorter = sorted(min(size) for size in sizes.elements())
    middle = shorter[len(shorter) // 2]
    side = max((side for side in _SIDES if side <= middle), default=middle)
    return side, f"mixed sizes, whose shorter side is {middle} in the middle"


def _elongated(sizes: Counter[tuple[int, int]]) -> bool:
    long = sum(n for (w, h), n in sizes.items() if max(w, h) > 1.1 * min(w, h))
    return long > 0.1 * sizes.total()


def _persons(source: ImageSource) -> str | None:
    """A column, or 'folder', that may say which images are of one person."""
    if isinstance(source, FolderSource):
        top = len(os.path.join(source.folder, ""))
        parts = {tuple(path[top:].split(os.sep, 2)[:-1]) for path in source.paths}
        in_folders = bool(parts) and all(len(part) == 2 for part in parts)
        return "folder" if in_folders and len(parts) > len({p[0] for p in parts}) else None
    columns = source.columns if isinstance(source, ParquetSource | TarSource) else ()
    return next((c for c in columns if any(word in c.lower() for word in _PERSONS)), None)


def _command(
    name: str,
    source: ImageSource,
    options: Mapping[str, Any],
    guesses: Mapping[str, tuple[str, str]],
) -> str:
    """A release of this source, with what was given and what was guessed."""
    stem = Path(name.rstrip("/")).stem or "private"
    delta = min(_DELTA, 10.0 ** -math.ceil(math.log10(max(10, source.num_images)) + 1e-9))
    words = ["dpmmd", "release", name, "--out", f"{stem}.safetensors"]
    words += ["--epsilon", "1", "--delta", f"{delta:g}", "--adjacency", "replace-one"]
    for option in _RELEASE:
        value = options.get(option)
        if value is not None and not (option == "split" and value == "train"):
            words += [f"--{option.replace('_', '-')}", str(value)]
    for option, (value, _) in guesses.items():
        words += [option, value]
    return shlex.join(words)
