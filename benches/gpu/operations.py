"""Timings of the operations: each over its own bytes, the loss whole, one core against another."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benches import baselines
from benches.backends import KERNELS, compiled
from benches.gpu import inputs
from benches.gpu.device import GRAPH
from benches.gpu.inputs import Scale
from benches.gpu.measure import Call, Measure, sets_of
from benches.gpu.suite import conformance
from benches.shapes import Case
from dpmmd import functional, reference
from dpmmd._contract.protocol import Saved
from dpmmd._cores import named
from dpmmd.bounds import Bound

COPY = "copy"
CASES: tuple[tuple[int, tuple[int, ...]], ...] = ((1, (1,)), (10, (1, 2)))  # K, moments
LOSS = "mmd_loss, forward + backward"
FORWARD, BACKWARD = "mean_embedding, forward", "mean_embedding, backward"
ESTIMATE, SUMS = "estimator adam, step", "release, integer class sums"


def copy(measure: Measure, scale: Scale) -> None:
    """The copy speed, bytes read and bytes written, that everything else is compared with."""
    device = measure.device
    size = min(4 << 30, device.memory_bytes // 16) if not device.dry else 1 << 16
    source = torch.empty(size // 4, device=device.device).normal_()
    to = torch.empty_like(source)
    calls = {COPY: [lambda: to.copy_(source)]}
    measure(COPY, f"{size / 1e9:.1f} GB", "float32", calls, min_bytes=2 * size)


def _cases(scale: Scale) -> list[tuple[int, tuple[int, ...]]]:
    return [(min(k, scale.classes), moments) for k, moments in CASES]


def pieces(measure: Measure, scale: Scale, broken: set[tuple[str, str]]) -> None:
    """Triton's kernels one by one, replayed as graphs: over the bytes that each moves."""
    for pixels in scale.pixels:
        dtypes = (torch.bfloat16, torch.float32) if pixels == scale.pixels[0] else (torch.bfloat16,)
        for dtype in dtypes:
            for classes, moments in _cases(scale):
                like = inputs.case(scale, pixels, dtype, classes, moments)
                if measure.budget.fits(f"kernels, {like.shape}, {like.dtype_name}"):
                    try:
                        _pieces(measure, like, broken)
                    except torch.OutOfMemoryError:
                        measure.budget.skip(f"kernels, {like.shape}", "out of memory")
                measure.device.free()


def _pieces(measure: Measure, like: Case, broken: set[tuple[str, str]]) -> None:
    from dpmmd.kernels.class_sums import class_sums_into
    from dpmmd.kernels.gradient import Terms, gradient_into
    from dpmmd.kernels.row_dots import row_dots, row_dots_into
    from dpmmd.kernels.row_statistics import row_statistics, row_statistics_into
    from dpmmd.kernels.taps import Taps

    device = measure.device
    count = sets_of(like.feature_bytes, device.cache_bytes)
    labels, upstream = like.labels(device.device), like.target(device.device)
    bound = Bound(like.moments)
    means = torch.empty_like(upstream)
    calls: dict[str, list[Call]] = {name: [] for name in BYTES}
    for seed in range(count):
        maps = like.features(device.device, seed)
        taps = Taps(maps)
        saved, counts = row_statistics(taps, labels, like.classes, bound)
        coefficients = row_dots(taps, labels, bound, saved, upstream)
        terms = Terms(bound, saved, coefficients, upstream)
        gradients = [torch.empty_like(f) for f in maps]
        again = Saved(*(torch.empty_like(buffer) for buffer in saved))
        for name, call in {
            "row statistics": partial(row_statistics_into, taps, labels, bound, again, counts),
            "class sums": partial(class_sums_into, taps, bound, saved, means),
            "row dots": partial(row_dots_into, taps, labels, bound, saved, upstream, coefficients),
            "gradient": partial(gradient_into, taps, terms, gradients),
        }.items():
            calls[name].append(call)
    for name, (reads, vectors) in BYTES.items():
        if (KERNELS, conformance.EMBEDDING) in broken:
            measure.budget.skip(f"{name}, {KERNELS}", "its check failed")
            continue
        least = reads * like.feature_bytes + vectors * like.d_vector_bytes
        variants, graph = {KERNELS: calls[name]}, capturable([KERNELS], broken)
        measure(name, like.shape, like.dtype_name, variants, min_bytes=least, graph=graph)


