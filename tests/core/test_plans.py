"""What is kept from call to call: it is found again only by calls alike, and hides no refusal."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dpmmd import backends, functional
from dpmmd._contract import plans
from dpmmd._contract.protocol import Step
from dpmmd._cores import named
from dpmmd._ops import matching
from dpmmd.bounds import Bound
from dpmmd.nn import MMDLoss
from tests.core.conformance import encoder_of, release_of

pytestmark = pytest.mark.skipif(
    backends.resolve() != "cpu", reason="dpmmd._native is not built, or not asked for"
)

N, K, D = 4, 3, 17
SHAPES = ((2, 2, 2), (5,), (1, 2, 2))


@pytest.fixture(autouse=True)
def no_plans() -> Iterator[None]:
    plans._plans.clear()
    yield
    plans._plans.clear()


def taps(n: int = N, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    rng = torch.Generator().manual_seed(seed)
    drawn = (torch.rand(n, *shape, generator=rng).to(dtype) for shape in SHAPES)
    form = {4: torch.channels_last, 2: torch.contiguous_format}
    return [x.contiguous(memory_format=form[x.ndim]).requires_grad_() for x in drawn]


def labels(n: int = N) -> Tensor:
    return torch.arange(n) % K


def target(seed: int = 5) -> Tensor:
    return torch.rand(1, K, D, generator=torch.Generator().manual_seed(seed))


def states() -> dict[str, Tensor]:
    names = "estimate", "first_moment", "second_moment"
    return {**{name: torch.zeros(1, K, D) for name in names}, "steps": torch.zeros(K)}


def embed(features: Any = None, y: Any = ..., k: Any = K, **options: Any) -> tuple[Tensor, Tensor]:
    features = taps() if features is None else features
    return functional.mean_embedding(features, labels() if y is ... else y, k, **options)


def one_node(
    features: Any = None, y: Any = ..., k: Any = K, goal: Any = None, step: Step | None = None
) -> Tensor:
    features = taps() if features is None else features
    goal = target() if goal is None else goal
    y = labels() if y is ... else y
    return matching.loss(named("cpu"), features, y, k, Bound(), goal, step or Step())


def adam(**other: Any) -> Step:
    return Step("adam", **{**states(), "lr": 1e-3, **other})


def changed(index: int, change: Callable[[Tensor], Any]) -> list[Any]:
    """Features of which one is another."""
    features: list[Any] = taps()
    features[index] = change(features[index].detach())
    return features


# What `mean_embedding` refuses of features and labels, and so does the loss in one node.
OF_FEATURES: dict[str, tuple[Callable[[], Any], Callable[[], Any], str]] = {
    "one tensor": (lambda: taps()[1], labels, "features: expected a non-empty sequence"),
    "no taps": (list, labels, "features: expected a non-empty sequence"),
    "no tensor": (lambda: changed(1, Tensor.tolist), labels, r"features\[1\]: expected a floating"),
    "integers": (lambda: changed(1, Tensor.long), labels, r"features\[1\]: expected a floating"),
    "one dimension": (lambda: changed(1, lambda f: f[:, 0]), labels, r"features\[1\]: .* floating"),
    "fewer images": (lambda: changed(2, lambda f: f[:-1]), labels, r"features\[2\]: .* n, dtype"),
    "another dtype": (lambda: changed(2, Tensor.double), labels, r"features\[2\]: .* n, dtype"),
    "another device": (lambda: changed(2, lambda f: f.to("meta")), labels, r"features\[2\]: .* n,"),
    "sparse": (lambda: changed(1, Tensor.to_sparse), labels, r"features\[1\]: .* a dense tensor"),
    "other labels": (taps, lambda: labels(N + 1), r"labels: .* expected int64 \[4\]"),
    "int32 labels": (taps, lambda: labels().int(), r"labels: torch.int32 \[4\]"),
    "labels in 2-d": (taps, lambda: labels()[:, None], r"labels: torch.int64 \[4, 1\]"),
    "labels elsewhere": (taps, lambda: labels().to("meta"), "labels: .* on meta, expected"),
    "a label above": (taps, lambda: labels() + 1, r"labels: values from 1 to 3, expected 0\.\.2"),
    "a label below": (taps, lambda: labels() - 1, r"labels: values from -1 to 1, expected 0\.\.2"),
    "no labels": (taps, lambda: None, "labels=None: expected labels"),
}


@pytest.mark.parametrize("call", [embed, one_node])
@pytest.mark.parametrize("case", OF_FEATURES)
def test_refusals_of_features_after_a_good_call(call: Callable[..., Any], case: str) -> None:
    features, y, message = OF_FEATURES[case]
    for _ in range(2):
        call()
        with pytest.raises((TypeError, ValueError), match=message):
            call(features(), y())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": K - 1}, r"labels: values from 0 to 2, expected 0\.\.1"),
        ({"k": float(K)}, r"num_classes=3\.0: expected an int"),
        ({"k": torch.tensor(K)}, "num_classes=tensor"),
        ({"k": 0}, "num_classes=0: expected an int >= 1"),
        ({"moments": (1, 3)}, r"moments=\(1, 3\)"),
        ({"moments": [2, 1]}, r"moments=\[2, 1\]"),
        ({"bound": "cube"}, "bound='cube'"),
        ({"clip": 0.0}, r"clip=0\.0: expected a finite number > 0"),
        ({"clip": -1.0}, r"clip=-1\.0"),
        ({"clip": float("nan")}, "clip=nan"),
        ({"joint_weight": 1.0}, r"joint_weight=1\.0 bounds both moments"),
        ({"joint_weight": -1.0, "moments": (1, 2)}, r"joint_weight=-1\.0: expected a finite"),
        ({"backend": "gpu"}, "backend='gpu'"),
        ({"backend": "cuda"}, "backend='cuda'"),
    ],
)
def test_refusals_of_options_after_a_good_call(options: dict[str, Any], message: str) -> None:
    for _ in range(2):
        embed(moments=options.get("moments", (1,)) if "joint_weight" in options else (1,))
        with pytest.raises(ValueError, match=message):
            embed(**options)


def wide() -> Tensor:
    return torch.zeros(1, K, D + 1)


def apart(k: int = K) -> Tensor:
    return torch.zeros(1, k, 2 * D)[:, :, ::2]


def aliasing(first: str, second: str) -> dict[str, Tensor]:
    """States of which two share their last, or first, numbers."""
    both = torch.zeros(2 * K * D - 3)
    pair = both[: K * D].view(1, K, D), both[K * D - 3 :].view(1, K, D)
    return {first: pair[0], second: pair[1]}


# Other arguments of an estimator's step, and what is said of them.
OF_STATES: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "a wider target": (lambda: {"target": wide()}, "target: "),
    "a target of other classes": (lambda: {"target": torch.zeros(1, K + 1, D)}, "target: "),
    "a target elsewhere": (lambda: {"target": target().to("meta")}, "target: .* on meta"),
    "a wider state": (lambda: {"estimate": wide()}, "estimate: "),
    "a state not in one piece": (lambda: {"first_moment": apart()}, "first_moment: .* contiguous"),
    "steps of other classes": (lambda: {"steps": torch.zeros(K + 1)}, "steps: "),
    "a state that is the target": (
        lambda: dict(zip(("target", "estimate"), 2 * [torch.zeros(1, K, D)], strict=True)),
        "estimate: shares memory with target",
    ),
    "a state within the target": (lambda: aliasing("target", "first_moment"), "shares memory"),
    "states that overlap": (lambda: aliasing("first_moment", "second_moment"), "shares memory"),
}


def adam_loss(**other: Any) -> Tensor:
    goal = other.pop("target", None)
    means, counts = embed()
    goal = target() if goal is None else goal
    return functional.adam_loss(means, counts, goal, **{**states(), **other}, lr=1e-3)


def adam_in_one(**other: Any) -> Tensor:
    goal = other.pop("target", None)
    return one_node(goal=goal, step=adam(**other))


@pytest.mark.parametrize("call", [adam_loss, adam_in_one])
@pytest.mark.parametrize("case", OF_STATES)
def test_refusals_of_states_after_a_good_call(call: Callable[..., Tensor], case: str) -> None:
    other, message = OF_STATES[case]
    for _ in range(2):
        call().backward()
        with pytest.raises(ValueError, match=message):
            call(**other())


def test_refusals_of_means_and_counts_after_a_good_call() -> None:
    means, counts = torch.rand(1, K, D), torch.ones(K)
    for _ in range(2):
        functional.mmd_loss(means, counts, target())
        for bad in ((means[:, :2], counts, target()), (means, counts[:2], target())):
            with pytest.raises(ValueError, match="target: shape"):
                functional.mmd_loss(*bad)
        with pytest.raises(ValueError, match=r"counts: .* on meta"):
            functional.mmd_loss(means, counts.to("meta"), target())


# Calls that are alike in some things only ---------------------------------------------------------


def gradients(features: list[Tensor], **options: Any) -> list[Tensor]:
    means, counts = embed(features, **options)
    value = functional.mmd_loss(means, counts, target())
    return [value.detach(), *torch.autograd.grad(value, features)]


def in_one(features: list[Tensor], step: Step | None = None) -> list[Tensor]:
    value = one_node(features, step=step)
    return [value.detach(), *torch.autograd.grad(value, features)]


@pytest.mark.parametrize("run", [gradients, in_one])
def test_the_same_bits_with_and_without_a_plan(run: Callable[..., list[Tensor]]) -> None:
    cold = run(taps())
    assert len(plans._plans) == 1
    warm = run(taps())
    assert len(plans._plans) == 1
    for a, b in zip(cold, warm, strict=True):
        assert torch.equal(a, b)
    other = run(taps(seed=1))
    assert len(plans._plans) == 1
    plans._plans.clear()
    for a, b in zip(other, run(taps(seed=1)), strict=True):
        assert torch.equal(a, b)


def test_one_node_has_the_bits_of_two() -> None:
    for a, b in zip(gradients(taps()), in_one(taps()), strict=True):
        assert torch.equal(a, b)


def laid_out(f: Tensor, how: str) -> Tensor:
    if how == "planes":
        return f.detach().contiguous()
    if how == "every other":
        return torch.stack([f, f * torch.nan], dim=1).flatten(0, 1).detach()[::2]
    if how == "expanded":  # what lies there several times
        return f.detach()[:1].expand_as(f)
    return torch.cat([f, f * torch.nan], dim=-1).detach()[..., : f.shape[-1]]


@pytest.mark.parametrize("run", [gradients, in_one])
@pytest.mark.parametrize("how", ["planes", "every other", "expanded", "sliced"])
def test_other_strides_have_another_plan(run: Callable[..., list[Tensor]], how: str) -> None:
    run(taps())
    features = [laid_out(f, how).requires_grad_() for f in taps()]
    warm = run(features)
    assert len(plans._plans) == 2
    dense = run([f.detach().clone().contiguous().requires_grad_() for f in features])
    for a, b in zip(warm, dense, strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(warm, run(features), strict=True):
        assert torch.equal(a, b)


def test_dtypes_options_and_classes_have_plans_of_their_own() -> None:
    first = embed()[0]
    assert not torch.equal(embed(clip=2.0)[0], first)
    assert embed(k=K + 1)[0].shape == (1, K + 1, D)
    assert embed(moments=(1, 2))[0].shape == (2, K, D)
    assert embed(moments=[1, 2], bound="ball")[0].shape == (2, K, D)
    assert embed(y=None, k=1)[0].shape == (1, 1, D)
    assert embed(taps(dtype=torch.bfloat16))[0].dtype == torch.float32
    assert embed(taps(dtype=torch.float64))[0].dtype == torch.float64
    assert len(plans._plans) == 8
    assert torch.equal(embed()[0], first)


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("moments", [(1.0, 2), [1, 2.0], (True, 2), torch.tensor([1, 2])])
def test_numbers_that_are_equal_mean_the_same(moments: Any, warm: bool) -> None:
    """A core takes ints alone; which of two calls comes first decides nothing."""
    truth = embed(moments=(1, 2), joint_weight=1.0)[0] if warm else None
    for backend in ("cpu", "torch"):
        found = embed(moments=moments, joint_weight=1, backend=backend)[0]
        if truth is not None:
            torch.testing.assert_close(found, truth)
    bound = Bound.checked(moments, "sphere", 1, 1)
    assert [*map(type, bound.moments)] == [int, int]
    assert [type(bound.clip), type(bound.joint_weight)] == [float, float]


def test_a_device_has_a_plan_of_its_own() -> None:
    embed(backend="torch")
    means, _ = embed([f.to("meta") for f in taps()], labels().to("meta"), backend="torch")
    assert means.device.type == "meta"
    assert len(plans._plans) == 2


def test_the_cache_is_bounded_and_right_for_shapes_that_change_at_every_call() -> None:
    for n in range(1, 2 * plans.MOST):
        features = [torch.rand(n, 3, requires_grad=True), torch.rand(n, 2, 1, 1)]
        means, counts = functional.mean_embedding(features)
        want, _ = functional.mean_embedding(features, backend="torch")
        torch.testing.assert_close(means, want)
        assert counts.tolist() == [n]
        assert len(plans._plans) <= plans.MOST


def test_a_clip_that_changes_at_every_call() -> None:
    for i in range(1, 2 * plans.MOST):
        assert float(embed(clip=float(i))[0].detach().norm()) > 0
    assert len(plans._plans) == plans.MOST


def test_threads_share_the_cache() -> None:
    wrong: list[Any] = []

    def run(seed: int) -> None:
        for n in range(1, 40):
            f = torch.rand(n, 5, generator=torch.Generator().manual_seed(seed + n))
            want = (f / f.norm(dim=1, keepdim=True)).mean(dim=0)
            got = functional.mean_embedding([f])[0].flatten()
            if not torch.allclose(got, want, atol=1e-6):
                wrong.append(n)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert len(plans._plans) <= plans.MOST + len(threads)


def test_no_plan_keeps_a_tensor() -> None:
    features, y, goal = taps(), labels(), target()
    seen = [weakref.ref(t) for t in (*features, y, goal)]
    value = one_node(features, y, goal=goal, step=adam())
    value.backward()
    functional.mmd_loss(*embed(features, y), goal).backward()
    del features, y, goal, value
    gc.collect()
    assert [r() for r in seen] == [None] * len(seen)
    assert len(plans._plans) == 1


class Own(Tensor):
    """A subclass, which may be anything."""


@pytest.mark.parametrize("make", [lambda f: f.detach().as_subclass(Own)])
def test_a_subclass_has_no_plan(make: Callable[[Tensor], Tensor]) -> None:
    want = embed()[0]
    plans._plans.clear()
    got = embed([make(f) for f in taps()])[0]
    assert torch.equal(torch.Tensor(got), want)
    assert not plans._plans


def test_transforms_and_traces_have_no_plan() -> None:
    y, goal, bound = labels(), target(), Bound()

    def two_nodes(*features: Tensor) -> Tensor:
        return functional.mmd_loss(*embed(list(features), y), goal)

    def in_one(*features: Tensor) -> Tensor:
        return matching.loss(named("cpu"), features, y, K, bound, goal, Step())

    features = [f.detach() for f in taps()]
    for total in (two_nodes, in_one):
        value = total(*features)
        with pytest.raises(RuntimeError, match="functorch transforms"):  # warm
            torch.func.grad(total)(*features)
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            torch.vmap(total)(*[f[None] for f in features])
        plans._plans.clear()
        compiled = torch.compile(total, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(*features), value)
        assert not plans._plans


def test_defaults_do_not_matter() -> None:
    want = in_one(taps())
    features, y, goal = taps(), labels(), target()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            value = matching.loss(named("cpu"), features, y, K, Bound(), goal, Step())
            got = torch.autograd.grad(value, features)
    finally:
        torch.set_default_dtype(torch.float32)
    for a, b in zip([value.detach(), *got], want, strict=True):
        assert torch.equal(a, b)


# Between forward and backward ---------------------------------------------------------------------


class Elsewhere(torch.autograd.graph.saved_tensors_hooks):
    """Brings saved features back in another layout, as saving them on another device may."""

    def __init__(self) -> None:
        super().__init__(lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t)


@pytest.mark.parametrize("call", [one_node, lambda f: functional.mmd_loss(*embed(f), target())])
def test_features_that_come_back_in_another_layout(call: Callable[..., Tensor]) -> None:
    features = taps()
    want = torch.autograd.grad(call(features), features)
    with Elsewhere():
        value = call(features)
    for a, b in zip(torch.autograd.grad(value, features), want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("call", [one_node, lambda f: functional.mmd_loss(*embed(f), target())])
def test_features_of_another_shape_by_then_are_refused(call: Callable[..., Tensor]) -> None:
    features = taps()
    value = call(features)
    features[1].data = features[1].data[:2]
    with pytest.raises(ValueError, match=r"features\[1\]: .* n=4"):
        value.backward()


@pytest.mark.parametrize("estimator", ["batch", "adam"])
def test_two_forwards_before_two_backwards_and_the_graph_kept(estimator: str) -> None:
    one, two, step = taps(), taps(seed=1), Step() if estimator == "batch" else adam()
    first, second = one_node(one, step=step), one_node(two, step=step)
    late = torch.autograd.grad(second, two, retain_graph=True)
    again = torch.autograd.grad(second, two)
    early = torch.autograd.grad(2 * first, one)
    for a, b in zip(late, again, strict=True):
        assert torch.equal(a, b)
    step = Step() if estimator == "batch" else adam()
    for features, got, factor in ((one, early, 2), (two, late, 1)):
        want = in_one(features, step)[1:]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, factor * b)


def test_one_node_cannot_be_differentiated_twice_and_says_so() -> None:
    features = taps()
    (gradient, *_) = torch.autograd.grad(one_node(features), features, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()


def test_features_changed_in_place_are_noticed() -> None:
    features = taps()
    value = one_node(features)
    with torch.no_grad():
        features[0].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_a_step_without_update_moves_nothing_and_one_with_it_is_counted() -> None:
    kept = states()
    one_node(step=adam(**kept, update=False))
    assert not any(t.any() or t._version for t in kept.values())
    one_node(step=adam(**kept))
    assert all(t.any() and t._version == 1 for t in kept.values())


def test_features_that_need_no_gradient_get_none() -> None:
    features = taps()
    features[1].requires_grad_(False)
    one_node(features).backward()
    assert features[1].grad is None
    assert features[0].grad is not None
    assert features[0].grad.any()
    assert not one_node([f.detach() for f in taps()]).requires_grad


# The module ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problem() -> tuple[Any, Any]:
    encoder = encoder_of("vgg").float()
    return encoder, release_of(encoder)


def images(seed: int = 0) -> Tensor:
    size = 12, 3, 8, 8
    return torch.rand(size, generator=torch.Generator().manual_seed(seed), requires_grad=True)


@pytest.mark.parametrize("estimator", ["batch", "ema", "adam"])
@pytest.mark.parametrize("inject", [False, True])
def test_the_module_in_one_node_and_in_two(
    problem: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, estimator: str, inject: bool
) -> None:
    encoder, release = problem
    y = torch.arange(12) % release.metadata.num_classes

    def run() -> list[Tensor]:
        loss, found = MMDLoss(release, encoder, estimator=estimator, inject=inject), []
        for seed in range(3):
            loss.train(seed < 2)
            x = images(seed)
            value = loss(x, y)
            value.backward()
            found += [value.detach(), x.grad]
        return [*found, *loss.by_class.buffers()]

    one = run()
    monkeypatch.setattr(MMDLoss, "_needs_means", lambda *_: True)
    for a, b in zip(one, run(), strict=True):
        assert torch.equal(a, b)


def test_refusals_of_the_module_after_a_good_call(problem: tuple[Any, Any]) -> None:
    encoder, release = problem
    loss, k = MMDLoss(release, encoder), release.metadata.num_classes
    y = torch.arange(12) % k
    wrong: list[tuple[Any, Any, str]] = [
        (images(), y.int(), "labels: torch.int32"),
        (images(), y[:-1], "labels: .* expected int64"),
        (images(), y + 1, f"labels: values from 1 to {k}"),
        (images(), None, "labels=None: the release is labelled"),
        (images()[:, :2], y, "images"),
    ]
    for x, labels, message in wrong * 2:
        loss(images(), y).backward()
        with pytest.raises(ValueError, match=message):
            loss(x, labels)
    loss(images(), y).backward()
    loss.by_class.target = torch.zeros(1, k, 3)
    with pytest.raises(ValueError, match="target: "):
        loss(images(), y)


def test_the_module_takes_state_of_another_dtype_or_with_a_gradient(
    problem: tuple[Any, Any],
) -> None:
    encoder, release = problem
    loss = MMDLoss(release, encoder, estimator="batch")
    y = torch.arange(12) % release.metadata.num_classes
    want = loss(images(), y)
    loss.by_class.target = loss.by_class.target.requires_grad_()
    value = loss(images(), y)
    torch.testing.assert_close(value, want)
    value.backward()
    assert loss.by_class.target.grad is not None
    loss.by_class.target = loss.by_class.target.detach().double()
    torch.testing.assert_close(loss(images(), y), want)
