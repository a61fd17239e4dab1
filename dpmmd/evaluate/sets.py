"""The sets of an evaluation: which of their images count, and which class is which.

A figure must not be wrong because images or classes went missing on the way:

- Classes are matched by name where both sides have names, whatever their order and number; labels
  become those of the synthetic set. Where a side has no names, labels are taken as they are, and
  both sides must have as many classes.
- Every class of which there are test images must have synthetic images (and real ones, where real
  training images are compared). Classes without test images are fine, and are stated.
- Of no set may more than `MOST_LEFT_OUT` of the images, or more than half of those of a class, be
  left out because they cannot be decoded or leave [0, 1].
- No two of the sets may be the same source: a classifier would know the answers.

What breaks a rule is refused, with its numbers. They come from real images and are not covered by
any guarantee.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpmmd.data import ImageSource, open_source
from dpmmd.data.classes import are_numbers, correspondence, listed

MOST_LEFT_OUT = 0.05  # a share of a set's images
MOST_OF_A_CLASS = 0.5


class EvaluationError(ValueError):
    """Sets whose figures could be wrong; ``kind`` is the set that is at fault, if it is one."""

    def __init__(self, message: str, kind: str = "") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True)
class Classes:
    """The classes of a source: their names, if it has any, and their number."""

    kind: str  # "synthetic", "test", "real": what messages call it
    source: str
    names: tuple[str, ...] | None
    number: int

    @classmethod
    def of(cls, kind: str, source: ImageSource) -> Classes:
        """Raises EvaluationError where the source has no labels, or labels beyond its names."""
        if not source.labelled:
            raise EvaluationError(
                f"{kind}: source {source.name!r} has no labels, and classifiers need them; name "
                "them with label_key, or give a folder with a sub-folder for each class, or an "
                ".npz with y."
            )
        if source.class_names:
            source.check_labels(len(source.class_names))
            names = tuple(source.class_names)
            return cls(kind, source.name, names, len(names))
        labels = _labels(source)
        number = 0 if labels is None or not len(labels) else int(labels.max()) + 1
        return cls(kind, source.name, None, number)

    def __str__(self) -> str:
        if self.names is not None:
            return f"{self.number} classes ({listed(self.names)})"
        return f"{self.number} classes without names (labels 0 to {self.number - 1})"

    def name(self, label: int) -> str:
        return str(label) if self.names is None else listed([self.names[label]])


@dataclass(frozen=True)
class Match:
    """Which class of the synthetic set each class of another set is."""

    labels: list[int]
    by: str  # "name" or "number"


def match(synthetic: Classes, other: Classes) -> Match:
    """Raises EvaluationError where a class of the other set is none of the synthetic set's."""
    if synthetic.names is not None and other.names is not None:
        found = correspondence(synthetic.names, other.names)
        if found is not None:
            return Match(found, "name")
        if not are_numbers(synthetic.names) and not are_numbers(other.names):
            lacking = [n for n in other.names if correspondence(synthetic.names, [n]) is None]
            raise EvaluationError(
                f"{other.kind}: source {other.source!r} has classes that the synthetic set lacks "
                f"({listed(lacking or other.names)}); the synthetic set has {synthetic}. Classes "
                "are matched by name: rename them, or leave out what is no class."
            )
    if synthetic.number != other.number:
        raise EvaluationError(
            f"{other.kind}: source {other.source!r} has {other}, the synthetic set {synthetic}. "
            "Without names on both sides the numbers of classes must agree, or it cannot be told "
            "which is which: give both sets names (the array `classes` of an .npz, the folders of "
            "a folder), or images of every class."
        )
    return Match(list(range(other.number)), "number")


