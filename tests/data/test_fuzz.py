"""Damaged and crafted files: an image, a container or a release is read whole, refused, or invalid.

Bytes of small valid files are changed at random. What may happen: an image is decoded or is not
usable; a container is refused when it is opened, in words, or read to its end; a release is refused
by a PrivacyError. What may not: another exception, a message about a record, pixels outside [0, 1],
more bytes handed out than the file has, a read that does not end.
"""

from __future__ import annotations

import io
import itertools
import tarfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import dpmmd
from dpmmd.data import open_source, pixels
from dpmmd.data.items import EncodedSource
from dpmmd.data.pixels import Unusable, decode, header_shape
from dpmmd.data.silence import quiet
from dpmmd.privacy import PrivacyError
from tests.conftest import images, small_encoder

pytestmark = pytest.mark.long
BOUNDED = settings(
    max_examples=400,
    deadline=10_000,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
N = 6
X, Y = images(N)
EXTREMES = (b"\x00", b"\xff" * 4, b"\x7f\xff\xff\xff", b"\x80" + bytes(7), b"\xff" * 8, b"-1\x00")


@st.composite
def changes(draw: st.DrawFn) -> list[tuple[str, float, Any]]:
    """Edits at places that are given as shares of the length."""
    place = st.floats(0, 1, exclude_max=True)
    edit = st.one_of(
        st.tuples(st.just("set"), place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("set"), place, st.sampled_from(EXTREMES)),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("cut"), place, st.integers(1, 600)),
        st.tuples(st.just("end"), place, st.just(0)),
        st.tuples(st.just("copy"), place, place),
    )
    return draw(st.lists(edit, min_size=1, max_size=6))


def changed(data: bytes, edits: list[tuple[str, float, Any]]) -> bytes:
    for kind, place, value in edits:
        at = int(place * len(data))
        if kind == "set":
            data = data[:at] + value + data[at + len(value) :]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "cut":
            data = data[:at] + data[at + value :]
        elif kind == "end":
            data = data[:at]
        else:
            other = int(value * len(data))
            data = data[:at] + data[other : other + 64] + data[at + 64 :]
    return data


# ----------------------------------------------------------------------------- images


@cache
def pictures() -> dict[str, bytes]:
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "png": (colour, "PNG", {}),
        "png, palette": (colour.quantize(8), "PNG", {"transparency": b"\x00\x80"}),
        "png, 16 bits": (Image.fromarray(np.arange(80, dtype=np.uint16).reshape(8, 10)), "PNG", {}),
        "jpeg": (colour, "JPEG", {"exif": exif}),
        "jpeg, progressive": (colour.convert("CMYK"), "JPEG", {"progressive": True}),
        "webp": (colour.convert("RGBA"), "WEBP", {"exif": exif}),
        "gif": (colour, "GIF", {"save_all": True, "append_images": [colour]}),
        "bmp": (colour, "BMP", {}),
        "ppm": (colour, "PPM", {}),
        "tiff, lzw": (colour, "TIFF", {"compression": "tiff_lzw"}),
        "tiff, jpeg": (colour, "TIFF", {"compression": "jpeg"}),
        "tiff": (colour.convert("F"), "TIFF", {}),
        "tga": (colour, "TGA", {"compression": "tga_rle"}),
        "sgi": (colour, "SGI", {}),
        "pcx": (colour, "PCX", {}),
        "jpeg 2000": (colour, "JPEG2000", {}),
        "avif": (colour, "AVIF", {}),
    }
    found = {}
    for name, (image, form, options) in kinds.items():
        if form in pixels.FORMATS:
            stream = io.BytesIO()
            image.save(stream, form, **options)
            found[name] = stream.getvalue()
    return found


