"""A folder of image files: one sub-folder per class, or all images in it and no labels."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dpmmd.data.items import FileSource
from dpmmd.data.pixels import EXTENSIONS, Geometry
from dpmmd.data.source import file_identity

_SPLIT_FOLDERS = frozenset(("train", "test", "val", "valid", "validation"))


def open_folder(
    path: Path, *, geometry: Geometry, num_classes: int | None, workers: int
) -> FileSource:
    """Image files under `path`, in sorted order.

    Sub-folders, sorted by name, are the classes 0..K-1 (images anywhere below them count);
    hidden entries and files with other extensions are passed over.

    Raises:
        ValueError: no images; images both beside and inside sub-folders; sub-folders that are
            splits (``train``, ``test``), not classes.
    """
    loose, folders = [], []
    for entry in sorted(os.scandir(path), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            folders.append(entry.name)
        elif _is_image(entry.name):
            loose.append(entry.path)
    if folders and not loose and {name.lower() for name in folders} <= _SPLIT_FOLDERS:
        raise ValueError(
            f"source={str(path)!r} has the sub-folders {', '.join(folders)}, which are splits and "
            f"not classes: expected one sub-folder per class; give {str(path / folders[0])!r}."
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        found = _images_below(path / folder)
        paths += found
        labels += [label] * len(found)
    if paths and loose:
        raise ValueError(
            f"source={str(path)!r} has images beside its class folders: expected either one "
            "sub-folder per class or images only; move the loose images into a class folder."
        )
    labelled = bool(paths)
    return FileSource(
        paths if labelled else loose,
        name=path.name,
        identity=file_identity("folder", path),
        labels=torch.tensor(labels, dtype=torch.int64) if labelled else None,
        class_names=tuple(folders) if labelled else None,
        num_classes=num_classes,
        geometry=geometry,
        workers=workers,
    )


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS


def _images_below(folder: Path) -> list[str]:
    found = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [
            os.path.join(parent, name)
            for name in sorted(files)
            if _is_image(name) and not name.startswith(".")
        ]
    return found
