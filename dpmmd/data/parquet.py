"""Parquet files of encoded images, as HuggingFace writes them, read some rows at a time."""

from __future__ import annotations

import bisect
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from dpmmd.data.classes import written_names
from dpmmd.data.identifiers import raw_values
from dpmmd.data.items import EncodedSource
from dpmmd.data.labels import as_labels, label_type_error
from dpmmd.data.leftovers import OTHER_SPLIT
from dpmmd.data.once import FileKey, inside, refuse_copied_shards, shards_in
from dpmmd.data.pixels import Encoded, Unusable
from dpmmd.data.remote import AnyPath, opened
from dpmmd.data.request import Request
from dpmmd.data.source import file_identity

NO_FILE = "a cell without an image, or whose file is another cell's or not in the shard's folder"
_SHARD = re.compile(r"(train|test|val|valid|validation)[-_.]", re.IGNORECASE)
_IMAGE_COLUMNS = ("image", "img", "images", "x")
_ROWS = 64  # read at a time
_BUFFER = 1 << 20  # bytes read ahead; pyarrow's defaults read a row group's column whole
_LABEL_COLUMNS = ("label", "labels", "fine_label", "y")


class ParquetSource(EncodedSource):
    """A parquet file, or the shards of one data set, with a column of encoded images.

    The image column is ``binary`` (also large, or a view) or ``struct{bytes, path}``; a cell with a
    path and no bytes stands for a file in the shard's folder or below it. No other file is read: a
    cell with an absolute path, with ``..``, or that a link leads elsewhere from is an image that
    cannot be decoded. Labels, if any, are an integer column, read when the source is opened; images
    stream, whatever the size of the row groups.

    Each row is a record. Where several rows name one file, the first counts and the others
    contribute nothing; they are refused where they do not agree on the file's label and group.
    Shards that are one file are read once. A shard that is a copy of another, and one whose row
    groups share bytes, are refused.

    *Why this keeps the claim.* The rows that name files contribute the set of pairs (file, label of
    the file); the others contribute their own bytes. An exchange of one row takes at most one
    element away and adds at most one, and does not change the number of rows.
    """

    def __init__(self, path: AnyPath, request: Request) -> None:
        group_by = request.group_by
        pq = _pyarrow_parquet()
        files, part, passed = _shards(path, request.split)
        refuse_copied_shards(files, path.name)
        self.passed_over = passed
        self._groups: list[tuple[AnyPath, int]] = []  # (shard, row group) in order
        counts: list[int] = []
        labels: list[Tensor] = []
        groups: list[Any] = []
        class_names: tuple[str, ...] | None = None
        named = _NamedFiles()
        for position, file in enumerate(files):
            try:
                with opened(file) as handle, pq.ParquetFile(handle) as parquet:
                    schema = parquet.schema_arrow
                    _check_bytes(parquet.metadata, path)
                    if position == 0:
                        self._column = _image_column(schema, request.image_key, path)
                        self.columns = tuple(schema.names)
                        label_column = _label_column(schema, request.label_key, path)
                        class_names = _class_names(schema, label_column)
                        _check_column(schema, group_by, "group_by", path)
                    elif {self._column, label_column, group_by} - {None} - set(schema.names):
                        raise _SchemaError(
                            f"source={str(path)!r}: its shards have different columns; expected "
                            "one schema. Give a single file, or a folder of one data set."
                        )
                    for group in range(parquet.num_row_groups):
                        self._groups.append((file, group))
                        named.look(parquet, group, self._column, file, sum(counts))
                        counts.append(parquet.metadata.row_group(group).num_rows)
                    if label_column is not None:
                        column = parquet.read(columns=[label_column]).column(label_column)
                        labels.append(_labels(column, path.name))
                    if group_by is not None:
                        column = parquet.read(columns=[group_by]).column(group_by)
                        groups += raw_values(column)  # nulls and types as they are
            except (_SchemaError, TypeError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(str(error)) from None
            except Exception as error:
                raise ValueError(
                    f"source={str(file)!r} is not a readable parquet file "
                    f"({type(error).__name__}): expected one that pyarrow opens; write or "
                    "download it again."
                ) from None
        self._ends = list(itertools.accumulate(counts))
        self._cells: _Cells | None = None
        super().__init__(
            name=path.name + (f"/{part}" if part else ""),
            identity=file_identity("parquet", path, part),
            num_images=self._ends[-1] if self._ends else 0,
            labels=torch.cat(labels) if labels else None,
            class_names=class_names,
            request=request,
            groups=None if group_by is None else groups,
        )
        named.check(self._labels, self.groups, path)
        self._named = named.rows
        self._settle_shape()
        self._cells = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_cells": None}

    def encoded(self, indices: Sequence[int]) -> Iterator[Encoded]:
        for index in indices:
            group = bisect.bisect_right(self._ends, index)
            row = index - (self._ends[group - 1] if group else 0)
            if self._cells is None or not self._cells.can_reach(group, row):
                self._cells = None  # frees the last rows before others are read
                self._cells = _Cells(*self._groups[group], group, self._column)
            try:
                cell = self._cells[row]
                image = cell.get("bytes") if isinstance(cell, dict) else cell
                yield self._file(index) if image is None else image
            except Exception:
                yield None

    def _file(self, index: int) -> Encoded:
        """The file that a cell without bytes stands for, if it is the first to name it."""
        path = self._named.get(index)
        if path is None:
            return Unusable(NO_FILE)
        if isinstance(path, Path):
            return path
        with opened(path) as file:
            return file.read()


class _NamedFiles:
    """The files that cells without bytes name, each with the first row that names it."""

    def __init__(self) -> None:
        self.rows: dict[int, AnyPath] = {}
        self._first: dict[FileKey, int] = {}
        self._others: list[tuple[int, int]] = []  # (a row, the first row that names its file)

    def look(self, parquet: Any, group: int, column: str, shard: AnyPath, start: int) -> None:
        """Note the files that the cells of a row group name; `start` is its first row."""
        if not _may_name_files(parquet, group, column):
            return
        folder = shard.parent.resolve()
        row = start
        for piece in parquet.iter_batches(_ROWS, row_groups=[group], columns=[column]):
            for cell in piece.column(0):
                value = cell.as_py()
                if value is not None and value.get("bytes") is None and value.get("path"):
                    self._note(row, folder, str(value["path"]))
                row += 1

    def _note(self, row: int, folder: AnyPath, name: str) -> None:
        found = inside(folder, name)
        if found is None:
            return
        path, key = found
        first = self._first.setdefault(key, row)
        if first == row:
            self.rows[row] = path
        else:
            self._others.append((row, first))

    def check(self, labels: Tensor | None, groups: Tensor | None, path: AnyPath) -> None:
        for values, what in ((labels, "labels"), (groups, "groups")):
            if values is not None and any(values[row] != values[one] for row, one in self._others):
                raise ValueError(
                    f"source={str(path)!r}: several rows name one image file, with different "
                    f"{what}; expected one row for each image: drop the further rows."
                )


def _may_name_files(parquet: Any, group: int, column: str) -> bool:
    """Whether the cells of a row group may be without bytes, by what the file says of itself."""
    import pyarrow as pa

    kind = parquet.schema_arrow.field(column).type
    if not pa.types.is_struct(kind) or kind.get_field_index("path") < 0:
        return False
    chunks = parquet.metadata.row_group(group)
    for number in range(chunks.num_columns):
        chunk = chunks.column(number)
        if chunk.path_in_schema == f"{column}.bytes":
            statistics = chunk.statistics
            counted = statistics is not None and statistics.has_null_count
            return not counted or statistics.null_count > 0
    return True


def _check_bytes(metadata: Any, path: AnyPath) -> None:
    """Raise _SchemaError where two pieces of the file share bytes: one image would count twice."""
    pieces = []
    for group in range(metadata.num_row_groups):
        chunks = metadata.row_group(group)
        for number in range(chunks.num_columns):
            chunk = chunks.column(number)
            starts = (chunk.data_page_offset, chunk.dictionary_page_offset or 0)
            start = min(start for start in starts if start > 0)
            pieces.append((start, start + chunk.total_compressed_size))
    pieces.sort()
    if any(end > start for (_, end), (start, _) in itertools.pairwise(pieces)):
        raise _SchemaError(
            f"source={str(path)!r}: pieces of the file share bytes, so that one image would count "
            "several times; expected a file that a parquet library wrote. Write it again."
        )


class _Cells:
    """The cells of one row group's column, in order, of which a few rows are held."""

    def __init__(self, file: AnyPath, number: int, group: int, column: str) -> None:
        self._group, self._start = group, 0
        self._rows: Any = ()
        self._pieces = self._read(file, number, column)

    def can_reach(self, group: int, row: int) -> bool:
        return group == self._group and row >= self._start

    def __getitem__(self, row: int) -> Any:
        """Raises for rows from where the group is damaged on."""
        while row >= self._start + len(self._rows):
            self._start += len(self._rows)
            self._rows = ()
            self._rows = next(self._pieces)
        return self._rows[row - self._start].as_py()

    @staticmethod
    def _read(file: AnyPath, number: int, column: str) -> Iterator[Any]:
        options = {"buffer_size": _BUFFER, "pre_buffer": False}
        with opened(file) as handle, _pyarrow_parquet().ParquetFile(handle, **options) as parquet:
            for piece in parquet.iter_batches(_ROWS, row_groups=[number], columns=[column]):
                yield piece.column(0)
                del piece


class _SchemaError(ValueError):
    pass


def _pyarrow_parquet() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ImportError(
            "parquet sources need the package pyarrow: install it with pip install pyarrow."
        ) from None
    return pyarrow.parquet


def _shards(path: AnyPath, split: str) -> tuple[list[AnyPath], str, dict[str, int]]:
    """The files to read, the split they were chosen by ("": none), and what was passed over."""
    if not path.is_dir():
        return [path], "", {}
    files, passed = shards_in(path, ".parquet")
    if not any(_SHARD.match(file.name) for file in files):
        return files, "", passed
    chosen = [
        file for file in files if (m := _SHARD.match(file.name)) and m[1].lower() == split.lower()
    ]
    if not chosen:
        known = sorted({m[1].lower() for file in files if (m := _SHARD.match(file.name))})
        raise ValueError(
            f"split={split!r}: no shard in {str(path)!r} belongs to it; expected one of "
            f"{', '.join(known)}."
        )
    passed[OTHER_SPLIT] = len(files) - len(chosen)
    return chosen, split.lower(), {reason: n for reason, n in passed.items() if n}


def _image_column(schema: Any, image_key: str | None, path: AnyPath) -> str:
    import pyarrow as pa

    def holds_images(kind: Any) -> bool:
        if pa.types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0
        if pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            return True
        return str(kind) == "binary_view"  # pyarrow 15 has no function for it

    fitting = [field.name for field in schema if holds_images(field.type)]
    if image_key is not None:
        if image_key in fitting:
            return image_key
        raise _SchemaError(
            f"image_key={image_key!r}: no column of encoded images of that name in "
            f"{path.name!r}; expected one of {', '.join(fitting) or 'none (there is no such)'}."
            f"{_cast(schema, (image_key,))}"
        )
    for name in _IMAGE_COLUMNS:
        if name in fitting:
            return name
    if len(fitting) == 1:
        return fitting[0]
    raise _SchemaError(
        f"source={str(path)!r}: cannot tell which column holds the images; expected a binary or "
        f"struct{{bytes, path}} column, found {', '.join(schema.names) or 'none'}. Name it with "
        f"image_key.{_cast(schema, _IMAGE_COLUMNS)}"
    )


def _cast(schema: Any, names: Sequence[str]) -> str:
    """What to do about a column that has the name of one of images, and not the type."""
    found = next((field for field in schema if field.name in names), None)
    if found is None:
        return ""
    return (
        f" The column {found.name!r} is of type {found.type}: if it holds encoded images, cast it "
        "with pyarrow's .cast(pa.binary()) and write the file again."
    )


def _label_column(schema: Any, label_key: str | None, path: AnyPath) -> str | None:
    if label_key is None:
        return next((name for name in _LABEL_COLUMNS if name in schema.names), None)
    _check_column(schema, label_key, "label_key", path)
    return label_key


def _check_column(schema: Any, key: str | None, argument: str, path: AnyPath) -> None:
    if key is not None and key not in schema.names:
        raise _SchemaError(
            f"{argument}={key!r}: no such column in {path.name!r}; expected one of "
            f"{', '.join(schema.names)}."
        )


def _labels(column: Any, name: str) -> Tensor:
    import pyarrow as pa

    if not pa.types.is_integer(column.type):
        raise label_type_error(name, str(column.type))
    if column.null_count:
        raise _SchemaError(
            f"labels of source {name!r} have missing values: expected an integer for every image; "
            "drop the unlabelled records or give them a class of their own."
        )
    return as_labels(column.to_numpy(), len(column), name)


def _class_names(schema: Any, label_column: str | None) -> tuple[str, ...] | None:
    """Class names from the metadata that HuggingFace's ``datasets`` writes, if any."""
    try:
        features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        return written_names([str(name) for name in features[label_column]["names"]])
    except (KeyError, TypeError, ValueError):
        return None
