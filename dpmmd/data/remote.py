"""Paths in storage that fsspec reaches (``s3://...``, ``gs://...``), as sources need them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from dpmmd.data.pixels import open_regular


def is_url(source: Any) -> bool:
    return isinstance(source, str) and "://" in source


class RemotePath:
    """A URL with the part of `pathlib.Path` that sources use.

    Raises:
        ImportError: the package for this kind of storage is not installed.
        ValueError: there is no such kind.
    """

    def __init__(self, url: str) -> None:
        import fsspec

        try:
            filesystem, path = fsspec.core.url_to_fs(url)
        except ImportError as error:
            raise ImportError(f"source={url!r}: {error}.") from None
        except ValueError:
            raise ValueError(
                f"source={url!r}: no storage of that kind is known to fsspec; expected e.g. "
                "s3://bucket/folder (with the package s3fs) or gs://bucket/folder (gcsfs)."
            ) from None
        self._url = str(filesystem.unstrip_protocol(path))

    def __str__(self) -> str:
        return self._url

    def _storage(self) -> tuple[Any, str]:
        import fsspec

        found: tuple[Any, str] = fsspec.core.url_to_fs(self._url)  # fsspec keeps one a process
        return found

    @property
    def name(self) -> str:
        return PurePosixPath(self._url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self._url).suffix

    @property
    def parent(self) -> RemotePath:
        return RemotePath(self._url.rstrip("/").rpartition("/")[0])

    def __truediv__(self, name: str) -> RemotePath:
        return RemotePath(f"{self._url.rstrip('/')}/{name}")

    def __lt__(self, other: RemotePath) -> bool:
        return self._url < other._url

    def exists(self) -> bool:
        filesystem, path = self._storage()
        return bool(filesystem.exists(path))

    def is_file(self) -> bool:
        filesystem, path = self._storage()
        return bool(filesystem.isfile(path))

    def is_dir(self) -> bool:
        filesystem, path = self._storage()
        return bool(filesystem.isdir(path))

    def iterdir(self) -> Iterator[RemotePath]:
        filesystem, path = self._storage()
        for entry in filesystem.ls(path, detail=False):
            yield RemotePath(filesystem.unstrip_protocol(entry))

    def resolve(self) -> RemotePath:
        return self

    def open(self) -> IO[bytes]:
        filesystem, path = self._storage()
        file: IO[bytes] = filesystem.open(path, "rb")
        return file


AnyPath = Path | RemotePath


def opened(path: AnyPath) -> IO[bytes]:
    """The file, for reading and seeking.

    Raises Unusable for what is no regular file: a pipe would wait for a writer forever.
    """
    if isinstance(path, RemotePath):
        return path.open()
    return open_regular(path)


def as_path(text: str) -> AnyPath:
    """A path or URL; ``file://`` is a path like any other, with an identity of its own file."""
    scheme, separator, rest = text.partition("://")
    if separator and scheme in ("file", "local") and "::" not in rest:
        return Path(rest)
    return RemotePath(text) if separator else Path(text).expanduser()
