"""What the public operations refuse, with what to try, before a core sees it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpmmd._contract import checks, plans
from dpmmd._contract.checks import brief
from dpmmd._ops.once import untraced
from dpmmd.bounds import Bound

_SEQUENCES = frozenset({list, tuple})


def checked(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
) -> tuple[Bound, Sequence[Tensor]]:
    """The bound that the keywords of `mean_embedding` describe, and the features.

    What does not fit is refused. Where nothing traces the features come with the plan of the call,
    and features alike, of a later call with the same keywords, are not checked again.
    """

    def check() -> Bound:
        check_features(features, labels, num_classes)
        return Bound.checked(moments, bound, clip, joint_weight)

    if (
        not torch.compiler.is_compiling()
        and _SEQUENCES.issuperset((type(features), type(moments)))
        and features
        and type(num_classes) is int
        and untraced(*features, labels)
    ):
        options = (*moments, bound, clip, joint_weight)
        plan = plans.find(features, labels, num_classes, options, check)
        if plan is not None:
            return plan.bound, plan.of(features)
    return check(), features


def check_features(features: Sequence[Tensor], labels: Tensor | None, num_classes: int) -> None:
    """Refuses features, labels and a number of classes that do not fit each other."""
    if isinstance(features, Tensor) or not features:
        raise TypeError(
            "features: expected a non-empty sequence of tensors, one per tap; "
            "wrap a single tensor as [tensor]."
        )
    first = features[0]
    for i, f in enumerate(features):
        if not isinstance(f, Tensor) or not f.is_floating_point() or f.ndim < 2:
            raise TypeError(f"features[{i}]: expected a floating tensor [n, ...], got {brief(f)}.")
        if f.shape[0] != first.shape[0] or f.dtype != first.dtype or f.device != first.device:
            raise ValueError(
                f"features[{i}]: {brief(f)}, expected n, dtype and device of "
                f"features[0]: {brief(first)}."
            )
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r}: expected an int >= 1.")
    if labels is None:
        if num_classes != 1:
            raise ValueError(f"labels=None: expected labels, since num_classes={num_classes}.")
    else:
        checks.check_labels(labels, first.shape[0], first.device)


def check_labels(labels: Tensor, like: Tensor, num_classes: int) -> None:
    """Refuses labels that are not int64 [n] on the device of ``like`` [n, ...], in 0..K-1."""
    checks.check_labels(labels, like.shape[0], like.device)
    checks.check_values(labels, num_classes)


def check_target(means: Tensor, counts: Tensor, target: Tensor) -> None:
    """Refuses a target of other shape than the means [M, K, D], or counts of other classes."""
    if means.shape != target.shape or counts.shape != means.shape[1:2]:
        raise ValueError(
            f"target: shape {tuple(target.shape)}, expected that of means {tuple(means.shape)} "
            f"with counts [{means.shape[1]}] (got {tuple(counts.shape)}): [moments, classes, "
            "features]. Use the encoder, taps, moments and classes that the target was made with."
        )
