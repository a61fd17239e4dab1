"""Memory of gradients that the native core keeps: each has one owner, and none is kept for long."""

from __future__ import annotations

import copy
import io
import os
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dpmmd import _memory, functional
from dpmmd._contract.taps import DTYPES, Taps
from dpmmd._contract.taps import empty_gradients as plain_gradients
from dpmmd._cores import blocks, cpu

pytestmark = pytest.mark.skipif(
    cpu.missing is not None or sys.platform != "linux", reason="blocks of the native core on Linux"
)
if cpu.missing is None:
    from dpmmd import _native

BYTES = 1 << 20


@pytest.fixture(autouse=True)
def kept() -> Iterator[None]:
    """Blocks are kept, and there are none at first."""
    _native.keep_blocks(True)
    _native.return_blocks()
    yield
    _native.return_blocks()


def taps(count: int = 2, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    like = {"dtype": dtype, "memory_format": torch.channels_last}
    return [torch.empty((8, 64, 32, 32), **like).normal_().relu_() for _ in range(count)]


def lent(features: list[Tensor]) -> list[Tensor]:
    return blocks.empty_gradients(Taps(features, DTYPES), [True] * len(features))


def addresses(tensors: list[Tensor]) -> set[int]:
    return {t.data_ptr() for t in tensors}


def gradients(features: list[Tensor]) -> tuple[Tensor, ...]:
    features = [f.detach().requires_grad_() for f in features]
    means, counts = functional.mean_embedding(features, backend="cpu")
    return torch.autograd.grad(
        functional.mmd_loss(means, counts, torch.zeros_like(means)), features
    )


def at_last(f: Tensor) -> Tensor:
    return f.contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        at_last,
        torch.Tensor.contiguous,
        lambda f: f.flatten(1),
        lambda f: at_last(torch.cat([f, f]))[:8],
        lambda f: torch.cat([f, f])[::2],  # no dense tensor: in plain memory
        lambda f: f[:1].expand(8, -1, -1, -1),
        lambda f: f.reshape(1, -1),
        lambda f: f[:, :1, :2, :2],  # small
        lambda f: f[:0],
    ],
)
def test_a_gradient_looks_as_usual(dtype, change) -> None:
    tap = change(taps(1, dtype)[0])
    (got,), (usual,) = lent([tap]), plain_gradients([tap], [True])
    assert got.shape == usual.shape
    assert got.stride() == usual.stride()
    assert got.dtype == usual.dtype
    assert got.device == usual.device
    assert not got.requires_grad
    assert not got._is_view()
    assert got.data_ptr() % 64 == 0 or got.nbytes < blocks.LEAST


def test_what_is_not_needed_has_no_elements() -> None:
    assert [g.numel() for g in blocks.empty_gradients(Taps(taps(), DTYPES), [False, True])] == [
        0,
        8 << 16,
    ]


def test_a_freed_block_is_lent_again() -> None:
    features = taps(3)
    first = addresses(lent(features))
    assert len(first) == 3
    assert addresses(lent(features)) == first
    assert _native.return_blocks() == sum(f.nbytes for f in features)
    assert _native.return_blocks() == 0


def test_gradients_of_the_loss_lie_in_blocks() -> None:
    features = taps()
    first = gradients(features)
    where = addresses(list(first))
    copies = [g.clone() for g in first]
    second = gradients([2 * f for f in features])  # while the first are kept
    assert not where & addresses(list(second))
    for got, copied in zip(first, copies, strict=True):
        assert torch.equal(got, copied)
    del first, got
    assert addresses(list(gradients(features))) == where


def test_a_view_keeps_its_block() -> None:
    (g,) = lent(taps(1))
    row = g.fill_(3)[0]
    as_array = g.numpy()
    size = g.nbytes
    del g
    lent(taps(1))[0].fill_(4)
    assert row.eq(3).all()
    assert (as_array == 3).all()
    del row
    assert _native.return_blocks() == size  # the other one
    del as_array
    assert _native.return_blocks() == size


