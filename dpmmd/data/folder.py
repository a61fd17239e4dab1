"""A folder of image files: one sub-folder per class, or all images in it and no labels."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from dpmmd.data.classes import folder_names
from dpmmd.data.items import FileSource
from dpmmd.data.leftovers import family_of, leftover, listed, other_extension
from dpmmd.data.once import SECOND_NAME, SECOND_WAY, FileKey, copies_in, key_of
from dpmmd.data.pixels import EXTENSIONS, Encoded, Unusable
from dpmmd.data.request import Request
from dpmmd.data.source import check_num_classes, file_identity

COPY = "a copy of another file, by its name and by its bytes"
FORBIDDEN = "a folder that may not be read"
_SPLIT_FOLDERS = frozenset(
    ("train", "training", "test", "testing", "val", "valid", "validation", "dev", "eval",
     "evaluation", "holdout")
)  # fmt: skip
_IMAGE_FOLDERS = frozenset(("images", "image", "imgs", "img"))
_MASK_FOLDERS = frozenset(
    ("masks", "mask", "labels", "label", "annotations", "annotation", "segmentations",
     "segmentation")
)  # fmt: skip


_leave_out_forbidden = ContextVar("leave_out_forbidden", default=False)


@contextmanager
def forbidden_left_out() -> Iterator[None]:
    """Count folders that may not be read instead of refusing the source: for inspections."""
    token = _leave_out_forbidden.set(True)
    try:
        yield
    finally:
        _leave_out_forbidden.reset(token)


def open_folder(path: Path, request: Request) -> FolderSource:
    """Image files under `path`, in sorted order, each file once (`dpmmd.data.once`).

    Sub-folders are the classes 0..K-1, sorted by name, or as numbers where all names are whole
    numbers; images anywhere below them count, and a folder without images is a class too. Hidden
    entries, what machines leave behind (`dpmmd.data.leftovers`) and files with other extensions are
    passed over. With ``group_by="folder"`` the images below one folder are one group:
    ``<class>/<group>/...``, where a group may have images in several classes; ``<group>/...`` if
    `num_classes` is None.

    Raises:
        PermissionError: a folder below `path` that may not be read.
        ValueError: images both beside and inside sub-folders; sub-folders that are no classes but
            splits (``train``, ``test``), or ``images`` beside ``masks``; as many classes as
            `num_classes` does not say; one file in two classes or in two groups; images outside of
            a group's folder.
    """
    group_by, num_classes = request.group_by, request.num_classes
    tree = _Tree(path)
    folders, loose = tree.top()
    _refuse_splits(path, path, folders if not loose else [])
    found: list[_Image] = []
    for label, name in enumerate(folders):
        found += tree.below(os.path.join(path, name), label)
    if found and loose:
        raise ValueError(
            f"source={str(path)!r} has images beside its class folders: expected either one "
            "sub-folder per class or images only; move the loose images into a class folder."
        )
    labelled = bool(folders) and not loose
    images = found if labelled else loose
    groups = None if group_by is None else _groups(path, images, group_by, num_classes)
    if groups is not None:
        _refuse_two_groups(path, tree.second_names, num_classes)
    return FolderSource(
        path,
        images,
        conflict=tree.conflict,
        passed_over=tree.passed,
        name=path.name,
        identity=file_identity("folder", path),
        labels=torch.tensor([i.label for i in images], dtype=torch.int64) if labelled else None,
        class_names=folder_names(path, folders) if labelled else None,
        request=request,
        groups=groups,
    )


@dataclass(frozen=True)
class _Image:
    path: str
    label: int


class FolderSource(FileSource):
    """The images of a folder; copies that a file manager made of an image contribute nothing."""

    def __init__(
        self,
        folder: Path,
        images: Sequence[_Image],
        *,
        conflict: tuple[str, str] | None,
        passed_over: Counter[str],
        request: Request,
        **described: Any,
    ) -> None:
        self.folder = folder
        self._conflict = conflict
        self._copies = _copies(folder, images, described["groups"])
        self.passed_over = dict(passed_over)
        paths = [image.path for image in images]
        super().__init__(paths, request=replace(request, num_classes=None), **described)
        if request.num_classes is not None:
            self.check_labels(request.num_classes)

    @property
    def paths(self) -> tuple[str, ...]:
        """The files, in the order of the records."""
        return self._paths

    @property
    def copies(self) -> frozenset[int]:
        """The records that are copies of another record, by their names and bytes."""
        return self._copies

    def copies_elsewhere(self) -> int:
        """How many records are copies of a record of another class or group, and count."""
        return len(_equal_in_families(self.folder, self._paths, None) - self._copies)

    def check_labels(self, num_classes: int) -> None:
        """Raise ValueError where the sub-folders are not `num_classes` classes."""
        check_num_classes(num_classes)
        if self._conflict is not None and num_classes > 1:
            one, other = self._conflict
            raise ValueError(
                f"source={str(self.folder)!r}: {listed([one])} and {listed([other])} are one file, "
                "or one folder, in two classes: expected each image in one class; remove one of "
                "them."
            )
        if self.class_names is not None and len(self.class_names) != num_classes:
            _refuse_classes(self.folder, self.class_names, num_classes)
        super().check_labels(num_classes)

    def encoded(self, indices: Sequence[int]) -> Iterator[Encoded]:
        for index, encoded in zip(indices, super().encoded(indices), strict=True):
            yield Unusable(COPY) if index in self._copies else encoded


@dataclass
class _Tree:
    """A walk that enters each folder once and takes each file once."""

    root: Path
    passed: Counter[str] = field(default_factory=Counter)
    conflict: tuple[str, str] | None = None  # two names of one file, in two classes
    second_names: list[tuple[str, str]] = field(default_factory=list)  # (further, first)
    _folders: dict[FileKey, tuple[str, int | None]] = field(default_factory=dict)
    _files: dict[FileKey, tuple[str, int]] = field(default_factory=dict)

    def top(self) -> tuple[list[str], list[_Image]]:
        """The sub-folders, in the order of their classes, and the images beside them."""
        self._enter(os.fspath(self.root), None)
        folders, files = self._entries(os.fspath(self.root))
        names = []
        for label, path in enumerate(sorted(folders, key=_by_number(folders))):
            # A link to the source's own folder, or to one above, is no class of its own.
            if self._enter(path, label):
                names.append(os.path.basename(path))
        return names, self._images(files, 0)

    def below(self, folder: str, label: int) -> list[_Image]:
        """The images of a class: first those of a folder, then those of the folders in it."""
        found: list[_Image] = []
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            folders, files = self._entries(current)
            images = self._images(files, label)
            if current == folder and not images:
                inside = [os.path.basename(path) for path in folders]
                _refuse_splits(self.root, Path(folder), inside)
            found += images
            waiting += [path for path in reversed(folders) if self._enter(path, label)]
        return found

    def _enter(self, path: str, label: int | None) -> bool:
        """Whether the folder is a new one."""
        key = key_of(path, self._status(path))
        first, owner = self._folders.setdefault(key, (path, label))
        if first == path:
            return True
        if owner is not None:
            self.second_names.append((os.path.join(path, ""), os.path.join(first, "")))
            if owner != label:
                self._in_two_classes(path, first)
        self.passed[SECOND_WAY] += 1
        return False

    def _images(self, paths: list[str], label: int) -> list[_Image]:
        found = []
        for path in paths:
            try:
                status = self._status(path)
            except FileNotFoundError:
                found.append(_Image(path, label))  # an image that cannot be decoded
                continue
            first, owner = self._files.setdefault(key_of(path, status), (path, label))
            if first == path:
                found.append(_Image(path, label))
                continue
            if owner != label:
                self._in_two_classes(path, first)
            self.second_names.append((path, first))
            self.passed[SECOND_NAME] += 1
        return found

    def _in_two_classes(self, path: str, first: str) -> None:
        names = os.path.relpath(first, self.root), os.path.relpath(path, self.root)
        self.conflict = self.conflict or names

    def _entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Sub-folders and image files, sorted by name; the others are counted."""
        folders, files = [], []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    reason = leftover(entry.name)
                    if reason is not None:
                        self.passed[reason] += 1
                    elif _is_folder(entry):
                        folders.append(entry.path)
                    elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS:
                        files.append(entry.path)
                    else:
                        self.passed[other_extension(entry.name)] += 1
        except PermissionError:
            self._forbidden(folder)
        return sorted(folders), sorted(files)

    def _status(self, path: str) -> os.stat_result:
        try:
            return os.stat(path)
        except PermissionError:
            self._forbidden(os.path.dirname(path))
            raise FileNotFoundError(path) from None
        except OSError as error:  # e.g. links in a circle
            raise FileNotFoundError(str(error)) from None

    def _forbidden(self, folder: str) -> None:
        """Raise PermissionError; within `forbidden_left_out` count the folder instead."""
        if _leave_out_forbidden.get():
            self.passed[FORBIDDEN] += 1
            return
        raise PermissionError(
            f"source={str(self.root)!r}: the folder {listed([folder])} may not be read, and its "
            "images would be left out; expected permission to read and enter it. Change its mode, "
            "or move it out of the source."
        ) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except PermissionError:
        raise
    except OSError:  # links in a circle
        return False


