"""The spend: the last step before private images are read, and all that may still refuse.

Whatever fails up to here costs nothing. Then the release is written into its ledger, and only after
that is the first image read for it. So a release that is interrupted stays counted, and one that is
refused has looked at no image.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dpmmd._warn import warn
from dpmmd.data.look import check_source
from dpmmd.privacy.blocks import Raw
from dpmmd.privacy.composition import check_population, of_population
from dpmmd.privacy.layout import Layout
from dpmmd.privacy.ledger import Ledger
from dpmmd.privacy.metadata import Metadata, PrivacyError
from dpmmd.privacy.opening import Opened
from dpmmd.privacy.partial import PartialSums
from dpmmd.privacy.ranks import Ranks


@dataclass(frozen=True)
class Booking:
    """Where a release is written down.

    Attributes:
        ledger: whether it is, by the first rank.
        book: the ledger; None without one, and in the other ranks.
        population: of the ledger.
    """

    ledger: bool
    book: Ledger | None
    population: str | None


@dataclass(frozen=True, eq=False)
class Spent:
    """A release that is written down: now its images may be read.

    Attributes:
        line: of the ledger; None without one.
        numbers: of the batches that are this rank's.
        done: how many of them the sums hold already.
        steps: how many the rank with the most of them has still to read.
        store: where raw sums are kept, if the data holder named a folder.
    """

    line: str | None
    numbers: range
    done: int
    steps: int
    store: PartialSums | None


def refuse_unbooked(
    ledger: str | os.PathLike[str] | None,
    budget: tuple[float, float] | None,
    population: str | None,
) -> None:
    """Raises a ValueError where something is asked of a ledger, and there is none."""
    if budget is not None and ledger is None:
        raise ValueError(
            f"budget={budget!r}: needs ledger=FILE (--ledger FILE), which remembers what was spent."
        )
    if population is not None:
        check_population(population)
        if ledger is None:
            raise ValueError(
                f"population={population!r}: needs ledger=FILE (--ledger FILE), which remembers it."
            )


def spend(
    opened: Opened,
    layout: Layout,
    claim: Metadata,
    raw: Raw,
    booking: Booking,
    ranks: Ranks,
    partial_sums: str | os.PathLike[str] | None,
) -> Spent:
    """Takes up partial sums, tries what may fail, and writes the release down.

    The order is the point. The encoders see blank images first. All ranks must agree on what they
    do. The ledger is asked before a private image is decoded, so that a release which is refused
    looks at none. `check_source` is then the last that may speak of private records. When the spend
    is on disk every rank goes on; from here on no single record can raise, warn or log.

    Raw sums are filled from the folder for partial sums, and from nothing else: no noise was added
    to them, so that they told nobody anything, and the line that was spent for them still stands.

    Raises:
        PrivacyError: the ledger or the partial sums refuse.
        ValueError, TypeError: the ranks do not agree; `check_source` says why.
    """
    images, book = opened.images, booking.book
    settings = _settings(opened, layout, claim, booking)
    store, done, line = None, 0, None
    if partial_sums is not None:
        store = PartialSums(partial_sums, settings, ranks.rank, ranks.world)
        done, line = store.load(raw.all)
    if booking.ledger:
        _try_encoders(layout, opened.public.image_shape)
    groups = None if opened.sizes is None else opened.sizes.tolist()
    ranks.agree({**settings, "groups": groups, "ledger": booking.ledger})
    numbers = ranks.shard(images.num_batches(layout.batch_size))
    line = _one_line(ranks.gather(line), partial_sums)
    asked: dict[str, Any] = {}
    if book is not None and not (line and book.is_open(line)):
        asked = _asked(opened, claim, booking)
        book.check(**asked)  # a release that is refused looks at no image
        _warn_unwritten(claim, book, booking.population)
    ranks.gather(None)
    check_source(images, layout.batch_size)  # the last that may speak of private records
    if book is not None and asked:
        line = book.spend(**asked)
    line = ranks.gather(line)[0]  # nobody reads an image before it is written down
    steps = max(ranks.gather(len(numbers[done:])))
    return Spent(line, numbers, done, steps, store)


def _settings(
    opened: Opened, layout: Layout, claim: Metadata, booking: Booking
) -> dict[str, object]:
    """Everything that the sums depend on."""
    return {
        "version": claim.version,
        "identity": opened.images.identity,
        "encoder": claim.encoder,
        **claim.model_dump(),
        "batch_size": layout.batch_size,
        "images": opened.images.num_images,
        "population": booking.population,
    }


def _try_encoders(layout: Layout, image_shape: tuple[int, int, int]) -> None:
    """What fails on blank images must not cost anything."""
    with torch.inference_mode():
        for used in {id(used): used for used in layout.encoders.values()}.values():
            used(torch.zeros(layout.batch_size, *image_shape, device=layout.device))


def _warn_unwritten(claim: Metadata, book: Ledger, population: str | None) -> None:
    """Modes whose release the ledger does not count for these people: its totals then lack it."""
    if claim.modes is None or (origin := claim.modes.origin) is None:
        return
    entries = of_population(book.entries() if book.path.exists() else [], population)
    if origin.array_sha256 not in {entry.array_sha256 for entry in entries}:
        warn(
            f"modes: fitted to the release {origin.array_sha256[:12]}, which is not in the ledger, "
            "or there for another population, so that the ledger's totals and its budget leave it "
            "out. Keep both releases of the same people in one ledger, under one name."
        )


def _one_line(
    lines: Sequence[str | None], partial_sums: str | os.PathLike[str] | None
) -> str | None:
    """The line that was spent for the sums of all ranks."""
    spends = {line for line in lines if line is not None}
    if len(spends) > 1:
        raise PrivacyError(
            f"partial_sums={str(partial_sums)!r}: the processes' sums were spent for by different "
            "releases; delete the folder to start from the first image."
        )
    return spends.pop() if spends else None


def _asked(opened: Opened, claim: Metadata, booking: Booking) -> dict[str, Any]:
    """The arguments of `Ledger.spend`."""
    return {
        "identity": opened.images.identity,
        "source": opened.images.name,
        "mu": claim.mu,
        "epsilon": claim.epsilon,
        "delta": claim.delta,
        "adjacency": claim.adjacency,
        "unit": claim.unit,
        "private": claim.private,
        "population": booking.population,
    }
