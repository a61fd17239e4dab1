"""Reading ahead: the same batches in the same order, errors in their place, and no thread left."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from dpmmd.data import ArraySource, Batch, ImageSource, loader, prefetch
from tests.conftest import images

CPU = torch.device("cpu")


def numbered(n: int, error: BaseException | None = None) -> Iterator[Batch]:
    for i in range(n):
        yield Batch(torch.full((2, 1, 1, 1), float(i)), torch.tensor([i, i]), torch.ones(2).bool())
    if error is not None:
        raise error


def threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "dpmmd-prefetch"]


@pytest.mark.parametrize("n", [0, 1, 2, 7])
def test_order_and_content(n: int) -> None:
    assert [int(b.labels[0]) for b in prefetch(numbered(n), CPU)] == list(range(n))
    assert not threads()


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()], ids=type)
@pytest.mark.parametrize("n", [0, 1, 5])
def test_an_error_comes_after_the_batches_before_it(n: int, error: BaseException) -> None:
    seen: list[int] = []
    with pytest.raises(type(error)) as raised:
        seen.extend(int(b.labels[0]) for b in prefetch(numbered(n, error), CPU))
    assert raised.value is error
    assert seen == list(range(n))
    assert not threads()


def test_it_reads_ahead_and_no_further() -> None:
    read: list[int] = []

    def watched() -> Iterator[Batch]:
        for batch in numbered(20):
            read.append(int(batch.labels[0]))
            yield batch

    with contextlib.closing(prefetch(watched(), CPU)) as batches:
        for used in range(3):
            next(batches)
            time.sleep(0.3)
            assert read == list(range(used + 3))  # one in use, one that waits, one being read
    assert not threads()
    assert len(read) < 7


def test_the_first_batch_is_read_by_the_caller_and_the_others_by_one_thread() -> None:
    where = []

    def watched() -> Iterator[Batch]:
        for batch in numbered(4):
            where.append(threading.get_ident())
            yield batch

    list(prefetch(watched(), CPU))
    assert where[0] == threading.get_ident()
    assert len(set(where[1:])) == 1
    assert where[1] != where[0]


def test_a_source_that_hangs_does_not_hold_its_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "_PATIENCE", 0.1)
    go_on = threading.Event()

    def hangs() -> Iterator[Batch]:
        yield from numbered(1)
        go_on.wait(30)
        yield from numbered(1)

    batches = prefetch(hangs(), CPU)
    next(batches)
    started = time.monotonic()
    batches.close()
    assert time.monotonic() - started < 5
    (thread,) = threads()
    assert thread.daemon
    go_on.set()
    thread.join(10)
    assert not thread.is_alive()


def test_no_warning_of_either_thread_comes_out(recwarn: pytest.WarningsRecorder) -> None:
    def warns() -> Iterator[Batch]:
        for batch in numbered(4):
            warnings.warn("of an image", stacklevel=1)
            yield batch

    for _ in prefetch(warns(), CPU):
        warnings.warn("of its features", stacklevel=1)
    assert not recwarn.list
    warnings.warn("after it", UserWarning, stacklevel=1)
    assert len(recwarn.list) == 1


class _Fake:
    """A stand-in for torch.cuda's streams and events that writes down what is asked of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[tuple[Any, ...]] = []
        lock, fake = threading.Lock(), self

        def say(*what: Any) -> None:
            with lock:
                fake.log.append(what)

        class Event:
            def __init__(self, blocking: bool = False) -> None:
                self.blocking, self.records = blocking, 0

            def record(self, stream: Any) -> None:
                self.records += 1
                say("record", stream.name, self)

            def synchronize(self) -> None:
                say("synchronize", threading.current_thread().name, self, self.records)

        class Stream:
            def __init__(self, name: Any = "copies") -> None:
                self.name = "copies" if isinstance(name, torch.device) else name

            def wait_event(self, event: Event) -> None:
                say("wait", self.name, event, event.records)

        self.current = Stream("current")
        empty = torch.empty
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "Stream", Stream)
        monkeypatch.setattr(torch.cuda, "stream", lambda s: contextlib.nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda d: self.current)
        monkeypatch.setattr(torch, "empty", lambda shape, dtype, **_: empty(shape, dtype=dtype))


