"""What every backend must compute: one suite of checks, for tests and for GPUs alike.

A check runs one operation through the public API on one backend and device, and compares what it
gives with the operation's definition:

- values and gradients with `dpmmd.reference` in float64. An error may be twice (of a gradient three
  times) that of the same definition in float32, and what TOLERANCES adds for the backend;
- integer sums, and those of a whole release, with `dpmmd.privacy.sums` in plain torch, bit for bit.

Inputs are half zeros, as an encoder's are. Memory that nothing was written to is NaN. A check that
fails raises `Wrong`, with a number. Nothing here needs pytest: tests/core/test_conformance.py runs
the suite on the CPU, and ``make bench-gpu`` on a GPU.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

import dpmmd
from dpmmd import backends, functional, injection, reference
from dpmmd._contract.protocol import Step
from dpmmd._cores import named
from dpmmd._ops import matching
from dpmmd.bounds import BOUNDS, MOMENTS, Bound
from dpmmd.encoders import Encoder, Rectified, StagedBackbone
from dpmmd.encoders.layers import Convolution, MaxPool
from dpmmd.nn import ESTIMATORS, MMDLoss
from dpmmd.privacy.sums import GUARD, PrivateSums

BACKENDS = tuple(name for name in backends.BACKENDS if name != "auto")
EMBEDDING, ESTIMATOR, MATCHING = "mean_embedding", "estimator", "matching"
SUMS, RELEASE = "sums", "release"
STEP, INJECTED, IN_PARTS = "step", "step, injected", "step, in parts"
CPU = torch.device("cpu")
FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64

EPSILON = 2.0**-23
TRUNCATED = 2.0**-7  # Triton's interpreter cuts bfloat16 off instead of rounding
ON_A_DEVICE = 4 * EPSILON  # division on a GPU is not correctly rounded: 2 ulp, once or twice


class Wrong(AssertionError):
    """A check that failed, and by how much."""


class On(NamedTuple):
    """What runs an operation, and where."""

    backend: str
    device: torch.device = CPU


PLAINLY = On("torch")  # the definition of integer sums


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        operation: one of those above.
        name: the rest of what it is.
        compute: raises `Wrong`, or whatever the operation raises.
        dtype: of the features.
        backends: which can run it.
        short: whether it is of the few that together meet every operation and kind of bound.
    """

    operation: str
    name: str
    compute: Callable[[On], object]
    dtype: torch.dtype = FLOAT32
    backends: tuple[str, ...] = BACKENDS
    short: bool = False

    def run(self, backend: str, device: torch.device = CPU) -> None:
        self.compute(On(backend, device))

    def __str__(self) -> str:
        return f"{self.operation}: {self.name}"


class Tolerance(NamedTuple):
    """How far results may be from float64, beyond a multiple of what plain float32 is.

    Attributes:
        means, gradient: relative L2 distance.
        bfloat16: relative distance of one number of a bfloat16 gradient.
    """

    means: float = 2e-7
    gradient: float = EPSILON
    bfloat16: float = 2.0**-8


TOLERANCES = {
    "torch": Tolerance(means=1e-7, gradient=1e-7),
    "cpu": Tolerance(),
    "cuda": Tolerance(),
    "triton": Tolerance(means=EPSILON, bfloat16=TRUNCATED),
}


def tolerance(on: On) -> Tolerance:
    """Of the backend where it is tested without its device, or on a device."""
    if on.device.type == "cpu":
        return TOLERANCES[on.backend]
    return Tolerance(ON_A_DEVICE, ON_A_DEVICE)


# Comparisons --------------------------------------------------------------------------------------


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Relative L2 distance of all together; NaN if anything is."""
    x, y = (torch.cat([t.double().flatten() for t in ts]) for ts in (a, b))
    return float((x - y).norm() / y.norm().clamp(min=1e-30))


def require(true: bool, what: str) -> None:
    if not true:
        raise Wrong(what)


def near(what: str, got: Sequence[Tensor], truth: Sequence[Tensor], allowed: float) -> None:
    """All together, in relative L2 distance."""
    error = distance(got, truth)
    require(error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}")  # false for NaN


def near_each(
    what: str, got: Sequence[Tensor], truth: Sequence[Tensor], relative: float, absolute: float
) -> None:
    """Number by number."""
    for a, b in zip(got, truth, strict=True):
        excess = (a.double() - b.double()).abs() / (absolute + relative * b.double().abs())
        worst = float(excess.max()) if a.numel() else 0.0
        require(worst <= 1, f"{what}: a number's error is {worst:.2g} times what is allowed")


def same_bits(what: str, got: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    for a, b in zip(got, again, strict=True):
        require(torch.equal(a, b), f"{what} differ, or are NaN")


@contextmanager
def poisoned() -> Iterator[None]:
    """Within the block memory that nothing was written to is NaN, or the greatest integer."""
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]  # type: ignore[attr-defined]


@contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Within the block float32 convolutions and products may, or may not, use TF32."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that lies in memory as x does: `to` would make views dense."""
    base = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device, copy=True)
    return base.as_strided(x.shape, x.stride(), x.storage_offset())


# Batches of features ------------------------------------------------------------------------------

Shape = tuple[int, ...]
LAYOUTS = ("channels-last", "planes", "views", "sliced", "transposed", "every other", "halves")


