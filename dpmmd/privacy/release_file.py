"""The release: noised class sums with everything needed to use, check and report them.

A file holds released numbers and public metadata only: never a raw norm, count or sum, and under
add-remove adjacency nothing that depends on the true N.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as encode
from torch import Tensor

from dpmmd._warn import warn
from dpmmd.files import expanded, write_atomically
from dpmmd.privacy.checks import Checks
from dpmmd.privacy.composition import epsilon_of, together
from dpmmd.privacy.metadata import Metadata, PrivacyError
from dpmmd.privacy.modes import Modes
from dpmmd.privacy.printed import plain, up
from dpmmd.privacy.rows import Rows

FORMATS = (2, 3, 4)  # that are read; what was added later has the values of before in older files
_UNREADABLE = (SafetensorError, ValueError, TypeError, LookupError, RuntimeError, AttributeError)


class UnsavedRelease(OSError):
    """A release was spent, and could not be written where it was asked for.

    Attributes:
        release: the release. Its budget is spent, whether it is kept or not.
        saved: the file that it was written to instead; None if nothing could be written.
    """

    def __init__(self, message: str, release: Release, saved: Path | None) -> None:
        super().__init__(message)
        self.release, self.saved = release, saved


@dataclass(frozen=True, eq=False)
class Release:
    """A noised mean embedding with its divisors: all that training ever sees of private data.

    Attributes:
        sums: noised class sums R of every moment, float32 [M, K, D]; of a hybrid release (with
            ``shared_taps``), of the taps that are not shared; with ``modes`` of every class and
            mode, [M, K C, D]; [0, K, 0] of a release of moments of pixels alone.
        counts: images per class to divide by, float64 [K]: N where it is public and there is one
            class, else the released noisy counts (at least 1). With ``modes`` those of every class
            and mode as they were noised, [K C], which may be below 1; `rows` has the divisors.
        metadata: privacy parameters, encoder and layout.
        selection: noised class sums of the selection block, float32 [K, D'], or None; with
            ``modes`` [K C, D'].
        shared: of a hybrid release, noised sums of the shared taps, float32 [M, 1, D''], or None.
        pixels: noised sums of pixels, by class, float32 [K, d] (`dpmmd.encoders.pixels`), or None.
        products: noised sums of their products over all classes, float32 [d, d] and symmetric, or
            None. Their common scale is up to a percent below that of products of ``pixels``.
        class_products: the same class by class, float32 [K, d, d], or None.
        modes: the rule by which its classes are split, or None.
    """

    sums: Tensor
    counts: Tensor
    metadata: Metadata
    selection: Tensor | None = None
    shared: Tensor | None = None
    pixels: Tensor | None = None
    products: Tensor | None = None
    class_products: Tensor | None = None
    modes: Modes | None = None

    @cached_property
    def rows(self) -> Rows:
        """The rows that generated images are matched with; without modes, the classes.

        Modes that do not stand out from their noise are merged: they cost no privacy.
        """
        needed = 0.0 if self.modes is None else self.metadata.needed
        return Rows.of(self.counts, self.sums, self.selection, self.metadata.per_class, needed)

    @property
    def target(self) -> Tensor:
        """The noised means m~ = R / n of the `rows`, float32 [M, A, D]; without modes A is K."""
        return (self.rows.sums.double() / self.rows.counts[None, :, None]).float()

    @property
    def selection_target(self) -> Tensor | None:
        """The noised means of the selection block, float32 [A, D'], or None."""
        if (selection := self.rows.selection) is None:
            return None
        return (selection.double() / self.rows.counts[:, None]).float()

    @property
    def shared_target(self) -> Tensor | None:
        """The noised mean of the shared taps over all classes, float32 [M, 1, D''], or None.

        Divided by N where that is public, else by the sum of the released counts.
        """
        if self.shared is None:
            return None
        whole = self.metadata.num_units or self.class_counts.sum()
        return (self.shared.double() / whole).float()

    @property
    def class_counts(self) -> Tensor:
        """Images of each class to divide by, float64 [K], at least 1."""
        if self.modes is None:
            return self.counts
        return self.counts.view(self.num_classes, -1).sum(1).clamp(min=1.0)

    @property
    def num_classes(self) -> int:
        """K."""
        return self.metadata.num_classes

    @property
    def num_rows(self) -> int:
        """A, the rows of `target`; without modes K."""
        return len(self.rows.classes)

    def __repr__(self) -> str:
        m = self.metadata
        stamp = "" if m.private else "NOT PRIVATE, "
        encoder = None if m.encoder is None else m.encoder.get("name")
        split = ""
        if m.modes is not None:
            split = f", modes={m.per_class} a class ({self.num_rows} rows)"
            if m.modes.origin is not None:
                both = epsilon_of(together(m), m.delta)
                split += f", epsilon={up(both)} together with the release of its modes"
        return (
            f"Release({stamp}epsilon={up(m.epsilon)}, delta={up(m.delta)}, {m.adjacency}, "
            f"moments={m.moments}, classes={m.num_classes}, "
            f"encoder={plain(repr(encoder))}, D={self.sums.shape[2]}{split})"
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
        path = expanded(path)
        tensors = {k: v.contiguous() for k, v in arrays_of(self).items() if v is not None}
        if self.modes is not None:
            rule = self.modes.directions, self.modes.thresholds
            tensors |= dict(zip(RULE, rule, strict=True))
        text = self.metadata.model_dump_json()
        data = encode(tensors, metadata={"dpmmd": text, "sha256": _text_hash(text)})
        write_atomically(path, data, overwrite=overwrite)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Release:
        """Reads a release and verifies that it contradicts itself nowhere (`dpmmd.privacy.checks`).

        The arrays are copies: what happens to the file afterwards does not change them.

        Raises:
            FileNotFoundError: there is no such file.
            PrivacyError: it is not a release, is truncated, does not match its hashes, or one of
                its fields does not follow from the others; the message names the field.
        """
        path = expanded(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: no such release; make one with `dpmmd release` or dpmmd.release(...)."
            )
        try:
            with safe_open(str(path), framework="pt") as file:
                kept = file.metadata() or {}
                names = set(file.keys())
                if "dpmmd" not in kept or names - {*FURTHER, *RULE} != {"sums", "counts"}:
                    raise PrivacyError(f"{path}: a safetensors file, but not a dpmmd release.")
                tensors = {name: file.get_tensor(name).clone() for name in names}
            metadata = _metadata(kept, str(path))
        except PrivacyError:
            raise
        except _UNREADABLE as error:
            raise PrivacyError(
                f"{path}: not a readable release ({_reason(error)}). The file is truncated, "
                "corrupt or of another kind; restore it from a copy. Releasing the data again "
                "costs privacy."
            ) from None
        release = cls(
            tensors["sums"],
            tensors["counts"],
            metadata,
            *(tensors.get(further) for further in FURTHER),
        )
        rule = tensors.get(RULE[0]), tensors.get(RULE[1])
        modes = Checks(metadata, arrays_of(release), rule, str(path)).run()
        return replace(release, modes=modes)


# Arrays that a release may have, in the order of its fields and of their hash.
_APART = ("sums", "counts", "metadata", "modes")
FURTHER = tuple(f.name for f in fields(Release) if f.name not in _APART)
RULE = ("mode_directions", "mode_thresholds")  # of modes, which have a hash of their own


def arrays_of(release: Release) -> dict[str, Tensor | None]:
    """All arrays by name, in the order of their hash; None for those that it has not."""
    return {name: getattr(release, name) for name in ("sums", "counts", *FURTHER)}


def save_spent(release: Release, path: Path) -> None:
    """Saves a release whose budget is spent: under another name rather than not at all.

    Raises:
        UnsavedRelease: it is not at ``path``; the message says where it is.
    """
    try:
        release.save(path)
    except BaseException as error:
        saved = _recovered(release, path)
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        start = f"out={str(path)!r}: cannot write there ({reason}). The budget of this release was"
        if saved is None:
            message = (
                f"{start} spent, and it could not be written beside it or to the temporary folder "
                "either. In Python the exception has it: `error.release.save(PATH)`, before the "
                "process ends. Releasing the data again costs privacy again."
            )
        else:
            message = (
                f"{start} spent, and the file {str(saved)!r} is the release: keep it. Releasing "
                "the data again costs privacy again."
            )
        if isinstance(error, Exception):
            raise UnsavedRelease(message, release, saved) from error
        warn(message)  # interrupted
        raise


def _recovered(release: Release, path: Path) -> Path | None:
    """A file with the release, beside ``path`` or in the temporary folder; None: no such file."""
    for folder, stem in ((path.parent, path.stem), (tempfile.gettempdir(), path.stem[:50])):
        for number in range(1, 100):
            try:
                return release.save(Path(folder) / f"{stem}.recovered-{number}.safetensors")
            except FileExistsError:
                continue
            except Exception:  # the next folder
                break
    return None


def _metadata(kept: Mapping[str, str], where: str) -> Metadata:
    text = kept["dpmmd"]

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        """A JSON object with every key once: another reader could take the other value."""
        for number, (key, _) in enumerate(pairs):
            if key in (earlier for earlier, _ in pairs[:number]):
                raise PrivacyError(
                    f"{where}: the metadata have {plain(repr(key))} twice. The file was altered: "
                    "restore it from a copy."
                )
        return dict(pairs)

    found = json.loads(text, object_pairs_hook=once).get("format")
    if type(found) is not int or found not in FORMATS:
        raise PrivacyError(
            f"{where}: format {plain(repr(found))}, this version of dpmmd reads "
            f"{' and '.join(map(str, FORMATS))}; use the version that wrote it."
        )
    if kept.get("sha256") != _text_hash(text):
        raise PrivacyError(
            f"{where}: the metadata do not match their hash; the file was altered or damaged. "
            "Restore it from a copy."
        )
    return Metadata.model_validate_json(text, strict=True)


def _reason(error: Exception) -> str:
    """One line; of metadata the first field that is wrong."""
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        return plain(f"{field}: {first['msg'].lower()}")
    return plain((str(error).splitlines() or [type(error).__name__])[0])


def _text_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
