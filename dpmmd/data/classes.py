"""Names of classes: public facts that go from the source to everything that is made of it."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from dpmmd.data.identifiers import Key, folded, spelled, without_zeros

NAMES_FILE = "classes.json"
"""In a folder of class folders: ``{folder: class name}``, where a name makes no folder's name."""

_SHOWN = 20  # names in a message


def written_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names as they go into files: UTF-8 text, which the name of a folder need not be."""
    return tuple(name.encode("utf-8", "backslashreplace").decode() for name in names)


def listed(names: Sequence[str], most: int = _SHOWN) -> str:
    """Names for a message or a report: on one line, nothing that a terminal would act on."""
    shown = ["".join(map(_visible, name)) or "''" for name in written_names(names[:most])]
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*shown, *more]) or "none"


def _visible(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


def check_class_names(names: Sequence[str] | None, num_classes: int | None, source: str) -> None:
    """Raises ValueError unless the names are those of `num_classes` different classes.

    Names that differ only in how they are spelled are of one class. A single letter is itself what
    the class is of (letters that are written by hand), so there "a" and "A" are two.
    Without names, or without a number of classes, there is nothing to compare.
    """
    if not names or num_classes is None:
        return
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"source {source!r}: its class_names are not all text; expected one name for each "
            "class 0..K-1, or None."
        )
    if len(names) != num_classes:
        beyond = f", beyond the permitted range 0..{num_classes - 1}"
        raise ValueError(
            f"num_classes={num_classes}: source {source!r} has {len(names)} classes "
            f"({listed(names)}){beyond if len(names) > num_classes else ''}; give num_classes="
            f"{len(names)}, or a source that has the classes that are meant and no other."
        )
    if len(set(written_names(names))) != num_classes:
        twice = sorted({name for name in names if list(names).count(name) > 1})
        raise ValueError(
            f"source {source!r} has several classes of one name ({listed(twice)}); give each "
            "class a name of its own."
        )
    first: dict[str, str] = {}
    for name in names:
        before = first.setdefault(_one_class(name), name)
        if before is not name:
            raise ValueError(
                f"source {source!r} has the classes {listed([before])} and {listed([name])}, which "
                "differ only in case, white space, zeros before a number or the form of Unicode: "
                "most likely one class that was written twice. Give both one name, or names that "
                "differ in more."
            )


def _one_class(name: str) -> str:
    """What is the same of names that most likely mean one class."""
    composed = unicodedata.normalize("NFC", name).strip()
    return composed if len(composed) == 1 else without_zeros(folded(composed)) or composed


def folder_names(path: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """The names of classes that are folders: those in `NAMES_FILE`, where it names each of them."""
    try:
        names = json.loads((path / NAMES_FILE).read_text("utf-8"))
        found = tuple(names[folder] for folder in folders)
    except (OSError, ValueError, KeyError, TypeError):
        return written_names(folders)
    text = all(isinstance(name, str) for name in found)
    fits = text and len(names) == len(folders) == len(set(found))
    return written_names(found if fits else folders)


def correspondence(ours: Sequence[str], theirs: Sequence[str]) -> list[int] | None:
    """Which class of ours each of theirs is, by name; None if some of theirs are none of ours.

    Names are compared letter by letter, or else regardless of case, white space and the form of
    Unicode (and numbers by their value), as far as that keeps them apart.
    """
    for key in (str, _alike):
        mine = {key(name): label for label, name in enumerate(ours)}
        wanted = [key(name) for name in theirs]
        apart = len(mine) == len(ours) and len(set(wanted)) == len(theirs)
        if apart and mine.keys() >= set(wanted):
            return [mine[name] for name in wanted]
    return None


def are_numbers(names: Sequence[str]) -> bool:
    """Whether the names say no more than the labels: 0, 1, 2, ..."""
    return [_alike(name) for name in names] == list(range(len(names)))


def _alike(name: str) -> Key:
    return spelled(folded(name))
