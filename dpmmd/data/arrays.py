"""Images that are one array in memory: the fast path, without a Python loop over images."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dpmmd.data.labels import as_groups, as_labels
from dpmmd.data.pixels import OUTSIDE, SCALES, Geometry, Unusable, to_float
from dpmmd.data.request import Request
from dpmmd.data.rows import StreamedRows
from dpmmd.data.source import (
    Batch,
    ImageSource,
    check_batch_size,
    check_source_labels,
    source_identity,
)


class ArraySource(ImageSource):
    """Images and labels in memory.

    Float images that are not finite or leave [0, 1] are invalid. Note that float images on a
    0..255 scale are invalid one and all: divide them by 255, or pass uint8.

    Args:
        images: uint8, uint16 (0..65535), bool, or float in [0, 1]; ``[N, H, W]``,
            ``[N, H, W, C]`` or ``[N, C, H, W]``, C 1 or 3; an array or a tensor.
        labels: integers ``[N]``, or None.
        name: what messages call the data.
        identity: `ImageSource.identity`; by default derived from `name`.
        class_names: names of the classes, or None.
        num_classes: K to check the labels against, or None.
        geometry: declared size and channels.
        groups: numbers or names ``[N]`` that say which images belong together, or None.
        group_by: what they are, e.g. ``"patient"``.

    Raises:
        TypeError: images or labels of another type.
        ValueError: wrong rank, labels or groups that do not match.
    """

    def __init__(
        self,
        images: Any,
        labels: Any = None,
        *,
        name: str = "arrays",
        identity: str | None = None,
        class_names: tuple[str, ...] | None = None,
        num_classes: int | None = None,
        geometry: Geometry | None = None,
        groups: Any = None,
        group_by: str | None = None,
    ) -> None:
        self.name = name
        self.identity = identity or source_identity("arrays", name)
        self.class_names = class_names
        self._source = images if isinstance(images, StreamedRows) else None
        held = images if self._source is None else self._source[:0]
        _refuse_shared_rows(held, name)
        self._images = _channels_first(held, name)  # [N, C, h, w], a view where possible
        self.num_images = len(images) if self._source is not None else self._images.shape[0]
        self._labels = None if labels is None else as_labels(labels, self.num_images, name)
        self.labelled = self._labels is not None
        if groups is not None and group_by is not None:
            self.group_by = group_by
            self.groups = as_groups(groups, self.num_images, group_by, name)
        check_source_labels(self._labels, num_classes, name, class_names)
        self._geometry = geometry or Geometry()
        channels, height, width = self._images.shape[1:]
        self.image_shape = self._geometry.output_shape(channels, height, width)
        # The array's shape is public, so a shape that cannot be resized may be refused here.
        self._geometry.apply(torch.zeros(1, channels, height, width))

    def check_labels(self, num_classes: int) -> None:
        check_source_labels(self._labels, num_classes, self.name, self.class_names)

    def rearranged(self, order: Sequence[int]) -> ArraySource:
        other = copy.copy(self)
        index = torch.as_tensor(order, dtype=torch.int64)
        if self._source is not None:
            rows = [_channels_first(self._source[i : i + 1], self.name) for i in index.tolist()]
            other._images, other._source = torch.cat([self._images, *rows]), None
        else:
            other._images = self._images[index]
        other.num_images = len(index)
        other._labels = None if self._labels is None else self._labels[index]
        other.groups = None if self.groups is None else self.groups[index]
        return other

    def look(self, positions: Sequence[int]) -> list[Unusable | None]:
        """Whether the records at these positions can be used, and why not."""
        found = self.rearranged(positions)
        batch = next(found._part(max(1, found.num_images), range(1)), None)
        valid = [] if batch is None else batch.valid[: found.num_images].tolist()
        return [None if ok else Unusable(OUTSIDE) for ok in valid]

    def batches(self, batch_size: int) -> Iterator[Batch]:
        return self._part(batch_size, range(self.num_batches(batch_size)))

    def part(self, batch_size: int, numbers: range) -> Iterator[Batch]:
        check_batch_size(batch_size)
        return self._part(batch_size, numbers)

    def _part(self, batch_size: int, numbers: range) -> Iterator[Batch]:
        source = copy.copy(self._source)  # with a file of its own
        for start in (number * batch_size for number in numbers):
            rows = slice(start, start + batch_size)
            raw = self._images[rows] if source is None else _channels_first(source[rows], self.name)
            n, missing = raw.shape[0], batch_size - raw.shape[0]
            pixels = to_float(raw)
            valid = torch.ones(n, dtype=torch.bool)
            if raw.is_floating_point():
                valid = ((pixels >= 0) & (pixels <= 1)).flatten(1).all(1)
                pixels = pixels.masked_fill(~valid[:, None, None, None], 0)
            labels = torch.zeros(n, dtype=torch.int64)
            if self._labels is not None:
                labels = self._labels[rows] * valid
            if missing:
                pixels = F.pad(pixels, (0, 0, 0, 0, 0, 0, 0, missing))
                valid, labels = F.pad(valid, (0, missing)), F.pad(labels, (0, missing))
            # to_float or masked_fill has copied: a caller may write into the batch.
            yield Batch(self._geometry.apply(pixels).contiguous(), labels, valid)

    def arrays(self, batch_size: int = 256) -> tuple[Tensor, Tensor]:
        unchanged = self.image_shape == tuple(self._images.shape[1:])
        if self._images.dtype == torch.uint8 and unchanged and self._source is None:
            labels = self._labels
            if labels is None:
                labels = torch.zeros(self.num_images, dtype=torch.int64)
            return self._images.clone(memory_format=torch.contiguous_format), labels.clone()
        return super().arrays(batch_size)


def requested(images: Any, labels: Any, request: Request, **described: Any) -> ArraySource:
    """Arrays as the source that was asked for; `described` are further arguments of the class."""
    return ArraySource(
        images,
        labels,
        num_classes=request.num_classes,
        geometry=request.geometry,
        group_by=request.group_by,
        **described,
    )


def _refuse_shared_rows(images: Any, name: str) -> None:
    """Raise ValueError where two images of an array lie in the same memory.

    One image would be several records, as in ``np.broadcast_to(image, (50, ...))``.
    """
    if not isinstance(images, Tensor | np.ndarray) or images.ndim < 2 or len(images) < 2:
        return
    if isinstance(images, Tensor):
        strides, size = list(images.stride()), 1
    else:
        strides, size = [abs(stride) for stride in images.strides], images.dtype.itemsize
    # Within an image numbers may share memory, as a grey one's that is expanded to three channels.
    axes = [(strides[0], len(images))]
    axes += [(s, n) for s, n in zip(strides[1:], images.shape[1:], strict=True) if n > 1 and s]
    reach = size
    for stride, length in sorted(axes):
        if stride < reach:
            raise ValueError(
                f"images of source {name!r} share memory, so that one image is several records; "
                "expected each image once. If they are images of their own, give a copy: "
                "np.ascontiguousarray(images) or images.contiguous()."
            )
        reach += stride * (length - 1)


def _channels_first(images: Any, name: str) -> Tensor:
    """Any accepted array as a tensor ``[N, C, H, W]``."""
    if isinstance(images, Tensor):
        tensor = images.detach().cpu()
    else:
        array = np.asarray(images)
        if array.dtype not in (np.uint8, np.uint16, np.bool_) and array.dtype.kind != "f":
            raise _image_type_error(name, str(array.dtype))
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        if array.dtype.kind == "f" and array.dtype.itemsize > 8:
            array = array.astype(np.float64)
        if not array.flags.writeable or any(stride < 0 for stride in array.strides):
            array = array.copy()  # torch refuses or warns about both
        tensor = torch.from_numpy(array)
    if tensor.dtype not in SCALES and not tensor.is_floating_point():
        raise _image_type_error(name, str(tensor.dtype))
    if tensor.ndim == 3:
        tensor = tensor[:, None]
    elif tensor.ndim == 4 and tensor.shape[1] not in (1, 3) and tensor.shape[3] in (1, 3):
        tensor = tensor.permute(0, 3, 1, 2)
    if tensor.ndim != 4 or tensor.shape[1] not in (1, 3) or min(tensor.shape[2:]) < 1:
        shape = tuple(images.shape) if hasattr(images, "shape") else tuple(tensor.shape)
        raise ValueError(
            f"images of source {name!r} have shape {shape}: expected [N, H, W], [N, H, W, C] or "
            "[N, C, H, W] with C = 1 or 3; reshape the array, or drop an alpha channel."
        )
    return tensor


def _image_type_error(name: str, found: str) -> TypeError:
    found = found.replace("torch.", "")
    advice = "convert them by what their values mean, e.g. (images / largest).astype('float32')"
    if "int" in found:
        advice = (
            "look at images.min() and images.max(): 0..255 becomes images.astype('uint8'), "
            "0..65535 becomes images.astype('uint16'), another range from 0 on becomes (images / "
            "largest).astype('float32') with the largest value that the camera or scanner can "
            "give. astype alone takes the remainder of what does not fit"
        )
    return TypeError(
        f"images of source {name!r} are of type {found}: expected uint8 (0..255), uint16 "
        f"(0..65535), bool, or float (in [0, 1]); {advice}."
    )
