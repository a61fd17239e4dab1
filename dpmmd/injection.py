"""Gradient injection: the loss's gradient is added where the encoder's ReLUs make theirs.

In plain autograd the mean embedding writes a gradient for every feature, which is read again to be
added to what the next layer sends back, and once more by the ReLU. Here each tap's ReLU is ours:

    forward     f = max(x + bias, 0) and its image's sums of f^2 and f^4, in one pass over x
    backward    dx = (upstream + E) [f > 0] in one pass, E the loss's gradient for this tap

The mean embedding leaves E in a `Slot` as a function of f and returns no gradient for the feature;
autograd still runs the ReLU after it, for the ReLU's output was its input. A slot belongs to one
forward pass and is reached through that pass's graph alone: what becomes of one pass concerns no
other. Taps that are not the output of a `dpmmd.encoders.Rectified` stage, such as pooled ones and
linear bottlenecks, take the plain path beside those that are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpmmd import backends, functional
from dpmmd._cores import cpu
from dpmmd._cores.protocol import Saved
from dpmmd._cores.taps import rows_of
from dpmmd.bounds import Bound
from dpmmd.encoders import Encoder

BACKENDS = ("auto", "torch", "cpu", "triton")


def check(backend: str) -> None:
    """Refuses a backend that has no injection: a ValueError."""
    origin, chosen = backends._requested(backend)
    if chosen not in BACKENDS:
        raise ValueError(
            f"inject=True with {origin}={chosen!r}: expected one of "
            f"{', '.join(map(repr, BACKENDS))}; leave inject out, or the backend."
        )


def mean_embedding(
    encoder: Encoder,
    images: Tensor,
    labels: Tensor | None = None,
    num_classes: int = 1,
    *,
    moments: Sequence[int] = (1,),
    bound: str = "sphere",
    clip: float = 1.0,
    joint_weight: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`dpmmd.functional.mean_embedding` of an encoder's features, differentiable in the images.

    Its gradient cannot be differentiated again.

    Args:
        encoder, images: as in ``encoder(images)``.
        labels, num_classes, moments, bound, clip, joint_weight: as there.
        backend: "torch" (any floating dtype and device), "cpu" or "triton"; see `dpmmd.backends`.

    Returns:
        ``means`` [M, K, D] and ``counts`` [K].

    Raises:
        ValueError: ``backend`` has no injection; as there and as ``encoder(images)``.
    """
    check(backend)
    chosen = backends._requested(backend)[1]
    if chosen == "auto":
        dtype = next((p.dtype for p in encoder.parameters()), images.dtype)
        chosen = backends.resolve("auto", images.device.type, dtype)
        if chosen not in BACKENDS:  # the CUDA core has none
            chosen = "torch" if backends.triton_hindrance() else "triton"
    slots = {name: _SLOTS[chosen](tuple(moments), encoder.dim) for name in encoder.rectified}
    features = encoder(images, slots)
    functional._check(features, labels, num_classes, moments, bound, clip, joint_weight)
    of_taps = [slots.get(tap.name) for tap in encoder.taps]
    if chosen in _EMBEDDINGS:
        backends.resolve(chosen, features[0].device.type, features[0].dtype)  # refuses others
        return _EMBEDDINGS[chosen].apply(
            labels,
            num_classes,
            tuple(moments),
            bound,
            float(clip),
            joint_weight,
            of_taps,
            *features,
        )
    labels = functional._checked_values(labels, features[0], num_classes)
    taps = [rows_of(f) for f in features]
    dtype = torch.float64 if taps[0].dtype == torch.float64 else torch.float32
    counts = functional.class_counts(labels, num_classes, dtype)
    means = functional._MeanEmbedding.apply(
        labels, counts, tuple(moments), bound, float(clip), joint_weight, of_taps, *taps
    )
    return means, counts


# What torch.compiler.disable marks, whose import would take seconds: slots are no part of a graph.
mean_embedding._torchdynamo_disable = True  # type: ignore[attr-defined]


