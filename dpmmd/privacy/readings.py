"""Readings of a data set as a release reads it, and neighbours to read.

A reading holds raw sums and hashes of private rows. It is for `probes` alone, which turns it into
ratios and counts.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpmmd.data import Batch, ImageSource, prefetch
from dpmmd.encoders import Encoder
from dpmmd.privacy.blocks import Blocks, Part
from dpmmd.privacy.collecting import Rows, add, features_of, harmless
from dpmmd.privacy.layout import Asked, Layout, lay_out
from dpmmd.privacy.opening import group_sizes
from dpmmd.privacy.sensitivity import sensitivity

_ROWS_AT_ONCE = 1 << 23  # numbers of single records' vectors that are held at once
_PIECE = 1 << 20


@dataclass(frozen=True)
class Plan:
    """What a release with these arguments would sum, and in what batches."""

    layout: Layout
    adjacency: str

    @classmethod
    def of(cls, asked: Asked, images: ImageSource) -> Plan:
        grouped = images.groups is not None
        return cls(lay_out(asked, images.image_shape, grouped=grouped), asked.adjacency)

    @property
    def batch_size(self) -> int:
        return self.layout.batch_size

    def delta(self, adjacency: str) -> float:
        """The sensitivity under an adjacency, in grid units."""
        return sensitivity(adjacency, self.layout.blocks.all())

    def encoders(self) -> dict[str, Encoder]:
        """Copies of the encoders; one that has two names is copied once."""
        used = self.layout.encoders
        copies = {id(encoder): _copied(encoder) for encoder in used.values()}
        return {name: copies[id(encoder)] for name, encoder in used.items()}


def _copied(encoder: Encoder) -> Encoder:
    try:
        return copy.deepcopy(encoder)
    except Exception:  # whatever a backbone raises that cannot be copied: it is used as it is
        return encoder


@dataclass
class Seen:
    """What one reading of a data set gave. Holds raw sums: it never leaves this module."""

    rows: list[bytes] = field(default_factory=list)  # hashes of pixels, label and validity
    shares: list[int] = field(default_factory=list)
    contributions: list[bytes] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list, repr=False)
    valid: list[bool] = field(default_factory=list)
    missing: int = 0  # batches that did not come


def read(
    images: ImageSource,
    plan: Plan,
    encoders: Mapping[str, Encoder] | None = None,
    batch_size: int | None = None,
) -> Seen:
    """Reads a data set as `collecting.collect` does; without encoders its rows alone."""
    size = batch_size or plan.batch_size
    layout = replace(plan.layout, batch_size=size)
    seen = Seen(missing=images.num_batches(size))
    sizes = group_sizes(images)
    sizes = None if sizes is None else sizes.to(layout.device)
    raw = layout.blocks.zero(layout.device) if encoders else None
    numbers = range(images.num_batches(size))
    batches = prefetch(images.part(size, numbers), layout.device)
    with closing(batches), torch.inference_mode():
        for number, batch in zip(numbers, batches, strict=False):
            start = number * size
            n = min(size, images.num_images - start)
            rows = harmless(batch, layout, start, images.num_images, sizes)
            seen.rows += row_hashes(rows.pixels[:n], rows.labels[:n], rows.valid[:n])
            seen.shares += rows.share[:n].tolist()
            seen.valid += rows.valid[:n].tolist()
            seen.missing -= 1
            if encoders and raw is not None:
                features = features_of(encoders, rows.pixels)
                add(layout.blocks, raw, features, rows)
                seen.contributions += _contributions(layout, features, rows, n)
    lacking = images.num_images - len(seen.rows)  # rows of batches that did not come
    seen.rows += [b""] * lacking
    seen.shares += [1] * lacking
    seen.valid += [False] * lacking
    seen.contributions += [b""] * lacking
    for sums in raw.all if raw else ():
        seen.sums += sums.take()
    return seen


def row_hashes(pixels: Tensor, labels: Tensor, valid: Tensor) -> list[bytes]:
    values = zip(pixels.cpu().contiguous().numpy(), labels.tolist(), valid.tolist(), strict=True)
    return [_hash(row) + f"{label} {usable}".encode() for row, label, usable in values]


def _hash(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).digest()


def _contributions(
    layout: Layout, features: Mapping[str, list[Tensor]], rows: Rows, n: int
) -> list[bytes]:
    """The hash of what each of the first n rows adds: with every row as a class of its own."""
    told = zip(*(t.tolist() for t in rows[1:]), strict=True)  # class, cell, validity, share
    hashes = [" ".join(map(str, one)).encode() for one in told][:n]
    for part in map(_alone, layout.blocks.parts):
        width = part.width**2 if part.kind.products else part.dim
        for start in range(0, n, step := max(1, _ROWS_AT_ONCE // max(1, width))):
            some = slice(start, min(start + step, n))
            alone = Blocks((part,), None, m := some.stop - start)
            raw = alone.zero(layout.device)
            own = {name: [f[some] for f in taps] for name, taps in features.items()}
            numbers = torch.arange(m, device=layout.device)
            picked = Rows(*(t[some] for t in rows))._replace(labels=numbers, cells=numbers)
            add(alone, raw, own, picked)
            vectors = raw.parts[0].take()[0].view(m, -1).numpy()
            for row, vector in zip(range(*some.indices(n)), vectors, strict=True):
                hashes[row] += _hash(vector)
    return hashes


def _alone(part: Part) -> Part:
    """The part with all of a record's vector in the row of its class."""
    return replace(part, kind=replace(part.kind, pooled=False), shared_taps=0)


def distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The norm of the difference, which is taken in exact integers."""
    square = 0.0
    for a, b in zip(one, other, strict=True):
        for p, q in zip(a.view(-1).split(_PIECE), b.view(-1).split(_PIECE), strict=True):
            square += float((p - q).double().square().sum())
    return math.sqrt(square)


# ----------------------------------------------------------------------------- data sets to compare


class View(ImageSource):
    """The first records of a source; some of their rows changed after they were read."""

    def __init__(
        self,
        source: ImageSource,
        num_images: int,
        rows: Sequence[int] = (),
        change: Callable[[Batch, list[int]], None] | None = None,
    ) -> None:
        self.name, self.identity = source.name, source.identity
        self.image_shape, self.labelled = source.image_shape, source.labelled
        self.num_images, self.group_by = num_images, source.group_by
        self.groups = None if source.groups is None else source.groups[:num_images]
        self._source, self._rows, self._change = source, rows, change

    def batches(self, batch_size: int) -> Iterator[Batch]:
        return self.part(batch_size, range(self.num_batches(batch_size)))

    def part(self, batch_size: int, numbers: range) -> Iterator[Batch]:
        read = self._source.part(batch_size, numbers)
        for number, batch in zip(numbers, read, strict=False):
            start = number * batch_size
            rows = [row - start for row in self._rows if start <= row < start + batch_size]
            if self._change is not None and rows:
                batch = Batch(batch.images.clone(), batch.labels.clone(), batch.valid.clone())
                self._change(batch, rows)
            yield batch


def blank(batch: Batch, rows: list[int]) -> None:
    batch.images[rows] = 0
    batch.labels[rows] = 0
    batch.valid[rows] = False


def negative(batch: Batch, rows: list[int]) -> None:
    """The negative of an image, and a black one for what cannot be used."""
    usable = batch.valid[rows]
    batch.images[rows] = torch.where(usable[:, None, None, None], 1 - batch.images[rows], 0)
    batch.labels[rows] = 0
    batch.valid[rows] = True


def units_by_record(groups: Tensor | None, n: int) -> list[list[int]]:
    """The records of each unit among the first n, by their first records."""
    if groups is None:
        return [[i] for i in range(n)]
    found: dict[int, list[int]] = {}
    for i, group in enumerate(groups[:n].tolist()):
        found.setdefault(group, []).append(i)
    return list(found.values())


def exchange(order: Sequence[int], unit: Sequence[int], spare: Sequence[int]) -> list[int]:
    """The order with the unit's records replaced by those of the spare one, in their places."""
    waiting, left, result = list(spare), len(unit), []
    for record in order:
        if record not in unit:
            result.append(record)
            continue
        left -= 1
        taken = waiting if not left else waiting[:1]
        result += taken
        waiting = waiting[len(taken) :]
    return result


def prepared(images: ImageSource, key: bytes, workers: int) -> ImageSource:
    """The source with fixed keys of random draws; a torch Dataset read by so many processes."""
    from dpmmd.data.dataset import DatasetSource

    if not isinstance(images, DatasetSource):
        return images
    prepared = with_workers(images, workers)
    assert isinstance(prepared, DatasetSource)
    prepared._key = key
    return prepared


def has_key(source: ImageSource) -> bool:
    from dpmmd.data.arrays import ArraySource
    from dpmmd.data.items import ItemSource

    return isinstance(source, ItemSource | ArraySource)


def workers_of(source: ImageSource) -> int | None:
    """How many processes read the source; None where that is not for us to choose."""
    from dpmmd.data.items import ItemSource

    return source._workers if isinstance(source, ItemSource) else None


def with_workers(source: ImageSource, workers: int) -> ImageSource:
    other: Any = copy.copy(source)
    other._workers = workers
    return other


def units_of(source: ImageSource, position: int) -> list[int]:
    """All records of the unit of one."""
    if source.groups is None:
        return [position]
    return torch.nonzero(source.groups == source.groups[position]).flatten().tolist()
