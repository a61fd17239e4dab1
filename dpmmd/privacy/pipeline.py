"""Does a record's contribution depend on that record alone? A check of the data holder's pipeline.

The proof of a release needs that what a record adds to the sums is a function of that record (and
of random draws of its own). The sums, the certificate and the noise are checked elsewhere; the data
set's code and the encoder are the data holder's. `audit_source` runs both as a release would, on
neighbouring data sets D and D', and looks at the others: the records that D and D' share. If what
one of them adds is not the same integers, bit for bit, then the claim is refuted.

A neighbour differs in one unit (a record, or with ``group_by`` a group of them):

* exchanged: for a unit that is not in D, or for a record that cannot be used;
* left out: the later records move up;
* blanked: its rows become what a release makes of records that cannot be decoded.

*What is compared.* Of each record: its row, that is pixels, label and validity as the release takes
them from the source; the share of its group; and its contribution, the certified integer vectors of
all blocks, computed by the release's own functions in batches of the release's size. Both are kept
as hashes. Of D and D': the exact int64 difference of their sums, whose norm is stated in units of
the declared sensitivity Delta ("x Delta").

*Why any movement refutes.* Let w be all random keys. They are fixed for the time of the check, so
that a contribution is a function c(x_i, w_i) if the assumption holds, and others stay still. If one
moves, sums of neighbours differ in more than one unit, by an amount that nobody has bounded, while
the noise was made for one.

*Processes and copies.* A fault that keeps something (a cache, a counter) shows where the keeping
starts afresh, or where it goes on. So D and each D' are read from a torch Dataset by a worker
process each, to which this process has handed the data set unread, and encoded by a copy each of
the encoder. Then D is read again by this process, and encoded by an encoder that has seen it.

*What it cannot show.* It looks at some records and some exchanges: a fault that shows for others is
missed, and so is what the source does beyond the records it was asked to read. "consistent" is no
proof. It does not know which records belong to one person, nor whether two files are one image. An
encoder is compared at one batch size, device and number of threads, as a release has one of each.

What this module returns depends on private records, and no epsilon covers it: it is for the data
holder's eyes alone. It returns ratios, counts and names of checks, never sums, vectors or hashes.
It draws no noise, writes nothing and touches no ledger.
"""

from __future__ import annotations

import copy
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dpmmd.data import open_source, prefetch
from dpmmd.data.look import first_look
from dpmmd.data.source import Batch, ImageSource
from dpmmd.privacy.blocks import Blocks, Part
from dpmmd.privacy.collecting import add, features_of, harmless
from dpmmd.privacy.layout import Asked, Layout, bound_of, lay_out
from dpmmd.privacy.metadata import unit_of
from dpmmd.privacy.opening import group_sizes
from dpmmd.privacy.sensitivity import check_adjacency, sensitivity

if TYPE_CHECKING:
    from dpmmd.encoders import Encoder

NOTICE = (
    "For the data holder's eyes alone: this check reads private records, and no epsilon covers "
    "what it says."
)
RECORDS = 256
_ROWS_AT_ONCE = 1 << 23  # numbers of single records' vectors that are held at once
_PIECE = 1 << 20
_SLACK = 1e-9  # relative: the difference is exact, its norm is rounded
_PAUSE = 0.02  # seconds in which a batch that is in use must not change
Outcome = Literal["holds", "VIOLATED", "note", "not made"]

# What each kind of neighbour is called, and the adjacency under which it is one.
_KINDS = {"exchanged": "replace-one", "blanked": "zero-out", "left out": "add-remove"}
_REARRANGED = {
    "replace-one": ("exchanged",),
    "zero-out": ("exchanged",),
    "add-remove": ("left out", "exchanged"),
}

