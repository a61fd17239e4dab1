"""From an encoded or in-memory image to float pixels of the declared shape.

One definition for every source: pixels become float32 in [0, 1] (uint8 / 255), grey is
0.299 R + 0.587 G + 0.114 B, resizing is bilinear and antialiased
(``torch.nn.functional.interpolate``), for a whole array of images and for one decoded file
alike. An image's pixels therefore do not depend on the container it came in, nor on the other
images of its batch. EXIF orientation is applied. Transparency is composed on the background,
white unless another is set.

Memory. One image takes at most about 16 bytes for each of its pixels while it is decoded, and an
image of more than `MAX_PIXELS` is not decoded: about 1 GiB. Most take far less: a large image that
is resized is held as Pillow's 4 bytes a pixel, and a JPEG at the reduced scale only.
"""

from __future__ import annotations

import io
import os
import stat
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageColor, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import get_worker_info

from dpmmd.data.silence import quiet_libtiff

# Formats of raster images that Pillow decodes by code that reports errors as exceptions (libtiff's
# messages are sent away), as far as this installation has them. EPS would start Ghostscript, and
# others are not formats of photographs.
Image.init()
FORMATS = tuple(
    name
    for name in (
        *("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "PPM", "TIFF", "AVIF", "JPEG2000", "TGA"),
        *("SGI", "PCX", "QOI", "SUN", "MSP"),
    )
    if name in Image.OPEN
)
EXTENSIONS = frozenset(
    extension
    for extension, name in Image.registered_extensions().items()
    if name in FORMATS or name == "MPO"  # a JPEG with several pictures
)
MAX_PIXELS = 1 << 26  # an image of more is not decoded
_BAND = 1 << 20  # pixels that are held as floats at once, where an image is resized
_ORIENTATION = 0x0112
_UPRIGHT = {  # what turns an image of each EXIF orientation as a viewer shows it
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
OUTSIDE = "values outside [0, 1]"
_NORMALISED = (
    " The data set may normalise its images: leave out transforms.Normalize (the encoder does that "
    "by itself), or undo it with x * std + mean; divide floats on a 0..255 scale by 255."
)
SCALES = {torch.uint8: 255, torch.uint16: 65535, torch.bool: 1}  # what stands for 1.0
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
    background: tuple[int, int, int] = (255, 255, 255)

    @classmethod
    def declare(
        cls,
        image_size: int | tuple[int, int] | None,
        channels: int | None,
        crop: str | None,
        background: str | tuple[int, int, int] | None = None,
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
        return cls(size, channels, crop, _colour(background))

    @property
    def declared(self) -> bool:
        """Whether the output shape is known without looking at any image."""
        return self.image_size is not None and self.channels is not None

    @property
    def decoding(self) -> dict[str, str]:
        """How files become pixels, as far as it is not the same for all: recorded in a release."""
        return {"orientation": "EXIF", "background": "#{:02x}{:02x}{:02x}".format(*self.background)}

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

    def apply_bands(self, bands: Iterable[Tensor], height: int, width: int) -> Tensor:
        """`apply` on an image ``[c, height, width]`` that comes in bands of rows, to the same bits.

        Antialiased resizing is separable, rows first: what is held is one band, and all rows at
        their new width. (An image that needs no resize is not to come here.)
        """
        assert self.image_size is not None
        grey_first = Geometry(channels=1) if self.channels == 1 else Geometry()
        resized_h, resized_w = self._resized(height, width)
        narrow = [_interpolate(grey_first.apply(b[None]), (b.shape[1], resized_w)) for b in bands]
        images = _interpolate(torch.cat(narrow, 2), (resized_h, resized_w))
        images = self._cut(images.clamp_(0, 1))
        return images.expand(-1, 3, -1, -1) if self.channels == 3 else images

    def _resize(self, images: Tensor) -> Tensor:
        if self.image_size is None or images.shape[2:] == self.image_size:
            return images
        height, width = images.shape[2:]
        return self._cut(_interpolate(images, self._resized(height, width)).clamp_(0, 1))

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        """What an image of this size is resized to, before it is cut."""
        assert self.image_size is not None
        target_h, target_w = self.image_size
        resized_h, resized_w = target_h, target_w
        if self.crop == "center":
            scale = max(target_h / height, target_w / width)
            resized_h = max(target_h, round(height * scale))
            resized_w = max(target_w, round(width * scale))
            if resized_h * resized_w > max(_MAX_RESIZED_PIXELS, target_h * target_w):
                raise Unusable("too elongated to be cropped")
        return resized_h, resized_w

    def _cut(self, images: Tensor) -> Tensor:
        """The middle, of the target's size."""
        assert self.image_size is not None
        target_h, target_w = self.image_size
        resized_h, resized_w = images.shape[2:]
        top, left = (resized_h - target_h) // 2, (resized_w - target_w) // 2
        return images[:, :, top : top + target_h, left : left + target_w]


def _interpolate(images: Tensor, size: tuple[int, int]) -> Tensor:
    # Contiguous always: other layouts may take another code path and other roundings.
    return F.interpolate(
        images.contiguous(), size=size, mode="bilinear", antialias=True, align_corners=False
    )


def _colour(background: str | tuple[int, int, int] | None) -> tuple[int, int, int]:
    """A colour's name, ``#rrggbb`` or three numbers as (red, green, blue), each 0 to 255."""
    try:
        colour: Any = background
        if isinstance(background, str):
            colour = ImageColor.getrgb(background)[:3]
        red, green, blue = (255, 255, 255) if colour is None else colour
        if all(type(c) is int and 0 <= c <= 255 for c in (red, green, blue)):
            return (red, green, blue)
    except (ValueError, TypeError):
        pass
    raise ValueError(
        f"background={background!r}: expected a colour such as 'white', 'black' or '#808080', on "
        "which transparent images are composed."
    )


def _is_size(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


class Unusable(ValueError):
    """A record that contributes nothing. ``reason`` says why, and names no record.

    The reasons are for the data holder's eyes alone: `dpmmd inspect`, and the first look that a
    release takes before it spends.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason

    def __reduce__(self) -> Any:
        return Unusable, (self.reason,)


def is_interrupt(error: BaseException) -> bool:
    """Whether an exception is somebody's Ctrl-C, which reaches the main thread alone.

    Any other exception of a record, SystemExit and those of other languages' panics too, is the
    record's own. (A worker process is told of a Ctrl-C by its parent.)
    """
    mine = threading.current_thread() is threading.main_thread() and get_worker_info() is None
    return isinstance(error, KeyboardInterrupt) and mine


def reason_of(error: BaseException) -> str:
    """Why a record that raised this is not usable."""
    if isinstance(error, Unusable):
        return error.reason
    if isinstance(error, UnidentifiedImageError):
        return "not an image of a known format"
    return f"cannot be decoded ({type(error).__name__})"


Encoded = bytes | os.PathLike[str] | Unusable | None


def open_regular(path: str | os.PathLike[str]) -> BinaryIO:
    """A regular file, for reading. Never waits, as the opening of a FIFO would.

    Raises:
        Unusable: a folder, FIFO, socket or device.
        OSError: it is not there, or may not be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    flags |= getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Unusable("not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


@contextmanager
def open_image(encoded: Encoded) -> Iterator[Image.Image]:
    """The image's header, read; its pixels are not decoded yet.

    Raises:
        Unusable: no bytes, not a regular file, or more pixels than `MAX_PIXELS`.
        Exception: whatever Pillow raises.
    """
    if isinstance(encoded, Unusable):
        raise encoded
    if encoded is None:
        raise Unusable("no image")
    if isinstance(encoded, bytes):
        file: Any = io.BytesIO(encoded)
    else:
        try:
            file = open_regular(encoded)
        except OSError as error:
            raise Unusable(f"cannot be opened ({type(error).__name__})") from None
    with file, Image.open(file, formats=FORMATS) as image:
        if image.size[0] * image.size[1] > MAX_PIXELS:
            raise Unusable(f"more than {MAX_PIXELS:,} pixels")
        yield image


def decode(encoded: Encoded, geometry: Geometry | None = None) -> Tensor:
    """Bytes or a file to float32 pixels ``[C, H, W]`` in [0, 1], C 1 or 3; any failure raises.

    With `geometry` the image is brought to its channels and size, and never held as floats at its
    own size.
    """
    with open_image(encoded) as image:
        return from_pil(image, geometry)


def header_shape(
    encoded: Encoded, geometry: Geometry | None = None
) -> tuple[int, int, int] | Unusable:
    """``(C, h, w)`` from an image's header alone, as it is shown, or why it cannot be read."""
    try:
        with open_image(encoded) as image:
            width, height = oriented_size(image)
            return (_channels(image, geometry or Geometry()), height, width)
    except BaseException as error:
        if is_interrupt(error):
            raise
        return Unusable(reason_of(error))


def oriented_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) as a viewer shows the image."""
    width, height = image.size
    return (height, width) if _orientation(image) >= 5 else (width, height)


def _channels(image: Image.Image, geometry: Geometry) -> int:
    grey = image.mode in _GREY_MODES
    if grey and image.has_transparency_data:
        grey = len(set(geometry.background)) == 1
    return 1 if grey else 3


def _orientation(image: Image.Image) -> int:
    """1 to 8 as in EXIF, from what stands before the pixels; TIFF is turned by Pillow itself."""
    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & set(image.info):
        return 1  # Pillow would decode the whole file to look behind the pixels
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:
        return 1
    return found if isinstance(found, int) and 1 <= found <= 8 else 1


def from_pil(image: Image.Image, geometry: Geometry | None = None) -> Tensor:
    """A PIL image as float32 ``[C, H, W]``; grey modes give C = 1, all others 3.

    EXIF orientation is applied, and transparency composed on the geometry's background. With
    `geometry` the image is brought to its size too: a JPEG is decoded at the least scale of 1/2,
    1/4, 1/8 that still has twice the size wanted, and a large image goes through in bands of rows,
    the same bits as whole.
    """
    geometry = geometry or Geometry()
    orientation = _orientation(image)
    if geometry.image_size is not None and image.format in ("JPEG", "MPO"):
        height, width = geometry.image_size[:: -1 if orientation >= 5 else 1]
        image.draft(None, (2 * width, 2 * height))
    with quiet_libtiff(image):
        image.load()
    if orientation != 1:
        image = image.transpose(_UPRIGHT[orientation])
    width, height = image.size
    if geometry.image_size is None or width * height <= _BAND:
        return geometry.apply(_pixels(image, geometry)[None])[0].contiguous()
    rows = max(1, _BAND // width)
    bands = (
        _pixels(image.crop((0, top, width, min(top + rows, height))), geometry)
        for top in range(0, height, rows)
    )
    return geometry.apply_bands(bands, height, width)[0].contiguous()


def _pixels(image: Image.Image, geometry: Geometry) -> Tensor:
    """A loaded image's pixels, as they are stored, float32 ``[C, h, w]``."""
    key = image.info.get("transparency")
    if image.mode in _SIXTEEN_BIT_MODES:
        values = torch.from_numpy(np.array(image, dtype=np.float32))
        pixels = check_pixels(values.div(65535)[None])
        if not isinstance(key, int):
            return pixels
        if _channels(image, geometry) == 3:
            pixels = pixels.expand(3, -1, -1)
        background = torch.tensor(geometry.background[: pixels.shape[0]]) / 255
        return torch.where(values == key, background[:, None, None], pixels)
    if image.mode == "F":
        return check_pixels(torch.from_numpy(np.array(image, dtype=np.float32))[None])
    grey = _channels(image, geometry) == 1
    mode = "L" if grey else "RGB"
    if image.has_transparency_data:
        with_alpha = image.convert("LA" if image.mode in _GREY_MODES else "RGBA")
        colour: Any = geometry.background[0] if grey else geometry.background
        image = Image.new(mode, with_alpha.size, colour)
        image.paste(with_alpha.convert(mode), mask=with_alpha.getchannel("A"))
    pixels = torch.from_numpy(np.array(image if image.mode == mode else image.convert(mode)))
    pixels = pixels[None] if grey else pixels.permute(2, 0, 1)
    return pixels.to(torch.float32).div_(255)


def from_item(image: Any, geometry: Geometry | None = None) -> Tensor:
    """A data set's image (PIL, bytes, array or tensor; HW, CHW or HWC) as float32 ``[C, H, W]``.

    Raises:
        Unusable: it is none of these, or has values outside [0, 1].
    """
    if isinstance(image, Image.Image):
        return from_pil(image, geometry)
    if isinstance(image, bytes):
        return decode(image, geometry)
    if not isinstance(image, Tensor | np.ndarray):
        raise Unusable(f"an item of type {type(image).__name__}, not an image")
    tensor = image.detach().cpu() if isinstance(image, Tensor) else torch.from_numpy(image.copy())
    if tensor.ndim == 2:
        tensor = tensor[None]
    elif tensor.ndim == 3 and tensor.shape[0] not in (1, 3) and tensor.shape[2] in (1, 3):
        tensor = tensor.permute(2, 0, 1)
    if tensor.ndim != 3 or tensor.shape[0] not in (1, 3):
        raise Unusable("not [H, W], [C, H, W] or [H, W, C] with C = 1 or 3")
    pixels = check_pixels(to_float(tensor))
    return pixels if geometry is None else geometry.apply(pixels[None])[0]


def to_float(pixels: Tensor) -> Tensor:
    """uint8 0..255, uint16 0..65535, bool or float in [0, 1] to float32.

    Raises:
        Unusable: any other dtype.
    """
    if pixels.dtype in SCALES:
        return pixels.to(torch.float32).div_(SCALES[pixels.dtype])
    if pixels.is_floating_point():
        return pixels.to(torch.float32)
    raise Unusable(f"pixels of type {pixels.dtype}".replace("torch.", ""))


def advice_on(reasons: Iterable[str]) -> str:
    """What to try where pixels are outside [0, 1]; else nothing."""
    return _NORMALISED if any(OUTSIDE in reason for reason in reasons) else ""


def check_pixels(pixels: Tensor) -> Tensor:
    """The pixels, or Unusable when one is not finite or leaves [0, 1] (NaN fails too)."""
    if not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise Unusable(OUTSIDE)
    return pixels


def common_shape(
    shapes: Iterable[tuple[int, int, int] | Unusable], geometry: Geometry, name: str
) -> tuple[int, int, int]:
    """The one output shape of images with the given shapes (Unusable: skipped).

    Raises:
        ValueError: mixed sizes without `image_size`, mixed channels without `channels`, or no
            readable image at all. The message carries no record's size.
    """
    reasons: Counter[str] = Counter()
    found = set()
    for shape in shapes:
        if isinstance(shape, Unusable):
            reasons[shape.reason] += 1
        else:
            found.add(geometry.output_shape(*shape))
    if not found:
        why = ", ".join(reason for reason, _ in reasons.most_common(4))
        raise ValueError(
            f"source {name!r}: none of its images can be read ({why or 'there are none'}), so that "
            f"their shape cannot be derived.{advice_on(reasons)} `dpmmd inspect` says what is "
            "there."
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
