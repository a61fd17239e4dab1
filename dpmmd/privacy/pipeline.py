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

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from tqdm import tqdm

from dpmmd.data import ImageSource, open_source
from dpmmd.encoders import Encoder
from dpmmd.privacy.layout import Asked, bound_of
from dpmmd.privacy.metadata import unit_of
from dpmmd.privacy.modes import Modes
from dpmmd.privacy.probes import Probes
from dpmmd.privacy.readings import Plan
from dpmmd.privacy.sensitivity import check_adjacency
from dpmmd.privacy.verdicts import SourceCheck

NOTICE = (
    "For the data holder's eyes alone: this check reads private records, and no epsilon covers "
    "what it says."
)
RECORDS = 256


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
    encoder: Encoder | None,
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
    modes: Modes | None = None,
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
            modes, batch_size: as for `dpmmd.release`.
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
        bound=bound_of(encoder, moments, bound, clip, joint_weight),
        num_classes=num_classes,
        weights=weights,
        pixel_moments=pixel_moments,
        selection=selection,
        shared_taps=shared_taps,
        modes=modes,
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
    plan = Plan.of(asked, images)
    if records is None:
        records = max(RECORDS, plan.batch_size + plan.batch_size // 4)
    with tqdm(desc="audit", unit="reading", disable=not progress) as bar:
        probes = Probes(images, plan, min(records, images.num_images), bar)
        checks = probes.apart()
        if other is not None and position is not None:
            checks.append(probes.against(other, position))
        checks += probes.together()
    return _found(images, asked, probes, checks)


def _found(
    images: ImageSource, asked: Asked, probes: Probes, checks: Sequence[SourceCheck]
) -> SourceAudit:
    distances = [c.distance for c in checks if c.distance is not None and (c.limit or 0) <= 1]
    return SourceAudit(
        notice=NOTICE,
        verdict="VIOLATED" if any(c.outcome == "VIOLATED" for c in checks) else "consistent",
        largest_distance=max(distances, default=0.0),
        adjacency=asked.adjacency,
        unit=unit_of(images.group_by),
        source=images.name,
        encoder="none" if asked.encoder is None else asked.encoder.name,
        records=probes.n,
        usable=probes.usable,
        batch_size=probes.plan.batch_size,
        checks=tuple(checks),
    )
