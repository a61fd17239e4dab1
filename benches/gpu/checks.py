"""Every operation of every backend against its definition, before anything is timed.

Values and gradients against `dpmmd.reference` in float64 on the CPU: an error is at most twice
(gradients three times) that of the same definition in float32, and `SLACK`. Integer sums against
`dpmmd.privacy.sums` in plain torch on the CPU, bit for bit. Inputs are drawn anew for every check,
half zeros; memory that was not written to is NaN; every call is made twice and must give the same
bits.

The checks are spread over processes: compiling is most of their time, and a kernel that reads
where it must not takes its process along and no other.
"""

from __future__ import annotations

import inspect
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from time import sleep
from typing import IO, Any

import torch
from torch import Tensor

from benches.gpu.device import NoGraph, brief, poisoned, tf32
from dpmmd import backends, functional, reference
from dpmmd._cores import named
from dpmmd.bounds import BOUNDS

SLACK = 4 * 2.0**-23  # division on a GPU is not correctly rounded: 2 ulp, once or twice
TRUNCATED = 2.0**-7  # Triton's interpreter cuts bfloat16 off instead of rounding


class Wrong(AssertionError):
    """A check that failed, and how."""


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        backend, operation: what it is a check of: "forward", "backward", "difference", "sums",
            "graph", "step", "step, injected", "step, in parts".
        name: the rest of what it is.
        run: raises `Wrong`, or whatever the operation raises.
        short: whether the sanitizer runs it too.
    """

    backend: str
    operation: str
    name: str
    run: Callable[[], None]
    short: bool = False

    def __str__(self) -> str:
        return f"{self.backend}, {self.operation}: {self.name}"


@dataclass
class Outcome:
    """What the checks found: names of those that failed, with reasons; how many passed."""

    passed: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    broken: set[tuple[str, str]] = field(default_factory=set)  # (backend, operation)
    missed: int = 0  # not reached in time

    def add(self, check: Check, why: str | None) -> None:
        if why is None:
            self.passed += 1
        else:
            self.failed[str(check)] = why
            self.broken.add((check.backend, check.operation))


# Shapes of taps ----------------------------------------------------------------------------------

Shape = tuple[int, ...]
ODD: dict[str, tuple[int, tuple[Shape, ...]]] = {  # name -> n, shapes
    "odd sizes": (33, ((3, 5, 7), (1, 1, 1), (5,))),
    "one image": (1, ((8, 3, 3), (7,))),
    "seventy taps": (3, ((5,),) * 70),
    "a tap without columns": (4, ((3,), (0,), (4,))),
    "one long tap": (5, ((9001,),)),
    "planes": (5, ((4, 3, 3), (6,))),
    "views": (5, ((9,), (8,))),
    "rows without use": (9, ((8, 4, 4), (5,))),
}
EVEN: tuple[int, tuple[Shape, ...]] = (37, ((8, 6, 6), (16, 3, 3), (64, 1, 1)))
TINY: tuple[int, tuple[Shape, ...]] = (5, ((8, 2, 2), (8,)))


def drawn(
    n: int, shapes: Sequence[Shape], dtype: torch.dtype, kind: str, seed: int
) -> list[Tensor]:
    """Features on the CPU, half zeros, as `kind` wants them to lie in memory."""
    rng = torch.Generator().manual_seed(seed)
    taps = []
    for shape in shapes:
        x = torch.randn(n, *shape, generator=rng).relu_().to(dtype)
        if kind == "views":
            x = torch.cat([x, torch.full((n, 3), math.nan, dtype=dtype)], dim=1)[:, :-3]
        elif x.ndim == 4 and kind != "planes":
            x = x.contiguous(memory_format=torch.channels_last)
        taps.append(x)
    if kind == "rows without use":
        for row, bad in ((1, 0.0), (4, math.nan), (6, math.inf)):
            for x in taps:
                x[row] = bad
    return taps


def moved(x: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that lies in memory as x does: `to` would make views dense."""
    base = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage()).to(device)
    return base.as_strided(x.shape, x.stride(), x.storage_offset())


# Class means and their gradient ------------------------------------------------------------------


