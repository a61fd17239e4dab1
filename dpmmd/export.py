"""A synthetic set as files that others read: .npz, a folder of images, Parquet; and its card."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dpmmd.data import write_npz
from dpmmd.data.classes import NAMES_FILE, listed, written_names
from dpmmd.files import expanded, refuse_existing
from dpmmd.privacy import Release
from dpmmd.privacy.printed import markdown as escaped

FORMATS = ("npz", "npz-float", "folder", "parquet")
_ROW_GROUP = 1000  # images


def format_of(path: Path, given: str | None = None) -> str:
    """The format to write: the one ``given``, or what the name's ending says.

    Raises:
        ValueError: an unknown format, or a name that does not go with it.
        ImportError: Parquet without pyarrow.
    """
    if given is not None and given not in FORMATS:
        raise ValueError(f"--format {given}: expected one of {', '.join(FORMATS)}.")
    found = {".npz": "npz", ".parquet": "parquet", "": "folder"}.get(path.suffix)
    chosen = given or found
    if chosen is None:
        raise ValueError(
            f"--out {path}: expected a name ending in .npz or .parquet, or a folder's name."
        )
    if chosen.partition("-")[0] != found:
        ending = "no ending, a folder" if chosen == "folder" else f".{chosen.partition('-')[0]}"
        raise ValueError(f"--out {path} --format {chosen}: expected a name with {ending}.")
    if chosen == "parquet":
        _pyarrow()
    return chosen


def write(
    path: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    *,
    format: str,
    classes: Sequence[str] | None = None,
    modes: NDArray[np.int64] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a synthetic set; the file or folder appears whole or not at all.

    Args:
        path: where to.
        images: uint8 [n, C, H, W].
        labels: int64 [n], or None.
        format: ``"npz"`` (x uint8 [n, C, H, W], y int64 [n], names in classes), ``"npz-float"``
            (x float32 in [0, 1], as DPImageBench reads it), ``"folder"`` (CLASS/00000000.png; see
            `class_folders`) or ``"parquet"`` (columns image {bytes, path} and label with its
            names, as Hugging Face's datasets reads it).
        classes: names of the classes 0..K-1 of labelled images, or None.
        modes: int64 [n], the mode of each image within its class, or None: an array or column of
            its own.
        overwrite: replace a file that exists; a folder is never replaced.

    Raises:
        FileExistsError: it exists.
        ValueError: modes, and a folder, which has no place for them.
    """
    path = expanded(path)
    if modes is not None:
        check_modes(format)
    if format == "folder":
        with _appearing(path) as folder:
            _write_folder(folder, images, labels, classes)
    elif format == "parquet":
        refuse_existing(path, overwrite=overwrite)
        _write_parquet(path, images, labels, classes, modes)
    else:
        x: NDArray[Any] = images
        if format == "npz-float":
            x = images.astype(np.float32) / np.float32(255)
        write_npz(path, x, labels, classes=classes, modes=modes, overwrite=overwrite)


