"""The ledger's file: one JSON object a line, chained by hashes, under the file's lock.

The first line says that it is a ledger; a ``spend`` is written before the release reads an image,
and a ``released`` line with the hash of the released array before that leaves. Every line holds its
own sha256 and that of the line before it, so that a line which is changed, moved or removed breaks
the chain. (What no chain can show: its last lines cut off whole, or all of it forged anew.
`Ledger.entry_of` misses a release whose line was cut off.)

But for the hash of the released array, no line depends on a pixel or on the number of images. There
is no time of day either: the time between two lines would tell how many images were read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dpmmd._version import __version__
from dpmmd.files import expanded
from dpmmd.privacy.composition import Entry, check_population
from dpmmd.privacy.metadata import PrivacyError
from dpmmd.privacy.printed import plain
from dpmmd.privacy.sensitivity import check_adjacency

_START = "0" * 64  # what the first line has in place of a previous hash
_UNWRITTEN = {"version": "", "previous": "", "hash": ""}  # what is known once a line is written
_INFINITY = "infinity"  # JSON has no number for it
RESTORE = (
    "Restore the ledger from a copy; do not start a new one, which would forget what was spent."
)
_OPTION = "(ledger=FILE, --ledger FILE)"
_STARTS = (b'{"format":', b'{"adjacency":', b'{"array_sha256":')  # of the lines that are written
_CUT = (
    "If the machine stopped while this line was being written, delete the incomplete line by hand: "
    "a release goes on only after its line is whole, so nothing left the machine that the other "
    "lines do not count. Otherwise restore the ledger from a copy."
)


class _Line(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    version: str
    previous: str
    hash: str


class _Header(_Line):
    kind: Literal["ledger"]
    format: Literal[1]


class _Spend(_Line):
    kind: Literal["spend"]
    identity: str
    source: str
    private: bool
    mu: float = Field(gt=0)
    epsilon: float = Field(gt=0, allow_inf_nan=False)
    delta: float = Field(gt=0, lt=1)
    adjacency: Literal["replace-one", "zero-out", "add-remove"]
    unit: str
    population: str | None = None


class _Released(_Line):
    kind: Literal["released"]
    spend: str  # hash of the spend's line
    array_sha256: str


_LINES: TypeAdapter[_Header | _Spend | _Released] = TypeAdapter(_Header | _Spend | _Released)


def usable(path: str | os.PathLike[str]) -> Path:
    """The path of a ledger that is there or not, if files can have such a name."""
    if str(path) in ("", "."):
        raise PrivacyError(f"ledger={str(path)!r}: expected the name of a file {_OPTION}.")
    if "\0" in str(path):
        raise PrivacyError(
            f"ledger={str(path)!r}: no file can have a zero byte in its name; name another "
            f"{_OPTION}."
        )
    path = expanded(path)
    with (
        contextlib.suppress(FileNotFoundError, NotADirectoryError),
        _explained(path, f"choose a file that you may look at, with a shorter name {_OPTION}"),
    ):
        os.lstat(path)
    return path


@contextlib.contextmanager
def _explained(path: Path, remedy: str) -> Iterator[None]:
    """The system's refusal, of the same class, with the ledger's name and what to do."""
    try:
        yield
    except OSError as error:
        raise type(error)(
            f"ledger={str(path)!r}: cannot be used ({error.strerror}); {remedy}."
        ) from None


def locks_of(path: Path) -> ModuleType:
    """The system's file locks; without them two releases at once could both fit a budget."""
    try:
        import fcntl
    except ImportError:
        raise OSError(
            f"ledger {path}: this system has no file locks (fcntl), so that two releases at once "
            "could pass a budget together. Release on Linux or macOS, or without a ledger and keep "
            "count yourself (dpmmd.privacy.compose)."
        ) from None
    return fcntl


def open_temporary(path: Path) -> tuple[int, str]:
    """An open file of mode 0600 in the ledger's folder, and its path."""
    folder = path.parent
    if not folder.is_dir():
        raise FileNotFoundError(
            f"ledger {path}: there is no folder {folder}; make it, or check the path."
        )
    with _explained(path, f"choose a file in a folder where you may make one {_OPTION}"):
        return tempfile.mkstemp(dir=folder, prefix=".dpmmd-ledger.")


def create(path: Path) -> None:
    """A ledger without entries, whole from its first moment; another process may be first."""
    folder = path.parent
    descriptor, temporary = open_temporary(path)
    try:
        with FileIO(descriptor, "r+b") as file:
            append(file, {"kind": "ledger", "format": 1}, _START)
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)
    directory = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def locked(path: Path, *, write: bool = True) -> Iterator[FileIO]:
    """The file, whose lines nobody else changes until the block ends."""
    locks = locks_of(path)
    if path.is_dir():
        raise PrivacyError(
            f"ledger={str(path)!r}: a folder, not a file; name a file in it {_OPTION}."
        )
    if not path.is_file():
        raise PrivacyError(f"ledger {path}: not a file (or a link to one that is gone). {RESTORE}")
    flags = os.O_RDWR | os.O_APPEND if write else os.O_RDONLY
    how = "read and write" if write else "read"
    with _explained(
        path,
        f"get the right to {how} it from its owner {_OPTION}: another ledger would not count "
        "what is in this one",
    ):
        descriptor = os.open(path, flags)
    with FileIO(descriptor, "r+b" if write else "rb") as file:
        locks.flock(file, locks.LOCK_EX if write else locks.LOCK_SH)
        yield file


