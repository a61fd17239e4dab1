"""Label checks. They speak of the schema only: no record's index, no record's value."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpmmd.data.identifiers import IdentifierError, numbered, raw_values


def as_labels(labels: Any, num_images: int, name: str) -> Tensor:
    """Labels of any integer array type as an int64 tensor ``[N]``.

    Raises:
        TypeError: the labels are not integers.
        ValueError: there is not exactly one label per image.
    """
    if np.ma.is_masked(labels):  # an array of the values alone would hold what is masked
        raise ValueError(
            f"labels of source {name!r} have missing values (they are masked): expected an integer "
            "for every image; drop the unlabelled records or give them a class of their own."
        )
    if isinstance(labels, Tensor) and labels.layout != torch.strided:
        raise label_type_error(name, "a sparse tensor")
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.ndim != 1 or array.shape[0] != num_images:
        raise ValueError(
            f"labels of source {name!r} have shape {tuple(array.shape)}: expected one integer per "
            f"image, shape ({num_images},); turn one-hot labels into indices with argmax(axis=1)."
        )
    if array.dtype.kind not in "iu":
        raise label_type_error(name, str(array.dtype))
    if array.dtype == np.uint64 and array.size and int(array.max()) > np.iinfo(np.int64).max:
        raise label_range_error(None, name)
    return torch.from_numpy(array.astype(np.int64))


def as_groups(values: Any, num_images: int, group_by: str, name: str) -> Tensor:
    """Groups of any type as int64 ``[N]`` from 0 on, in the order of their identifiers.

    Identifiers that are equal are one group, whatever their type and their spelling
    (`dpmmd.data.identifiers`). One group too few only costs utility; one too many would break the
    claim.

    Raises:
        TypeError: identifiers that are neither numbers nor text, dates or UUIDs.
        ValueError: not one value per image, missing values, or numbers that floating point has
            rounded.
    """
    with _named(group_by, name):
        values = raw_values(values)
        shape = values.shape if isinstance(values, np.ndarray) else (len(values),)
        if tuple(shape) != (num_images,):
            raise ValueError(
                f"group_by={group_by!r}: source {name!r} has groups of shape {tuple(shape)}, "
                f"expected one per image, shape ({num_images},)."
            )
        return torch.from_numpy(numbered(values))


def groups_at(values: Any, indices: Iterable[int], group_by: str, name: str) -> Any:
    """Those of a data set's groups that a part of it has, unchanged."""
    with _named(group_by, name):
        values = raw_values(values)
    chosen = [int(index) for index in indices]
    return values[chosen] if isinstance(values, np.ndarray) else [values[i] for i in chosen]


@contextlib.contextmanager
def _named(group_by: str, name: str) -> Iterator[None]:
    """Errors about identifiers say the argument and the source."""
    try:
        yield
    except IdentifierError as error:
        kind, message = error.kind, str(error).replace("{source}", repr(name))
    else:
        return
    raise kind(f"group_by={group_by!r}: {message}")


def one_label(label: Any, name: str) -> int:
    """One label of a data set's item as a Python int.

    Raises:
        TypeError: it is no integer.
        ValueError: no tensor of labels could hold it.
    """
    if isinstance(label, Tensor) and label.numel() == 1 and not label.is_floating_point():
        label = label.item()
    elif isinstance(label, np.ndarray) and label.size == 1:
        label = label.reshape(())[()]
    if isinstance(label, bool | np.bool_) or not isinstance(label, int | np.integer):
        raise label_type_error(name, type(label).__name__)
    value = int(label)
    if not -(2**63) <= value < 2**63:  # no tensor could hold it
        raise label_range_error(None, name)
    return value


def check_label_range(labels: Tensor, num_classes: int | None, name: str) -> None:
    """Raise ValueError when a label is negative or, with `num_classes` given, not below it."""
    if labels.numel() == 0:
        return
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise label_range_error(num_classes, name)


def label_range_error(num_classes: int | None, name: str) -> ValueError:
    if num_classes is None:
        return ValueError(
            f"source {name!r} has labels that are not class indices: expected whole numbers from "
            "0 on; relabel the data to 0..K-1 and give num_classes=K."
        )
    return ValueError(
        f"num_classes={num_classes}: source {name!r} has labels outside the permitted range "
        f"0..{num_classes - 1}; give the number of classes that the data really have, or relabel "
        "the data."
    )


def label_type_error(name: str, found: str) -> TypeError:
    return TypeError(
        f"labels of source {name!r} are of type {found}: expected integers 0..K-1; convert them "
        "to int64 class indices, or name another label field with label_key."
    )
