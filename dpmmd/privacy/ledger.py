"""The ledger: every release of a data set is written down, and all of them together are bounded.

One file, one JSON object a line. The first line says that it is a ledger; a ``spend`` is written
before the release reads an image, and a ``released`` line with the hash of the released array
before that leaves. Every line holds its own sha256 and that of the line before it, so that a line
which is changed, moved or removed breaks the chain. (What no chain can show: its last lines cut off
whole, or all of it forged anew. `Ledger.entry_of` misses a release whose line was cut off.)

But for the hash of the released array, no line depends on a pixel or on the number of images. There
is no time of day either: the time between two lines would tell how many images were read.

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
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from dpmmd.privacy import accounting
from dpmmd.privacy.release_file import PrivacyError
from dpmmd.privacy.sensitivity import ADJACENCIES, check_adjacency

if TYPE_CHECKING:
    from dpmmd.privacy.release_file import Release

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
_INFINITY = "infinity"  # JSON has no number for it
_RESTORE = (
    "Restore the ledger from a copy; do not start a new one, which would forget what was spent."
)
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
    epsilon: float = Field(gt=0)
    delta: float = Field(gt=0, lt=1)
    adjacency: Literal["replace-one", "zero-out", "add-remove"]
    unit: str


class _Released(_Line):
    kind: Literal["released"]
    spend: str  # hash of the spend's line
    array_sha256: str


_LINES: TypeAdapter[_Header | _Spend | _Released] = TypeAdapter(_Header | _Spend | _Released)


@dataclass(frozen=True)
class Entry:
    """One release in a ledger.

    Attributes:
        identity: of the data set, `dpmmd.data.ImageSource.identity`.
        source: its name.
        private: False for test noise, which promises nothing: ``mu`` is then infinite.
        mu, epsilon, delta, adjacency, unit: the guarantee, as in the release.
        version: of dpmmd.
        hash: of the line that spent it.
        array_sha256: of the released array; None where the release did not complete. It counts all
            the same.
    """

    identity: str
    source: str
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
    """All releases of one data set together.

    Attributes:
        releases: how many, with those that did not complete.
        incomplete: how many of them did not complete.
        private: False where one was made with test noise: every ``mu`` is then infinite.
        unit: what it is stated for: one image, or a group.
        mu: by the adjacency that it is stated under; infinite where nothing is guaranteed.
    """

    releases: int
    incomplete: int
    private: bool
    unit: str
    mu: dict[str, float]

    def epsilon(self, *, adjacency: str, delta: float) -> float:
        """The epsilon of all releases together at ``delta``; infinite where nothing is promised."""
        return _epsilon(self.mu[check_adjacency(adjacency)], delta)


class Ledger:
    """A file that remembers every release of private images; created by the first `spend`.

    Args:
        path: the file (mode 0600). There is no default: keep it where it is backed up.
        budget: (epsilon, delta) that all releases of one data set together must keep to, stated
            under the adjacency of the release that is asked for. None: record only.

    Raises:
        ValueError, TypeError: ``budget`` is not two numbers in their ranges.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, budget: Sequence[float] | None = None
    ) -> None:
        self.path = Path(path).expanduser()
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

    def total(self, identity: str, *, unit: str = "image") -> Total:
        """All releases of the data set ``identity`` together; raises as `entries`."""
        return _total([e for e in self.entries() if e.identity == identity], unit)

    def entry_of(self, release: Release) -> Entry:
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
            if getattr(entry, name) != getattr(m, name):
                raise PrivacyError(
                    f"ledger {self.path}: recorded this release with {name} = "
                    f"{getattr(entry, name)!r}, its file says {getattr(m, name)!r}. The file was "
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
    ) -> str:
        """Records a release that is about to read images; on disk when this returns.

        Check and record are one step under the file's lock: of two releases at once that do not fit
        into the budget together, one is refused.

        Returns:
            The hash of the line, for `confirm`.

        Raises:
            PrivacyError: the budget does not allow it, or the chain is broken; nothing was written.
        """
        record = {
            "kind": "spend",
            "identity": identity,
            "source": source,
            "private": private,
            "mu": mu if private else _INFINITY,
            "epsilon": float(epsilon),
            "delta": float(delta),
            "adjacency": check_adjacency(adjacency),
            "unit": unit,
        }
        new = _entry(_Spend.model_validate({**record, "version": "", "previous": "", "hash": ""}))
        if not self.path.exists():
            self._refuse_over_budget([], new)
            self._create()
        with self._locked() as file:
            entries, last = self._read(file)
            self._refuse_over_budget([e for e in entries if e.identity == identity], new)
            return _append(file, record, last)

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
        if self.budget is None:
            return
        epsilon, delta = self.budget
        # Rounded down by 1e-9 from the largest mu that is (epsilon, delta)-DP: the tolerance below,
        # for rounding in the sum of squares, stays on the safe side.
        limit = accounting.calibrate(epsilon=epsilon, delta=delta).mu
        spent = _composed(earlier, new.adjacency, new.unit)
        after = _composed([*earlier, new], new.adjacency, new.unit)
        if after <= limit * (1 + 1e-12):
            return
        start = f"ledger {self.path}: budget=({epsilon:g}, {delta:g}) of {new.source!r}: "
        if not new.private:
            raise PrivacyError(
                f"{start}test noise promises nothing, so no budget allows it. Leave out the budget "
                "(the ledger then records an infinite loss), or use another ledger for tests."
            )
        if not all(e.private for e in earlier):
            raise PrivacyError(
                f"{start}a release with test noise was made of it, so that nothing is left to "
                "promise. Use other data, or leave out the budget."
            )
        if math.isinf(spent) and any(e.unit != new.unit for e in earlier):
            raise PrivacyError(
                f"{start}earlier releases have another unit ({earlier[0].unit}), so that no total "
                f"can be stated for this one ({new.unit}). Use the same unit, or leave out the "
                "budget."
            )
        if math.isinf(spent):
            raise PrivacyError(
                f"{start}earlier releases under replace-one or zero-out adjacency stated the "
                "number of images, so that no total can be stated under add-remove. Use "
                "adjacency='replace-one' or 'zero-out', or leave out the budget."
            )
        room = math.sqrt(max(0.0, limit**2 - spent**2))
        fits = math.floor(_epsilon(room, new.delta) * 1e4) / 1e4
        advice = f"at most epsilon = {fits:g} fits" if fits else "nothing of it is left"
        count = f"{len(earlier)} earlier release{'' if len(earlier) == 1 else 's'}"
        raise PrivacyError(
            f"{start}{count} spent mu = {spent:.4g} of {limit:.4g} under {new.adjacency} "
            f"adjacency and this one takes {new.mu:.4g}, together epsilon = "
            f"{_epsilon(after, delta):.4g} at delta = {delta:g}. For a release at delta = "
            f"{new.delta:g} {advice}: lower epsilon, raise the budget, or use other data. No image "
            "was read."
        )

    def _create(self) -> None:
        """A ledger without entries, whole from its first moment; another process may be first."""
        folder = self.path.parent
        if not folder.is_dir():
            raise FileNotFoundError(
                f"ledger {self.path}: there is no folder {folder}; make it, or check the path."
            )
        descriptor, temporary = tempfile.mkstemp(dir=folder, prefix=f".{self.path.name}.")  # 0600
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
        import fcntl  # not on every platform that imports this package

        if not self.path.is_file():
            raise PrivacyError(f"ledger {self.path}: not a file. {_RESTORE}")
        flags = os.O_RDWR | os.O_APPEND if write else os.O_RDONLY
        with FileIO(os.open(self.path, flags), "r+b" if write else "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX if write else fcntl.LOCK_SH)
            yield file

    def _read(self, file: FileIO) -> tuple[list[Entry], str]:
        """All entries and the last line's hash, if every line is as it was written."""
        entries: dict[str, Entry] = {}
        previous = _START
        file.seek(0)
        *lines, rest = file.readall().split(b"\n")
        if rest or not lines:
            raise PrivacyError(
                f"ledger {self.path}, line {len(lines) + 1}: incomplete, expected a line that ends "
                f"with its hash; the file was cut off. {_CUT}"
            )
        for number, text in enumerate(lines, start=1):
            where = f"ledger {self.path}, line {number}"
            line = _parsed(text, where)
            if line.previous != previous:
                before = f"line {number - 1}" if number > 1 else "a first line"
                raise PrivacyError(
                    f"{where}: follows hash {line.previous}, expected {previous} of {before}; a "
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
                        f"{where}: releases {line.spend}, expected a spend before it that was not "
                        f"released yet. {_RESTORE}"
                    )
                entries[line.spend] = _entry(spent, line.array_sha256)
            previous = line.hash
        return list(entries.values()), previous


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
            f"{where}: has hash {found}, expected {expected} of its content; it was edited or "
            f"damaged. {_RESTORE}"
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
    names = ("identity", "source", "private", "mu", "epsilon", "delta", "adjacency", "unit")
    fields = {name: getattr(line, name) for name in (*names, "version", "hash")}
    return Entry(**fields, array_sha256=array_sha256)


def _total(entries: Sequence[Entry], unit: str) -> Total:
    return Total(
        releases=len(entries),
        incomplete=sum(e.array_sha256 is None for e in entries),
        private=all(e.private for e in entries),
        unit=unit,
        mu={adjacency: _composed(entries, adjacency, unit) for adjacency in ADJACENCIES},
    )


def _composed(entries: Iterable[Entry], adjacency: str, unit: str) -> float:
    """mu of all together, stated under ``adjacency``; rounded up like `accounting.compose`."""
    mus = (_factor(adjacency, unit, e) * e.mu for e in entries)
    return math.hypot(*mus) * (1 + 1e-15)


def _factor(adjacency: str, unit: str, entry: Entry) -> float:
    if entry.unit == unit:
        return FACTORS[adjacency][entry.adjacency]
    return _FOR_IMAGES[adjacency][entry.adjacency] if unit == "image" else math.inf


def _epsilon(mu: float, delta: float) -> float:
    """`accounting.epsilon`, also for no release at all and for more than any noise can hide."""
    if mu < 1e-8:
        return 0.0
    return accounting.epsilon(mu=mu, delta=delta) if mu <= 1e4 else math.inf
