"""The ledger: every release of a population is written down, and all of them together are bounded.

One file, one JSON object a line. The first line says that it is a ledger; a ``spend`` is written
before the release reads an image, and a ``released`` line with the hash of the released array
before that leaves. Every line holds its own sha256 and that of the line before it, so that a line
which is changed, moved or removed breaks the chain. (What no chain can show: its last lines cut off
whole, or all of it forged anew. `Ledger.entry_of` misses a release whose line was cut off.)

But for the hash of the released array, no line depends on a pixel or on the number of images. There
is no time of day either: the time between two lines would tell how many images were read.

Populations. A ledger is one population: all its entries compose, whatever source they were made
from and however that was spelt. `Entry.identity` tells the data holder which source it was; nothing
is computed from it. The data holder may declare part of the data disjoint from the rest, by name: a
release for ``population="ward 3"`` composes with those for that name, and with those for which none
was named, as nothing was declared of these; one for which none is named composes with all. Names
are compared without regard to case, accents, spaces, punctuation, invisible characters and zeros
before a number, and the declaration stands in the line.

Proof. Let E_p be the entries that count for population p: those of p, and those of none. If what
was declared is true, a unit has data in one population p at most, so two data sets that differ in
this unit give the same data to every release that is not in E_p, which tells nothing of the unit.
The total of E_p therefore holds for every unit of p, and the total of all entries for every unit. A
name left out, or spelt in two ways where it is the same word, only makes totals larger.

Composition. Releases that are mu_i-GDP with respect to one adjacency are together mu-GDP with
mu^2 = sum mu_i^2 (Dong, Roth, Su 2022, Cor. 3.3), also where each mu_i is chosen after seeing the
earlier releases, as long as the sum stays within a budget fixed beforehand (Smith, Thakurta 2022).
Releases made under different adjacencies are first stated under one; the factor on mu is

====================  ==================  ===============  =================
stated under          made: replace-one   made: zero-out   made: add-remove
====================  ==================  ===============  =================
replace-one           1                   2                2
zero-out              1                   1                1
add-remove            no guarantee        no guarantee     1
====================  ==================  ===============  =================

Proofs. *To replace-one*: let D and D' differ in the image at one place, and D0 have that place
blanked (removed). D0 is a zero-out (add-remove) neighbour of D and of D', so D and D' are two steps
apart, and two steps of mu-GDP are 2 mu-GDP (Thm 2.14). *Replace-one to zero-out*: a blank is an
image that adds nothing to any sum, like one that cannot be decoded, and such images are among those
that an image may be exchanged for. *Add-remove to zero-out*: D with an image blanked has the same
sums as D without it, and nothing else that leaves an add-remove release depends on the images or on
their number. *To add-remove*: replace-one and zero-out releases state N exactly, so one image more
or less is seen with certainty, whatever the noise.

Units. The table is for one unit, images or groups. A change of one image is an exchange of its
group for one that has the image changed, blanked, or left out: stated for images, a release for
groups has the factor of replace-one in the table, 1, 2 or 2, under every adjacency that it can be
stated under (an add-remove release for groups under add-remove too: 2). Stated for groups, a
release for images, or for other groups, promises nothing: nobody knows how many images one has.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dpmmd._warn import warn
from dpmmd.data.identifiers import folded, unmarked, without_zeros
from dpmmd.files import expanded
from dpmmd.privacy import accounting
from dpmmd.privacy.metadata import PrivacyError, Stated
from dpmmd.privacy.printed import LONGEST, down, plain, up
from dpmmd.privacy.sensitivity import ADJACENCIES, check_adjacency

FACTORS = {  # FACTORS[stated under][made under]: see the proofs above
    "replace-one": {"replace-one": 1.0, "zero-out": 2.0, "add-remove": 2.0},
    "zero-out": {"replace-one": 1.0, "zero-out": 1.0, "add-remove": 1.0},
    "add-remove": {"replace-one": math.inf, "zero-out": math.inf, "add-remove": 1.0},
}
_FOR_IMAGES = {  # likewise, for images, of releases for groups
    "replace-one": {"replace-one": 1.0, "zero-out": 2.0, "add-remove": 2.0},
    "zero-out": {"replace-one": 1.0, "zero-out": 2.0, "add-remove": 2.0},
    "add-remove": {"replace-one": math.inf, "zero-out": math.inf, "add-remove": 2.0},
}
_START = "0" * 64  # what the first line has in place of a previous hash
_UNWRITTEN = {"version": "", "previous": "", "hash": ""}  # what is known once a line is written
_INFINITY = "infinity"  # JSON has no number for it
_RESTORE = (
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


@dataclass(frozen=True)
class Entry:
    """One release in a ledger.

    Attributes:
        identity: of the source, `dpmmd.data.ImageSource.identity`; information only.
        source: its name.
        population: what the data holder declared disjoint from all else under this name, or None.
        private: False for test noise, which promises nothing: ``mu`` is then infinite.
        mu, epsilon, delta, adjacency, unit: the guarantee, as in the release.
        version: of dpmmd.
        hash: of the line that spent it.
        array_sha256: of the released array; None where the release did not complete. It counts all
            the same.
    """

    identity: str
    source: str
    population: str | None
    private: bool
    mu: float
    epsilon: float
    delta: float
    adjacency: str
    unit: str
    version: str
    hash: str
    array_sha256: str | None


@dataclass(frozen=True)
class Total:
    """All releases of one population together.

    Attributes:
        releases: how many, with those that did not complete.
        incomplete: how many of them did not complete.
        private: False where one was made with test noise: every ``mu`` is then infinite.
        unit: what it is stated for: one image, or a group.
        units: what the releases were made for.
        mu: by the adjacency that it is stated under; infinite where nothing is guaranteed.
    """

    releases: int
    incomplete: int
    private: bool
    unit: str
    units: tuple[str, ...]
    mu: dict[str, float]

    def epsilon(self, *, adjacency: str, delta: float) -> float:
        """The epsilon of all releases together at ``delta``; infinite where nothing is promised."""
        return _epsilon(self.mu[check_adjacency(adjacency)], delta)


class Ledger:
    """A file that remembers every release of private images; created by the first `spend`.

    Args:
        path: the file (mode 0600). There is no default: keep it where it is backed up.
        budget: (epsilon, delta) that all releases of one population together must keep to, stated
            under the adjacency of the release that is asked for. None: record only.

    Raises:
        ValueError, TypeError: ``budget`` is not two numbers in their ranges.
        PrivacyError: ``path`` is empty, or no name of a file.
        OSError: this system cannot lock files, or does not let you look at ``path``.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, budget: Sequence[float] | None = None
    ) -> None:
        self.path = _usable(path)
        _locks(self.path)
        self.budget: tuple[float, float] | None = None
        if budget is not None:
            if not isinstance(budget, tuple | list) or len(budget) != 2:
                raise TypeError(f"budget={budget!r}: expected (epsilon, delta), e.g. (1.0, 1e-6).")
            try:
                accounting.calibrate(epsilon=budget[0], delta=budget[1])
            except (ValueError, TypeError) as error:
                raise ValueError(f"budget={tuple(budget)!r}: {error}") from None
            self.budget = (float(budget[0]), float(budget[1]))

    def entries(self) -> list[Entry]:
        """Every release, in order.

        Raises:
            FileNotFoundError: there is no such file.
            PrivacyError: the chain is broken or a line is damaged; the message names the line.
        """
        if not self.path.exists():
            raise FileNotFoundError(
                f"ledger {self.path}: there is no such file; `dpmmd release --ledger FILE` makes "
                "one."
            )
        with self._locked(write=False) as file:
            return self._read(file)[0]

    def total(self, population: str | None = None, *, unit: str = "image") -> Total:
        """All releases of a population together; of None, everything in the ledger.

        Raises:
            ValueError: no release was made for ``population``.
            FileNotFoundError, PrivacyError: as `entries`.
        """
        entries = self.entries()
        if population is not None and check_population(population) not in {
            _key(e.population) for e in entries
        }:
            known = sorted({repr(e.population) for e in entries if e.population is not None})
            raise ValueError(
                f"population={population!r}: ledger {self.path} has no release for it, only for "
                f"{', '.join(known) or 'none that was named'}. Leave it out for the total of "
                "everything in the ledger."
            )
        return _total(_of_population(entries, population), unit)

    def entry_of(self, release: Stated) -> Entry:
        """The entry of a release, found by the hash of its array.

        Raises:
            PrivacyError: it is not in the ledger, or the ledger says otherwise than the release.
        """
        m = release.metadata
        for entry in self.entries():
            if entry.array_sha256 == m.array_sha256:
                break
        else:
            raise PrivacyError(
                f"ledger {self.path}: the release with array sha256 {m.array_sha256} is not in it: "
                "it was made without this ledger, or its line was removed. What it spent is not in "
                "any total of this ledger."
            )
        for name in ("private", "epsilon", "delta", "adjacency", "unit", *(["mu"] * m.private)):
            recorded, told = getattr(entry, name), getattr(m, name)
            if recorded != told:
                raise PrivacyError(
                    f"ledger {self.path}: recorded this release with {name} = "
                    f"{plain(repr(recorded))}, its file says {plain(repr(told))}. The file was "
                    "edited; restore it from a copy."
                )
        return entry

    def spend(
        self,
        *,
        identity: str,
        source: str,
        mu: float,
        epsilon: float,
        delta: float,
        adjacency: str,
        unit: str,
        private: bool,
        population: str | None = None,
    ) -> str:
        """Records a release that is about to read images; on disk when this returns.

        Check and record are one step under the file's lock: of two releases at once that do not fit
        into the budget together, one is refused.

        Returns:
            The hash of the line, for `confirm`.

        Raises:
            ValueError: ``population`` is not a name.
            PrivacyError: the budget does not allow it, or the chain is broken; nothing was written.

        Warns:
            UserWarning: a population that is new to a ledger with other releases in it: what this
                declares.
        """
        record, new = _asked(
            {
                "identity": identity,
                "source": source,
                "private": private,
                "mu": mu,
                "epsilon": epsilon,
                "delta": delta,
                "adjacency": adjacency,
                "unit": unit,
                "population": population,
            }
        )
        if not self.path.exists():
            self._refuse_over_budget([], new)
            self._create()
        with self._locked() as file:
            entries, last = self._read(file)
            self._refuse_over_budget(_of_population(entries, population), new)
            _warn_new(self.path, entries, population)
            return _append(file, record, last)

    def check(self, **asked: Any) -> None:
        """Raises what `spend` with these arguments would raise now; records nothing."""
        _, new = _asked(asked)
        entries = []
        if self.path.exists():
            entries = self.entries()
            with self._locked():  # as `spend` opens it: for writing
                pass
        else:
            descriptor, temporary = self._temporary()
            os.close(descriptor)
            os.unlink(temporary)
        self._refuse_over_budget(_of_population(entries, new.population), new)

    def is_open(self, spend: str) -> bool:
        """Whether a line that was spent waits for its release, so that this may still complete."""
        return self.path.exists() and any(
            e.hash == spend and e.array_sha256 is None for e in self.entries()
        )

    def confirm(self, spend: str, array_sha256: str) -> None:
        """Records the hash of the released array; call it before the release leaves."""
        with self._locked() as file:
            entries, last = self._read(file)
            if not any(e.hash == spend and e.array_sha256 is None for e in entries):
                raise PrivacyError(
                    f"ledger {self.path}: the spend {spend} of this release, written before it "
                    f"began, is no longer there. Nothing is released. {_RESTORE}"
                )
            _append(file, {"kind": "released", "spend": spend, "array_sha256": array_sha256}, last)

    def _refuse_over_budget(self, earlier: Sequence[Entry], new: Entry) -> None:
        if self.budget is None or _within(self.budget, earlier, new):
            return
        epsilon, delta = self.budget
        limit = accounting.calibrate(epsilon=epsilon, delta=delta).mu
        spent = _composed(earlier, new.adjacency, new.unit)
        after = _composed([*earlier, new], new.adjacency, new.unit)
        whose = "" if new.population is None else f" for population {new.population!r}"
        start = f"ledger {self.path}: budget=({down(epsilon)}, {down(delta)}){whose}: "
        if not new.private:
            raise PrivacyError(
                f"{start}test noise promises nothing, so no budget allows it. Leave out the budget "
                "(the ledger then records an infinite loss), or use another ledger for tests."
            )
        if not all(e.private for e in earlier):
            raise PrivacyError(
                f"{start}the ledger has a release with test noise, so that nothing is left to "
                "promise. Leave out the budget, or keep a ledger of its own for other people's "
                "data."
            )
        if math.isinf(spent) and (others := [e.unit for e in earlier if e.unit != new.unit]):
            raise PrivacyError(
                f"{start}earlier releases have another unit ({plain(others[0])}), so that no total "
                f"can be stated for this one ({plain(new.unit)}). Use the same unit, or leave out "
                "the budget."
            )
        if math.isinf(spent):
            raise PrivacyError(
                f"{start}earlier releases under replace-one or zero-out adjacency stated the "
                "number of images, so that no total can be stated under add-remove. Use "
                "adjacency='replace-one' or 'zero-out', or leave out the budget."
            )
        fits = _fitting(self.budget, earlier, new, math.sqrt(max(0.0, limit**2 - spent**2)))
        advice = "nothing of it is left" if fits is None else f"at most epsilon = {fits} fits"
        count = f"{len(earlier)} earlier release{'' if len(earlier) == 1 else 's'}"
        raise PrivacyError(
            f"{start}{count} spent mu = {up(spent, 4)} of {down(limit, 4)} under {new.adjacency} "
            f"adjacency and this one takes {up(new.mu, 4)}, together epsilon = "
            f"{up(_epsilon(after, delta), 4)} at delta = {up(delta)}. All releases in a ledger "
            f"count together, of whatever source. For a release at delta = {up(new.delta)} "
            f"{advice}: lower epsilon, raise the budget, or keep a ledger of its own for other "
            "people's data (or name the population, if they stand in this one). No image was read."
        )

    def _temporary(self) -> tuple[int, str]:
        """An open file of mode 0600 in the ledger's folder, and its path."""
        folder = self.path.parent
        if not folder.is_dir():
            raise FileNotFoundError(
                f"ledger {self.path}: there is no folder {folder}; make it, or check the path."
            )
        with _explained(self.path, f"choose a file in a folder where you may make one {_OPTION}"):
            return tempfile.mkstemp(dir=folder, prefix=".dpmmd-ledger.")

    def _create(self) -> None:
        """A ledger without entries, whole from its first moment; another process may be first."""
        folder = self.path.parent
        descriptor, temporary = self._temporary()
        try:
            with FileIO(descriptor, "r+b") as file:
                _append(file, {"kind": "ledger", "format": 1}, _START)
            with contextlib.suppress(FileExistsError):
                os.link(temporary, self.path)
        finally:
            os.unlink(temporary)
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    @contextlib.contextmanager
    def _locked(self, *, write: bool = True) -> Iterator[FileIO]:
        """The file, whose lines nobody else changes until the block ends."""
        locks = _locks(self.path)
        if self.path.is_dir():
            raise PrivacyError(
                f"ledger={str(self.path)!r}: a folder, not a file; name a file in it {_OPTION}."
            )
        if not self.path.is_file():
            raise PrivacyError(
                f"ledger {self.path}: not a file (or a link to one that is gone). {_RESTORE}"
            )
        flags = os.O_RDWR | os.O_APPEND if write else os.O_RDONLY
        how = "read and write" if write else "read"
        with _explained(
            self.path,
            f"get the right to {how} it from its owner {_OPTION}: another ledger would not count "
            "what is in this one",
        ):
            descriptor = os.open(self.path, flags)
        with FileIO(descriptor, "r+b" if write else "rb") as file:
            locks.flock(file, locks.LOCK_EX if write else locks.LOCK_SH)
            yield file

    def _read(self, file: FileIO) -> tuple[list[Entry], str]:
        """All entries and the last line's hash, if every line is as it was written."""
        entries: dict[str, Entry] = {}
        previous = _START
        file.seek(0)
        start = file.read(len(max(_STARTS, key=len)))
        if not start or not any(s.startswith(start) or start.startswith(s) for s in _STARTS):
            raise PrivacyError(
                f"ledger {self.path}: not a ledger, {'empty' if not start else 'by its first line'}"
                f"; nothing was changed. Name another file {_OPTION}; one that is not there yet is "
                "made. If this was your ledger, it was damaged: restore it from a copy, for a new "
                "one would forget what was spent."
            )
        file.seek(0)
        *lines, rest = file.readall().split(b"\n")
        for number, text in enumerate(lines, start=1):
            where = f"ledger {self.path}, line {number}"
            line = _parsed(text, where)
            if line.previous != previous:
                before = f"line {number - 1}" if number > 1 else "a first line"
                raise PrivacyError(
                    f"{where}: follows hash {plain(line.previous)}, expected {previous} of "
                    f"{before}; a "
                    f"line before it was changed, removed or moved. {_RESTORE}"
                )
            if isinstance(line, _Header) != (number == 1):
                raise PrivacyError(f"{where}: {line.kind!r} is out of place. {_RESTORE}")
            if isinstance(line, _Spend):
                entries[line.hash] = _entry(line)
            elif isinstance(line, _Released):
                spent = entries.get(line.spend)
                if spent is None or spent.array_sha256 is not None:
                    raise PrivacyError(
                        f"{where}: releases {plain(line.spend)}, expected a spend before it that "
                        f"was not released yet. {_RESTORE}"
                    )
                entries[line.spend] = _entry(spent, line.array_sha256)
            previous = line.hash
        if rest or not lines:  # after the lines before it, which say that it is a ledger
            raise PrivacyError(
                f"ledger {self.path}, line {len(lines) + 1}: incomplete, expected a line that ends "
                f"with its hash; the file was cut off. {_CUT if lines else _RESTORE}"
            )
        return list(entries.values()), previous


