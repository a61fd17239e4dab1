"""Sources read record by record, in this process or in worker processes, to the same bits."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dpmmd.data.labels import as_groups
from dpmmd.data.pixels import (
    Encoded,
    Unusable,
    common_shape,
    decode,
    header_shape,
    is_interrupt,
    reason_of,
)
from dpmmd.data.request import Request
from dpmmd.data.silence import quiet
from dpmmd.data.source import (
    Batch,
    ImageSource,
    check_batch_size,
    check_not_empty,
    check_source_labels,
)

if TYPE_CHECKING:
    from typing_extensions import Self

_HEADER_CHUNK = 1024
_T = TypeVar("_T")


class Refused(Unusable):
    """A record that shows a mistake in the data set, not in the record.

    Whoever looks at the source before anything is spent gets ``error``; a release that has begun
    gets a record that contributes nothing, for no record may end it.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error

    def __reduce__(self) -> Any:
        return Refused, (self.error,)


class ItemSource(ImageSource):
    """Base of the sources that decode one record at a time.

    A subclass gives :meth:`read`: for some indices, pixels (or why there are none) and labels.
    """

    def __init__(
        self,
        *,
        name: str,
        identity: str,
        num_images: int,
        labels: Tensor | None,
        class_names: tuple[str, ...] | None,
        request: Request,
        groups: Any = None,
    ) -> None:
        self.name = name
        self.identity = identity
        self.num_images = num_images
        self.class_names = class_names
        self._labels = labels
        self.labelled = labels is not None
        self._geometry = request.geometry
        self.decoding = request.geometry.decoding
        self._workers = request.workers
        self._order: Tensor | None = None  # of the records; None: as they are numbered
        self._raises = False  # where the data set, not a record, has a mistake
        if groups is not None and request.group_by is not None:
            self.group_by = request.group_by
            self.groups = as_groups(groups, num_images, request.group_by, name)
        check_source_labels(labels, request.num_classes, name, class_names)

    def _settle_shape(self) -> None:
        """Fix the image shape: from the declaration alone, or from every record's header."""
        if self._geometry.declared:
            self.image_shape = self._geometry.output_shape(0, 0, 0)
        else:
            check_not_empty(self.num_images, self.name)
            self.image_shape = self._strictly(
                lambda strict: common_shape(strict._shapes(), self._geometry, self.name)
            )

    @abstractmethod
    def _shapes(self) -> Iterator[tuple[int, int, int] | Unusable]:
        """``(C, h, w)`` of every record before resizing, or why it cannot be read."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> Iterator[tuple[Tensor | Unusable, int]]:
        """Pixels float32 ``[C, H, W]`` in [0, 1] (Unusable: why not) and label of each index.

        Nothing that a record holds may raise here.
        """

    def rearranged(self, order: Sequence[int]) -> Self:
        other = copy.copy(self)
        index = torch.as_tensor(order, dtype=torch.int64)
        other._order = index if self._order is None else self._order[index]
        other.num_images = len(index)
        if self.groups is not None:
            other.groups = self.groups[index]
        return other

    def records(self, positions: Iterable[int]) -> list[int]:
        """The numbers, for `read`, of the records at these positions of the batches."""
        return [p if self._order is None else int(self._order[p]) for p in positions]

    def look(self, positions: Sequence[int]) -> list[Unusable | None]:
        """Whether the records at these positions can be used, and why not.

        For the data holder's eyes: a data set's own mistakes raise here, where `batches` is silent.
        """
        return self._strictly(
            lambda strict: [
                pixels if isinstance(pixels, Unusable) else None
                for pixels, _ in strict._rows(self.records(positions))
            ]
        )

    def reading(self) -> AbstractContextManager[None]:
        """What a batch is read in. Every reading of the source is one of a copy."""
        return quiet()

    def _strict(self) -> Self:
        """A copy that raises where the data set has a mistake."""
        other = copy.copy(self)
        other._raises = True
        return other

    def _strictly(self, work: Callable[[Self], _T]) -> _T:
        """Reads with a copy of this source; a mistake of the data set raises."""
        strict = self._strict()
        try:
            with strict.reading():
                return work(strict)
        except Refused as refused:
            error = refused.error
        raise error  # out here, so that no exception of a record is attached

    def _rows(self, indices: Sequence[int]) -> Iterator[tuple[Tensor | Unusable, int]]:
        """Pixels of the declared shape (or why not) and label of each record."""
        for pixels, label in self.read(indices):
            if self._raises and isinstance(pixels, Refused):
                raise pixels
            if isinstance(pixels, Tensor) and tuple(pixels.shape) != self.image_shape:
                yield Unusable("another size or number of channels than was declared"), 0
            else:
                yield pixels, label

    def check_labels(self, num_classes: int) -> None:
        check_source_labels(self._labels, num_classes, self.name, self.class_names)

    def read_batch(self, start: int, batch_size: int) -> tuple[Tensor, Tensor, Tensor]:
        images = torch.zeros(batch_size, *self.image_shape)  # [B, C, H, W]
        labels = torch.zeros(batch_size, dtype=torch.int64)
        valid = torch.zeros(batch_size, dtype=torch.bool)
        indices = self.records(range(start, min(start + batch_size, self.num_images)))
        with self.reading():
            for row, (pixels, label) in enumerate(self._rows(indices)):
                if isinstance(pixels, Tensor):
                    images[row], labels[row], valid[row] = pixels, label, True
        return images, labels, valid

    def batches(self, batch_size: int) -> Iterator[Batch]:
        return self._part(batch_size, range(self.num_batches(batch_size)))

    def arrays(self, batch_size: int = 256) -> tuple[Tensor, Tensor]:
        return super(ItemSource, self._strict()).arrays(batch_size)

    def part(self, batch_size: int, numbers: range) -> Iterator[Batch]:
        check_batch_size(batch_size)
        return self._part(batch_size, numbers)

    def _part(self, batch_size: int, numbers: range) -> Iterator[Batch]:
        # A copy: of two iterations, each has its own place in a file.
        reader = _BatchReader(copy.copy(self), batch_size, numbers)
        if self._workers == 0:
            for index in range(len(reader)):
                yield _unpack(reader[index])
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
                yield _unpack(result)
        finally:
            iterator = None  # stops the workers now, not when a traceback is let go


class _BatchReader(Dataset[Any]):
    """Position -> a batch's tensors, or what was refused, as a value: exceptions carry a traceback.

    (A traceback holds the frames of the reading, and with them private records.)
    """

    def __init__(self, source: ItemSource, batch_size: int, numbers: range) -> None:
        self.source, self.batch_size, self.numbers = source, batch_size, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor] | Refused:
        try:
            return self.source.read_batch(self.numbers[index] * self.batch_size, self.batch_size)
        except Refused as refused:
            return refused


def _unpack(result: tuple[Tensor, Tensor, Tensor] | Refused) -> Batch:
    if isinstance(result, Refused):
        raise result.error
    return Batch(*result)


def _as_it_is(value: Any) -> Any:
    return value


class EncodedSource(ItemSource):
    """Base of the sources of encoded images (files, parquet cells, database values)."""

    @abstractmethod
    def encoded(self, indices: Sequence[int]) -> Iterator[Encoded]:
        """The bytes or file of each index; None or Unusable where there is nothing to decode."""

    def _shapes(self) -> Iterator[tuple[int, int, int] | Unusable]:
        for start in range(0, self.num_images, _HEADER_CHUNK):
            chunk = range(start, min(start + _HEADER_CHUNK, self.num_images))
            for encoded in self.encoded(chunk):
                yield header_shape(encoded, self._geometry)

    def read(self, indices: Sequence[int]) -> Iterator[tuple[Tensor | Unusable, int]]:
        for index, encoded in zip(indices, self.encoded(indices), strict=True):
            label = 0 if self._labels is None else int(self._labels[index])
            pixels: Tensor | Unusable
            try:
                pixels = decode(encoded, self._geometry)
            except BaseException as error:
                if is_interrupt(error):
                    raise
                pixels = Unusable(reason_of(error))
            yield pixels, label


class FileSource(EncodedSource):
    """Images that are files, in the order given."""

    def __init__(self, paths: Sequence[str], **common: Any) -> None:
        super().__init__(num_images=len(paths), **common)
        self._paths = tuple(paths)
        self._settle_shape()

    def encoded(self, indices: Sequence[int]) -> Iterator[Encoded]:
        return (Path(self._paths[index]) for index in indices)