def embedding(
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    kind: str,
    size: tuple[int, Sequence[Shape]],
    classes: int,
    options: dict[str, Any],
    seed: int,
    gradient: bool,
) -> None:
    """Class means, or their gradient, against the truth; class K - 1 is absent."""
    n, shapes = size
    host = drawn(n, shapes, dtype, kind, seed)
    clean = [f.clone() for f in host]
    bad = torch.zeros(n, dtype=torch.bool)
    if kind == "rows without use":
        bad[[1, 4, 6]] = True
        for f in clean:
            f[bad] = 0
    y = None
    if classes > 1:
        rng = torch.Generator().manual_seed(seed + 1)
        y = torch.randint(0, classes - 1, (n,), generator=rng)
    norms = torch.cat([f.flatten(1).double() for f in clean], dim=1).norm(dim=1)
    options = options | {"clip": 1.01 * float(norms[norms > 0].median())}
    dim = sum(math.prod(shape) for shape in shapes)
    rng = torch.Generator().manual_seed(seed + 2)
    upstream = torch.randn(len(options["moments"]), classes, dim, generator=rng)

    def ours() -> tuple[list[Tensor], Tensor]:
        fs = [moved(f, device).requires_grad_() for f in host]
        with poisoned():
            means, counts = functional.mean_embedding(
                fs, None if y is None else y.to(device), classes, backend=backend, **options
            )
            if not gradient:
                return [means.detach().cpu()], counts.cpu()
            grads = torch.autograd.grad(means, fs, upstream.to(device))
        return [g.detach().cpu() for g in grads], counts.cpu()

    def definition(like: torch.dtype) -> tuple[list[Tensor], Tensor]:
        fs = [f.to(like).requires_grad_() for f in clean]
        means, counts = reference.mean_embedding(fs, y, classes, **options)
        if not gradient:
            return [means.detach()], counts
        grads = torch.autograd.grad(means, fs, upstream.to(like))
        return [g.masked_fill(bad.view(-1, *[1] * (g.ndim - 1)), 0) for g in grads], counts

    got, counts = ours()
    again, _ = ours()
    truth, true_counts = definition(torch.float64)
    rough, _ = definition(torch.float32)
    if gradient:
        rough = [g.to(dtype) for g in rough]
        _require(
            all(g.shape == f.shape for g, f in zip(got, host, strict=True)), "shape of a gradient"
        )
    _require(torch.equal(counts.double(), true_counts), f"counts {counts.tolist()}")
    _same_bits(got, again)
    allowed = (3 if gradient else 2) * distance(rough, truth) + SLACK
    if gradient and dtype == torch.bfloat16 and device.type == "cpu":
        allowed = max(allowed, TRUNCATED)
    error = distance(got, truth)
    _require(error <= allowed, f"error {error:.2e}, allowed {allowed:.2e}")  # false for NaN
    if gradient:
        norms = torch.cat([g.flatten(1) for g in truth], dim=1).norm(dim=1)
        mine = torch.cat([g.flatten(1) for g in got], dim=1).any(dim=1)
        _require(bool(mine[norms > 1e-3 * norms.max()].all()), "a row of the gradient is 0")
        _require(not bool(mine[bad].any()), "rows without use have a gradient")


def distance(a: Sequence[Tensor], b: Sequence[Tensor]) -> float:
    """Relative L2 distance of all together; NaN if anything is."""
    x, y = (torch.cat([t.double().flatten() for t in ts]) for ts in (a, b))
    return float((x - y).norm() / y.norm().clamp(min=1e-30))


def _require(true: bool, what: str) -> None:
    if not true:
        raise Wrong(what)


def _same_bits(got: Sequence[Tensor], again: Sequence[Tensor]) -> None:
    for a, b in zip(got, again, strict=True):
        _require(torch.equal(a, b), "two runs differ, or are NaN")


# The difference estimators -----------------------------------------------------------------------