def _usable(path: str | os.PathLike[str]) -> Path:
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


def check_population(name: str) -> str:
    """What names of a population are compared by: letters and digits in the form of identifiers.

    That form has no case, accents, invisible characters or zeros before a number.

    Raises:
        ValueError, TypeError: it is not a name.
    """
    if not isinstance(name, str):
        raise TypeError(f"population={name!r}: expected a name, e.g. 'ward 3', or None.")
    if re.fullmatch("[0-9a-f]{64}", name):
        raise ValueError(
            f"population={name!r}: that is the identity of a source, which no longer counts: all "
            "releases in a ledger compose. Leave it out, or name what was declared disjoint from "
            "the rest, e.g. 'ward 3'."
        )
    key = _key(name)
    if not key or len(name) > LONGEST or not name.isprintable():
        raise ValueError(
            f"population={plain(repr(name))}: expected a name with a letter or digit in it, of at "
            f"most {LONGEST} printable characters, e.g. 'ward 3'."
        )
    return key


def _key(name: str | None) -> str:
    return "".join(filter(str.isalnum, without_zeros(unmarked(folded(name or "")))))


def _of_population(entries: Iterable[Entry], population: str | None) -> list[Entry]:
    """What composes with a release for a population: its entries, and those of none."""
    if population is None:
        return list(entries)
    keys = (_key(population), _key(None))
    return [e for e in entries if _key(e.population) in keys]


