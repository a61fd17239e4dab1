"""Outcomes of the checks of a pipeline, and what a data holder can do about each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Outcome = Literal["holds", "VIOLATED", "note", "not made"]


_KEEP_NOTHING = (
    "Keep nothing between items, draw from torch's, numpy's or random's global streams (which get "
    "a key for each record), and key a cache by the record's number."
)
WHY = {
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

FIXED = (
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
