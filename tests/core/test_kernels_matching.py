"""Triton's pass of sums, estimate and row dots, against the separate kernels and the definition."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from dpmmd import reference
from dpmmd._contract import lending
from dpmmd._contract.protocol import Core, Step
from dpmmd._cores import named
from dpmmd._ops import estimator
from dpmmd._ops import matching as operation
from dpmmd.bounds import Bound
from dpmmd.nn import MMDLoss
from tests.core import conformance, interpreted
from tests.core.conformance import distance, keywords
from tests.core.interpreted import small_blocks  # noqa: F401

if not interpreted.ACTIVE:
    test_interpreted = interpreted.whole(__file__)
    test_interpreted_long = pytest.mark.long(interpreted.whole(__file__, "long"))
else:
    import triton.language as tl

    from dpmmd.kernels import matching, table
    from dpmmd.kernels.gradient import gradient_into
    from dpmmd.kernels.taps import Taps

    LONG = partial(pytest.param, marks=pytest.mark.long)
    pytestmark = pytest.mark.usefixtures("small_blocks")

    CORE = named("triton")
    SHAPES = ((3, 2, 2), (5,))
    DIM = 17
    BOTH = Bound((1, 2))
    BOUNDS = (
        BOTH,
        Bound((1,), "ball", 2.0),
        Bound((2,), "sphere-per-tap"),
        Bound((1, 2), "ball-per-tap", 2.0),
        Bound((1, 2), joint_weight=0.5),
        Bound((1, 2), "ball", 2.0, joint_weight=0.5),
    )

    def features(
        n: int,
        shapes: Sequence[tuple[int, ...]] = SHAPES,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> list[Tensor]:
        return conformance.Batch(n, tuple(shapes), dtype, seed=seed).features()

    def labels(n: int, k: int) -> Tensor | None:
        if k == 1:
            return None
        y = torch.randint(0, k, (n,), generator=torch.Generator().manual_seed(1))
        return torch.where(y == k // 2, 0, y)  # one class is absent

    def state(bound: Bound, k: int, dim: int) -> tuple[Tensor, Step]:
        """A target, and the state of an estimator after some steps."""
        rng = torch.Generator().manual_seed(2)
        shape = (len(bound.moments), k, dim)
        target, v, m, s = (torch.randn(shape, generator=rng) for _ in range(4))
        steps = torch.arange(k).float()
        return 0.1 * target, Step("adam", 0.1 * v, steps, 1e-4 * m, 1e-7 * s.square(), lr=1e-2)

    def same(a: Step, b: Step) -> None:
        for (name, x), y in zip(a.state().items(), b.state().values(), strict=True):
            assert torch.equal(x, y), name

    def both(
        fs: list[Tensor], y: Tensor | None, k: int, bound: Bound, grad: float = 3.0
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Value and gradients of the separate kernels and of the one pass, whose states agree."""
        found = []
        target, step = state(bound, k, sum(math.prod(f.shape[1:]) for f in fs))
        steps = [copy.deepcopy(step) for _ in range(2)]
        for core, step in zip((None, CORE), steps, strict=True):
            match = CORE.match if core else lambda *a: Core.match(CORE, *a)
            value, matched = match(fs, y, k, bound, target, step)
            step.mark()
            assert (matched.lent is not None) == (core is not None)
            given = fs, y, k, bound, matched, torch.tensor(grad), [True] * len(fs)
            found.append([value, *CORE.match_backward(*given)])
        same(*steps)
        return found[0], found[1]

    def agree(one: Sequence[Tensor], other: Sequence[Tensor], dtype: torch.dtype) -> None:
        for a, b in zip(one, other, strict=True):
            assert a.shape == b.shape
            assert a.dtype == b.dtype
            # A bfloat16 gradient may be cut the other way.
            assert distance([b], [a]) <= (2e-6 if dtype == torch.float32 else 2**-9)

    @pytest.mark.parametrize("bound", [*BOUNDS[:2], *map(LONG, BOUNDS[2:])], ids=str)
    def test_the_state_moves_to_the_same_bits(bound: Bound) -> None:
        agree(*both(features(6), labels(6, 3), 3, bound), torch.float32)

    @pytest.mark.parametrize("bound", [BOUNDS[1], LONG(BOUNDS[3])], ids=str)
    def test_without_labels(bound: Bound) -> None:
        agree(*both(features(6), None, 1, bound), torch.float32)

    def test_bfloat16() -> None:
        fs = features(6, dtype=torch.bfloat16)
        agree(*both(fs, labels(6, 3), 3, BOTH), torch.bfloat16)

    @pytest.mark.parametrize("bound", BOUNDS[:5:2], ids=str)
    def test_against_the_definition(bound: Bound) -> None:
        """In float64, by autograd, and by the formulas of Adam."""
        k, fs, y = 3, features(7), labels(7, 3)
        assert y is not None
        target, step = state(bound, k, DIM)
        truth = {name: t.double() for name, t in step.state().items()}
        value, matched = CORE.match(fs, y, k, bound, target, step)
        step.mark()
        given = fs, y, k, bound, matched, torch.tensor(0.5), [True, True]
        gradients = CORE.match_backward(*given)
        taps = [f.double().requires_grad_() for f in fs]
        means, counts = reference.mean_embedding(taps, y, k, **keywords(bound))
        there = counts > 0
        d = target.double() - means
        v, m, s, t = (
            truth[name] for name in ("estimate", "first_moment", "second_moment", "steps")
        )
        with torch.no_grad():
            t[there] += 1
            slope = (v - d) * (2 / d.numel())
            for moment, g, beta in ((m, slope, 0.9), (s, slope.square(), 0.999)):
                moment[:, there] += (1 - beta) * (g - moment)[:, there]
            rise = (m / (1 - 0.9 ** t[:, None])) / ((s / (1 - 0.999 ** t[:, None])).sqrt() + 1e-8)
            v[:, there] -= 1e-2 * rise[:, there]
        loss = (v * d)[:, there].sum()
        (0.5 * loss).backward()
        for name, tensor in step.state().items():
            assert distance([tensor], [truth[name]]) < 1e-6, name
        assert abs(float(value) - float(loss.detach())) <= 1e-6 * float(
            (v * d)[:, there].abs().sum()
        )
        for g, tap in zip(gradients, taps, strict=True):
            assert tap.grad is not None
            assert distance([g], [tap.grad]) < 2e-6

    def test_bfloat16_before_it_is_rounded() -> None:
        """Through the core the interpreter's own rounding hides what float32 found."""
        fs, y = features(6, dtype=torch.bfloat16), labels(6, 3)
        target, step = state(BOTH, 3, DIM)
        _, saved, coefficients = matching.forward(Taps(fs), y, 3, BOTH, target, step)
        assert step.estimate is not None
        terms, _ = matching.backward(
            Taps(fs), y, 3, BOTH, saved, coefficients, step.estimate, torch.ones(()), [False] * 2
        )
        found = [torch.full_like(f, math.nan, dtype=torch.float32) for f in fs]
        gradient_into(Taps(fs), terms, found)
        taps = [f.double().requires_grad_() for f in fs]
        means, _ = reference.mean_embedding(taps, y, 3, moments=(1, 2))
        truth = torch.autograd.grad(means, taps, -step.estimate.double())
        assert distance(found, truth) < 2e-6

    @pytest.mark.parametrize("kind", [LONG("sphere"), "ball-per-tap"])
    def test_rows_without_use(kind: str) -> None:
        """They hold NaN or nothing, in one tap or in all; a class of nothing else is present."""
        fs, y = features(7), torch.tensor([0, 0, 1, 1, 0, 0, 0])
        fs[0][0] = math.nan
        fs[1][4, 2] = math.inf
        for f in fs:
            f[5], f[2:4] = 0, math.nan
        with conformance.poisoned():
            plain, fused = both(fs, y, 2, Bound((1, 2), kind, 2.0))
        agree(plain, fused, torch.float32)
        for g in fused[1:]:
            assert bool(g.isfinite().all())
            assert not bool(g[[2, 3, 5]].any())

    def test_absent_classes_keep_their_state() -> None:
        fs, y = features(3), torch.tensor([2, 0, 2])
        target, step = state(BOTH, 4, DIM)
        before = copy.deepcopy(step)
        value, _ = CORE.match(fs, y, 4, BOTH, target, step)
        assert step.steps is not None
        assert step.steps.tolist() == [1, 1, 3, 3]
        absent, present = [1, 3], [0, 2]
        for name in ("estimate", "first_moment", "second_moment"):
            now, then = getattr(step, name), getattr(before, name)
            assert torch.equal(now[:, absent], then[:, absent])
            assert bool((now[:, present] != then[:, present]).all())
        target[:, absent] = math.nan
        again, _ = CORE.match(fs, y, 4, BOTH, target, before)
        assert torch.equal(value, again)

    @pytest.mark.parametrize(
        ("n", "k", "shapes"),
        [
            (0, 3, SHAPES),
            (1, 1, SHAPES),
            (4, 3, ((0,), (2, 0, 3))),
            (17, 2, ((3,),)),  # a class longer than a tile
            LONG(5, 12, ((3,), (0,), (1,))),
        ],
    )
    def test_sizes(n: int, k: int, shapes: tuple[tuple[int, ...], ...]) -> None:
        with conformance.poisoned():
            agree(*both(features(n, shapes), labels(n, k), k, BOTH), torch.float32)

    def test_more_values_than_a_program_adds(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(matching, "VALUES", tl.constexpr(4))
        agree(*both(features(4), labels(4, 3), 3, Bound()), torch.float32)

    def test_taps_off_16_bytes() -> None:
        """Some of the taps are aligned, some are not: two launches of one pass."""
        fs = features(4, ((4,), (3,), (5,)))
        assert [piece.vector for piece in Taps(fs).launches(8)] == [4, 1]
        agree(*both(fs, labels(4, 3), 3, Bound()), torch.float32)

    @pytest.mark.long
    def test_same_bits_again() -> None:
        fs, y = features(9), labels(9, 2)
        once, again = (both(fs, y, 2, BOTH)[1] for _ in range(2))
        for a, b in zip(once, again, strict=True):
            assert torch.equal(a, b)

    def test_what_goes_by_the_separate_kernels() -> None:
        """Planes, an estimate that stays, and other estimators."""
        planes = [f.contiguous() for f in features(3)]
        y, k = labels(3, 3), 3
        target, step = state(Bound(), k, DIM)
        for fs, kind in (
            (planes, step),
            (features(3), step._replace(update=False)),
            (features(3), Step()),
            (features(3), Step("ema", torch.zeros_like(target), torch.zeros(k), decay=0.5)),
        ):
            value, matched = CORE.match(fs, y, k, Bound(), target, kind)
            assert matched.lent is None
            assert matched.gradient.shape == target.shape
            assert bool(value.isfinite())

    def test_refusals() -> None:
        fs, y = features(3), torch.tensor([0, 1, 1])
        target, step = state(BOTH, 3, DIM)
        assert step.estimate is not None
        for name, bad in (
            ("target", target[..., 1:].contiguous()),
            ("target", target.double()),
            ("estimate", step.estimate.double()),
            ("first_moment", step.estimate[:, :2]),
            ("steps", torch.zeros(4)),
        ):
            goal = bad if name == "target" else target
            moved = step if name == "target" else step._replace(**{name: bad})
            with pytest.raises(ValueError, match=f"{name}: torch"):
                CORE.match(fs, y, 3, BOTH, goal, moved)
        with pytest.raises(ValueError, match="estimate: shares memory with target"):
            CORE.match(fs, y, 3, BOTH, step.estimate, step)
        with pytest.raises(ValueError, match=r"labels: torch\.int32 \[3\]"):
            CORE.match(fs, y.int(), 3, BOTH, target, step)
        _, matched = CORE.match(fs, y, 3, BOTH, target, step)
        step.mark()
        for what, grad in (
            ("float64", torch.ones((), dtype=torch.float64)),
            (r"\[1\]", torch.ones(1)),
        ):
            with pytest.raises(ValueError, match=f"grad: torch.*{what}"):
                CORE.match_backward(fs, y, 3, BOTH, matched, grad, [True, True])

    def test_the_table_keeps_the_order_of_sums() -> None:
        """The state moves to the same bits only if sums are taken in tiles of the same shape."""
        for of_dtypes in table.TABLE.values():
            for entries in of_dtypes.values():
                shapes = {
                    name: [(most, c.rows, c.block, c.num_warps) for most, c in entries[name]]
                    for name in ("matching", "class_sums")
                }
                assert shapes["matching"] == shapes["class_sums"]

    # Pending backward passes ----------------------------------------------------------------------

    class Loop:
        """A loss of features, and what the separate kernels say of the same batches."""

        def __init__(self) -> None:
            self.target, self.step = state(Bound(), 1, 8)
            self.other = copy.deepcopy(self.step)

        def forward(self, seed: int, update: bool = True) -> tuple[list[Tensor], Tensor, Tensor]:
            """Features, their loss, and its gradient in all of them."""
            fs = [f.requires_grad_() for f in features(2, ((8,),), seed=seed)]
            given = fs, None, 1, Bound()
            kind = self.step._replace(update=update)
            value = operation.loss(CORE, *given, self.target, kind)
            other = self.other._replace(update=update)
            _, matched = Core.match(CORE, *given, self.target, other)
            one = torch.ones(())
            truth = Core.match_backward(CORE, *given, matched, one, [True])
            return fs, value, torch.cat([g.flatten() for g in truth])

    def gradients(fs: list[Tensor], value: Tensor, **options: Any) -> Tensor:
        found = torch.autograd.grad(value, fs, **options)
        return torch.cat([g.flatten() for g in found])

    def right(found: Tensor, truth: Tensor) -> None:
        assert distance([found], [truth]) < 2e-6

    @contextmanager
    def copies(monkeypatch: pytest.MonkeyPatch, expected: int) -> Iterator[None]:
        """Within the block so many copies of an estimate are made."""
        made, clone = [], Tensor.clone
        with monkeypatch.context() as patched:

            def counted(tensor: Tensor, *a: Any, **b: Any) -> Tensor:
                if tensor.shape == (1, 1, 8):
                    made.append(tensor)
                return clone(tensor, *a, **b)

            patched.setattr(Tensor, "clone", counted)
            yield
        assert len(made) == expected

    def test_a_loop_makes_no_copies(monkeypatch: pytest.MonkeyPatch) -> None:
        loop, kept = Loop(), []
        with copies(monkeypatch, 0):
            for seed in range(3):
                fs, value, truth = loop.forward(seed)
                kept.append(value)  # as a loop that prints its losses later may do
                right(gradients(fs, value), truth)
                loop.forward(seed, update=False)  # moves nothing, so it may stay
                loop.forward(seed + 10)  # dropped
        same(loop.step, loop.other)

    def test_two_forwards_then_two_backwards(monkeypatch: pytest.MonkeyPatch) -> None:
        loop = Loop()
        with copies(monkeypatch, 2):
            first, second, third = (loop.forward(seed) for seed in range(3))
        for fs, value, truth in (second, first, third):
            right(gradients(fs, 2 * value), 2 * truth)
            with pytest.raises(RuntimeError, match="second time"):
                gradients(fs, value)
        with copies(monkeypatch, 0):
            loop.forward(3)

    def test_backward_twice(monkeypatch: pytest.MonkeyPatch) -> None:
        loop = Loop()
        fs, value, truth = loop.forward(0)
        once = gradients(fs, value, retain_graph=True)
        with copies(monkeypatch, 1):
            loop.forward(1)
            loop.forward(1, update=False)
            loop.forward(2)
        again = gradients(fs, value, retain_graph=True)
        assert torch.equal(once, again)
        assert torch.equal(gradients(fs, value), again)
        right(again, truth)

    @pytest.mark.parametrize("core", ["triton", "cpu", "torch"])
    @pytest.mark.parametrize("alone", [False, True])
    def test_another_core_may_move_it(core: str, alone: bool) -> None:
        """As ``auto`` lets a smaller batch do, with the estimator alone or the features too."""
        loop = Loop()
        fs, value, truth = loop.forward(0)
        if alone:
            means = torch.zeros_like(loop.target)
            estimator.loss(named(core), means, torch.ones(1), loop.target, loop.step)
        else:
            others = features(2, ((8,),), seed=1)
            operation.loss(named(core), others, None, 1, Bound(), loop.target, loop.step)
        right(gradients(fs, value), truth)

    @pytest.mark.parametrize("then", ["nothing", "a forward"])
    def test_an_estimate_that_somebody_else_changes(then: str) -> None:
        loop = Loop()
        fs, value, _ = loop.forward(0)
        assert loop.step.estimate is not None
        loop.step.estimate.mul_(2)
        if then == "a forward":
            loop.forward(1)
        with pytest.raises(RuntimeError, match=r"estimate has been changed in place since\. Run"):
            gradients(fs, value)

    @pytest.mark.parametrize("captured", [(False, True), (True, False)])
    def test_a_copy_that_a_graph_would_make(
        monkeypatch: pytest.MonkeyPatch, captured: tuple[bool, bool]
    ) -> None:
        """A capture moves an estimate that an earlier backward needs, or the other way about."""
        loop, now = Loop(), [captured[0]]
        monkeypatch.setattr(lending, "_capturing", lambda _: now[0])
        fs, value, _ = loop.forward(0)
        now[0] = captured[1]
        loop.forward(1)
        with pytest.raises(RuntimeError, match="is gone: a CUDA graph was captured in between"):
            gradients(fs, value)
        within = [loop.forward(seed) for seed in (2, 3)]  # both on the same side
        for fs, value, truth in within:
            right(gradients(fs, value), truth)

    def test_gradients_of_gradients_are_refused() -> None:
        fs, value, _ = Loop().forward(0)
        found = gradients(fs, value, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            found.sum().backward()

    def test_hooks_on_saved_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
        """They may copy what is saved, or not."""
        loop, found = Loop(), []
        for pack in (torch.clone, lambda t: t):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
                found.append(loop.forward(0))
        for fs, value, truth in found:
            right(gradients(fs, value), truth)

    def test_hooks_that_change_the_layout() -> None:
        """`torch.autograd.graph.save_on_cpu` brings channels-last maps back as planes."""
        fs = [f.requires_grad_() for f in features(3, ((3, 2, 2),))]
        target, step = state(Bound(), 1, 12)
        other = copy.deepcopy(step)
        with torch.autograd.graph.saved_tensors_hooks(Tensor.contiguous, lambda t: t):
            value = operation.loss(CORE, fs, None, 1, Bound(), target, step)
        _, matched = Core.match(CORE, fs, None, 1, Bound(), target, other)
        one = torch.ones(())
        truth = Core.match_backward(CORE, fs, None, 1, Bound(), matched, one, [True])
        assert distance(torch.autograd.grad(value, fs), truth) < 2e-6

    @pytest.mark.skipif(lending._hooks is None, reason="this PyTorch does not tell its hooks")
    def test_a_forward_that_runs_again_in_backward() -> None:
        """Under activation checkpointing all that backward reads is of the second run."""
        found = []
        for core in (CORE, named("cpu")):
            loop = Loop()
            loop.forward(0)

            def run(f: Tensor, core: Core = core, loop: Loop = loop) -> Tensor:
                given = [f * 1], None, 1, Bound(), loop.target, loop.step._replace(lr=0.1)
                return operation.loss(core, *given)

            fs = [f.requires_grad_() for f in features(2, ((8,),), seed=1)]
            found.append(gradients(fs, checkpoint(run, *fs, use_reentrant=False)))
        right(*found)

    def test_nothing_is_kept() -> None:
        loop = Loop()
        fs, value, _ = loop.forward(0)
        assert loop.step.estimate is not None
        estimate = weakref.ref(loop.step.estimate)
        gradients(fs, value)
        del loop
        gc.collect()
        assert estimate() is None

    # The module -----------------------------------------------------------------------------------

    @pytest.mark.long
    @pytest.mark.parametrize("inject", [False, True])
    def test_a_training_goes_on_with_either(monkeypatch: pytest.MonkeyPatch, inject: bool) -> None:
        """`MMDLoss` after a step by the separate kernels, against two of them."""
        interpreted.set_blocks(monkeypatch, 64)
        problem = conformance.Problem("relu6", release=(("moments", (1, 2)),))
        encoder, release = conformance.made(problem)
        images = torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(1))

        def loss() -> MMDLoss:
            encoders = copy.deepcopy(encoder)
            chosen: dict[str, Any] = {"estimator": "adam", "lr": 1e-2, "backend": "triton"}
            return MMDLoss(release, encoders, inject=inject, **chosen).float()

        def take(own: MMDLoss, apart: bool) -> Tensor:
            x = images.clone().requires_grad_()
            with monkeypatch.context() as patched:
                if apart:
                    patched.setattr(type(CORE), "match", Core.match)
                own(x, conformance.LABELS).backward()
            assert x.grad is not None
            return x.grad

        one, other = loss(), loss()
        for own in (one, other):
            take(own, apart=True)
        found, truth = take(one, apart=False), take(other, apart=True)
        for a, b in zip(one.by_class.buffers(), other.by_class.buffers(), strict=True):
            assert torch.equal(a, b)
        assert float(truth.abs().max()) > 0
        assert distance([found], [truth]) < 5e-6
