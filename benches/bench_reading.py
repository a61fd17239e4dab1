"""Private records on their way to the encoder: files, and the items of a Python Dataset.

The others read the same records with Pillow or the Dataset alone: no key for a record's random
draws, no check of pixels, orientation, transparency or the kind of file, no silence.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from benches.harness import Measure
from dpmmd.data import open_source

BATCH = 256


class Flipped(Dataset[tuple[Tensor, int]]):
    """Float images of an array, flipped at random: about the least that a Dataset does."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        image = torch.from_numpy(self.images[index])[None].float() / 255
        return (image.flip(2) if torch.rand(()) < 0.5 else image), index % 10


@pytest.mark.parametrize("kind", ["files", "Dataset"])
def test_reading(measure: Measure, kind: str, tmp_path: Path) -> None:
    n, side = (8 if measure.smoke else 2000), 28
    images = np.random.default_rng(0).integers(0, 256, (n, side, side), dtype=np.uint8)
    if kind == "files":
        paths = [tmp_path / f"{i:05d}.png" for i in range(n)]
        for path, image in zip(paths, images, strict=True):
            Image.fromarray(image).save(path)
        source = open_source(tmp_path, image_size=side, channels=1)

        def alone() -> Tensor:
            read = (torch.from_numpy(np.array(Image.open(path)))[None] for path in paths)
            return torch.cat([torch.stack([x.float() / 255]) for x in read])

    else:
        data = Flipped(images)
        source = open_source(data, image_size=side, channels=1)

        def alone() -> Tensor:
            return torch.stack([data[i][0] for i in range(n)])

    def ours() -> Tensor:
        return torch.cat([batch.images for batch in source.batches(BATCH)])

    read = measure(
        f"reading {kind}",
        f"{n} grey images, {side} px",
        {"alone": alone, "dpmmd": ours},
        ours="dpmmd",
    )
    assert read.shape[1:] == (1, side, side)