def _warn_new(path: Path, entries: Sequence[Entry], population: str | None) -> None:
    if population is None:
        return
    known = {_key(e.population): repr(e.population) for e in entries if e.population is not None}
    if known and _key(population) not in known:
        warn(
            f"population={population!r} is new to ledger {path}, which has "
            f"{plain(', '.join(sorted(known.values())))}: you declare that nobody has data in two "
            "of them. Where that is not so, what was spent is more than their totals say."
        )


def _within(budget: tuple[float, float], earlier: Sequence[Entry], new: Entry) -> bool:
    """Whether all together are (epsilon, delta)-DP, for certain."""
    epsilon, delta = budget
    mu = max(_composed([*earlier, new], new.adjacency, new.unit), 1e-8)
    return mu <= 1e4 and accounting.delta(mu=mu, epsilon=epsilon) <= delta


def _fitting(
    budget: tuple[float, float], earlier: Sequence[Entry], new: Entry, room: float
) -> str | None:
    """The largest epsilon, to six digits, of a release like ``new`` that the budget allows."""
    epsilon = _epsilon(room, new.delta)
    for _ in range(10):
        shown = down(epsilon)
        if not 1e-6 <= float(shown) < 1e4:
            return None
        mu = accounting.calibrate(epsilon=float(shown), delta=new.delta).mu
        if _within(budget, earlier, replace(new, mu=mu)):
            return shown
        epsilon = float(shown) * (1 - 1e-5)
    return None