class Slot:
    """What a tap's ReLU and the mean embedding tell each other in one pass.

    Args:
        moments: whose squared norms are wanted.
        dim: D, of all taps.

    Attributes:
        adds_bias: whether `forward` adds the bias of the layer before, or gets it added.
        squares: for each moment the sums of f^2 or f^4, [n]; from the ReLU.
        gradient: rows of f [n, d] -> E [n, d]; from the mean embedding's backward.
    """

    adds_bias = True

    def __init__(self, moments: tuple[int, ...], dim: int) -> None:
        self.moments, self.dim = moments, dim
        self.squares: list[Tensor] = []
        self.gradient: Callable[[Tensor], Tensor] | None = None

    def __call__(self, x: Tensor, bias: Tensor | None, ceiling: float | None) -> Tensor:
        """f = min(max(x + bias, 0), ceiling), in the place of x."""
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        return _Rectify.apply(x, bias, ceiling, self)

    def forward(self, x: Tensor, bias: Tensor | None, ceiling: float | None) -> None:
        """Overwrites x with f, and takes its statistics."""
        if bias is not None:
            x.add_(bias[:, None, None])
        x.relu_() if ceiling is None else x.clamp_(0, ceiling)
        f = rows_of(x).to(torch.promote_types(x.dtype, torch.float32))
        self.squares = [
            torch.linalg.vector_norm(f if m == 1 else f * f, dim=1).square() for m in self.moments
        ]

    def backward(self, f: Tensor, incoming: Tensor | None, ceiling: float | None) -> Tensor | None:
        """The gradient of x: (incoming + E) where f is in (0, ceiling)."""
        total = incoming
        if self.gradient is not None:
            n, channels, height, width = f.shape
            own = self.gradient(rows_of(f))
            own = own.view(n, height, width, channels).permute(0, 3, 1, 2)
            total = own if incoming is None else own.add_(incoming)
            self.gradient = None
        if total is None:
            return None
        passes = f > 0 if ceiling is None else (f > 0) & (f < ceiling)
        return torch.where(passes, total, 0).to(f.dtype)


class _Rectify(torch.autograd.Function):
    """A ReLU that adds what its slot holds to its gradient. Saved for backward: f alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, ceiling: float | None, slot: Slot
    ) -> Tensor:
        ctx.set_materialize_grads(False)  # None: no layer behind has a gradient
        slot.forward(x, bias, ceiling)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        ctx.ceiling, ctx.slot = ceiling, slot
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (f,) = ctx.saved_tensors
        return ctx.slot.backward(f, incoming, ctx.ceiling), None, None, None


class _TritonSlot(Slot):
    """The same on Triton's kernels: one pass over x forward, one over f and its gradient backward.

    Attributes:
        partials: partial statistics of f, from the ReLU.
        left: what `dpmmd.kernels.gradient.rectified_gradient` needs besides f; from the embedding.
    """

    partials: Tensor | None = None
    left: tuple[Any, ...] | None = None

    def forward(self, x: Tensor, bias: Tensor | None, ceiling: float | None) -> None:
        from dpmmd.kernels.row_statistics import rectify

        self.partials = rectify(x, bias, ceiling, Bound(self.moments), self.dim)

    def backward(self, f: Tensor, incoming: Tensor | None, ceiling: float | None) -> Tensor | None:
        if self.left is None:
            return super().backward(f, incoming, ceiling)
        from dpmmd.kernels.gradient import rectified_gradient

        left, self.left = self.left, None
        return rectified_gradient(*left, f, incoming, ceiling)


class _TritonEmbedding(torch.autograd.Function):
    """`functional.mean_embedding` on Triton's kernels, for taps of which some have a slot."""

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor | None,
        num_classes: int,
        moments: tuple[int, ...],
        bound: str,
        clip: float,
        joint_weight: float | None,
        slots: Sequence[_TritonSlot | None],
        *features: Tensor,
    ) -> tuple[Tensor, Tensor]:
        from dpmmd.kernels import injection as kernels

        ctx.bound = Bound(moments, bound, clip, joint_weight)
        partials = [None if slot is None else slot.partials for slot in slots]
        means, counts, saved = kernels.forward(features, partials, labels, num_classes, ctx.bound)
        for slot in slots:
            if slot is not None:
                slot.partials = None
        ctx.mark_non_differentiable(counts)
        ctx.save_for_backward(labels, *saved, *features)
        ctx.slots = slots
        return means, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        from dpmmd.kernels import injection as kernels

        labels, scale, projection, schedule, *features = ctx.saved_tensors
        needed = ctx.needs_input_grad[7:]
        written = [wanted and slot is None for wanted, slot in zip(needed, ctx.slots, strict=True)]
        taps, terms, gradients = kernels.backward(
            features,
            labels,
            ctx.bound,
            Saved(scale, projection, schedule),
            grad.contiguous(),
            written,
        )
        for column, slot in enumerate(ctx.slots):
            if slot is not None and needed[column]:
                slot.left = (taps, column, terms)
        return *([None] * 7), *[
            g if need else None for g, need in zip(gradients, written, strict=True)
        ]


