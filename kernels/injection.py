"""The mean embedding whose gradient a tap's ReLU adds to its own; see `dpmmd.injection`.

Launches: a `rectify` and a `rectified_gradient` a tap, which read and write what the ReLU reads and
writes anyway; forward 2 more (finish, class sums) and backward 2 more (partial dots, finish).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpmmd._cores.taps import PLANES, layout
from dpmmd.kernels import schedule as schedules
from dpmmd.kernels import table
from dpmmd.kernels.class_sums import class_sums
from dpmmd.kernels.gradient import gradient
from dpmmd.kernels.row_dots import row_dots
from dpmmd.kernels.row_statistics import finish_into, partial_statistics_of
from dpmmd.kernels.taps import Taps


def forward(
    features: Sequence[Tensor],
    partials: Sequence[Tensor | None],
    labels: Tensor | None,
    num_classes: int,
    *,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `mean_embedding.forward`, with the partial statistics that taps bring.

    Args:
        features: taps [n, C, H, W], channels-last (others are copied), or [n, d].
        partials: from `row_statistics.rectify`, or None for a tap that has none.
    """
    taps = _channels_last(features)
    per_tap = bound.endswith("-per-tap")
    norms = 2 if len(moments) == 2 and joint_weight is None else 1
    size = (norms, taps.n, len(features) if per_tap else 1)
    length = schedules.size(taps.n, None if labels is None else num_classes)
    new = {"device": taps.device}
    scale, projection = (torch.zeros(size, dtype=torch.float32, **new) for _ in range(2))
    counts = torch.zeros(num_classes, dtype=torch.float32, **new)
    schedule = torch.zeros(length, dtype=torch.int32, **new)
    if taps.n and taps.dim:
        config = table.lookup("row_statistics", taps.device, taps.dtype, taps.dim)
        whole = [
            partial_statistics_of(Taps([tap]), config, moments, schedule)
            if given is None
            else given
            for tap, given in zip(taps.tensors, partials, strict=True)
        ]
        finish_into(
            taps,
            None if labels is None else labels.contiguous(),
            torch.cat(whole, dim=2),
            config.block,
            moments=moments,
            bound=bound,
            clip=clip,
            joint_weight=joint_weight,
            scale=scale,
            projection=projection,
            counts=counts,
            schedule=schedule,
        )
    means = class_sums(
        taps, schedule, scale, num_classes, moments=moments, joint_weight=joint_weight
    )
    return means, counts, scale, projection, schedule


def backward(
    features: Sequence[Tensor],
    labels: Tensor | None,
    *,
    moments: Sequence[int],
    joint_weight: float | None,
    scale: Tensor,
    projection: Tensor,
    schedule: Tensor,
    upstream: Tensor,
    needed: Sequence[bool],
) -> tuple[Taps, Tensor, list[Tensor | None]]:
    """The taps' places and the coefficients, for `rectified_gradient`; gradients where needed."""
    taps = _channels_last(features)
    coefficients = row_dots(
        taps,
        labels,
        schedule,
        scale,
        projection,
        upstream,
        moments=moments,
        joint_weight=joint_weight,
    )
    gradients = gradient(
        taps,
        schedule,
        scale,
        coefficients,
        upstream,
        moments=moments,
        joint_weight=joint_weight,
        needed=needed,
    )
    taps.tensors = []  # which live as long as their own ReLUs need them
    return taps, coefficients, gradients


def _channels_last(features: Sequence[Tensor]) -> Taps:
    return Taps(
        [
            f.contiguous(memory_format=torch.channels_last) if layout(f) == PLANES else f
            for f in features
        ]
    )
