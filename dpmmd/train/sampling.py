"""Which labels a generator is given, in training and in sampling; and sampling from it.

The labels of a generator are the rows of the release that it was trained on: its classes, or, of a
release with modes, groups of modes of them (`dpmmd.privacy.rows.Rows`). `Mixture` says which rows a
class is made of. Whoever samples gets classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from dpmmd.devices import device_of
from dpmmd.privacy.release_file import Release
from dpmmd.recipe import GENERATED_AT_ONCE

# In a batch of a release with modes, where the settings leave it out. With fewer images of a row
# its mean is noisy, with more a batch has fewer of the rows.
IMAGES_PER_ROW = 10


@dataclass(frozen=True)
class Mixture:
    """Which rows of a release with modes make up each class, and in which proportions.

    Attributes:
        classes: of each row, 0..K-1; every class has a row.
        counts: released, of each row, above 0.
    """

    classes: tuple[int, ...]
    counts: tuple[float, ...]

    @classmethod
    def of(cls, release: Release) -> Mixture | None:
        """That of a release; None without modes, where rows are classes."""
        if release.modes is None:
            return None
        rows = release.rows
        return cls(tuple(rows.classes.tolist()), tuple(rows.counts.tolist()))

    def drawn(self, n: int) -> Tensor:
        """int64 [n]: rows of n images; the first of more images have the same ones.

        Classes come in turn. Within a class rows come by Webster's method (Sainte-Lague): of any
        number of images each row has its share of the released counts, rounded.
        """
        of, counts = torch.tensor(self.classes), torch.tensor(self.counts, dtype=torch.float64)
        rows = torch.empty(n, dtype=torch.int64)
        number = int(of.max()) + 1
        for k in range(min(n, number)):
            own = (of == k).nonzero()[:, 0]
            part = rows[k::number]
            part.copy_(own[_in_turn(counts[own], len(part))])
        return rows

    def modes(self) -> Tensor:
        """int64 [A]: the number of each row among those of its class, from 0 on."""
        of = torch.tensor(self.classes)
        same = (of[:, None] == of).tril(diagonal=-1)
        return same.sum(dim=1)


def _in_turn(counts: Tensor, n: int) -> Tensor:
    """int64 [n]: places 0..len(counts)-1, each as often as its share of the counts asks.

    The t-th image of a place with share p is due at (t + 1/2) / p; ties go to the first place.
    """
    shares = counts / counts.sum()
    most = ((n + len(shares)) * shares).ceil().long() + 1  # of a place among the first n
    place = torch.arange(len(shares)).repeat_interleave(most)
    turn = torch.arange(len(place)) - (most.cumsum(0) - most)[place]
    due = (turn + 0.5) / shares[place]
    return place[due.argsort(stable=True)[:n]]


@torch.no_grad()
def sample(
    generator: nn.Module,
    num_images: int,
    num_classes: int | None,
    *,
    modes: Mixture | None = None,
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
        modes: `Trained.modes` of a generator that was trained on a release with modes: which rows
            its classes are made of. Within a class, rows come in proportion to their released
            counts; which row an image is of, ``modes.drawn(num_images)`` says.
        temperature: standard deviation of the latent points, 1 in training. Above it images are
            more varied and less typical, below it the other way round.
        alignment: images go through it, with their classes: `dpmmd.align.fit`, of images sampled
            at the same temperature.

    Returns:
        images uint8 [n, C, H, W] and labels int64 [n] (None if unlabelled): classes.

    Raises:
        ValueError: a generator that was trained with modes, and no ``modes``, or those of another.
    """
    check_labels(generator, num_classes, modes)
    rng = torch.Generator().manual_seed(seed)
    device = device_of(generator)
    generator.eval()
    rows, labels = labels_of(num_images, num_classes, modes)
    parts = []
    bar = tqdm(total=num_images, desc="sample", unit="image", disable=not progress)
    with bar, seeded(seed):  # a generator may draw random numbers of its own
        for start in range(0, num_images, batch_size):
            n = min(batch_size, num_images - start)
            z = torch.randn(n, int(generator.z_dim), generator=rng).mul_(temperature).to(device)  # type: ignore[arg-type]
            y, k = (None if t is None else t[start : start + n].to(device) for t in (rows, labels))
            images = generator(z, y).clamp(0, 1)
            if alignment is not None:
                images = alignment(images, k)
            parts.append(images.mul(255).round().to(torch.uint8).cpu().numpy())
            bar.update(n)
    return np.concatenate(parts), None if labels is None else labels.numpy()


def labels_of(
    n: int, num_classes: int | None, modes: Mixture | None
) -> tuple[Tensor | None, Tensor | None]:
    """Labels for a generator, and classes, of n images: each int64 [n], or None."""
    if modes is None:
        labels = None if num_classes is None else balanced_labels(n, num_classes)
        return labels, labels
    rows = modes.drawn(n)
    return rows, None if num_classes is None else torch.tensor(modes.classes)[rows]


def balanced_labels(n: int, num_classes: int, offset: int = 0) -> Tensor:
    """int64 [n]: the classes in turn, starting with ``offset``."""
    return (torch.arange(n) + offset) % num_classes


def batch_labels(n: int, num_rows: int, images_per_row: int | None, step: int) -> Tensor:
    """int64 [n]: labels of a training's batch of a step, 0-based; rows are equally frequent.

    Args:
        n: images.
        num_rows: A.
        images_per_row: at least so many images of each row that is in the batch (n is more or as
            many); the rows come in turn, from batch to batch. None: of all rows, image by image.
        step: of the training.
    """
    if images_per_row is None:
        return balanced_labels(n, num_rows, offset=step * n)
    rows = min(num_rows, n // images_per_row)
    return (torch.arange(n) * rows // n + step * rows) % num_rows


def mark(generator: nn.Module, modes: Mixture) -> None:
    """Lets a generator remember that its labels are rows, so that nobody takes them for classes."""
    generator._label_rows = len(modes.classes)  # type: ignore[assignment]


def check_labels(generator: nn.Module, num_classes: int | None, modes: Mixture | None) -> None:
    """Refuses labels that are classes for a generator whose labels are rows, and the other way."""
    rows = getattr(generator, "_label_rows", None)
    if modes is None and rows is not None and num_classes != rows:
        raise ValueError(
            f"num_classes={num_classes} without modes: the generator was trained on a release with "
            f"modes, and its labels are {rows} rows. Give modes=trained.modes, which says what "
            "class each of them is of."
        )
    built = getattr(generator, "num_classes", None)
    if modes is not None and num_classes not in (None, max(modes.classes) + 1):
        raise ValueError(
            f"num_classes={num_classes}: the modes are of {max(modes.classes) + 1} classes; give "
            "trained.num_classes."
        )
    if modes is not None and isinstance(built, int) and built != len(modes.classes):
        raise ValueError(
            f"modes: of {len(modes.classes)} rows, the generator has num_classes={built}; give the "
            "modes of the release that it was trained on, trained.modes, or None without modes."
        )


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within the block torch's global generator starts from seed; outside it is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
