"""A torch Dataset of (image, label) as a source."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset, TensorDataset

from dpmmd.data.arrays import requested
from dpmmd.data.classes import written_names
from dpmmd.data.draws import Draws, callers_streams
from dpmmd.data.items import ItemSource, Refused
from dpmmd.data.labels import as_labels, check_label_range, groups_at, one_label
from dpmmd.data.once import refuse_repeated_items
from dpmmd.data.pixels import Unusable, from_item, is_interrupt
from dpmmd.data.request import Request
from dpmmd.data.silence import quiet
from dpmmd.data.source import ImageSource, source_identity

# torchvision data sets that hold everything in .data: class name -> (source name, labels).
_IN_MEMORY = {
    "MNIST": ("mnist", "targets"),
    "FashionMNIST": ("fashion-mnist", "targets"),
    "CIFAR10": ("cifar10", "targets"),
    "SVHN": ("svhn", "labels"),
}


def open_dataset(dataset: Any, request: Request) -> ImageSource:
    """A map-style Dataset as a source; in-memory ones take the array path."""
    if isinstance(dataset, IterableDataset) or not all(
        hasattr(dataset, method) for method in ("__getitem__", "__len__")
    ):
        raise TypeError(
            f"source is a {type(dataset).__name__}: expected a map-style Dataset, with __len__ "
            "and __getitem__, of (image, label); collect a stream into a Dataset first."
        )
    name, identity = _describe(dataset)
    refuse_repeated_items(dataset, name)
    group_by = request.group_by
    groups = None if group_by is None else _attribute(dataset, group_by, name)
    known = _IN_MEMORY.get(type(dataset).__name__) if _is_torchvision(dataset) else None
    if known is not None and _is_plain(dataset):
        return requested(
            dataset.data,
            getattr(dataset, known[1]),
            request,
            name=name,
            identity=identity,
            class_names=_class_names(dataset),
            groups=groups,
        )
    if type(dataset) is TensorDataset and len(dataset.tensors) in (1, 2):  # not its subclasses
        images, labels = (*dataset.tensors, None)[:2]
        return requested(images, labels, request, name=name, identity=identity, groups=groups)
    return DatasetSource(dataset, request, name=name, identity=identity, groups=groups)


class DatasetSource(ItemSource):
    """Any map-style Dataset of ``(image, label)`` or of mappings with an image and a label.

    Images are PIL images, encoded bytes, or uint8, uint16, bool or float-in-[0, 1] arrays and
    tensors in HW, CHW or HWC. An item that raises, whatever it raises, or an image that is none of
    these is an invalid row. Labels are checked at opening where the data set keeps them in
    ``targets``, else in the records that `look` reads; later, a record whose label is none
    contributes nothing.

    Each record draws from random streams of its own (`dpmmd.data.draws`).
    """

    def __init__(
        self, dataset: Any, request: Request, *, name: str, identity: str, groups: Any = None
    ) -> None:
        self._dataset = dataset
        self._image_key = request.image_key or "image"
        self._label_key = request.label_key or "label"
        self._num_classes = request.num_classes
        self._key: bytes | None = None  # of the records' draws; None: another one at each reading
        self._draws: Draws | None = None
        super().__init__(
            name=name,
            identity=identity,
            num_images=len(dataset),
            labels=_targets(dataset, name),
            class_names=_class_names(dataset),
            request=replace(request, num_classes=None),
            groups=groups,
        )
        self.labelled = True
        if request.num_classes is not None:
            self.check_labels(request.num_classes)
        self._settle_shape()

    def check_labels(self, num_classes: int) -> None:
        ImageSource.check_labels(self, num_classes)
        if self._labels is not None:
            check_label_range(self._labels, num_classes, self.name)
        self._num_classes = num_classes

    def __copy__(self) -> DatasetSource:
        other = DatasetSource.__new__(type(self))
        other.__dict__.update(self.__dict__)
        other._draws = None
        return other

    @contextmanager
    def reading(self) -> Iterator[None]:
        with quiet(), callers_streams():
            if self._draws is None:
                self._draws = Draws(self._dataset, self._key)
            else:
                self._draws.search()
            yield

    def check_isolated(self, positions: Sequence[int]) -> None:
        """Read some records twice, in two orders, with the same keys: they must be the same.

        For the data holder's eyes, before anything is spent.

        Raises:
            ValueError: what an item is depends on what was read before it, or on entropy that it
                takes by itself.
        """
        records = self.records(positions)
        other = copy.copy(self)
        other._key = os.urandom(32)
        with other.reading():
            first = list(other.read(records))
            second = list(other.read(records[::-1]))[::-1]
        if not all(map(_same, first, second)):
            raise ValueError(
                f"source {self.name!r}: an item is not the same when it is read a second time, "
                "after other items: the data set keeps something between records (a counter, a "
                "random generator that is not among its attributes), or takes entropy from the "
                "system. Then one record more or less would change others, and no epsilon would "
                "hold. Draw from torch's, numpy's or random's global streams, which are given a "
                "key for each record, and keep nothing between items."
            )

    def _begun(self) -> Draws:
        if self._draws is None:
            raise RuntimeError("read: to be called within `reading`.")
        return self._draws

    def _shapes(self) -> Iterator[tuple[int, int, int] | Unusable]:
        for pixels, _ in self.read(range(self.num_images)):
            if isinstance(pixels, Refused):
                raise pixels
            yield pixels if isinstance(pixels, Unusable) else tuple(pixels.shape)  # type: ignore[misc]

    def read(self, indices: Sequence[int]) -> Iterator[tuple[Tensor | Unusable, int]]:
        draws = self._begun()
        for index in indices:
            draws.rekey(index)
            record = self._record(index)
            if draws.found_others():
                draws.rekey(index)
                record = self._record(index)
            yield record

    def _record(self, index: int) -> tuple[Tensor | Unusable, int]:
        try:
            image, label = self._split(self._dataset[index])
            return from_item(image, self._geometry), self._label(label)
        except Refused as refused:
            return refused, 0
        except Unusable as unusable:
            return Unusable(unusable.reason), 0
        except BaseException as error:  # of any kind: a record may make any code raise anything
            if is_interrupt(error):
                raise
            return Unusable(f"the data set or Pillow raised {type(error).__name__}"), 0

    def _split(self, item: Any) -> tuple[Any, Any]:
        if isinstance(item, Mapping):
            if self._image_key in item and self._label_key in item:
                return item[self._image_key], item[self._label_key]
            raise Refused(
                TypeError(
                    f"source {self.name!r} has items without the keys {self._image_key!r} and "
                    f"{self._label_key!r}: expected an image and a label; name them with "
                    "image_key and label_key."
                )
            )
        if isinstance(item, tuple | list) and len(item) == 2:
            return item[0], item[1]
        raise Refused(
            TypeError(
                f"source {self.name!r} has items of type {type(item).__name__}: expected pairs "
                "(image, label); wrap the data set so that it returns them (label 0 when there "
                "are no labels)."
            )
        )

    def _label(self, label: Any) -> int:
        try:
            value = one_label(label, self.name)
            check_label_range(torch.tensor([value]), self._num_classes, self.name)
        except (TypeError, ValueError) as error:
            raise Refused(type(error)(str(error))) from None
        return value


def _same(one: tuple[Tensor | Unusable, int], other: tuple[Tensor | Unusable, int]) -> bool:
    if isinstance(one[0], Unusable) or isinstance(other[0], Unusable):
        return isinstance(one[0], Unusable) and isinstance(other[0], Unusable)
    return one[1] == other[1] and torch.equal(one[0], other[0])


def _is_torchvision(dataset: Any) -> bool:
    return type(dataset).__module__.startswith("torchvision.datasets.")


def _is_plain(dataset: Any) -> bool:
    """No transform, or only the one that makes a float tensor, as this package does anyway."""
    transform = getattr(dataset, "transform", None)
    to_tensor = (
        type(transform).__name__ == "ToTensor"
        and type(transform).__module__ == "torchvision.transforms.transforms"
    )
    return (transform is None or to_tensor) and getattr(dataset, "target_transform", None) is None


def _describe(dataset: Any) -> tuple[str, str]:
    """Name and identity; a Subset has those of the whole."""
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    kind = type(dataset)
    split = getattr(dataset, "split", None)
    if not isinstance(split, str):
        train = getattr(dataset, "train", None)
        split = {True: "train", False: "test"}.get(train, "") if isinstance(train, bool) else ""
    if _is_torchvision(dataset):
        known = _IN_MEMORY.get(kind.__name__, ("",))[0]
        known = known or {"CelebA": "celeba"}.get(kind.__name__, "")
        if known:
            return f"{known}/{split}", source_identity("named", known, split)
    root = getattr(dataset, "root", "")
    canonical = f"{kind.__module__}.{kind.__qualname__}:{root}"
    name = kind.__name__ + (f"/{split}" if split else "")
    return name, source_identity("dataset", canonical, split)


def _targets(dataset: Any, name: str) -> Tensor | None:
    """The labels a data set keeps beside its images, where they are what its items will say."""
    if isinstance(dataset, Subset):
        whole = _targets(dataset.dataset, name)
        return None if whole is None else whole[torch.as_tensor(list(dataset.indices))]
    if not hasattr(dataset, "targets") or getattr(dataset, "target_transform", None) is not None:
        return None
    return as_labels(dataset.targets, len(dataset), name)


def _attribute(dataset: Any, group_by: str, name: str) -> Any:
    """The values that a data set keeps beside its images under the name `group_by`."""
    if isinstance(dataset, Subset):
        whole = _attribute(dataset.dataset, group_by, name)
        return groups_at(whole, dataset.indices, group_by, name)
    if not hasattr(dataset, group_by):
        raise ValueError(
            f"group_by={group_by!r}: source {name!r} has no attribute of that name; give the data "
            "set one, a sequence with the group of each image."
        )
    return getattr(dataset, group_by)


def _class_names(dataset: Any) -> tuple[str, ...] | None:
    while isinstance(dataset, Subset):
        dataset = dataset.dataset
    classes = getattr(dataset, "classes", None)
    if isinstance(classes, list | tuple) and all(isinstance(name, str) for name in classes):
        if _is_torchvision(dataset) and type(dataset).__name__ == "MNIST":
            return tuple(name.partition(" - ")[0] for name in classes)  # "0 - zero": as by name
        return written_names(classes)
    return None