@pytest.mark.parametrize("kind", sorted(pictures()))
def test_images(kind: str, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(pixels, "MAX_PIXELS", 1 << 20)
    geometry = pixels.Geometry.declare(16, 3, "center")

    @BOUNDED
    @given(changes())
    def check(edits: list[Any]) -> None:
        data = changed(pictures()[kind], edits)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with quiet():
                shape = header_shape(data, geometry)
                try:
                    found = decode(data, geometry)
                except Exception:  # what a source makes an invalid row of
                    return
        assert not isinstance(shape, Unusable)
        assert found.shape == (3, 16, 16)
        assert bool(((found >= 0) & (found <= 1)).all())

    check()
    assert capfd.readouterr().err == ""


# ----------------------------------------------------------------------------- containers


def tar(extra: bool) -> bytes:
    stream = io.BytesIO()
    form = tarfile.PAX_FORMAT if extra else tarfile.GNU_FORMAT
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for i, (image, label) in enumerate(zip(X, Y, strict=True)):
            png = io.BytesIO()
            Image.fromarray(image[0]).save(png, "PNG")
            name = f"{'long/' * 25 if extra else ''}{i}"
            for ending, data in (("png", png.getvalue()), ("cls", b"%d" % label)):
                info = tarfile.TarInfo(f"{name}.{ending}")
                info.size = len(data)
                if extra:
                    info.pax_headers = {"comment": "x" * 20}
                archive.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def npz(save: Callable[..., None]) -> bytes:
    stream = io.BytesIO()
    save(stream, x=X, y=Y, patient=np.array([f"p{i // 2}" for i in range(N)]))
    return stream.getvalue()


def parquet() -> bytes:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = []
    for image in X:
        png = io.BytesIO()
        Image.fromarray(image[0]).save(png, "PNG")
        cells.append({"bytes": png.getvalue(), "path": None})
    stream = io.BytesIO()
    pq.write_table(pa.table({"image": cells, "label": Y}), stream, row_group_size=2)
    return stream.getvalue()


CONTAINERS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "tar": ("x.tar", lambda: tar(False)),
    "tar, pax": ("x.tar", lambda: tar(True)),
    "npz": ("x.npz", lambda: npz(np.savez)),
    "npz, compressed": ("x.npz", lambda: npz(np.savez_compressed)),
    "parquet": ("x.parquet", parquet),
}


@pytest.mark.filterwarnings("ignore:source .* is not counted")
@pytest.mark.parametrize("kind", CONTAINERS)
def test_containers(
    kind: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr(pixels, "MAX_PIXELS", 1 << 20)
    name, make = CONTAINERS[kind]
    whole = make()
    numbers = itertools.count()

    @BOUNDED
    @given(changes())
    def check(edits: list[Any]) -> None:
        folder = tmp_path / str(next(numbers))
        folder.mkdir()
        path = folder / name
        path.write_bytes(changed(whole, edits))
        size = path.stat().st_size
        try:
            source = open_source(path, image_size=8, channels=1, allow_empty=True)
        except (ValueError, TypeError, OSError):  # in words, before anything is spent
            return
        rows = 0
        for batch in source.batches(4):
            assert bool(((batch.images >= 0) & (batch.images <= 1)).all())
            rows += len(batch.valid)
        assert rows >= source.num_images
        if isinstance(source, EncodedSource) and kind.startswith("tar"):
            encoded = list(source.encoded(range(source.num_images)))
            assert sum(len(data) for data in encoded if isinstance(data, bytes)) <= size

    check()
    assert capfd.readouterr().err == ""


# ----------------------------------------------------------------------------- releases


def test_releases(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    released = dpmmd.release(
        (X, Y), small_encoder(), epsilon=5.0, delta=1e-3, adjacency="replace-one", num_classes=3,
        progress=False, out=path,
    )  # fmt: skip
    whole = path.read_bytes()

    @BOUNDED
    @given(changes())
    def check(edits: list[Any]) -> None:
        data = changed(whole, edits)
        path.write_bytes(data)
        try:
            found = dpmmd.Release.load(path)
        except PrivacyError:
            return
        # What is left is the same release: bytes between its arrays may have been changed.
        assert found.metadata == released.metadata
        assert torch.equal(found.sums, released.sums)
        assert torch.equal(found.counts, released.counts)

    check()
