"""Releases together: what all of a population's promise, and whether a budget allows one more.

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

Modes. A release whose modes were fitted to an earlier one depends on the data in two ways: directly
and through that release's output. For every fixed output it is as private as it states, so the pair
is an adaptive composition, and its mu^2 are added like those of a ledger (`together`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from dpmmd.data.identifiers import folded, unmarked, without_zeros
from dpmmd.privacy import accounting
from dpmmd.privacy.metadata import Metadata, PrivacyError, Statement, unit_of
from dpmmd.privacy.printed import LONGEST, down, plain, up
from dpmmd.privacy.sensitivity import ADJACENCIES, check_adjacency

GUESS = 1e-6  # mu of another version of the accounting, of which this one is tight
EARLIER = 2e-8  # delta of files of format 2, whose mu was rounded less carefully
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


class _Guarantee(Protocol):
    """What composes: an entry of a ledger, a release's metadata or its `Statement`."""

    @property
    def mu(self) -> float: ...
    @property
    def adjacency(self) -> str: ...
    @property
    def unit(self) -> str: ...


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
        return epsilon_of(self.mu[check_adjacency(adjacency)], delta)


def refuse_over_budget(
    path: Path, budget: tuple[float, float] | None, earlier: Sequence[Entry], new: Entry
) -> None:
    """Raises a PrivacyError where ``new`` and all ``earlier`` together are more than the budget."""
    if budget is None or within(budget, earlier, new):
        return
    epsilon, delta = budget
    limit = accounting.calibrate(epsilon=epsilon, delta=delta).mu
    spent = composed(earlier, new.adjacency, new.unit)
    after = composed([*earlier, new], new.adjacency, new.unit)
    whose = "" if new.population is None else f" for population {new.population!r}"
    start = f"ledger {path}: budget=({down(epsilon)}, {down(delta)}){whose}: "
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
    fits = fitting(budget, earlier, new, math.sqrt(max(0.0, limit**2 - spent**2)))
    advice = "nothing of it is left" if fits is None else f"at most epsilon = {fits} fits"
    count = f"{len(earlier)} earlier release{'' if len(earlier) == 1 else 's'}"
    raise PrivacyError(
        f"{start}{count} spent mu = {up(spent, 4)} of {down(limit, 4)} under {new.adjacency} "
        f"adjacency and this one takes {up(new.mu, 4)}, together epsilon = "
        f"{up(epsilon_of(after, delta), 4)} at delta = {up(delta)}. All releases in a ledger "
        f"count together, of whatever source. For a release at delta = {up(new.delta)} "
        f"{advice}: lower epsilon, raise the budget, or keep a ledger of its own for other "
        "people's data (or name the population, if they stand in this one). No image was read."
    )


def within(budget: tuple[float, float], earlier: Sequence[Entry], new: Entry) -> bool:
    """Whether all together are (epsilon, delta)-DP, for certain."""
    epsilon, delta = budget
    mu = max(composed([*earlier, new], new.adjacency, new.unit), 1e-8)
    return mu <= 1e4 and accounting.delta(mu=mu, epsilon=epsilon) <= delta


def fitting(
    budget: tuple[float, float], earlier: Sequence[Entry], new: Entry, room: float
) -> str | None:
    """The largest epsilon, to six digits, of a release like ``new`` that the budget allows."""
    epsilon = epsilon_of(room, new.delta)
    for _ in range(10):
        shown = down(epsilon)
        if not 1e-6 <= float(shown) < 1e4:
            return None
        mu = accounting.calibrate(epsilon=float(shown), delta=new.delta).mu
        if within(budget, earlier, replace(new, mu=mu)):
            return shown
        epsilon = float(shown) * (1 - 1e-5)
    return None


def total_of(entries: Sequence[Entry], unit: str) -> Total:
    return Total(
        releases=len(entries),
        incomplete=sum(e.array_sha256 is None for e in entries),
        private=all(e.private for e in entries),
        unit=unit,
        units=tuple(e.unit for e in entries),
        mu={adjacency: composed(entries, adjacency, unit) for adjacency in ADJACENCIES},
    )


def composed(entries: Iterable[_Guarantee], adjacency: str, unit: str) -> float:
    """mu of all together, stated under ``adjacency``; rounded up like `accounting.compose`."""
    mus = (_factor(adjacency, unit, e) * e.mu for e in entries)  # the factors are powers of two
    return math.hypot(*mus) * accounting.UP


def together(m: Metadata) -> float:
    """mu of a release and of the one that its modes come from, under its own adjacency and unit.

    What a file of a release promises: the rule that it holds is an output of the other release.
    """
    if m.modes is None or m.modes.origin is None:
        return m.mu
    return composed([m.modes.origin, m], m.adjacency, m.unit)


