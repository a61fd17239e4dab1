"""DPImageBench's data as one .npz that a recipe reads: its training split, and its test images.

    python prepare.py fmnist_28 dataset/fmnist/train_28.zip dataset/fmnist/test_28.zip

writes fmnist_28.npz (x_train, y_train, x_test, y_test). In its mode "val" DPImageBench holds back a
validation set, `torch.utils.data.random_split` after `torch.manual_seed(0)`; the same images are
left out here. --mode syn keeps all of them, and N and delta change with it.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dpmmd.files import refuse_existing

TRAIN_SIZES = {
    "mnist_28": 55_000,
    "fmnist_28": 55_000,
    "cifar10_32": 45_000,
    "cifar100_32": 45_000,
    "eurosat_32": 21_000,
    "celeba_male_32": 145_064,
    "camelyon_32": 269_538,
}


def read_zip(path: Path, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, C, H, W] and labels int64 [n], in the order of the sorted file names."""
    with zipfile.ZipFile(path) as archive:
        labels = dict(json.loads(archive.read("dataset.json"))["labels"])
        names = sorted(name for name in archive.namelist() if name.endswith(".png"))
        images = []
        for name in names:
            with Image.open(io.BytesIO(archive.read(name))) as image:
                pixels = np.asarray(image.convert("L" if channels == 1 else "RGB"))
            images.append(pixels[None] if channels == 1 else pixels.transpose(2, 0, 1))
    return np.stack(images), np.array([labels[name] for name in names], dtype=np.int64)


def training_part(n: int, size: int) -> np.ndarray:
    """The indices that DPImageBench trains on in its mode "val"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        part, _ = torch.utils.data.random_split(range(n), [size, n - size])  # type: ignore[arg-type]
    return np.asarray(part.indices)


def delta(n: int) -> float:
    """1 / (N ln N)."""
    return 1 / (n * math.log(n))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", choices=sorted(TRAIN_SIZES))
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--mode", choices=["val", "syn"], default="val")
    parser.add_argument("--out", type=Path, default=None, help="default: DATA.npz")
    given = parser.parse_args()
    out = given.out or Path(f"{given.data}.npz")
    refuse_existing(out)
    channels = 1 if "mnist" in given.data else 3
    x, y = read_zip(given.train, channels)
    size = TRAIN_SIZES[given.data]
    if given.mode == "val":
        if size >= len(x):
            raise SystemExit(f"{given.train}: holds {len(x)} images, expected more than {size}.")
        kept = training_part(len(x), size)
        x, y = x[kept], y[kept]
    x_test, y_test = read_zip(given.test, channels)
    np.savez(out, x_train=x, y_train=y, x_test=x_test, y_test=y_test)
    print(f"{out}: {len(x)} training images, delta = 1 / (N ln N) = {delta(len(x)):.6g}")


if __name__ == "__main__":
    main()
