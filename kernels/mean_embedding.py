"""Class means of the bounded moments and their gradient, with the arguments of `_cores.cpu`.

Launches: forward 3 (partial statistics, finish, class sums), backward 3 (partial dots, finish,
gradient), each over all taps; one more of each that reads the features where some taps are aligned
and others are not, or beyond `taps.MOST_TAPS` taps. Features are read twice each way and gradients
written once. Saved for backward: the features, O(n B) statistics and the schedule of the labels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpmmd._cores.taps import PLANES, layout
from dpmmd.kernels import schedule as schedules
from dpmmd.kernels.class_sums import class_sums
from dpmmd.kernels.gradient import gradient
from dpmmd.kernels.row_dots import row_dots
from dpmmd.kernels.row_statistics import row_statistics
from dpmmd.kernels.taps import Taps, brief, check_buffer


def forward(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    *,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Class means of bounded moments; see `dpmmd.functional.mean_embedding`.

    Returns:
        means [M, K, D], counts [K], per norm, image and block of taps scale and projection
        [N, n, B], all float32 and as `_cores.cpu.forward` has them, and the schedule of the labels,
        int32 [`schedule.size`(n, K)] (empty without labels), for `backward`.
    """
    taps = Taps(features)
    labels = _checked_labels(labels, taps)
    scale, projection, counts, schedule = row_statistics(
        taps,
        labels,
        num_classes,
        moments=moments,
        bound=bound,
        clip=clip,
        joint_weight=joint_weight,
    )
    means = class_sums(
        taps, schedule, scale, num_classes, moments=moments, joint_weight=joint_weight
    )
    if any(layout(tap) == PLANES for tap in taps.tensors):
        for piece, tap in zip(means.split(taps.widths, dim=2), taps.tensors, strict=True):
            if layout(tap) == PLANES and piece.numel():
                by_plane = piece.unflatten(2, (tap.shape[1], -1))
                piece.copy_(by_plane.transpose(2, 3).flatten(2))
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
    needed: Sequence[bool] | None = None,
) -> list[Tensor]:
    """Gradients of `forward`'s means with respect to the features.

    Args:
        features, labels, moments, joint_weight: as in `forward`.
        scale, projection, schedule: from `forward`.
        upstream: float32 [M, K, D], gradient with respect to the means.
        needed: for which taps; None for all.

    Returns:
        One gradient per tap, with its shape, dtype and memory format (empty where not needed).
    """
    taps = Taps(features)
    labels = _checked_labels(labels, taps)
    upstream = upstream.contiguous()
    num_classes = upstream.shape[1] if upstream.ndim == 3 else 1
    check_buffer("upstream", upstream, (len(moments), num_classes, taps.dim), taps.device)
    norms = 2 if len(moments) == 2 and joint_weight is None else 1
    blocks = len(taps.tensors) if scale.shape[-1:] != (1,) else 1
    check_buffer("scale", scale, (norms, taps.n, blocks), taps.device)
    check_buffer("projection", projection, scale.shape, taps.device)
    length = schedules.size(taps.n, None if labels is None else num_classes)
    check_buffer("schedule", schedule, (length,), taps.device, torch.int32)
    if any(layout(tap) == PLANES for tap in taps.tensors):
        ordered = upstream.clone()
        for source, piece, tap in zip(
            upstream.split(taps.widths, dim=2),
            ordered.split(taps.widths, dim=2),
            taps.tensors,
            strict=True,
        ):
            if layout(tap) == PLANES and piece.numel():
                by_pixel = source.unflatten(2, (-1, tap.shape[1]))
                piece.unflatten(2, (tap.shape[1], -1)).copy_(by_pixel.transpose(2, 3))
        upstream = ordered
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
        needed=[True] * len(taps.tensors) if needed is None else needed,
    )
    empty = torch.empty(0, dtype=taps.dtype, device=taps.device)
    return [empty.clone() if g is None else g for g in gradients]


def _checked_labels(labels: Tensor | None, taps: Taps) -> Tensor | None:
    if labels is None:
        return None
    if labels.dtype != torch.int64 or labels.shape != (taps.n,) or labels.device != taps.device:
        raise ValueError(f"labels: {brief(labels)}, expected int64 [{taps.n}] on {taps.device}.")
    return labels.contiguous()
