"""The checks of a pipeline: what one record, exchanged or left out, moves of the others."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from dpmmd.data import Batch, ImageSource
from dpmmd.data.look import first_look
from dpmmd.encoders import Encoder
from dpmmd.privacy.readings import (
    Plan,
    Seen,
    View,
    blank,
    distance,
    exchange,
    has_key,
    negative,
    prepared,
    read,
    row_hashes,
    units_by_record,
    units_of,
    with_workers,
    workers_of,
)
from dpmmd.privacy.verdicts import FIXED, WHY, SourceCheck

_SLACK = 1e-9  # relative: the difference is exact, its norm is rounded
_PAUSE = 0.02  # seconds in which a batch that is in use must not change

# What each kind of neighbour is called, and the adjacency under which it is one.
KINDS = {"exchanged": "replace-one", "blanked": "zero-out", "left out": "add-remove"}
REARRANGED = {
    "replace-one": ("exchanged",),
    "zero-out": ("exchanged",),
    "add-remove": ("left out", "exchanged"),
}
CAUSE = {"exchanged": "others", "left out": "place"}


class Probes:
    """One source, one plan, and the checks of them."""

    def __init__(self, images: ImageSource, plan: Plan, n: int, bar: tqdm[Any]) -> None:
        self.plan, self.n, self.bar = plan, n, bar
        self.key = os.urandom(32)
        self.source = prepared(images, self.key, workers=0)
        self.fresh = prepared(images, self.key, workers=1)
        self.delta = plan.delta(plan.adjacency)
        self.notes: list[SourceCheck] = []
        units = units_by_record(images.groups, n)
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
        bar.total = 8 + len(self.chosen) * (1 + len(REARRANGED[plan.adjacency]))
        self.base = self._first()
        self.usable = sum(self.base.valid)
        if not self.usable:
            raise ValueError(
                f"source {images.name!r}: none of the {self.n} records that were read can be used, "
                "so there is nothing to check. `dpmmd inspect` says why. Your eyes alone: this "
                "depends on private images."
            )

    def _first(self) -> Seen:
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
        return source.rearranged(order) if self.movable else View(source, len(order))

    def _seen(
        self,
        images: ImageSource,
        encoders: Mapping[str, Encoder] | None = None,
        batch_size: int | None = None,
    ) -> Seen:
        seen = read(images, self.plan, encoders, batch_size)
        self.bar.update()
        return seen

    # ------------------------------------------------------------------------- the checks

    def apart(self) -> list[SourceCheck]:
        """Readings that know nothing of each other: by a worker process each, of a torch Dataset.

        They come first, while this process has not read the data set.
        """
        checks = [
            self._neighbour(kind, unit)
            for kind in REARRANGED[self.plan.adjacency]
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
            checks.append(SourceCheck("in reversed order", "not made", why=FIXED))
        if self.fresh is not self.source or workers_of(self.source):
            read = self._seen(View(with_workers(self.source, 2), self.n))
            checks.append(self._same("by two worker processes", read, "place", pairs))
        return checks

    def together(self) -> list[SourceCheck]:
        """Readings by this process, one after the other, with encoders that have been used."""
        size = _another(self.plan.batch_size, self.n)
        whole, pairs = View(self.source, self.n), list(enumerate(self.order))
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
                view = self._changed(self.fresh, unit, negative)
                seen = self._seen(view, self.plan.encoders())
                return self._judged(f"{name} after it was read", kind, seen, self.order, unit)
            if self.spare:
                return self._exchanged(unit, self.spare)
            return SourceCheck(name, "not made", why="there is no other unit to exchange it for")
        if not self.movable:
            return SourceCheck(name, "not made", why=FIXED)
        order = [record for record in self.order if record not in unit]
        seen = self._seen(self._arranged(order), self.plan.encoders())
        return self._judged(name, kind, seen, order, unit)

    def _blanked(self, unit: list[int]) -> SourceCheck:
        seen = self._seen(self._changed(self.source, unit, blank), self.plan.encoders())
        name = f"{self._called(unit)} blanked after it was read"
        return self._judged(name, "blanked", seen, self.order, unit, why="state")

    def _changed(
        self, source: ImageSource, unit: Sequence[int], change: Callable[[Batch, list[int]], None]
    ) -> ImageSource:
        """D, with the unit's rows changed after they were read."""
        places = [place for place, record in enumerate(self.order) if record in unit]
        return View(self._arranged(self.order, source), len(self.order), places, change)

    def _exchanged(self, unit: Sequence[int], spare: Sequence[int], what: str = "") -> SourceCheck:
        order = exchange(self.order, unit, spare)
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
        all_units = units_by_record(self.source.groups, self.n)
        unit = next(u for u in all_units if position in u)
        order = list(range(self.n))
        expected = self.source.num_images
        if kind == "left out":
            order = [record for record in order if record not in unit]
            expected -= len(units_of(self.source, position))
        if other.num_images != expected:
            raise ValueError(
                f"neighbour: it has {other.num_images} records, expected {expected} (source has "
                f"{self.source.num_images}, and under {self.plan.adjacency} adjacency the unit of "
                f"record {position} is {kind})."
            )
        base = self.base
        if self.spare or self.movable:  # the source as it stands, with the spare unit
            base = self._seen(View(self.fresh, self.n), self.plan.encoders())
        view = View(prepared(other, self.key, workers=1), len(order))
        seen = self._seen(view, self.plan.encoders())
        name = f"neighbour: record {position} {kind}"
        return self._judged(
            name, kind, seen, order, unit, base=base, base_order=range(self.n), why="neighbour"
        )

    def _judged(
        self,
        name: str,
        kind: str,
        seen: Seen,
        order: Sequence[int],
        unit: Sequence[int],
        *,
        base: Seen | None = None,
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
        limit = self.plan.delta(KINDS[kind]) / self.delta
        return self._compared(name, base, seen, pairs, limit, why or CAUSE[kind], "mixing")

    def _compared(
        self,
        name: str,
        one: Seen,
        other: Seen,
        pairs: Sequence[tuple[int, int]],
        limit: float,
        of_source: str,
        of_encoder: str,
    ) -> SourceCheck:
        rows = sum(one.rows[i] != other.rows[j] for i, j in pairs)
        shares = sum(one.shares[i] != other.shares[j] for i, j in pairs)
        moved = apart = None
        if other.sums:
            moved = sum(one.contributions[i] != other.contributions[j] for i, j in pairs)
            apart = distance(one.sums, other.sums) / self.delta
        too_far = apart is not None and apart > limit * (1 + _SLACK)
        why, missing = "", one.missing or other.missing
        if rows or moved or shares or too_far or missing:
            cause = of_source if rows else "groups" if shares else of_encoder if moved else "unit"
            why = WHY["missing" if missing else cause]
            if rows and of_source == "state" and not has_key(self.source):
                why = f"{why} {WHY['no key']}"
        return SourceCheck(
            name,
            "VIOLATED" if why else "holds",
            distance=apart,
            limit=limit if apart is not None else None,
            rows_moved=rows,
            moved=moved,
            compared=len(pairs),
            why=why,
        )

    def _same(
        self, name: str, seen: Seen, why: str, pairs: Sequence[tuple[int, int]]
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
                hashes += row_hashes(batch.images, batch.labels, batch.valid)
            rows.append(hashes)
        self.bar.update()
        moved = sum(a != b for a, b in zip(*rows, strict=False))
        moved += abs(len(rows[0]) - len(rows[1]))
        return SourceCheck(
            "part against batches",
            "VIOLATED" if moved else "holds",
            rows_moved=moved,
            compared=len(rows[1]),
            why=WHY[cause] if moved else "",
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
                why=WHY["in use"] if in_use else "",
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


def _twins(seen: Seen) -> int:
    rows = [row for row, valid in zip(seen.rows, seen.valid, strict=True) if valid]
    return len(rows) - len(set(rows))
