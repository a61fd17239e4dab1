"""A first look at a source before a release spends anything. For the data holder's eyes alone.

A release is silent about every single record once it has begun. Whatever is wrong with a whole data
set (a Dataset that normalises, floats on a 0..255 scale, files that only stand for images, items
that depend on each other) must therefore come out before. What this module raises and warns about
depends on private records and is not covered by any guarantee.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpmmd._warn import warn
from dpmmd.data.pixels import OUTSIDE, advice_on
from dpmmd.data.source import ImageSource

_RECORDS = 256  # looked at, in so many places of the source:
_PLACES = 4
_AT_ONCE = 16
_TWICE = 8  # of each place: read a second time, in another order
_SECONDS = 5.0  # after which one usable record is enough
_MANY = 0.1  # a share of unusable records that is worth a warning
_YOURS = "This message is for you alone: it depends on private images, and no epsilon covers it."


@dataclass(frozen=True)
class FirstLook:
    """What was seen of a source: how many records, and why some of them cannot be used."""

    seen: int
    reasons: Mapping[str, int]

    @property
    def usable(self) -> int:
        return self.seen - sum(self.reasons.values())

    def why(self) -> str:
        """The reasons, the commonest first."""
        return ", ".join(f"{n} x {reason}" for reason, n in Counter(self.reasons).most_common(4))


def first_look(source: ImageSource, batch_size: int = _RECORDS) -> FirstLook:
    """Reads up to 256 records, from four places of the source.

    Of a source that only reads batches (of ``batch_size``), the first ones.

    Raises:
        TypeError, ValueError: the data set's items have no labels where labels are wanted, or are
            no pairs of an image and a label.
    """
    reasons: Counter[str] = Counter()
    seen, started = 0, time.monotonic()
    for positions in _chunks(_places(source.num_images)):
        outcomes = source.look(positions)
        if outcomes is None:
            return _look_at_batches(source, batch_size)
        for outcome in outcomes:
            seen += 1
            if outcome is not None:
                reasons[outcome.reason] += 1
        if time.monotonic() - started > _SECONDS and seen > sum(reasons.values()):
            break
    return FirstLook(seen, reasons)


def check_source(source: ImageSource, batch_size: int = _RECORDS) -> None:
    """Refuses a source of which nothing seems usable, or whose records depend on each other.

    Raises:
        ValueError, TypeError: that, or what `first_look` raises.

    Warns:
        UserWarning: more than a tenth of the records that were looked at are not usable.
    """
    found = first_look(source, batch_size)
    if not found.seen:
        return
    advice = advice_on(found.reasons)
    if not found.usable:
        raise ValueError(
            f"source {source.name!r}: none of the {found.seen} records that were looked at can be "
            f"used ({found.why()}), so that a release would be noise alone. Nothing was spent."
            f"{advice} `dpmmd inspect` says what is there. {_YOURS}"
        )
    if found.seen - found.usable > _MANY * found.seen:
        warn(
            f"source {source.name!r}: {found.seen - found.usable} of the {found.seen} records that "
            f"were looked at cannot be used ({found.why()}) and would contribute nothing.{advice} "
            f"`dpmmd inspect` says what is there. {_YOURS}"
        )
    check_isolated: Any = getattr(source, "check_isolated", None)
    if check_isolated is not None:
        places = _places(source.num_images)
        check_isolated([p for place in places for p in place[:_TWICE]])


def _places(num_images: int) -> list[range]:
    """Positions in ascending order, in up to four pieces."""
    if num_images <= _RECORDS:
        return [range(num_images)]
    size = _RECORDS // _PLACES
    starts = [i * (num_images - size) // (_PLACES - 1) for i in range(_PLACES)]
    return [range(start, start + size) for start in starts]


def _chunks(places: Sequence[range]) -> Iterator[range]:
    for place in places:
        for start in range(0, len(place), _AT_ONCE):
            yield place[start : start + _AT_ONCE]


def _look_at_batches(source: ImageSource, size: int) -> FirstLook:
    seen = valid = 0
    for batch in source.batches(size):
        if tuple(batch.images.shape) != (size, *source.image_shape):
            raise ValueError(
                f"source {source.name!r}: a batch of shape {list(batch.images.shape)}, expected "
                f"{[size, *source.image_shape]}; pad the last batch, with valid = False."
            )
        rows = min(size, source.num_images - seen)
        pixels = batch.images[:rows]
        usable = batch.valid[:rows] & ((pixels >= 0) & (pixels <= 1)).flatten(1).all(dim=1)
        seen, valid = seen + rows, valid + int(usable.sum())
        if seen >= min(_RECORDS, source.num_images):
            break
    reason = f"not valid, or {OUTSIDE}"
    return FirstLook(seen, {reason: seen - valid} if seen > valid else {})
