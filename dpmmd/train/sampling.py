"""Sampling from a trained generator."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dpmmd.devices import device_of
from dpmmd.recipe import GENERATED_AT_ONCE


@torch.no_grad()
def sample(
    generator: nn.Module,
    num_images: int,
    num_classes: int | None,
    *,
    batch_size: int = GENERATED_AT_ONCE,
    temperature: float = 1.0,
    alignment: nn.Module | None = None,
    seed: int = 0,
    progress: bool = False,
) -> tuple[np.ndarray, np.ndarray | None]:
    """Synthetic images: free of privacy cost, any number.

    Args:
        generator: as returned by `train` or `load_generator`.
        num_images: how many.
        num_classes: K, to draw the classes in equal parts, or None for an unlabelled generator.
        temperature: standard deviation of the latent points, 1 in training. Above it images are
            more varied and less typical, below it the other way round.
        alignment: images go through it, with their labels: `dpmmd.align.fit`, of images sampled
            at the same temperature.

    Returns:
        images uint8 [n, C, H, W] and labels int64 [n] (None if unlabelled).
    """
    rng = torch.Generator().manual_seed(seed)
    device = device_of(generator)
    generator.eval()
    parts = []
    bar = tqdm(total=num_images, desc="sample", unit="image", disable=not progress)
    with bar, seeded(seed):  # a generator may draw random numbers of its own
        for start in range(0, num_images, batch_size):
            n = min(batch_size, num_images - start)
            z = torch.randn(n, int(generator.z_dim), generator=rng).mul_(temperature).to(device)  # type: ignore[arg-type]
            y = None
            if num_classes is not None:
                y = balanced_labels(n, num_classes, offset=start).to(device)
            images = generator(z, y).clamp(0, 1)
            if alignment is not None:
                images = alignment(images, y)
            parts.append(images.mul(255).round().to(torch.uint8).cpu().numpy())
            bar.update(n)
    labels = None
    if num_classes is not None:
        labels = balanced_labels(num_images, num_classes).numpy()
    return np.concatenate(parts), labels


def balanced_labels(n: int, num_classes: int, offset: int = 0) -> Tensor:
    """int64 [n]: the classes in turn, starting with ``offset``."""
    return (torch.arange(n) + offset) % num_classes


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block torch's global generator starts from seed; outside it is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
