"""Files that appear whole or not at all, and are not overwritten unless told to."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path


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