@dataclass(frozen=True)
class Batch:
    """Features and labels of a batch.

    Attributes:
        n, shapes, dtype: n images, a tap [n, *shape] for each shape.
        classes: K, of which the last is absent if K > 1; None: one class, without labels.
        layout: how the taps lie in memory, one of LAYOUTS.
        seed: of the numbers.
    """

    n: int
    shapes: tuple[Shape, ...]
    dtype: torch.dtype = FLOAT32
    classes: int | None = None
    layout: str = "channels-last"
    seed: int = 0

    @property
    def dim(self) -> int:
        return sum(map(math.prod, self.shapes))

    def features(self) -> list[Tensor]:
        rng = torch.Generator().manual_seed(self.seed)
        drawn = (torch.randn(self.n, *s, generator=rng).relu() for s in self.shapes)
        return [laid_out(x.to(self.dtype), self.layout) for x in drawn]

    def labels(self) -> Tensor | None:
        if self.classes is None:
            return None
        rng = torch.Generator().manual_seed(self.seed + 1)
        return torch.randint(0, max(1, self.classes - 1), (self.n,), generator=rng)

    def upstream(self, moments: Sequence[int]) -> Tensor:
        """The gradient [M, K, D] that a backward pass starts from."""
        rng = torch.Generator().manual_seed(self.seed + 2)
        return torch.randn(len(moments), self.classes or 1, self.dim, generator=rng)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in another layout; what lies between them is NaN."""
    gap, maps = torch.full_like(x, math.nan), x.ndim == 4
    form = torch.channels_last if maps else torch.contiguous_format
    if layout == "planes":
        return x.contiguous()
    if layout == "views":  # rows apart, and off 16 bytes
        wide = torch.cat([torch.full_like(x[:, :1], math.nan), x, x[:, :1] * math.nan], dim=1)
        return wide[:, 1:-1]
    if layout == "sliced":  # neither rows nor planes in one piece
        return torch.cat([x, gap], dim=-1)[..., : x.shape[-1]]
    if layout == "transposed" and maps:
        return x.permute(0, 3, 2, 1).contiguous().permute(0, 3, 2, 1)
    if layout == "every other":
        return torch.stack([x, gap], dim=1).flatten(0, 1).contiguous(memory_format=form)[::2]
    if layout == "halves":
        return torch.stack([x, gap], dim=1)[:, 0]
    return x.contiguous(memory_format=form)


def clipped(fs: Sequence[Tensor], bound: Bound) -> Bound:
    """The bound with a radius for which balls clip about half of the vectors, none at the edge."""
    flat = [f.flatten(1).double() for f in fs]
    if bound.joint:
        flat += [bound.weight * f * f for f in flat]
    norms = torch.cat(flat, dim=1).norm(dim=1)
    norms = norms[norms > 0]
    return replace(bound, clip=1.01 * float(norms.median()) if len(norms) else 1.0)


def keywords(bound: Bound) -> dict[str, Any]:
    """The bound as the public API takes it."""
    return {
        "moments": bound.moments,
        "bound": bound.kind,
        "clip": bound.clip,
        "joint_weight": bound.joint_weight,
    }


# Class means and their gradient -------------------------------------------------------------------


class Embedded(NamedTuple):
    means: Tensor
    counts: Tensor
    gradients: tuple[Tensor, ...]

    @property
    def all(self) -> list[Tensor]:
        return [self.means, self.counts, *self.gradients]


def embed(batch: Batch, fs: Sequence[Tensor], bound: Bound, on: On) -> Embedded:
    """What the backend makes of features; results on the CPU."""
    taps = [moved(f, on.device).requires_grad_() for f in fs]
    y, upstream = batch.labels(), batch.upstream(bound.moments)
    with poisoned():
        means, counts = functional.mean_embedding(
            taps,
            None if y is None else y.to(on.device),
            batch.classes or 1,
            backend=on.backend,
            **keywords(bound),
        )
        gradients = torch.autograd.grad(means, taps, upstream.to(on.device, means.dtype))
    return Embedded(means.detach().cpu(), counts.cpu(), tuple(g.cpu() for g in gradients))


def define(batch: Batch, fs: Sequence[Tensor], bound: Bound, dtype: torch.dtype) -> Embedded:
    """What the definition makes of features without NaN, in another dtype."""
    taps = [f.to(dtype).requires_grad_() for f in fs]
    means, counts = reference.mean_embedding(
        taps, batch.labels(), batch.classes or 1, **keywords(bound)
    )
    gradients = torch.autograd.grad(means, taps, batch.upstream(bound.moments).to(dtype))
    return Embedded(means.detach(), counts, tuple(g.nan_to_num() for g in gradients))


def judge(batch: Batch, fs: Sequence[Tensor], bound: Bound, got: Embedded, on: On) -> None:
    """Compares a backend's results with the definition's."""
    truth = define(batch, fs, bound, FLOAT64)
    require(torch.equal(got.counts.double(), truth.counts), f"counts {got.counts.tolist()}")
    require(not bool(got.means[:, truth.counts == 0].any()), "an absent class has a mean")
    for g, f in zip(got.gradients, fs, strict=True):
        require(g.shape == f.shape and g.dtype == f.dtype, f"gradient {g.dtype} {list(g.shape)}")
    if batch.dtype == FLOAT64:
        near_each("means", [got.means], [truth.means], 1e-12, 1e-13)
        near_each("gradient", got.gradients, truth.gradients, 1e-11, 1e-12)
        return
    require(got.means.dtype == FLOAT32, f"means {got.means.dtype}")
    rough, slack = define(batch, fs, bound, FLOAT32), tolerance(on)
    allowed = 2 * distance([rough.means], [truth.means]) + slack.means
    near("means", [got.means], [truth.means], allowed)
    plain = [g.to(batch.dtype) for g in rough.gradients]
    allowed = 3 * distance(plain, truth.gradients) + slack.gradient
    one = 3e-5 if batch.dtype == FLOAT32 else slack.bfloat16
    allowed = max(allowed, one) if batch.dtype == BFLOAT16 else allowed
    near("gradient", got.gradients, truth.gradients, allowed)
    # Of all taps: the gradient of a tap of few columns is what nearly equal terms leave; those of
    # squares are the most alike.
    few = bound.per_tap and bound.moments == (2,) and min(map(math.prod, batch.shapes)) < 8
    most = max((float(g.abs().max()) for g in truth.gradients if g.numel()), default=0.0) or 1.0
    scale = float(truth.means.abs().max()) or 1.0
    near_each("means", [got.means], [truth.means], 2e-5, 2e-6 * scale)
    near_each("gradient", got.gradients, truth.gradients, one, one * most / (1 if few else 8))
    _no_row_lost(got.gradients, truth.gradients)


def _no_row_lost(gradients: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    mine, true = (
        torch.cat([g.flatten(1).double() for g in gs], dim=1) for gs in (gradients, truth)
    )
    norms = true.norm(dim=1)
    if len(norms):
        rows = mine.any(dim=1)[norms > 1e-3 * norms.max()]
        require(bool(rows.all()), "a row of the gradient is 0")
    usable = true.abs() > EPSILON * float(true.abs().max()) if true.numel() else true != 0
    lost = (mine[usable] == 0).double().mean().nan_to_num()
    require(float(lost) < 1e-3, f"of the gradient {float(lost):.1%} are 0 and should not be")


def embedding(batch: Batch, bound: Bound, twice: bool, on: On) -> Embedded:
    """Values and gradients against the definition; a second time the same bits."""
    fs = batch.features()
    bound = clipped(fs, bound)
    got = embed(batch, fs, bound, on)
    if twice:
        same_bits("two runs", got.all, embed(batch, fs, bound, on).all)
    judge(batch, fs, bound, got, on)
    for g, f in zip(got.gradients, fs, strict=True):
        forms = (torch.contiguous_format, torch.channels_last)[: 2 if f.ndim == 4 else 1]
        for form in forms if on.backend != "torch" else ():
            alike = g.is_contiguous(memory_format=form) or not f.is_contiguous(memory_format=form)
            require(alike, f"gradient of strides {g.stride()}, features of {f.stride()}")
    return got


def unusable_rows(batch: Batch, bound: Bound, on: On) -> None:
    """Rows of zeros or with a NaN are as zero and have no gradient; no other is the worse."""
    clean = batch.features()
    bound = clipped(clean, bound)
    spoiled = [torch.zeros(batch.n, dtype=torch.bool) for _ in clean]
    for row, value in ((1, 0.0), (4, math.nan), (6, math.inf), (8, -math.inf)):
        for f, bad in zip(clean, spoiled, strict=True):
            f[row], bad[row] = value, True
    clean[-1][3].view(-1)[-1] = math.nan  # one number alone
    for bad in spoiled[-1:] if bound.per_tap else spoiled:
        bad[3] = True
    fs = [f.clone(memory_format=torch.preserve_format) for f in clean]
    for f, bad in zip(clean, spoiled, strict=True):
        f[bad] = 0
    got = embed(batch, fs, bound, on)
    same_bits("with and without rows of no use", got.all, embed(batch, clean, bound, on).all)
    for g, bad in zip(got.gradients, spoiled, strict=True):
        require(not bool(g[bad].any()), "a row of no use has a gradient")
    judge(batch, clean, bound, got, on)


def layouts(batch: Batch, on: On) -> None:
    """The same numbers in every layout give the same means, and gradients in that layout."""
    bound, found = Bound((1, 2)), []
    for layout in LAYOUTS:
        found.append(embedding(replace(batch, layout=layout), bound, False, on))
    unit = 2 * torch.finfo(batch.dtype).eps
    for other in found[1:]:
        near_each("means", [other.means], [found[0].means], 1e-6, 1e-7)
        near_each("gradient", other.gradients, found[0].gradients, unit, 1e-7)


def no_images(batch: Batch, on: On) -> None:
    got = embed(batch, batch.features(), Bound((1, 2)), on)
    shape = (2, batch.classes or 1, batch.dim)
    require(got.means.shape == shape and not bool(got.means.any()), "means of no images")
    require(got.counts.tolist() == [0.0] * shape[1], f"counts {got.counts.tolist()}")
    for g, f in zip(got.gradients, batch.features(), strict=True):
        require(g.shape == f.shape, f"gradient {list(g.shape)} of features {list(f.shape)}")


def images_alone(batch: Batch, on: On) -> None:
    """A batch's means are those of batches of one."""
    fs, y = batch.features(), batch.labels()
    assert y is not None
    assert batch.classes is not None
    run = partial(functional.mean_embedding, num_classes=batch.classes, backend=on.backend)
    means, counts = run([f.to(on.device) for f in fs], y.to(on.device))
    total = torch.zeros_like(means)
    for i in range(batch.n):
        one, _ = run([f[i : i + 1].to(on.device) for f in fs], y[i : i + 1].to(on.device))
        require(abs(float(one.norm()) - 1) < 1e-6, f"an image's norm is {float(one.norm())}")
        total += one
    means *= counts[None, :, None]
    near("sum of images", [means.cpu()], [total.cpu()], 1e-12 if batch.dtype == FLOAT64 else 1e-6)


