"""A folder of image files: one sub-folder per class, or all images in it and no labels."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from dpmmd.data.classes import folder_names
from dpmmd.data.items import FileSource
from dpmmd.data.pixels import EXTENSIONS, Geometry
from dpmmd.data.source import file_identity

_SPLIT_FOLDERS = frozenset(("train", "test", "val", "valid", "validation"))


def open_folder(
    path: Path,
    *,
    geometry: Geometry,
    num_classes: int | None,
    workers: int,
    group_by: str | None = None,
) -> FileSource:
    """Image files under `path`, in sorted order.

    Sub-folders, sorted by name, are the classes 0..K-1 (images anywhere below them count);
    hidden entries and files with other extensions are passed over. With ``group_by="folder"`` the
    images below one folder are one group: ``<class>/<group>/...``, where a group may have images in
    several classes; ``<group>/...`` if `num_classes` is None.

    Raises:
        ValueError: images both beside and inside sub-folders; sub-folders that are
            splits (``train``, ``test``), not classes; images outside of a group's folder.
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
    labelled = bool(folders) and not loose
    chosen = paths if labelled else loose
    return FileSource(
        chosen,
        name=path.name,
        identity=file_identity("folder", path),
        labels=torch.tensor(labels, dtype=torch.int64) if labelled else None,
        class_names=folder_names(path, folders) if labelled else None,
        num_classes=num_classes,
        geometry=geometry,
        workers=workers,
        groups=None if group_by is None else _groups(path, chosen, group_by, num_classes),
        group_by=group_by,
    )


def _groups(path: Path, images: list[str], group_by: str, num_classes: int | None) -> list[str]:
    """The folder of each image that stands for its group."""
    level = 0 if num_classes is None else 1
    layout = ("<group>/...", "<class>/<group>/...")[level]
    if group_by != "folder":
        raise ValueError(
            f"group_by={group_by!r}: a folder of images has no such column; expected 'folder', "
            f"with the images of each group in a folder of their own ({layout})."
        )
    names = [os.path.relpath(image, path).split(os.sep)[:-1] for image in images]
    if any(len(name) <= level for name in names):
        raise ValueError(
            f"group_by='folder': source {path.name!r} has images outside of a group's folder; "
            f"expected {layout}."
        )
    return [name[level] for name in names]


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
