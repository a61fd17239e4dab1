"""What the parts of a release file must be, given each other.

The hashes in a file find damage. They do not bind whoever edits a file and computes them again; so
everything that follows from something else in the file is computed again here and compared. What
does not follow from anything (the name of the source, say) is not signed and may be forged.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from dpmmd.bounds import Bound
from dpmmd.encoders.base import PRECISIONS, SIGNS
from dpmmd.encoders.pixels import LARGEST
from dpmmd.privacy.accounting import calibrate
from dpmmd.privacy.accounting import delta as delta_of
from dpmmd.privacy.blocks import GRID, KINDS, Blocks, Features
from dpmmd.privacy.composition import EARLIER, GUESS, refuse_unfounded, unsound
from dpmmd.privacy.metadata import (
    BlockRecord,
    Metadata,
    PrivacyError,
    Statement,
    array_hash,
    unit_of,
    unrecordable,
)
from dpmmd.privacy.modes import Modes
from dpmmd.privacy.printed import plain, up
from dpmmd.privacy.sensitivity import ADJACENCIES
from dpmmd.privacy.sums import GRID_BITS

_CLOSE = 1e-12  # relative: numbers that were computed from each other in doubles
_SDS = 12  # of noise that no number passes: one in 10^32
_KEYS = {"name", "weights_sha256", "image_size", "taps", "pool", "layout", "resize", "pixel_range"}
_KEYS |= {"precision", "constant"}
_RECORDED = {  # what every encoder says of itself, and has no choice in
    "layout": ("NHWC-per-tap",),
    "resize": ("bilinear",),
    "pixel_range": ("[0,1] RGB",),
    "precision": tuple(PRECISIONS),
}


class Checks:
    """The checks of one release.

    Args:
        metadata: what it says of itself.
        arrays: its arrays by name, all that a release may have, in the order of their hash; None
            for those that are not there. Nobody changes them while they are checked.
        rule: the directions and thresholds of its modes, or None.
        where: the file, for messages.
    """

    def __init__(
        self,
        metadata: Metadata,
        arrays: Mapping[str, Tensor | None],
        rule: tuple[Tensor | None, Tensor | None],
        where: str,
    ) -> None:
        self.m, self.arrays, self.rule, self.where = metadata, arrays, rule, plain(where, None)

    def run(self) -> Modes | None:
        """The modes of the release, if there are any.

        Raises:
            PrivacyError: naming the first field which contradicts the others.
        """
        m = self.m
        self._settings()
        self._units()
        modes = self._modes(*self.rule)
        for field, value, expected in unrecordable(m):
            self.refuse(field, value, expected)
        if m.encoder is not None:
            self._encoder("encoder", m.encoder)
        else:
            self._pixels_alone()
        if m.selection_encoder is not None:
            self._encoder("selection_encoder", m.selection_encoder)
        if m.pixel_encoder is not None:
            self._pixel_encoder(m.pixel_encoder)
        taps = 1 if m.encoder is None else len(m.encoder["taps"])
        if not 0 <= m.shared_taps < taps or (m.shared_taps and not m.labelled):
            self.refuse("shared_taps", m.shared_taps, "fewer than the encoder has, 0 if unlabelled")
        self._blocks()
        self._claim()
        self._arrays()
        return modes

    def refuse(self, field: str, value: object, expected: str) -> NoReturn:
        raise PrivacyError(
            f"{self.where}: {field} = {plain(repr(value))}, expected {expected}. The file was "
            "altered or damaged: restore it from a copy. (Releasing the data again costs privacy.)"
        )

    def _settings(self) -> None:
        m = self.m
        if m.adjacency not in ADJACENCIES:
            self.refuse("adjacency", m.adjacency, f"one of {', '.join(ADJACENCIES)}")
        if m.grid_bits != GRID_BITS:
            self.refuse("grid_bits", m.grid_bits, f"{GRID_BITS}, the only one there is")
        try:
            moments = m.moments if m.encoder is not None else m.moments or (1,)
            Bound.checked(moments, m.bound, m.clip, m.joint_weight)
        except ValueError as error:
            field = str(error).split("=")[0]
            self.refuse(field, getattr(m, field), "what `dpmmd.release` takes")
        for field, low, high in (
            ("epsilon", 5e-324, 1e4),
            ("delta", 1e-300, 1 - 2.0**-53),
            ("mu", 5e-324, 1e4),
            ("sd", 2.0**-20, 2.0**60),
        ):
            if not low <= getattr(m, field) <= high:
                self.refuse(field, getattr(m, field), f"a number from {low:g} to {high:g}")
        if m.image_shape[0] not in (1, 3) or min(m.image_shape) < 1:
            self.refuse("image_shape", m.image_shape, "1 or 3 channels, a height and a width")

    def _units(self) -> None:
        m = self.m
        start = unit_of("")
        if m.unit != unit_of(None) and not (m.unit.startswith(start) and m.unit != start):
            self.refuse("unit", m.unit, f"{unit_of(None)!r} or {unit_of('...')!r}")
        if m.num_classes < 1 or (m.num_classes > 1 and not m.labelled):
            self.refuse("num_classes", m.num_classes, "at least 1, and 1 if labelled is false")
        if (names := m.class_names) is not None and (
            not m.labelled or not len(set(names)) == len(names) == m.num_classes
        ):
            raise PrivacyError(
                f"{self.where}: class_names has {len(names)} names ({len(set(names))} different "
                f"ones), expected one for each of the num_classes = {m.num_classes} classes of a "
                "labelled release; the file was altered. Restore it from a copy."
            )
        private = m.adjacency == "add-remove"
        if private and m.num_units is not None:
            self.refuse("num_units", m.num_units, "null: it is private under add-remove adjacency")
        if not private and (m.num_units is None or m.num_units < 1):
            self.refuse("num_units", m.num_units, f"at least 1: it is public under {m.adjacency}")

    def _pixels_alone(self) -> None:
        """Without an encoder: no features, nothing that is of them, and the format that has it."""
        m = self.m
        for field, expected in (
            ("moments", ()),
            ("bound", Bound.kind),
            ("clip", Bound.clip),
            ("joint_weight", None),
            ("selection_encoder", None),
            ("modes", None),
        ):
            if (value := getattr(m, field)) != expected:
                self.refuse(field, value, f"{expected!r}: encoder is null")
        if m.pixel_encoder is None or m.format < 4:
            self.refuse("encoder", None, "what its features were made with")

    def _modes(self, directions: Tensor | None, thresholds: Tensor | None) -> Modes | None:
        """The rule that lies in the arrays, and what the metadata say of it."""
        m, record = self.m, self.m.modes
        if record is None or m.format < 4:
            if not (record is directions is thresholds is None):
                self.refuse("modes", record, "null, and no arrays of modes")
            return None
        if directions is None or thresholds is None:
            self.refuse("modes", "without arrays", "mode_directions and mode_thresholds")
        if (origin := record.origin) is not None:
            self._origin(origin)
        try:
            made = Modes(record.side, record.channels, directions, thresholds, origin)
        except (TypeError, ValueError) as error:
            self.refuse("modes", plain(error), "a rule of whole numbers")
        for field, value, expected in (
            ("num_classes", made.num_classes, m.num_classes),
            ("channels", made.channels, m.image_shape[0]),
            ("per_class", record.per_class, made.per_class),
            ("sha256", record.sha256, made.sha256),
        ):
            if value != expected:
                self.refuse(f"modes.{field}", value, repr(expected))
        return made

    def _origin(self, origin: Statement) -> None:
        """The statement of another release: what follows of it alone, and that both compose."""
        where = "modes.origin"
        for field, value, expected in unsound(origin):
            self.refuse(f"{where}.{field}", value, expected)
        try:
            refuse_unfounded(self.m)
        except PrivacyError as error:
            self.refuse(where, (origin.adjacency, origin.unit, origin.private), f"no {error}")

    def _encoder(self, field: str, spec: Mapping[str, Any]) -> None:
        if more := sorted(set(spec) - _KEYS):
            self.refuse(f"{field}.{more[0]}", spec[more[0]], "no such field")
        for key in ("name", "weights_sha256"):
            if not isinstance(spec.get(key), str):
                self.refuse(f"{field}.{key}", spec.get(key), "text")
        for key, known in _RECORDED.items():
            if spec.get(key) not in known:
                self.refuse(f"{field}.{key}", spec.get(key), f"one of {', '.join(known)}")
        if not _sizes(spec.get("image_size"), 2):
            self.refuse(f"{field}.image_size", spec.get("image_size"), "[height, width]")
        if (pool := spec.get("pool")) is not None and not _sizes([pool], 1):
            self.refuse(f"{field}.pool", pool, "null or a whole number, at least 1")
        taps = spec.get("taps")
        if not isinstance(taps, list) or not taps:
            self.refuse(f"{field}.taps", taps, "a list of taps")
        for number, tap in enumerate(taps):
            where = f"{field}.taps[{number}]"
            if not isinstance(tap, dict) or not isinstance(tap.get("name"), str):
                self.refuse(where, tap, "a name, a shape and a sign")
            if more := sorted(set(tap) - {"name", "shape", "sign"}):
                self.refuse(f"{where}.{more[0]}", tap[more[0]], "no such field")
            if tap.get("sign") not in SIGNS:
                self.refuse(f"{where}.sign", tap.get("sign"), f"one of {', '.join(SIGNS)}")
            shape = tap.get("shape")
            if not _sizes(shape, 3) or (pool is not None and max(tap["shape"][1:]) > pool):
                self.refuse(f"{where}.shape", shape, f"[C, H, W], pooled to {pool}")
        if len({tap["name"] for tap in taps}) < len(taps):
            self.refuse(f"{field}.taps", [tap["name"] for tap in taps], "every name once")
        self._constant(field, spec)

    def _constant(self, field: str, spec: Mapping[str, Any]) -> None:
        """The last tap, where there is one; most encoders have none."""
        if "constant" not in spec:
            return
        value, tap = spec["constant"], spec["taps"][-1]
        if type(value) is not float or not 0 < value < math.inf:
            self.refuse(f"{field}.constant", value, "no such field, or a number above 0")
        if tap != {"name": "constant", "shape": [1, 1, 1], "sign": "nonnegative"}:
            self.refuse(f"{field}.taps", tap, "the constant as the last of them")

    def _pixel_encoder(self, spec: Mapping[str, Any]) -> None:
        """As `dpmmd.encoders.pixels.pixel_moments` makes it, of some side."""
        self._encoder("pixel_encoder", spec)
        channels, side = self.m.image_shape[0], spec["image_size"][0]
        values = channels * side * side
        tap = {"name": "pixels", "shape": [values + 1, 1, 1], "sign": "signed"}
        expected = {
            "name": f"pixels of {channels} channels",
            "weights_sha256": "",
            "image_size": [side, side],
            "taps": [tap],
            "pool": None,
            "constant": None,
        }
        for key, value in expected.items():
            if spec.get(key) != value:
                self.refuse(f"pixel_encoder.{key}", spec.get(key), repr(value))
        if values > LARGEST:
            self.refuse("pixel_encoder.image_size", spec["image_size"], f"at most {LARGEST} values")

    def _blocks(self) -> None:
        """Names, kinds, signs and sizes follow from the encoders; a weight is on the grid."""
        m = self.m
        names = [block.name for block in m.blocks]
        expected = self._expected().records()
        if names != [block.name for block in expected]:
            self.refuse("blocks", names, ", ".join(block.name for block in expected))
        for block, other in zip(m.blocks, expected, strict=True):
            for key in ("kind", "nonnegative", "spread", "size", "shared"):
                if (value := getattr(block, key)) != getattr(other, key):
                    self.refuse(
                        f"blocks.{block.name}.{key}",
                        value,
                        f"{getattr(other, key)!r}, which follows from encoder, classes and unit",
                    )
            if not 2.0**-20 <= block.bound <= 1 or block.bound * GRID % 1:
                self.refuse(
                    f"blocks.{block.name}.bound", block.bound, f"a multiple of 2^-{GRID_BITS} to 1"
                )

    def _expected(self) -> Blocks:
        """The blocks that `dpmmd.release` would have made, of any weights."""
        m, found = self.m, {block.name for block in self.m.blocks}
        specs: dict[str, dict[str, Any] | None]
        specs = {"encoder": m.encoder, "pixel_encoder": m.pixel_encoder}
        specs["selection_encoder"] = m.selection_encoder
        features = {name: Features.of(spec) for name, spec in specs.items() if spec is not None}
        return Blocks.of(
            features,
            Bound.of(m),
            classes=m.num_classes,
            per_class=m.per_class,
            shared_taps=m.shared_taps,
            weights={
                name: float(name in found)
                for name, kind in KINDS.items()
                if kind.products and kind.encoder in features
            },
            with_counts=m.labelled or m.adjacency == "add-remove" or m.modes is not None,
            grouped=m.unit != "image",
        )

    def _claim(self) -> None:
        """(epsilon, delta) follow from mu, mu from sd and sensitivity, that from the blocks."""
        m = self.m
        allowed = m.delta * (1 + (EARLIER if m.format == 2 else 0))
        for field, expected, tolerance in (
            ("sensitivity", m.sensitivity_under(m.adjacency), _CLOSE),
            ("mu", calibrate(epsilon=m.epsilon, delta=m.delta).mu, GUESS),
            ("sd", m.sensitivity / m.mu, _CLOSE),
            ("noise_sd", m.sd / GRID * m.clip, _CLOSE),
        ):
            if not math.isclose(getattr(m, field), expected, rel_tol=tolerance):
                self._refuse_claim(f"{field} = {getattr(m, field)!r}, expected {expected!r}")
        if (least := delta_of(mu=m.mu, epsilon=m.epsilon)) > allowed:
            self._refuse_claim(f"delta = {m.delta!r}, expected at least {least!r}")

    def _refuse_claim(self, what: str) -> NoReturn:
        m = self.m
        raise PrivacyError(
            f"{self.where}: {what}: the claim (epsilon = {up(m.epsilon)}, delta = {up(m.delta)}, "
            f"{m.adjacency}) does not follow from the noise and the blocks recorded beside it; the "
            "file was altered. Restore it from a copy."
        )

    def _arrays(self) -> None:
        m = self.m
        blocks, phi = {block.name: block for block in m.blocks}, m.blocks[0]
        shapes = self._expected().shapes()
        for name, values in self.arrays.items():
            self._array(name, values, shapes.get(name))
        counts = self.arrays["counts"]
        assert counts is not None  # `_array` refused that
        if "counts" in blocks:
            self._counts(counts, blocks["counts"])
        if m.private and m.num_units is not None:
            for name, block in {"sums": phi, "shared": phi, **blocks}.items():
                if (values := self.arrays.get(name)) is not None:
                    self._reach(name, values, block, m.clip if block is phi else 1.0)
        if "counts" not in blocks and counts.tolist() != [m.num_units]:
            self.refuse("counts", counts.tolist(), f"[num_units] = [{m.num_units}]")
        found = array_hash(*self.arrays.values())
        if found != m.array_sha256:
            raise PrivacyError(
                f"{self.where}: the arrays do not match the hash in the metadata, array_sha256; "
                "the file was altered or damaged. Restore it from a copy."
            )

    def _counts(self, counts: Tensor, block: BlockRecord) -> None:
        """Whole grid units; without modes at least 1, or the 1 that less is raised to."""
        raised = self.m.modes is None
        if raised and float(counts.min()) < 1:
            self.refuse("counts", float(counts.min()), "at least 1")
        unit = 1 / (block.bound * GRID)
        whole = (counts / unit).round()
        off = (whole * unit - counts).abs() > 1e-15 * counts.abs()
        off &= (whole.abs() < 2**51) & ((counts != 1) | (not raised))  # above: no digits for it
        if bool(off.any()):
            self.refuse("counts", float(counts[off][0]), f"a multiple of {unit!r}, the grid's unit")
        if float(whole.abs().max()) > 2.0**63:
            self.refuse("counts", float(counts.abs().max()), "what 64 bits hold in grid units")

    def _reach(self, name: str, values: Tensor, block: BlockRecord, clip: float) -> None:
        """|R| <= N clip + 12 sd in every place: N units add at most clip each, and the noise.

        Float32 may round the number up, the noise by half a unit of the grid.
        """
        assert self.m.num_units is not None
        scale = clip / block.bound  # of the noise; that of products between two is less
        noise = (_SDS * self.m.sd + 1) / GRID * scale
        limit = (self.m.num_units * clip + noise) * (1 + 1e-6)
        if values.numel() and (found := float(values.abs().max())) > limit:
            self.refuse(
                name, found, f"at most {limit:.6g}: N = {self.m.num_units} units and {_SDS} sd"
            )

    def _array(self, name: str, values: Tensor | None, shape: tuple[int, ...] | None) -> None:
        dtype = torch.float64 if name == "counts" else torch.float32
        found = None if values is None else (tuple(values.shape), values.dtype)
        if found != (None if shape is None else (shape, dtype)):
            there = "missing" if found is None else f"{found[1]} {list(found[0])}"
            expected = "none" if shape is None else f"{dtype} {list(shape)}"
            raise PrivacyError(
                f"{self.where}: its arrays do not match its metadata: {name} is {there}, expected "
                f"{expected}. The file was altered or damaged: restore it from a copy."
            )
        if values is None:
            return
        if not bool(values.isfinite().all()):
            self.refuse(name, "not finite", "finite numbers")
        if name.endswith("products") and not torch.equal(values, values.mT):
            self.refuse(name, "not symmetric", "a symmetric matrix of products")


def _sizes(value: object, length: int) -> bool:
    """Whether it is a list of so many whole numbers, each at least 1."""
    return (
        isinstance(value, list)
        and len(value) == length
        and all(type(size) is int and size >= 1 for size in value)
    )