def _locks(path: Path) -> ModuleType:
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


def _asked(asked: dict[str, Any]) -> tuple[dict[str, Any], Entry]:
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


def _parsed(text: bytes, where: str) -> _Header | _Spend | _Released:
    """One line, if it is as it was written."""
    try:
        data = json.loads(text)
        found = data.pop("hash")
        expected, whole = _hash(data), _canonical({**data, "hash": found})
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise PrivacyError(
            f"{where}: expected a JSON object with a 'hash'; damaged, or not a ledger. {_RESTORE}"
        ) from None
    if found != expected or text != whole:
        raise PrivacyError(
            f"{where}: has hash {plain(found)}, expected {expected} of its content; it was edited "
            f"or damaged. {_RESTORE}"
        )
    try:
        return _LINES.validate_python({**data, "hash": found})
    except ValidationError as error:
        reason = error.errors()[0]["msg"].lower()
        raise PrivacyError(
            f"{where}: of a kind that this version of dpmmd does not write ({reason}). Use the "
            "version that wrote it."
        ) from None


def _append(file: FileIO, record: dict[str, Any], previous: str) -> str:
    """Adds one line, whole and on disk or not at all; returns its hash."""
    import dpmmd

    data = {**record, "version": dpmmd.__version__, "previous": previous}
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


