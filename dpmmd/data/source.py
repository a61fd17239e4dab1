"""What every private image source offers: a shape, an identity, and fixed-shape batches."""

from __future__ import annotations

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor

from dpmmd.data.classes import check_class_names
from dpmmd.data.inspection import Inspection
from dpmmd.data.labels import check_label_range
from dpmmd.data.pixels import Unusable
from dpmmd.data.remote import AnyPath


@dataclass(frozen=True)
class Batch:
    """A batch of exactly the requested number of rows.

    Attributes:
        images: float32 ``[B, C, H, W]`` in [0, 1]; all zero where not valid.
        labels: int64 ``[B]``; 0 where not valid or unlabelled.
        valid: bool ``[B]``; False for the padding of the last batch and for images that could
            not be decoded, are not finite, or leave [0, 1].
    """

    images: Tensor
    labels: Tensor
    valid: Tensor


class ImageSource(ABC):
    """A data set of private images, read in one fixed order in batches of one fixed shape.

    Subclass it to read a format of your own: set the attributes and write :meth:`batches`.

    Attributes:
        name: what messages call the data set, e.g. ``"fashion-mnist/train"`` or a file's name.
        identity: 64 hexadecimal digits that tell the data holder, in a privacy ledger and in
            partial sums, which source it was. A hash of the kind of source, its canonical path or
            name and its split; never of pixels. No privacy loss depends on it: all releases in a
            ledger compose, whatever their sources.
        num_images: the number of records N, undecodable ones included. Private under the
            add-remove adjacency.
        class_names: names of the classes 0..K-1 where the source knows them, else None.
        image_shape: ``(C, H, W)`` of every batch row, after the declared channels and resize.
        labelled: False when the source has no labels (every label is then 0).
        group_by: what the images are grouped by, e.g. ``"patient"``, where all of a group's
            images together are the unit of privacy; None where each image is one.
        groups: int64 ``[N]`` from 0 on, the group of each record; None without `group_by`.
        passed_over: how many files or members the source found and does not count as records, by
            reason, e.g. ``{"a second name of a file that is counted already": 1}``. For the eyes
            of the data holder alone.
        decoding: how files become pixels (orientation, background of transparent images), recorded
            in a release; None where nothing is decoded.

    A batch's tensors may be written again for the next one: `dpmmd.data.prefetch`, through which a
    release reads, copies them first. What :meth:`batches` yields must depend on the records and on
    nothing else: one record exchanged changes its own row, and no other (`dpmmd audit --source`
    tries that).
    """

    name: str
    identity: str
    num_images: int
    class_names: tuple[str, ...] | None = None
    image_shape: tuple[int, int, int]
    labelled: bool = True
    group_by: str | None = None
    groups: Tensor | None = None
    passed_over: Mapping[str, int] = MappingProxyType({})
    decoding: Mapping[str, str] | None = None
    # `dpmmd.data.inspect` puts it here: it knows all kinds of sources, and this module none.
    _inspector: ClassVar[Callable[..., Inspection]]

    @abstractmethod
    def batches(self, batch_size: int) -> Iterator[Batch]:
        """Yield ``ceil(N / batch_size)`` batches of exactly `batch_size` rows.

        The order and the bits are the same at every call. The last batch is padded with rows of
        zeros whose ``valid`` is False.

        Args:
            batch_size: rows of a batch, at least 1.
        """

    def part(self, batch_size: int, numbers: range) -> Iterator[Batch]:
        """Those of `batches` with these numbers, from 0 on, in steps of 1: the same bits.

        By default it reads past the others; sources that can go to a batch directly do so.
        """
        return itertools.islice(self.batches(batch_size), numbers.start, numbers.stop)

    def look(self, positions: Sequence[int]) -> Sequence[Unusable | None] | None:
        """Whether the records at these positions can be used, and why not, in order.

        A release looks at some records before it spends anything. None, the default: the source can
        only read batches, and the release looks at the first of these.
        """
        return None

    def rearranged(self, order: Sequence[int]) -> ImageSource:
        """The same records in another order, some left out or repeated: for audits and tests.

        Raises:
            NotImplementedError: the source reads in one order only.
        """
        raise NotImplementedError(f"source {self.name!r} cannot be rearranged.")

    def inspect(self, *, everything: bool = False, progress: bool = False) -> Inspection:
        """What is there, for the data holder's eyes alone (`dpmmd.data.inspect`).

        Args:
            everything: decode every record, not only look at headers.
            progress: whether to show a progress bar.
        """
        return ImageSource._inspector(self, everything=everything, progress=progress)

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if "batches" in cls.__dict__ and "part" not in cls.__dict__:
            cls.part = ImageSource.part  # type: ignore[method-assign]  # of its own `batches`

    def num_batches(self, batch_size: int) -> int:
        """How many batches `batches` yields; as private as `num_images`."""
        return -(-self.num_images // check_batch_size(batch_size))

    def check_labels(self, num_classes: int) -> None:
        """Raise ValueError when a label lies outside 0..num_classes-1.

        Sources that hold their labels check them here, before any image is touched. Like every
        check of the input, a refusal is for the data holder and not covered by the privacy
        guarantee.
        """
        check_num_classes(num_classes)
        check_class_names(self.class_names if self.labelled else None, num_classes, self.name)

    def arrays(self, batch_size: int = 256) -> tuple[Tensor, Tensor]:
        """Everything decodable, in memory: for evaluation on real data only.

        The result is not private in any sense: its length tells how many images could be
        decoded.

        Returns:
            uint8 images ``[n, C, H, W]`` and int64 labels ``[n]``, n <= N.
        """
        images, labels = [], []
        for batch in self.batches(batch_size):
            kept = batch.images[batch.valid]
            images.append(kept.mul(255).round_().to(torch.uint8))
            labels.append(batch.labels[batch.valid])
        return torch.cat(images), torch.cat(labels)


def source_identity(kind: str, canonical: str, split: str = "") -> str:
    """The identity of a source: sha256 of its kind, canonical path or name, and split."""
    text = "\0".join(("dpmmd image source", kind, canonical, split))
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def file_identity(kind: str, path: AnyPath, split: str = "") -> str:
    """Identity of a file or folder: its absolute path with links resolved, or its URL."""
    return source_identity(kind, str(path.resolve()), split)


def check_batch_size(batch_size: int) -> int:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(
            f"batch_size={batch_size!r}: expected a whole number of rows, at least 1; try 100."
        )
    return batch_size


def check_num_classes(num_classes: int) -> int:
    if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(
            f"num_classes={num_classes!r}: expected a whole number, at least 1; "
            "leave it out to accept the labels as they are."
        )
    return num_classes


def check_not_empty(num_images: int, name: str) -> int:
    if num_images < 1:
        raise ValueError(
            f"source {name!r} holds no images: expected at least one; check the path, the split "
            "and, for a folder, that its files end in a known image extension."
        )
    return num_images


def check_source_labels(
    labels: Tensor | None,
    num_classes: int | None,
    name: str,
    class_names: Sequence[str] | None = None,
) -> None:
    """The label checks that need no image: presence, names and range."""
    if num_classes is not None:
        check_num_classes(num_classes)
        if labels is None and num_classes > 1:
            raise ValueError(
                f"num_classes={num_classes}: source {name!r} has no labels; expected one label "
                "per image. Give num_classes=1 or leave it out, or name the labels with "
                "label_key."
            )
    if labels is not None:
        check_class_names(class_names, num_classes, name)
        check_label_range(labels, num_classes, name)