def test_autograd_adds_in_place_and_takes_what_it_is_given() -> None:
    """A second owner of the memory would make autograd allocate the sum and copy a leaf's."""
    (x,) = taps(1)
    seen = []

    class Lent(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            (g,) = lent([x])
            seen.append(g.data_ptr())
            return g.fill_(1)

    leaf = x.clone().requires_grad_()
    Lent.apply(leaf).backward()
    assert leaf.grad is not None
    assert leaf.grad.data_ptr() == seen[0]

    leaf = x.clone().requires_grad_()
    inner = leaf.mul(2)
    caught = []
    inner.register_hook(lambda g: caught.append(g.data_ptr()))
    (Lent.apply(inner) + Lent.apply(inner)).backward()
    assert caught == seen[1:2]  # the second was added to the first
    assert leaf.grad is not None
    assert leaf.grad.eq(4).all()


def test_a_gradient_may_be_copied_pickled_and_shared() -> None:
    (g,) = lent(taps(1))
    g.normal_()
    copied = g.clone()
    stored = io.BytesIO()
    torch.save(g, stored)
    stored.seek(0)
    for other in (torch.load(stored), copy.deepcopy(g), g.view(torch.int32).view(torch.float32)):
        assert torch.equal(other, copied)
    assert torch.equal(g.share_memory_(), copied)
    assert g.is_shared()
    g.resize_(2, 3)
    with pytest.raises(RuntimeError, match="not resizable"):
        lent(taps(1))[0].resize_(1 << 24)


@pytest.mark.parametrize("idle", [1, 2, 3])
def test_what_two_passes_do_not_ask_for_is_returned(idle: int) -> None:
    lent(taps(1))
    for _ in range(idle):
        lent([torch.zeros(2, 2)])
    assert (_native.return_blocks() > 0) == (idle <= 2)


def test_a_loop_holds_what_a_pass_takes() -> None:
    features = taps(2)
    for n in (8, 7, 8, 5, 8):  # batches of other sizes fit into the same blocks
        lent([f[:n] for f in features])
    assert _native.return_blocks() == 2 * features[0].nbytes


@pytest.mark.parametrize("call", [_memory.keep_freed_memory, _memory.return_memory_at_once])
def test_settings_of_the_process_end_it(call, monkeypatch: pytest.MonkeyPatch) -> None:
    class Libc:
        mallopt = malloc_trim = staticmethod(lambda *_: 1)

    monkeypatch.setattr(_memory.platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(_memory.ctypes, "CDLL", lambda _: Libc)
    held, _ = lent(taps()), lent(taps())
    del _
    call()
    assert _native.return_blocks() == 0
    assert all(g.untyped_storage().resizable() for g in lent(taps()))
    held[0].fill_(1)
    del held
    assert _native.return_blocks() == 0


def test_freed_memory_can_be_returned() -> None:
    lent(taps())
    _memory.return_freed_memory()
    assert _native.return_blocks() == 0


def test_where_torch_fills_empty_tensors_they_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert lent(taps(1))[0].untyped_storage().resizable()


def test_no_memory_left_is_torchs_error() -> None:
    huge = torch.empty(1).expand(1 << 20, 1 << 40)
    assert _native.lend(huge.shape, (1 << 40, 1), 0) is None
    lent(taps(1))
    assert _native.lend(huge.shape, (1 << 40, 1), 0) is None
    assert _native.return_blocks() == 0  # it was tried again without what was idle


def test_an_untaken_capsule_gives_its_block_back() -> None:
    capsule = _native.lend((BYTES,), (1,), 0)
    del capsule
    assert _native.return_blocks() == 4 * BYTES


def test_threads_never_share_a_block() -> None:
    features, wrong = taps(2), []

    def work(number: int) -> None:
        for i in range(10):
            mine = lent(features)
            for g in mine:
                g.fill_(number + i / 64)
            if not all(g.eq(number + i / 64).all() for g in mine):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_child_has_blocks_of_its_own() -> None:
    features = taps(3)
    lent(features[:2])
    (held,) = lent(features[:1])
    values = held.numpy()  # torch's threads do not survive a fork
    values[:] = 5
    child = os.fork()
    if child == 0:
        mine = [g.numpy() for g in lent(features)]
        for array in mine:
            array[:] = 6
        good = (values == 5).all()
        values[:] = 7
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert (values == 5).all()


@pytest.mark.long
def test_a_gradient_that_outlives_the_interpreter_ends_quietly() -> None:
    script = """
import torch
from dpmmd._cores import blocks
from dpmmd._contract.taps import DTYPES, Taps
held = blocks.empty_gradients(Taps([torch.zeros(8, 1 << 17)] * 2, DTYPES), [True] * 2)
torch.held = held[1]
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not done.stderr


@pytest.mark.long
def test_a_compiled_loss_has_the_same_gradients() -> None:
    features = taps()

    def of(run) -> tuple[Tensor, ...]:
        leaves = [f.detach().requires_grad_() for f in features]
        return torch.autograd.grad(run(leaves), leaves)

    def loss(leaves: list[Tensor]) -> Tensor:
        means, counts = functional.mean_embedding(leaves, backend="cpu")
        return functional.mmd_loss(means, counts, torch.zeros_like(means))

    for got, usual in zip(of(torch.compile(loss, backend="aot_eager")), of(loss), strict=True):
        assert torch.equal(got, usual)
