"""The members of a tar file, each with bytes of its own.

A walk of the headers from the first to the last. A member's bytes are those between its header and
the next one, so that no two members share a byte, by construction: the place of the next header is
computed from the size of the bytes that are stored, and only ever grows. Members whose content is
not stored as it is (sparse files, links, parts of other volumes) have no bytes of their own here.

Formats: v7, ustar, GNU (long names, sparse files, which are recognised) and PAX. `tarfile` is not
used: it takes the size of a sparse member for the size of its bytes, believes a size that a global
PAX header states, follows a negative size backwards, and stops in silence at a damaged header.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

BLOCK = 512
_META = 1 << 20  # bytes of a long name, or of a PAX header, at most
_PIECE = 1 << 20
_OCTAL = re.compile(rb"[0-7]*")
_RECORD = re.compile(rb"(\d{1,20}) ([^=]+)=")
# Whose header may state a size although no bytes follow.
_WITHOUT_BYTES = frozenset(b"123456")
_REGULAR = frozenset((0, ord("0"), ord("7")))
_META_KINDS = frozenset(b"LKgxX")


class DamagedTar(ValueError):
    """Not a tar file, or one whose members cannot be told apart; the message says why."""


@dataclass(frozen=True)
class Member:
    """A member: its name, and where its bytes are. ``own`` is False where it has none."""

    name: str
    offset: int
    size: int
    own: bool


@dataclass
class Walk:
    """The members of `file`; after the last one, ``ended`` says whether an end mark was there."""

    file: IO[bytes]
    ended: bool = False

    def __iter__(self) -> Iterator[Member]:
        total = self.file.seek(0, 2)
        position, long_name, pax = 0, None, dict[str, bytes]()
        while position < total:
            header = self._read(position, BLOCK)
            if header.count(0) == BLOCK:
                self._check_rest(position)
                self.ended = True
                return
            _check(header)
            kind, size, data = header[156], _number(header[124:136]), position + BLOCK
            if kind in _META_KINDS:
                text = self._meta(data, size)
                if kind in b"L":
                    long_name = text.split(b"\0", 1)[0]
                elif kind in b"g":
                    _check_global(_pax(text))
                elif kind in b"xX":
                    pax = _pax(text)
                position = data + _padded(size)
                continue
            size = _decimal(pax["size"]) if "size" in pax else size
            data += self._sparse_blocks(position, header) if kind in b"S" else 0
            stored = 0 if kind in _WITHOUT_BYTES else size
            if data + _padded(stored) > total:
                raise DamagedTar("the file ends in the middle of a member")
            name = _name(header, long_name, pax)
            if kind not in b"5" and not name.endswith("/"):
                sparse = any(key.startswith("GNU.sparse.") for key in pax)
                own = kind in _REGULAR and not sparse
                yield Member(name, data, stored if own else 0, own)
            long_name, pax = None, {}
            position = data + _padded(stored)

    def _read(self, position: int, size: int) -> bytes:
        self.file.seek(position)
        data = self.file.read(size)
        if len(data) != size:
            raise DamagedTar("the file ends in the middle of a header")
        return data

    def _meta(self, data: int, size: int) -> bytes:
        if size > _META:
            raise DamagedTar(f"a header of {size} bytes, more than {_META}")
        return self._read(data, size)

    def _sparse_blocks(self, position: int, header: bytes) -> int:
        """Bytes of the further headers of a sparse member in GNU's old format."""
        more, size = header[482], 0
        while more:
            size += BLOCK
            more = self._read(position + size, BLOCK)[504]
        return size

    def _check_rest(self, position: int) -> None:
        self.file.seek(position)
        while piece := self.file.read(_PIECE):
            if piece.count(0) != len(piece):
                raise DamagedTar(
                    "more data behind its end, as in archives that were put together with cat; "
                    "write their members into one archive, or give them as several shards"
                )


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _check(header: bytes) -> None:
    """Raise DamagedTar unless the checksum is that of the header."""
    stored = _number(header[148:156])
    unsigned = sum(header) - sum(header[148:156]) + 8 * ord(" ")
    if stored != unsigned and stored != unsigned - 256 * _negative(header):  # as old writers did
        raise DamagedTar("a header whose checksum is wrong")


def _negative(header: bytes) -> int:
    return sum(byte > 127 for byte in header[:148] + header[156:])


def _number(field: bytes) -> int:
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0").split(b"\0")[0].rstrip()
    if not _OCTAL.fullmatch(digits):  # 0xFF: a negative number
        raise DamagedTar("a header with a number that is none")
    return int(digits or b"0", 8)


def _decimal(text: bytes) -> int:
    if not text.isdigit() or len(text) > 20:
        raise DamagedTar("a header with a number that is none")
    return int(text)


def _name(header: bytes, long_name: bytes | None, pax: dict[str, bytes]) -> str:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and header[345]:
        name = header[345:500].split(b"\0", 1)[0] + b"/" + name
    name = long_name if long_name is not None else name
    name = pax.get("GNU.sparse.name", pax.get("path", name))
    return name.decode("utf-8", "surrogateescape")


def _pax(data: bytes) -> dict[str, bytes]:
    """The records ``<length> <key>=<value>\\n`` of a PAX header."""
    found, position = {}, 0
    while position < len(data) and data[position]:
        match = _RECORD.match(data, position)
        end = position + int(match[1]) if match else 0
        if match is None or not match.end() < end <= len(data) or data[end - 1] != ord("\n"):
            raise DamagedTar("a PAX header that is none")
        found[match[2].decode("utf-8", "replace")] = data[match.end() : end - 1]
        position = end
    return found


def _check_global(pax: dict[str, bytes]) -> None:
    if any(key in ("size", "path", "linkpath") or key.startswith("GNU.sparse.") for key in pax):
        raise DamagedTar("a global header that gives all members one name or size")
