"""The loss of features: mean embedding and estimator in one node of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dpmmd._contract.plans import Plan, plan_of
from dpmmd._contract.protocol import Core, Matched, Saved, Step
from dpmmd._contract.slot import Slot, written
from dpmmd._ops import embedding, estimator
from dpmmd._ops.arguments import check_target, checked
from dpmmd._ops.once import of_first_order, of_torch, untraced
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
    plan, others = plan_of(taps), (target, *step.state().values())
    plainly = untraced(*taps, labels, *others) if plan is None else of_torch(others)
    if not plainly or not core.opaque:
        means, counts = embedding.mean_embedding(core, taps, labels, num_classes, bound, slots)
        check_target(means, counts, target)
        return estimator.loss(core, means, counts, target, step)
    call = _Call(core, num_classes, bound, slots, plan)
    return _Matching.apply(call, labels, target, step, *taps)


class _Call(NamedTuple):
    """What forward and backward of a node are both given, besides tensors."""

    core: Core
    num_classes: int
    bound: Bound
    slots: Sequence[Slot | None] | None
    plan: Plan | None


_NOTHING = None, None, None  # of `Saved`


class _Matching(torch.autograd.Function):
    """Saved for backward: the features, the labels and what `Core.match` leaves."""

    @staticmethod
    def forward(
        ctx: Any,
        call: _Call,
        labels: Tensor | None,
        target: Tensor,
        step: Step,
        *features: Tensor,
    ) -> Tensor:
        core, num_classes, bound, slots, plan = call
        given = features if plan is None else plan.of(features)
        step.settle()
        value, matched = core.match(given, labels, num_classes, bound, target, step, slots)
        step.mark()
        saved, gradient, lent = matched
        ctx.save_for_backward(labels, *(saved or _NOTHING), gradient, *features)
        ctx.call, ctx.lent = call, lent
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[4:]
        core, num_classes, bound, slots, plan = ctx.call
        labels, scale, projection, schedule, gradient, *features = ctx.saved_tensors
        saved = None if scale is None else Saved(scale, projection, schedule)
        matched = Matched(saved, gradient, ctx.lent)
        taps = features if plan is None else plan.again(features, labels)
        given = taps, labels, num_classes, bound, matched, grad, needed, slots
        gradients = of_first_order(core.match_backward, features, given)
        if slots is None and all(needed):
            return None, None, None, None, *gradients
        found = [g if w else None for g, w in zip(gradients, written(needed, slots), strict=True)]
        return None, None, None, None, *found
