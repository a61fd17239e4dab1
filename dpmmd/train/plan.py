"""How a training step fits into a memory budget: micro-batches, recomputation, where state lies.

The plan is a model of one step whose figures are measured on this device, with this encoder and
this generator, on random images: bytes and seconds of a few small chunks through the encoder, of a
few images through the generator, and of the estimator on a part of its numbers; each a straight
line in the images or numbers. No private image and no release is looked at.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpmmd import precision
from dpmmd._memory import Meter, return_memory_at_once
from dpmmd.bounds import Bound
from dpmmd.devices import device_of
from dpmmd.encoders import Encoder
from dpmmd.nn import MMDLoss
from dpmmd.privacy.metadata import Metadata
from dpmmd.privacy.release_file import Release
from dpmmd.recipe import TrainSection
from dpmmd.train.sampling import IMAGES_PER_ROW

_PROBE_BYTES = 96 << 20  # of a measurement: far above the pages that come and go by themselves
_PROBE_NUMBERS = 8 << 20
_UNITS = {"": 1, **{f"{p}iB": 1 << 10 * i for i, p in enumerate("KMGT", 1)}}
_UNITS.update({f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)})


class PlanError(ValueError):
    """A budget that cannot be read, or in which the step does not fit."""


@dataclass(frozen=True)
class Target:
    """What of a release decides how much a step needs."""

    bound: Bound
    num_classes: int  # with modes: rows, of which a class has several
    labelled: bool
    shared_taps: int
    modes: bool = False

    @classmethod
    def of(cls, release: Release | Metadata) -> Target:
        """That of a release, or of its metadata, which do not say how its modes are merged."""
        m = release if isinstance(release, Metadata) else release.metadata
        rows = m.num_cells if isinstance(release, Metadata) else release.num_rows
        modes = m.modes is not None
        return cls(Bound.of(m), rows, m.labelled or modes, m.shared_taps, modes)

    def rows_of(self, settings: TrainSection) -> int:
        """How many rows a batch has."""
        each = settings.images_per_row or (IMAGES_PER_ROW if self.modes else None)
        n = settings.batch_size
        return self.num_classes if each is None else min(self.num_classes, max(1, n // each))

    def numbers(self, encoder: Encoder) -> int:
        """How many there are in the release's mean embedding."""
        common = sum(tap.size for tap in encoder.taps[: self.shared_taps])
        return len(self.bound.moments) * (self.num_classes * (encoder.dim - common) + common)


@dataclass(frozen=True)
class Plan:
    """How a step will be done.

    Attributes:
        device: where.
        budget: bytes, of everything that the process keeps there (resident memory on a CPU,
            tensors on a CUDA device).
        batch_size: n.
        precision: of the generator's passes.
        micro_batch: images that go through the encoder at a time.
        recompute: whether backward computes the inside of the generator's blocks again.
        state: where target and estimate lie: "device" or "host".
        peak: predicted bytes at the highest, in all.
        added: of these, those that training adds to what was in use when the plan was made.
        seconds: predicted, of a step.
        least: bytes of the plan that needs least.
        whole: predicted (bytes, seconds) of the batch in one piece.
    """

    device: str
    budget: int
    batch_size: int
    precision: str
    micro_batch: int
    recompute: bool
    state: str
    peak: int
    added: int
    seconds: float
    least: int
    whole: tuple[int, float]

    def check(self, settings: TrainSection, device: torch.device) -> None:
        """Raises a PlanError unless the plan is one for such a training."""
        made = f"batches of {self.batch_size} images in {self.precision} on {self.device}"
        wanted = precision.of_generator(settings.precision, device)
        trained = f"batches of {settings.batch_size} images in {wanted} on {device}"
        if made != trained:
            raise PlanError(
                f"plan: made for {made}; this process trains with {trained}. Make one for these, "
                "or leave plan out."
            )

    def facts(self) -> dict[str, Any]:
        """JSON-able."""
        bytes_, seconds = self.whole
        return {**asdict(self), "whole": {"peak": bytes_, "seconds": seconds}}

    def rows(self) -> list[tuple[str, str]]:
        """For a table."""
        return [
            ("device", self.device),
            ("generator's precision", self.precision),
            ("images through the encoder at a time", f"{self.micro_batch} of {self.batch_size}"),
            ("generator blocks computed again", "yes" if self.recompute else "no"),
            ("target and estimate on the", self.state),
            ("predicted peak", f"{size(self.peak)} of {size(self.budget)}"),
            ("predicted time of a step", f"{self.seconds:.3g} s"),
            ("the least peak possible", size(self.least)),
            ("in one piece", f"{size(self.whole[0])}, {self.whole[1]:.3g} s"),
        ]

    def __str__(self) -> str:
        whole = self.micro_batch == self.batch_size
        parts = [
            f"all {self.batch_size} images at a time"
            if whole
            else f"{self.micro_batch} of {self.batch_size} images at a time",
            *(["generator blocks computed again in backward"] if self.recompute else []),
            *(["target and estimate on the host"] if self.state == "host" else []),
        ]
        return (
            f"memory: {', '.join(parts)}; predicted peak {size(self.peak)} of {size(self.budget)} "
            f"on {self.device}, {self.seconds:.3g} s a step (in one piece {size(self.whole[0])}, "
            f"{self.whole[1]:.3g} s)"
        )