@dataclass(frozen=True, eq=False)
class ImageSet:
    """One of the sets: its usable images, and what was left out.

    Attributes:
        kind: ``"synthetic"``, ``"test"`` or ``"real"``.
        source, identity: of the source.
        images: uint8 [n, C, H, W].
        labels: int64 [n], of the synthetic set's classes once sets are `matched`.
        classes: None where no labels are wanted.
        left_out: how many records could not be used, by reason.
        passed_over: what the source did not count as a record, by reason.
        records: of each label, those left out included; None where the source cannot tell.
    """

    kind: str
    source: str
    identity: str
    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: Classes | None = None
    left_out: Mapping[str, int] = field(default_factory=dict)
    passed_over: Mapping[str, int] = field(default_factory=dict)
    records: NDArray[np.int64] | None = None

    def facts(self) -> dict[str, Any]:
        return {
            "used": len(self.images),
            "left_out": dict(self.left_out),
            "passed_over": dict(self.passed_over),
        }

    def line(self) -> str:
        """How many images count, for people."""
        parts = [f"{len(self.images):,} images used"]
        for told, what in ((self.left_out, "left out"), (self.passed_over, "files passed over")):
            if told:
                reasons = ", ".join(f"{n:,} x {reason}" for reason, n in told.items())
                parts.append(f"{sum(told.values()):,} {what} ({reasons})")
        return f"{self.kind} ({listed([self.source])}): {'; '.join(parts)}"


def read(kind: str, source: Any, split: str, *, labelled: bool = True, **options: Any) -> ImageSet:
    """Reads a set whole.

    Args:
        kind: ``"synthetic"``, ``"test"`` or ``"real"``.
        source, split, **options: as `dpmmd.data.open_source` takes them.
        labelled: whether its labels are wanted.

    Raises:
        EvaluationError: no labels where they are wanted, or too much left out.
    """
    opened = open_source(source, split=split, **options)
    classes = Classes.of(kind, opened) if labelled else None
    images, labels = (np.asarray(part) for part in opened.arrays())
    left_out = _left_out(opened) if len(images) < opened.num_images else {}
    all_labels = _labels(opened) if classes is not None else None
    found = ImageSet(
        kind,
        opened.name,
        opened.identity,
        images,
        labels,
        classes,
        left_out,
        dict(opened.passed_over),
        None if all_labels is None else np.bincount(all_labels),
    )
    _check_left_out(found)
    return found


def _labels(source: ImageSource) -> NDArray[np.int64] | None:
    """Labels of all records, where a source holds them."""
    held = getattr(source, "_labels", None)
    return None if held is None else np.asarray(held)


def _left_out(source: ImageSource, batch_size: int = 256) -> dict[str, int]:
    """Why records cannot be used, as far as the source tells; the commonest reason first."""
    reasons: Counter[str] = Counter()
    for number, batch in enumerate(source.batches(batch_size)):
        start = number * batch_size
        rows = min(batch_size, source.num_images - start)
        missing = [start + row for row in range(rows) if not batch.valid[row]]
        if missing:
            told = source.look(missing) or [None] * len(missing)
            reasons.update("no reason known" if why is None else why.reason for why in told)
    return dict(reasons.most_common())


def _check_left_out(found: ImageSet) -> None:
    used, lost = len(found.images), sum(found.left_out.values())
    if lost > MOST_LEFT_OUT * (used + lost) or not used:
        raise EvaluationError(
            f"{found.line()}. A figure of the rest could be far from that of all; expected at most "
            f"{MOST_LEFT_OUT:.0%} left out. Mend or remove these images.",
            found.kind,
        )
    if found.records is None or found.classes is None:
        return
    kept = np.bincount(found.labels, minlength=len(found.records))
    for label, (n, whole) in enumerate(zip(kept, found.records, strict=True)):
        if whole - n > MOST_OF_A_CLASS * whole:
            raise EvaluationError(
                f"{found.kind}: source {found.source!r} has {whole} images of class "
                f"{found.classes.name(label)}, of which {whole - n} cannot be used "
                f"({', '.join(found.left_out)}); expected at most half of a class left out. Mend "
                "or remove these images.",
                found.kind,
            )


