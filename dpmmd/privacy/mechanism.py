"""The release: the one function that reads private images and returns something.

Claim: what `release` returns is (epsilon, delta)-DP with respect to its adjacency. The proof is its
seven steps, and their signatures say who may touch what.

1. open: a source of N records. What may be said of it is `Public`, apart from it (`opening`).
2. lay out: the vector that is released, as blocks; no image is seen (`blocks`, `layout`).
3. calibrate: sd = Delta / mu, from the blocks and the claim alone (`sensitivity`, `accounting`).
4. spend: what may fail fails, then the ledger has the release; no image was read (`spending`).
5. collect: image -> features -> bound -> integers -> certificate -> exact sums S. One unit moves S
   by at most Delta, whatever the encoder does. Nothing leaves (`collecting`, `sums`, `modes`).
6. noise: R = S + round(sd N(0, I)), drawn once. Since S is a vector of integers,

       S + round(X) = round(S + X)   for X ~ N(0, sd^2 I),

   so R is a function of the real-valued Gaussian mechanism's output S + X, and is as private:
   mu = Delta / sd exactly, in every dimension (`noising`, `noise`).
7. seal: a function of R and of what is public, which costs nothing (`metadata`, `release_file`).
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from dpmmd._version import __version__
from dpmmd._warn import warn
from dpmmd.encoders import Encoder
from dpmmd.files import expanded, refuse_full, refuse_unwritable
from dpmmd.privacy.accounting import Calibration, calibrate
from dpmmd.privacy.blocks import GRID, Blocks
from dpmmd.privacy.collecting import collect
from dpmmd.privacy.composition import refuse_unfounded
from dpmmd.privacy.layout import Asked, Layout, bound_of, lay_out
from dpmmd.privacy.ledger import Ledger
from dpmmd.privacy.metadata import Metadata, array_hash, unrecordable
from dpmmd.privacy.modes import Modes
from dpmmd.privacy.noise import rounded_gaussian
from dpmmd.privacy.noising import Noised, Sampler, noise
from dpmmd.privacy.opening import Public, open_images
from dpmmd.privacy.partial import PartialSums
from dpmmd.privacy.ranks import Ranks, in_all
from dpmmd.privacy.release_file import FURTHER, Release, UnsavedRelease, arrays_of, save_spent
from dpmmd.privacy.rows import LEAST
from dpmmd.privacy.sensitivity import check_adjacency, sensitivity
from dpmmd.privacy.spending import Booking, refuse_unbooked, spend
from dpmmd.privacy.sums import GRID_BITS

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@in_all
def release(
    source: Any,
    encoder: Encoder | None,
    *,
    epsilon: float,
    delta: float,
    adjacency: str,
    num_classes: int | None = None,
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
    out: str | os.PathLike[str] | None = None,
    ledger: str | os.PathLike[str] | None = None,
    budget: tuple[float, float] | None = None,
    population: str | None = None,
    partial_sums: str | os.PathLike[str] | None = None,
    progress: bool = True,
    process_group: ProcessGroup | None = None,
    insecure_test_noise: Sampler | None = None,
    **source_options: Any,
) -> Release:
    """Releases the noised class-conditional mean embedding of private images.

    The result, and everything computed from it, is (epsilon, delta)-differentially private with
    respect to ``adjacency``: whatever is published of it, nobody can tell much better than by
    guessing whether any one image (with its label) was in the data.

    Args:
        source: private images: a torch Dataset of (image, label), a path (.npz with x and y, an
            image folder, parquet), the name of a data set, or a `dpmmd.data.ImageSource`. Code of
            your own that makes images can tie records together: try `dpmmd.privacy.audit_source`.
        encoder: the frozen public encoder, from `dpmmd.encoders.load`. None: no features, but the
            moments of pixels alone (``pixel_moments``), such as `dpmmd.modes.fit` reads.
        epsilon: > 0.
        delta: in (0, 1), below 1 / N to mean anything.
        adjacency: ``"replace-one"`` (one image exchanged; N public), ``"zero-out"`` (one image
            replaced by one that contributes nothing, as one that cannot be decoded does, but a
            black one does not; N public) or ``"add-remove"`` (one image more or less; N private).
        num_classes: K, for a class-conditional release; labels are private. It is a public fact
            about the task, not read from the data. None: unlabelled, labels are left out of the
            release.
        moments: ``(1,)``, ``(2,)`` or ``(1, 2)``, as in `dpmmd.functional.mean_embedding`.
        bound, clip, joint_weight: likewise.
        weights: what one image may contribute to each block of the released vector, in (0, 1],
            relative to the others: more weight, less noise on that block and more on the rest.
            Default: 1 for "phi1", "phi2" (or "phi1+phi2"), 0.7 for "pixels" and "products", 0.25
            for "selection", 0.1 for "counts", 0 for "class_products". "products" and
            "class_products" are left out where their weight is 0.
            See `dpmmd.privacy.optimal_weights`.
        pixel_moments: further blocks, "pixels" and "products": noised means of the pixels, class by
            class, and of all their products, over all classes, of the images brought to this side;
            "class_products", with a weight, are products class by class. Generated images can be
            aligned with them (`dpmmd.align`).
        selection: an encoder of its own for a further block: noised class means by which training
            picks its best checkpoint without looking at private data.
        shared_taps: hybrid taps: the first (shallow) so many of the encoder's taps are summed over
            all classes, with that much less noise, and the others class by class (Harder et al.
            2023, section 4). Needs ``num_classes``; the generator's labels should then come in the
            proportions of the data.
        modes: a rule that splits every class into C modes, from `dpmmd.modes.fit` of an earlier
            release of the same data, or public. Features, counts and the selection block are then
            summed by class and mode, in K C rows; pixel moments stay by class. What is released
            together with that earlier release is stated for both: their mu^2 add up.
        batch_size: images a step; no effect on the result beyond the encoder's rounding. None: as
            many as fit into `BATCH_MEMORY` (on a GPU: an eighth of its memory), at most 256.
        out: also save the release there; an existing file is refused before any image is read.
        ledger: file that remembers what was spent of these people's data, from whatever source
            (`dpmmd.privacy.Ledger`). The spend is recorded before any image is read; what fails
            later stays counted.
        budget: (epsilon, delta) that all releases in ``ledger`` together must keep to.
        population: a name under which you declare that nobody in this source has data in another
            population of ``ledger``: those then do not count for this one. None: all of it counts.
        partial_sums: a folder for raw sums, so that an interrupted release goes on where it was
            when called again with the same arguments. The folder is made (mode 0700), warned
            about, and deleted when the release is done. None: nothing raw is ever written.
        progress: show a progress bar on standard error (none where the number of images is private:
            under add-remove adjacency, or with ``group_by``).
        process_group: of torch.distributed: its processes read a shard of the images each, and make
            one release together (`dpmmd.privacy.ranks`). All are called with the same arguments;
            the first one keeps the ledger, draws the noise and writes ``out``. The released
            integers before their noise are those of one process. None: this process alone.
        insecure_test_noise: for tests only: a function (n, sd) -> int64 [n] in place of the exact
            sampler. The release is stamped NOT PRIVATE.
        **source_options: passed to `dpmmd.data.open_source` (split, image_size, channels, crop,
            ...). ``group_by`` makes all images of a group, e.g. a patient, the unit of privacy:
            "image" reads "group" above, N is the number of groups, and an image of a group of g
            contributes 1 / g of what an image on its own would.

    Returns:
        The `Release`.

    Raises:
        ValueError, TypeError: an argument out of range; labels outside 0..K-1; an empty data set
            (not under add-remove); a data set of which a first look finds nothing usable, or whose
            records depend on each other (`dpmmd.data.look`).
        FileExistsError: ``out`` exists.
        OSError: ``out`` cannot be written, or its disk has no room; before anything is spent.
        UnsavedRelease: after the spend, ``out`` could not be written all the same. The release is
            in another file, which the message names, and in the exception's ``release``.
        PrivacyError: the ledger was damaged or edited, the budget does not allow the release,
            ``partial_sums`` cannot be used, or ``modes`` come from a release with which no total
            can be stated.
        RuntimeError: ``process_group`` is not initialised, or another of its processes failed:
            then all fail, and nothing is released.

    Warns:
        UserWarning: delta > 1 / N, which allows to publish somebody's image outright; many of the
            records that a first look reads are not usable; the noised counts are far below N; so
            many modes that most will not stand out from the noise, or whose release is not in
            ``ledger``.
    """
    if isinstance(encoder, str):
        raise TypeError(f"encoder={encoder!r}: expected dpmmd.encoders.load({encoder!r}).")
    ranks = Ranks(process_group)
    target = None if out is None or ranks.rank else expanded(out)
    if target is not None:
        refuse_unwritable(target, others=(ledger, partial_sums))
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
    refuse_unbooked(ledger, budget, population)
    level = calibrate(epsilon=epsilon, delta=delta)
    book = None if ledger is None or ranks.rank else Ledger(ledger, budget=budget)
    booking = Booking(ledger is not None, book, population)
    if private := insecure_test_noise is None:
        _warn_alone(process_group)

    opened = open_images(
        source, num_classes=num_classes, public_n=asked.public_n, options=source_options
    )
    public = opened.public
    if public.num_units is not None:
        _warn_delta(delta, public.num_units)
    layout = lay_out(asked, public.image_shape, grouped=opened.sizes is not None)
    scale = _calibrated(level, adjacency, layout.blocks)
    raw = layout.blocks.zero(layout.device)
    claim = _claim(asked, layout, scale, public, float(epsilon), float(delta), private)
    if target is not None:
        refuse_full(target, 8 * sum(block.size for block in claim.blocks) + (1 << 20))
    _warn_crowded(claim)
    spent = spend(opened, layout, claim, raw, booking, ranks, partial_sums)
    shown = progress and public.num_units is not None and opened.sizes is None and ranks.rank == 0
    collect(opened, layout, raw, spent, ranks, progress=shown)
    with _forgotten(spent.store):
        if ranks.rank:
            return _everywhere(ranks, None, modes)
        sampler = insecure_test_noise or rounded_gaussian
        noised = noise(raw, layout.blocks, scale.sd, sampler)
        sealed = _sealed(noised, claim, modes, book, spent.line, target)
        return _everywhere(ranks, sealed, modes)


@dataclass(frozen=True)
class _Scale:
    """How much noise: Delta and sd in grid units, and mu = Delta / sd."""

    sensitivity: float
    sd: float
    mu: float


def _calibrated(level: Calibration, adjacency: str, blocks: Blocks) -> _Scale:
    """The noise that a claim needs: mu-GDP with the least mu that (epsilon, delta) allows.

    It sees the blocks and the claim, and no data. So sd is the same number for neighbouring data
    sets, and mu = Delta / sd is what a Gaussian mechanism of sensitivity Delta promises.
    """
    moved = sensitivity(adjacency, blocks.all())  # Delta, in grid units
    return _Scale(moved, level.sd_over_sensitivity * moved, level.mu)


def _claim(
    asked: Asked,
    layout: Layout,
    scale: _Scale,
    public: Public,
    epsilon: float,
    delta: float,
    private: bool,
) -> Metadata:
    """All that the release will say of itself, but for the hash of its arrays.

    It is written before an image is read, from what was asked for and what is `Public`. So none of
    it depends on the images, nor, under add-remove adjacency, on their number.

    Raises:
        ValueError: the source or the encoder says of itself what no file can hold.
        PrivacyError: the release and the origin of its modes have no total.
    """
    specs = {name: used.spec() for name, used in layout.encoders.items()}
    bound = asked.bound
    claim = Metadata(
        version=__version__,
        private=private,
        adjacency=asked.adjacency,
        unit=public.unit,
        epsilon=epsilon,
        delta=delta,
        mu=scale.mu,
        sd=scale.sd,
        sensitivity=scale.sensitivity,
        noise_sd=scale.sd / GRID * bound.clip,
        grid_bits=GRID_BITS,
        moments=bound.moments,
        bound=bound.kind,
        clip=bound.clip,
        joint_weight=None if bound.joint_weight is None else float(bound.joint_weight),
        blocks=layout.blocks.records(),
        num_classes=layout.blocks.classes,
        labelled=layout.labelled,
        class_names=public.class_names,
        num_units=public.num_units,
        image_shape=public.image_shape,
        source=public.name.encode("utf-8", "replace").decode(),  # need not be UTF-8
        encoder=specs.get("encoder"),
        pixel_encoder=specs.get("pixel_encoder"),
        selection_encoder=specs.get("selection_encoder"),
        shared_taps=asked.shared_taps,
        decoding=None if public.decoding is None else dict(public.decoding),
        modes=None if layout.modes is None else layout.modes.record,
    )
    refuse_unfounded(claim)
    for field, value, expected in unrecordable(claim):
        raise ValueError(
            f"{field} = {value!r}: expected {expected}; no release could be read that says so. "
            "Give the source or the encoder one that can be recorded. Nothing was spent."
        )
    return claim


def _sealed(
    noised: Noised,
    claim: Metadata,
    modes: Modes | None,
    book: Ledger | None,
    line: str | None,
    target: Path | None,
) -> Release:
    """The release, confirmed in the ledger and saved: a function of noised numbers and the claim.

    It sees no image and no sum. So whatever it computes, says or writes is as private as R: the
    divisors and the warnings follow from the noised counts. Counts of modes stay as they were
    noised, below 1 too: what is merged of them (`rows`) has the sum of them. The ledger has the
    hash of the arrays before anything leaves.
    """
    if noised.counts is None:
        assert claim.num_units is not None  # N is public, or there are noised counts
        counts = torch.tensor([float(claim.num_units)], dtype=torch.float64)
    else:
        counts = noised.counts.clamp(min=1.0) if modes is None else noised.counts
        if claim.num_units is None:
            _warn_delta(claim.delta, int(counts.sum()))
        else:
            unit = claim.sd / (claim.blocks[-1].bound * GRID)
            sd = unit * math.sqrt(claim.num_cells)
            _warn_few(float(noised.counts.sum()), claim.num_units, sd)
    arrays = {name: noised.arrays.get(name) for name in FURTHER}
    digest = array_hash(noised.arrays["sums"], counts, *arrays.values())
    metadata = claim.model_copy(update={"array_sha256": digest})
    result = Release(noised.arrays["sums"], counts, metadata, **arrays, modes=modes)
    if book is not None and line is not None:
        book.confirm(line, digest)
    if target is not None:
        save_spent(result, target)
    return result


def _everywhere(ranks: Ranks, result: Release | None, modes: Modes | None) -> Release:
    """Rank 0's release, in all ranks; they have agreed on the modes."""
    told = None
    if result is not None:
        arrays = {name: array for name, array in arrays_of(result).items() if array is not None}
        told = result.metadata.model_dump(), arrays
    facts, found = ranks.share(told)
    return result or Release(metadata=Metadata.model_validate(facts), **found, modes=modes)


