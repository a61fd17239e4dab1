"""``.npz`` files of images ``x`` and labels ``y``: reading private ones, writing synthetic ones."""

from __future__ import annotations

import os
import uuid
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from dpmmd.data.arrays import ArraySource, requested
from dpmmd.data.classes import listed, written_names
from dpmmd.data.labels import as_labels
from dpmmd.data.request import Request
from dpmmd.data.rows import StreamedRows, check_members
from dpmmd.data.source import check_not_empty, file_identity

_SPLITS = ("train", "test", "val", "valid", "validation")


def open_npz(path: Path, request: Request) -> ArraySource:
    """An ``.npz`` file as a source. Object arrays (pickles) are refused.

    Images are the array `image_key`, or the first of ``x_<split>``, ``images_<split>``, ``x``,
    ``images``; labels likewise, from ``y_<split>``, ``labels_<split>``, ``y``, ``labels``. Groups
    are the array `group_by`. ``classes``, if it is an array of different texts, has the names of
    the classes 0, 1, ...
    """
    split = request.split
    try:
        with np.load(path, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise ValueError("a single array")
            check_members(path)
            names = tuple(file.files)
            image_name = _pick(
                names,
                request.image_key,
                "image_key",
                (f"x_{split}", f"images_{split}", "x", "images"),
                path,
                split,
            )
            suffix = image_name.rpartition("_")[2]
            part = suffix if "_" in image_name and suffix in _SPLITS else ""
            default_labels: tuple[str, ...] = ("y", "labels")
            if part:
                default_labels = (f"y_{part}", f"labels_{part}")
            label_name = _pick(names, request.label_key, "label_key", default_labels, path, split)
            images: Any = StreamedRows.of(path, image_name)
            if images is None:
                images = file[image_name]
            labels = file[label_name] if label_name else None
            class_names = _class_names(file) if label_name else None
            groups = None
            if request.group_by is not None:
                groups = file[_pick(names, request.group_by, "group_by", (), path, split)]
    except _KeyRefused as refused:
        raise ValueError(str(refused)) from None
    except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"source={str(path)!r} is not a readable .npz file of plain arrays "
            f"({type(error).__name__}): expected what numpy.savez writes, without object arrays; "
            "save it again with numpy.savez(path, x=images, y=labels)."
        ) from None
    return requested(
        images,
        labels,
        request,
        name=path.name,
        identity=file_identity("npz", path, part),
        class_names=class_names,
        groups=groups,
    )


class _KeyRefused(Exception):
    pass


def _pick(
    names: tuple[str, ...],
    asked: str | None,
    argument: str,
    defaults: tuple[str, ...],
    path: Path,
    split: str,
) -> str:
    if asked is not None:
        if asked not in names:
            raise _KeyRefused(
                f"{argument}={asked!r}: no such array in {path.name!r}; expected one of "
                f"{', '.join(names)}."
            )
        return asked
    for name in defaults:
        if name in names:
            return name
    if argument == "label_key":
        return ""
    raise _KeyRefused(
        f"source={str(path)!r} has no images for split={split!r}: expected an array named "
        f"{', '.join(defaults)}; found {', '.join(names) or 'nothing'}. Name the array with "
        "image_key."
    )


def _class_names(file: Any) -> tuple[str, ...] | None:
    """The array ``classes``, where it can be the names of classes."""
    array = file["classes"] if "classes" in file.files else np.empty(0)
    if array.ndim != 1 or not len(array) or array.dtype.kind not in "US":
        return None
    names = tuple(
        name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else str(name)
        for name in array.tolist()
    )
    return names if len(set(names)) == len(names) else None


def write_npz(
    path: str | os.PathLike[str],
    images: Any,
    labels: Any = None,
    *,
    classes: Sequence[str] | None = None,
    modes: Any = None,
    overwrite: bool = False,
) -> Path:
    """Write a synthetic set as ``.npz``: ``x`` the images, ``y`` the labels, ``classes`` names.

    The file appears whole or not at all: it is written beside its place under a temporary name
    and then renamed.

    Args:
        path: where to, ending in ``.npz``; missing parent folders are made.
        images: uint8, or float in [0, 1] (stored as float32); ``[N, H, W]``, ``[N, H, W, C]`` or
            ``[N, C, H, W]``, array or tensor, stored in the layout given.
        labels: integers ``[N]``, or None for an unlabelled set (no ``y`` then).
        classes: names of the classes 0..K-1, or None (no ``classes`` then).
        modes: integers ``[N]``, the mode of each image within its class, or None (no ``modes``).
        overwrite: replace an existing file.

    Returns:
        The path.

    Raises:
        FileExistsError: the file exists and `overwrite` is False.
        ValueError: another extension, wrong shape, pixels outside [0, 1], or names that are not
            those of the labels' classes.
        TypeError: images or labels of another type.
    """
    path = Path(path).expanduser()
    if path.suffix != ".npz":
        raise ValueError(f"path={str(path)!r}: expected a name ending in .npz; try 'set.npz'.")
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"path={str(path)!r} exists: expected a new file; choose another name or give "
            "overwrite=True."
        )
    array = images.detach().cpu().numpy() if isinstance(images, Tensor) else np.asarray(images)
    source = ArraySource(array, name=path.name)  # its checks of type and shape
    check_not_empty(source.num_images, path.name)
    if array.dtype != np.uint8:
        array = array.astype(np.float32)
        if not bool(((array >= 0) & (array <= 1)).all()):
            raise ValueError(
                "images hold values outside [0, 1], or not finite: expected float pixels in "
                "[0, 1] or uint8; clamp them first."
            )
    content = {"x": array}
    if labels is not None:
        content["y"] = as_labels(labels, source.num_images, path.name).numpy()
    if classes is not None:
        names = written_names(classes)
        if labels is None or len(set(names)) < max(len(names), int(content["y"].max()) + 1):
            raise ValueError(
                f"classes={listed(names)}: expected a name of its own for each class that the "
                "labels have, in their order, or None; give labels with them."
            )
        content["classes"] = np.array(names, np.str_)
    if modes is not None:
        content["modes"] = as_labels(modes, source.num_images, path.name).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with open(temporary, "xb") as file:
            np.savez(file, **content)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path
