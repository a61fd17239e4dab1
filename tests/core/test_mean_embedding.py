"""The native class means and their gradient against `dpmmd.reference` in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dpmmd import functional, reference
from dpmmd._contract.taps import Taps
from dpmmd._cores import cpu
from dpmmd.bounds import BOUNDS, MOMENTS, Bound

pytestmark = pytest.mark.skipif(cpu.missing is not None, reason="dpmmd._native is not built")

LEVELS = ("baseline", "avx2", "avx512")
# [n, ...] taps; sizes below, at and above a vector, a group of vectors and a chunk of columns.
SHAPES = {
    "maps": [(3, 4, 5), (7, 2, 1), (1, 1, 3), (5, 31, 33)],
    "flat": [(4099,)],
    "odd": [(1,), (5, 3), (2, 1, 1), (63,), (67,)],
    "sixty-four": [(2, 3, 1)] * 64,
}
LAYOUTS = ("contiguous", "channels-last", "batch-strided", "sliced")


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


def ours_and_truth(
    fs: list[Tensor], y: Tensor | None, k: int, backend: str = "cpu", **options: object
) -> tuple[Tensor, list[Tensor], Tensor, list[Tensor], list[Tensor], Tensor]:
    """Means and gradients: ours, then the reference's in float64 and in the features' dtype."""
    results = []
    weight = None
    for function, dtype in (
        (functional.mean_embedding, fs[0].dtype),
        (reference.mean_embedding, torch.float64),
        (reference.mean_embedding, fs[0].dtype),
    ):
        inputs = [f.detach().to(dtype).requires_grad_() for f in fs]
        more = {"backend": backend} if function is functional.mean_embedding else {}
        means, _ = function(inputs, y, k, **options, **more)  # type: ignore[operator]
        if weight is None:
            weight = torch.randn(means.shape, generator=torch.Generator().manual_seed(2))
        grads = torch.autograd.grad((means * weight.to(means.dtype)).sum(), inputs)
        results += [means.detach(), list(grads)]
    return tuple(results)  # type: ignore[return-value]


def error(a: Tensor, truth: Tensor) -> float:
    return float((a.double() - truth).norm() / truth.norm().clamp(min=1e-300))


def joined(grads: list[Tensor]) -> Tensor:
    return torch.cat([g.double().flatten() for g in grads])


def check(fs: list[Tensor], y: Tensor | None, k: int, **options: object) -> None:
    means, grads, true_means, true_grads, plain_means, plain_grads = ours_and_truth(
        fs, y, k, **options
    )
    assert means.dtype == torch.float32
    for f, g in zip(fs, grads, strict=True):
        assert g.dtype == f.dtype
        assert g.shape == f.shape
    # At most twice (gradients thrice) the error of plain torch in the same dtype; plain torch may
    # be lucky where there are few terms, hence a unit in the last place of what we store.
    stored = torch.finfo(fs[0].dtype).eps
    assert error(means, true_means) <= 2 * error(plain_means, true_means) + 2e-7
    assert error(joined(grads), joined(true_grads)) <= (
        3 * error(joined(plain_grads), joined(true_grads)) + stored
    )
    cosine = torch.nn.functional.cosine_similarity(joined(grads), joined(true_grads), dim=0)
    assert cosine > (0.9999 if fs[0].dtype == torch.bfloat16 else 0.999999)
    usable = joined(true_grads).reshape(-1).ne(0)
    assert joined(grads)[usable].ne(0).double().mean() > 0.999


@pytest.mark.parametrize("labelled", [True, False], ids=["labelled", "unlabelled"])
@pytest.mark.parametrize("moments", MOMENTS, ids=str)
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_values_and_gradients(
    dtype: torch.dtype,
    shapes: list[tuple[int, ...]],
    bound: str,
    moments: tuple[int, ...],
    labelled: bool,
) -> None:
    fs = features(9, shapes, dtype)
    norms = torch.cat([f.float().flatten(1) for f in fs], dim=1).norm(dim=1)
    clip = 1.01 * float(norms.median())  # balls clip about half of the vectors, none at the edge
    y, k = (labels(9, 4), 4) if labelled else (None, 1)
    check(fs, y, k, moments=moments, bound=bound, clip=clip)


@pytest.mark.parametrize("bound", ["sphere", "ball"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_joint_bound(bound: str, dtype: torch.dtype) -> None:
    check(
        features(8, SHAPES["maps"], dtype),
        labels(8, 3),
        3,
        moments=(1, 2),
        bound=bound,
        clip=20.0,
        joint_weight=0.3,
    )


@pytest.mark.parametrize("moments", MOMENTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
@pytest.mark.parametrize("shapes", ["maps", "odd"])
def test_levels(level: str, shapes: str, dtype: torch.dtype, moments: tuple[int, ...]) -> None:
    check(features(7, SHAPES[shapes], dtype), labels(7, 3), 3, moments=moments)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_layouts_give_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    """Values but for the order of sums; gradients in the layout of the features."""
    fs = features(5, SHAPES["maps"], dtype)
    y = labels(5, 3)
    inputs = [laid_out(f, layout).requires_grad_() for f in fs]
    plain = [laid_out(f, "channels-last").requires_grad_() for f in fs]
    results = []
    for taps in (inputs, plain):
        means, _ = functional.mean_embedding(taps, y, 3, moments=(1, 2), backend="cpu")
        weight = torch.linspace(-1, 1, means.numel()).view_as(means)
        results.append((means, torch.autograd.grad((means * weight).sum(), taps)))
    (means, grads), (expected, expected_grads) = results
    torch.testing.assert_close(means, expected, rtol=1e-6, atol=1e-7)
    for f, g, e in zip(inputs, grads, expected_grads, strict=True):
        torch.testing.assert_close(g, e, rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
        if layout == "contiguous":
            assert g.is_contiguous()
        if layout == "channels-last" and f.ndim == 4:
            assert g.is_contiguous(memory_format=torch.channels_last)


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
        means, _, saved = cpu.CORE.forward(*of, threads=threads)
        grads, coefficients = cpu.CORE.gradients(
            *of, saved, means.sin(), [True] * 4, threads=threads
        )
        results.append([means, saved.scale, saved.projection, coefficients, *grads])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("moments", MOMENTS, ids=str)
def test_halves_give_what_the_fused_passes_give(bound: str, moments: tuple[int, ...]) -> None:
    fs = features(11, SHAPES["maps"], torch.float32)
    y = labels(11, 4)
    of = fs, y, 4, Bound(moments, bound, 5.0)
    means, counts, saved = cpu.CORE.forward(*of)
    _, _, (s, p, _) = cpu.CORE.forward(*of, phases=cpu.STATISTICS)
    assert torch.equal(s, saved.scale)
    assert torch.equal(p, saved.projection)
    m, c, _ = cpu.CORE.forward(*of, phases=cpu.CLASS_SUMS, statistics=(s, p))
    assert torch.equal(m, means)
    assert torch.equal(c, counts)
    given = *of, saved, means.cos(), [True] * len(fs)
    grads, coefficients = cpu.CORE.gradients(*given)
    _, e = cpu.CORE.gradients(*given, phases=cpu.DOTS)
    assert torch.equal(e, coefficients)
    g, _ = cpu.CORE.gradients(*given, phases=cpu.GRADIENT, coefficients=e)
    assert all(torch.equal(a, b) for a, b in zip(g, grads, strict=True))


def test_statistics_are_those_of_the_rows() -> None:
    fs = features(6, SHAPES["maps"], torch.float32)
    bound = Bound((1, 2), clip=3.0)
    _, _, (scale, projection, _) = cpu.CORE.forward(fs, None, 1, bound, phases=cpu.STATISTICS)
    whole = torch.cat([f.double().flatten(1) for f in fs], dim=1)
    norms = torch.stack([whole.norm(dim=1), (whole**2).norm(dim=1)])[..., None]
    torch.testing.assert_close(scale.double(), 3 / norms, rtol=3e-7, atol=0)
    torch.testing.assert_close(projection.double(), 1 / norms, rtol=3e-7, atol=0)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("moments", MOMENTS, ids=str)
def test_unusable_rows_are_zero_and_harm_nobody(
    bound: str, bad: float, moments: tuple[int, ...]
) -> None:
    fs = features(5, [(2, 3, 3), (41,)], torch.float32)
    clean = [f.clone() for f in fs]
    for f in fs:
        f[2] = bad
    for f in clean:
        f[2] = 0.0
    y = torch.tensor([0, 1, 1, 0, 2])
    inputs = [f.requires_grad_() for f in fs]
    means, counts = functional.mean_embedding(
        inputs, y, 3, moments=moments, bound=bound, backend="cpu"
    )
    expected, _ = functional.mean_embedding(
        clean, y, 3, moments=moments, bound=bound, backend="cpu"
    )
    assert torch.equal(means, expected)
    assert counts.tolist() == [2, 2, 1]
    for f, g in zip(fs, torch.autograd.grad(means.square().sum(), inputs), strict=True):
        assert torch.isfinite(g).all()
        assert not g[2].any()
        assert g[[0, 1, 3, 4]].flatten(1).any(dim=1).all() or not f.any()


def test_one_bad_number_spoils_its_image_only() -> None:
    (f,) = features(3, [(9000,)], torch.float32)
    f[1, 8999] = math.nan
    means, counts = functional.mean_embedding([f], torch.tensor([0, 1, 2]), 3, backend="cpu")
    assert not means[0, 1].any()
    assert means[0, [0, 2]].norm(dim=1).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert counts.tolist() == [1, 1, 1]


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("k", [1, 3])
def test_few_images(n: int, k: int) -> None:
    fs = [f.requires_grad_() for f in features(n, SHAPES["maps"], torch.float32)]
    y = torch.zeros(n, dtype=torch.int64) + (k - 1)
    means, counts = functional.mean_embedding(fs, y, k, moments=(1, 2), backend="cpu")
    assert counts.tolist() == [0] * (k - 1) + [n]
    assert not means[:, :-1].any()
    assert means[:, -1].norm(dim=1).tolist() == pytest.approx([n, n], abs=1e-6)
    grads = torch.autograd.grad(means.sum(), fs)
    assert [g.shape for g in grads] == [f.shape for f in fs]


def test_empty_tap_and_absent_classes() -> None:
    fs = [*features(4, [(7,)], torch.float32), torch.zeros(4, 0)]
    y = torch.tensor([1, 1, 998, 1])
    for bound in BOUNDS:
        means, counts = functional.mean_embedding(fs, y, 1000, bound=bound, backend="cpu")
        truth, _ = reference.mean_embedding([f.double() for f in fs], y, 1000, bound=bound)
        torch.testing.assert_close(means.double(), truth, rtol=1e-6, atol=1e-7)
        assert counts.nonzero().flatten().tolist() == [1, 998]


def test_taps_without_gradient_get_none() -> None:
    fs = features(4, [(5,), (2, 3, 3)], torch.float32)
    fs[1].requires_grad_()
    means, _ = functional.mean_embedding(fs, backend="cpu")
    means.sum().backward()
    assert fs[0].grad is None
    assert fs[1].grad is not None
    assert fs[1].grad.any()


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
    expected = cpu.CORE.forward([f], None, 1, Bound(), threads=2)[0]
    child = os.fork()
    if child == 0:
        same = torch.equal(cpu.CORE.forward([f], None, 1, Bound(), threads=2)[0], expected)
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
