"""Partial sums of an interrupted release, in a folder that the data holder named for them.

They are raw private statistics, so they are written nowhere unless a folder was named, and there
with no access for anybody else: the folder has mode 0700, the file 0600. The file is put in place
whole by a rename, so that an interruption leaves the last complete one; it is deleted when the
release is done. (Deleted, not wiped: a disk may keep what was on it.)

Going on costs nothing: sums to which no noise has been added have told nobody anything, and the
noise is drawn once, after the last batch. What the file says of the release it belongs to is
compared before it is used, so that sums of two releases are never mixed. Of several ranks each has
a file of its own, of its own shard; they go on with as many ranks as there were.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from dpmmd._warn import warn
from dpmmd.files import expanded
from dpmmd.privacy.metadata import PrivacyError
from dpmmd.privacy.sums import PrivateSums

FILE = "partial.sums"  # of rank 2 of 4: partial.sums-2-of-4
_OURS = re.compile(r"\.?partial\.sums(?:-\d+-of-(?P<world>\d+))?(?:\..*)?")
_FOOTER = 512  # bytes at the end that say what the sums before them are of
SECONDS = 30.0  # between two writes, or twenty times as long as the last one took


class PartialSums:
    """The folder of one release's partial sums.

    Args:
        folder: made with mode 0700 if it is not there.
        release: everything that the sums depend on, JSON-able.
        rank, world: of how many processes this is which.

    Raises:
        PrivacyError: the folder can be entered by others, is not ours, or holds something else, or
            the sums of another number of processes.

    Warns:
        UserWarning: where the raw statistics will be.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        release: Mapping[str, Any],
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.folder = expanded(folder)
        self.path = self.folder / (FILE if world == 1 else f"{FILE}-{rank}-of-{world}")
        text = json.dumps(release, sort_keys=True, default=str)
        self._release = hashlib.sha256(text.encode()).hexdigest()
        if not hasattr(os, "geteuid"):
            raise PrivacyError(
                f"partial_sums={str(folder)!r}: this system cannot say that only you can enter a "
                "folder; leave it out, so that nothing raw is written."
            )
        with contextlib.suppress(FileExistsError):
            self.folder.mkdir(mode=0o700, parents=True)
        found = os.lstat(self.folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_mode & 0o077 or found.st_uid != os.geteuid():
            raise PrivacyError(
                f"partial_sums={str(folder)!r}: not a folder that only you can enter (mode "
                f"{stat.S_IMODE(found.st_mode):04o}); expected 0700. Name a folder that is not "
                "there yet, or run chmod 700 on it."
            )
        for name in sorted(os.listdir(self.folder)):
            if (match := _OURS.fullmatch(name)) is None:
                raise PrivacyError(
                    f"partial_sums={str(folder)!r}: holds {name!r}; expected a folder of its own."
                )
            if int(match["world"] or 1) != world:
                raise PrivacyError(
                    f"partial_sums={str(folder)!r}: holds sums of {match['world'] or 1} processes, "
                    f"this is one of {world}; go on with as many, or delete the folder to start "
                    "from the first image."
                )
            if name.startswith(f".{self.path.name}."):  # of a write that was cut off
                (self.folder / name).unlink()
        try:  # what cannot be stored must be known before anything is spent
            descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=f".{self.path.name}.")
        except OSError as error:
            raise PrivacyError(
                f"partial_sums={str(folder)!r}: cannot write there ({error.strerror or error}); "
                "choose another folder."
            ) from None
        os.close(descriptor)
        os.unlink(temporary)
        warn(
            f"partial_sums={str(folder)!r}: raw private statistics are kept there until the "
            "release is done. Do not copy or back up this folder."
        )
        self._due = time.monotonic() + SECONDS

    def load(self, sums: Sequence[PrivateSums]) -> tuple[int, str | None]:
        """Fills the sums from the file, if there is one.

        Returns:
            How many batches they hold, and the ledger's line that was spent for them.

        Raises:
            PrivacyError: the file belongs to another release, or is damaged.
        """
        if not self.path.exists():
            return 0, None
        with open(self.path, "rb") as file:
            try:
                size = os.fstat(file.fileno()).st_size - _FOOTER
                file.seek(size)
                foot = json.loads(file.read(_FOOTER))
                batches, spend = int(foot["batches"]), foot["spend"]
                file.seek(0)
                whole = _digest(file, size) == foot["sha256"]
            except (ValueError, KeyError, TypeError, OSError):
                whole = False
            if not whole:
                raise PrivacyError(
                    f"{self.path}: damaged; delete {self.folder} to start from the first image."
                )
            if foot["release"] != self._release:
                raise PrivacyError(
                    f"{self.path}: partial sums of another release (other data, settings, batch "
                    "size or version); go on with the same arguments, or delete the folder to "
                    "start from the first image."
                )
            file.seek(0)
            for one in sums:
                one.read(file)
        return batches, spend

    def store_if_due(self, batches: int, spend: str | None, sums: Sequence[PrivateSums]) -> None:
        """`store`, where the last write is long enough ago."""
        if time.monotonic() >= self._due:
            self.store(batches, spend, sums)

    def store(self, batches: int, spend: str | None, sums: Sequence[PrivateSums]) -> None:
        """Puts the sums of so many batches in the place of the last ones, whole or not at all."""
        started = time.monotonic()
        prefix = f".{self.path.name}."
        descriptor, temporary = tempfile.mkstemp(dir=self.folder, prefix=prefix)  # mode 0600
        try:
            with os.fdopen(descriptor, "w+b") as file:
                for one in sums:
                    one.write(file)
                size = file.tell()
                file.seek(0)
                foot = {
                    "release": self._release,
                    "batches": batches,
                    "spend": spend,
                    "sha256": _digest(file, size),
                }
                file.seek(size)
                file.write(json.dumps(foot).encode("ascii").ljust(_FOOTER))
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
        self._due = time.monotonic() + max(SECONDS, 20 * (time.monotonic() - started))

    def delete(self) -> None:
        """Removes the file, and its folder with the last one: the release is done."""
        self.path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _digest(file: BinaryIO, size: int) -> str:
    """sha256 of the next ``size`` bytes."""
    digest = hashlib.sha256()
    while size > 0 and (piece := file.read(min(size, 1 << 20))):
        digest.update(piece)
        size -= len(piece)
    return digest.hexdigest()
