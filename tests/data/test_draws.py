"""Random augmentation: an item's draws belong to its record, and to nothing else."""

from __future__ import annotations

import functools
import itertools
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

import dpmmd
from dpmmd.data import Batch, ImageSource, open_source, prefetch
from dpmmd.data.dataset import DatasetSource
from dpmmd.data.draws import Draws
from dpmmd.data.look import check_source
from tests.conftest import images, no_noise, small_encoder

N = 24
X = torch.from_numpy(images(N)[0])


def from_torch(image: Tensor) -> Tensor:
    return image.flip(2) if torch.rand(()) < 0.5 else image.roll(int(torch.randint(8, ())), 2)


def from_random(image: Tensor) -> Tensor:
    return image.roll(random.randrange(8), 2)


def from_numpy(image: Tensor) -> Tensor:
    return image.roll(int(np.random.randint(8)), 2)  # noqa: NPY002 - what data sets do


class Augmented(Dataset):
    """Images that are changed at random as they are read."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.change(X[index]), index % 3


class Own:
    """A transform with a generator of its own, as some libraries' transforms have."""

    def __init__(self, generator: Any, draw: Callable[[Any], int]) -> None:
        self.inside, self.draw = {"kept": [generator]}, draw

    def __call__(self, image: Tensor) -> Tensor:
        return image.roll(self.draw(self.inside["kept"][0]), 2)


def _torch(generator: torch.Generator) -> int:
    return int(torch.randint(8, (), generator=generator))


def _numpy(generator: np.random.Generator) -> int:
    return int(generator.integers(8))


def _randint(generator: np.random.RandomState) -> int:
    return int(generator.randint(8))


def _random(generator: random.Random) -> int:
    return generator.randrange(8)


def _rolled(image: Tensor, generator: random.Random) -> Tensor:
    return image.roll(generator.randrange(8), 2)


def _closure() -> Callable[[Tensor], Tensor]:
    generator = np.random.default_rng(0)
    return lambda image: image.roll(int(generator.integers(8)), 2)


OWN: dict[str, Any] = {
    "a torch.Generator": lambda: Own(torch.Generator().manual_seed(0), _torch),
    "numpy's Generator": lambda: Own(np.random.default_rng(0), _numpy),
    "numpy's RandomState": lambda: Own(np.random.RandomState(0), _randint),
    "random.Random": lambda: Own(random.Random(0), _random),
    "a partial": lambda: functools.partial(_rolled, generator=random.Random(0)),
    "a closure": _closure,
}
CHANGES = {
    "torch": lambda: from_torch,
    "random": lambda: from_random,
    "numpy": lambda: from_numpy,
    **OWN,
}


def opened(
    change: Callable[[Tensor], Tensor], key: bytes | None = bytes(32), **options: Any
) -> Any:
    source = open_source(Augmented(change), image_size=8, channels=1, **options)
    assert isinstance(source, DatasetSource)
    source._key = key
    return source


def pixels(source: ImageSource, batch_size: int = 5) -> Tensor:
    read = torch.cat([batch.images for batch in source.batches(batch_size)])
    return read[: source.num_images]


@pytest.mark.parametrize("kind", CHANGES)
def test_one_record_less_leaves_the_others_as_they_were(kind: str) -> None:
    """With the same keys: what a record's image is depends on its key alone."""
    whole = pixels(opened(CHANGES[kind]()))
    kept = [i for i in range(N) if i != 3]
    assert torch.equal(pixels(opened(CHANGES[kind]()).rearranged(kept)), whole[kept])
    assert torch.equal(pixels(opened(CHANGES[kind]()), 7), whole)
    assert not torch.equal(pixels(opened(CHANGES[kind](), b"another".ljust(32))), whole)


@pytest.mark.parametrize("kind", ["torch", "random", "numpy", "numpy's Generator"])
def test_one_record_exchanged_moves_the_sums_by_its_own_share(kind: str) -> None:
    """The exact difference of two neighbours' raw sums over the sensitivity, with the same keys."""

    def sums(order: list[int]) -> Tensor:
        source = opened(CHANGES[kind]()).rearranged(order)
        return exact(source).sums.double()

    whole = exact(opened(CHANGES[kind]()))
    exchanged = [*range(5), 11, *range(6, N)]
    moved = (whole.sums.double() - sums(exchanged)).norm()
    delta = whole.metadata.sensitivity / 2**whole.metadata.grid_bits
    assert 0 < moved <= delta * (1 + 1e-6)


def exact(source: Any) -> dpmmd.Release:
    return dpmmd.release(
        source, small_encoder(), epsilon=1.0, delta=1e-6, adjacency="replace-one", batch_size=5,
        progress=False, insecure_test_noise=no_noise,
    )  # fmt: skip