class _CpuSlot(Slot):
    """The same on the native core, in backward: one pass over f and its gradient.

    Forward is torch's: its convolutions add the bias as they write, and the core's class sums take
    a row's statistics while it is in the cache.

    Attributes:
        left: what `dpmmd._cores.cpu.rectified_gradient` needs besides f; from the embedding.
    """

    adds_bias = False
    left: Mapping[str, Any] | None = None

    def forward(self, x: Tensor, bias: Tensor | None, ceiling: float | None) -> None:
        assert bias is None
        x.relu_() if ceiling is None else x.clamp_(0, ceiling)

    def backward(self, f: Tensor, incoming: Tensor | None, ceiling: float | None) -> Tensor | None:
        if self.left is None:
            return super().backward(f, incoming, ceiling)
        left, self.left = self.left, None
        return cpu.rectified_gradient(f, incoming, ceiling, **left)


class _CpuEmbedding(torch.autograd.Function):
    """`functional.mean_embedding` on the native core, for taps of which some have a slot."""

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor | None,
        num_classes: int,
        moments: tuple[int, ...],
        bound: str,
        clip: float,
        joint_weight: float | None,
        slots: Sequence[_CpuSlot | None],
        *features: Tensor,
    ) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = {
            "moments": moments,
            "bound": bound,
            "joint_weight": joint_weight,
        }
        means, counts, scale, projection = cpu.forward(
            features, labels, num_classes, clip=clip, **options
        )
        ctx.mark_non_differentiable(counts)
        ctx.save_for_backward(labels, scale, projection, *features)
        ctx.slots, ctx.num_classes, ctx.options = slots, num_classes, options
        return means, counts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        labels, scale, projection, *features = ctx.saved_tensors
        needed = ctx.needs_input_grad[7:]
        written = [wanted and slot is None for wanted, slot in zip(needed, ctx.slots, strict=True)]
        gradients, coefficients = cpu.backward(
            features,
            labels,
            ctx.num_classes,
            scale=scale,
            projection=projection,
            upstream=grad,
            needed=written,
            phases=cpu.BOTH if any(written) else cpu.DOTS,
            **ctx.options,
        )
        factors = {"scale": scale, "projection": projection, "coefficients": coefficients}
        pieces = grad.split([prod(f.shape[1:]) for f in features], dim=2)
        for column, slot in enumerate(ctx.slots):
            if slot is None or not needed[column]:
                continue
            block = column if scale.shape[2] > 1 else 0
            slot.left = {
                "labels": labels,
                "num_classes": ctx.num_classes,
                "moments": ctx.options["moments"],
                "joint_weight": ctx.options["joint_weight"],
                "upstream": pieces[column].contiguous(),
                **{name: buffer[:, :, block].contiguous() for name, buffer in factors.items()},
            }
        out = [g if wrote else None for g, wrote in zip(gradients, written, strict=True)]
        return None, None, None, None, None, None, None, *out


_SLOTS: dict[str, type[Slot]] = {"torch": Slot, "cpu": _CpuSlot, "triton": _TritonSlot}
_EMBEDDINGS: dict[str, Any] = {"cpu": _CpuEmbedding, "triton": _TritonEmbedding}
