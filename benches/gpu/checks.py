"""Every operation of every backend against its definition, before anything is timed.

The suite is `tests.core.conformance`, at a GPU's scale. What needs a device is added here: CUDA
graphs, a tap of more elements than 32 bits count, a large encoder in bfloat16.

The checks are spread over processes: compiling is most of their time, and a kernel that reads
where it must not takes its process along and no other.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from time import sleep
from typing import IO, Any

import torch
from torch import Tensor

from benches.backends import PLAIN
from benches.gpu.device import GRAPH, NoGraph, brief
from benches.gpu.suite import conformance
from dpmmd import functional, reference

Wrong, require, distance = conformance.Wrong, conformance.require, conformance.distance


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        backend, operation: what it is a check of: an operation of `conformance`, or GRAPH.
        name: the rest of what it is.
        run: raises `Wrong`, or whatever the operation raises.
        short: whether the sanitizer runs it too.
    """

    backend: str
    operation: str
    name: str
    run: Callable[[], object]
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
    unreached: dict[str, int] = field(default_factory=dict)  # of which operations, how many

    def miss(self, checks: Iterable[Check]) -> None:
        """Takes in checks that were not reached: they have neither passed nor failed."""
        for check in checks:
            name = f"{check.backend}, {check.operation}"
            self.unreached[name] = self.unreached.get(name, 0) + 1
            self.missed += 1

    def add(self, check: Check, why: str | None) -> None:
        if why is None:
            self.passed += 1
        else:
            self.failed[str(check)] = why
            self.broken.add((check.backend, check.operation))


# What needs a device ------------------------------------------------------------------------------


def graph(device: Any, backend: str, dtype: torch.dtype) -> None:
    """Forward and backward of the loss: a graph's replay on new numbers gives the eager bits."""
    batch = conformance.Batch(37, ((8, 6, 6), (16, 3, 3), (64, 1, 1)), dtype)
    first, second = (
        [conformance.moved(f, device.device) for f in replace(batch, seed=seed).features()]
        for seed in (0, 8)
    )
    y = (torch.arange(batch.n) % 3).to(device.device)
    target = torch.rand(2, 3, batch.dim).to(device.device)
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
        require(torch.equal(a, b), "the replay differs from the eager run")
    require(bool(eager[1].any()), "the check itself has no gradient")


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
        require(error < 2.0**-7, f"{name} of the last image: error {error:.2e}")
    require(not bool(grad[:-1].any()), "gradients of images of the other class")


def module(device: torch.device, backend: str, precision: str, tiny: bool) -> None:
    """Loss and gradient of the images through an encoder, against plain torch on the device.

    Both encoders compute in the same precision, but need not round in the same places.
    """
    from benches.gpu import inputs, steps
    from benches.shapes import small_release
    from dpmmd.nn import MMDLoss

    scale = inputs.TINY if tiny else replace(inputs.TINY, encoder="vgg11", encoder_taps=None, n=9)
    encoder = steps.encoder_of(scale, 32, precision, device)
    release = small_release(encoder, 3)
    images = torch.rand(scale.n, 3, 32, 32)
    y = (torch.arange(scale.n) % 2).to(device)
    found = []
    for core in (backend, PLAIN):
        x = images.to(device, copy=True).requires_grad_()
        loss = MMDLoss(release, encoder, estimator="adam", lr=1e-2, backend=core).train()
        with conformance.tf32(False):
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
        require(error <= allowed, f"{name}: {error:.2e} from plain torch's, allowed {allowed:g}")


# All of them -------------------------------------------------------------------------------------


def all_checks(device: Any, present: Sequence[str], tiny: bool = False) -> list[Check]:
    """In an order in which every share of them has some of each.

    Args:
        device: a `device.Cuda` or what has its methods.
        present: backends.
        tiny: a few of each, on small shapes, for a dry run.
    """
    suite = conformance.checks(conformance.INTERPRETED if tiny else conformance.DEVICE)
    if tiny:
        suite = [check for check in suite if check.short][::4]
    suite = [check for check in suite if check.dtype != torch.float64]
    found: list[Check] = []
    for backend in present:
        for check in suite:
            stepping = conformance.STEP in check.operation  # what these compare with is plain torch
            wanted = check.short or not (stepping or backend == PLAIN)
            if backend in check.backends and wanted and not (stepping and backend == PLAIN):
                run = partial(check.run, backend, device.device)
                found.append(Check(backend, check.operation, check.name, run, check.short))
        if backend != PLAIN:
            found += _of_the_device(device, backend, tiny)
    return found


def _of_the_device(device: Any, backend: str, tiny: bool) -> list[Check]:
    where, found = device.device, []
    if not device.dry:
        for dtype in (torch.float32, torch.bfloat16):
            name = conformance.text("replay", dtype)
            found.append(Check(backend, GRAPH, name, partial(graph, device, backend, dtype)))
        run = partial(huge, where, backend, 64 if tiny else 1 << 26)
        found.append(Check(backend, conformance.EMBEDDING, "2^31 elements", run))
    for precision in ("float32",) if tiny else ("float32", "bfloat16"):
        run = partial(module, where, backend, precision, tiny)
        found.append(Check(backend, conformance.STEP, f"a large encoder, {precision}", run))
    return found


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
            outcome.miss([check])
        else:
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
    for part in mine:
        outcome.miss(checks[index] for index in mine[part][done[part] :])
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