def read(path: Path, file: FileIO) -> tuple[list[Entry], str]:
    """All entries and the last line's hash, if every line is as it was written."""
    entries: dict[str, Entry] = {}
    previous = _START
    file.seek(0)
    start = file.read(len(max(_STARTS, key=len)))
    if not start or not any(s.startswith(start) or start.startswith(s) for s in _STARTS):
        raise PrivacyError(
            f"ledger {path}: not a ledger, {'empty' if not start else 'by its first line'}"
            f"; nothing was changed. Name another file {_OPTION}; one that is not there yet is "
            "made. If this was your ledger, it was damaged: restore it from a copy, for a new "
            "one would forget what was spent."
        )
    file.seek(0)
    *lines, rest = file.readall().split(b"\n")
    for number, text in enumerate(lines, start=1):
        where = f"ledger {path}, line {number}"
        line = _parsed(text, where)
        if line.previous != previous:
            before = f"line {number - 1}" if number > 1 else "a first line"
            raise PrivacyError(
                f"{where}: follows hash {plain(line.previous)}, expected {previous} of "
                f"{before}; a "
                f"line before it was changed, removed or moved. {RESTORE}"
            )
        if isinstance(line, _Header) != (number == 1):
            raise PrivacyError(f"{where}: {line.kind!r} is out of place. {RESTORE}")
        if isinstance(line, _Spend):
            entries[line.hash] = _entry(line)
        elif isinstance(line, _Released):
            spent = entries.get(line.spend)
            if spent is None or spent.array_sha256 is not None:
                raise PrivacyError(
                    f"{where}: releases {plain(line.spend)}, expected a spend before it that "
                    f"was not released yet. {RESTORE}"
                )
            entries[line.spend] = _entry(spent, line.array_sha256)
        previous = line.hash
    if rest or not lines:  # after the lines before it, which say that it is a ledger
        raise PrivacyError(
            f"ledger {path}, line {len(lines) + 1}: incomplete, expected a line that ends "
            f"with its hash; the file was cut off. {_CUT if lines else RESTORE}"
        )
    return list(entries.values()), previous


def asked_of(asked: dict[str, Any]) -> tuple[dict[str, Any], Entry]:
    """The line of a spend, and what it will be read as."""
    record = {"kind": "spend", **asked, "adjacency": check_adjacency(asked["adjacency"])}
    record |= {key: float(asked[key]) for key in ("epsilon", "delta")}
    if not asked["private"]:
        record["mu"] = _INFINITY
    if asked["population"] is None:
        del record["population"]
    else:
        check_population(asked["population"])
    return record, _entry(_Spend.model_validate({**record, **_UNWRITTEN}))


def _entry(line: _Spend | Entry, array_sha256: str | None = None) -> Entry:
    names = ("identity", "source", "population", "private", "mu", "epsilon", "delta", "adjacency")
    fields = {name: getattr(line, name) for name in (*names, "unit", "version", "hash")}
    return Entry(**fields, array_sha256=array_sha256)


def _parsed(text: bytes, where: str) -> _Header | _Spend | _Released:
    """One line, if it is as it was written."""
    try:
        data = json.loads(text)
        found = data.pop("hash")
        expected, whole = _hash(data), _canonical({**data, "hash": found})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise PrivacyError(
            f"{where}: expected a JSON object with a 'hash'; damaged, or not a ledger. {RESTORE}"
        ) from None
    if found != expected or text != whole:
        raise PrivacyError(
            f"{where}: has hash {plain(found)}, expected {expected} of its content; it was edited "
            f"or damaged. {RESTORE}"
        )
    try:
        return _LINES.validate_python({**data, "hash": found})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].lower()
        raise PrivacyError(
            f"{where}: of a kind that this version of dpmmd does not write ({reason}). Use the "
            "version that wrote it."
        ) from None


def append(file: FileIO, record: dict[str, Any], previous: str) -> str:
    """Adds one line, whole and on disk or not at all; returns its hash."""
    data = {**record, "version": __version__, "previous": previous}
    data["hash"] = _hash(data)
    line = _canonical(data) + b"\n"
    size = file.seek(0, os.SEEK_END)
    try:
        written = file.write(line)
        if written != len(line):
            raise OSError(f"wrote {written} of {len(line)} bytes to the ledger; is the disk full?")
        os.fsync(file.fileno())
    except BaseException:
        file.truncate(size)
        raise
    return str(data["hash"])


def _canonical(data: dict[str, Any]) -> bytes:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def _hash(data: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(data)).hexdigest()
