"""Random augmentation: what an item of a data set draws belongs to its record alone.

Items that flip or crop at random read streams that the whole process shares: those of torch,
numpy and `random`, or a generator that the data set keeps. Read as they are, one record more or
less would move every later record's place in the stream, so that *all* later images would be drawn
again: the released sums of two neighbours would differ in every image, not in one.

So every stream is given a new key before each record: a hash of the record's number under 256 bits
of the operating system's entropy, drawn for each reading of the source and kept in this process and
its workers. A record's draws are then a function of its own key, whatever was read before it and
in whichever process.

Proof that this is enough. Write M(D, w) for the release where w holds the key of every record, and
take two neighbours D, D' that differ in one record. For each fixed w the images of D and of D' are
functions of one record each, and they differ in that one record's image, so that M(D, w) and
M(D', w) are as hard to tell apart as the release promises:

    P[M(D, w) in S] <= e^eps P[M(D', w) in S] + delta(eps)    for every set S and every eps.

The keys are independent, of one law, and have nothing to do with the data; where the numbers of the
records shift (add-remove) their keys can be paired by record, since any pairing has the same law.
So the mean over w keeps the inequality (joint convexity), for every eps at once, and with it the
whole trade-off curve: mu stays what it is. (This takes the keyed hash for a random function, as the
noise takes ChaCha20 for one.)

Generators that items make as they are read (one for each process, say) change an attribute of the
data set. They are found after the record that made them, and that record is read again, with keys
for them too.

What cannot be given a key: a generator that is neither global nor reachable from the data set's
attributes, a counter, a queue, entropy that an item takes from the system by itself.
`DatasetSource.check_isolated` reads some records twice, in two orders, with the same keys, and
finds these, if the records that it reads show them; `dpmmd audit --source` reads more.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import random
import threading
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

_WALKED = 20_000  # objects that are looked at for generators
_WATCHED = 32  # objects whose attributes are compared before each record
_KEPT_BY = {
    types.FunctionType: ("__closure__", "__defaults__", "__kwdefaults__"),
    types.CellType: ("cell_contents",),
    types.MethodType: ("__self__", "__func__"),
    functools.partial: ("func", "args", "keywords"),
}
_LEAVES = (str, bytes, int, float, complex, torch.Tensor, np.ndarray, type, types.ModuleType)


class Draws:
    """The random streams that a data set's items may read, and their keys.

    Args:
        dataset: whose attributes, and theirs, are searched for generators.
        key: 32 bytes; None for the operating system's, the only choice for a private release.
    """

    def __init__(self, dataset: Any, key: bytes | None = None) -> None:
        self.key = os.urandom(32) if key is None else key
        self._dataset = dataset
        self._seen: list[int] = []
        self.search()

    def search(self) -> None:
        """Looks for generators, which items may make, or replace, as they are read."""
        self._own, holders = _generators(self._dataset)
        self._holders = holders[:_WATCHED]
        self._seen = self._held()

    def _held(self) -> list[int]:
        return [id(value) for holder in self._holders for value in holder.values()]

    def found_others(self) -> bool:
        """Whether an item has made or replaced a generator: it is then to be read again."""
        if self._held() == self._seen:
            return False
        before = self._own
        self.search()
        return [id(generator) for generator in before] != [id(each) for each in self._own]

    def rekey(self, record: int) -> None:
        """Gives all streams the keys of one record."""
        seed = self._seed(record, 0)
        torch.default_generator.manual_seed(seed)
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed_all(seed)
        random.seed(self._seed(record, 1))
        np.random.seed(self._seed(record, 2) >> 32)  # noqa: NPY002 - what items draw from
        for number, generator in enumerate(self._own, start=3):
            _seed(generator, self._seed(record, number))

    def _seed(self, record: int, stream: int) -> int:
        """64 bits. That some generators take only half of them does not matter: what the proof
        needs is that the seeds of different records are independent.
        """
        data = record.to_bytes(8, "little") + stream.to_bytes(8, "little")
        return int.from_bytes(hashlib.blake2b(data, key=self.key, digest_size=8).digest(), "little")


_alone = threading.RLock()  # two threads that read data sets would re-key each other's records
if hasattr(os, "register_at_fork"):

    def _after_fork() -> None:
        global _alone
        _alone = threading.RLock()

    os.register_at_fork(after_in_child=_after_fork)


@contextlib.contextmanager
def callers_streams() -> Iterator[None]:
    """Leaves torch's, numpy's and `random`'s streams as they were found."""
    with _alone:
        kept = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        try:
            yield
        finally:
            torch.set_rng_state(kept[0])
            np.random.set_state(kept[1])  # noqa: NPY002
            random.setstate(kept[2])
            if devices:
                torch.cuda.set_rng_state_all(devices)


def _seed(generator: Any, seed: int) -> None:
    if isinstance(generator, torch.Generator):
        generator.manual_seed(seed)
    elif isinstance(generator, random.Random):
        generator.seed(seed)
    elif isinstance(generator, np.random.RandomState):
        generator.seed(seed >> 32)
    else:
        generator.bit_generator.state = type(generator.bit_generator)(seed).state


def _generators(root: Any) -> tuple[list[Any], list[dict[str, Any]]]:
    """Every generator that hangs on an object's attributes, its containers and theirs.

    And the attributes of the objects on the way, the nearest first.
    """
    kinds = (torch.Generator, random.Random, np.random.RandomState, np.random.Generator)
    found: list[Any] = []
    holders: list[dict[str, Any]] = []
    seen: set[int] = set()
    waiting = deque([root])
    while waiting and len(seen) < _WALKED:
        value = waiting.popleft()
        if id(value) in seen or isinstance(value, _LEAVES):
            continue
        seen.add(id(value))
        if isinstance(value, kinds):
            found.append(value)
            continue
        if isinstance(attributes := getattr(value, "__dict__", None), dict):
            holders.append(attributes)
        if isinstance(value, dict):
            waiting.extend(value.values())
        elif isinstance(value, list | tuple | set | frozenset | deque):
            # A list of a million paths is not searched to its end.
            waiting.extend(v for v, _ in zip(value, range(1000), strict=False))
        waiting.extend(_inside(value))
    return found, holders


def _inside(value: Any) -> list[Any]:
    """What an object holds: attributes, slots, what a closure, method or partial has kept."""
    held = list(getattr(value, "__dict__", {}).values())
    names = [*_KEPT_BY.get(type(value), ())]
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        names += (slots,) if isinstance(slots, str) else slots
    for name in names:
        with contextlib.suppress(Exception):
            held.append(getattr(value, name))
    return held
