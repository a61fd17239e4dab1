"""The mean embedding: `dpmmd::mean_embedding` and `dpmmd::mean_embedding_backward`."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from dpmmd._contract.plans import Plan, plan_of
from dpmmd._contract.protocol import Core, Saved
from dpmmd._contract.slot import Slot, written
from dpmmd._contract.taps import empty_gradients, statistics_shape
from dpmmd._cores import named
from dpmmd._ops.once import of_first_order, refuse_double_backward, untraced
from dpmmd.bounds import Bound

_DEVICES = ("cpu", "cuda")


def mean_embedding(
    core: Core,
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    bound: Bound,
    slots: Sequence[Slot | None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Class means [M, K, D] and counts [K] on a core, differentiable in the features.

    Arguments are those of `dpmmd.functional.mean_embedding`, which has checked them. Taps with a
    slot of this core (`dpmmd.injection`, which nothing traces) leave their gradient there.
    """
    plan = plan_of(features)
    if plan is not None or not core.opaque or slots is not None or untraced(*features, labels):
        return _MeanEmbedding.apply(core, labels, num_classes, bound, slots, plan, *features)
    means, counts, *_ = torch.ops.dpmmd.mean_embedding(
        list(features),
        labels,
        num_classes,
        list(bound.moments),
        bound.kind,
        bound.clip,
        bound.joint_weight,
        core.name,
    )
    return means, counts


class _MeanEmbedding(torch.autograd.Function):
    """Saved for backward: the features, the labels and O(n L) statistics."""

    @staticmethod
    def forward(
        ctx: Any,
        core: Core,
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        slots: Sequence[Slot | None] | None,
        plan: Plan | None,
        *features: Tensor,
    ) -> tuple[Tensor, Tensor]:
        given = features if plan is None else plan.of(features)
        means, counts, saved = core.forward(given, labels, num_classes, bound, slots)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(labels, *saved, *features)
        ctx.options = core, num_classes, bound, slots, plan
        return means, counts

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[6:]
        if grad is None:
            return (None,) * (6 + len(needed))
        core, num_classes, bound, slots, plan = ctx.options
        labels, scale, projection, schedule, *features = ctx.saved_tensors
        saved = Saved(scale, projection, schedule)
        taps = features if plan is None else plan.again(features, labels)
        given = taps, labels, num_classes, bound, saved, grad, needed, slots
        gradients = of_first_order(core.backward, features, given)
        if slots is None and all(needed):
            return None, None, None, None, None, None, *gradients
        found = [g if w else None for g, w in zip(gradients, written(needed, slots), strict=True)]
        return None, None, None, None, None, None, *found


@torch.library.custom_op("dpmmd::mean_embedding", mutates_args=(), device_types=_DEVICES)
def _forward(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
    core: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means, counts, scale, projection and, of the GPU cores, the labels' schedule."""
    folded = Bound(tuple(moments), bound, clip, joint_weight)
    means, counts, saved = named(core).forward(features, labels, num_classes, folded)
    return means, counts, *saved


@_forward.register_fake
def _(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
    core: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, folded = features[0].shape[0], Bound(tuple(moments), bound, clip, joint_weight)
    length = named(core).schedule_size(n, None if labels is None else num_classes)
    dim = sum(prod(f.shape[1:]) for f in features)
    size = statistics_shape(folded, n, len(features))
    new = features[0].new_empty
    return (
        new((len(moments), num_classes, dim), dtype=torch.float32),
        new((num_classes,), dtype=torch.float32),
        new(size, dtype=torch.float32),
        new(size, dtype=torch.float32),
        new((length,), dtype=torch.int32),
    )


@torch.library.custom_op(
    "dpmmd::mean_embedding_backward",
    mutates_args=(),
    device_types=_DEVICES,
    # Written out: older versions of PyTorch cannot infer a list that is returned.
    schema="(Tensor[] features, Tensor? labels, SymInt num_classes, SymInt[] moments, str bound, "
    "float? joint_weight, Tensor scale, Tensor projection, Tensor schedule, Tensor upstream, "
    "bool[] needed, str core) -> Tensor[]",
)
def _backward(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    moments: Sequence[int],
    bound: str,
    joint_weight: float | None,
    *rest: Any,
) -> list[Tensor]:
    scale, projection, schedule, upstream, needed, core = rest
    folded = Bound(tuple(moments), bound, joint_weight=joint_weight)
    saved = Saved(scale, projection, schedule)
    return named(core).backward(features, labels, num_classes, folded, saved, upstream, needed)


@_backward.register_fake
def _(features: Sequence[Tensor], *rest: Any) -> list[Tensor]:
    return empty_gradients(features, rest[-2])


_backward.register_autograd(refuse_double_backward)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, labels, *ctx.options = inputs
    _, counts, *statistics = output  # scale, projection, schedule
    ctx.mark_non_differentiable(counts, *statistics)
    ctx.save_for_backward(labels, *statistics, *features)


def _differentiate(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[list[Tensor | None] | None, ...]:
    labels, scale, projection, schedule, *features = ctx.saved_tensors
    num_classes, moments, bound, _clip, joint_weight, core = ctx.options
    needed = list(ctx.needs_input_grad[0])
    gradients = torch.ops.dpmmd.mean_embedding_backward(
        features,
        labels,
        num_classes,
        moments,
        bound,
        joint_weight,
        scale,
        projection,
        schedule,
        grad,
        needed,
        core,
    )
    found = [g if wanted else None for g, wanted in zip(gradients, needed, strict=True)]
    return found, None, None, None, None, None, None, None


_forward.register_autograd(_differentiate, setup_context=_save)
