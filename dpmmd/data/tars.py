"""WebDataset shards: tar files where ``key.jpg``, ``key.cls``, ``key.json`` are a record."""

from __future__ import annotations

import json
import posixpath
import re
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from dpmmd.data.items import EncodedSource
from dpmmd.data.labels import as_labels
from dpmmd.data.leftovers import leftover, listed, other_extension
from dpmmd.data.members import DamagedTar, Member, Walk
from dpmmd.data.once import refuse_copied_shards, shards_in, without_second_names
from dpmmd.data.pixels import EXTENSIONS, Encoded, Unusable
from dpmmd.data.remote import AnyPath, opened
from dpmmd.data.request import Request
from dpmmd.data.source import file_identity

UNENDED = "a shard without the mark of its end, perhaps cut short"
NO_BYTES = "a record without an image whose bytes are its own"
_MAX_FACTS = 1 << 23  # bytes of a .json or .cls
_MAX_DIGITS = 20
_MAX_KEYS = 100
_RANGE = re.compile(r"\{(\d+)\.\.(\d+)\}")
_LABEL_KEYS = ("label", "cls")


def expand(pattern: str) -> list[str]:
    """``a-{00..02}.tar`` as its three names; ``{a,b}`` likewise. Others as they are."""
    if match := _RANGE.search(pattern):
        first, last = match[1], match[2]
        inside = [str(i).zfill(len(first)) for i in range(int(first), int(last) + 1)]
    elif match := re.search(r"\{([^{}]*,[^{}]*)\}", pattern):
        inside = match[1].split(",")
    else:
        return [pattern]
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [name for middle in inside for name in expand(before + middle + after)]


class TarSource(EncodedSource):
    """The records of WebDataset shards, in the order of the shards and of their members.

    A record is the members of one shard with one key: an image (``jpg``, ``png``, ...), and a label
    in ``cls`` (digits) or under a key of ``json``. Its place in the shard does not matter, and of
    members with one name the last counts, as tar extracts them (``./a.png`` and ``b/../a.png`` are
    ``a.png``). Members of one record whose names differ in the case of the extension are refused.

    The key is a name without its extension: what follows the last dot, so that ``1.2.840.113.png``
    and ``scan.v1.0.png`` are records of their own. With `image_key` names are split as WebDataset
    splits them, at the first dot of their last part, and `image_key` is all that follows
    (``seg.png``). Where both ways lead to images, ``a.png`` beside ``a.seg.png``, the source is
    refused until `image_key` says which are meant.

    Opening the source goes through all headers, labels and JSON (of remote shards that reads most
    of them); images are read from their place as they are needed. An image whose bytes are not its
    own (a sparse member, a link) cannot be decoded, nor can a record that has a label and no image.

    *Why one member is in one record.* Members of a shard share no byte (`dpmmd.data.members`), a
    member's record follows from its own name and its shard, and each shard is read once
    (`dpmmd.data.once`). So an exchange of one record changes one vector.
    """

    def __init__(self, path: AnyPath, files: Sequence[AnyPath], request: Request) -> None:
        label_key, group_by = request.label_key, request.group_by
        if path.is_dir():
            shards, others = shards_in(path, ".tar")
        else:
            shards, others = without_second_names(files)
        refuse_copied_shards(shards, path.name)
        self._files = tuple(shards)
        passed = Counter(others)
        places = array("q")  # shard, offset, bytes of each
        labels: list[Any] = []
        groups: list[Any] = []
        columns: set[str] = set()  # keys of the .json members
        for number, file in enumerate(self._files):
            shard = _Shard(request, path.name, passed)
            records = shard.read(file)
            columns |= shard.keys
            for record in records:
                places.extend((number, *record.place))
                labels.append(record.label)
                groups.append(record.group)
        self._places = np.array(places, np.int64).reshape(-1, 3)
        self.passed_over = dict(passed)
        self.columns = tuple(sorted(columns))
        missing = sum(label is None for label in labels)
        if missing not in (0, len(labels)):
            raise ValueError(
                f"labels of source {path.name!r} have missing values: expected a .cls member, or "
                "the same key in a .json member, in every record."
            )
        if label_key is not None and labels and missing:
            raise ValueError(
                f"label_key={label_key!r}: no such key in the .json members of {path.name!r}, and "
                "no members of that extension."
            )
        if group_by is not None and any(group is None for group in groups):
            raise ValueError(
                f"group_by={group_by!r}: source {path.name!r} has records without that key in a "
                ".json member; expected it in all of them."
            )
        numbers = labels or np.zeros(0, np.int64)  # a source without images lacks no label
        super().__init__(
            name=path.name,
            identity=file_identity("tar", path),
            num_images=len(labels),
            labels=None if missing else as_labels(numbers, len(labels), path.name),
            class_names=None,
            request=request,
            groups=None if group_by is None else groups,
        )
        self._settle_shape()

    def encoded(self, indices: Sequence[int]) -> Iterator[Encoded]:
        return self.beginnings(indices, None)

    def beginnings(self, indices: Sequence[int], limit: int | None) -> Iterator[Encoded]:
        """The first bytes of each image, at most `limit`."""
        current, file = -1, None
        try:
            for index in indices:
                shard, offset, size = self._places[index].tolist()
                wanted = size if limit is None else min(size, limit)
                try:
                    if shard != current or file is None:
                        if file is not None:
                            file.close()
                        current, file = shard, None
                        file = opened(self._files[shard])
                    file.seek(offset)
                    data = file.read(wanted)
                except Exception:
                    data = b""
                yield data if size and len(data) == wanted else Unusable(NO_BYTES)
        finally:
            if file is not None:
                file.close()