def overflow(batch: Batch, on: On) -> None:
    """A square beyond float32 leaves the first moment alone."""
    fs, bound = [f * 1e10 for f in batch.features()], Bound((1, 2))
    got = embed(batch, fs, bound, on)
    truth = define(batch, fs, replace(bound, moments=(1,)), FLOAT64)
    near_each("means", [got.means[:1]], [truth.means], 1e-6, 1e-7)
    require(not bool(got.means[1].any()), "the second moment is not 0")
    require(all(bool(g.isfinite().all()) for g in got.gradients), "a gradient is not finite")


def small_and_large(moments: tuple[int, ...], on: On) -> None:
    """The scale of a small vector is large; its cube overflows float32."""
    batch = Batch(4, ((5,), (3,)))
    for scale in (1e-12, 1e-7, 1e-3, 1e3, 1e4):  # below 1e-8 the squares themselves leave float32
        fs = [f * (max(scale, 1e-8) if 2 in moments else scale) for f in batch.features()]
        gradient = torch.cat(embed(batch, fs, Bound(moments), on).gradients, dim=1)
        require(bool(gradient.isfinite().all()), f"features of {scale}: a gradient is not finite")
        require(bool(gradient.any()), f"features of {scale}: no gradient")


def one_tap_wanted(on: On) -> None:
    """A tap that needs no gradient gets none, and the other's is the same."""
    batch = Batch(4, ((5,), (2, 3, 3)))
    whole = embed(batch, batch.features(), Bound(), on)
    taps = [f.to(on.device) for f in batch.features()]
    taps[1].requires_grad_()
    with poisoned():
        means, _ = functional.mean_embedding(taps, backend=on.backend)
        means.backward(batch.upstream((1,)).to(on.device))
    require(taps[0].grad is None, "a gradient that nobody asked for")
    assert taps[1].grad is not None
    same_bits("gradients of one tap and of all", [taps[1].grad.cpu()], whole.gradients[1:])


# Estimators of target - means ---------------------------------------------------------------------

STATES = {"batch": (), "ema": ("estimate",), "adam": ("estimate", "first_moment", "second_moment")}
COUNTS = ([2.0, 0.0, 5.0], [3.0, 3.0, 0.0], [0.0, 1.0, 1.0], [1.0, 0.0, 2.0], [1.0, 2.0, 3.0])


class Given(NamedTuple):
    """What a step gets. It moves the state, if `update`."""

    means: Tensor
    counts: Tensor
    target: Tensor
    state: dict[str, Tensor]
    update: bool


class Stepped(NamedTuple):
    """Value and gradient of a step, the sum of the absolute values that the value is the sum of."""

    value: Tensor
    gradient: Tensor
    size: float


@dataclass(frozen=True)
class Estimator:
    """One of the three, and what it starts from.

    Attributes:
        name: a key of STATES.
        rates: decay, lr or numbers.
        shape: [M, K, D].
        fresh: whether the state is zero, or random.
    """

    name: str
    rates: Mapping[str, Any]
    shape: tuple[int, int, int]
    fresh: bool = True

    def define(self, given: Given) -> Stepped:
        """By the formulas."""
        means, counts, target, state, update = given
        present = (counts > 0).to(means.dtype)[:, None]
        d = (target - means) * present
        if not state:
            return Stepped(d.square().sum(), -2 * d, float(d.square().sum()))
        v = state["estimate"]
        if update:
            state["steps"] += present[:, 0]
        t = state["steps"].clamp(min=1)[:, None]
        if self.name == "ema":
            v += update * (1 - self.rates["decay"]) * present * (d - v)
            v = v / (1 - self.rates["decay"] ** t)
        elif update:
            first, second = state["first_moment"], state["second_moment"]
            slope = 2 * (v - d) / (self.rates.get("numbers") or d.numel())
            first += 0.1 * present * (slope - first)
            second += 0.001 * present * (slope**2 - second)
            root = (second / (1 - 0.999**t)).sqrt() + 1e-8
            v -= self.rates["lr"] * present * first / (1 - 0.9**t) / root
        return Stepped((v * d).sum(), -v * present, float((v * d).abs().sum()))

    def compute(self, given: Given, on: On) -> Stepped:
        """By the library; the gradient is that of twice the value, halved."""
        means, counts, target, state, update = given
        function = {"batch": "mmd_loss"}.get(self.name, f"{self.name}_loss")
        more = {**state, **self.rates, "update": update} if state else {}
        means.requires_grad_()
        with poisoned():
            value = getattr(functional, function)(means, counts, target, **more, backend=on.backend)
            (gradient,) = torch.autograd.grad(2 * value, means)
        require(value.shape == (), f"value of shape {list(value.shape)}")
        return Stepped(value.detach().cpu(), gradient.cpu() / 2, 0.0)

    def run(
        self, step: Callable[[Given], Stepped], dtype: torch.dtype, device: torch.device = CPU
    ) -> list[tuple[Stepped, dict[str, Tensor]]]:
        """Five steps, the last two without update; classes come and go. With the states after."""
        rng = torch.Generator().manual_seed(0)

        def made(values: Tensor) -> Tensor:
            return values.to(device, dtype, copy=True)

        drawn = {name: torch.rand(self.shape, generator=rng) for name in STATES[self.name]}
        if drawn:
            drawn["steps"] = torch.arange(3.0)[: self.shape[1]] ** 2
        state = {name: made(x * 0 if self.fresh else x) for name, x in drawn.items()}
        found = []
        for i, counts in enumerate(COUNTS):
            means, target = (made(torch.randn(self.shape, generator=rng)) for _ in range(2))
            present = made(torch.tensor(counts[: self.shape[1]]))
            stepped = step(Given(means, present, target, state, i < 3))
            found.append((stepped, {name: x.cpu().clone() for name, x in state.items()}))
        return found


