"""Batches read ahead: while one is used, the next is decoded and copied to its device.

The batches come in the order of the source, one after the other, with the same bits. It returns
nothing else, and logs nothing.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpmmd.data.silence import quiet
from dpmmd.data.source import Batch

_AHEAD = 1  # batches that wait, besides the one in use and the one that is being read
_PATIENCE = 1.0  # seconds to wait for the reading thread at the end
_END = object()


def prefetch(batches: Iterator[Batch], device: torch.device) -> Generator[Batch, None, None]:
    """The same batches, on ``device``, read by a thread of their own.

    At most three batches are held at once; one is no longer to be used when the next is asked for
    (on a CUDA device, in work that the current stream is given after that). Each is copied as soon
    as the source has yielded it, so that a source may fill the same arrays again for the next one.
    Close the generator (`contextlib.closing`) to stop the thread after the batch that it is
    reading; it is a daemon, so that a source which hangs does not keep the process. What the source
    raises comes out in its place. Until the end neither the reading thread nor the caller's warns
    about anything (`dpmmd.data.silence.quiet`).

    To a CUDA device the batches go through pinned memory on a stream of their own, and the caller's
    current stream waits for them; no thread but the reading one waits for the device.

    Args:
        batches: of a source. The first is read by the calling thread, where worker processes are
            best started, outside of its inference mode.
        device: where the batches are wanted; the copy to others than CUDA's is the caller's.
    """
    with quiet():
        if device.type != "cuda":
            yield from _read_ahead(_copies(batches))
            return
        upload = _Upload(device)
        with contextlib.closing(_read_ahead(upload.slots(batches))) as slots:
            for slot in slots:
                yield from upload.use(slot)


def _copies(batches: Iterator[Batch]) -> Generator[Batch, None, None]:
    try:
        for batch in batches:
            yield Batch(batch.images.clone(), batch.labels.clone(), batch.valid.clone())
            del batch  # not held while the next one is read
    finally:
        _close(batches)


def _close(iterator: Iterator[Any]) -> None:
    """Ends a generator now, by the thread that runs it."""
    if hasattr(iterator, "close"):
        iterator.close()


def _read_ahead(items: Iterator[Any]) -> Generator[Any, None, None]:
    """The first of the items, then the others from a thread."""
    waiting: queue.Queue[Any] = queue.Queue(_AHEAD)
    stop = threading.Event()

    def hand_over(item: Any) -> None:
        while not stop.is_set():
            with contextlib.suppress(queue.Full):
                waiting.put(item, timeout=0.05)
                return

    def read() -> None:
        try:
            with quiet():
                for item in items:
                    hand_over(item)
                    del item  # not held while the next one is read
                    if stop.is_set():
                        break
            hand_over(_END)
        except BaseException as error:  # raised where the batch was wanted
            hand_over(error)
        finally:
            _close(items)

    thread = threading.Thread(target=read, name="dpmmd-prefetch", daemon=True)
    # Not in inference mode: the thread writes later on what this makes.
    with torch.inference_mode(False):
        item = next(items, _END)
    if item is _END:
        return
    try:
        thread.start()
        yield item
        del item
        while (item := waiting.get()) is not _END:
            if isinstance(item, BaseException):
                try:
                    raise item
                finally:
                    del item  # a cycle with its traceback would hold the batch
            yield item
            del item
    finally:
        stop.set()
        with contextlib.suppress(queue.Empty):
            waiting.get_nowait()
        thread.join(_PATIENCE)


@dataclass
class _Slot:
    """A batch's place in pinned memory and on the device.

    ``copied`` comes when the pinned memory may be written again, ``used`` when that on the device.
    """

    pinned: tuple[Tensor, Tensor, Tensor]
    batch: Batch
    copied: Any
    used: Any


class _Upload:
    """Copies batches to a CUDA device, into as many slots as batches are held at once.

    Only `slots`, which the reading thread runs, waits on the host, for the copy that is three
    batches back. All else waits on the device: a copy for the work on the batch that the slot had
    before, and the work on a batch for its copy.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def slots(self, batches: Iterator[Batch]) -> Iterator[_Slot]:
        """Each batch in a slot, its copy under way; a slot is taken again after two others."""
        ring: list[_Slot] = []
        for number, batch in enumerate(batches):
            if len(ring) < _AHEAD + 2:
                ring.append(self._slot(ring[0].batch if ring else batch))
            slot = ring[number % (_AHEAD + 2)]
            slot.copied.synchronize()
            self._start(batch, slot)
            del batch
            yield slot

    def _slot(self, like: Batch) -> _Slot:
        tensors = (like.images, like.labels, like.valid)
        pinned = tuple(torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors)
        here = (torch.empty(t.shape, dtype=t.dtype, device=self.device) for t in tensors)
        copied, used = torch.cuda.Event(blocking=True), torch.cuda.Event()
        return _Slot(pinned, Batch(*here), copied, used)  # type: ignore[arg-type]

    def _start(self, batch: Batch, slot: _Slot) -> None:
        targets = (slot.batch.images, slot.batch.labels, slot.batch.valid)
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(slot.used)
            tensors = (batch.images, batch.labels, batch.valid)
            for tensor, held, target in zip(tensors, slot.pinned, targets, strict=True):
                if tensor.shape != held.shape:
                    raise ValueError(
                        f"source: a batch of shape {list(tensor.shape)}, expected "
                        f"{list(held.shape)} as the first one's; pad the last batch."
                    )
                held.copy_(tensor)
                target.copy_(held, non_blocking=True)
            slot.copied.record(self.stream)

    def use(self, slot: _Slot) -> Generator[Batch, None, None]:
        """The slot's batch, for the work that the current stream is given meanwhile."""
        current = torch.cuda.current_stream(self.device)
        current.wait_event(slot.copied)
        yield slot.batch
        slot.used.record(current)