@dataclass
class _Record:
    place: tuple[int, int] = (0, 0)  # offset and bytes of the image; no bytes: it has none
    image: str | None = None  # the extension of the image
    number: int | None = None  # the label in .cls
    named: Any = None  # the label in .json, for records without .cls
    group: Any = None
    stands: bool = False  # whether it is a record, with or without an image

    @property
    def label(self) -> Any:
        return self.named if self.number is None else self.number


class _Shard:
    """Finds the records of a shard, without reading its images."""

    def __init__(self, request: Request, name: str, passed: Counter[str]) -> None:
        image_key, label_key = request.image_key, request.label_key
        self.image_key, self.label_key, self.group_by = image_key, label_key, request.group_by
        self.name, self.passed = name, passed
        self.images = EXTENSIONS if image_key is None else {f".{image_key.lower()}"}
        self.label_keys = _LABEL_KEYS if label_key is None else (label_key,)
        self.facts = {"cls", "json"} | ({label_key.lower()} if label_key else set())
        self.records: dict[str, _Record] = {}
        self.keys: set[str] = set()
        self.heads: dict[str, bool] = {}  # WebDataset's key of each image -> a dot in its extension

    def read(self, path: AnyPath) -> list[_Record]:
        """Place of the image (size 0: none), label and group of each record."""
        try:
            with opened(path) as file:
                walk = Walk(file)
                names: dict[tuple[str, str], str] = {}
                for member in walk:
                    self._take(member, file, names)
                if not walk.ended:
                    self.passed[UNENDED] += 1
        except (DamagedTar, Unusable, OSError, EOFError) as error:
            told = isinstance(error, DamagedTar | Unusable)
            reason = str(error) if told else type(error).__name__
            raise ValueError(
                f"source={str(path)!r} is not a readable tar file ({reason}): "
                "expected one without compression; write or download it again."
            ) from None
        found = [record for record in self.records.values() if record.stands]
        if lonely := len(self.records) - len(found):
            self.passed["a label or .json whose name is that of no image"] += lonely
        return found

    def _take(self, member: Member, file: IO[bytes], names: dict[tuple[str, str], str]) -> None:
        name = posixpath.normpath("/" + member.name).lstrip("/")  # where tar extracts it
        reason = next((why for part in name.split("/") if (why := leftover(part))), None)
        if reason is not None:
            self.passed[reason] += 1
            return
        key, extension = self._split(name)
        if f".{extension}" not in self.images and extension not in self.facts:
            self.passed[_other(name)] += 1
            return
        earlier = names.get((key, extension))
        if earlier == name:
            self.passed["an earlier version of a member of the same name"] += 1
        elif earlier is not None:
            raise ValueError(
                f"source {self.name!r} has the members {listed([earlier])} and {listed([name])} in "
                "one shard: expected names of one record that differ in more than the case of the "
                "extension; rename one of them."
            )
        names[key, extension] = name
        record = self.records.setdefault(key, _Record())
        head = _first_dot(name)[0]
        if f".{extension}" in self.images:
            self._take_image(member, record, extension, head, plain=head == key)
        else:
            record.stands |= head == key
            self._take_facts(record, extension, _content(member, file, self.name))

    def _take_image(
        self, member: Member, record: _Record, extension: str, head: str, *, plain: bool
    ) -> None:
        if record.image not in (None, extension) or self.heads.setdefault(head, plain) != plain:
            raise ValueError(
                f"source {self.name!r} has records with several images (e.g. a.jpg beside a.png, "
                "or a.png beside a.seg.png): expected one image a record, as each image counts for "
                "a person of its own; say which with image_key, e.g. image_key='png'."
            )
        record.place = (member.offset, member.size)
        record.image, record.stands = extension, True

    def _take_facts(self, record: _Record, extension: str, text: bytes) -> None:
        if extension == "json":
            facts = self._json(text)
            if len(self.keys) < _MAX_KEYS:
                self.keys.update(facts)
            record.named = next((facts[k] for k in self.label_keys if k in facts), None)
            record.group = facts.get(self.group_by) if self.group_by else None
        elif self.label_key is None or extension == self.label_key.lower():
            record.number = self._number(text)

    def _split(self, name: str) -> tuple[str, str]:
        """Key and extension of a member."""
        if self.image_key is not None:
            return _first_dot(name)
        if self.label_key and "." in self.label_key:
            ending = f".{self.label_key.lower()}"
            if name.lower().endswith(ending):
                return name[: -len(ending)], ending[1:]
        folder, slash, last = name.rpartition("/")
        stem, _, extension = last.rpartition(".")
        return folder + slash + stem, extension.lower()

    def _json(self, text: bytes) -> dict[str, Any]:
        try:
            facts = json.loads(text)
        except (ValueError, RecursionError):
            facts = None
        if not isinstance(facts, dict):
            raise ValueError(
                f"source {self.name!r} has a .json member that is not a JSON object; expected one, "
                'e.g. {"label": 3}.'
            ) from None
        return facts

    def _number(self, text: bytes) -> int:
        if not text.strip().isdigit() or len(text) > _MAX_DIGITS:
            raise ValueError(
                f"labels of source {self.name!r}: a .cls member is not a whole number; expected "
                "the digits of 0, 1, ... K-1."
            )
        return int(text)


def _content(member: Member, file: IO[bytes], name: str) -> bytes:
    """The bytes of a label or of JSON: a member that has none of its own is empty."""
    if member.size > _MAX_FACTS:
        raise ValueError(
            f"source {name!r} has a label or .json member of {member.size} bytes: expected at most "
            f"{_MAX_FACTS}; leave out what is not a label or a group."
        )
    file.seek(member.offset)
    return file.read(member.size)


def _first_dot(name: str) -> tuple[str, str]:
    """Key and extension as WebDataset has them: ``a/b.c.png`` is ``a/b`` and ``c.png``."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def _other(name: str) -> str:
    """The reason under which a member that is neither image nor label is counted."""
    extension = _first_dot(name)[1]
    known = f".{extension.rpartition('.')[2]}" in EXTENSIONS and "." in extension
    return "a name with several dots, beside image_key" if known else other_extension(name)
