"""From an encoded or in-memory image to float pixels of the declared shape.

One definition for every source: pixels become float32 in [0, 1] (uint8 / 255), grey is
0.299 R + 0.587 G + 0.114 B, resizing is bilinear and antialiased
(``torch.nn.functional.interpolate``), for a whole array of images and for one decoded file
alike. An image's pixels therefore do not depend on the container it came in, nor on the other
images of its batch. EXIF orientation is not applied and transparency is dropped.
"""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

Encoded = bytes | os.PathLike[str] | None

# Formats decoded by code that reports errors as exceptions only. TIFF is left out: libtiff
# writes messages about damaged files to standard error. EPS would start Ghostscript.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "PPM")
EXTENSIONS = frozenset(
    (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".pbm", ".pnm")
)
_SIXTEEN_BIT_MODES = frozenset(("I", "I;16", "I;16L", "I;16B", "I;16N"))
_GREY_MODES = frozenset(("1", "L", "LA", "La", "F")) | _SIXTEEN_BIT_MODES
# An image may ask for at most this many pixels after the resize that precedes the crop.
_MAX_RESIZED_PIXELS = 1 << 26
_LUMA = (0.299, 0.587, 0.114)


@dataclass(frozen=True)
class Geometry:
    """The declared shape of the images: size, channels, and what to do with the aspect ratio."""

    image_size: tuple[int, int] | None = None
    channels: int | None = None
    crop: str | None = None

    @classmethod
    def declare(
        cls,
        image_size: int | tuple[int, int] | None,
        channels: int | None,
        crop: str | None,
    ) -> Geometry:
        """Check the declared values; raises ValueError or TypeError naming the argument."""
        size: tuple[int, int] | None
        if image_size is None:
            size = None
        elif _is_size(image_size):
            size = (int(image_size), int(image_size))  # type: ignore[arg-type]
        elif (
            isinstance(image_size, tuple | list)
            and len(image_size) == 2
            and all(_is_size(side) for side in image_size)
        ):
            size = (int(image_size[0]), int(image_size[1]))
        else:
            raise ValueError(
                f"image_size={image_size!r}: expected a side in pixels or (height, width), each "
                "at least 1; try image_size=32."
            )
        if channels is not None and (isinstance(channels, bool) or channels not in (1, 3)):
            raise ValueError(
                f"channels={channels!r}: expected 1 (grey), 3 (RGB) or None (as the images are)."
            )
        if crop not in (None, "center"):
            raise ValueError(
                f"crop={crop!r}: expected None (plain resize) or 'center' (resize the shorter "
                "side, then cut out the centre)."
            )
        if crop is not None and size is None:
            raise ValueError(
                f"crop={crop!r} without image_size: expected the size to crop to; give "
                "image_size, e.g. image_size=64."
            )
        return cls(size, channels, crop)

    @property
    def declared(self) -> bool:
        """Whether the output shape is known without looking at any image."""
        return self.image_size is not None and self.channels is not None

    def output_shape(self, channels: int, height: int, width: int) -> tuple[int, int, int]:
        """``(C, H, W)`` after :meth:`apply` on images of the given shape."""
        return (self.channels or channels, *(self.image_size or (height, width)))

    def apply(self, images: Tensor) -> Tensor:
        """Channels, resize and crop: float ``[B, c, h, w]`` to ``[B, C, H, W]``, in [0, 1].

        Raises ValueError when the image would have to be enlarged beyond all measure before the
        crop (a very long, thin image).
        """
        if self.channels == 1 and images.shape[1] == 3:
            red, green, blue = images.unbind(1)
            grey = _LUMA[0] * red + _LUMA[1] * green + _LUMA[2] * blue
            images = grey.unsqueeze(1).clamp_(0, 1)
        images = self._resize(images)
        if self.channels == 3 and images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return images

    def _resize(self, images: Tensor) -> Tensor:
        if self.image_size is None or images.shape[2:] == self.image_size:
            return images
        height, width = images.shape[2:]
        target_h, target_w = self.image_size
        resized_h, resized_w = target_h, target_w
        if self.crop == "center":
            scale = max(target_h / height, target_w / width)
            resized_h = max(target_h, round(height * scale))
            resized_w = max(target_w, round(width * scale))
            if resized_h * resized_w > max(_MAX_RESIZED_PIXELS, target_h * target_w):
                raise ValueError("image too elongated to crop")
        images = F.interpolate(
            # Contiguous always: other layouts may take another code path and other roundings.
            images.contiguous(),
            size=(resized_h, resized_w),
            mode="bilinear",
            antialias=True,
            align_corners=False,
        ).clamp_(0, 1)
        top, left = (resized_h - target_h) // 2, (resized_w - target_w) // 2
        return images[:, :, top : top + target_h, left : left + target_w]


