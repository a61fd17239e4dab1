"""One release by several processes (ranks) of a torch.distributed group.

Every rank sums a shard of its own of the source's batches; the exact integer sums are added up in
rank 0, which alone keeps the ledger, draws the noise, once, and writes the release. The others get
what was released. Integer sums are the same bits in any order and grouping, and a batch is made up
of the same images whatever the number of ranks: so is the released vector before its noise.

What crosses between ranks: hashes of the arguments; how far each has come; the raw sums, once, on
their way to rank 0 (gloo and NCCL do not encrypt: the network is inside the boundary); the release.

All meet in beats: one number, whether somebody failed. Every other collective comes right after a
beat, so that a rank which fails can tell the others by taking part in one more. A rank that is gone
makes a beat fail, at the latest after the group's timeout. In both cases every rank raises, and
unless rank 0 had all sums by then, nothing is released.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from dpmmd._warn import warn

BEAT = 16  # batches from one sign of life to the next
_PIECE = 1 << 24  # numbers sent at once
T = TypeVar("T")
Told = tuple[Any, Mapping[str, Tensor]]  # facts that can be pickled, and arrays
P = ParamSpec("P")


class _OtherRankFailed(RuntimeError):
    pass


class Ranks:
    """The processes of a group; without one, this process alone.

    Raises:
        RuntimeError: torch.distributed is not initialised, or this process is not of the group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.rank, self.world = group, 0, 1
        if group is None:
            return
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                "process_group: torch.distributed is not initialised in this process; start it "
                "with torchrun and call torch.distributed.init_process_group() first, or leave the "
                "argument out."
            )
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise RuntimeError("process_group: this process is not one of the group's.")
        self._first = dist.get_global_rank(group, 0)
        nccl = dist.get_backend(group) == "nccl"
        self._device = torch.device("cuda", torch.cuda.current_device()) if nccl else "cpu"

    def shard(self, batches: int) -> range:
        """The numbers of this rank's batches, one after the other."""
        return range(batches * self.rank // self.world, batches * (self.rank + 1) // self.world)

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in all of them."""
        values: list[Any] = [value]
        if self.group is not None:
            values *= self.world
            self.beat()
            with _told():
                dist.all_gather_object(values, value, group=self.group)
        return values

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Raises a ValueError in every rank where one of the facts is not the same in all."""
        hashed = {k: hashlib.sha256(_text(v).encode()).hexdigest() for k, v in facts.items()}
        for rank, other in enumerate(told := self.gather(hashed)):
            if odd := [k for k in {**told[0], **other} if told[0].get(k) != other.get(k)]:
                raise ValueError(
                    f"process_group: rank {rank} has another {odd[0]} than rank 0. Start every "
                    "process with the same source, encoder, arguments and version of dpmmd. No "
                    "image was read."
                )

    def paced(self, batches: Iterator[T], steps: int) -> Iterator[T]:
        """The batches, with a beat after every so many of ``steps``, which all ranks take."""
        for step in range(1, steps + 1):
            if (batch := next(batches, None)) is not None:
                yield batch
            del batch
            if step % BEAT == 0 or step == steps:
                self.beat()

    def beat(self, failed: bool = False) -> None:
        """Raises a RuntimeError where another rank failed or is gone."""
        if self.group is None:
            return
        flag = torch.tensor([int(failed)], device=self._device)
        with _told():
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=self.group)
            if flag.item() and not failed:
                raise RuntimeError("it says why")

    def reduce(self, sums: Tensor) -> Tensor:
        """int64 sums over all ranks in rank 0, exactly; nothing of use in the others."""
        if self.group is None:
            return sums
        sums = sums.to(self._device)
        self.beat()
        with _told():
            for piece in sums.view(-1).split(_PIECE) if sums.numel() else ():
                dist.reduce(piece, self._first, dist.ReduceOp.SUM, group=self.group)
        return sums

    def share(self, release: Told | None) -> Told:
        """What rank 0 released, in all ranks. It is complete, whatever happens to the others."""
        try:
            return self._share(release)
        except _OtherRankFailed as error:
            if release is None:
                raise
            warn(f"the release is complete, but not all got it: {error}")
            return release

    def _share(self, release: Told | None) -> Told:
        if self.group is None and release is not None:
            return release
        self.beat()
        facts, tensors = release or (None, {})
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        told: list[Any] = [(facts, shapes)]
        found = {}
        with _told():
            dist.broadcast_object_list(told, self._first, group=self.group)
            for name, (shape, dtype) in told[0][1].items():
                tensor = tensors.get(name, torch.empty(0, dtype=dtype)).to(self._device)
                tensor = tensor if release is not None else tensor.new_empty(shape)
                dist.broadcast(tensor, self._first, group=self.group)
                found[name] = tensor.cpu()
        return release or (told[0][0], found)


def in_all(function: Callable[P, T]) -> Callable[P, T]:
    """Makes a function that fails in one rank of its ``process_group`` fail in all of them."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return function(*args, **kwargs)
        except _OtherRankFailed:
            raise
        except BaseException:
            with contextlib.suppress(RuntimeError):
                Ranks(kwargs.get("process_group")).beat(failed=True)  # type: ignore[arg-type]
            raise

    return call


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """A collective that fails says what that means."""
    try:
        yield
    except RuntimeError as error:
        raise _OtherRankFailed(
            f"process_group: another process has stopped ({str(error).splitlines()[0]}), and so "
            "has the release in all of them. Start them again together."
        ) from None


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)
