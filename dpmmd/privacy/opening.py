"""The source of private images: opened, with what may be said of it kept apart from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpmmd.data import ImageSource, open_source
from dpmmd.privacy.metadata import unit_of


@dataclass(frozen=True)
class Public:
    """What a release may say of its source.

    Nothing here depends on a pixel or a label, nor, under add-remove adjacency, on N.

    Attributes:
        num_units: N, of images or groups; None where it is private.
    """

    name: str
    unit: str
    num_units: int | None
    image_shape: tuple[int, int, int]
    class_names: tuple[str, ...] | None
    decoding: Mapping[str, str] | None


@dataclass(frozen=True, eq=False)
class Opened:
    """A source of private images.

    Attributes:
        images: the source. Before the spend `look.check_source` alone asks it for an image.
        sizes: int64 [N], how many images the group of each has; None where every image is a unit.
        public: what may be said of it.
    """

    images: ImageSource
    sizes: Tensor | None
    public: Public


def open_images(
    source: Any, *, num_classes: int | None, public_n: bool, options: Mapping[str, Any]
) -> Opened:
    """Opens a source, and decodes none of its images.

    What identifies neighbouring data sets stays in `Opened`: the images, and the sizes of groups.
    Where N is private, `Public` leaves it out, and an empty data set is opened like any other. So
    nothing that is computed from `Public` can tell neighbours apart.

    Raises:
        ValueError, TypeError: `dpmmd.data.open_source` says why.
    """
    images = open_source(source, num_classes=num_classes, allow_empty=not public_n, **options)
    sizes = group_sizes(images)
    num_units = images.num_images if images.groups is None else len(images.groups.unique())
    named = num_classes is not None and images.class_names
    public = Public(
        name=images.name,
        unit=unit_of(images.group_by),
        num_units=num_units if public_n else None,
        image_shape=images.image_shape,
        class_names=tuple(images.class_names or ()) if named else None,
        decoding=None if images.decoding is None else dict(images.decoding),
    )
    return Opened(images, sizes, public)


def group_sizes(images: ImageSource) -> Tensor | None:
    """int64 [N]: how many images the group of each has; None where every image is a unit."""
    if images.groups is None:
        return None
    if images.groups.dtype != torch.int64 or images.groups.shape != (images.num_images,):
        raise ValueError(
            f"source {images.name!r}: groups are {images.groups.dtype} "
            f"{list(images.groups.shape)}, expected int64, one for each of its images."
        )
    return torch.bincount(images.groups)[images.groups]
