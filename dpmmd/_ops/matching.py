"""The loss of features: mean embedding and estimator in one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dpmmd._contract.plans import Plan, plan_of
from dpmmd._contract.protocol import Core, Matched, Saved, Step
from dpmmd._contract.slot import Slot, written
from dpmmd._ops import embedding, estimator
from dpmmd._ops.arguments import check_target, checked
from dpmmd._ops.once import Once, untraced
from dpmmd.bounds import Bound


def loss(
    core: Core,
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    bound: Bound,
    target: Tensor,
    step: Step,
    slots: Sequence[Slot | None] | None = None,
) -> Tensor:
    """The scalar that an estimator's step makes of features, differentiable in them.

    One node on an opaque core where nothing traces; else the mean embedding's and the estimator's.

    Args:
        features, labels, num_classes, bound, slots: as in `dpmmd._ops.embedding.mean_embedding`.
        target: [M, K, D] on the device of the features, without a gradient; of an opaque core
            float32, like the state of ``step``.
        step: of the estimator.
    """
    options = bound.moments, bound.kind, bound.clip, bound.joint_weight
    bound, taps = checked(features, labels, num_classes, *options)
    plan, states = plan_of(taps), step.state().values()
    traced = not untraced(target, *states) or (plan is None and not untraced(*taps, labels))
    if traced or not core.opaque:
        means, counts = embedding.mean_embedding(core, taps, labels, num_classes, bound, slots)
        check_target(means, counts, target)
        return estimator.loss(core, means, counts, target, step)
    return _Matching.apply(core, labels, num_classes, bound, target, step, slots, plan, *taps)


_NOTHING = None, None, None  # of `Saved`


class _Matching(torch.autograd.Function):
    """Saved for backward: the features, the labels and what `Core.match` leaves."""

    @staticmethod
    def forward(
        ctx: Any,
        core: Core,
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        target: Tensor,
        step: Step,
        slots: Sequence[Slot | None] | None,
        plan: Plan | None,
        *features: Tensor,
    ) -> Tensor:
        given = features if plan is None else plan.of(features)
        value, matched = core.match(given, labels, num_classes, bound, target, step, slots)
        if step.update:
            for state in step.state().values():
                torch.autograd.graph.increment_version(state)
        saved, gradient = matched
        ctx.save_for_backward(labels, *(saved or _NOTHING), gradient, *features)
        ctx.options = core, num_classes, bound, slots, plan
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[8:]
        core, num_classes, bound, slots, plan = ctx.options
        labels, scale, projection, schedule, gradient, *features = ctx.saved_tensors
        saved = None if scale is None else Saved(scale, projection, schedule)
        matched = Matched(saved, gradient)
        taps = features if plan is None else plan.again(features, labels)
        given = taps, labels, num_classes, bound, matched, grad, needed, slots
        if torch.is_grad_enabled():  # create_graph=True
            with torch.no_grad():
                gradients = core.match_backward(*given)
            gradients = [Once.apply(f, g) for f, g in zip(features, gradients, strict=True)]
        else:
            gradients = core.match_backward(*given)
        found = [g if w else None for g, w in zip(gradients, written(needed, slots), strict=True)]
        return None, None, None, None, None, None, None, None, *found