@contextlib.contextmanager
def _forgotten(store: PartialSums | None) -> Iterator[None]:
    """Deletes raw sums once their release is there: it left, or is in a file all the same."""
    try:
        yield
    except UnsavedRelease as error:
        if store is not None and error.saved is not None:
            store.delete()
        raise
    if store is not None:
        store.delete()


def _warn_alone(group: ProcessGroup | None) -> None:
    """A second release where one was meant: the noises of two can be averaged."""
    if group is None and dist.is_available() and dist.is_initialized() and dist.get_rank():
        warn(
            f"process_group=None: the process with rank {dist.get_rank()} makes a release of its "
            "own, with noise of its own, which counts by itself. For one release by all of them "
            "give process_group=torch.distributed.group.WORLD, or release in rank 0 alone."
        )


def _warn_few(counted: float, num_units: int, sd: float) -> None:
    """Says from the noised counts alone that many units contributed nothing."""
    if counted < 0.9 * num_units - 4 * sd:
        warn(
            f"the noised class counts add up to {max(counted, 0):.0f} of N = {num_units} (noise "
            f"of sd {sd:.3g}): many images contributed nothing. They could not be decoded, have "
            "values outside [0, 1], or no label of 0..num_classes-1. `dpmmd inspect` says which."
        )


def _warn_crowded(claim: Metadata) -> None:
    """Says before the spend that most modes will be merged, where N is public."""
    if claim.modes is None or claim.num_units is None:
        return
    least = max(LEAST, claim.needed)
    by_class = claim.num_units / claim.num_classes
    if by_class / claim.per_class < least:
        fitting = 1 << max(0, math.floor(math.log2(max(1.0, by_class / least))))
        advice = f"at most {fitting} a class do" if fitting > 1 else "leave them out"
        warn(
            f"modes: {claim.per_class} a class leave {by_class / claim.per_class:.0f} of N = "
            f"{claim.num_units} to a mode on average, and at this epsilon a mode needs {least:.0f} "
            f"to stand out from the noise, so that many will be merged; {advice}."
        )


def _warn_delta(delta: float, num_units: int) -> None:
    if delta * num_units > 1:
        warn(
            f"delta={delta:g} is above 1 / N (about {1 / num_units:.2g}): such a guarantee allows "
            "to publish somebody's image outright. Use a smaller delta."
        )