def difference(
    device: torch.device, backend: str, estimator: str, update: bool, dim: int, seed: int
) -> None:
    """Three steps: values, gradients and states against float64; a class is absent."""
    rng = torch.Generator().manual_seed(seed)
    target = torch.randn(2, 3, dim, generator=rng)
    batches = [torch.randn(2, 3, dim, generator=rng) for _ in range(3)]
    counts = torch.tensor([2.0, 0.0, 5.0])
    names = {"batch": (), "ema": ("estimate",)}.get(
        estimator, ("estimate", "first_moment", "second_moment")
    )
    initial = {name: torch.rand(2, 3, dim, generator=rng) for name in names}

    def run(where: torch.device, dtype: torch.dtype, core: str) -> list[Tensor]:
        def to(x: Tensor) -> Tensor:
            return x.to(where, dtype, copy=True)

        states: dict[str, Any] = {name: to(x) for name, x in initial.items()}
        if estimator != "batch":
            states["steps"] = to(torch.tensor([1.0, 0.0, 4.0]))
            rates: dict[str, Any] = (
                {"decay": 0.9} if estimator == "ema" else {"lr": 1e-2, "numbers": 7}
            )
            rates |= {"update": update}
        found = []
        for batch in batches:
            means = to(batch).requires_grad_()
            with poisoned():
                if estimator == "batch":
                    value = functional.mmd_loss(means, to(counts), to(target), backend=core)
                else:
                    loss = functional.ema_loss if estimator == "ema" else functional.adam_loss
                    value = loss(means, to(counts), to(target), backend=core, **states, **rates)
                (grad,) = torch.autograd.grad(value, means)
            found += [value.detach().cpu().view(1), grad.cpu()]
        return [*found, *(s.cpu() for s in states.values())]

    cpu = torch.device("cpu")
    got, again = (run(device, torch.float32, backend) for _ in range(2))
    _same_bits(got, again)
    truth = run(cpu, torch.float64, "torch")
    rough = run(cpu, torch.float32, "torch")
    for i, (mine, plain, true) in enumerate(zip(got, rough, truth, strict=True)):
        error, rough_error = distance([mine], [true]), distance([plain], [true])
        allowed = min(3 * rough_error, 1e-4) + 2 * SLACK
        _require(error <= allowed, f"tensor {i}: error {error:.2e}, allowed {allowed:.2e}")


# Integer class sums ------------------------------------------------------------------------------


def bounded_sums_of(backend: str) -> Callable[..., None]:
    """The function of a backend that adds bounded integers to int64 sums."""
    return _definition_of_sums if backend == "torch" else named(backend).bounded_sums


def _definition_of_sums(
    features: Sequence[Tensor],
    labels: Tensor,
    valid: Tensor,
    limits: Tensor,
    *,
    sums: Tensor,
    **options: Any,
) -> None:
    from dpmmd.privacy.sums import PrivateSums

    private = PrivateSums(sums.shape[0], sums.shape[1], device=sums.device)
    with backends.use("torch"):
        private.add(reference.flatten(features), labels, valid, limits, **options)
    sums += private.take()[0].to(sums.device)


def sums(
    device: torch.device,
    backend: str,
    dtype: torch.dtype,
    kind: str,
    size: tuple[int, Sequence[Shape]],
    options: dict[str, Any],
    seed: int,
) -> None:
    """int64 class sums, bit for bit the definition's on a CPU; added to what is there."""
    n, shapes = size
    host = drawn(n, shapes, dtype, kind, seed)
    for i, f in enumerate(host):  # sizes far apart, and signs where they may be
        scale = torch.logspace(-3, 3, n).view(-1, *[1] * (f.ndim - 1)).to(dtype)
        f *= scale if options["nonnegative"] else scale * (-1) ** i
    classes = 3
    rng = torch.Generator().manual_seed(seed + 1)
    y = torch.randint(0, classes, (n,), generator=rng)
    valid = torch.arange(n) % 5 != 3
    limits = torch.full((n,), 1 << 30)
    limits[::2] = (1 << 30) // 3
    width = len(options["moments"]) * sum(math.prod(shape) for shape in shapes)
    start = torch.randint(-(1 << 40), 1 << 40, (classes, width), generator=rng)
    truth, got = start.clone(), start.to(device, copy=True)
    _definition_of_sums(host, y, valid, limits, sums=truth, **options)
    arguments = [x.to(device) for x in (y, valid, limits)]
    with poisoned():
        flat = reference.flatten([moved(f, device) for f in host])
        bounded_sums_of(backend)(flat, *arguments, sums=got, **options)
    wrong = int((got.cpu() != truth).sum())
    _require(wrong == 0, f"{wrong} of {truth.numel()} integers differ")
    _require(width == 0 or not torch.equal(truth, start), "the check itself adds nothing")


