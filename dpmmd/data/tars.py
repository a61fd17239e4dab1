"""WebDataset shards: tar files where ``key.jpg``, ``key.cls``, ``key.json`` are a record."""

from __future__ import annotations

import itertools
import json
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dpmmd.data.items import EncodedSource
from dpmmd.data.labels import as_labels
from dpmmd.data.pixels import EXTENSIONS, Encoded, Geometry
from dpmmd.data.remote import AnyPath, opened
from dpmmd.data.source import file_identity

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

    A record is the members with one key, the name up to the first dot of its last part: an image
    (``jpg``, ``png``, ...), and a label in ``cls`` (digits) or under a key of ``json``. Opening the
    source goes through all headers, labels and JSON (of remote shards that reads most of them);
    images are read from their place as they are needed. A record without an image is an image that
    cannot be decoded.
    """

    def __init__(
        self,
        path: AnyPath,
        files: Sequence[AnyPath],
        *,
        geometry: Geometry,
        num_classes: int | None,
        image_key: str | None,
        label_key: str | None,
        workers: int,
        group_by: str | None = None,
    ) -> None:
        self._files = tuple(files)
        places = array("q")  # shard, offset, bytes of each
        labels: list[Any] = []
        groups: list[Any] = []
        for shard, file in enumerate(self._files):
            reader = _Reader(image_key, label_key, group_by, path.name)
            for place, label, group in reader.records(file):
                places.extend((shard, *place))
                labels.append(label)
                groups.append(group)
        self._places = np.array(places, np.int64).reshape(-1, 3)
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
        super().__init__(
            name=path.name,
            identity=file_identity("tar", path),
            num_images=len(labels),
            labels=None if missing or not labels else as_labels(labels, len(labels), path.name),
            class_names=None,
            num_classes=num_classes,
            geometry=geometry,
            workers=workers,
            groups=None if group_by is None else groups,
            group_by=group_by,
        )
        self._settle_shape()

    def encoded(self, indices: Sequence[int]) -> Iterator[Encoded]:
        current, file = -1, None
        try:
            for index in indices:
                shard, offset, size = self._places[index].tolist()
                try:
                    if shard != current or file is None:
                        if file is not None:
                            file.close()
                        current, file = shard, None
                        file = opened(self._files[shard])
                    file.seek(offset)
                    data = file.read(size)
                except Exception:
                    data = b""
                yield data if size and len(data) == size else None
        finally:
            if file is not None:
                file.close()


class _Reader:
    """Finds the records of a shard, without reading its images."""

    def __init__(
        self, image_key: str | None, label_key: str | None, group_by: str | None, name: str
    ) -> None:
        self.image = EXTENSIONS if image_key is None else {f".{image_key}"}
        self.label_key, self.group_by, self.name = label_key, group_by, name
        self.label_keys = _LABEL_KEYS if label_key is None else (label_key,)

    def records(self, path: AnyPath) -> Iterator[tuple[tuple[int, int], Any, Any]]:
        """Place of the image (size 0: none), label and group of each."""
        try:
            with opened(path) as file, tarfile.open(fileobj=file, mode="r:") as archive:
                members = (m for m in archive if m.isfile() and not _hidden(m.name))
                for _, members_of in itertools.groupby(members, lambda m: _split(m.name)[0]):
                    yield self._record(archive, members_of)
                    archive.members = []  # type: ignore[attr-defined]  # which would grow
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(
                f"source={str(path)!r} is not a readable tar file ({type(error).__name__}): "
                "expected one without compression; write or download it again."
            ) from None

    def _record(
        self, archive: tarfile.TarFile, members: Iterator[tarfile.TarInfo]
    ) -> tuple[tuple[int, int], Any, Any]:
        place, label, group = (0, 0), None, None
        for member in members:
            extension = _split(member.name)[1]
            if f".{extension}" in self.image:
                place = (member.offset_data, member.size)
            elif extension in ("cls", "json", self.label_key):
                held = archive.extractfile(member)
                text = b"" if held is None else held.read()
                if extension == "json":
                    facts = self._json(text)
                    found = next((facts[k] for k in self.label_keys if k in facts), None)
                    label = found if label is None else label
                    group = facts.get(self.group_by) if self.group_by else None
                elif self.label_key in (None, extension):
                    label = self._number(text)
        return place, label, group

    def _json(self, text: bytes) -> dict[str, Any]:
        try:
            facts = json.loads(text)
        except ValueError:
            facts = None
        if not isinstance(facts, dict):
            raise ValueError(
                f"source {self.name!r} has a .json member that is not a JSON object; expected one, "
                'e.g. {"label": 3}.'
            ) from None
        return facts

    def _number(self, text: bytes) -> int:
        if not text.strip().isdigit():
            raise ValueError(
                f"labels of source {self.name!r}: a .cls member is not a whole number; expected "
                "the digits of 0, 1, ... K-1."
            )
        return int(text)


def _split(name: str) -> tuple[str, str]:
    """Key and extension: ``a/b.c.png`` is ``a/b`` and ``c.png``."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def _hidden(name: str) -> bool:
    return name.rpartition("/")[2].startswith(".")
