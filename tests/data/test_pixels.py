"""From a file to pixels: orientation, transparency, formats, large images, what is not decoded."""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

import dpmmd
from dpmmd.data import open_source, pixels
from dpmmd.data.pixels import Geometry, Unusable, decode, header_shape
from dpmmd.data.silence import quiet
from tests.conftest import small_encoder

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (10, 14, 3), dtype=np.uint8)


def file(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def oriented(orientation: int, form: str) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return file(
        Image.fromarray(COLOUR), form, exif=exif, **({"quality": 95} if form == "JPEG" else {})
    )


def shown(data: bytes) -> Tensor:
    """What a viewer that follows EXIF shows."""
    image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(form: str, orientation: int) -> None:
    data = oriented(orientation, form)
    found = decode(data)
    assert torch.equal(found, shown(data))
    assert (
        header_shape(data)
        == tuple(found.shape)
        == (3, *((14, 10) if orientation > 4 else (10, 14)))
    )


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_orientation_and_size(orientation: int) -> None:
    """The size wanted is that of the image as it is shown."""
    data = oriented(orientation, "PNG")
    geometry = Geometry.declare((5, 8), None, "center")
    expected = geometry.apply(shown(data)[None])[0]
    assert torch.equal(decode(data, geometry), expected)


def with_alpha(mode: str) -> Image.Image:
    image = Image.fromarray(COLOUR).convert("LA" if mode == "LA" else "RGBA")
    image.putalpha(Image.fromarray(RNG.integers(0, 256, COLOUR.shape[:2], dtype=np.uint8)))
    return image if mode in ("LA", "RGBA") else image.quantize(32)


@pytest.mark.parametrize("background", [None, "black", "#336699"])
@pytest.mark.parametrize("mode", ["LA", "RGBA", "P"])
def test_transparency_is_composed_on_the_background(mode: str, background: str | None) -> None:
    image = with_alpha(mode)
    geometry = Geometry.declare(None, None, None, background)
    data = file(image)
    base = Image.new("RGBA", image.size, background or "white")
    composed = np.array(Image.alpha_composite(base, image.convert("RGBA")).convert("RGB"))
    expected = torch.from_numpy(composed).permute(2, 0, 1)
    found = decode(data, geometry)
    channels = 1 if mode == "LA" and background != "#336699" else 3
    assert header_shape(data, geometry) == tuple(found.shape) == (channels, 10, 14)
    assert (found.expand(3, -1, -1) * 255 - expected).abs().max() <= 1


def test_a_transparent_grey_value_of_16_bits() -> None:
    deep = np.full((4, 5), 40_000, np.uint16)
    deep[1, 2] = 12_345
    data = file(Image.fromarray(deep), transparency=12_345)
    assert decode(data)[0, 1, 2] == 1.0
    assert decode(data, Geometry.declare(None, None, None, "black"))[0, 1, 2] == 0.0
    assert decode(data, Geometry.declare(None, None, None, "#ff0000"))[:, 1, 2].tolist() == [
        1,
        0,
        0,
    ]
    assert decode(data)[0, 0, 0] == pytest.approx(40_000 / 65_535)


@pytest.mark.parametrize("background", ["mauve-ish", (1, 2), (1, 2, 300), 7, ("a", "b", "c")])
def test_a_background_that_is_no_colour(background: Any) -> None:
    with pytest.raises(ValueError, match=r"background=.*expected a colour such as 'white'"):
        Geometry.declare(None, None, None, background)


def test_a_release_says_how_files_became_pixels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(file(with_alpha("RGBA")))
    source = open_source(tmp_path, image_size=8, channels=3, background="black")
    assert source.decoding == {"orientation": "EXIF", "background": "#000000"}
    assert open_source((COLOUR[None], None)).decoding is None
    released = dpmmd.release(
        source, small_encoder(), epsilon=1.0, delta=1e-6, adjacency="replace-one", progress=False,
        out=tmp_path / "r.safetensors",
    )  # fmt: skip
    assert released.metadata.decoding == source.decoding
    assert "orientation by EXIF, transparent images on #000000" in released.report()
    assert dpmmd.Release.load(tmp_path / "r.safetensors").metadata == released.metadata


FORMS = [
    "PNG",
    "JPEG",
    "WEBP",
    "BMP",
    "GIF",
    "PPM",
    "TIFF",
    "TGA",
    "SGI",
    "PCX",
    "AVIF",
    "JPEG2000",
]


@pytest.mark.parametrize("form", FORMS)
def test_every_format_that_pillow_reads(form: str) -> None:
    if form not in pixels.FORMATS:
        pytest.skip(f"this Pillow has no {form}")
    assert decode(file(Image.fromarray(COLOUR), form)).shape == (3, 10, 14)
    assert any(
        e in pixels.EXTENSIONS for e, f in Image.registered_extensions().items() if f == form
    )


def test_extensions() -> None:
    assert {".jfif", ".jpe", ".tif", ".tiff", ".bmp", ".mpo", ".jpg", ".png"} <= pixels.EXTENSIONS
    assert not {".eps", ".pdf", ".ps", ".txt", ".npz", ".mpg", ".h5"} & pixels.EXTENSIONS


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "jpeg", None])
def test_a_damaged_tiff_says_nothing(compression: str | None, capfd: pytest.CaptureFixture) -> None:
    data = bytearray(file(Image.fromarray(COLOUR), "TIFF", compression=compression))
    data[20:60] = bytes(255 - b for b in data[20:60])
    with quiet(), contextlib.suppress(Exception):
        decode(bytes(data))
    os.write(2, b"heard again")
    assert capfd.readouterr() == ("", "heard again")


