"""What is there, before anything is spent: for the data holder's eyes alone.

`inspect` looks at a source as `dpmmd.data.open_source` would open it, and says what it found: how
many images of which classes, sizes and formats, what cannot be read and why, what was passed over
and why, how large the groups are, and what a release would still have to be told. Nothing here is
private in any sense: show it to nobody. Nothing is written anywhere, and nothing is downloaded.
"""

from __future__ import annotations

import math
import os
import shlex
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dpmmd.data.folder import FolderSource, forbidden_left_out
from dpmmd.data.inspection import Groups, Inspection, Sizes
from dpmmd.data.leftovers import listed
from dpmmd.data.open import open_source
from dpmmd.data.parquet import ParquetSource
from dpmmd.data.source import ImageSource
from dpmmd.data.survey import Survey
from dpmmd.data.tars import TarSource

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
    survey = Survey(source, everything, progress)
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


ImageSource._inspector = inspect_source


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
def _mixed(survey: Survey, options: Mapping[str, Any]) -> Iterator[str]:
    if len(survey.sizes) > 1 and options.get("image_size") is None:
        yield "images of mixed sizes and no image_size: see the guess below."
    grey = [mode in _GREY for mode in survey.modes]
    if any(grey) and not all(grey) and options.get("channels") is None:
        yield "both grey and colour images and no channels: see the guess below."


def _guesses(
    source: ImageSource, survey: Survey, options: Mapping[str, Any]
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