def check_modes(format: str) -> None:
    """Raises a ValueError where a format has no place for modes."""
    if format == "folder":
        raise ValueError(
            "modes: a folder of PNGs has no place for them; choose an .npz or a .parquet."
        )


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[Path]:
    """A folder to fill, that gets its name when it is full."""
    refuse_existing(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def class_name(label: int, num_classes: int) -> str:
    """ "00" .. "99": in alphabetical order the classes are in their own."""
    return f"{label:0{len(str(num_classes - 1))}d}"


def class_folders(names: Sequence[str]) -> list[str]:
    """A folder for each class, so that whoever sorts the folders by name has the classes in order.

    The names themselves where they are in order and every file system takes them, as they are
    when the private images came in folders; else all of them with the class's number before the
    name, ``0-T-shirt_top``, in which what a file system may refuse is ``_``.
    """
    safe = [_safe(name) for name in names]
    if safe == list(names) and _in_order(safe):
        return safe
    return [f"{class_name(k, len(names))}-{name}" for k, name in enumerate(safe)]


def _in_order(names: Sequence[str]) -> bool:
    """Whether names stay apart and in order on every file system, and mean nothing else there."""
    composed = [unicodedata.normalize("NFC", name) for name in names]
    as_others = [unicodedata.normalize("NFD", name) for name in names]  # macOS
    apart = len({name.casefold() for name in composed}) == len(names)
    numbers = [int(name) for name in names if name.isdecimal()]  # which may be sorted as such
    meant = {name.casefold().partition(".")[0] for name in names}
    return (
        apart
        and len(set(numbers)) == len(numbers)
        and all(sorted(each) == list(each) for each in (names, composed, as_others, numbers))
        and not meant & _RESERVED
    )


def _safe(name: str) -> str:
    kept = "".join("_" if c in _REFUSED or not c.isprintable() else c for c in name).rstrip(". ")
    while len(kept.encode()) > 100:
        kept = kept[:-1]
    return f"_{kept[1:]}" if kept[:1] in ("", ".", "~", " ", "-") else kept


_REFUSED = '<>:"/\\|?*'
_PORTS = (f"{port}{number}" for port in ("com", "lpt") for number in range(10))
_RESERVED = frozenset(
    (
        *("con", "prn", "aux", "nul", *_PORTS),  # devices of Windows
        *("train", "test", "val", "valid", "validation", "__macosx", "lost+found"),  # no classes
    )
)


def _names(labels: NDArray[np.int64], classes: Sequence[str] | None) -> list[str]:
    """A name for each class: those given, else the numbers of those that the labels have."""
    count = int(labels.max()) + 1
    if classes is None:
        return [class_name(k, count) for k in range(count)]
    if len(classes) < count or len(set(classes)) < len(classes):
        raise ValueError(
            f"classes={listed(classes)}: expected a name of its own for each of {count} classes."
        )
    return list(written_names(classes))


def _write_folder(
    folder: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    classes: Sequence[str] | None,
) -> None:
    if labels is None:
        inside = [folder] * len(images)
    else:
        names = _names(labels, classes)
        folders = class_folders(names)
        for name in folders:
            (folder / name).mkdir()
        if folders != names:
            text = json.dumps(dict(zip(folders, names, strict=True)), indent=1, ensure_ascii=False)
            (folder / NAMES_FILE).write_text(f"{text}\n", "utf-8")
        inside = [folder / folders[label] for label in labels]
    for i, (image, place) in enumerate(zip(images, inside, strict=True)):
        (place / f"{i:08d}.png").write_bytes(png(image))


def _write_parquet(
    path: Path,
    images: NDArray[np.uint8],
    labels: NDArray[np.int64] | None,
    classes: Sequence[str] | None,
    modes: NDArray[np.int64] | None,
) -> None:
    pa, pq = _pyarrow()
    cell = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    fields, features = [pa.field("image", cell)], {"image": {"_type": "Image"}}
    if labels is not None:
        names = _names(labels, classes)
        fields.append(pa.field("label", pa.int64()))
        features["label"] = {"names": names, "_type": "ClassLabel"}  # type: ignore[dict-item]
    if modes is not None:
        fields.append(pa.field("mode", pa.int64()))
        features["mode"] = {"dtype": "int64", "_type": "Value"}
    told = json.dumps({"info": {"features": features}})
    schema = pa.schema(fields, metadata={"huggingface": told})
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        with pq.ParquetWriter(temporary, schema) as writer:
            for start in range(0, len(images), _ROW_GROUP):
                part = images[start : start + _ROW_GROUP]
                columns = [
                    pa.array(
                        [
                            {"bytes": png(image), "path": f"{start + i:08d}.png"}
                            for i, image in enumerate(part)
                        ],
                        cell,
                    )
                ]
                columns += [
                    pa.array(numbers[start : start + _ROW_GROUP], pa.int64())
                    for numbers in (labels, modes)
                    if numbers is not None
                ]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def png(image: NDArray[np.uint8]) -> bytes:
    """The file of an image [1 or 3, H, W]."""
    data = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(data, "PNG")
    return data.getvalue()


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ImportError(
            "format 'parquet' needs the package pyarrow: pip install pyarrow (or another format)."
        ) from None
    return pa, pq


def card(
    release: Release,
    *,
    name: str,
    format: str,
    shape: tuple[int, ...],
    step: int,
    temperature: float,
    seed: int,
    aligned: bool = False,
    modes: bool = False,
) -> str:
    """A data set's card in Markdown: what it holds and what was promised about its origin.

    Args:
        release: what the generator was trained on.
        name: of the file or folder.
        format: of `FORMATS`.
        shape: [n, C, H, W] of the images.
        step: training step of the generator's weights.
        temperature, seed: of the latent points.
        aligned: whether the images were aligned with released moments of pixels.
        modes: whether it says of which mode of its class each image is.
    """
    from dpmmd.privacy.report import facts, rows  # and SciPy, which pictures do without

    f, m = facts(release), release.metadata
    version, source, encoder = (escaped(f[key]) for key in ("version", "source", "encoder"))
    n, channels, height, width = shape
    kind = "RGB" if channels == 3 else "grey"
    labels = f"labels 0 to {m.num_classes - 1}, in equal parts" if m.labelled else "no labels"
    classes = [f"{k} is {listed([name])}" for k, name in enumerate(m.class_names or ())]
    lines = [
        f"# {'' if m.private else 'NOT PRIVATE: '}{n:,} synthetic images",
        "",
        f"{escaped(name)}: {n:,} {kind} images of {height} x {width} px, {labels}. Made by dpmmd "
        f"{version}: a generator, trained for {step:,} steps on a noised mean embedding of "
        f"private images ({source}; encoder {encoder}); latent "
        f"temperature {temperature:g}, seed {seed}"
        f"{', aligned with released moments of pixels' if aligned else ''}.",
        "",
        _HOW[format] + (_MODES[format] if modes else ""),
        *([f"\nClasses: {escaped('; '.join(classes))}."] if classes else []),
        "",
        "## Privacy",
        "",
        f["promise"],
        "",
    ]
    if m.private:
        lines += [
            f"The images follow from {'these releases' if f['together'] else 'the release'} alone, "
            "so that this holds for all of them together and for any number of further ones.",
            "",
            "| what | value |",
            "| --- | --- |",
            *(f"| {escaped(key)} | {escaped(value)} |" for key, value in rows(f)),
            "",
            "Not covered:",
            "",
            *(f"- {line}" for line in f["not_covered"]),
            "",
        ]
    return "\n".join(lines)


_MODES = {
    "npz": " `modes` is int64 [n]: the mode of each image within its class, from 0 on.",
    "npz-float": " `modes` is int64 [n]: the mode of each image within its class, from 0 on.",
    "parquet": " Column `mode`: the mode of each image within its class, from 0 on.",
}
_HOW = {
    "npz": "`x` is uint8 [n, C, H, W], `y` int64 [n], `classes` the classes' names if they have "
    "any: `numpy.load(FILE)`.",
    "npz-float": "`x` is float32 [n, C, H, W] in [0, 1], `y` int64 [n], `classes` the classes' "
    "names if they have any: `numpy.load(FILE)`.",
    "folder": "One PNG an image, one folder a class: `torchvision.datasets.ImageFolder(FOLDER)`. "
    f"Sorted by name, the folders are the classes in order; where `{NAMES_FILE}` is there, it has "
    "the name of each folder's class.",
    "parquet": "Columns `image` (PNG) and `label`, with the classes' names in the schema: "
    '`datasets.load_dataset("parquet", data_files=FILE)`.',
}
