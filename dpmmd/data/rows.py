"""Rows of an array in an ``.npz`` that is too large to hold."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np

_LOCAL_HEADER = 30  # bytes before a member's name
_STREAMED = 64 << 20  # bytes from which images are read as they are needed
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


def check_members(path: Path) -> None:
    """Raises BadZipFile where two members of a zip file share a name or bytes.

    Not every Python's `zipfile` looks at that. One array could then be the bytes of another.
    """
    with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
        members = sorted(archive.infolist(), key=lambda member: member.header_offset)
        if len({member.filename for member in members}) < len(members):
            raise zipfile.BadZipFile("two members of one name")
        end = 0
        for member in members:
            file.seek(member.header_offset)
            header = file.read(_LOCAL_HEADER)
            if len(header) < _LOCAL_HEADER or member.header_offset < end:
                raise zipfile.BadZipFile("members share bytes")
            name, extra = (
                int.from_bytes(header[26:28], "little"),
                int.from_bytes(header[28:], "little"),
            )
            end = member.header_offset + _LOCAL_HEADER + name + extra + member.compress_size
        if end > archive.start_dir:
            raise zipfile.BadZipFile("a member runs into the directory")


class StreamedRows:
    """The rows of an array in an ``.npz``, read as they are asked for, not held in memory.

    Stands for the array in `dpmmd.data.ArraySource`: it has a shape, a dtype and slices of rows.
    Rows in order are read once; going back reads from the first again.
    """

    def __init__(self, path: Path, member: str, offset: int, shape: Any, dtype: Any) -> None:
        self.path, self.member, self.offset = path, member, offset
        self.shape, self.dtype = tuple(shape), dtype
        self._row = int(np.prod(self.shape[1:])) * dtype.itemsize  # bytes
        self._file: Any = None

    @classmethod
    def of(cls, path: Path, name: str) -> StreamedRows | None:
        """The array `name`; None where it is small, or its rows are not in one piece.

        Reads it once, so that a damaged file is refused here (zipfile compares its checksum).
        """
        with zipfile.ZipFile(path) as archive:
            member = name if name in archive.namelist() else f"{name}.npy"
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version not in _HEADERS:
                    return None
                shape, fortran, dtype = _HEADERS[version](file)
                size = int(np.prod(shape)) * dtype.itemsize
                plain = not fortran and not dtype.hasobject and len(shape) in (3, 4)
                if not plain or size < _STREAMED:
                    return None
                offset = file.tell()
                read = 0
                while piece := file.read(1 << 20):
                    read += len(piece)
                if read != size:
                    raise ValueError("rows are missing")
        return cls(path, member, offset, shape, dtype)

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, _ = rows.indices(len(self))
        out = np.empty((max(0, stop - start), *self.shape[1:]), self.dtype)
        if self._file is None:
            self._file = zipfile.ZipFile(self.path).open(self.member)  # noqa: SIM115 - kept
        self._file.seek(self.offset + start * self._row)
        view = out.reshape(-1).view(np.uint8).data
        done = 0
        while done < len(view):
            piece = self._file.read(min(1 << 20, len(view) - done))
            if not piece:
                raise OSError(f"{self.path.name}: shorter than when it was opened")
            view[done : done + len(piece)] = piece
            done += len(piece)
        return out
