"""Files that appear whole or not at all, and are not overwritten unless told to."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path


def expanded(path: str | os.PathLike[str]) -> Path:
    """The path with ``~`` replaced by the user's home: what every output and its readers use.

    Raises:
        ValueError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ValueError(
            f"{str(path)!r}: there is no home folder for {Path(path).parts[0]!r}; write the folder "
            f"in full, or './{path}' for a file of that name."
        ) from None


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


def refuse_unwritable(
    path: Path,
    *,
    overwrite: bool = False,
    others: Iterable[str | os.PathLike[str] | None] = (),
) -> None:
    """Raises where `write_atomically` would: before privacy is spent, not after.

    It makes the temporary file that `write_atomically` would make, in the same folder and of the
    same name, and removes it.

    Args:
        path: what is to be written.
        overwrite: whether it may exist.
        others: files and folders that will be made before it, which it must be apart from.

    Raises:
        FileExistsError: it exists and may not, or is a folder.
        OSError, ValueError: it cannot be written.
    """
    _refuse_others(path, others)
    try:
        refuse_existing(path, overwrite=overwrite and not path.is_dir())
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(descriptor)
        os.unlink(temporary)
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        if isinstance(error, FileExistsError) and error.errno is None:
            raise
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"out={str(path)!r}: cannot write there ({reason}); choose a folder that exists or can "
            "be made, and a name that it can hold."
        ) from None


def _refuse_others(path: Path, others: Iterable[str | os.PathLike[str] | None]) -> None:
    own = Path(os.path.realpath(path)) if "\0" not in str(path) else path
    for other in others:
        if other is None:
            continue
        there = Path(os.path.realpath(expanded(other)))
        if own == there or there in own.parents or own in there.parents:
            raise ValueError(
                f"out={str(path)!r}: is, holds or is inside {str(other)!r}, which the same call "
                "makes; choose another name."
            )


def refuse_full(path: Path, needed: int) -> None:
    """Raises OSError where the disk has no room for ``needed`` bytes at ``path``.

    Others may fill the disk later, and a quota is not seen: what cannot be written all the same is
    the business of whoever writes.
    """
    free = shutil.disk_usage(path.parent).free
    if free < needed:
        raise OSError(
            f"out={str(path)!r}: needs about {needed:,} bytes and the disk has {free:,} free; make "
            "room, or choose a name on another disk. Nothing was spent."
        )


def refuse_existing(path: Path, *, overwrite: bool = False) -> None:
    """Raises FileExistsError with the remedy if ``path`` exists, or is a link to nowhere."""
    if path.is_symlink() and not path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} is a link to {os.readlink(path)!r}, which is not there: nothing can be "
            "written through it. Choose another name, or remove the link."
        )
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists: it is not overwritten unless told to. Choose another name, or "
            "remove it first (removing a release does not give its privacy budget back)."
        )
