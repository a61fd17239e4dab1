"""Sources read record by record, in this process or in worker processes, to the same bits."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpmmd.data.labels import as_groups
from dpmmd.data.pixels import Encoded, Geometry, common_shape, decode, header_shape, quiet
from dpmmd.data.source import (
    Batch,
    ImageSource,
    check_batch_size,
    check_not_empty,
    check_source_labels,
)

_HEADER_CHUNK = 1024


def check_workers(workers: int) -> int:
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(
            f"workers={workers!r}: expected a whole number of processes, at least 0; try 0 "
            "(decode in this process)."
        )
    return workers


class Refusal(Exception):
    """A schema error met while reading; its message names no record. Carried across processes."""

    def __init__(self, kind: type[Exception], message: str) -> None:
        super().__init__(kind, message)
        self.kind, self.message = kind, message


class ItemSource(ImageSource):
    """Base of the sources that decode one record at a time.

    A subclass gives :meth:`read`: for some indices, pixels (or None where a record cannot be
    decoded) and labels.
    """

    def __init__(
        self,
        *,
        name: str,
        identity: str,
        num_images: int,
        labels: Tensor | None,
        class_names: tuple[str, ...] | None,
        num_classes: int | None,
        geometry: Geometry,
        workers: int,
        groups: Any = None,
        group_by: str | None = None,
    ) -> None:
        self.name = name
        self.identity = identity
        self.num_images = num_images
        self.class_names = class_names
        self._labels = labels
        self.labelled = labels is not None
        self._geometry = geometry
        self._workers = check_workers(workers)
        if groups is not None and group_by is not None:
            self.group_by = group_by
            self.groups = as_groups(groups, num_images, group_by, name)
        check_source_labels(labels, num_classes, name)

    def _settle_shape(self) -> None:
        """Fix the image shape: from the declaration alone, or from every record's header."""
        if self._geometry.declared:
            self.image_shape = self._geometry.output_shape(0, 0, 0)
        else:
            check_not_empty(self.num_images, self.name)
            with quiet():
                self.image_shape = common_shape(self._shapes(), self._geometry, self.name)

    @abstractmethod
    def _shapes(self) -> Iterator[tuple[int, int, int] | None]:
        """``(C, h, w)`` of every record before resizing, None where it cannot be read."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[tuple[Tensor | None, int]]:
        """Pixels float32 ``[C, h, w]`` in [0, 1] (None: invalid) and label of each index."""

    def check_labels(self, num_classes: int) -> None:
        check_source_labels(self._labels, num_classes, self.name)

    def read_batch(self, start: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        images = torch.zeros(batch_size, *self.image_shape)  # [B, C, H, W]
        labels = torch.zeros(batch_size, dtype=torch.int64)
        valid = torch.zeros(batch_size, dtype=torch.bool)
        indices = range(start, min(start + batch_size, self.num_images))
        with quiet():
            for row, (pixels, label) in enumerate(self.read(indices)):
                if pixels is None:
                    continue
                try:
                    fitted = self._geometry.apply(pixels[None])[0]
                except Exception:
                    continue
                if tuple(fitted.shape) != self.image_shape:
                    continue
                images[row], labels[row], valid[row] = fitted, label, True
        return images, labels, valid

    def batches(self, batch_size: int) -> Iterator[Batch]:
        return self._part(batch_size, range(self.num_batches(batch_size)))

    def part(self, batch_size: int, numbers: range) -> Iterator[Batch]:
        check_batch_size(batch_size)
        return self._part(batch_size, numbers)

    def _part(self, batch_size: int, numbers: range) -> Iterator[Batch]:
        # A copy: of two iterations, each has its own place in a file.
        reader = _BatchReader(copy.copy(self), batch_size, numbers)
        if self._workers == 0:
            for index in range(len(reader)):
                yield _unpack(reader[index], self.name)
            return
        loader = DataLoader(
            reader,
            batch_size=None,
            shuffle=False,
            num_workers=self._workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # leaves the caller's random state alone
        )
        iterator = None
        try:
            for _ in range(len(reader)):
                result: Any = None
                try:
                    if iterator is None:
                        iterator = iter(loader)
                    result = next(iterator)
                except Exception:
                    result = None
                if result is None:  # raised here, so that no inner exception is attached
                    raise RuntimeError(
                        f"workers={self._workers}: a worker process reading source {self.name!r} "
                        "died: expected all of them to finish. Often memory or shared memory ran "
                        "out, or the data set cannot be pickled; try workers=0 or smaller batches."
                    )
                yield _unpack(result, self.name)
        finally:
            iterator = None  # stops the workers now, not when a traceback is let go


class _BatchReader(Dataset[Any]):
    """Position -> a batch's tensors, or a Refusal as a value: exceptions carry a traceback."""

    def __init__(self, source: ItemSource, batch_size: int, numbers: range) -> None:
        self.source, self.batch_size, self.numbers = source, batch_size, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor] | Refusal:
        try:
            return self.source.read_batch(self.numbers[index] * self.batch_size, self.batch_size)
        except Refusal as refusal:
            return refusal


def _unpack(result: tuple[Tensor, Tensor, Tensor] | Refusal, name: str) -> Batch:
    if isinstance(result, Refusal):
        raise result.kind(result.message)
    return Batch(*result)


def _as_it_is(value: Any) -> Any:
    return value


class EncodedSource(ItemSource):
    """Base of the sources of encoded images (files, parquet cells, database values)."""

    @abstractmethod
    def encoded(self, indices: Sequence[int]) -> Iterator[Encoded]:
        """The bytes or file of each index; None where there is nothing to decode."""

    def _shapes(self) -> Iterator[tuple[int, int, int] | None]:
        for start in range(0, self.num_images, _HEADER_CHUNK):
            chunk = range(start, min(start + _HEADER_CHUNK, self.num_images))
            yield from map(header_shape, self.encoded(chunk))

    def read(self, indices: Sequence[int]) -> Iterator[tuple[Tensor | None, int]]:
        for index, encoded in zip(indices, self.encoded(indices), strict=True):
            label = 0 if self._labels is None else int(self._labels[index])
            try:
                pixels = decode(encoded)
            except Exception:
                pixels = None
            yield pixels, label


class FileSource(EncodedSource):
    """Images that are files, in the order given."""

    def __init__(self, paths: Sequence[str], **common: Any) -> None:
        super().__init__(num_images=len(paths), **common)
        self._paths = tuple(paths)
        self._settle_shape()

    def encoded(self, indices: Sequence[int]) -> Iterator[Encoded]:
        return (Path(self._paths[index]) for index in indices)