_KEEP_NOTHING = (
    "Keep nothing between items, draw from torch's, numpy's or random's global streams (which get "
    "a key for each record), and key a cache by the record's number."
)
_WHY = {
    "state": "The source keeps something between records: a counter, a cache, a random stream that "
    f"cannot be given a key, entropy from the system. {_KEEP_NOTHING}",
    "place": "What a record is depends on its place, or on the records before it: a counter, a "
    f"cache under a wrong key, a shared random stream. {_KEEP_NOTHING}",
    "others": "A record is computed from other records: a cache under a wrong key, statistics of "
    "the data set, a random stream that all share, a list that is filtered as it is read. "
    f"{_KEEP_NOTHING} Compute statistics on public data.",
    "batch": "A row depends on the batch in which it is read: a batch that is normalised as a "
    "whole, an array that is refilled and not cleared, records that are dropped or read twice. "
    "Make each row from its record alone, and pad the last batch with valid = False.",
    "neighbour": "The two sources differ in more than that record: one that is listed under several"
    " names, records that are dropped or move, or a fault as the other checks describe them.",
    "groups": "The pixels stayed and the shares of the groups moved: the source's groups do not "
    "follow its records. `groups` holds one number for each record, in the order of `batches`.",
    "mixing": "The pixels stayed and the features moved: the encoder mixes the images of a batch "
    "(batch statistics, attention over the batch, a maximum over the batch) or keeps state. Use "
    "stored statistics or group normalisation, and compute each image's features on its own. Where "
    "many moved when one was left out, and the distance kept to its limit, it may be last bits that"
    " depend on a row's place in the batch: this breaks add-remove alone, and groups.",
    "encoder state": "The pixels stayed and the features moved: the encoder keeps something between"
    " calls (a counter, running statistics, random draws). Make its forward a function of the "
    "images alone.",
    "unit": "One unit moves the sums by more than the declared sensitivity, though no other record "
    "moved: what bounds it does not hold here. Release nothing, and report it (SECURITY.md).",
    "in use": "The source writes into the arrays of a batch before the next one is asked for, so "
    "that a release may sum other records than it was given. Yield arrays that stay as they are "
    "until then, or copies.",
    "missing": "The source yields fewer batches than its num_images says: it drops records, so that"
    " the place of a record depends on others. Give a row with valid = False for each of them.",
    "no key": "This source is read by code of its own, so that random draws have no key to hold "
    "still: rows that differ may be draws. Wrap a torch Dataset instead, whose draws have one.",
}

_FIXED = (
    "the source cannot be rearranged: to check it end to end, build a second source that differs "
    "in one record, and give it as neighbour=, with its position="
)


@dataclass(frozen=True)
class SourceCheck:
    """One check of a pipeline.

    Attributes:
        name: what was done, e.g. ``"record 12 exchanged"``.
        outcome: ``"holds"``, ``"VIOLATED"``, ``"note"`` (worth knowing, refutes nothing), or
            ``"not made"``.
        distance: how far the sums moved, over the declared sensitivity; None where no sums were
            made.
        limit: the most that ``distance`` may be.
        rows_moved: other records of which the source gave another row.
        moved: other records whose contribution moved; None where none was computed.
        compared: the number of other records.
        why: what the likely cause is and what to do, or why the check was not made.
    """

    name: str
    outcome: Outcome
    distance: float | None = None
    limit: float | None = None
    rows_moved: int | None = None
    moved: int | None = None
    compared: int | None = None
    why: str = ""


@dataclass(frozen=True)
class SourceAudit:
    """What `audit_source` found. For the data holder's eyes alone: no epsilon covers it.

    Attributes:
        notice: says so.
        verdict: ``"consistent"`` (which proves nothing) or ``"VIOLATED"``.
        largest_distance: the largest distance of D from one of its neighbours under ``adjacency``,
            or from itself, in units of the sensitivity; above 1 the claim is broken.
        adjacency, unit: of the claim: ``"image"``, or what images are grouped by.
        source, encoder: their names.
        records, usable: records that were read, and how many of them contribute.
        batch_size: images a step, as in the release.
        checks: one by one.
    """

    notice: str
    verdict: Literal["consistent", "VIOLATED"]
    largest_distance: float
    adjacency: str
    unit: str
    source: str
    encoder: str
    records: int
    usable: int
    batch_size: int
    checks: tuple[SourceCheck, ...]

    def facts(self) -> dict[str, Any]:
        """All attributes, ready for JSON."""
        return asdict(self)


