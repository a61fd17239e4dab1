"""The release: noised class sums with everything needed to use, check and report them.

A file holds released numbers and public metadata only: never a raw norm, count or sum, and under
add-remove adjacency nothing that depends on the true N.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encode
from torch import Tensor

from dpmmd.privacy.accounting import delta as delta_of
from dpmmd.privacy.sensitivity import Block, sensitivity

FORMAT = 1


class PrivacyError(ValueError):
    """A release that cannot be trusted, or cannot be used as asked."""


class BlockRecord(BaseModel):
    """One block of the noised vector: its bound relative to the first block's, and its size."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    kind: Literal["sums", "counts"]
    bound: float
    nonnegative: bool
    size: int


class Metadata(BaseModel):
    """What a release says about itself; all of it public.

    ``sd`` and ``sensitivity`` are in grid units (one image's bound is 2^``grid_bits``);
    ``noise_sd`` is the same noise in the unit of the released sums, for a block of bound 1; a
    block of another bound (its weight) has ``noise_sd / bound``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    version: str
    private: bool  # False: test noise, the whole file is stamped NOT PRIVATE
    adjacency: str
    unit: Literal["image"] = "image"
    epsilon: float
    delta: float
    mu: float
    sd: float
    sensitivity: float
    noise_sd: float
    grid_bits: int
    moments: tuple[int, ...]
    bound: str
    clip: float
    joint_weight: float | None
    blocks: tuple[BlockRecord, ...]
    num_classes: int
    labelled: bool
    num_images: int | None  # None: N is private (add-remove)
    image_shape: tuple[int, int, int]  # (C, H, W) that images were brought to
    source: str
    encoder: dict[str, Any]
    selection_encoder: dict[str, Any] | None = None
    array_sha256: str = ""


@dataclass(frozen=True, eq=False)
class Release:
    """A noised mean embedding with its divisors: all that training ever sees of private data.

    Attributes:
        sums: noised class sums R of every moment, float32 [M, K, D].
        counts: images per class to divide by, float64 [K]: N where it is public and there is one
            class, else the released noisy counts (at least 1).
        metadata: privacy parameters, encoder and layout.
        selection: noised class sums of the selection block, float32 [K, D'], or None.
    """

    sums: Tensor
    counts: Tensor
    metadata: Metadata
    selection: Tensor | None = None

    @property
    def target(self) -> Tensor:
        """The noised class means m~ = R / n, float32 [M, K, D]."""
        return (self.sums.double() / self.counts[None, :, None]).float()

    @property
    def selection_target(self) -> Tensor | None:
        """The noised class means of the selection block, float32 [K, D'], or None."""
        if self.selection is None:
            return None
        return (self.selection.double() / self.counts[:, None]).float()

    @property
    def num_classes(self) -> int:
        return self.metadata.num_classes

    def __repr__(self) -> str:
        m = self.metadata
        stamp = "" if m.private else "NOT PRIVATE, "
        return (
            f"Release({stamp}epsilon={m.epsilon:g}, delta={m.delta:g}, {m.adjacency}, "
            f"moments={m.moments}, classes={m.num_classes}, encoder={m.encoder.get('name')!r}, "
            f"D={self.sums.shape[2]})"
        )

    def report(self) -> str:
        """The privacy report as Markdown text; `dpmmd.privacy.report.facts` gives it as data."""
        from dpmmd.privacy.report import markdown

        return markdown(self)

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Writes one safetensors file, whole or not at all.

        Raises:
            FileExistsError: ``path`` exists and ``overwrite`` is False.
        """
        path = Path(path)
        tensors = {"sums": self.sums.contiguous(), "counts": self.counts.contiguous()}
        if self.selection is not None:
            tensors["selection"] = self.selection.contiguous()
        data = encode(tensors, metadata={"dpmmd": self.metadata.model_dump_json()})
        write_atomically(path, data, overwrite=overwrite)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Release:
        """Reads a release and verifies its shapes and the hash of its arrays.

        Raises:
            FileNotFoundError: there is no such file.
            PrivacyError: it is not a release, is truncated, or does not match its hash.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such release; make one with `dpmmd release` or dpmmd.release(...)."
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                text = (file.metadata() or {}).get("dpmmd")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if text is None or set(tensors) - {"selection"} != {"sums", "counts"}:
                raise PrivacyError(f"{path}: a safetensors file, but not a dpmmd release.")
            if json.loads(text).get("format") != FORMAT:
                raise PrivacyError(
                    f"{path}: format {json.loads(text).get('format')!r}, this version of dpmmd "
                    f"reads {FORMAT}; use the version that wrote it."
                )
            metadata = Metadata.model_validate_json(text)
        except (SafetensorError, ValidationError, json.JSONDecodeError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise PrivacyError(
                f"{path}: not a readable release ({reason}). The file is truncated, corrupt or of "
                "another kind; restore it from a copy. Releasing the data again costs privacy."
            ) from None
        release = cls(tensors["sums"], tensors["counts"], metadata, tensors.get("selection"))
        release._verify(str(path))
        return release

    def _verify(self, name: str) -> None:
        m = self.metadata
        expected = (len(m.moments), m.num_classes)
        if (
            self.sums.ndim != 3
            or tuple(self.sums.shape[:2]) != expected
            or self.counts.shape != (m.num_classes,)
            or self.sums.dtype != torch.float32
            or self.counts.dtype != torch.float64
            or (self.selection is None) != (m.selection_encoder is None)
        ):
            raise PrivacyError(
                f"{name}: arrays {tuple(self.sums.shape)} and {tuple(self.counts.shape)} do not "
                f"match its metadata (moments, classes) = {expected}."
            )
        blocks = [Block(b.name, b.kind, b.bound * 2**m.grid_bits, b.nonnegative) for b in m.blocks]
        if (
            not math.isclose(sensitivity(m.adjacency, blocks), m.sensitivity, rel_tol=1e-9)
            or not math.isclose(m.mu * m.sd, m.sensitivity, rel_tol=1e-9)
            or delta_of(mu=m.mu, epsilon=m.epsilon) > m.delta * (1 + 1e-6)
        ):
            raise PrivacyError(
                f"{name}: the claim (epsilon = {m.epsilon:g}, delta = {m.delta:g}, {m.adjacency}) "
                "does not follow from the noise and the blocks recorded beside it; the file was "
                "altered. Restore it from a copy."
            )
        if array_hash(self.sums, self.counts, self.selection) != m.array_sha256:
            raise PrivacyError(
                f"{name}: the arrays do not match the hash in the metadata; the file was altered "
                "or damaged. Restore it from a copy."
            )


def array_hash(sums: Tensor, counts: Tensor, selection: Tensor | None = None) -> str:
    """sha256 over the little-endian bytes of the released arrays."""
    digest = hashlib.sha256()
    arrays = [(sums, "<f4"), (counts, "<f8")]
    for tensor, kind in arrays if selection is None else [*arrays, (selection, "<f4")]:
        digest.update(np.ascontiguousarray(tensor.numpy(), dtype=kind).data)
    return digest.hexdigest()


def write_atomically(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Writes ``data`` to a temporary file beside ``path`` and puts it in place in one step."""
    refuse_existing(path, overwrite=overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        if overwrite:
            os.replace(temporary, path)
        else:
            _place(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def _place(temporary: str, path: Path) -> None:
    """Gives the file its name, unless somebody else has taken it meanwhile."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        refuse_existing(path)
        raise
    except OSError:  # a file system without hard links
        refuse_existing(path)
        os.replace(temporary, path)
    else:
        os.unlink(temporary)


def refuse_unwritable(path: Path) -> None:
    """Raises where `write_atomically` would: before privacy is spent, not after."""
    refuse_existing(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise OSError(
            f"out={str(path)!r}: cannot write there ({error.strerror or error}); choose a folder "
            "that exists or can be made."
        ) from None


def refuse_existing(path: Path, *, overwrite: bool = False) -> None:
    """Raises FileExistsError with the remedy if ``path`` exists."""
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists: it is not overwritten unless told to. Choose another name, or "
            "remove it first (removing a release does not give its privacy budget back)."
        )