def _by_number(paths: list[str]) -> Any:
    """The order of classes: as numbers where all names are whole numbers, else by name."""
    names = [os.path.basename(path) for path in paths]
    if all(name.isascii() and name.isdigit() for name in names):
        return lambda path: (int(os.path.basename(path)), path)
    return lambda path: path


def _copies(root: Path, images: Sequence[_Image], groups: Sequence[str] | None) -> frozenset[int]:
    """Records whose bytes are those of another record of their family.

    The family of a file is its class, its group (if there are groups), and its path below the
    source without the marks of copies (`dpmmd.data.leftovers.family_of`). Of the files of a family
    with equal bytes one counts, and the others stay records, which contribute nothing.

    *Why this keeps the claim.* What is summed is the set of pairs (family, bytes). A file's family
    follows from its own path and nothing else, whatever the function of the path is; so an exchange
    or a removal of one file takes at most one pair from this set and adds at most one. All files of
    a family have one label and one group, because both are part of the family; so a pair has one
    label and one group, whichever of its files comes first. The number of records does not depend
    on any bytes.
    """
    labels = [image.label for image in images]
    owners = list(zip(labels, groups or [""] * len(images), strict=True))
    return _equal_in_families(root, [image.path for image in images], owners)


def _equal_in_families(
    root: Path, paths: Sequence[str], owners: Sequence[Any] | None
) -> frozenset[int]:
    start = len(os.path.join(root, ""))
    families: dict[Any, list[int]] = {}
    for index, path in enumerate(paths):
        family = family_of(path[start:])
        families.setdefault((family, owners and owners[index]), []).append(index)
    copies: set[int] = set()
    for members in families.values():
        if len(members) > 1:
            firsts = copies_in([Path(paths[index]) for index in members])
            copies.update(members[copy] for copy in firsts)
    return frozenset(copies)