def audit_source(
    source: Any,
    encoder: Encoder,
    *,
    adjacency: str,
    num_classes: int | None = None,
    records: int | None = None,
    neighbour: Any = None,
    position: int | None = None,
    moments: Sequence[int] = (1,),
    bound: str = "sphere",
    clip: float = 1.0,
    joint_weight: float | None = None,
    weights: Mapping[str, float] | None = None,
    pixel_moments: int | None = None,
    selection: Encoder | None = None,
    shared_taps: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    **source_options: Any,
) -> SourceAudit:
    """Exchanges and removes records of a source, and refutes the claim if any other moves.

    It reads private records and says what it found of them: for the data holder's eyes alone. It
    returns ratios, counts and names of checks, never sums or vectors; it draws no noise, writes
    nothing and spends nothing. "consistent" is no proof (see the module's docstring).

    Give the arguments of the release that is to be made. A source that implements
    `ImageSource.rearranged`, as all of this package do, is checked end to end. Of another one the
    encoder is checked on rows that are exchanged after they were read, and the source by reading it
    in several ways; to check it end to end, build a second source with one record exchanged (under
    add-remove: left out), and give it as ``neighbour``.

    It holds the sums of two data sets, twice the memory of a release's, and copies of the encoder.

    Args:
        source: as for `dpmmd.release`: a torch Dataset, a path, a name, arrays, an `ImageSource`.
        encoder: as for `dpmmd.release`.
        adjacency: ``"replace-one"``, ``"zero-out"`` or ``"add-remove"``.
        num_classes: K, or None for an unlabelled release.
        records: how many records are read, the first ones; at least 2. None: 256, or a quarter more
            than a batch.
        neighbour: None, or a second source, opened with the same options.
        position: the place of the record in which ``neighbour`` differs, from 0 on.
        moments, bound, clip, joint_weight, weights, pixel_moments, selection, shared_taps,
            batch_size: as for `dpmmd.release`.
        progress: show a progress bar on standard error.
        **source_options: passed to `dpmmd.data.open_source`, such as ``group_by``.

    Returns:
        The `SourceAudit`. A verdict of ``"VIOLATED"`` is a result, it does not raise.

    Raises:
        ValueError, TypeError: an argument out of range; no record, or none that can be used; a
            neighbour with another number of records.
    """
    if isinstance(encoder, str):
        raise TypeError(f"encoder={encoder!r}: expected dpmmd.encoders.load({encoder!r}).")
    asked = Asked(
        encoder=encoder,
        adjacency=check_adjacency(adjacency),
        bound=bound_of(moments, bound, clip, joint_weight),
        num_classes=num_classes,
        weights=weights,
        pixel_moments=pixel_moments,
        selection=selection,
        shared_taps=shared_taps,
        batch_size=batch_size,
    ).check(clip)
    if records is not None and (type(records) is not int or records < 2):
        raise ValueError(f"records={records!r}: expected None or an int >= 2, e.g. {RECORDS}.")
    if (neighbour is None) != (position is None):
        raise ValueError("neighbour and position: give both of them, or neither.")
    images = open_source(source, num_classes=num_classes, **source_options)
    other = None
    if neighbour is not None:
        other = open_source(neighbour, num_classes=num_classes, allow_empty=True, **source_options)
    plan = _Plan.of(asked, images)
    if records is None:
        records = max(RECORDS, plan.batch_size + plan.batch_size // 4)
    with tqdm(desc="audit", unit="reading", disable=not progress) as bar:
        found = _Pipeline(images, plan, min(records, images.num_images), bar)
        checks = found.apart()
        if other is not None and position is not None:
            checks.append(found.against(other, position))
        checks += found.together()
    distances = [c.distance for c in checks if c.distance is not None and (c.limit or 0) <= 1]
    return SourceAudit(
        notice=NOTICE,
        verdict="VIOLATED" if any(c.outcome == "VIOLATED" for c in checks) else "consistent",
        largest_distance=max(distances, default=0.0),
        adjacency=adjacency,
        unit=unit_of(images.group_by),
        source=images.name,
        encoder=encoder.name,
        records=found.n,
        usable=found.usable,
        batch_size=plan.batch_size,
        checks=tuple(checks),
    )


# ----------------------------------------------------------------------------- as a release does it


@dataclass(frozen=True)
class _Plan:
    """What a release with these arguments would sum, and in what batches."""

    layout: Layout
    adjacency: str

    @classmethod
    def of(cls, asked: Asked, images: ImageSource) -> _Plan:
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
class _Seen:
    """What one reading of a data set gave. Holds raw sums: it never leaves this module."""

    rows: list[bytes] = field(default_factory=list)  # hashes of pixels, label and validity
    shares: list[int] = field(default_factory=list)
    contributions: list[bytes] = field(default_factory=list)
    sums: list[Tensor] = field(default_factory=list, repr=False)
    valid: list[bool] = field(default_factory=list)
    missing: int = 0  # batches that did not come


def _read(
    images: ImageSource,
    plan: _Plan,
    encoders: Mapping[str, Encoder] | None = None,
    batch_size: int | None = None,
) -> _Seen:
    """Reads a data set as `collecting.collect` does; without encoders its rows alone."""
    size = batch_size or plan.batch_size
    layout = replace(plan.layout, batch_size=size)
    seen = _Seen(missing=images.num_batches(size))
    sizes = group_sizes(images)
    sizes = None if sizes is None else sizes.to(layout.device)
    raw = layout.blocks.zero(layout.device) if encoders else None
    numbers = range(images.num_batches(size))
    batches = prefetch(images.part(size, numbers), layout.device)
    with closing(batches), torch.inference_mode():
        for number, batch in zip(numbers, batches, strict=False):
            start = number * size
            n = min(size, images.num_images - start)
            pixels, labels, valid, share = harmless(batch, layout, start, images.num_images, sizes)
            seen.rows += _row_hashes(pixels[:n], labels[:n], valid[:n])
            seen.shares += share[:n].tolist()
            seen.valid += valid[:n].tolist()
            seen.missing -= 1
            if encoders and raw is not None:
                features = features_of(encoders, pixels)
                add(layout.blocks, raw, features, labels, valid, share)
                seen.contributions += _contributions(layout, features, labels, valid, share, n)
    lacking = images.num_images - len(seen.rows)  # rows of batches that did not come
    seen.rows += [b""] * lacking
    seen.shares += [1] * lacking
    seen.valid += [False] * lacking
    seen.contributions += [b""] * lacking
    for sums in raw.all if raw else ():
        seen.sums += sums.take()
    return seen


def _row_hashes(pixels: Tensor, labels: Tensor, valid: Tensor) -> list[bytes]:
    values = zip(pixels.cpu().contiguous().numpy(), labels.tolist(), valid.tolist(), strict=True)
    return [_hash(row) + f"{label} {usable}".encode() for row, label, usable in values]


def _hash(array: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(array).data, digest_size=16).digest()


def _contributions(
    layout: Layout,
    features: Mapping[str, list[Tensor]],
    labels: Tensor,
    valid: Tensor,
    share: Tensor,
    n: int,
) -> list[bytes]:
    """The hash of what each of the first n rows adds: with every row as a class of its own."""
    told = zip(labels.tolist(), valid.tolist(), share.tolist(), strict=True)
    hashes = [f"{k} {v} {s}".encode() for k, v, s in told][:n]
    for part in map(_alone, layout.blocks.parts):
        width = part.width**2 if part.kind.products else part.dim
        for start in range(0, n, step := max(1, _ROWS_AT_ONCE // max(1, width))):
            rows = slice(start, min(start + step, n))
            alone = Blocks((part,), None, m := rows.stop - start)
            raw = alone.zero(layout.device)
            own = {name: [f[rows] for f in taps] for name, taps in features.items()}
            numbers = torch.arange(m, device=layout.device)
            add(alone, raw, own, numbers, valid[rows], share[rows])
            vectors = raw.parts[0].take()[0].view(m, -1).numpy()
            for row, vector in zip(range(*rows.indices(n)), vectors, strict=True):
                hashes[row] += _hash(vector)
    return hashes


def _alone(part: Part) -> Part:
    """The part with all of a record's vector in the row of its class."""
    return replace(part, kind=replace(part.kind, pooled=False), shared_taps=0)


def _distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The norm of the difference, which is taken in exact integers."""
    square = 0.0
    for a, b in zip(one, other, strict=True):
        for p, q in zip(a.view(-1).split(_PIECE), b.view(-1).split(_PIECE), strict=True):
            square += float((p - q).double().square().sum())
    return math.sqrt(square)


# ----------------------------------------------------------------------------- data sets to compare


class _View(ImageSource):
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


def _blank(batch: Batch, rows: list[int]) -> None:
    batch.images[rows] = 0
    batch.labels[rows] = 0
    batch.valid[rows] = False


def _negative(batch: Batch, rows: list[int]) -> None:
    """The negative of an image, and a black one for what cannot be used."""
    usable = batch.valid[rows]
    batch.images[rows] = torch.where(usable[:, None, None, None], 1 - batch.images[rows], 0)
    batch.labels[rows] = 0
    batch.valid[rows] = True


def _units(groups: Tensor | None, n: int) -> list[list[int]]:
    """The records of each unit among the first n, by their first records."""
    if groups is None:
        return [[i] for i in range(n)]
    found: dict[int, list[int]] = {}
    for i, group in enumerate(groups[:n].tolist()):
        found.setdefault(group, []).append(i)
    return list(found.values())


def _exchange(order: Sequence[int], unit: Sequence[int], spare: Sequence[int]) -> list[int]:
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


# ----------------------------------------------------------------------------- the checks


class _Pipeline:
    """One source, one plan, and the checks of them."""

    def __init__(self, images: ImageSource, plan: _Plan, n: int, bar: tqdm[Any]) -> None:
        self.plan, self.n, self.bar = plan, n, bar
        self.key = os.urandom(32)
        self.source = _prepared(images, self.key, workers=0)
        self.fresh = _prepared(images, self.key, workers=1)
        self.delta = plan.delta(plan.adjacency)
        self.notes: list[SourceCheck] = []
        units = _units(images.groups, n)
        self.order = list(range(n))  # of D
        self.spare: list[int] = []
        try:
            self.source.rearranged(self.order[:1])
            self.movable = True
        except NotImplementedError:
            self.movable = False
            first_look(images, plan.batch_size)  # refuses batches of another shape
        if self.movable and len(units) > 1:
            self.spare = units.pop()
            self.order = [i for i in self.order if i not in self.spare]
        self.units = units
        self.used = plan.encoders()
        self.chosen = self._chosen()
        bar.total = 8 + len(self.chosen) * (1 + len(_REARRANGED[plan.adjacency]))
        self.base = self._first()
        self.usable = sum(self.base.valid)
        if not self.usable:
            raise ValueError(
                f"source {images.name!r}: none of the {self.n} records that were read can be used, "
                "so there is nothing to check. `dpmmd inspect` says why. Your eyes alone: this "
                "depends on private images."
            )

    def _first(self) -> _Seen:
        try:
            return self._seen(self._arranged(self.order), self.used)
        except RuntimeError:
            if self.fresh is self.source:
                raise
            self.fresh = self.source  # no worker process here, or the data set cannot be sent
            self.notes.append(
                SourceCheck(
                    "fresh processes",
                    "not made",
                    why="a worker process could not read the data set, so that caches and counters "
                    "of one reading are still there in the next",
                )
            )
            return self._seen(self._arranged(self.order), self.used)

    def _arranged(self, order: Sequence[int], source: ImageSource | None = None) -> ImageSource:
        source = source or self.fresh
        return source.rearranged(order) if self.movable else _View(source, len(order))

    def _seen(
        self,
        images: ImageSource,
        encoders: Mapping[str, Encoder] | None = None,
        batch_size: int | None = None,
    ) -> _Seen:
        seen = _read(images, self.plan, encoders, batch_size)
        self.bar.update()
        return seen

    # ------------------------------------------------------------------------- the checks

    def apart(self) -> list[SourceCheck]:
        """Readings that know nothing of each other: by a worker process each, of a torch Dataset.

        They come first, while this process has not read the data set.
        """
        checks = [
            self._neighbour(kind, unit)
            for kind in _REARRANGED[self.plan.adjacency]
            for unit in self.chosen
        ]
        broken = [i for i, valid in zip(self.order, self.base.valid, strict=True) if not valid]
        lone = [u for u in self.units if len(u) == 1 and u[0] not in broken]
        if self.movable and broken and lone and len(self.units) == len(self.order):
            checks.append(self._exchanged(lone[len(lone) // 2], broken[:1], "an unusable record"))
        pairs = list(enumerate(self.order))
        if self.movable:
            backwards = self._seen(self._arranged(range(self.n)[::-1]))
            turned = [(place, self.n - 1 - record) for place, record in pairs]
            checks.append(self._same("in reversed order", backwards, "place", turned))
        else:
            checks.append(SourceCheck("in reversed order", "not made", why=_FIXED))
        if self.fresh is not self.source or _workers(self.source):
            read = self._seen(_View(_with_workers(self.source, 2), self.n))
            checks.append(self._same("by two worker processes", read, "place", pairs))
        return checks

    def together(self) -> list[SourceCheck]:
        """Readings by this process, one after the other, with encoders that have been used."""
        size = _another(self.plan.batch_size, self.n)
        whole, pairs = _View(self.source, self.n), list(enumerate(self.order))
        same = [(i, i) for i in range(len(self.order))]
        list(self.source.part(1, range(1)))  # or a counter may come round to where it began
        stands = self._same("read as it stands", self._seen(whole), "state", pairs)
        again = self._seen(self._arranged(self.order, self.source), self.used)
        read = self._same("read again", again, "state", same)
        batch = "state" if stands.rows_moved or read.rows_moved else "batch"
        blanked = [self._blanked(unit) for unit in self.chosen]
        small = self._seen(whole, batch_size=size)
        return [
            *blanked,
            stands,
            read,
            self._same(f"in batches of {size}", small, batch, pairs),
            self._parts(size, batch),
            *self._contract(size),
            *self.notes,
        ]

    def _chosen(self) -> list[list[int]]:
        """The first unit, the middle one, the last and one at random."""
        last = len(self.units) - 1
        picked = [0, last // 2, last, int(np.random.default_rng().integers(last + 1))]
        return [self.units[i] for i in dict.fromkeys(picked)]

    def _called(self, unit: Sequence[int]) -> str:
        whole = self.source.group_by is not None
        return f"group of record {unit[0]}" if whole else f"record {unit[0]}"

    def _neighbour(self, kind: str, unit: list[int]) -> SourceCheck:
        name = f"{self._called(unit)} {kind}"
        if kind == "exchanged":
            if not self.movable:
                view = self._changed(self.fresh, unit, _negative)
                seen = self._seen(view, self.plan.encoders())
                return self._judged(f"{name} after it was read", kind, seen, self.order, unit)
            if self.spare:
                return self._exchanged(unit, self.spare)
            return SourceCheck(name, "not made", why="there is no other unit to exchange it for")
        if not self.movable:
            return SourceCheck(name, "not made", why=_FIXED)
        order = [record for record in self.order if record not in unit]
        seen = self._seen(self._arranged(order), self.plan.encoders())
        return self._judged(name, kind, seen, order, unit)

    def _blanked(self, unit: list[int]) -> SourceCheck:
        seen = self._seen(self._changed(self.source, unit, _blank), self.plan.encoders())
        name = f"{self._called(unit)} blanked after it was read"
        return self._judged(name, "blanked", seen, self.order, unit, why="state")

    def _changed(
        self, source: ImageSource, unit: Sequence[int], change: Callable[[Batch, list[int]], None]
    ) -> ImageSource:
        """D, with the unit's rows changed after they were read."""
        places = [place for place, record in enumerate(self.order) if record in unit]
        return _View(self._arranged(self.order, source), len(self.order), places, change)

    def _exchanged(self, unit: Sequence[int], spare: Sequence[int], what: str = "") -> SourceCheck:
        order = _exchange(self.order, unit, spare)
        seen = self._seen(self._arranged(order), self.plan.encoders())
        name = f"{self._called(unit)} exchanged" + (f" for {what}" if what else "")
        return self._judged(name, "exchanged", seen, order, [*unit, *spare])

    def against(self, other: ImageSource, position: int) -> SourceCheck:
        """A neighbour that the data holder built."""
        if type(position) is not int or not 0 <= position < self.n:
            raise ValueError(
                f"position={position!r}: expected the place of a record among the first {self.n} "
                "that are read; records= reads more of them."
            )
        kind = "left out" if self.plan.adjacency == "add-remove" else "exchanged"
        all_units = _units(self.source.groups, self.n)
        unit = next(u for u in all_units if position in u)
        order = list(range(self.n))
        expected = self.source.num_images
        if kind == "left out":
            order = [record for record in order if record not in unit]
            expected -= len(_units_of(self.source, position))
        if other.num_images != expected:
            raise ValueError(
                f"neighbour: it has {other.num_images} records, expected {expected} (source has "
                f"{self.source.num_images}, and under {self.plan.adjacency} adjacency the unit of "
                f"record {position} is {kind})."
            )
        base = self.base
        if self.spare or self.movable:  # the source as it stands, with the spare unit
            base = self._seen(_View(self.fresh, self.n), self.plan.encoders())
        view = _View(_prepared(other, self.key, workers=1), len(order))
        seen = self._seen(view, self.plan.encoders())
        name = f"neighbour: record {position} {kind}"
        return self._judged(
            name, kind, seen, order, unit, base=base, base_order=range(self.n), why="neighbour"
        )

    def _judged(
        self,
        name: str,
        kind: str,
        seen: _Seen,
        order: Sequence[int],
        unit: Sequence[int],
        *,
        base: _Seen | None = None,
        base_order: Sequence[int] | None = None,
        why: str = "",
    ) -> SourceCheck:
        base = base or self.base
        before = {record: place for place, record in enumerate(base_order or self.order)}
        pairs = [
            (before[record], place)
            for place, record in enumerate(order)
            if record in before and record not in unit
        ]
        limit = self.plan.delta(_KINDS[kind]) / self.delta
        return self._compared(name, base, seen, pairs, limit, why or _CAUSE[kind], "mixing")

    def _compared(
        self,
        name: str,
        one: _Seen,
        other: _Seen,
        pairs: Sequence[tuple[int, int]],
        limit: float,
        of_source: str,
        of_encoder: str,
    ) -> SourceCheck:
        rows = sum(one.rows[i] != other.rows[j] for i, j in pairs)
        shares = sum(one.shares[i] != other.shares[j] for i, j in pairs)
        moved = distance = None
        if other.sums:
            moved = sum(one.contributions[i] != other.contributions[j] for i, j in pairs)
            distance = _distance(one.sums, other.sums) / self.delta
        too_far = distance is not None and distance > limit * (1 + _SLACK)
        why, missing = "", one.missing or other.missing
        if rows or moved or shares or too_far or missing:
            cause = of_source if rows else "groups" if shares else of_encoder if moved else "unit"
            why = _WHY["missing" if missing else cause]
            if rows and of_source == "state" and not _has_key(self.source):
                why = f"{why} {_WHY['no key']}"
        return SourceCheck(
            name,
            "VIOLATED" if why else "holds",
            distance=distance,
            limit=limit if distance is not None else None,
            rows_moved=rows,
            moved=moved,
            compared=len(pairs),
            why=why,
        )

    def _same(
        self, name: str, seen: _Seen, why: str, pairs: Sequence[tuple[int, int]]
    ) -> SourceCheck:
        return self._compared(name, self.base, seen, pairs, 0.0, why, "encoder state")

    def _parts(self, size: int, cause: str) -> SourceCheck:
        """`part` from the middle on, against `batches`."""
        total = -(-self.n // size)
        numbers = range(total // 2, total)
        rows = []
        for batches in (
            self.source.part(size, numbers),
            _from(self.source.batches(size), numbers),
        ):
            hashes: list[bytes] = []
            for batch in batches:
                hashes += _row_hashes(batch.images, batch.labels, batch.valid)
            rows.append(hashes)
        self.bar.update()
        moved = sum(a != b for a, b in zip(*rows, strict=False))
        moved += abs(len(rows[0]) - len(rows[1]))
        return SourceCheck(
            "part against batches",
            "VIOLATED" if moved else "holds",
            rows_moved=moved,
            compared=len(rows[1]),
            why=_WHY[cause] if moved else "",
        )

    def _contract(self, size: int) -> list[SourceCheck]:
        """What `ImageSource.batches` promises of its arrays."""
        in_use = refilled = padded = 0
        odd: set[str] = set()
        previous: tuple[Batch, Batch] | None = None
        numbers = range(-(-self.n // size))
        batches = self.source.batches(size)
        for number, batch in enumerate(_from(batches, numbers)):
            if previous is not None:
                refilled += not _equal(*previous)
            odd |= _oddities(batch, size, self.source.image_shape)
            kept = Batch(*(t.clone() for t in (batch.images, batch.labels, batch.valid)))
            if number < 4:
                time.sleep(_PAUSE)
            in_use += not _equal(batch, kept)
            rest = max(0, self.source.num_images - number * size)
            padded += int(kept.valid[rest:].sum())
            previous = batch, kept
        self.bar.update()
        checks = [
            SourceCheck(
                "a batch stays as it is while it is in use",
                "VIOLATED" if in_use else "holds",
                why=_WHY["in use"] if in_use else "",
            )
        ]
        if refilled:
            checks.append(
                SourceCheck(
                    "arrays of their own for each batch",
                    "note",
                    why="the source refills its arrays, as it may: a release copies each batch as "
                    "it comes. Read it through dpmmd.data.prefetch wherever you read it.",
                )
            )
        if padded:
            odd.add("rows of the padding are valid, which a release does not believe")
        if self.n == self.source.num_images and next(batches, None) is not None:
            odd.add("more batches come than num_images says, and a release leaves them out")
        checks += [SourceCheck("shape of a batch", "note", why=what) for what in sorted(odd)]
        twins = _twins(self.base)
        if twins:
            checks.append(
                SourceCheck(
                    "records apart",
                    "note",
                    compared=len(self.order),
                    why=f"{twins} records have the pixels and the label of another one. If they are"
                    " one person's, use group_by; if they are one file under two names, leave one "
                    "out: the unit counts once only where it stands once.",
                )
            )
        return checks


_CAUSE = {"exchanged": "others", "left out": "place"}


def _prepared(images: ImageSource, key: bytes, workers: int) -> ImageSource:
    """The source with fixed keys of random draws; a torch Dataset read by so many processes."""
    from dpmmd.data.dataset import DatasetSource

    if not isinstance(images, DatasetSource):
        return images
    prepared = _with_workers(images, workers)
    assert isinstance(prepared, DatasetSource)
    prepared._key = key
    return prepared


def _has_key(source: ImageSource) -> bool:
    from dpmmd.data.arrays import ArraySource
    from dpmmd.data.items import ItemSource

    return isinstance(source, ItemSource | ArraySource)


def _workers(source: ImageSource) -> int | None:
    """How many processes read the source; None where that is not for us to choose."""
    from dpmmd.data.items import ItemSource

    return source._workers if isinstance(source, ItemSource) else None


def _with_workers(source: ImageSource, workers: int) -> ImageSource:
    other: Any = copy.copy(source)
    other._workers = workers
    return other


def _units_of(source: ImageSource, position: int) -> list[int]:
    """All records of the unit of one."""
    if source.groups is None:
        return [position]
    return torch.nonzero(source.groups == source.groups[position]).flatten().tolist()


def _another(size: int, n: int) -> int:
    """A batch size that is not the release's and cuts n records elsewhere."""
    return next(s for s in (48, 7, 5, 3, 2, 1) if s == 1 or (s != size and s < n))


def _from(batches: Iterator[Batch], numbers: range) -> Iterator[Batch]:
    for number, batch in enumerate(batches):
        if number in numbers:
            yield batch
        if number + 1 >= numbers.stop:
            return


def _equal(one: Batch, other: Batch) -> bool:
    return (
        torch.equal(one.images.nan_to_num(), other.images.nan_to_num())
        and torch.equal(one.labels, other.labels)
        and torch.equal(one.valid, other.valid)
    )


def _oddities(batch: Batch, size: int, shape: tuple[int, int, int]) -> set[str]:
    found = set()
    wanted = (
        ("images", batch.images, torch.float32, (size, *shape)),
        ("labels", batch.labels, torch.int64, (size,)),
        ("valid", batch.valid, torch.bool, (size,)),
    )
    for name, tensor, dtype, expected in wanted:
        if tensor.dtype != dtype or tuple(tensor.shape) != expected:
            found.add(
                f"{name} are {str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}, "
                f"expected {str(dtype).removeprefix('torch.')} {list(expected)}"
            )
    return found


def _twins(seen: _Seen) -> int:
    rows = [row for row, valid in zip(seen.rows, seen.valid, strict=True) if valid]
    return len(rows) - len(set(rows))