def estimator_steps(of: Estimator, dtype: torch.dtype, on: On) -> None:
    """Values, gradients and states against float64; what is not to move does not."""
    ours = partial(of.compute, on=on)
    got, again = (of.run(ours, dtype, on.device) for _ in range(2))
    truth, rough = (of.run(of.define, t) for t in (FLOAT64, FLOAT32))
    # Two roundings, where plain torch happens to make none.
    slack = 2 * (EPSILON if on.device.type == "cpu" else ON_A_DEVICE)
    for i, ((mine, state), (other, after)) in enumerate(zip(got, again, strict=True)):
        same_bits("two runs", [*mine[:2], *state.values()], [*other[:2], *after.values()])
        absent = torch.tensor(COUNTS[i][: of.shape[1]]) == 0
        require(not bool(mine.gradient[:, absent].any()), f"step {i}: an absent class's gradient")
        if i > 0:
            _kept(i, got[i - 1][1], state, absent)
        (true, states), (plain, rough_states) = truth[i], rough[i]
        size = true.size or 1.0  # the terms of the value may cancel
        values = [1 + (x.value - true.value) / size for x in (mine, plain, true)]
        pairs = [("value", 2, values[0], values[1], values[2])]
        pairs += [("gradient", 3, mine.gradient, plain.gradient, true.gradient)]
        pairs += [(name, 2, x, rough_states[name], states[name]) for name, x in state.items()]
        for name, times, a, b, c in pairs:
            allowed = min(times * distance([b], [c]), 1e-4) + slack
            near(f"step {i}, {name}", [a], [c], 1e-12 if dtype == FLOAT64 else allowed)
            if of.fresh and name != "value":
                near_each(f"step {i}, {name}", [a], [c], 2e-5, 2e-6)


def _kept(step: int, before: dict[str, Tensor], after: dict[str, Tensor], absent: Tensor) -> None:
    rows = absent if step < 3 else torch.ones_like(absent)
    for name, x in after.items():
        was, now = (t[:, rows] if t.ndim == 3 else t[rows] for t in (before[name], x))
        require(torch.equal(was, now), f"step {step}: {name} moved where it should not")


def no_columns(on: On) -> None:
    nothing, steps = torch.zeros(1, 3, 0, device=on.device), torch.zeros(3, device=on.device)
    estimate, counts = nothing.clone(), torch.tensor(COUNTS[0], device=on.device)
    value = functional.ema_loss(
        nothing, counts, nothing, estimate=estimate, steps=steps, decay=0.5, backend=on.backend
    )
    require(float(value) == 0, f"value {float(value)}")
    require(steps.tolist() == [1.0, 0.0, 1.0], f"steps {steps.tolist()}")


# The loss of features in one step -----------------------------------------------------------------


class Losses(NamedTuple):
    """Of three steps: values, gradients in the taps, and the states after each."""

    values: list[Tensor]
    gradients: list[list[Tensor]]
    states: list[dict[str, Tensor]]