def _refuse_splits(root: Path, path: Path, folders: Sequence[str]) -> None:
    """Raise ValueError where the sub-folders of a class, or of the source, are no classes.

    They are splits, or images beside their masks.
    """
    names = {name.lower() for name in folders}
    if names & _IMAGE_FOLDERS and names & _MASK_FOLDERS and names <= _IMAGE_FOLDERS | _MASK_FOLDERS:
        images = next(name for name in folders if name.lower() in _IMAGE_FOLDERS)
        raise ValueError(
            f"source={str(root)!r}: {str(path)!r} has the sub-folders {listed(list(folders))}, "
            "which are images beside their masks or labels and not classes: expected one "
            f"sub-folder per class; give {str(path / images)!r}, or arrange the images as "
            "<class>/... first."
        )
    if names and names <= _SPLIT_FOLDERS:
        raise ValueError(
            f"source={str(root)!r}: {str(path)!r} has the sub-folders {listed(list(folders))}, "
            "which are splits and not classes: expected one sub-folder per class, of one split; "
            f"give {str(path / folders[0])!r}, or arrange the images as <split>/<class>/... first."
        )


def _refuse_classes(path: Path, names: Sequence[str], num_classes: int) -> None:
    hint = f"give the folder of the classes, or num_classes={len(names)}."
    if len(names) == 1:
        inside = sorted(
            entry.name
            for entry in os.scandir(path / names[0])
            if entry.is_dir() and leftover(entry.name) is None
        )
        if inside:
            hint = (
                f"it holds the folders {listed(inside)}; give {str(path / names[0])!r} if they are."
            )
    raise ValueError(
        f"num_classes={num_classes}: source={str(path)!r} has {len(names)} class "
        f"folder{'s' if len(names) > 1 else ''}, {listed(list(names))}; expected one for each "
        f"class (an empty one for a class without images); {hint}"
    )


def _groups(
    path: Path, images: Sequence[_Image], group_by: str, num_classes: int | None
) -> list[str]:
    """The folder of each image that stands for its group."""
    layout = ("<group>/...", "<class>/<group>/...")[_level(num_classes)]
    if group_by != "folder":
        raise ValueError(
            f"group_by={group_by!r}: a folder of images has no such column; expected 'folder', "
            f"with the images of each group in a folder of their own ({layout})."
        )
    found = [_group(path, image.path, num_classes) for image in images]
    if None in found:
        raise ValueError(
            f"group_by='folder': source {path.name!r} has images outside of a group's folder; "
            f"expected {layout}."
        )
    return [group for group in found if group is not None]


def _level(num_classes: int | None) -> int:
    return 0 if num_classes is None else 1


def _group(root: Path, image: str, num_classes: int | None) -> str | None:
    level = _level(num_classes)
    parents = os.path.relpath(os.path.dirname(image), root).split(os.sep)
    return parents[level] if len(parents) > level and parents != [os.curdir] else None


def _refuse_two_groups(
    root: Path, names: Sequence[tuple[str, str]], num_classes: int | None
) -> None:
    """Raise ValueError where a file, or a folder, has names in two groups."""
    for pair in names:
        if len({_group(root, name, num_classes) for name in pair}) > 1:
            one, other = (os.path.relpath(name, root) for name in pair)
            raise ValueError(
                f"group_by='folder': {listed([other])} and {listed([one])} of source {root.name!r} "
                "are one file, or one folder, in two groups; expected each image in one group: "
                "remove one of them, or make the two groups one."
            )
