"""The only step that reads private pixels: each record's certified integers, summed exactly.

What a record adds is a function of that record alone (and of the size of its group), certified to
the norm that the sensitivity counts on (`sums`). No record can raise, warn, log or change a shape.
`pipeline` tries the same functions on the data holder's own source.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import closing
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from dpmmd.data import Batch, prefetch
from dpmmd.encoders import Encoder
from dpmmd.privacy.blocks import Blocks, Raw
from dpmmd.privacy.layout import Layout
from dpmmd.privacy.modes import rows_of
from dpmmd.privacy.opening import Opened
from dpmmd.privacy.ranks import Ranks
from dpmmd.privacy.spending import Spent


class Rows(NamedTuple):
    """A batch such that nothing after it can raise because of one image.

    Attributes:
        pixels: [B, C, H, W] in [0, 1], all zero where not valid.
        labels: int64 [B] in 0..K-1.
        cells: int64 [B] in 0..K C - 1, of class and mode; the labels without modes.
        valid: bool [B]: what is not valid contributes nothing.
        share: int64 [B]: among how many images each one's bound is shared; 1 for padding.
    """

    pixels: Tensor
    labels: Tensor
    cells: Tensor
    valid: Tensor
    share: Tensor


def collect(
    opened: Opened, layout: Layout, raw: Raw, spent: Spent, ranks: Ranks, *, progress: bool
) -> None:
    """Adds what every image contributes to the sums; rank 0 then has those of all ranks.

    Two data sets that differ in one unit give sums that differ by at most the sensitivity: what a
    unit adds is certified (`sums`), and every other record adds the same integers to both, for a
    row of a batch is computed from its record alone (`harmless`, `features_of`, `add`), its mode
    too (`modes.rows_of`).

    It returns nothing, and writes nothing but ``spent.store``: what it learns stays in ``raw``,
    which only `noising.noise` opens. It takes a `Spent`, so that no image is read before the spend.

    Args:
        progress: whether to show a bar, which tells the number of batches.
    """
    own = spent.numbers[spent.done :]
    done, store = spent.done, spent.store
    sizes = None if opened.sizes is None else opened.sizes.to(layout.device)
    bar = tqdm(
        total=done + len(own), initial=done, desc="release", unit="batch", disable=not progress
    )
    whole = True  # whether the sums are those of whole batches
    try:
        read = itertools.islice(opened.images.part(layout.batch_size, own), len(own))
        batches = prefetch(read, layout.device)
        with closing(batches), bar, torch.inference_mode():
            for batch in ranks.paced(batches, spent.steps):
                start = (spent.numbers.start + done) * layout.batch_size
                rows = harmless(batch, layout, start, opened.images.num_images, sizes)
                features = features_of(layout.encoders, rows.pixels)
                whole = False
                add(layout.blocks, raw, features, rows)
                done, whole = done + 1, True
                del batch, rows, features
                bar.update()
                if store is not None:
                    store.store_if_due(done, spent.line, raw.all)
    except BaseException:
        if store is not None and whole:
            store.store(done, spent.line, raw.all)
        raise
    for one in raw.all:
        one.reduce(ranks)


def harmless(
    batch: Batch, layout: Layout, start: int, num_images: int, sizes: Tensor | None
) -> Rows:
    """The batch whose first row is record ``start``.

    Rows from ``num_images`` on are none of the data set's N records, whatever the source says. A
    batch that is short is filled up, for the last bits of an encoder's features depend on how many
    rows it is given, and with it on N.
    """
    size, device = layout.batch_size, layout.device
    pixels, labels, valid = (t.to(device) for t in (batch.images, batch.labels, batch.valid))
    if missing := size - len(pixels):
        pixels = F.pad(pixels, (0, 0) * 3 + (0, missing))
        labels, valid = F.pad(labels, (0, missing)), F.pad(valid, (0, missing))
    if not layout.labelled:
        labels = torch.zeros_like(labels)
    valid = valid & (torch.arange(size, device=device) < num_images - start)
    valid = valid & (labels >= 0) & (labels < layout.blocks.classes)
    valid = valid & ((pixels >= 0) & (pixels <= 1)).flatten(1).all(dim=1)  # NaN is neither
    pixels = torch.where(valid[:, None, None, None], pixels, 0)
    share = torch.ones(size, dtype=torch.int64, device=device)
    if sizes is not None:
        part = sizes[start : start + size]
        share[: len(part)] = part
    labels = torch.where(valid, labels, 0)
    cells = labels if layout.modes is None else rows_of(layout.modes, pixels, labels)
    return Rows(pixels, labels, cells, valid, share)


def features_of(encoders: Mapping[str, Encoder], pixels: Tensor) -> dict[str, list[Tensor]]:
    """Of each encoder, one [n, d_l] per tap; one that has two names runs once."""
    made = {
        key: [f.permute(0, 2, 3, 1).flatten(1) for f in used(pixels)]
        for key, used in {id(used): used for used in encoders.values()}.items()
    }
    return {name: made[id(used)] for name, used in encoders.items()}


def add(blocks: Blocks, raw: Raw, features: Mapping[str, list[Tensor]], rows: Rows) -> None:
    """Adds what a batch contributes to the sums of every block.

    An image of a group of g has the limit floor(B / g) in a block of bound B: together the images
    of a unit add at most B, whatever rows they go to.
    """
    valid, share = rows.valid, rows.share
    for part, sums in zip(blocks.parts, raw.parts, strict=True):
        limits = int(part.block.bound) // share
        own = features[part.kind.encoder]
        places = rows.cells if part.by_mode else rows.labels
        if part.kind.products:
            places = torch.zeros_like(places) if part.kind.pooled else places
            sums.add_products(own[0], places, valid, limits)
            continue
        sums.add(
            own,
            places,
            valid,
            limits,
            bound=part.bound,
            nonnegative=part.block.nonnegative,
            shared_taps=part.shared_taps,
        )
    if raw.counts is not None and blocks.counts is not None:
        raw.counts.add_counts(rows.cells, valid, int(blocks.counts.bound) // share)