@pytest.mark.parametrize(
    ("size", "crop", "channels"),
    [(7, None, 3), ((9, 4), "center", 1), (40, "center", 3), (16, None, 1)],
)
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA"])
def test_bands_give_the_bits_of_the_whole(
    size: Any, crop: str | None, channels: int, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = Image.fromarray(RNG.integers(0, 256, (61, 47, 3), dtype=np.uint8)).convert(mode)
    geometry = Geometry.declare(size, channels, crop)
    whole = decode(file(image), geometry)
    for band in (1, 47 * 8, 47 * 60):
        monkeypatch.setattr(pixels, "_BAND", band)
        assert torch.equal(decode(file(image), geometry), whole)
    assert torch.equal(geometry.apply(decode(file(image))[None])[0], whole)


def test_a_jpeg_is_decoded_at_a_reduced_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of at least twice the size wanted: close to the image resized from its full size."""
    smooth = np.add.outer(np.arange(160), np.arange(240)).astype(np.uint8)
    data = file(Image.fromarray(smooth), "JPEG", quality=95)
    full = Geometry.declare(10, 1, "center").apply(decode(data)[None])[0]
    sizes = []
    read = pixels._pixels

    def watched(image: Image.Image, geometry: Geometry) -> Tensor:
        sizes.append(image.size)
        return read(image, geometry)

    monkeypatch.setattr(pixels, "_pixels", watched)
    reduced = decode(data, Geometry.declare(10, 1, "center"))
    assert sizes == [(30, 20)]
    assert (reduced - full).abs().mean() < 0.02


def test_a_large_image_stays_within_the_stated_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG of a few kilobytes whose pixels would take gigabytes as floats."""
    data = file(Image.new("L", (3000, 3000)))
    most = [0]
    original = torch.Tensor.to

    def counted(tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        result: Tensor = original(tensor, *arguments, **options)
        most[0] = max(most[0], result.numel())
        return result

    monkeypatch.setattr(torch.Tensor, "to", counted)
    assert decode(data, Geometry.declare(32, 1, None)).shape == (1, 32, 32)
    assert most[0] <= pixels._BAND


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda p: os.symlink("/dev/zero", p)])
def test_what_is_no_regular_file_is_not_waited_for(
    make: Callable[[Any], None], tmp_path: Path
) -> None:
    make(tmp_path / "a.png")
    done: list[Any] = []

    def read() -> None:
        try:
            decode(tmp_path / "a.png")
        except Unusable as unusable:
            done.append(unusable.reason)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(10)
    assert done == ["not a regular file"]


def test_reasons_travel_between_processes() -> None:
    import pickle

    assert pickle.loads(pickle.dumps(Unusable("because"))).reason == "because"


# ----------------------------------------------------------------------------- silence


def test_silence_ends_with_the_block_in_whatever_order_threads_leave_it() -> None:
    """Two threads whose blocks overlap: `catch_warnings` would leave the process silent."""
    entered, leave, left = threading.Event(), threading.Event(), threading.Event()

    def other() -> None:
        with quiet():
            entered.set()
            leave.wait(10)
        left.set()

    with quiet():
        thread = threading.Thread(target=other)
        thread.start()
        entered.wait(10)
        with warnings.catch_warnings(record=True) as heard:
            warnings.warn("of a record", stacklevel=1)
        assert not heard
    with pytest.warns(UserWarning, match="of the release"):  # the other thread still reads
        warnings.warn("of the release", stacklevel=1)
    leave.set()
    left.wait(10)
    thread.join()
    with pytest.warns(UserWarning, match="of the release"):
        warnings.warn("of the release", stacklevel=1)


def test_silence_leaves_nothing_behind() -> None:
    before = list(warnings.filters)
    with quiet(), quiet():
        pattern = warnings.filters[0][1].pattern  # joblib copies filters by it, for its workers
        assert re.match(pattern, "of a record") is None
    assert list(warnings.filters) == before


def test_silence_ends_where_it_is_interrupted() -> None:
    with pytest.raises(KeyboardInterrupt), quiet():
        raise KeyboardInterrupt
    with pytest.warns(UserWarning, match="next"):
        warnings.warn("next", stacklevel=1)