@dataclass(frozen=True)
class Limits:
    """What a plan lays down for a training; without a plan, nothing.

    Attributes:
        encoded: images that go through an encoder at a time; None: all.
        generated: images that go through the generator at a time, but for a step; None: all.
        recompute: whether backward computes the inside of the generator's blocks again.
        state: where target and estimate lie.
    """

    encoded: int | None = None
    generated: int | None = None
    recompute: bool = False
    state: str = "device"

    @classmethod
    def of(cls, plan: Plan | None) -> Limits:
        if plan is None:
            return cls()
        return cls(plan.micro_batch, plan.batch_size, plan.recompute, plan.state)


def size(count: float) -> str:
    """Bytes for people."""
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def parse(memory: str) -> int | float:
    """Bytes of "8GiB" or "500MB", or the fraction of "0.8" (more than 0, at most 1).

    Raises:
        PlanError: neither.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([KMGT]i?B)?\s*", memory)
    if found:
        number = float(found[1])
        if found[2] and number > 0:
            return int(number * _UNITS[found[2]])
        if not found[2] and 0 < number <= 1:
            return number
    raise PlanError(
        f"memory={memory!r}: expected a size such as '8GiB' or '500MB', or a fraction of what is "
        "free, such as '0.8'."
    )


def make(
    memory: str,
    encoder: Encoder,
    generator: nn.Module,
    target: Target,
    settings: TrainSection,
    *,
    held: int = 0,
) -> Plan:
    """The fastest way to train within a budget.

    From here on the process gives freed memory back at once (see `dpmmd._memory`).

    Args:
        memory: see `parse`. A fraction is one of what is free now, in addition to what is in use.
        encoder, generator: on their device.
        target: of the release.
        settings: batch size, estimator and precision of the generator.
        held: bytes that will be in use beside training, and are not yet: a release to be loaded.

    Raises:
        PlanError: the budget cannot be read, is less than the least possible plan, or memory
            cannot be measured here.
        ValueError: the device has no bfloat16, and the settings ask for it.
    """
    wanted = parse(memory)
    device = device_of(encoder)
    if device.type == "cpu":
        return_memory_at_once()
    try:
        meter = Meter(device)
    except OSError as error:
        raise PlanError(
            f"memory={memory!r}: the memory of a process on {device} cannot be measured here "
            f"({error}); on a CPU that needs Linux. Leave it out, and set micro_batch of "
            "dpmmd.nn.MMDLoss by hand."
        ) from None
    meter.settle()
    used = meter.used()
    budget = wanted if isinstance(wanted, int) else used + int(wanted * meter.free())
    model = _Model(meter, encoder, generator, target, settings)
    fixed = used + held
    found = sorted(
        ((fixed + model.peak(c), model.seconds(c), c) for c in model.candidates()),
        key=lambda each: (each[1], each[2].recompute, each[0]),
    )
    least = min(found, key=lambda each: each[0])
    whole = next(f for f in found if f[2] == _Choice(settings.batch_size, False, "device"))
    fitting = [each for each in found if each[0] <= budget]
    fitting = [each for each in fitting if each[2].state == "device"] or fitting
    if not fitting:
        raise PlanError(
            f"memory={memory!r}: {size(budget)} on {device}; the least that a step of batch_size="
            f"{settings.batch_size} needs is {size(least[0])}, of which {size(fixed)} are in use "
            f"before it, and the target and its estimate take {size(model.state_bytes)}. Give "
            "more, or pool the encoder's taps, use a smaller batch, fewer classes or the "
            "estimator 'batch'."
        )
    peak, seconds, choice = fitting[0]
    return Plan(
        str(device),
        budget,
        settings.batch_size,
        model.precision,
        choice.micro_batch,
        choice.recompute,
        choice.state,
        peak,
        peak - used,
        seconds,
        least[0],
        whole[:2],
    )


@dataclass(frozen=True)
class _Choice:
    micro_batch: int
    recompute: bool
    state: str


@dataclass(frozen=True)
class _Line:
    """fixed + each * n."""

    fixed: float
    each: float

    def __call__(self, n: float) -> float:
        return max(0.0, self.fixed + self.each * n)

    @classmethod
    def through(cls, points: list[tuple[int, float]]) -> _Line:
        (a, x), (b, y) = points[0], points[-1]
        if a == b:
            return cls(0.0, x / a)
        each = max(0.0, (y - x) / (b - a))
        return cls(x - each * a if each else max(x, y), each)

    def of_time(self, n: int) -> _Line:
        """With nothing below zero, which noise makes; the same at n."""
        return _Line(0.0, self(n) / n) if self.fixed < 0 else self


@dataclass(frozen=True)
class _Pass:
    """A forward and a backward of n images: bytes over those before, at the highest of the forward,
    after it and at the highest of the backward; seconds of both."""

    forward: _Line
    kept: _Line
    backward: _Line
    forward_seconds: _Line
    backward_seconds: _Line


class _Model:
    """Bytes that training adds, and seconds of a step, for each choice."""

    def __init__(
        self,
        meter: Meter,
        encoder: Encoder,
        generator: nn.Module,
        target: Target,
        settings: TrainSection,
    ) -> None:
        self.meter, self.device = meter, meter.device
        self.encoder, self.target, self.settings = encoder, target, settings
        self.precision = precision.of_generator(settings.precision, self.device)
        self.n, self.rows = settings.batch_size, target.num_classes
        self.rows_in_batch = target.rows_of(settings)
        self.row = 4 * len(target.bound.moments) * encoder.dim  # bytes of one
        self.means_bytes = self.rows * self.row
        self.numbers = target.numbers(encoder)
        self.weights = sum(p.numel() * p.element_size() for p in generator.parameters())
        buffers = sum(b.numel() * b.element_size() for b in generator.buffers())
        self.other = 4 * self.weights + buffers  # gradient, Adam's two, the average
        self.offload = self.device.type != "cpu"
        with torch.random.fork_rng(), torch.enable_grad():
            shape = self._measure_generator(generator)
            self.image_bytes = 4 * math.prod(shape)
            self._measure_loss(shape)

    def candidates(self) -> Iterator[_Choice]:
        sizes = sorted({math.ceil(self.n / parts) for parts in range(1, self.n + 1)})
        for recompute in self.generator:
            for state in self.estimator:
                for m in sizes:
                    yield _Choice(m, recompute, state)

    def peak(self, choice: _Choice) -> int:
        made, chunk, m = self.generator[choice.recompute], self.chunk, choice.micro_batch
        one = m == self.n
        images = self.image_bytes * self.n
        rows = (self._rows_of(m) - 1) * self.row  # a chunk was measured with one
        means = 0 if one else self.means_bytes
        value, _ = self.estimator[choice.state]
        loss = max(
            0 if one else means + self.sweep[0](m) + rows,
            means + chunk.forward(m) + rows,
            means + chunk.kept(m) + rows + value * self.means_bytes / 4,
            images + self.means_bytes + chunk.backward(m) + 2 * rows,
        )
        step = max(made.forward(self.n), made.kept(self.n) + loss, images + made.backward(self.n))
        held = self.other + (self.state_bytes if choice.state == "device" else 0)
        target = 20 * self.numbers if self.device.type == "cpu" else 0  # made in float64, once
        return int(max(held + step, target))

    def seconds(self, choice: _Choice) -> float:
        made, chunk, m = self.generator[choice.recompute], self.chunk, choice.micro_batch
        again = self.n - m  # what the second sweep computes again
        chunks = math.ceil(self.n / m) - 1
        (_, first), both = self.sweep, (chunk.forward_seconds, chunk.backward_seconds)
        time = sum(line(m) for line in both) + (chunks * sum(line.fixed for line in (first, *both)))
        time += again * sum(line.each for line in (first, *both))
        plain = self.generator[False]  # computing again takes no less time, whatever was measured
        time += max(
            each.forward_seconds(self.n) + each.backward_seconds(self.n) for each in (made, plain)
        )
        return time + self.estimator[choice.state][1] * self.means_bytes / 4

    def _rows_of(self, m: int) -> int:
        """The most rows that a chunk of a batch with rows in turn has."""
        rows = self.rows_in_batch
        return min(rows, m, math.ceil((m - 1) / max(1.0, self.n / rows)) + 1)

    def _measure_generator(self, generator: nn.Module) -> list[int]:
        """Returns (C, H, W) of its images."""
        probe = copy.deepcopy(generator).train()
        probe.zero_grad(set_to_none=True)
        latent = int(probe.z_dim)  # type: ignore[arg-type]
        shape: list[int] = []

        def make(n: int) -> Callable[[], Tensor]:
            z = torch.randn(n, latent, device=self.device)
            y = None
            if self.target.labelled:
                y = torch.arange(n, device=self.device) % self.rows

            def forward() -> Tensor:
                out = precision.generated(probe, z, y, self.precision, self.device)
                shape[:] = out.shape[1:]
                return out

            return forward

        def backward(out: Tensor) -> None:
            with precision.products(self.precision, self.device):
                out.backward(torch.ones_like(out))
            probe.zero_grad(set_to_none=True)

        self.generator: dict[bool, _Pass] = {}
        for recompute in (False, True) if hasattr(probe, "recompute") else (False,):
            if hasattr(probe, "recompute"):
                probe.recompute = recompute  # type: ignore[assignment]
            self.generator[recompute] = self._line(make, backward, least=2)
        return shape

    def _measure_loss(self, shape: list[int]) -> None:
        loss = self._loss("device")
        # The target, and what the estimator keeps of its size.
        vectors = sum(b.shape == loss.by_class.target.shape for b in loss.by_class.buffers())
        self.state_bytes = 4 * self.numbers * vectors

        def embed(m: int) -> Callable[[], Any]:
            x = torch.rand(m, *shape, device=self.device)

            def forward() -> Any:
                pixels = x.detach().requires_grad_()
                return pixels, loss._embed(pixels, None, 1)[0]

            return forward

        def pull(made: Any) -> None:
            pixels, means = made
            torch.autograd.grad(means, pixels, torch.ones_like(means))

        self.chunk = self._line(embed, pull, least=1)
        self.sweep = self._sweep(loss, shape)
        self.estimator = {
            state: self._estimator(state)
            for state in (("device", "host") if self.offload else ("device",))
        }

    def _line(
        self, make: Callable[[int], Callable[[], Any]], backward: Callable[[Any], None], least: int
    ) -> _Pass:
        def once(n: int) -> list[float]:
            forward = make(n)
            self.meter.settle()
            before = self.meter.used()
            peak, seconds, out = self.meter(forward)
            self.meter.settle()
            kept = self.meter.used() - before
            high, more, _ = self.meter(lambda: backward(out))
            return [peak - before, kept, high - before, seconds, more]

        small = min(least, self.n)
        once(small)  # what is loaded late is loaded now
        for _ in range(4):  # the fewer, the more of what is measured is not theirs
            grown = _PROBE_BYTES / max(1.0, *once(small)[:3])
            if small == self.n or grown < 2:
                break
            small = min(self.n, math.ceil(small * min(grown, 16)))
        sizes = sorted(
            {small if 2 * small <= self.n else math.ceil(self.n / 2), min(self.n, 2 * small)}
        )
        self.sizes = sizes
        found = []
        for n in sizes:
            one, two = once(n), once(n)
            found.append((n, [*two[:3], *map(min, one[3:], two[3:])]))
        lines = [_Line.through([(n, values[i]) for n, values in found]) for i in range(5)]
        return _Pass(*lines[:3], *(line.of_time(sizes[-1]) for line in lines[3:]))

    def _sweep(self, loss: MMDLoss, shape: list[int]) -> tuple[_Line, _Line]:
        """Bytes and seconds of a chunk without a graph."""

        @torch.no_grad()
        def once(m: int) -> tuple[int, int, float]:
            x = torch.rand(m, *shape, device=self.device)
            self.meter.settle()
            before = self.meter.used()
            peak, seconds, _ = self.meter(lambda: loss._embed(x, None, 1))
            return m, peak - before, seconds

        found = [min((once(m), once(m)), key=lambda each: each[2]) for m in self.sizes]
        return (
            _Line.through([(m, bytes_) for m, bytes_, _ in found]),
            _Line.through([(m, seconds) for m, _, seconds in found]).of_time(self.sizes[-1]),
        )

    def _estimator(self, state: str) -> tuple[float, float]:
        """Bytes and seconds for each number of the means, of the loss and its gradient in them."""
        part = min(1.0, _PROBE_NUMBERS / (self.means_bytes / 4))
        loss = self._loss(state, part)
        blocks = [loss.by_class, *([] if loss.shared is None else [loss.shared])]
        dim = sum(block.target.shape[2] for block in blocks)
        means = torch.rand(blocks[0].target.shape[0], self.rows, dim, device=self.device)
        counts = torch.full((self.rows,), 10.0, device=self.device)

        def value() -> Tensor:
            leaf = means.detach().requires_grad_()
            return torch.autograd.grad(loss._value(leaf, counts), leaf)[0]

        value()
        self.meter.settle()
        before = self.meter.used()
        peak, seconds, _ = self.meter(value)
        return (peak - before) / means.numel(), seconds / means.numel()

    def _loss(self, state: str, part: float = 0.0) -> MMDLoss:
        """One on a release of nothing, whose target has so large a part of the real one's size."""
        target = self.target
        bound, shared, moments = target.bound, target.shared_taps, len(target.bound.moments)
        taps = [max(1, int(part * tap.size)) for tap in self.encoder.taps]
        metadata = Metadata.model_construct(
            moments=bound.moments,
            bound=bound.kind,
            clip=bound.clip,
            joint_weight=bound.joint_weight,
            num_classes=self.rows,
            labelled=target.labelled,
            shared_taps=shared,
            encoder=self.encoder.spec(),
            selection_encoder=None,
            num_units=1,
        )
        release = Release(
            torch.rand(moments, self.rows, sum(taps[shared:])),
            torch.ones(self.rows, dtype=torch.float64),
            metadata,
            None,
            torch.rand(moments, 1, sum(taps[:shared])) if shared else None,
        )
        loss = MMDLoss(
            release,
            self.encoder,
            estimator=self.settings.estimator,
            decay=self.settings.estimator_decay,
            lr=self.settings.estimator_lr,
            state=state,
        )
        return loss.train()
