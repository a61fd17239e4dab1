"""Images in the order of their classes, found on the device while statistics are finished.

A schedule is one int32 tensor: ``order`` [n], the images sorted by class, stably; ``starts``
[K + 1], where each class begins in it; ``tiles`` [T, 4], pieces of the order that hold one class
each: class, first position, how many images (at most TILE_ROWS; 0 for a tile without use), and how
many the class has. T is ceil(n / TILE_ROWS) + min(K, n), whatever the labels.

An image's position is the number of images with a lower class, or with its own and before it: n
comparisons an image, by a program each, instead of the several launches of a sort. Images whose
label is not in 0..K-1 are in no class and have no position.

Bytes: n^2 labels, from cache. Deterministic.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dpmmd.kernels import table

IMAGES = tl.constexpr(256)
TILE_FIELDS = tl.constexpr(4)
TILE_ROWS = tl.constexpr(table.TILE_ROWS)


def count_tiles(n: int, num_classes: int | None) -> int:
    """T; for ``num_classes=None`` (no labels) the tiles that images make in their own order."""
    whole = -(-n // table.TILE_ROWS)
    return whole if num_classes is None else whole + min(num_classes, n)


def size(n: int, num_classes: int | None) -> int:
    """Length of a schedule; 0 without labels."""
    if num_classes is None:
        return 0
    return n + num_classes + 1 + TILE_FIELDS.value * count_tiles(n, num_classes)


@triton.jit
def clear_tiles(schedule, n, num_classes, part, parts, TILES: tl.constexpr):
    """Marks this part of the tiles as being without use; TILES numbers at a time."""
    first = n + num_classes + 1
    count = TILE_FIELDS * (tl.cdiv(n, TILE_ROWS) + tl.minimum(num_classes, n))
    share = tl.cdiv(count, parts)
    end = tl.minimum(count, (part + 1) * share)
    for at in range(part * share, end, TILES):
        where = at + tl.arange(0, TILES)
        tl.store(schedule + first + where, tl.zeros([TILES], tl.int32), mask=where < end)


@triton.jit
def place_image(labels, schedule, image, n, num_classes, CHECK: tl.constexpr):
    """Writes where an image stands in the order; CHECK: a label out of range stops the device."""
    label = tl.load(labels + image)
    if CHECK:
        tl.device_assert((label >= 0) & (label < num_classes), "dpmmd: labels: out of range")
    position = tl.zeros([IMAGES], tl.int32)
    for start in range(0, n, IMAGES):
        other = start + tl.arange(0, IMAGES)
        theirs = tl.load(labels + other, mask=other < n, other=-1)
        before = ((theirs >= 0) & (theirs < label)) | ((theirs == label) & (other < image))
        position += before.to(tl.int32)
    place = tl.sum(position, axis=0)
    tl.store(schedule + place, image, mask=(label >= 0) & (label < num_classes))


@triton.jit
def place_class(labels, counts, schedule, k, n, num_classes):
    """Writes a class's start, count and tiles."""
    own = tl.zeros([IMAGES], tl.int32)
    lower = tl.zeros([IMAGES], tl.int32)
    for first in range(0, n, IMAGES):
        other = first + tl.arange(0, IMAGES)
        theirs = tl.load(labels + other, mask=other < n, other=-1)
        own += (theirs == k).to(tl.int32)
        lower += ((theirs >= 0) & (theirs < k)).to(tl.int32)
    count = tl.sum(own, axis=0)
    start = tl.sum(lower, axis=0)
    tl.store(counts + k, count.to(tl.float32))
    tl.store(schedule + n + k, start)
    tl.store(schedule + n + k + 1, start + count, mask=k == num_classes - 1)
    # Classes before k have taken at most this many tiles, and those after it begin past its own.
    tile = start // TILE_ROWS + tl.minimum(k, start)
    for at in range(0, count, TILE_ROWS):
        record = schedule + n + num_classes + 1 + (tile + at // TILE_ROWS) * TILE_FIELDS
        tl.store(record, k)
        tl.store(record + 1, start + at)
        tl.store(record + 2, tl.minimum(count - at, TILE_ROWS))
        tl.store(record + 3, count)


@triton.jit
def class_range(schedule, k, n, num_classes, LABELLED: tl.constexpr):
    """First and one past the last position of a class; without labels all images are in class 0."""
    if LABELLED:
        start = tl.load(schedule + n + k)
        end = tl.load(schedule + n + k + 1)
    else:
        start = tl.zeros([], tl.int32)
        end = start + n
    return start, end


@triton.jit
def image_at(schedule, positions, live, LABELLED: tl.constexpr):
    """The images at positions of the order; any number where not live."""
    if LABELLED:
        images = tl.load(schedule + positions, mask=live, other=0)
    else:
        images = positions
    return images


@triton.jit
def tile_at(schedule, tile, n, num_classes, LABELLED: tl.constexpr):
    """A tile's class, first position, images and the images of its class."""
    if LABELLED:
        record = schedule + n + num_classes + 1 + tile * TILE_FIELDS
        k = tl.load(record)
        first = tl.load(record + 1)
        rows = tl.load(record + 2)
        count = tl.load(record + 3)
    else:
        k = tl.zeros([], tl.int32)
        first = tile * TILE_ROWS
        rows = tl.minimum(n - first, TILE_ROWS)
        count = k + n
    return k, first, rows, count