# CUDA graphs, and more elements than 32 bits count -----------------------------------------------


def graph(device: Any, backend: str, dtype: torch.dtype, seed: int) -> None:
    """Forward and backward of the loss: a graph's replay on new numbers gives the eager bits."""
    n, shapes = EVEN
    first, second = (
        [moved(f, device.device) for f in drawn(n, shapes, dtype, "", s)] for s in (seed, seed + 1)
    )
    y = (torch.arange(n) % 3).to(device.device)
    target = torch.rand(2, 3, sum(math.prod(s) for s in shapes)).to(device.device)
    static = [f.clone().requires_grad_() for f in first]

    def loss() -> list[Tensor]:
        means, counts = functional.mean_embedding(static, y, 3, moments=(1, 2), backend=backend)
        value = functional.mmd_loss(means, counts, target, backend=backend)
        return [value.detach(), *torch.autograd.grad(value, static)]

    replay = device.capture(loss)
    with torch.no_grad():
        for f, new in zip(static, second, strict=True):
            f.copy_(new)
    replayed = [t.clone() for t in replay()]
    eager = loss()
    device.synchronize()
    for a, b in zip(replayed, eager, strict=True):
        _require(torch.equal(a, b), "the replay differs from the eager run")
    _require(bool(eager[1].any()), "the check itself has no gradient")


def huge(device: torch.device, backend: str, width: int, n: int = 34) -> None:
    """One tap of more than 2^31 elements: the last image, which is alone in its class."""
    f = torch.empty(n, width, dtype=torch.bfloat16, device=device)
    f.normal_(generator=torch.Generator(device).manual_seed(3)).relu_()
    f.requires_grad_()
    y = torch.zeros(n, dtype=torch.int64, device=device)
    y[-1] = 1
    means, _ = functional.mean_embedding([f], y, 2, bound="sphere", backend=backend)
    (grad,) = torch.autograd.grad(means[0, 1, -1000:].sum(), [f])
    last = f.detach()[-1:].double().requires_grad_()
    true, _ = reference.mean_embedding([last])
    (true_grad,) = torch.autograd.grad(true[0, 0, -1000:].sum(), last)
    for name, mine, truth in (("mean", means[0, 1], true), ("gradient", grad[-1], true_grad)):
        error = distance([mine.detach()], [truth.detach()])
        _require(error < 2.0**-7, f"{name} of the last image: error {error:.2e}")
    _require(not bool(grad[:-1].any()), "gradients of images of the other class")


# The loss module ---------------------------------------------------------------------------------


def module(
    device: torch.device, backend: str, precision: str, tiny: bool, options: dict[str, Any]
) -> None:
    """Loss and gradient of the images through an encoder, against plain torch on the device.

    Both encoders compute in the same precision, but need not round in the same places.
    """
    from benches.gpu import inputs, steps
    from dpmmd.nn import MMDLoss

    scale = inputs.TINY if tiny else replace(inputs.TINY, encoder="vgg11", encoder_taps=None, n=9)
    encoder = steps.encoder_of(scale, 32, precision, device)
    release = steps.release_of(encoder, 3)
    images = torch.rand(scale.n, 3, 32, 32)
    y = (torch.arange(scale.n) % 2).to(device)
    found = []
    for core, more in ((backend, options), ("torch", {})):
        x = images.to(device, copy=True).requires_grad_()
        loss = MMDLoss(release, encoder, estimator="adam", lr=1e-2, backend=core, **more).train()
        with tf32(False):
            values = []
            for _ in range(2):  # the first estimate is zero where its gradient is
                x.grad = None
                value = loss(x, y)
                value.backward()
                values.append(value.detach())
        assert x.grad is not None
        found.append((torch.stack(values).cpu(), x.grad.cpu()))
    allowed = 1e-4 if precision == "float32" else 5e-2
    for name, mine, plain in zip(("loss", "gradient of the images"), *found, strict=True):
        error = distance([mine], [plain])
        _require(error <= allowed, f"{name}: {error:.2e} from plain torch's, allowed {allowed:g}")


