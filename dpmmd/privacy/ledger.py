"""The ledger: every release of a population is written down, and all of them together are bounded.

A ``spend`` is written before the release reads an image, and a ``released`` line with the hash of
the released array before that leaves (`ledger_file`). `composition` says what all of them promise
together, and proves it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpmmd._warn import warn
from dpmmd.privacy import accounting, ledger_file
from dpmmd.privacy.composition import (
    Entry,
    Total,
    check_population,
    of_population,
    population_key,
    refuse_over_budget,
    total_of,
)
from dpmmd.privacy.ledger_file import RESTORE, asked_of, locked, locks_of, read, usable
from dpmmd.privacy.metadata import PrivacyError, Stated
from dpmmd.privacy.printed import plain


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
        self.path = usable(path)
        locks_of(self.path)
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
        with locked(self.path, write=False) as file:
            return read(self.path, file)[0]

    def total(self, population: str | None = None, *, unit: str = "image") -> Total:
        """All releases of a population together; of None, everything in the ledger.

        Raises:
            ValueError: no release was made for ``population``.
            FileNotFoundError, PrivacyError: as `entries`.
        """
        entries = self.entries()
        if population is not None and check_population(population) not in {
            population_key(e.population) for e in entries
        }:
            known = sorted({repr(e.population) for e in entries if e.population is not None})
            raise ValueError(
                f"population={population!r}: ledger {self.path} has no release for it, only for "
                f"{', '.join(known) or 'none that was named'}. Leave it out for the total of "
                "everything in the ledger."
            )
        return total_of(of_population(entries, population), unit)

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
        record, new = asked_of(
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
            refuse_over_budget(self.path, self.budget, [], new)
            ledger_file.create(self.path)
        with locked(self.path) as file:
            entries, last = read(self.path, file)
            refuse_over_budget(self.path, self.budget, of_population(entries, population), new)
            _warn_new(self.path, entries, population)
            return ledger_file.append(file, record, last)

    def check(self, **asked: Any) -> None:
        """Raises what `spend` with these arguments would raise now; records nothing."""
        _, new = asked_of(asked)
        entries = []
        if self.path.exists():
            entries = self.entries()
            with locked(self.path):  # as `spend` opens it: for writing
                pass
        else:
            descriptor, temporary = ledger_file.open_temporary(self.path)
            os.close(descriptor)
            os.unlink(temporary)
        refuse_over_budget(self.path, self.budget, of_population(entries, new.population), new)

    def is_open(self, spend: str) -> bool:
        """Whether a line that was spent waits for its release, so that this may still complete."""
        return self.path.exists() and any(
            e.hash == spend and e.array_sha256 is None for e in self.entries()
        )

    def confirm(self, spend: str, array_sha256: str) -> None:
        """Records the hash of the released array; call it before the release leaves."""
        with locked(self.path) as file:
            entries, last = read(self.path, file)
            if not any(e.hash == spend and e.array_sha256 is None for e in entries):
                raise PrivacyError(
                    f"ledger {self.path}: the spend {spend} of this release, written before it "
                    f"began, is no longer there. Nothing is released. {RESTORE}"
                )
            record = {"kind": "released", "spend": spend, "array_sha256": array_sha256}
            ledger_file.append(file, record, last)


def _warn_new(path: Path, entries: Sequence[Entry], population: str | None) -> None:
    if population is None:
        return
    named = [e.population for e in entries if e.population is not None]
    known = {population_key(name): repr(name) for name in named}
    if known and population_key(population) not in known:
        warn(
            f"population={population!r} is new to ledger {path}, which has "
            f"{plain(', '.join(sorted(known.values())))}: you declare that nobody has data in two "
            "of them. Where that is not so, what was spent is more than their totals say."
        )