# Operation -> passes over the features, vectors of D float32 (a moment and class).
BYTES = {"row statistics": (1, 0), "class sums": (1, 1), "row dots": (1, 1), "gradient": (2, 1)}


def capturable(present: Sequence[str], broken: set[tuple[str, str]]) -> list[str]:
    """Backends that a CUDA graph can hold: plain torch counts classes on the host.

    What could not be captured in a check is not tried again: a capture that fails may leave the
    allocator in a state that everything after it would suffer from.
    """
    return [b for b in compiled(present) if (b, GRAPH) not in broken]


def loss(
    measure: Measure, scale: Scale, present: Sequence[str], broken: set[tuple[str, str]]
) -> None:
    """The loss whole, against the authors' formulas and torch.compile of them."""
    needs = conformance.EMBEDDING, conformance.ESTIMATOR
    sound = [b for b in present if not {(b, need) for need in needs} & broken]
    for pixels in scale.pixels[:3:2] if len(scale.pixels) > 2 else scale.pixels:
        for classes, moments in _cases(scale):
            like = inputs.case(scale, pixels, torch.bfloat16, classes, moments)
            compiled = scale.compile and pixels == scale.pixels[0]
            if measure.budget.fits(f"loss, {like.shape}"):
                try:
                    _loss(measure, like, sound, capturable(present, broken), compiled)
                except torch.OutOfMemoryError:
                    measure.budget.skip(f"loss, {like.shape}", "out of memory")
            measure.device.free()


def _loss(
    measure: Measure, like: Case, sound: Sequence[str], replayable: Sequence[str], compiled: bool
) -> None:
    device = measure.device
    count = sets_of(like.feature_bytes, device.cache_bytes)
    labels, target = like.labels(device.device), like.target(device.device)
    sets = [
        [f.requires_grad_() for f in like.features(device.device, seed)] for seed in range(count)
    ]

    def calls(
        embed: Callable[..., tuple[Tensor, Tensor]], value: Callable[..., Tensor]
    ) -> list[Call]:
        def call(features: list[Tensor]) -> tuple[Tensor, ...]:
            means, counts = embed(features, labels, like.classes, moments=like.moments)
            return torch.autograd.grad(value(means, counts, target), features)

        return [partial(call, features) for features in sets]

    variants = {"eager": calls(baselines.mean_embedding, baselines.mmd_loss)}
    if compiled:
        torch._dynamo.reset()
        whole = torch.compile(_authors_loss, dynamic=False)

        def call(features: list[Tensor]) -> tuple[Tensor, ...]:
            value = whole(features, labels, like.classes, like.moments, target)
            return torch.autograd.grad(value, features)

        variants["compile"] = [partial(call, features) for features in sets]
    for backend in sound:
        variants[backend] = calls(
            partial(functional.mean_embedding, backend=backend),
            partial(functional.mmd_loss, backend=backend),
        )
    arguments: dict[str, Any] = {
        "min_bytes": 3 * like.feature_bytes + 3 * like.d_vector_bytes,
        "theirs": ("eager", "compile"),
    }
    measure(LOSS, like.shape, like.dtype_name, variants, **arguments)
    # Replayed, the same launches cost nothing but what the device does.
    again = {name: variants[name] for name in sound if name in replayable}
    if again and not device.dry:
        measure(f"{LOSS}, replayed", like.shape, like.dtype_name, again, graph=again, **arguments)


def _authors_loss(
    features: list[Tensor],
    labels: Tensor | None,
    classes: int,
    moments: Sequence[int],
    target: Tensor,
) -> Tensor:
    means, counts = baselines.mean_embedding(features, labels, classes, moments=moments)
    return baselines.mmd_loss(means, counts, target)


def cores(
    measure: Measure, scale: Scale, present: Sequence[str], broken: set[tuple[str, str]]
) -> None:
    """The same operations by every core of the library, replayed as graphs where they can be."""
    for pixels in scale.pixels[:3:2] if len(scale.pixels) > 2 else scale.pixels:
        like = inputs.case(scale, pixels, torch.bfloat16, *_cases(scale)[1])
        for part in (_embedding, _estimate, _sums):
            if measure.budget.fits(f"cores, {like.shape}"):
                try:
                    part(measure, like, present, broken)
                except torch.OutOfMemoryError:
                    measure.budget.skip(f"{part.__name__[1:]}, {like.shape}", "out of memory")
            measure.device.free()


