"""Patches of photographs that come with scikit-image, which is not imported.

The label of a patch is its photograph. Patches of the train split are cut from the left half of
each photograph, those of the test split from the right half: no pixel is in both. The patches of a
split overlap, and a pixel lies in dozens of them: they prove the colour path and its looks, and
make no claim of privacy for anyone.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

# Each is in the public domain or CC0, and its bytes are the same in every release of scikit-image.
_SHA256 = {
    "astronaut.png": "88431cd9653ccd539741b555fb0a46b61558b301d4110412b5bc28b5e3ea6cb5",
    "chelsea.png": "596aa1e7cb875eb79f437e310381d26b338a81c2da23439704a73c4651e8c4bb",
    "coffee.png": "cc02f8ca188b167c775a7101b5d767d1e71792cf762c33d6fa15a4599b5a8de7",
    "rocket.jpg": "c2dd0de7c538df8d111e479619b129464d0269d0ae5fd18ca91d33a7fdfea95c",
    "retina.jpg": "38a07f36f27f095e818aea7b96d34202c05176d30253c66733f2e00379e9e0e6",
    "hubble_deep_field.jpg": "3a19c5dd8a927a9334bb1229a6d63711b1c0c767fb27e2286e7c84a3e2c2f5f4",
    "ihc.png": "f8dd1aa387ddd1f49d8ad13b50921b237df8e9b262606d258770687b0ef93cef",
    "motorcycle_left.png": "db18e9c4157617403c3537a6ba355dfeafe9a7eabb6b9b94cb33f6525dd49179",
    # Grey
    "brick.png": "7966caf324f6ba843118d98f7a07746d22f6a343430add0233eca5f6eaaa8fcf",
    "grass.png": "b6b6022426b38936c43a4ac09635cd78af074e90f42ffa8227ac8b7452d39f89",
    "gravel.png": "c48615b451bf1e606fbd72c0aa9f8cc0f068ab7111ef7d93bb9b0f2586440c12",
}
SIZES = (32, 64)  # of a patch; 64 px are a quarter of a photograph's shorter side
_SHORTER = 256  # side of a photograph, once it is reduced
_PATCHES = {"train": 1100, "test": 275}  # of each photograph
# The two-dimensional golden ratio's powers, 1 / 1.3247... and its square, times 2^32: multiples of
# them fill a square evenly (Roberts, "The unreasonable effectiveness of quasirandom sequences").
_EVENLY = np.array([3242174889, 2447445414], dtype=np.uint64)
NAMES = tuple(name.partition(".")[0] for name in _SHA256)


def patches(split: str, size: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Patches [n, size, size, 3] and labels [n], of all photographs in turn.

    Args:
        split: ``train`` or ``test``.
        size: of `SIZES`.

    Raises:
        FileNotFoundError: scikit-image is not installed, or without these photographs.
        ValueError: a photograph is another file than the one that is known.
    """
    cut = [_cut(_half(path, split), size, _PATCHES[split]) for path in _files()]
    images = np.stack(cut, axis=1)  # [patches, photographs, size, size, 3]
    labels = np.tile(np.arange(images.shape[1]), images.shape[0])
    return images.reshape(-1, *images.shape[2:]), labels


def _files() -> list[Path]:
    """The photographs' files in the installed package, each checked."""
    spec = importlib.util.find_spec("skimage")
    folders = (spec.submodule_search_locations or ()) if spec is not None else ()
    for folder in folders:
        files = [Path(folder, "data", name) for name in _SHA256]
        if all(file.is_file() for file in files):
            for file in files:
                if hashlib.sha256(file.read_bytes()).hexdigest() != _SHA256[file.name]:
                    raise ValueError(
                        f"source='photographs': {file} is damaged or another photograph; expected "
                        f"the sha256 {_SHA256[file.name]}. Try pip install --force-reinstall "
                        "scikit-image."
                    )
            return files
    raise FileNotFoundError(
        f"source='photographs' reads {', '.join(_SHA256)} of the package scikit-image, which are "
        "not there: expected the package installed; try pip install scikit-image."
    )


def _half(path: Path, split: str) -> NDArray[np.uint8]:
    """The split's half [h, w, 3], reduced after it was cut off: no pixel is mixed across."""
    with Image.open(path) as file:
        photograph = file.convert("RGB")
    width, height = photograph.size
    middle = width // 2
    left, right = (0, middle) if split == "train" else (middle, width)
    scale = min(1.0, _SHORTER / min(width, height))
    size = (round((right - left) * scale), round(height * scale))
    half = photograph.crop((left, 0, right, height)).resize(size, Image.Resampling.BILINEAR)
    return np.asarray(half)


def _cut(half: NDArray[np.uint8], size: int, number: int) -> NDArray[np.uint8]:
    """Patches [number, size, size, 3], spread evenly; integers decide where they lie."""
    room = np.array(half.shape[:2], dtype=np.uint64) - np.uint64(size - 1)
    turns = np.arange(1, number + 1, dtype=np.uint64)[:, None] * _EVENLY % np.uint64(1 << 32)
    corners = (turns * room >> np.uint64(32)).astype(np.int64)
    return np.stack([half[y : y + size, x : x + size] for y, x in corners])