@dataclass(frozen=True, eq=False)
class Sets:
    """The sets of one evaluation, with labels of the same classes."""

    synthetic: ImageSet
    test: ImageSet
    real: ImageSet | None = None
    matched_by: Mapping[str, str] = field(default_factory=dict)
    without_test_images: tuple[int, ...] = ()

    def all(self) -> list[ImageSet]:
        return [each for each in (self.synthetic, self.test, self.real) if each is not None]

    def facts(self) -> dict[str, Any]:
        """``images`` (of each set: used, left_out, passed_over) and ``classes``, for JSON."""
        told: dict[str, Any] = {"images": {each.kind: each.facts() for each in self.all()}}
        classes = self.synthetic.classes
        if self.matched_by and classes is not None:
            told["classes"] = {
                "number": classes.number,
                "names": None if classes.names is None else list(classes.names),
                "matched_by": dict(self.matched_by),
                "without_test_images": [classes.name(k) for k in self.without_test_images],
            }
        return told

    def lines(self) -> list[str]:
        """The same for people."""
        lines = [each.line() for each in self.all()]
        classes = self.synthetic.classes
        if self.matched_by and classes is not None:
            by = " and ".join(f"those of {kind} by {by}" for kind, by in self.matched_by.items())
            lines.append(f"{classes}; {by}")
            if self.without_test_images:
                names = [classes.name(k) for k in self.without_test_images]
                lines.append(
                    f"no test images of {listed(names)}: accuracies are those on the other classes"
                )
        return lines


def matched(
    synthetic: ImageSet, test: ImageSet, real: ImageSet | None, num_classes: int | None
) -> Sets:
    """The sets with the labels of the synthetic set's classes; None: without labels.

    Raises:
        EvaluationError: a rule of this module is broken.
    """
    _check_apart([each for each in (synthetic, test, real) if each is not None])
    if num_classes is None:
        return Sets(synthetic, test, real)
    ours = synthetic.classes
    assert ours is not None
    check_number(ours, num_classes)
    renamed, by = {}, {}
    for other in (test, real):
        if other is not None and other.classes is not None:
            found = match(ours, other.classes)
            by[other.kind] = found.by
            labels = np.asarray(found.labels, np.int64)[other.labels]
            renamed[other.kind] = replace(other, labels=labels)
    images_of = {
        each.kind: np.bincount(each.labels, minlength=num_classes)
        for each in (synthetic, *renamed.values())
    }
    for kind in images_of.keys() - {"test"}:
        lacking = np.flatnonzero((images_of["test"] > 0) & (images_of[kind] == 0))
        if len(lacking):
            names = listed([ours.name(int(k)) for k in lacking])
            raise EvaluationError(
                f"{kind}: there are no images of {names}, of which there are test images; a "
                "classifier could not learn them. Give images of every class, e.g. sample more.",
                kind,
            )
    missing = tuple(int(k) for k in np.flatnonzero(images_of["test"] == 0))
    return Sets(synthetic, renamed["test"], renamed.get("real"), by, missing)


def check_number(classes: Classes, num_classes: int) -> None:
    """Raises EvaluationError unless the synthetic set has the declared number of classes."""
    if num_classes < 2:
        raise EvaluationError(
            f"num_classes={num_classes}: a classifier of one class is always right; expected at "
            "least 2 classes. Leave classifiers out, and compare images (--features, [metrics])."
        )
    if classes.number != num_classes:
        raise EvaluationError(
            f"num_classes={num_classes}: {classes.kind} source {classes.source!r} has {classes}; "
            f"give num_classes={classes.number}, or a set with images of every class."
        )


def _check_apart(sets: Sequence[ImageSet]) -> None:
    for i, one in enumerate(sets):
        for other in sets[i + 1 :]:
            if one.identity == other.identity:
                raise same_source(one.kind, other.kind, one.source)


def same_source(one: str, other: str, source: str) -> EvaluationError:
    return EvaluationError(
        f"{one} and {other} are the same images (source {source!r}): classifiers would be tested "
        "on what they were trained on. A file or folder without splits is read whole whatever the "
        "split; give the test images as a source of their own."
    )