def _embedding(
    measure: Measure, like: Case, present: Sequence[str], broken: set[tuple[str, str]]
) -> None:
    device = measure.device
    count = sets_of(like.feature_bytes, device.cache_bytes)
    labels, upstream = like.labels(device.device), like.target(device.device)
    sets = [
        [f.requires_grad_() for f in like.features(device.device, seed)] for seed in range(count)
    ]
    forward: dict[str, list[Call]] = {}
    backward: dict[str, list[Call]] = {}
    for backend in present:

        def embed(features: list[Tensor], backend: str = backend) -> Tensor:
            return functional.mean_embedding(
                features, labels, like.classes, moments=like.moments, backend=backend
            )[0]

        def forward_only(features: list[Tensor], embed: Any = embed) -> Tensor:
            with torch.no_grad():
                return embed(features)

        if (backend, conformance.EMBEDDING) in broken:
            continue
        forward[backend] = [partial(forward_only, fs) for fs in sets]
        backward[backend] = [
            partial(torch.autograd.grad, embed(fs), fs, grad_outputs=upstream, retain_graph=True)
            for fs in sets
        ]
    bytes_, vectors = like.feature_bytes, like.d_vector_bytes
    shape, graph = (like.shape, like.dtype_name), capturable(present, broken)
    measure(FORWARD, *shape, forward, min_bytes=2 * bytes_ + vectors, graph=graph)
    # A graph cannot replay the backward of a forward that it does not hold.
    measure(BACKWARD, *shape, backward, min_bytes=3 * bytes_ + vectors)


def _estimate(
    measure: Measure, like: Case, present: Sequence[str], broken: set[tuple[str, str]]
) -> None:
    device = measure.device.device
    target = like.target(device)
    means, counts = target * 0.9, torch.ones(like.classes, device=device)
    variants: dict[str, list[Call]] = {}
    for backend in present:
        if (backend, conformance.ESTIMATOR) in broken:
            continue
        states: dict[str, Any] = {
            name: torch.zeros_like(target) for name in ("estimate", "first_moment", "second_moment")
        }
        states |= {"steps": torch.zeros(like.classes, device=device), "lr": 1e-3}
        call = partial(functional.adam_loss, means, counts, target, **states, backend=backend)
        variants[backend] = [call]
    least, graph = 9 * like.d_vector_bytes, capturable(present, broken)
    measure(ESTIMATE, like.shape, "float32", variants, min_bytes=least, graph=graph)


def _sums(
    measure: Measure, like: Case, present: Sequence[str], broken: set[tuple[str, str]]
) -> None:
    """Without plain torch, which is the definition, no competitor: it takes seconds a call."""
    device = measure.device
    count = sets_of(like.feature_bytes, device.cache_bytes)
    sets = [reference.flatten(like.features(device.device, seed)) for seed in range(count)]
    y = (torch.arange(like.n) % like.classes).to(device.device)
    valid = torch.ones(like.n, dtype=torch.bool, device=device.device)
    limits = torch.full((like.n,), 1 << 30, device=device.device)
    into = torch.zeros(
        like.classes, len(like.moments) * like.dim, dtype=torch.int64, device=device.device
    )
    given: dict[str, Any] = {"labels": y, "valid": valid, "limits": limits, "sums": into}
    given |= {"bound": Bound(like.moments, joint_weight=1.0), "nonnegative": True}
    variants: dict[str, list[Call]] = {}
    for backend in compiled(present):
        if (backend, conformance.SUMS) not in broken:
            add = partial(named(backend).bounded_sums, **given)
            variants[backend] = [partial(add, features) for features in sets]
    # Four passes over the features: their largest, their squares, the certificate, the sums.
    least, graph = 4 * like.feature_bytes + 4 * like.d_vector_bytes, capturable(present, broken)
    measure(SUMS, like.shape, like.dtype_name, variants, min_bytes=least, graph=graph)