def _is_size(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


@contextmanager
def quiet() -> Iterator[None]:
    """Decode in silence: no warning and no log line may tell of a single private image.

    A decompression-bomb warning becomes an exception, and so an invalid image.
    """
    logger = logging.getLogger("PIL")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    finally:
        logger.setLevel(level)


def _open(encoded: Encoded) -> Image.Image:
    if encoded is None:
        raise ValueError("no image bytes")
    file = io.BytesIO(encoded) if isinstance(encoded, bytes) else Path(encoded)
    return Image.open(file, formats=FORMATS)


def decode(encoded: Encoded) -> Tensor:
    """Bytes or a file to float32 pixels ``[C, h, w]`` in [0, 1], C 1 or 3; any failure raises."""
    with _open(encoded) as image:
        return from_pil(image)


def header_shape(encoded: Encoded) -> tuple[int, int, int] | None:
    """``(C, h, w)`` from an image's header alone, or None where it cannot be read."""
    try:
        with _open(encoded) as image:
            width, height = image.size
            return (1 if image.mode in _GREY_MODES else 3, height, width)
    except Exception:
        return None


def from_pil(image: Image.Image) -> Tensor:
    """A PIL image as float32 ``[C, h, w]`` in [0, 1]; grey modes give C = 1, all others 3."""
    if image.mode in _SIXTEEN_BIT_MODES:
        return check_pixels(torch.from_numpy(np.array(image, dtype=np.float32)).div_(65535)[None])
    if image.mode == "F":
        return check_pixels(torch.from_numpy(np.array(image, dtype=np.float32))[None])
    grey = image.mode in _GREY_MODES
    array = np.array(image.convert("L" if grey else "RGB"))
    pixels = torch.from_numpy(array)
    pixels = pixels[None] if grey else pixels.permute(2, 0, 1)
    return pixels.to(torch.float32).div_(255)


def from_item(image: Any) -> Tensor:
    """A data set's image (PIL, array or tensor; HW, CHW or HWC) as float32 ``[C, h, w]``."""
    if isinstance(image, Image.Image):
        return from_pil(image)
    if isinstance(image, bytes):
        return decode(image)
    tensor = image.detach().cpu() if isinstance(image, Tensor) else torch.from_numpy(image.copy())
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif tensor.ndim == 3 and tensor.shape[0] not in (1, 3) and tensor.shape[2] in (1, 3):
        tensor = tensor.permute(2, 0, 1)
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise ValueError("not an image")
    return check_pixels(to_float(tensor))


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0..255 or float in [0, 1] to float32; TypeError for any other dtype."""
    if pixels.dtype == torch.uint8:
        return pixels.to(torch.float32).div_(255)
    if pixels.is_floating_point():
        return pixels.to(torch.float32)
    raise TypeError("pixels are neither uint8 nor floating point")


def check_pixels(pixels: Tensor) -> Tensor:
    """The pixels, or ValueError when one is not finite or leaves [0, 1] (NaN fails too)."""
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise ValueError("pixels outside [0, 1]")
    return pixels


def common_shape(
    shapes: Iterable[tuple[int, int, int] | None], geometry: Geometry, name: str
) -> tuple[int, int, int]:
    """The one output shape of images with the given header shapes (None: unreadable, skipped).

    Raises:
        ValueError: mixed sizes without `image_size`, mixed channels without `channels`, or no
            readable image at all. The message carries no record's size.
    """
    found = {geometry.output_shape(*shape) for shape in shapes if shape is not None}
    if not found:
        raise ValueError(
            f"source {name!r}: the shape of its images cannot be derived from the files; declare "
            "it with image_size and channels, e.g. image_size=32, channels=3."
        )
    if len({shape[1:] for shape in found}) > 1:
        raise ValueError(
            f"source {name!r} has images of mixed sizes and image_size is None: expected one "
            "size; give image_size, e.g. image_size=64, crop='center'."
        )
    if len(found) > 1:
        raise ValueError(
            f"source {name!r} has both grey and colour images and channels is None: expected one "
            "kind; give channels=3 (RGB) or channels=1 (grey)."
        )
    return found.pop()
