"""LSUN's databases of encoded images.

They are read with the ``lmdb`` package directly: torchvision's reader keeps its list of keys as
a pickle in the working directory, and nothing here unpickles a file that lies beside data.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dpmmd.data.items import EncodedSource
from dpmmd.data.once import FileKey, shard_key
from dpmmd.data.pixels import Encoded
from dpmmd.data.source import check_source_labels


class LmdbSource(EncodedSource):
    """The values of one or several LMDB databases, in key order, as encoded images."""

    def __init__(self, databases: Sequence[Path], **common: Any) -> None:
        self._paths = [str(path) for path in databases]
        _refuse_one_database_twice(databases)
        self._environments: tuple[int, list[Any]] | None = None
        self._keys: list[list[bytes]] = []
        for environment in self._open():
            with environment.begin(write=False) as transaction:
                keys = transaction.cursor().iternext(keys=True, values=False)
                # A key with several values comes several times; it is read as one record.
                self._keys.append([bytes(key) for key, _ in itertools.groupby(keys)])
        self.counts = [len(keys) for keys in self._keys]
        self._ends = list(itertools.accumulate(self.counts))
        super().__init__(num_images=self._ends[-1] if self._ends else 0, **common)
        self._settle_shape()

    def label_by_database(self, names: Sequence[str], num_classes: int | None) -> None:
        """Make the database a record comes from its label."""
        self._labels = torch.repeat_interleave(
            torch.arange(len(self.counts)), torch.tensor(self.counts)
        )
        self.labelled, self.class_names = True, tuple(names)
        check_source_labels(self._labels, num_classes, self.name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_environments": None}

    def __copy__(self) -> LmdbSource:
        return self  # an environment must not be opened twice in a process, and takes any thread

    def _open(self) -> list[Any]:
        # An environment must not be used across a fork, so each process opens its own.
        if self._environments is None or self._environments[0] != os.getpid():
            lmdb = _lmdb()
            options = {"readonly": True, "lock": False, "readahead": False, "meminit": False}
            self._environments = (
                os.getpid(),
                [lmdb.open(path, max_readers=1, **options) for path in self._paths],
            )
        return self._environments[1]

    def encoded(self, indices: Sequence[int]) -> Iterator[Encoded]:
        environments = self._open()
        for index in indices:
            part = bisect.bisect_right(self._ends, index)
            key = self._keys[part][index - (self._ends[part - 1] if part else 0)]
            try:
                with environments[part].begin(write=False) as transaction:
                    value = transaction.get(key)
                yield None if value is None else bytes(value)
            except Exception:
                yield None


def _refuse_one_database_twice(databases: Sequence[Path]) -> None:
    first: dict[FileKey, Path] = {}
    for path in databases:
        data = path / "data.mdb"
        other = first.setdefault(shard_key(data if data.exists() else path), path)
        if other is not path:
            raise ValueError(
                f"{str(other)!r} and {str(path)!r} are one database: expected one for each "
                "category, as an image cannot be of two; remove the link."
            )


def _lmdb() -> ModuleType:
    try:
        import lmdb
    except ImportError:
        raise ImportError(
            "the source 'lsun' needs the package lmdb: install it with pip install lmdb."
        ) from None
    return lmdb