def split_epsilon(epsilon: float, delta: float, share: float) -> tuple[float, float]:
    """The epsilons of two releases that are together (epsilon, delta)-DP; mu^2 adds up.

    The first release gets ``share`` of the mu^2 that (epsilon, delta) allows, the second one the
    rest. Both epsilons are then made smaller, by about a billionth, until what `accounting` makes
    of them composes to no more than (epsilon, delta), for certain.

    Args:
        epsilon, delta: of both releases together; ``delta`` is that of each of them, too.
        share: of the first release, in (0, 1).

    Raises:
        ValueError: an argument out of range, or a part that no noise meets.

    Example:
        >>> [round(part, 3) for part in split_epsilon(10.0, 1e-5, 0.25)]
        [4.378, 8.388]
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share={share!r}: expected the first release's part of mu^2, in (0, 1).")
    mu, less = accounting.calibrate(epsilon=epsilon, delta=delta).mu, 1e-9
    parts = (math.sqrt(share) * mu, math.sqrt(1 - share) * mu)
    wanted = [epsilon_of(part, delta) for part in parts]
    while True:
        one, other = (part * (1 - less) for part in wanted)
        if not min(one, other) > 0:
            raise ValueError(
                f"share={share!r}: one of the two releases gets no epsilon at delta={delta!r}; "
                "choose a share nearer to 0.5."
            )
        mus = [accounting.calibrate(epsilon=part, delta=delta).mu for part in (one, other)]
        if accounting.delta(mu=accounting.compose(mus), epsilon=epsilon) <= delta:
            return one, other
        less *= 2


def unsound(origin: Statement) -> Iterator[tuple[str, object, str]]:
    """What a statement says that does not follow from the rest of it.

    Yields:
        The field, its value, and what was expected.
    """
    if not re.fullmatch("[0-9a-f]{64}", origin.array_sha256):
        yield "array_sha256", origin.array_sha256, "64 hexadecimal digits"
    if origin.adjacency not in ADJACENCIES:
        yield "adjacency", origin.adjacency, f"one of {', '.join(ADJACENCIES)}"
    start = unit_of("")
    if origin.unit != unit_of(None) and not (
        origin.unit.startswith(start) and origin.unit != start
    ):
        yield "unit", origin.unit, f"{unit_of(None)!r} or {unit_of('...')!r}"
    try:
        least = accounting.calibrate(epsilon=origin.epsilon, delta=origin.delta).mu
    except ValueError:
        yield "epsilon", (origin.epsilon, origin.delta), "an epsilon and a delta"
        return
    if not math.isclose(origin.mu, least, rel_tol=GUESS):
        yield "mu", origin.mu, f"{least!r}, which (epsilon, delta) allow"
    elif accounting.delta(mu=origin.mu, epsilon=origin.epsilon) > origin.delta * (1 + EARLIER):
        yield "delta", origin.delta, "what mu and epsilon allow"


def refuse_unfounded(m: Metadata) -> None:
    """Raises a PrivacyError where a release and the origin of its modes have no total together."""
    if m.modes is None or (origin := m.modes.origin) is None:
        return
    for field, value, expected in unsound(origin):
        raise PrivacyError(
            f"modes.origin.{field} = {plain(repr(value))}: expected {expected}. Take the statement "
            "of a release, release.metadata.statement. Nothing was spent."
        )
    if m.private and not origin.private:
        raise PrivacyError(
            "modes: fitted to a release with test noise, which promises nothing, so that this one "
            "would promise nothing either. Make the first release without insecure_test_noise, or "
            "this one with it. Nothing was spent."
        )
    if not together(m) <= 1e4:
        raise PrivacyError(
            f"modes: fitted to a release under {origin.adjacency} adjacency for the unit "
            f"{plain(repr(origin.unit))}, this one is under {m.adjacency} for "
            f"{plain(repr(m.unit))}: no total can be stated for both together. Make both with the "
            "same adjacency and group_by. Nothing was spent."
        )


def _factor(adjacency: str, unit: str, entry: _Guarantee) -> float:
    if entry.unit == unit:
        return FACTORS[adjacency][entry.adjacency]
    return _FOR_IMAGES[adjacency][entry.adjacency] if unit == "image" else math.inf


def epsilon_of(mu: float, delta: float) -> float:
    """`accounting.epsilon`, also for no release at all and for more than any noise can hide."""
    if mu == 0:
        return 0.0
    return accounting.epsilon(mu=max(mu, 1e-8), delta=delta) if mu <= 1e4 else math.inf


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
    key = population_key(name)
    if not key or len(name) > LONGEST or not name.isprintable():
        raise ValueError(
            f"population={plain(repr(name))}: expected a name with a letter or digit in it, of at "
            f"most {LONGEST} printable characters, e.g. 'ward 3'."
        )
    return key


def population_key(name: str | None) -> str:
    return "".join(filter(str.isalnum, without_zeros(unmarked(folded(name or "")))))


def of_population(entries: Iterable[Entry], population: str | None) -> list[Entry]:
    """What composes with a release for a population: its entries, and those of none."""
    if population is None:
        return list(entries)
    keys = (population_key(population), population_key(None))
    return [e for e in entries if population_key(e.population) in keys]