def test_the_protocol_of_copies_to_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stand-ins for streams and events, in this process: no CUDA device takes part."""
    fake = _Fake(monkeypatch)
    seen = [
        (int(b.labels[0]), float(b.images[0, 0, 0, 0]), bool(b.valid.all()))
        for b in prefetch(numbered(9), torch.device("cuda"))
    ]
    assert seen == [(i, float(i), True) for i in range(9)]
    copies = [entry for entry in fake.log if entry[0] == "record" and entry[1] == "copies"]
    uses = [entry for entry in fake.log if entry[0] == "record" and entry[1] == "current"]
    assert len(copies) == len(uses) == 9
    assert len({id(e[2]) for e in copies}) == 3  # three slots
    # The pinned memory is written after its last copy has come: the host waits for that.
    waited = [entry for entry in fake.log if entry[0] == "synchronize"]
    assert [entry[3] for entry in waited] == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert all(entry[2].blocking for entry in waited)
    # All but the first are waited for by the reading thread.
    assert {entry[1] for entry in waited[1:]} == {"dpmmd-prefetch"}
    # A copy into a slot waits, on the device, for the use of the batch it had before ...
    before = [entry[3] for entry in fake.log if entry[0] == "wait" and entry[1] == "copies"]
    assert before == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    # ... and every use for its copy.
    after = [entry for entry in fake.log if entry[0] == "wait" and entry[1] == "current"]
    assert [entry[3] for entry in after] == [1, 1, 1, 2, 2, 2, 3, 3, 3]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_callers_inference_mode_is_not_the_readers(
    monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """The reading thread writes into what is made for the first batch, which the caller reads."""
    _Fake(monkeypatch)

    def reused() -> Iterator[Batch]:
        """As a source with a buffer of its own."""
        place = Batch(torch.zeros(2, 1, 1, 1), torch.zeros(2).long(), torch.ones(2).bool())
        for number in range(7):
            place.images.fill_(number)
            yield Batch(place.images.clone(), place.labels, place.valid)

    with torch.inference_mode():
        seen = []
        for batch in prefetch(reused(), torch.device(device)):
            assert torch.is_inference_mode_enabled()
            assert not batch.images.is_inference()
            seen.append(float(batch.images[0, 0, 0, 0]))
    assert seen == [0, 1, 2, 3, 4, 5, 6]


def test_batches_of_other_shapes_are_refused_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    _Fake(monkeypatch)

    def uneven() -> Iterator[Batch]:
        yield from numbered(1)
        yield Batch(torch.zeros(1, 1, 1, 1), torch.zeros(1).long(), torch.ones(1).bool())

    with pytest.raises(ValueError, match=r"of shape \[1, 1, 1, 1\], expected \[2, 1, 1, 1\]"):
        list(prefetch(uneven(), torch.device("cuda")))


# ----------------------------------------------------------------------------- parts


class _Own(ArraySource):
    """Gives the batches of its parent in an order of its own."""

    def batches(self, batch_size: int) -> Iterator[Batch]:
        yield from list(super().batches(batch_size))[::-1]


@pytest.mark.parametrize("kind", [ArraySource, _Own])
def test_a_part_is_that_of_the_batches(kind: type[ImageSource]) -> None:
    source = kind(*images(21))  # type: ignore[call-arg]
    whole = list(source.batches(4))
    assert len(whole) == source.num_batches(4) == 6
    for numbers in (range(6), range(2, 5), range(5, 6), range(3, 3)):
        part = list(source.part(4, numbers))
        assert len(part) == len(numbers)
        for batch, number in zip(part, numbers, strict=True):
            for name in ("images", "labels", "valid"):
                assert torch.equal(getattr(batch, name), getattr(whole[number], name))


def test_a_part_reads_no_other_images(tmp_path: Any) -> None:
    from PIL import Image

    from dpmmd.data import open_source
    from dpmmd.data.items import FileSource

    for i in range(10):
        Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path / f"{i}.png")
    source = open_source(tmp_path, image_size=4, channels=1)
    assert isinstance(source, FileSource)
    for i in (0, 1, 2, 6, 7, 8, 9):
        (tmp_path / f"{i}.png").unlink()
    (batch,) = source.part(3, range(1, 2))
    assert batch.valid.all()
    assert (batch.images[:, 0, 0, 0] * 255).round().tolist() == [3, 4, 5]