@pytest.mark.parametrize("workers", [0, 1])
def test_every_reading_has_keys_of_its_own(workers: int) -> None:
    """Not those of a constant seed, which a DataLoader's workers would have."""
    source = opened(from_torch, None, workers=workers)
    assert not torch.equal(pixels(source), pixels(source))


def test_workers_read_the_same_draws() -> None:
    assert torch.equal(pixels(opened(from_torch)), pixels(opened(from_torch, workers=1)))


def test_the_callers_streams_are_left_alone() -> None:
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    expected = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    pixels(opened(from_torch))
    check_source(opened(from_random))
    found = torch.rand(3), random.random(), np.random.rand()  # noqa: NPY002
    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]


def test_keys_differ_by_record_stream_and_source() -> None:
    first, second = Draws(None), Draws(None)
    seeds = {
        d._seed(record, stream)
        for d in (first, second)
        for record in range(9)
        for stream in range(4)
    }
    assert len(seeds) == 2 * 9 * 4
    assert len(first.key) == 32


class PerProcess(Augmented):
    """Makes a generator in each process that reads it: the advice of many guides."""

    def __init__(self, replace: bool = False) -> None:
        super().__init__(self.roll)
        self.process, self.replace = -1, replace

    def roll(self, image: Tensor) -> Tensor:
        if self.process != os.getpid():
            self.process, self.generator = os.getpid(), np.random.default_rng(0)
        return image.roll(int(self.generator.integers(8)), 2)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if self.replace and index == 9:
            self.generator, self.process = np.random.default_rng(7), os.getpid()
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("replace", [False, True])
def test_generators_that_items_make_get_keys_too(workers: int, replace: bool) -> None:
    def read(order: list[int]) -> Tensor:
        source = open_source(PerProcess(replace), image_size=8, channels=1, workers=workers)
        assert isinstance(source, DatasetSource)
        source._key = bytes(32)
        return pixels(source.rearranged(order), 12)

    whole = read(list(range(N)))
    for gone in (0, 4, 9):
        kept = [i for i in range(N) if i != gone]
        assert torch.equal(read(kept), whole[kept])


_count = itertools.count()
_hidden = np.random.default_rng(0)
DEPENDENT = {
    "a counter": lambda image: image.roll(next(_count), 2),
    "a generator that nothing leads to": lambda image: image.roll(int(_hidden.integers(8)), 2),
    "entropy of its own": lambda image: image.roll(int(np.random.default_rng().integers(8)), 2),
}


@pytest.mark.parametrize("kind", DEPENDENT)
def test_items_that_depend_on_what_was_read_before_are_refused(kind: str) -> None:
    with pytest.raises(ValueError, match="not the same when it is read a second time"):
        exact(open_source(Augmented(DEPENDENT[kind]), image_size=8, channels=1))


def test_items_that_are_kept_in_memory_are_not_refused() -> None:
    class Cached(Augmented):
        __getitem__ = functools.lru_cache(Augmented.__getitem__)  # type: ignore[assignment]

    check_source(open_source(Cached(lambda image: image), image_size=8, channels=1))


# ----------------------------------------------------------------------------- buffers


class Refilled(ImageSource):
    """Writes every batch into the same three arrays."""

    name, identity, image_shape, num_images = "refilled", "0" * 64, (1, 8, 8), N

    def batches(self, batch_size: int) -> Iterator[Batch]:
        batch = Batch(
            torch.zeros(batch_size, 1, 8, 8),
            torch.zeros(batch_size, dtype=torch.int64),
            torch.ones(batch_size, dtype=torch.bool),
        )
        for start in range(0, N, batch_size):
            batch.images.copy_(X[start : start + batch_size].float() / 255)
            batch.labels.copy_(torch.arange(start, start + batch_size) % 3)
            yield batch


def test_a_source_may_fill_one_array_again_and_again() -> None:
    held = list(prefetch(Refilled().batches(4), torch.device("cpu")))
    assert torch.equal(torch.cat([batch.images for batch in held]) * 255, X.float())
    assert torch.cat([batch.labels for batch in held]).tolist() == [i % 3 for i in range(N)]


def test_rows_after_the_last_record_are_not_counted() -> None:
    """Whatever a source says of its padding, and however many batches it yields."""

    class Longer(Refilled):
        num_images = N - 2

        def batches(self, batch_size: int) -> Iterator[Batch]:
            yield from super().batches(batch_size)
            yield from super().batches(batch_size)

    def release(source: ImageSource) -> dpmmd.Release:
        return dpmmd.release(
            source, small_encoder(), epsilon=1.0, delta=1e-6, adjacency="add-remove", batch_size=4,
            num_classes=3, progress=False, insecure_test_noise=no_noise,
        )  # fmt: skip

    assert release(Longer()).counts.sum().round() == N - 2
