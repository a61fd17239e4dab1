"""What a release says about itself, and what no file may say.

All of it is public: under add-remove adjacency nothing here depends on the true N.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from dpmmd.privacy.rows import Rows, needed
from dpmmd.privacy.sensitivity import Block, sensitivity

LARGEST = 1 << 40  # units, and values of an image
_STRICT = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class PrivacyError(ValueError):
    """A release that cannot be trusted, or cannot be used as asked."""


class BlockRecord(BaseModel):
    """One block of the noised vector: its bound relative to the first block's, and its size."""

    model_config = _STRICT
    name: str
    kind: Literal["sums", "counts"]
    bound: float
    nonnegative: bool
    spread: bool
    size: int
    shared: int  # how many of them lie in the row that all classes share


class Statement(BaseModel):
    """What a release promises by itself, for those that build on it.

    Attributes:
        array_sha256: of its arrays.
        private: False for test noise: it then promises nothing.
    """

    model_config = _STRICT
    array_sha256: str
    mu: float
    epsilon: float
    delta: float
    adjacency: str
    unit: str
    private: bool


class ModesRecord(BaseModel):
    """What a release says of its modes (`modes.Modes`); the rule itself lies in its arrays."""

    model_config = _STRICT
    side: int
    channels: int
    per_class: int
    sha256: str
    origin: Statement | None


class Metadata(BaseModel):
    """What a release says about itself; all of it public.

    ``sd`` and ``sensitivity`` are in grid units (one image's bound is 2^``grid_bits``);
    ``noise_sd`` is the same noise in the unit of the released sums, for a block of bound 1; a
    block of another bound (its weight) has ``noise_sd / bound``.
    """

    model_config = _STRICT
    format: Literal[2, 3, 4] = 4
    version: str
    private: bool  # False: test noise, the whole file is stamped NOT PRIVATE
    adjacency: str
    unit: str  # "image", or "group by ..." for all images of a group together
    epsilon: float
    delta: float
    mu: float
    sd: float
    sensitivity: float
    noise_sd: float
    grid_bits: int
    moments: tuple[int, ...]  # of features; none where the release holds moments of pixels alone
    bound: str
    clip: float
    joint_weight: float | None
    blocks: tuple[BlockRecord, ...]
    num_classes: int
    labelled: bool
    class_names: tuple[str, ...] | None = None  # of the classes 0..K-1; None: nobody named them
    num_units: int | None  # N, images or groups; None: it is private (add-remove)
    image_shape: tuple[int, int, int]  # (C, H, W) that images were brought to
    source: str
    encoder: dict[str, Any] | None
    pixel_encoder: dict[str, Any] | None = None
    selection_encoder: dict[str, Any] | None = None
    shared_taps: int = 0
    decoding: dict[str, str] | None = None  # how files became pixels; None: they were none
    modes: ModesRecord | None = None
    array_sha256: str = ""

    @property
    def features_of(self) -> dict[str, Any]:
        """The record of the encoder whose features were released.

        Raises:
            PrivacyError: none were: the release holds moments of pixels alone.
        """
        if self.encoder is None:
            raise PrivacyError(
                "release: it holds moments of pixels alone, and no features to match. Use a "
                "release that was made with an encoder; this one serves dpmmd.modes.fit and "
                "dpmmd.align."
            )
        return self.encoder

    @property
    def per_class(self) -> int:
        """C, the rows of a class; 1 without modes."""
        return 1 if self.modes is None else self.modes.per_class

    @property
    def num_cells(self) -> int:
        """K C, the rows of features, counts and selection as they were released."""
        return self.num_classes * self.per_class

    @property
    def needed(self) -> float:
        """How many images a mode must have to stand out from its noise (`rows.needed`)."""
        one = self.sd / 2**self.grid_bits  # noise, where an image adds a vector of norm 1
        square = sum(
            (b.size - b.shared) / self.num_cells / b.bound**2
            for b in self.blocks
            if b.name.startswith("phi")
        )
        return needed(one / self.blocks[-1].bound, one * math.sqrt(square))

    @property
    def statement(self) -> Statement:
        """What this release promises by itself."""
        return Statement(**{name: getattr(self, name) for name in Statement.model_fields})

    def sensitivity_under(self, adjacency: str) -> float:
        """L2 sensitivity of the released blocks in grid units, by any adjacency."""
        grid = 2**self.grid_bits
        return sensitivity(
            adjacency,
            [Block(b.name, b.kind, b.bound * grid, b.nonnegative, b.spread) for b in self.blocks],
        )


class Stated(Protocol):
    """A release, as those see it that read no file: its statement and its divisors."""

    @property
    def metadata(self) -> Metadata: ...
    @property
    def counts(self) -> Tensor: ...
    @property
    def class_counts(self) -> Tensor: ...
    @property
    def rows(self) -> Rows: ...


def unrecordable(metadata: Metadata) -> Iterator[tuple[str, object, str]]:
    """What a source or an encoder of one's own says of itself and a file does not hold.

    Asked before the spend, so that no release is made that cannot be read, and of every file.

    Yields:
        The field, its value, and what was expected.
    """
    m = metadata
    for field in ("encoder", "selection_encoder"):
        found = (getattr(m, field) or {}).get("weights_sha256", "random")
        if found != "random" and not re.fullmatch("[0-9a-f]{64}", str(found)):
            yield f"{field}.weights_sha256", found, "64 hexadecimal digits, or 'random'"
    if (decoding := m.decoding) is not None and not (
        decoding.keys() == {"orientation", "background"}
        and decoding["orientation"] == "EXIF"
        and re.fullmatch("#[0-9a-f]{6}", decoding["background"])
    ):
        yield "decoding", decoding, "null, or orientation 'EXIF' and background '#rrggbb'"
    if m.num_units is not None and not 1 <= m.num_units <= LARGEST:
        yield "num_units", m.num_units, f"at least 1, at most {LARGEST}"
    if math.prod(m.image_shape) > LARGEST:
        yield "image_shape", m.image_shape, f"at most {LARGEST} values"


def unit_of(group_by: str | None) -> str:
    """What `Metadata.unit` says: one image, or all images of a group."""
    return "image" if group_by is None else f"group by {group_by}"


def array_hash(*arrays: Tensor | None) -> str:
    """sha256 over the little-endian bytes of sums, counts and the further arrays, in order."""
    digest = hashlib.sha256()
    for place, tensor in enumerate(arrays):
        if tensor is not None:
            kind = "<f8" if place == 1 else "<f4"
            digest.update(np.ascontiguousarray(tensor.numpy(), dtype=kind).data)
    return digest.hexdigest()
