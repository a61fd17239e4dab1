"""The release: the one function that reads private images and returns something.

Per image: features -> bound -> integers -> certificate (`sums`); per class exact int64 sums S; then
once R = S + round(sd N(0, I)) with the exact sampler (`noise`). Since S is a vector of integers,

    S + round(X) = round(S + X)   for X ~ N(0, sd^2 I),

so R is a function of the real-valued Gaussian mechanism's output S + X, and is as private:
mu = Delta / sd exactly, in every dimension, with Delta from `sensitivity` in the same grid units.
"""

from __future__ import annotations

import itertools
import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dpmmd._memory import return_freed_memory
from dpmmd.bounds import Bound
from dpmmd.encoders.pixels import pixel_moments as pixels_of
from dpmmd.files import expanded, refuse_full, refuse_unwritable
from dpmmd.privacy.accounting import calibrate
from dpmmd.privacy.ledger import Ledger, check_population
from dpmmd.privacy.metadata import (
    BlockRecord,
    Metadata,
    PrivacyError,
    array_hash,
    unit_of,
    unrecordable,
)
from dpmmd.privacy.noise import rounded_gaussian
from dpmmd.privacy.partial import PartialSums
from dpmmd.privacy.ranks import Ranks, in_all
from dpmmd.privacy.release_file import Release, UnsavedRelease, arrays_of, save_spent
from dpmmd.privacy.sensitivity import Block, check_adjacency, sensitivity
from dpmmd.privacy.sums import GRID_BITS, PrivateSums

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from dpmmd.data import Batch, ImageSource
    from dpmmd.encoders import Encoder

GRID = 1 << GRID_BITS
BATCH_MEMORY = 1 << 30  # bytes of pixels and features that a release holds at once, by default
Sampler = Callable[[int, float], np.ndarray]  # n, sd -> int64 [n]
# What one image may contribute to a block, relative to 2^30. Beside signed sums under replace-one
# the counts are free; elsewhere 0.1 adds 0.5 % to the noise, and class counts get noise of about 53
# images at epsilon = 1. A selection block of 0.25 adds 3 %.
WEIGHTS = {"phi1": 1.0, "phi2": 1.0, "phi1+phi2": 1.0}
WEIGHTS |= {"pixels": 0.7, "products": 0.7, "class_products": 0.0, "selection": 0.25, "counts": 0.1}
PRODUCTS = ("products", "class_products")  # may have the weight 0: left out


@dataclass(frozen=True)
class _Part:
    """A block of sums and what is summed in it."""

    block: Block
    encoder: Encoder
    moments: tuple[int, ...]
    joint_weight: float
    bound: str
    clip: float
    shared_taps: int

    @property
    def pooled(self) -> bool:
        """Whether all of it is summed over all classes."""
        return self.block.name == "products"

    @property
    def products(self) -> bool:
        """Whether products are summed."""
        return self.block.name in PRODUCTS

    def zero(self, classes: int, device: torch.device) -> PrivateSums:
        """Sums of no image."""
        if self.products:
            d = self.encoder.dim
            return PrivateSums(d if self.pooled else classes * d, d, device=device)
        return PrivateSums(classes, self.dim, self.shared, device)

    @property
    def shared(self) -> int:
        """Numbers that all classes share."""
        if self.products:
            return self.encoder.dim * (self.encoder.dim + 1) // 2 if self.pooled else 0
        taps = self.encoder.taps[: self.shared_taps]
        return sum(tap.size for tap in taps) * len(self.moments)

    @property
    def dim(self) -> int:
        """Columns of a class."""
        if self.products:
            return 0 if self.pooled else self.encoder.dim * (self.encoder.dim + 1) // 2
        return self.encoder.dim * len(self.moments) - self.shared

    @property
    def unit(self) -> float:
        """What one grid unit is worth in the released sums."""
        return self.clip / self.block.bound