@dataclass(frozen=True)
class Matching:
    """Three steps of an estimator on the features of three batches.

    Attributes:
        batch: the first; the others have other numbers, and classes come and go.
        bound: without its radius.
        name, rates: as of `Estimator`.
    """

    batch: Batch
    bound: Bound
    name: str
    rates: Mapping[str, Any]

    def batches(self) -> Iterator[tuple[Batch, Bound]]:
        for seed in (10, 20, 30):
            batch = replace(self.batch, seed=seed)
            yield batch, clipped(batch.features(), self.bound)

    def start(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Target and state; not zero, where the sign of a rounding error is a step of Adam's."""
        rng = torch.Generator().manual_seed(3)
        k = self.batch.classes or 1
        shape = len(self.bound.moments), k, self.batch.dim
        drawn = {name: torch.rand(shape, generator=rng) for name in STATES[self.name]}
        if drawn:
            drawn["steps"] = torch.arange(1.0, 1.0 + k)
        return torch.randn(shape, generator=rng), drawn

    def run(
        self,
        step: Callable[[Batch, Bound, Tensor, dict[str, Tensor], bool], tuple[Tensor, Any]],
        dtype: torch.dtype,
        device: torch.device = CPU,
    ) -> Losses:
        """All the steps, the last without update, and only then their gradients, the last first."""
        target, state = self.start()
        target = target.to(device, dtype)
        state = {name: x.to(device, dtype, copy=True) for name, x in state.items()}
        values, pending, states = [], [], []
        for i, (batch, bound) in enumerate(self.batches()):
            value, taps = step(batch, bound, target, state, i < 2)
            values.append(value.detach().cpu())
            pending.append((value, taps))
            states.append({name: x.cpu().clone() for name, x in state.items()})
        gradients = [torch.autograd.grad(3 * v, taps) for v, taps in reversed(pending)]
        return Losses(values, [[g.cpu() for g in gs] for gs in reversed(gradients)], states)

    def compute(
        self, batch: Batch, bound: Bound, target: Tensor, state: dict[str, Tensor], update: bool,
        on: On,
    ) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
        """By the library."""
        taps = [moved(f, on.device).requires_grad_() for f in batch.features()]
        y = batch.labels()
        rates = {name: rate for name, rate in self.rates.items() if state}
        step = Step(self.name, **state, **rates, update=update)
        with poisoned():
            value = matching.loss(
                named(on.backend),
                taps,
                None if y is None else y.to(on.device),
                batch.classes or 1,
                bound,
                target,
                step,
            )
        return value, taps

    def define(
        self, batch: Batch, bound: Bound, target: Tensor, state: dict[str, Tensor], update: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """By the formulas, in the dtype of ``target``."""
        taps = [f.to(target.dtype).requires_grad_() for f in batch.features()]
        k = batch.classes or 1
        means, counts = reference.mean_embedding(taps, batch.labels(), k, **keywords(bound))
        estimator = Estimator(self.name, self.rates, (1, 1, 1))
        given = Given(means.detach(), counts, target, state, update)
        value, gradient, _ = estimator.define(given)
        return value + (gradient * (means - means.detach())).sum(), taps


def matched(of: Matching, twice: bool, on: On) -> None:
    """Values, gradients in the taps and states against float64; a second time the same bits."""
    ours = partial(of.compute, on=on)
    got = of.run(ours, FLOAT32, on.device)
    again = of.run(ours, FLOAT32, on.device) if twice else got
    truth, rough = (of.run(of.define, dtype) for dtype in (FLOAT64, FLOAT32))
    slack = tolerance(on)
    for i in range(3):
        same_bits("two runs", got.gradients[i], again.gradients[i])
        same_bits("two runs", list(got.states[i].values()), list(again.states[i].values()))
        allowed = 3 * distance([rough.values[i]], [truth.values[i]]) + 1e-5  # terms may cancel
        near(f"step {i}, value", [got.values[i]], [truth.values[i]], allowed)
        plain = [g.to(of.batch.dtype) for g in rough.gradients[i]]
        allowed = 3 * distance(plain, truth.gradients[i]) + 4 * slack.gradient
        if of.batch.dtype == BFLOAT16:
            allowed = max(allowed, slack.bfloat16)
        near(f"step {i}, gradient", got.gradients[i], truth.gradients[i], allowed)
        _no_row_lost(got.gradients[i], truth.gradients[i])
        for name, x in got.states[i].items():
            allowed = 3 * distance([rough.states[i][name]], [truth.states[i][name]]) + 4 * EPSILON
            near(f"step {i}, {name}", [x], [truth.states[i][name]], allowed)


# Integer class sums -------------------------------------------------------------------------------

LIMIT = 1 << 30


@dataclass(frozen=True)
class Rows:
    """Features [n, width] of a release's batch, of many sizes.

    Attributes:
        signed: whether they may be below 0 (those of the images from 8 on never are).
        hostile: images 1 to 6 have a 0, a NaN, infinities, 1e-42 and 3e38; all of image 1 is 0.
    """

    n: int
    widths: tuple[int, ...]
    dtype: torch.dtype = FLOAT32
    signed: bool = False
    hostile: bool = True
    seed: int = 0

    def features(self) -> list[Tensor]:
        rng = torch.Generator().manual_seed(self.seed)
        scale = 10.0 ** torch.randint(-6, 7, (self.n, 1), generator=rng)
        found = []
        for width in self.widths:
            f = torch.randn(self.n, width, generator=rng, dtype=FLOAT64)
            f[8 if self.signed else 0 :] = f[8 if self.signed else 0 :].relu()
            found.append((f * scale).to(self.dtype))
        if self.hostile and self.n > 6:
            values = (0.0, math.nan, math.inf, -math.inf, 1e-42, 3e38)
            for i, value in enumerate(values):
                found[i % len(found)][i + 1, -1] = value
            for f in found:
                f[1] = 0.0
        return found


class Private(NamedTuple):
    """A batch of a release, and what `PrivateSums.add` is told of its features."""

    features: list[Tensor]
    labels: Tensor
    valid: Tensor
    limits: Tensor
    options: dict[str, Any]

    def part(self, i: int) -> Private:
        """One image of it."""
        one = slice(i, i + 1)
        fs = [f[one] for f in self.features]
        return Private(fs, self.labels[one], self.valid[one], self.limits[one], self.options)

    def sums(self, on: On, batches: int = 1) -> tuple[Tensor, Tensor]:
        """Of so many equal batches, by 3 classes; and the one row of taps that share it."""
        shared, moments = self.options.get("shared_taps", 0), len(self.options["bound"].moments)
        own, common = (
            moments * sum(f.shape[1] for f in part)
            for part in (self.features[shared:], self.features[:shared])
        )
        private = PrivateSums(3, own, common, on.device)
        with backends.use(on.backend), poisoned():
            for _ in range(batches):
                fs = [moved(f, on.device) for f in self.features]
                given = (t.to(on.device) for t in (self.labels, self.valid, self.limits))
                private.add(fs, *given, **self.options)
        return private.take()


def one_image(f: Tensor, limit: int, **options: Any) -> Private:
    return Private(
        [f], torch.zeros(1, dtype=torch.int64), torch.tensor([True]), torch.tensor([limit]), options
    )


def same_integers(got: Sequence[Tensor], truth: Sequence[Tensor]) -> None:
    for mine, true in zip(got, truth, strict=True):
        wrong = int((mine != true).sum())
        require(wrong == 0, f"{wrong} of {true.numel()} integers differ")


def sums(rows: Rows, options: dict[str, Any], limit: int, batches: int, on: On) -> None:
    """Of so many equal batches, bit for bit the definition's."""
    y = torch.arange(rows.n) % 3
    y[y == 1] = 0  # class 1 is absent
    limits = torch.full((rows.n,), limit)
    limits[::5] //= 3
    if rows.n > 12:
        limits[11], limits[12] = 12345, 0
    private = Private(rows.features(), y, torch.arange(rows.n) % 8 != 7, limits, options)
    truth = private.sums(PLAINLY)
    same_integers(private.sums(on, batches), [batches * t for t in truth])
    require(rows.n == 0 or bool(truth[0].any()), "the check itself adds nothing")
    require(not bool(truth[0][1].any()), "an absent class has a sum")


def values_at_the_edges(bound: Bound, on: On) -> None:
    """Whole taps of what is no number, tiny or huge."""
    edges = (0.0, math.nan, math.inf, -math.inf, 3e38, 1e-38, 1e-45)
    n = 2 * len(edges) + 1
    fs = Rows(n, (18, 5), hostile=False).features()
    for i, value in enumerate(edges):
        fs[0][2 * i], fs[1][2 * i + 1] = value, value
    valid, limits = torch.ones(n, dtype=torch.bool), torch.full((n,), LIMIT)
    options = {"bound": bound, "nonnegative": False}
    private = Private(fs, torch.arange(n) % 3, valid, limits, options)
    same_integers(private.sums(on), private.sums(PLAINLY))


def what_must_not_contribute(on: On) -> None:
    """Labels and limits out of range, images that are not valid: nothing, and no error."""
    fs = Rows(12, (9, 200), hostile=False, seed=3).features()
    limits = torch.tensor([LIMIT, 5, 0, -1, LIMIT + 1, 1 << 62, -(1 << 63), 77, 1, LIMIT, 9, 9])
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, -1, 3, 1 << 62])
    options = {"bound": Bound((1, 2), joint_weight=0.5), "nonnegative": True}
    private = Private(fs, y, torch.arange(12) != 8, limits, options)
    alone = [private.part(i).sums(PLAINLY)[0] for i in (0, 1, 7)]
    require(all(bool(a.any()) for a in alone), "the check itself adds nothing")
    same_integers(private.sums(on)[:1], [torch.stack(alone).sum(dim=0)])


def extremes_of_float64(on: On) -> None:
    exponents = (-1074, -1022, -1000, -999, -150, 150, 999, 1000, 1023)
    for exponent, moments in product(exponents, MOMENTS):
        f = torch.tensor([[1.0, 1.5, 0.0]], dtype=FLOAT64) * 2.0**exponent
        bound = Bound(moments, "ball", 1e-3, 0.5)
        private = one_image(f, LIMIT, bound=bound, nonnegative=False)
        same_integers(private.sums(on), private.sums(PLAINLY))


def exact_integers(limit: int, on: On) -> None:
    """One image: the definition's steps in rational arithmetic, where they are exact."""
    (f,) = Rows(1, (37,), signed=True, hostile=False).features()
    values = [Fraction(float(v)) for v in f[0]]
    exponent = math.frexp(max(abs(float(v)) for v in values))[1]
    g = [v / Fraction(2) ** exponent for v in values]
    bits = 62 - 6  # 37 numbers: log2 rounds up to 6
    # g^2 is exact in double precision: the features have 24 bits.
    square = sum(math.ceil(v * v * 2**bits) for v in g)
    rate = limit * GUARD / math.sqrt(float(square) * 2.0**-bits)
    expected = [math.trunc(float(v) * rate) for v in g]
    assert sum(q * q for q in expected) <= limit * limit
    got, _ = one_image(f, limit, bound=Bound(), nonnegative=False).sums(on)
    same_integers([got[0]], [torch.tensor(expected)])


# Losses through an encoder ------------------------------------------------------------------------

KINDS = ("vgg", "fire", "residual", "relu6")
LABELS = torch.tensor([0, 2, 2, 0, 2, 0, 0])


class Concatenated(nn.Module):
    """Two convolutions side by side, whose bias may be left out."""

    def __init__(self, first: Convolution, second: Convolution) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.first(x), self.second(x)), dim=1)

    def unbiased(self, x: Tensor) -> tuple[Tensor, Tensor]:
        (a, b), (c, d) = self.first.unbiased(x), self.second.unbiased(x)
        assert b is not None
        assert d is not None
        return torch.cat((a, c), dim=1), torch.cat((b, d))


class Added(nn.Module):
    def __init__(self, convolution: Convolution) -> None:
        super().__init__()
        self.convolution = convolution

    def forward(self, x: Tensor) -> Tensor:
        return x + self.convolution(x)


