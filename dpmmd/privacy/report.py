"""The privacy report: what a release promises, to whom, and what it does not cover."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from scipy.special import ndtr, ndtri

from dpmmd.data.classes import listed
from dpmmd.privacy import accounting, evidence
from dpmmd.privacy.blocks import KINDS
from dpmmd.privacy.composition import epsilon_of, together
from dpmmd.privacy.ledger import Ledger
from dpmmd.privacy.metadata import BlockRecord, Metadata, Stated
from dpmmd.privacy.printed import at_least, down, percent, plain, up
from dpmmd.privacy.printed import markdown as escaped
from dpmmd.privacy.sensitivity import ADJACENCIES

_IMAGE_MEANING = {
    "replace-one": "any one image, with its label, exchanged for any other",
    "zero-out": "any one image, with its label, replaced by one that contributes nothing",
    "add-remove": "any one image, with its label, added or removed",
}
_GROUP_MEANING = {
    "replace-one": "all images of one group exchanged for those of any other",
    "zero-out": "all images of one group replaced by ones that contribute nothing",
    "add-remove": "all images of one group added or removed",
}
NOT_COVERED = (
    "Choosing recipes, settings or checkpoints by looking at private data.",
    "Further releases from the same data: their mu add up as the root of the sum of squares.",
    "Accuracies measured on private or real held-out images: they read those images directly.",
    "Side channels: run time, memory, and whoever can read the machine while it releases.",
    "Images that were also among the encoder's public training data.",
)
_ONE_IMAGE = "Several images of one person: the unit is one image."
_OTHER_GROUPS = "A person with images in several groups: the unit is one group."


def meaning(adjacency: str, unit: str) -> str:
    """What two neighbouring data sets differ in."""
    return (_IMAGE_MEANING if unit == "image" else _GROUP_MEANING)[adjacency]


def facts(release: Stated, ledger: Ledger | None = None) -> dict[str, Any]:
    """The report as a JSON-able dictionary; every number follows from ``mu`` and the metadata.

    They are of this release alone but for "promise" and "together", which are of this release and
    the one that its modes were fitted to. With a ledger it also has the total over all releases of
    the same population, and raises PrivacyError if this release is not in it. Texts are as they
    were recorded, for JSON; `rows` makes them harmless.
    """
    m, encoder = release.metadata, release.metadata.encoder or {}
    result = {
        "private": m.private,
        "promise": promise(release),
        "mu": m.mu,
        "epsilon": m.epsilon,
        "delta": m.delta,
        **_follows(m.mu, m.delta),
        "together": _together(m),
        "adjacency": m.adjacency,
        "unit": m.unit,
        "by_adjacency": _by_adjacency(m),
        "num_units": m.num_units,
        "num_classes": m.num_classes,
        "class_names": None if m.class_names is None else list(m.class_names),
        "released_counts": [round(n, 1) for n in release.counts.tolist()],
        "modes": _modes(release),
        "labels": "private" if m.labelled else "not read",
        "assumed_public": _public(release),
        "sensitivity": at_least(Fraction(m.sensitivity) / 2**m.grid_bits * Fraction(m.clip)),
        "sd_over_sensitivity": -at_least(-Fraction(m.sd) / Fraction(m.sensitivity)),
        "blocks": [_block(release, block) for block in m.blocks],
        "not_covered": [*NOT_COVERED, _ONE_IMAGE if m.unit == "image" else _OTHER_GROUPS],
        **evidence.facts(m.version),  # "tested" and "evidence"
        "source": m.source,
        "decoding": m.decoding,
        "encoder": encoder.get("name"),  # None: no features, moments of pixels alone
        "encoder_weights_sha256": encoder.get("weights_sha256"),
        "version": m.version,
        "array_sha256": m.array_sha256,
    }
    if ledger is not None:
        result["ledger"] = _ledger_facts(release, ledger)
    return result


def _follows(mu: float, delta: float) -> dict[str, Any]:
    """What a mu means, in other terms."""
    return {
        "epsilon_at": {repr(d): accounting.epsilon(mu=mu, delta=d) for d in (delta, 1e-5, 1e-6)},
        "zcdp_rho": at_least(Fraction(mu) ** 2 / 2),
        "attacker_advantage": accounting.delta(mu=mu, epsilon=0.0),
        "attacker_true_positive_rate_at": {
            repr(fpr): true_positives(mu, fpr) for fpr in (0.01, 0.001)
        },
    }


def _together(m: Metadata) -> dict[str, Any] | None:
    """Both releases, where the modes of this one were fitted to another; None where they were not.

    Stated under the adjacency and for the unit of this release, at its delta.
    """
    if m.modes is None or m.modes.origin is None:
        return None
    mu = together(m)
    return {
        "mu": mu,
        "epsilon": epsilon_of(mu, m.delta),
        "delta": m.delta,
        "adjacency": m.adjacency,
        "unit": m.unit,
        "origin": m.modes.origin.model_dump(),
        **_follows(mu, m.delta),
    }


def _modes(release: Stated) -> dict[str, Any] | None:
    record = release.metadata.modes
    if record is None:
        return None
    rows = release.rows
    return {
        "per_class": record.per_class,
        "side": record.side,
        "sha256": record.sha256,
        "public": record.origin is None,
        "rows_by_class": rows.classes.bincount(minlength=release.metadata.num_classes).tolist(),
        "row_counts": [round(n, 1) for n in rows.counts.tolist()],
    }


def _block(release: Stated, block: BlockRecord) -> dict[str, Any]:
    """What one block holds, and its noise."""
    m = release.metadata
    # phi blocks are released in units of the clip norm; selection and counts in their own
    norm = m.clip if block.name.startswith("phi") else 1.0
    noise_sd = m.sd / 2**m.grid_bits * norm / block.bound
    by_mode = block.kind == "counts" or KINDS[block.name].encoder != "pixel_encoder"
    counts, merged = release.class_counts.tolist(), [1] * m.num_classes
    if by_mode:
        counts, merged = release.rows.counts.tolist(), [len(own) for own in release.rows.cells]
    sums = m.num_cells if by_mode else m.num_classes
    noise_norm = noise_sd * math.sqrt((block.size - block.shared) / sums)
    shared_norm = noise_sd * math.sqrt(block.shared) / (m.num_units or release.class_counts.sum())
    norms = [noise_norm * math.sqrt(c) / n for c, n in zip(merged, counts, strict=True)]
    per = "row" if by_mode and m.modes is not None else "class"
    return {
        "name": block.name,
        "kind": block.kind,
        "bound": norm,  # of one unit's vector, in that of the released sums
        "weight": block.bound,
        "nonnegative": block.nonnegative,
        "size": block.size,
        "noise_sd": noise_sd,  # of a class sum; of a count, in images
        # of a mean of a class, or of a row of class and mode, with the released divisors
        f"expected_noise_norm_per_{per}": norms if block.kind == "sums" else None,
        "expected_noise_norm_shared": float(shared_norm) if block.shared else None,
    }


def true_positives(mu: float, false_positives: float) -> float:
    """At most how often an attacker is right who names so many others by mistake, rounded up.

    Phi(mu + Phi^-1(rate)) (Dong, Roth, Su 2022): scipy's functions are off by a relative 1e-13 at
    most, so this is above the truth.
    """
    return min(1.0, float(ndtr(mu + ndtri(false_positives))) * (1 + 1e-10))


def _by_adjacency(m: Metadata) -> dict[str, dict[str, float] | None]:
    """mu and epsilon of this one release under each adjacency; None where it has no guarantee.

    The noise is what it is, and `sensitivity` bounds what each kind of change can move: so mu is
    Delta of that adjacency over sd. A release that states N promises nothing under add-remove.
    """
    result: dict[str, dict[str, float] | None] = {}
    for adjacency in ADJACENCIES:
        if not m.private or (adjacency == "add-remove" and m.adjacency != adjacency):
            result[adjacency] = None
        elif adjacency == m.adjacency:
            result[adjacency] = {"mu": m.mu, "epsilon": m.epsilon}
        else:
            mu = at_least(Fraction(m.sensitivity_under(adjacency)) / Fraction(m.sd))
            epsilon = accounting.epsilon(mu=max(mu, 1e-8), delta=m.delta)
            result[adjacency] = {"mu": mu, "epsilon": epsilon}
    return result


def _ledger_facts(release: Stated, ledger: Ledger) -> dict[str, Any]:
    entry = ledger.entry_of(release)
    total = ledger.total(entry.population, unit=entry.unit)
    delta = release.metadata.delta

    def finite(value: float) -> float | None:
        return value if math.isfinite(value) else None

    return {
        "file": str(ledger.path),
        "entry": entry.hash,
        "source_identity": entry.identity,
        "population": entry.population,
        "releases": total.releases,
        "incomplete": total.incomplete,
        "private": total.private,
        "other_units": total.unit != "image" and any(u != total.unit for u in total.units),
        "delta": delta,
        # by the adjacency that the total is stated under; None: no guarantee
        "mu": {adjacency: finite(mu) for adjacency, mu in total.mu.items()},
        "epsilon": {a: finite(total.epsilon(adjacency=a, delta=delta)) for a in total.mu},
    }


def promise(release: Stated) -> str:
    """The guarantee in one sentence."""
    m = release.metadata
    if not m.private:
        return "NOT PRIVATE: made with test noise. It promises nothing; do not publish it."
    what = "This release, and everything computed from it, is"
    mu, epsilon, parts = m.mu, m.epsilon, ""
    if m.modes is not None and (origin := m.modes.origin) is not None:
        mu = together(m)
        epsilon = epsilon_of(mu, m.delta)
        what = (
            f"This release, the release {origin.array_sha256[:12]}, which its modes were fitted to,"
            " and everything computed from both are together"
        )
        parts = (
            f" Of that the release by itself takes ({up(m.epsilon)}, {up(m.delta)}), and the other "
            f"one ({up(origin.epsilon)}, {up(origin.delta)})"
            f"{'' if origin.adjacency == m.adjacency else f' under {origin.adjacency}'}."
        )
    return (
        f"{what} ({up(epsilon)}, {up(m.delta)})-"
        f"differentially private with respect to {m.adjacency} adjacency: two data sets that differ"
        f" in {meaning(m.adjacency, m.unit)}, cannot be told apart better than by "
        f"{up(mu, 4)}-GDP.{parts}"
    )


def markdown(release: Stated, ledger: Ledger | None = None) -> str:
    """The report for people."""
    f = facts(release, ledger)
    lines = ["# Privacy report", "", f["promise"], ""]
    lines += ["| what | value |", "| --- | --- |"]
    lines += [f"| {escaped(name)} | {escaped(value)} |" for name, value in rows(f)]
    lines += ["", "Noise against signal:", ""]
    lines += [f"- {line}" for line in utility(f)]
    lines += ["", "Not covered:", ""]
    lines += [f"- {line}" for line in f["not_covered"]]
    lines += ["", f"Tests: {escaped(plain(f['tested'], 1000))}", ""]
    lines += [f"- {e['what']} (`{e['test']}`)" for e in f["evidence"]]
    return "\n".join(lines).rstrip("\n") + "\n"


def rows(f: dict[str, Any]) -> list[tuple[str, str]]:
    """The table of the report, from `facts`: bounds rounded outward, names made harmless."""
    both = f["together"]
    result = []
    if both is not None:
        result += _level_rows(both, ", with the release of its modes")
    result += _level_rows(f, ", this release alone" if both is not None else "")
    result += [
        *([("modes", _modes_row(f))] if f["modes"] else []),
        ("adjacency", f"{f['adjacency']} ({meaning(f['adjacency'], f['unit'])})"),
        *(_adjacency_row(f, name) for name in f["by_adjacency"] if name != f["adjacency"]),
        (
            "unit",
            "one image" if f["unit"] == "image" else f"one {plain(f['unit'])}, all its images",
        ),
        ("labels", f["labels"]),
        ("assumed public", "; ".join(plain(fact, 1000) for fact in f["assumed_public"])),
        ("L2 sensitivity", up(f["sensitivity"])),
        ("noise sd / sensitivity", down(f["sd_over_sensitivity"])),
        ("source", plain(f["source"])),
        *([("files to pixels", _decoding(f["decoding"]))] if f["decoding"] else []),
        ("encoder", _encoder_row(f)),
        ("released array", f"sha256 {f['array_sha256']}"),
        ("dpmmd", plain(f["version"])),
    ]
    for block in f["blocks"]:
        sign = ", non-negative" if block["nonnegative"] else ""
        result.append(
            (
                f"block {block['name']}",
                f"{block['size']} numbers, one unit's norm at most {up(block['bound'])}, weight "
                f"{up(block['weight'])}{sign}",
            )
        )
    if "ledger" in f:
        result += _ledger_rows(f["ledger"])
    return result


def _level_rows(f: dict[str, Any], of: str) -> list[tuple[str, str]]:
    """The guarantee of `facts`, or of both releases together, in all its terms."""
    rates = f["attacker_true_positive_rate_at"]
    return [
        (f"mu (Gaussian DP){of}", up(f["mu"])),
        (f"(epsilon, delta){of}", f"({up(f['epsilon'])}, {up(f['delta'])})"),
        *(
            (f"epsilon at delta = {up(float(d))}{of}", up(e, 4))
            for d, e in f["epsilon_at"].items()
            if float(d) != f["delta"]
        ),
        (f"zCDP rho{of}", up(f["zcdp_rho"], 4)),
        (
            f"attacker's advantage{of}",
            f"at most {percent(f['attacker_advantage'], 1)} over guessing",
        ),
        (
            f"attacker's true-positive rate{of}",
            ", ".join(
                f"at most {percent(r, 2)} at {float(p):.1%} false positives"
                for p, r in rates.items()
            ),
        ),
    ]


def _modes_row(f: dict[str, Any]) -> str:
    rows = f["modes"]["rows_by_class"]
    source = "a public rule"
    if f["together"] is not None:
        origin = f["together"]["origin"]
        source = (
            f"fitted to the release {plain(origin['array_sha256'][:12])}, which takes "
            f"({up(origin['epsilon'])}, {up(origin['delta'])}) under {origin['adjacency']}"
        )
    return (
        f"{f['modes']['per_class']} a class, of which {sum(rows)} rows ({_range(rows)} a class) "
        f"are left where those that the noise hides are merged; {source}"
    )


def _encoder_row(f: dict[str, Any]) -> str:
    if f["encoder"] is None:
        return "none: moments of pixels alone"
    return f"{plain(f['encoder'])} (weights {plain(f['encoder_weights_sha256'][:12])})"


def _adjacency_row(f: dict[str, Any], adjacency: str) -> tuple[str, str]:
    at = f["by_adjacency"][adjacency]
    if at is None:
        units = "images" if f["unit"] == "image" else "groups"
        value = "no guarantee" + (f": it states the number of {units}" * f["private"])
    else:
        value = (
            f"epsilon = {up(at['epsilon'], 4)} at delta = {up(f['delta'])}, mu = {up(at['mu'], 4)}"
        )
    which = "the same release" if f["together"] is None else "this release alone,"
    return f"{which} under {adjacency}", value


def _ledger_rows(f: dict[str, Any]) -> list[tuple[str, str]]:
    unfinished = f", {f['incomplete']} of them not completed but spent" if f["incomplete"] else ""
    population = "none was named: everything in the ledger counts"
    if f["population"] is not None:
        population = (
            f"{plain(repr(f['population']))}, which was declared disjoint from the others: its "
            "releases count, and those for which none was named"
        )
    result = [
        ("ledger", f"{plain(f['file'])} has this release (entry {f['entry'][:12]})"),
        ("population", population),
        ("releases together", f"{f['releases']}{unfinished}"),
    ]
    for adjacency, mu in f["mu"].items():
        if mu is not None:
            epsilon = f["epsilon"][adjacency]
            at = "no usable epsilon" if epsilon is None else f"epsilon = {up(epsilon, 4)}"
            value = f"mu = {up(mu)}, {at} at delta = {up(f['delta'])}"
        elif not f["private"]:
            value = "NO GUARANTEE: one of the releases was made with test noise"
        elif f["other_units"]:
            value = "no guarantee: one of the releases protects another unit"
        else:
            value = "no guarantee: one of the releases states the number of images"
        result.append((f"all of them, {adjacency}", value))
    return result


def utility(f: dict[str, Any]) -> list[str]:
    """What the noise costs, from the formulas alone, before any training."""
    lines = []
    for block in f["blocks"]:
        if block["kind"] == "counts":
            lines.append(
                f"{'counts of modes' if f['modes'] else 'class counts'}: noise sd "
                f"{block['noise_sd']:.3g} images; together "
                f"{sum(f['released_counts']):.0f} usable images (far fewer than there are? then "
                "they could not be decoded, or are floating-point images outside [0, 1])"
            )
            continue
        per = "class" if "expected_noise_norm_per_class" in block else "row"
        norms = block[f"expected_noise_norm_per_{per}"]
        squares = sum(n * n for n in norms)
        shared = ""
        if (norm := block["expected_noise_norm_shared"]) is not None:
            shared, squares = f", on the mean of the shared taps {norm:.3g}", squares + norm * norm
        lines.append(
            f"{block['name']}: expected norm of the noise on a "
            f"{'class mean' if per == 'class' else 'mean of a class and mode'} "
            f"{_range(norms)}{shared}, against means of norm at most "
            f"{up(block['bound'])}; the squared MMD to the noised target exceeds "
            f"that to the true one by {squares:.3g} in expectation, whatever "
            "the generator"
        )
    return lines


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _classes(m: Metadata) -> str:
    named = "" if m.class_names is None else f" and their names ({listed(m.class_names)})"
    return f"the {m.num_classes} classes{named}"


def _decoding(decoding: dict[str, str]) -> str:
    return plain(
        f"orientation by {decoding.get('orientation')}, transparent images on "
        f"{decoding.get('background')}"
    )


def _public(release: Stated) -> list[str]:
    m = release.metadata
    public = [
        _classes(m) if m.labelled else "that there are no labels",
        "the shape {} x {} x {} that images are brought to".format(*m.image_shape),
    ]
    if m.encoder is not None:
        public.append(f"the encoder {m.encoder['name']} and its training data")
    if m.modes is not None and m.modes.origin is None:
        public.append(f"the rule by which each class is split into {m.per_class} modes")
    if m.num_units is not None:
        units = "images" if m.unit == "image" else f"units ({m.unit})"
        public.insert(0, f"the number of {units}, N = {m.num_units}")
    return public