@in_all
def release(
    source: Any,
    encoder: Encoder,
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
        encoder: the frozen public encoder, from `dpmmd.encoders.load`.
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
        PrivacyError: the ledger was damaged or edited, the budget does not allow the release, or
            ``partial_sums`` cannot be used.
        RuntimeError: ``process_group`` is not initialised, or another of its processes failed:
            then all fail, and nothing is released.

    Warns:
        UserWarning: delta > 1 / N, which allows to publish somebody's image outright; many of the
            records that a first look reads are not usable; the noised counts are far below N.
    """
    import dpmmd
    from dpmmd.data import open_source, prefetch
    from dpmmd.data.look import check_source

    if isinstance(encoder, str):
        raise TypeError(f"encoder={encoder!r}: expected dpmmd.encoders.load({encoder!r}).")
    ranks = Ranks(process_group)
    target = None if out is None or ranks.rank else expanded(out)
    if target is not None:
        refuse_unwritable(target, others=(ledger, partial_sums))
    check_adjacency(adjacency)
    moments = (moments,) if isinstance(moments, int) else tuple(moments)
    Bound.checked(moments, bound, clip, joint_weight)
    _check(num_classes, batch_size, shared_taps, len(encoder.taps), clip)
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
    noise_level = calibrate(epsilon=epsilon, delta=delta)
    book = None if ledger is None or ranks.rank else Ledger(ledger, budget=budget)
    private = insecure_test_noise is None
    if private:
        _warn_alone(process_group)
    labelled, public_n = num_classes is not None, adjacency != "add-remove"

    images = open_source(
        source, num_classes=num_classes, allow_empty=not public_n, **source_options
    )
    sizes = _group_sizes(images)
    num_units = images.num_images if images.groups is None else len(images.groups.unique())
    if public_n:
        _warn_delta(delta, num_units)
    device = next((p.device for p in encoder.parameters()), torch.device("cpu"))
    pixel_encoder = None
    if pixel_moments is not None:
        pixel_encoder = pixels_of(pixel_moments, images.image_shape[0]).to(device)
    parts, counts_block = _blocks(
        encoder,
        pixel_encoder,
        selection,
        moments,
        joint_weight,
        bound,
        clip,
        weights,
        shared_taps,
        with_counts=labelled or not public_n,
        grouped=sizes is not None,
    )
    blocks = [part.block for part in parts] + ([counts_block] if counts_block else [])
    classes = num_classes or 1
    moved = sensitivity(adjacency, blocks)  # Delta, in grid units
    sd = noise_level.sd_over_sensitivity * moved

    sizes = None if sizes is None else sizes.to(device)
    raw = [part.zero(classes, device) for part in parts]
    raw_counts = None if counts_block is None else PrivateSums(classes, 1, device=device)
    held = raw if raw_counts is None else [*raw, raw_counts]
    encoders = {id(part.encoder): part.encoder for part in parts}
    if batch_size is None:
        batch_size = _batch_size(images.image_shape, list(encoders.values()), device)
    metadata = Metadata(
        version=dpmmd.__version__,
        private=private,
        adjacency=adjacency,
        unit=unit_of(images.group_by),
        epsilon=float(epsilon),
        delta=float(delta),
        mu=noise_level.mu,
        sd=sd,
        sensitivity=moved,
        noise_sd=sd / GRID * clip,
        grid_bits=GRID_BITS,
        moments=moments,
        bound=bound,
        clip=float(clip),
        joint_weight=None if joint_weight is None else float(joint_weight),
        blocks=tuple(_record(p.block, classes * p.dim, p.shared) for p in parts)
        + (() if counts_block is None else (_record(counts_block, classes, 0),)),
        num_classes=classes,
        labelled=labelled,
        class_names=tuple(images.class_names) if labelled and images.class_names else None,
        num_units=num_units if public_n else None,
        image_shape=images.image_shape,
        source=images.name.encode("utf-8", "replace").decode(),  # need not be UTF-8
        encoder=encoder.spec(),
        pixel_encoder=None if pixel_encoder is None else pixel_encoder.spec(),
        selection_encoder=None if selection is None else selection.spec(),
        shared_taps=shared_taps,
        decoding=None if images.decoding is None else dict(images.decoding),
    )
    for field, value, expected in unrecordable(metadata):
        raise ValueError(
            f"{field} = {value!r}: expected {expected}; no release could be read that says so. "
            "Give the source or the encoder one that can be recorded. Nothing was spent."
        )
    if target is not None:
        refuse_full(target, 8 * sum(block.size for block in metadata.blocks) + (1 << 20))
    store, done, spend = None, 0, None
    settings = {
        "version": metadata.version,
        "identity": images.identity,
        "encoder": encoder.spec(),
        **metadata.model_dump(),
        "batch_size": batch_size,
        "images": images.num_images,
        "population": population,
    }
    if partial_sums is not None:
        store = PartialSums(partial_sums, settings, ranks.rank, ranks.world)
        done, spend = store.load(held)
    if ledger is not None:
        with torch.inference_mode():  # what fails on blank images must not cost anything
            for used in encoders.values():
                used(torch.zeros(batch_size, *images.image_shape, device=device))
    groups = None if sizes is None else sizes.tolist()
    ranks.agree({**settings, "groups": groups, "ledger": ledger is not None})
    numbers = ranks.shard(images.num_batches(batch_size))
    first, numbers = numbers.start, numbers[done:]
    spends = {spent for spent in ranks.gather(spend) if spent is not None}
    if len(spends) > 1:
        raise PrivacyError(
            f"partial_sums={str(partial_sums)!r}: the processes' sums were spent for by different "
            "releases; delete the folder to start from the first image."
        )
    spend = spends.pop() if spends else None
    asked: dict[str, Any] = {}
    if book is not None and not (spend and book.is_open(spend)):
        asked = {
            "identity": images.identity,
            "source": images.name,
            "mu": noise_level.mu,
            "epsilon": epsilon,
            "delta": delta,
            "adjacency": adjacency,
            "unit": metadata.unit,
            "private": private,
            "population": population,
        }
        book.check(**asked)  # a release that is refused looks at no image
    ranks.gather(None)
    check_source(images, batch_size)  # the last that may speak of private records
    if book is not None and asked:
        spend = book.spend(**asked)
    spend = ranks.gather(spend)[0]  # nobody reads an image before it is written down
    steps = max(ranks.gather(len(numbers)))
    bar = tqdm(
        total=done + len(numbers),
        initial=done,
        desc="release",
        unit="batch",
        disable=not (progress and public_n and sizes is None and ranks.rank == 0),
    )
    whole = True  # whether the sums are those of whole batches
    try:
        own = itertools.islice(images.part(batch_size, numbers), len(numbers))
        batches = prefetch(own, device)
        with closing(batches), bar, torch.inference_mode():
            for batch in ranks.paced(batches, steps):
                start = (first + done) * batch_size
                records = images.num_images - start  # rows after them are padding
                pixels, labels, valid = _harmless(
                    batch, batch_size, classes, labelled, device, records
                )
                share = _shares(sizes, start, batch_size, device)
                features = _features(encoders, pixels)
                whole = False
                _add(parts, raw, counts_block, raw_counts, features, labels, valid, share)
                done, whole = done + 1, True
                del batch, pixels, labels, valid, features
                bar.update()
                if store is not None:
                    store.store_if_due(done, spend, held)
    except BaseException:
        if store is not None and whole:
            store.store(done, spend, held)
        raise

    for one in held:
        one.reduce(ranks)
    if ranks.rank:
        return _done(_everywhere(ranks, None), store)
    sampler = insecure_test_noise or rounded_gaussian
    noised = {
        part.block.name: (_noised_products if part.products else _noised)(
            sums, sd, sampler, part.unit
        )
        for part, sums in zip(parts, raw, strict=True)
    }  # [K, D] and [1, D'] each; [K, 2 D] and [1, 2 D'] for a joint block; [K, d, d] for products
    chosen, of_pixels, products, class_products = (
        noised.pop(name)[0] if name in noised else None
        for name in ("selection", "pixels", *PRODUCTS)
    )
    products = None if products is None else products[0]
    released = list(noised.values())
    if joint_weight is not None:
        halves = [values.chunk(2, dim=1) for values in released[0]]
        released = [(sums, shared) for sums, shared in zip(*halves, strict=True)]
    sums_out = torch.stack([sums for sums, _ in released]).float().contiguous()  # [M, K, D]
    shared_out = torch.stack([shared for _, shared in released]).float() if shared_taps else None
    if raw_counts is not None and counts_block is not None:
        noisy = _noised(raw_counts, sd, sampler, 1 / counts_block.bound, torch.float64)[0][:, 0]
        counts = noisy.clamp(min=1.0)
        if not public_n:
            _warn_delta(delta, int(counts.sum()))
        else:
            _warn_few(float(noisy.sum()), num_units, sd / counts_block.bound * math.sqrt(classes))
    else:
        counts = torch.tensor([float(num_units)], dtype=torch.float64)

    further = (chosen, shared_out, of_pixels, products, class_products)  # as in FURTHER
    digest = array_hash(sums_out, counts, *further)
    metadata = metadata.model_copy(update={"array_sha256": digest})
    result = Release(sums_out, counts, metadata, *further)
    if book is not None and spend is not None:
        book.confirm(spend, digest)
    if target is not None:
        try:
            save_spent(result, target)
        except UnsavedRelease as error:
            if error.saved is not None:
                _done(result, store)
            raise
    return _done(_everywhere(ranks, result), store)


def _everywhere(ranks: Ranks, result: Release | None) -> Release:
    """Rank 0's release, in all ranks."""
    told = None
    if result is not None:
        arrays = {name: array for name, array in arrays_of(result).items() if array is not None}
        told = result.metadata.model_dump(), arrays
    facts, found = ranks.share(told)
    return result or Release(metadata=Metadata.model_validate(facts), **found)


def _done(result: Release, store: PartialSums | None) -> Release:
    if store is not None:
        store.delete()
    return result


def _features(encoders: Mapping[int, Encoder], pixels: Tensor) -> dict[int, list[Tensor]]:
    """Of each encoder, one [n, d_l] per tap."""
    return {
        key: [f.permute(0, 2, 3, 1).flatten(1) for f in used(pixels)]
        for key, used in encoders.items()
    }


def _add(
    parts: Sequence[_Part],
    raw: Sequence[PrivateSums],
    counts_block: Block | None,
    raw_counts: PrivateSums | None,
    features: Mapping[int, Sequence[Tensor]],
    labels: Tensor,
    valid: Tensor,
    share: Tensor,
) -> None:
    """Adds what a batch contributes to the sums of every block."""
    for part, sums in zip(parts, raw, strict=True):
        limits = int(part.block.bound) // share
        if part.products:
            rows = torch.zeros_like(labels) if part.pooled else labels
            sums.add_products(features[id(part.encoder)][0], rows, valid, limits)
            continue
        sums.add(
            features[id(part.encoder)],
            labels,
            valid,
            limits,
            bound=Bound(part.moments, part.bound, part.clip, part.joint_weight),
            nonnegative=part.block.nonnegative,
            shared_taps=part.shared_taps,
        )
    if raw_counts is not None and counts_block is not None:
        raw_counts.add_counts(labels, valid, int(counts_block.bound) // share)


def _batch_size(
    image_shape: tuple[int, int, int], encoders: Sequence[Encoder], device: torch.device
) -> int:
    """Images a step, so that pixels (read ahead: four batches) and features fit into memory."""
    numbers = 4 * math.prod(image_shape) + 3 * sum(encoder.dim for encoder in encoders)
    memory = BATCH_MEMORY
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory // 8
    return max(1, min(256, memory // (4 * numbers)))


def _check(
    num_classes: int | None, batch_size: int | None, shared_taps: int, taps: int, clip: float
) -> None:
    if num_classes is not None and (not isinstance(num_classes, int) or num_classes < 1):
        raise ValueError(f"num_classes={num_classes!r}: expected None or an int >= 1.")
    if batch_size is not None and (not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size={batch_size!r}: expected None or an int >= 1.")
    if type(shared_taps) is not int or not 0 <= shared_taps < taps:
        raise ValueError(
            f"shared_taps={shared_taps!r}: expected how many of the encoder's first taps all "
            f"classes share, 0 to {taps - 1} of {taps}."
        )
    if not 2.0**-60 <= clip <= 2.0**60:
        raise ValueError(f"clip={clip!r}: expected a norm that float32 sums hold, 2^-60 to 2^60.")
    if shared_taps and num_classes is None:
        raise ValueError(f"shared_taps={shared_taps}: needs num_classes, classes that share them.")


def _blocks(
    encoder: Encoder,
    pixels: Encoder | None,
    selection: Encoder | None,
    moments: tuple[int, ...],
    joint_weight: float | None,
    bound: str,
    clip: float,
    weights: Mapping[str, float] | None,
    shared_taps: int,
    *,
    with_counts: bool,
    grouped: bool,
) -> tuple[list[_Part], Block | None]:
    """The blocks of sums (pixels, products, selection last) and that of counts, if there is one."""
    groups = [moments] if joint_weight is not None else [(m,) for m in moments]
    names = ["+".join(f"phi{m}" for m in group) for group in groups]
    weights = dict(weights or {})
    if pixels is not None:
        names += ["pixels", *(n for n in PRODUCTS if weights.get(n, WEIGHTS[n]) != 0)]
        weights = {n: w for n, w in weights.items() if w != 0 or n not in PRODUCTS}
    names += ["selection"] * (selection is not None) + ["counts"] * with_counts
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(f"weights: unknown block {name!r}, this release has {names}.")
        if not 2.0**-20 <= weight <= 1.0:
            raise ValueError(f"weights[{name!r}]={weight!r}: expected a number in [2^-20, 1].")

    def block(name: str, kind: str, nonnegative: bool, spread: bool = False) -> Block:
        limit = float(round(weights.get(name, WEIGHTS[name]) * GRID))
        return Block(name, kind, limit, nonnegative, grouped or spread)

    parts = []
    for name, group in zip(names, groups, strict=False):
        sums = block(name, "sums", group == (2,) or _nonnegative(encoder), shared_taps > 0)
        weight = joint_weight or 1.0
        parts.append(_Part(sums, encoder, group, weight, bound, clip, shared_taps))
    if pixels is not None:
        sums = block("pixels", "sums", _nonnegative(pixels))
        parts.append(_Part(sums, pixels, (1,), 1.0, "sphere", 1.0, 0))
        for name in PRODUCTS:
            if name in names:
                sums = block(name, "sums", True, name == "products")
                parts.append(_Part(sums, pixels, (1,), 1.0, "sphere", 1.0, 0))
    if selection is not None:
        sums = block("selection", "sums", _nonnegative(selection))
        parts.append(_Part(sums, selection, (1,), 1.0, "sphere", 1.0, 0))
    return parts, block("counts", "counts", False) if with_counts else None


def _record(block: Block, by_class: int, shared: int) -> BlockRecord:
    return BlockRecord(
        name=block.name,
        kind="counts" if block.kind == "counts" else "sums",
        bound=block.bound / GRID,
        nonnegative=block.nonnegative,
        spread=block.spread,
        size=by_class + shared,
        shared=shared,
    )


def _group_sizes(images: ImageSource) -> Tensor | None:
    """int64 [N]: how many images the group of each has; None where every image is a unit."""
    if images.groups is None:
        return None
    if images.groups.dtype != torch.int64 or images.groups.shape != (images.num_images,):
        raise ValueError(
            f"source {images.name!r}: groups are {images.groups.dtype} "
            f"{list(images.groups.shape)}, expected int64, one for each of its images."
        )
    return torch.bincount(images.groups)[images.groups]


def _shares(sizes: Tensor | None, start: int, batch_size: int, device: torch.device) -> Tensor:
    """int64 [B]: among how many images each one's bound is shared; 1 for padding."""
    shares = torch.ones(batch_size, dtype=torch.int64, device=device)
    if sizes is not None:
        part = sizes[start : start + batch_size]
        shares[: len(part)] = part
    return shares


def _nonnegative(encoder: Encoder) -> bool:
    return all(tap.sign == "nonnegative" for tap in encoder.taps)


def _harmless(
    batch: Batch, batch_size: int, classes: int, labelled: bool, device: torch.device, records: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, labels and validity such that nothing after it can raise because of one image.

    Rows from ``records`` on are none of the data set's N records, whatever the source says. A
    batch that is short is filled up, for the last bits of an encoder's features depend on how many
    rows it is given, and with it on N.
    """
    pixels, labels, valid = (t.to(device) for t in (batch.images, batch.labels, batch.valid))
    if missing := batch_size - len(pixels):
        pixels = F.pad(pixels, (0, 0) * 3 + (0, missing))
        labels, valid = F.pad(labels, (0, missing)), F.pad(valid, (0, missing))
    if not labelled:
        labels = torch.zeros_like(labels)
    valid = valid & (torch.arange(batch_size, device=device) < records)
    valid = valid & (labels >= 0) & (labels < classes)
    valid = valid & ((pixels >= 0) & (pixels <= 1)).flatten(1).all(dim=1)  # NaN is neither
    pixels = torch.where(valid[:, None, None, None], pixels, 0)
    return pixels, torch.where(valid, labels, 0), valid


def _noised(
    sums: PrivateSums, sd: float, sampler: Sampler, unit: float, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """S + integer noise, then in float64 times what a grid unit is worth, rounded; S is gone."""
    by_class, shared = (_with_noise(whole, sd, sampler, unit, dtype) for whole in sums.take())
    return_freed_memory()  # or the process keeps what S took, and what comes after takes more
    return by_class, shared


def _noised_products(
    sums: PrivateSums, sd: float, sampler: Sampler, unit: float
) -> tuple[Tensor, ...]:
    """The same of products: symmetric [K, d, d].

    What is noised is the diagonal and, times sqrt(2), what is above it (`sensitivity`). Noise of
    sd on sqrt(2) S is noise of sd / sqrt(2) on S.
    """
    taken = sums.take()[0]
    d = taken.shape[1]
    rows, columns = torch.triu_indices(d, d, 1)
    result = torch.empty(taken.shape).view(-1, d, d)
    for square, out in zip(taken.view(-1, d, d), result, strict=True):
        out.diagonal().copy_(_with_noise(square.diagonal().clone(), sd, sampler, unit))
        above = _with_noise(square[rows, columns], sd / math.sqrt(2), sampler, unit)
        out[rows, columns] = out[columns, rows] = above
    return (result,)


def _with_noise(
    whole: Tensor, sd: float, sampler: Sampler, unit: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """A piece at a time: nothing of the size of ``whole`` is held beside it and the result."""
    result = torch.empty(whole.shape, dtype=dtype)
    for values, out in zip(*(t.view(-1).split(1 << 22) for t in (whole, result)), strict=True):
        drawn = np.asarray(sampler(values.numel(), sd), np.int64)
        values += torch.from_numpy(drawn).view_as(values)
        out.copy_(values.double() * unit)
    return result


def _warn_alone(group: ProcessGroup | None) -> None:
    """A second release where one was meant: the noises of two can be averaged."""
    if group is None and dist.is_available() and dist.is_initialized() and dist.get_rank():
        warnings.warn(
            f"process_group=None: the process with rank {dist.get_rank()} makes a release of its "
            "own, with noise of its own, which counts by itself. For one release by all of them "
            "give process_group=torch.distributed.group.WORLD, or release in rank 0 alone.",
            stacklevel=4,
        )


def _warn_few(counted: float, num_units: int, sd: float) -> None:
    """Says from the noised counts alone that many units contributed nothing."""
    if counted < 0.9 * num_units - 4 * sd:
        warnings.warn(
            f"the noised class counts add up to {max(counted, 0):.0f} of N = {num_units} (noise "
            f"of sd {sd:.3g}): many images contributed nothing. They could not be decoded, have "
            "values outside [0, 1], or no label of 0..num_classes-1. `dpmmd inspect` says which.",
            stacklevel=3,
        )


def _warn_delta(delta: float, num_units: int) -> None:
    if delta * num_units > 1:
        warnings.warn(
            f"delta={delta:g} is above 1 / N (about {1 / num_units:.2g}): such a guarantee allows "
            "to publish somebody's image outright. Use a smaller delta.",
            stacklevel=3,
        )