def _entry(line: _Spend | Entry, array_sha256: str | None = None) -> Entry:
    names = ("identity", "source", "population", "private", "mu", "epsilon", "delta", "adjacency")
    fields = {name: getattr(line, name) for name in (*names, "unit", "version", "hash")}
    return Entry(**fields, array_sha256=array_sha256)


def _total(entries: Sequence[Entry], unit: str) -> Total:
    return Total(
        releases=len(entries),
        incomplete=sum(e.array_sha256 is None for e in entries),
        private=all(e.private for e in entries),
        unit=unit,
        units=tuple(e.unit for e in entries),
        mu={adjacency: _composed(entries, adjacency, unit) for adjacency in ADJACENCIES},
    )


def _composed(entries: Iterable[Entry], adjacency: str, unit: str) -> float:
    """mu of all together, stated under ``adjacency``; rounded up like `accounting.compose`."""
    mus = (_factor(adjacency, unit, e) * e.mu for e in entries)  # the factors are powers of two
    return math.hypot(*mus) * accounting.UP


def _factor(adjacency: str, unit: str, entry: Entry) -> float:
    if entry.unit == unit:
        return FACTORS[adjacency][entry.adjacency]
    return _FOR_IMAGES[adjacency][entry.adjacency] if unit == "image" else math.inf


def _epsilon(mu: float, delta: float) -> float:
    """`accounting.epsilon`, also for no release at all and for more than any noise can hide."""
    if mu == 0:
        return 0.0
    return accounting.epsilon(mu=max(mu, 1e-8), delta=delta) if mu <= 1e4 else math.inf
