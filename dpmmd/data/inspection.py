"""What an inspection has found: for the data holder's eyes alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dpmmd.data.leftovers import listed

YOURS = (
    "For the data holder's eyes alone: what follows depends on private images, and no epsilon "
    "covers it. Show it to nobody, and do not choose published settings by it beyond what everyone "
    "may know."
)
NEXT = "A release of what is there, to be read before it is run:"
_SHOWN = 20  # lines of a row


@dataclass(frozen=True)
class Sizes:
    """Widths and heights: by the number of pixels the least, the middle and the greatest."""

    least: tuple[int, int]
    median: tuple[int, int]
    greatest: tuple[int, int]
    different: int
    commonest: Mapping[str, int]  # "64 x 48" -> images


@dataclass(frozen=True)
class Groups:
    """How many groups there are, and how many of each number of images."""

    by: str
    number: int
    largest: int
    sizes: Mapping[int, int]  # images -> groups


@dataclass(frozen=True)
class Inspection:
    """What was found in a source. For the data holder's eyes alone.

    Attributes:
        source: what was inspected.
        kind: what kind of source it is.
        records: the number of records N, those included that cannot be used.
        looked_at: the records whose headers (of a Dataset: items) were read.
        decoded: the records that were decoded, to find what cannot be used.
        labelled: whether there are labels.
        classes: records of each class, by its name; empty where there are no labels.
        sizes: None where no size could be read.
        modes: records of each mode as Pillow calls it, or of each type of an array.
        formats: records of each format.
        transparent: records with transparency, which is composed on a background.
        several_frames: records with several pictures, of which the first counts.
        unusable: records that contribute nothing, by reason, as far as they were looked at.
        passed_over: files and members that are no records, by reason.
        suspicions: what may be one image under two names, and is counted twice.
        groups: None without ``group_by``.
        refused: why a release with the options given would be refused.
        guesses: options that a release needs, with what was found there.
        command: a command line with these options.
    """

    source: str
    kind: str
    records: int
    looked_at: int
    decoded: int
    labelled: bool
    classes: Mapping[str, int]
    sizes: Sizes | None
    modes: Mapping[str, int]
    formats: Mapping[str, int]
    transparent: int
    several_frames: int
    unusable: Mapping[str, int]
    passed_over: Mapping[str, int]
    suspicions: Mapping[str, int]
    groups: Groups | None
    refused: tuple[str, ...]
    guesses: Mapping[str, str]
    command: str

    def facts(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        found = asdict(self)
        if self.groups is not None:
            found["groups"]["sizes"] = {str(size): n for size, n in self.groups.sizes.items()}
        return {"for": YOURS, **found}


def rows(found: Inspection) -> Iterator[tuple[str, str]]:
    """What to print: pairs of a name and a text, which may have several lines."""

    def several(counts: Mapping[Any, int]) -> str:
        lines = [f"{count:,} x {listed([str(what)])}" for what, count in counts.items()]
        return "\n".join([*lines[:_SHOWN], *(["..."] if len(lines) > _SHOWN else [])])

    yield "source", f"{listed([found.source])} ({found.kind})"
    yield "records", f"{found.records:,}"
    yield "looked at", f"{found.looked_at:,} headers or items; {found.decoded:,} records decoded"
    if found.classes:
        yield f"{len(found.classes)} classes", several(found.classes)
    else:
        yield "classes", "no labels"
    if found.sizes is not None:
        s = found.sizes
        ends = " to ".join(f"{w} x {h}" for w, h in (s.least, s.greatest))
        middle = f"{s.median[0]} x {s.median[1]}"
        yield "width x height", f"{ends}, {middle} in the middle; {s.different:,} different"
        yield "the commonest", several(s.commonest)
    yield "modes", several(found.modes) or "none could be read"
    yield "formats", several(found.formats) or "none could be read"
    if found.transparent:
        yield "transparent", f"{found.transparent:,}, composed on the background"
    if found.several_frames:
        yield "several pictures", f"{found.several_frames:,}, of which the first one counts"
    if found.groups is not None:
        g = found.groups
        groups = several({f"groups of {size:,}": number for size, number in g.sizes.items()})
        yield f"groups by {listed([g.by])}", f"{g.number:,}, the largest of {g.largest:,}\n{groups}"
    so_far = "" if found.decoded == found.records else " (as far as it was looked at)"
    yield f"unusable{so_far}", several(found.unusable) or "none"
    yield "passed over", several(found.passed_over) or "nothing"
    if found.suspicions:
        yield "counted twice?", several(found.suspicions)
    for problem in found.refused:
        yield "a release is refused", problem
    for option, why in found.guesses.items():
        yield f"guess: {option}", why