def encoder_of(kind: str, **options: Any) -> Encoder:
    """Four stages: a ReLU, one behind a pooling, one that is not a ReLU, and a last ReLU."""
    rng = torch.Generator().manual_seed(3)

    def convolution(inputs: int, outputs: int, kernel: int = 3) -> Convolution:
        weight = torch.randn(outputs, inputs, kernel, kernel, generator=rng) / (inputs**0.5 * 2)
        bias = torch.randn(outputs, generator=rng) * 0.2
        return Convolution(weight, bias, padding=kernel // 2)

    middle: nn.Module = convolution(4, 4)
    if kind == "fire":
        middle = Concatenated(convolution(4, 2), convolution(4, 2, 1))
    if kind == "residual":
        middle = Added(convolution(4, 4))
    ceiling = 0.4 if kind == "relu6" else None
    stages: dict[str, nn.Module] = {
        "one": Rectified(convolution(3, 4), ceiling),
        "two": Rectified(nn.Sequential(MaxPool(2, 2), middle), ceiling),
        "linear": convolution(4, 4, 1),
        "three": Rectified(convolution(4, 5), ceiling),
    }
    backbone = StagedBackbone(stages, mean=(0.5, 0.4, 0.3), std=(0.3, 0.3, 0.3))
    signs = dict.fromkeys(stages, "nonnegative") | {"linear": "signed"}
    arguments: dict[str, Any] = {"name": kind, "weights_sha256": "0" * 64, "image_size": 8}
    return Encoder(backbone, tap_signs=signs, **{**arguments, **options}).double()


def no_noise(n: int, sd: float) -> np.ndarray:
    return np.zeros(n, np.int64)


def release_of(
    encoder: Encoder, n: int = 60, groups: bool = False, **options: Any
) -> dpmmd.Release:
    """Of random images, without noise: the sums themselves."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 256, (n, 1, 8, 8), dtype=np.uint8)
    y = rng.integers(0, 3, n, dtype=np.int64)
    source: Any = (x, y, np.arange(n) // 2) if groups else (x, y)
    arguments: dict[str, Any] = {"epsilon": 5.0, "delta": 1e-9, "adjacency": "replace-one"}
    arguments |= {"num_classes": 3, "progress": False, "insecure_test_noise": no_noise}
    return dpmmd.release(source, encoder, **{**arguments, **options})


@dataclass(frozen=True)
class Problem:
    """An encoder, a release made with it, and a loss: what a training step differentiates.

    Attributes:
        encoder, release, loss: arguments of `encoder_of`, of `release_of` and of MMDLoss.
    """

    kind: str = "vgg"
    encoder: tuple[tuple[str, Any], ...] = ()
    release: tuple[tuple[str, Any], ...] = ()
    loss: tuple[tuple[str, Any], ...] = ()

    def steps(
        self, dtype: torch.dtype, on: On, **options: Any
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Two steps: their values, and the gradients of the images."""
        encoder, release = made(self)
        given = {"lr": 1e-2, "backend": on.backend, **dict(self.loss), **options}
        loss = MMDLoss(release, copy.deepcopy(encoder), **given).to(on.device, dtype)
        rng = torch.Generator().manual_seed(1)
        images = torch.rand(7, 3, 8, 8, generator=rng, dtype=FLOAT64)
        labels = LABELS.to(on.device) if loss.labelled else None
        values, gradients = [], []
        for _ in range(2):  # the first estimate is zero where its gradient is
            x = images.to(on.device, dtype, copy=True).requires_grad_()
            with tf32(False):
                value = loss(x, labels)
                value.backward()
            assert x.grad is not None
            values.append(value.detach().cpu())
            gradients.append(x.grad.cpu())
        return values, gradients


@cache
def made(problem: Problem) -> tuple[Encoder, dpmmd.Release]:
    """Its encoder, in float64, and the release."""
    encoder = encoder_of(problem.kind, **dict(problem.encoder))
    return encoder, release_of(encoder, **dict(problem.release))


def step(problem: Problem, dtype: torch.dtype, inject: bool, on: On) -> None:
    """Loss and gradient of the images, against plain torch in float64."""
    got = problem.steps(dtype, on, inject=inject)
    truth = problem.steps(FLOAT64, PLAINLY)
    rough = problem.steps(FLOAT32, On("torch", on.device))
    for (which, name), i in product(enumerate(("value", "gradient of the images")), range(2)):
        mine, plain, true = (found[which][i] for found in (got, rough, truth))
        require(i == 0 or bool(true.any()), "the check itself has no gradient")
        # On a GPU convolutions choose algorithms by their own lights.
        allowed = 3 * distance([plain], [true]) + 1e-6
        allowed = min(allowed, 2e-5) if on.device.type == "cpu" else 1e-4
        near(f"step {i}, {name}", [mine], [true], 1e-12 if dtype == FLOAT64 else allowed)


# Whole releases -----------------------------------------------------------------------------------

RELEASES: dict[str, dict[str, Any]] = {
    "unlabelled": {"num_classes": None},
    "two moments": {"moments": (1, 2), "bound": "ball", "clip": 1.7},
    "joint": {"moments": (1, 2), "joint_weight": 0.3, "bound": "ball"},
    "hybrid": {"shared_taps": 1, "bound": "sphere-per-tap"},
    "selection": {"selection": ("one", "three")},
    "groups": {"group_by": "patient", "groups": True},
}


@cache
def released(name: str, on: On) -> dpmmd.Release:
    options = dict(RELEASES[name])
    encoder = encoder_of("vgg").float().to(on.device)
    if "selection" in options:
        options["selection"] = encoder_of("vgg", taps=options["selection"]).float().to(on.device)
    with backends.use(on.backend):
        return release_of(encoder, 13, epsilon=1.0, batch_size=5, **options)


def release(name: str, on: On) -> None:
    """The integers of a whole release, bit for bit the definition's on the same features."""
    got, truth = released(name, on), released(name, On("torch", on.device))
    require(bool(truth.sums.any()), "the check itself adds nothing")
    require((truth.selection is None) == (name != "selection"), "a selection block")
    same_integers([got.sums], [truth.sums])
    require(got.metadata.array_sha256 == truth.metadata.array_sha256, "an array of it differs")


# All of them --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scale:
    """The sizes at which the suite runs.

    Attributes:
        every: images, and shapes, that meet every bound, moment and dtype.
        classes: K with which they do; None: without labels.
        some: that meet the bounds of all taps and of each, one moment and both.
        few: that meet those bounds, both moments and float32.
        columns: D of the estimators.
        widths: of the taps of integer sums, that meet everything, and that meet one kind.
        twice: whether every mean embedding is computed twice, and not only those that are short.
        float64: whether the backends that compute in float64 do.
    """

    every: Mapping[str, tuple[int, tuple[Shape, ...]]]
    classes: tuple[int | None, ...]
    some: Mapping[str, tuple[int, tuple[Shape, ...]]]
    few: Mapping[str, tuple[int, tuple[Shape, ...]]]
    columns: tuple[int, ...]
    widths: tuple[tuple[int, ...], ...]
    twice: bool = False
    float64: bool = True


HOST = Scale(
    every={
        "maps": (9, ((3, 4, 5), (7, 2, 1), (1, 1, 3), (5, 31, 33))),
        "flat": (9, ((4099,),)),
        "odd": (9, ((1,), (5, 3), (2, 1, 1), (63,), (67,))),
        "sixty-four": (9, ((2, 3, 1),) * 64),
    },
    classes=(5, None),
    some={"even": (11, ((8, 4, 4), (16, 2, 2), (64,)))},
    few={
        "odd sizes": (11, ((3, 7, 5), (33,), (1,))),
        "seventy": (11, ((4,),) * 70),  # more than a launch has addresses for
        "long": (11, ((8, 40, 40),)),  # several blocks of columns a tap
    },
    columns=(1, 7, 16, 21, 33, 515, 2048, 9001),
    widths=((5, 33, 4099, 1), (130,), (3,) * 64),
)
EMULATED = replace(HOST, every=HOST.some, classes=(5,), some=HOST.every, columns=(1, 21, 33, 2048))
INTERPRETED = Scale(  # by blocks of 8 columns and 4 images
    every={"maps": (6, ((2, 3, 3), (5,)))},
    classes=(4, None),
    some={},
    few={
        "one block": (3, ((8,),)),
        "odd": (3, ((17,),)),
        "five": (3, ((2, 1, 1),) * 5),
        "tiles": (37, ((3,), (9,))),
    },
    columns=(1, 21),
    widths=((18, 5),),
)
DEVICE = Scale(
    every={"aligned": (37, ((8, 6, 6), (16, 3, 3), (64, 1, 1)))},
    classes=(6, None),
    some={"maps": HOST.every["maps"]},
    few={
        "odd sizes": (33, ((3, 5, 7), (1, 1, 1), (5,))),
        "seventy": (3, ((5,),) * 70),
        "one long tap": (5, ((9001,),)),
    },
    columns=(33, 4096),
    widths=((288, 144, 64), (5, 33, 4099, 1)),
    twice=True,
    float64=False,
)


def checks(scale: Scale = HOST) -> list[Check]:
    """The whole suite."""
    return [
        *_embeddings(scale),
        *_odd_embeddings(scale),
        *_estimators(scale),
        *_matchings(scale),
        *_sums(scale),
        *_steps(scale),
        *(
            Check(RELEASE, name, partial(release, name), backends=BACKENDS[1:], short=i < 3)
            for i, name in enumerate(RELEASES)
        ),
    ]


def text(*parts: object) -> str:
    """A check's name: dtypes and bounds as they are written."""
    words = []
    for part in parts:
        if isinstance(part, Bound):
            joint = ", joint" if part.joint else ""
            part = f"moments {'+'.join(map(str, part.moments))}, {part.kind}{joint}"
        words.append(str(part).removeprefix("torch."))
    return ", ".join(words)


PLAIN = ("torch",)  # computes in float64 too
BOTH, PER_TAP = Bound((1, 2)), Bound((1, 2), "ball-per-tap")


def _of_few(*parts: object) -> bool:
    """Whether a combination is of every third, among which each part is."""
    orders: tuple[Sequence[object], ...] = (MOMENTS, BOUNDS, (FLOAT32, BFLOAT16, FLOAT64))
    found = [order.index(part) for part in parts for order in orders if part in order]
    return sum(found) % 3 == 0


def _dtypes(scale: Scale) -> tuple[torch.dtype, ...]:
    return (FLOAT32, BFLOAT16, FLOAT64) if scale.float64 else (FLOAT32, BFLOAT16)


def _embedding(name: str, batch: Batch, bound: Bound, scale: Scale, short: bool) -> Check:
    k = "unlabelled" if batch.classes is None else f"K={batch.classes}"
    run = partial(embedding, batch, bound, short or scale.twice)
    core = PLAIN if batch.dtype == FLOAT64 else BACKENDS
    return Check(EMBEDDING, text(name, batch.dtype, k, bound), run, batch.dtype, core, short)


def _embeddings(scale: Scale) -> Iterator[Check]:
    """Every shape by bounds, moments, dtypes and labels."""
    kinds = [Bound(m, kind) for m, kind in product(MOMENTS, BOUNDS)]
    joint = [Bound((1, 2), kind, joint_weight=0.3) for kind in ("sphere", "ball")]
    fewer = [Bound(m, kind) for m, kind in product(((1,), (1, 2)), ("sphere", "ball-per-tap"))]
    for (name, (n, shapes)), k, dtype in product(
        scale.every.items(), scale.classes, _dtypes(scale)
    ):
        first = name == next(iter(scale.every))
        for bound in kinds + (joint if first else []):
            short = first and _of_few(bound.moments, bound.kind, dtype)
            yield _embedding(name, Batch(n, shapes, dtype, k), bound, scale, short)
    for (name, (n, shapes)), dtype, bound in product(scale.some.items(), _dtypes(scale), fewer):
        yield _embedding(name, Batch(n, shapes, dtype, 5), bound, scale, False)
    for (name, (n, shapes)), k, bound in product(scale.few.items(), scale.classes, fewer[2:]):
        yield _embedding(name, Batch(n, shapes, FLOAT32, k), bound, scale, False)


def _odd_embeddings(scale: Scale) -> Iterator[Check]:
    """Batches nobody likes."""
    maps: tuple[Shape, ...] = ((4, 3, 3), (6,))

    def check(name: str, function: Callable[..., None], *given: Any, **options: Any) -> Check:
        return Check(EMBEDDING, name, partial(function, *given), **options)

    for k in (None, 1, 3):
        few = Batch(1, ((8, 3, 3), (7,)), FLOAT32, k)
        yield _embedding("one image", few, BOTH, scale, True)
        yield check(f"no images, K={k or 1}", no_images, replace(few, n=0))
    one = Batch(3, ((1,),))
    yield _embedding("one column", one, PER_TAP, scale, False)
    for k, n in ((50, 37), (1000, 4)):  # more classes than images
        yield _embedding("classes", Batch(n, ((7,), (3,)), FLOAT32, k), BOTH, scale, False)
    for kind in BOUNDS:
        batch = Batch(4, ((3,), (0,), (4,), (0, 2, 2)))
        yield _embedding("taps without columns", batch, Bound((1, 2), kind), scale, False)
    for dtype in _dtypes(scale):
        core = PLAIN if dtype == FLOAT64 else BACKENDS
        for m, kind in product(MOMENTS, BOUNDS):
            run = partial(unusable_rows, Batch(11, ((2, 3, 3), (41,)), dtype, 3), Bound(m, kind))
            name = text("rows of no use", dtype, Bound(m, kind))
            yield Check(EMBEDDING, name, run, dtype, core, _of_few(m, kind) and dtype == FLOAT32)
        for k in (None, 3):
            name, short = text("layouts", dtype, f"K={k or 1}"), k == 3 and dtype == FLOAT32
            batch = Batch(4, maps, dtype, k)
            yield check(name, layouts, batch, dtype=dtype, backends=core, short=short)
        if dtype != BFLOAT16:
            batch = Batch(6, ((3, 4, 5), (7, 2, 1)), dtype, 2)
            yield check(text("one by one", dtype), images_alone, batch, dtype=dtype, backends=core)
    yield check("overflow", overflow, Batch(4, maps))
    for m in ((1,), (2,)):
        yield check(text("small and large", Bound(m)), small_and_large, m)
    yield check("one tap wanted", one_tap_wanted)


def _estimators(scale: Scale) -> Iterator[Check]:
    kinds: list[tuple[str, dict[str, Any]]] = [("batch", {})]
    kinds += [("ema", {"decay": decay}) for decay in (0.0, 0.3, 0.9, 0.999)]
    kinds += [("adam", {"lr": 1e-2, "numbers": numbers}) for numbers in (None, 7, 1000)]
    dtypes = (FLOAT32, FLOAT64) if scale.float64 else (FLOAT32,)
    for d, (name, rates), dtype in product(scale.columns, kinds, dtypes):
        for fresh in (True, False) if rates else (True,):
            words = [f"{key} {value}" for key, value in rates.items()]
            words += [f"D={d}"] if fresh else [f"D={d}", "from a state"]
            run = partial(estimator_steps, Estimator(name, rates, (2, 3, d), fresh), dtype)
            core = PLAIN if dtype == FLOAT64 else BACKENDS
            short = d == scale.columns[-1] and not fresh
            yield Check(ESTIMATOR, text(name, *words, dtype), run, dtype, core, short)
    alone = Estimator("adam", {"lr": 1e-2}, (1, 1, 7))
    yield Check(ESTIMATOR, "one moment and class", partial(estimator_steps, alone, FLOAT32))
    yield Check(ESTIMATOR, "no columns", no_columns)


def _matchings(scale: Scale) -> Iterator[Check]:
    """Each estimator on the first shapes, and one on what is unlike it."""
    n, shapes = next(iter(scale.every.values()))
    adam: tuple[str, dict[str, Any]] = ("adam", {"lr": 1e-2, "numbers": 7})
    cases = [(*adam, BOTH, 4, FLOAT32, "channels-last")]
    cases += [("batch", {}, BOTH, 4, FLOAT32, "channels-last")]
    cases += [("ema", {"decay": 0.7}, Bound(), None, FLOAT32, "channels-last")]
    cases += [(*adam, PER_TAP, 4, BFLOAT16, "planes")]
    cases += [(*adam, Bound((1, 2), joint_weight=0.3), None, FLOAT32, "sliced")]
    for i, (name, rates, bound, k, dtype, layout) in enumerate(cases):
        batch = Batch(n, shapes, dtype, k, layout)
        run = partial(matched, Matching(batch, bound, name, rates), scale is not INTERPRETED)
        yield Check(MATCHING, text(name, layout, dtype, bound), run, dtype, short=i in (0, 2))


def _sums(scale: Scale) -> Iterator[Check]:
    def check(
        name: str, rows: Rows, bound: Bound, *, limit: int = LIMIT, batches: int = 1,
        nonnegative: bool = True, shared: int = 0, short: bool = False,
    ) -> Check:  # fmt: skip
        options = {"bound": bound, "nonnegative": nonnegative, "shared_taps": shared}
        able = ("torch", "cpu") if rows.dtype == FLOAT64 else BACKENDS
        run = partial(sums, rows, options, limit, batches)
        return Check(SUMS, text(name, rows.dtype, bound), run, rows.dtype, able, short)

    kinds = [Bound(m, kind, 2.5, 0.3) for m, kind in product(MOMENTS, BOUNDS)]
    for dtype in _dtypes(scale):
        for (i, widths), bound in product(enumerate(scale.widths), kinds):
            short = i == 0 and _of_few(bound.moments, bound.kind, dtype) and dtype != FLOAT64
            yield check(f"{len(widths)} taps", Rows(17, widths, dtype), bound, short=short)
        for weight in (1e-200, 1e-30, 1e30, 1e200, 1e290):
            bound = Bound((1, 2), joint_weight=weight)
            yield check(f"weight {weight}", Rows(9, (40, 3), dtype), bound)
    for m, positive in product(MOMENTS, (True, False)):
        rows, bound = Rows(12, scale.widths[0], signed=True), Bound(m, joint_weight=1.7)
        name = "signed, as it must not be" if positive else "signed"
        yield check(name, rows, bound, limit=12_345_678, nonnegative=positive, batches=2,
                    short=m == (1, 2))  # fmt: skip
    for dtype, m, kind in product((FLOAT32, BFLOAT16), MOMENTS[1:], BOUNDS):
        rows, bound = Rows(15, (5, 70, 33), dtype), Bound(m, kind, 1.5, 0.7)
        short = m == (1, 2) and kind == "ball-per-tap" and dtype == FLOAT32
        yield check("a shared tap", rows, bound, shared=1, short=short)
    yield check("two shared taps", Rows(15, (5, 70, 33)), Bound((1, 2)), shared=2, short=True)
    yield check("no images", Rows(0, (4,)), Bound())
    yield check("many columns", Rows(1, (8 * 300 + 3,), hostile=False), Bound())  # odd, and many
    for kind in ("sphere", "ball-per-tap"):
        run = partial(values_at_the_edges, Bound((1, 2), kind, 1.0, 0.5))
        yield Check(SUMS, f"edges, {kind}", run)
    for limit in (1, 2, 1000, LIMIT):
        exact = partial(exact_integers, limit)
        yield Check(SUMS, f"limit {limit}, by Python's integers", exact, short=limit == 1000)
    nothing, extremes = what_must_not_contribute, extremes_of_float64
    yield Check(SUMS, "what must not contribute", nothing, backends=BACKENDS[1:], short=True)
    if scale.float64:
        yield Check(SUMS, "extremes of float64", extremes, FLOAT64, ("torch", "cpu"))


def _problems() -> Iterator[tuple[str, Problem, bool]]:
    """Name, what it is, and whether it is asked without injection, and in parts, as well."""

    def problem(kind: str = "vgg", loss: Any = (), encoder: Any = (), **release: Any) -> Problem:
        loss = {"estimator": "batch", **dict(loss)}
        return Problem(kind, *(tuple(dict(x).items()) for x in (encoder, release, loss)))

    for kind, bound, m in product(KINDS, BOUNDS, MOMENTS):
        name = f"{kind}, {text(Bound(m, bound))}"
        yield name, problem(kind, bound=bound, clip=2.0, moments=m), False
    for bound in ("sphere", "ball"):
        joint = {"moments": (1, 2), "joint_weight": 0.5, "bound": bound, "clip": 2.0}
        yield f"joint {bound}", problem("fire", **joint), True
    for estimator in ESTIMATORS:
        loss = {"estimator": estimator}
        yield f"{estimator}, labelled", problem("fire", loss), True
        yield f"{estimator}, unlabelled", problem("fire", loss, num_classes=None), False
        if estimator != "unbiased":
            yield f"{estimator}, shared taps", problem(loss=loss, shared_taps=2), True
    for options in ({"pool": 4}, {"taps": ("linear", "one")}, {"image_size": 12}):
        yield text(*options.items()), problem(encoder=options), False


def _steps(scale: Scale) -> Iterator[Check]:
    for dtype in (FLOAT32, FLOAT64) if scale.float64 else (FLOAT32,):
        able = PLAIN if dtype == FLOAT64 else BACKENDS
        injecting = tuple(backend for backend in able if backend in injection.BACKENDS)
        for i, (name, problem, whole) in enumerate(_problems()):
            name, run = text(name, dtype), partial(step, problem, dtype, True)
            yield Check(INJECTED, name, run, dtype, injecting, i % 7 == 0 or "joint" in name)
            if whole:
                yield Check(STEP, name, partial(step, problem, dtype, False), dtype, able, True)
                parts = replace(problem, loss=(*problem.loss, ("micro_batch", 3)))
                for inject, those in ((True, injecting), (False, able)):
                    run = partial(step, parts, dtype, inject)
                    label = f"{name}, injected" if inject else name
                    yield Check(IN_PARTS, label, run, dtype, those, "joint sphere" in name)
