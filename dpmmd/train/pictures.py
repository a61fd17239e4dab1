"""Pictures of samples: a grid of them, and as a PNG."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from dpmmd.export import png
from dpmmd.files import expanded, write_atomically
from dpmmd.train.sampling import Mixture, check_labels, labels_of, seeded


def sample_grid(
    generator: nn.Module,
    num_classes: int | None,
    device: torch.device,
    at_once: int | None = None,
    columns: int = 10,
    modes: Mixture | None = None,
    temperature: float = 1.0,
    alignment: nn.Module | None = None,
) -> np.ndarray:
    """uint8 [C, H', W']: a row per class (or ten rows), the same latent points on every call.

    ``at_once`` images go through the generator together; None: all. ``temperature`` is the latent
    points' standard deviation, ``modes`` and ``alignment`` as in `sample`. Whether the generator is
    in training and torch's global random state stay as they are. Labels that do not go with the
    generator are refused as in `sample`.
    """
    check_labels(generator, num_classes, modes)
    rows = num_classes or 10
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(rows * columns, int(generator.z_dim), generator=rng)  # type: ignore[arg-type]
    z = z.mul_(temperature).to(device)
    turns = torch.arange(rows * columns).view(columns, rows).T.flatten()  # classes come in turn
    y, labels = (
        None if t is None else t[turns].to(device)
        for t in labels_of(rows * columns, num_classes, modes)
    )
    training = generator.training
    generator.eval()
    with torch.no_grad(), seeded(0):
        size = at_once or len(z)
        parts = [
            generator(part, None if y is None else y[i * size : (i + 1) * size])
            for i, part in enumerate(z.split(size))
        ]
        made = torch.cat(parts).clamp(0, 1)
        if alignment is not None:
            made = alignment(made, labels)
        images = made.mul(255).round().to(torch.uint8).cpu().numpy()
    generator.train(training)
    return tile(images, columns)


def tile(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 images [rows * columns, C, H, W] as one picture [C, rows * H, columns * W]."""
    n, c, h, w = images.shape
    grid = images.reshape(n // columns, columns, c, h, w).transpose(2, 0, 3, 1, 4)
    return grid.reshape(c, n // columns * h, columns * w)


def save_png(path: str | Path, picture: np.ndarray, scale: int = 2) -> None:
    """Writes uint8 [1 or 3, H, W] as a PNG, each pixel ``scale`` x ``scale``."""
    large = picture.repeat(scale, axis=1).repeat(scale, axis=2)
    write_atomically(expanded(path), png(large), overwrite=True)
