"""How a source is to be opened: what the caller of `dpmmd.data.open_source` asked for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dpmmd.data.pixels import Geometry
from dpmmd.data.source import check_num_classes


@dataclass(frozen=True, kw_only=True)
class Request:
    """The keywords of `dpmmd.data.open_source`, checked; every opener takes one.

    Attributes:
        geometry: the declared size and channels, and what becomes of transparency.
        split: ``train``, ``test``, or what else the data set has.
        num_classes: K to check the labels against, or None.
        root: folder of a named data set's files, or None.
        download: whether a named data set may be downloaded.
        image_key, label_key: what holds the images and the labels, if they are named.
        workers: processes that decode.
        group_by: what says which images belong together, or None.
        allow_empty: whether a source without images is one like any other.
    """

    geometry: Geometry
    split: str = "train"
    num_classes: int | None = None
    root: str | os.PathLike[str] | None = None
    download: bool = True
    image_key: str | None = None
    label_key: str | None = None
    workers: int = 0
    group_by: str | None = None
    allow_empty: bool = False

    def __post_init__(self) -> None:
        check_workers(self.workers)
        if self.num_classes is not None:
            check_num_classes(self.num_classes)

    @property
    def folder(self) -> Path | None:
        """`root`, with ``~`` replaced by the user's home."""
        return None if self.root is None else Path(self.root).expanduser()


def check_workers(workers: int) -> int:
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 0:
        raise ValueError(
            f"workers={workers!r}: expected a whole number of processes, at least 0; try 0 "
            "(decode in this process)."
        )
    return workers