# All of them -------------------------------------------------------------------------------------


def all_checks(device: Any, present: Sequence[str], tiny: bool = False) -> list[Check]:
    """In an order in which every share of them has some of each.

    Args:
        device: a `device.Cuda` or what has its methods.
        present: backends.
        tiny: a few of each, on small shapes, for a dry run.
    """
    where = device.device
    found: list[Check] = []
    seed = iter(range(0, 1 << 30, 16))
    kinds = [
        {"moments": moments, "bound": bound, "joint_weight": None}
        for moments in ((1,), (2,), (1, 2))
        for bound in BOUNDS
    ] + [{"moments": (1, 2), "bound": b, "joint_weight": 0.3} for b in ("sphere", "ball")]
    if tiny:
        kinds = [kinds[0], kinds[-1]]
    dtypes = (torch.float32, torch.bfloat16)

    def add(
        backend: str, operation: str, name: str, short: bool, function: Any, *args: Any
    ) -> None:
        found.append(Check(backend, operation, name, lambda: function(*args), short))

    for backend in present:
        even, classes = (TINY, (3,)) if tiny else (EVEN, (1, 6))
        shapes: list[tuple[str, Any, int, dict[str, Any]]] = [
            ("aligned", even, k, kind) for k in classes for kind in kinds
        ]
        both = {"moments": (1, 2), "bound": "ball", "joint_weight": None}
        per_tap = {"moments": (1, 2), "bound": "sphere-per-tap", "joint_weight": None}
        for name, size in ODD.items():
            if not tiny or name == "rows without use":
                shapes += [(name, size, 1, both)] + ([] if tiny else [(name, size, 6, per_tap)])
        for dtype, (name, size, k, kind) in product(dtypes, shapes):
            for operation in ("forward", "backward"):
                text = f"{name}, {_name(dtype)}, K={k}, {_text(kind)}"
                short = (kind["moments"] == (1, 2) and k > 1) or name in ("odd sizes", "views")
                args: tuple[Any, ...] = (where, backend, dtype, name, size, k, kind, next(seed))
                add(backend, operation, text, short, embedding, *args, operation == "backward")
        for estimator, update in product(("batch", "ema", "adam"), (True, False)):
            if estimator != "batch" or update:
                for dim in (33,) if tiny else (33, 4096):
                    text = f"{estimator}, D={dim}{'' if update else ', state kept'}"
                    args = (where, backend, estimator, update, dim, next(seed))
                    add(backend, "difference", text, dim == 33, difference, *args)
        for dtype, (name, size) in product(dtypes, [("aligned", even), *ODD.items()]):
            if tiny and name != "aligned":
                continue
            for kind in kinds if name == "aligned" else kinds[-1:]:
                options = {
                    "moments": kind["moments"],
                    "joint_weight": kind["joint_weight"] or 1.0,
                    "bound": kind["bound"],
                    "clip": 1.5,
                    "nonnegative": dtype == torch.bfloat16,
                }
                text = f"{name}, {_name(dtype)}, {_text(kind)}"
                args = (where, backend, dtype, name, size, options, next(seed))
                add(backend, "sums", text, name == "views", sums, *args)
        if backend != "torch" and not device.dry:
            for dtype in dtypes:
                name = f"replay, {_name(dtype)}"
                add(backend, "graph", name, False, graph, device, backend, dtype, next(seed))
            width = 64 if tiny else 1 << 26
            add(backend, "backward", "2^31 elements", False, huge, where, backend, width)
        for operation, options in loss_options(backend).items() if backend != "torch" else ():
            for precision in ("float32",) if tiny else ("float32", "bfloat16"):
                text = f"loss and gradient of the images, {precision}"
                args = (where, backend, precision, tiny, options)
                add(backend, operation, text, False, module, *args)
    return found


