"""The native class means and their gradient: threads, halves, copies, what traces and compiles."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dpmmd import functional
from dpmmd._contract.taps import Taps
from dpmmd._cores import cpu
from dpmmd._cores.matching import CORE
from dpmmd.bounds import BOUNDS, MOMENTS, Bound

pytestmark = pytest.mark.skipif(cpu.missing is not None, reason="dpmmd._native is not built")

LEVELS = ("baseline", "avx2", "avx512")
MAPS = [(3, 4, 5), (7, 2, 1), (1, 1, 3), (5, 31, 33)]


@pytest.fixture(params=LEVELS)
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each level of the core that this processor has."""
    from dpmmd import _native

    before = _native.level()
    if not _native.choose(request.param):
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    assert _native.choose(before)


def features(
    n: int, shapes: list[tuple[int, ...]], dtype: torch.dtype, seed: int = 0
) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(n, *s, generator=rng).relu().to(dtype) for s in shapes]


def labels(n: int, k: int) -> Tensor:
    return torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(1))


def laid_out(tap: Tensor, layout: str) -> Tensor:
    """The same numbers in another memory layout."""
    if layout == "channels-last":
        return tap.contiguous(memory_format=torch.channels_last) if tap.ndim == 4 else tap
    if layout == "batch-strided":
        return torch.stack([tap, torch.full_like(tap, math.nan)], dim=1)[:, 0]
    if layout == "sliced":  # neither rows nor planes in one piece: takes a copy
        return torch.cat([tap, torch.full_like(tap, math.nan)], dim=-1)[..., : tap.shape[-1]]
    return tap


def test_features_in_one_piece_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    original = Taps.for_native
    monkeypatch.setattr(
        Taps,
        "for_native",
        lambda taps, g: seen.append([t.data_ptr() for t in taps.tensors]) or original(taps, g),
    )
    (f,) = features(4, [(3, 4, 5)], torch.float32)
    for layout in ("contiguous", "channels-last", "batch-strided"):
        tap = laid_out(f, layout)
        functional.mean_embedding([tap], backend="cpu")
        assert seen.pop() == [tap.data_ptr()]
    functional.mean_embedding([laid_out(f, "sliced")], backend="cpu")
    assert seen.pop() != [f.data_ptr()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("bound", ["sphere", "ball-per-tap"])
def test_same_bits_for_any_number_of_threads(level: str, bound: str, dtype: torch.dtype) -> None:
    fs = features(40, [(4099,), (16, 24, 24), (3,), (5000,)], dtype)
    y = labels(40, 7)
    of = fs, y, 7, Bound((1, 2), bound, 9.0)
    results = []
    for threads in (1, 2, 16):
        means, _, saved = CORE.forward(*of, threads=threads)
        grads, coefficients = CORE.gradients(*of, saved, means.sin(), [True] * 4, threads=threads)
        results.append([means, saved.scale, saved.projection, coefficients, *grads])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("moments", MOMENTS, ids=str)
def test_halves_give_what_the_fused_passes_give(bound: str, moments: tuple[int, ...]) -> None:
    fs = features(11, MAPS, torch.float32)
    y = labels(11, 4)
    of = fs, y, 4, Bound(moments, bound, 5.0)
    means, counts, saved = CORE.forward(*of)
    _, _, (s, p, _) = CORE.forward(*of, phases=cpu.STATISTICS)
    assert torch.equal(s, saved.scale)
    assert torch.equal(p, saved.projection)
    m, c, _ = CORE.forward(*of, phases=cpu.CLASS_SUMS, statistics=(s, p))
    assert torch.equal(m, means)
    assert torch.equal(c, counts)
    given = *of, saved, means.cos(), [True] * len(fs)
    grads, coefficients = CORE.gradients(*given)
    _, e = CORE.gradients(*given, phases=cpu.DOTS)
    assert torch.equal(e, coefficients)
    g, _ = CORE.gradients(*given, phases=cpu.GRADIENT, coefficients=e)
    assert all(torch.equal(a, b) for a, b in zip(g, grads, strict=True))


def test_statistics_are_those_of_the_rows() -> None:
    fs = features(6, MAPS, torch.float32)
    bound = Bound((1, 2), clip=3.0)
    _, _, (scale, projection, _) = CORE.forward(fs, None, 1, bound, phases=cpu.STATISTICS)
    whole = torch.cat([f.double().flatten(1) for f in fs], dim=1)
    norms = torch.stack([whole.norm(dim=1), (whole**2).norm(dim=1)])[..., None]
    torch.testing.assert_close(scale.double(), 3 / norms, rtol=3e-7, atol=0)
    torch.testing.assert_close(projection.double(), 1 / norms, rtol=3e-7, atol=0)


def test_double_backward_is_refused() -> None:
    fs = [f.requires_grad_() for f in features(3, [(4,)], torch.float32)]
    means, _ = functional.mean_embedding(fs, backend="cpu")
    (grad,) = torch.autograd.grad(means.square().sum(), fs, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_a_forked_child_computes_the_same() -> None:
    """OpenMP teams do not survive a fork: the child must not wait for one."""
    import os

    (f,) = features(40, [(9000,)], torch.float32)
    expected = CORE.forward([f], None, 1, Bound(), threads=2)[0]
    child = os.fork()
    if child == 0:
        same = torch.equal(CORE.forward([f], None, 1, Bound(), threads=2)[0], expected)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_opcheck() -> None:
    fs = [f.requires_grad_() for f in features(4, [(3, 2, 2), (6,)], torch.float32)]
    fs[0] = fs[0].detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    y = labels(4, 3)
    for bound in ("sphere", "ball-per-tap"):
        torch.library.opcheck(
            torch.ops.dpmmd.mean_embedding.default, (fs, y, 3, [1, 2], bound, 1.0, None, "cpu")
        )
    means, _, scale, projection, schedule = torch.ops.dpmmd.mean_embedding(
        fs, y, 3, [1, 2], "sphere", 1.0, None, "cpu"
    )
    torch.library.opcheck(
        torch.ops.dpmmd.mean_embedding_backward.default,
        (
            [f.detach() for f in fs], y, 3, [1, 2], "sphere", None, scale.detach(),
            projection.detach(), schedule, means.detach(), [True, False], "cpu",
        ),
    )  # fmt: skip


def test_compiles_in_one_graph() -> None:
    fs = features(6, [(3, 5, 5), (40,)], torch.float32)
    y = labels(6, 3)
    target = torch.rand(2, 3, 115)

    def step(a: Tensor, b: Tensor) -> Tensor:
        means, counts = functional.mean_embedding([a.relu(), b * 2], y, 3, moments=(1, 2))
        return functional.mmd_loss(means, counts, target)

    results = []
    for function in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        inputs = [f.clone().requires_grad_() for f in fs]
        loss = function(*inputs)
        results.append([loss.detach(), *torch.autograd.grad(loss, inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)