def loss_options(backend: str) -> dict[str, dict[str, Any]]:
    """Operation -> arguments of MMDLoss: the plain loss, and what the backend has beside it."""
    from dpmmd import injection
    from dpmmd.nn import MMDLoss

    known = inspect.signature(MMDLoss.__init__).parameters
    found: dict[str, dict[str, Any]] = {"step": {}}
    if backend in injection.BACKENDS:
        found["step, injected"] = {"inject": True}
    if "micro_batch" in known:
        found["step, in parts"] = {"micro_batch": 2}
    return found


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(kind: dict[str, Any]) -> str:
    joint = "" if kind["joint_weight"] is None else ", joint"
    return f"moments {'+'.join(map(str, kind['moments']))}, {kind['bound']}{joint}"


def one(check: Check) -> str | None:
    """Runs a check; why it failed, if so."""
    try:
        check.run()
    except Wrong as error:
        return str(error)
    except NoGraph as error:
        return f"cannot be captured: {error}"
    except Exception as error:
        return brief(error)
    return None


def here(checks: Sequence[Check], left: Callable[[], float]) -> Outcome:
    """Runs checks in this process, as long as there is time."""
    outcome = Outcome()
    for check in checks:
        if left() <= 0:
            outcome.missed += 1
            continue
        outcome.add(check, one(check))
    return outcome


# Over processes ----------------------------------------------------------------------------------


def share(checks: Sequence[Check], part: int, parts: int, start: int, out: IO[str]) -> int:
    """What a worker does: its share of the checks from its `start`-th, a line of JSON each.

    Returns how many failed.
    """
    failures = 0
    for index, check in list(enumerate(checks))[part::parts][start:]:
        print(json.dumps({"begun": index}), file=out, flush=True)
        why = one(check)
        failures += why is not None
        print(json.dumps({"done": index, "why": why}), file=out, flush=True)
    return failures


def spread(
    checks: Sequence[Check], parts: int, arguments: Sequence[str], left: Callable[[], float]
) -> Outcome:
    """Runs checks in so many processes; one that dies is begun again behind what it died of."""
    outcome = Outcome()
    mine = {part: list(range(len(checks)))[part::parts] for part in range(parts)}
    done = dict.fromkeys(mine, 0)
    running: dict[int, tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes]]] = {}

    def begin(part: int) -> None:
        command = [sys.executable, "-m", "benches.gpu", *arguments]
        command += ["--part", f"{part}/{parts}/{done[part]}"]
        files = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        running[part] = subprocess.Popen(command, stdout=files[0], stderr=files[1]), *files

    def end(part: int, code: int | None) -> None:
        _, *files = running.pop(part)
        texts = []
        for file in files:
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
            file.close()
        done[part] = _read(texts[0], texts[1], code, checks, mine[part], done[part], outcome)

    for part in mine:
        if mine[part]:
            begin(part)
    while running:
        out_of_time = left() <= 0
        for part, (process, *_) in list(running.items()):
            if out_of_time:
                process.kill()
                process.wait()
            if out_of_time or process.poll() is not None:
                end(part, None if out_of_time else process.returncode)
                if not out_of_time and done[part] < len(mine[part]):
                    begin(part)
        sleep(0.02)
    outcome.missed = sum(len(mine[part]) - done[part] for part in mine)
    return outcome


def _read(
    output: str,
    errors: str,
    code: int | None,
    checks: Sequence[Check],
    mine: Sequence[int],
    start: int,
    outcome: Outcome,
) -> int:
    """Takes a worker's lines in; how many of its checks are done with.

    Args:
        code: its exit status; None: it was stopped for want of time, and is not to blame.
    """
    begun: int | None = None
    for line in output.splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue  # what else a library printed
        if not isinstance(found, dict):
            continue
        if "begun" in found:
            begun = found["begun"]
        elif "done" in found:
            outcome.add(checks[found["done"]], found["why"])
            start, begun = start + 1, None
    if code is None or start >= len(mine):
        return start
    last = (errors.strip().splitlines() or ["no message"])[-1]
    why = f"its process ended with status {code}: {brief(RuntimeError(last))}"
    outcome.add(checks[mine[start] if begun is None else begun], why)
    return start + 1
