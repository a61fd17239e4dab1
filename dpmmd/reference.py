"""The definitions in plain torch, written for clarity: the truth for tests and benchmarks.

Everything is concatenated and normalised in memory as the formulas stand, works in the dtype it is
given (float64 for the truth) and is differentiated by autograd. Nothing in the library runs it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def flatten(features: Sequence[Tensor]) -> list[Tensor]:
    """Each tap as [n, d_l]: four-dimensional maps in channels-last order, others as they are."""
    return [(f.permute(0, 2, 3, 1) if f.ndim == 4 else f).reshape(f.shape[0], -1) for f in features]


def bounded(taps: Sequence[Tensor], bound: str, clip: float) -> Tensor:
    """B(v): the concatenation of the taps [n, D], bounded in norm; unusable rows are zero."""
    if bound.endswith("-per-tap"):
        share = clip / math.sqrt(len(taps))
        whole = bound.removesuffix("-per-tap")
        return torch.cat([bounded([t], whole, share) for t in taps], dim=1)
    v = torch.cat(list(taps), dim=1)
    norm = v.norm(dim=1, keepdim=True)
    usable = torch.isfinite(norm) & (norm > 0)
    v = torch.where(usable, v, 0)
    norm = torch.where(usable, norm, 1)
    scale = clip / norm
    if bound == "ball":
        scale = scale.clamp(max=1)
    return v * scale


def mean_embedding(
    features: Sequence[Tensor],
    labels: Tensor | None = None,
    num_classes: int = 1,
    *,
    moments: Sequence[int] = (1,),
    bound: str = "sphere",
    clip: float = 1.0,
    joint_weight: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As `dpmmd.functional.mean_embedding`."""
    taps = flatten(features)
    n = taps[0].shape[0]
    if labels is None:
        labels = torch.zeros(n, dtype=torch.int64, device=taps[0].device)
    one_hot = torch.nn.functional.one_hot(labels, num_classes).to(taps[0].dtype)  # [n, K]
    counts = one_hot.sum(dim=0)
    if joint_weight is not None:
        joint = bounded([*taps, *(joint_weight * t * t for t in taps)], bound, clip)
        phis = list(joint.chunk(2, dim=1))
    else:
        phis = [bounded([t**m for t in taps], bound, clip) for m in moments]
    means = torch.stack([one_hot.T @ phi for phi in phis]) / counts.clamp(min=1)[:, None]
    return means, counts  # [M, K, D], [K]


def mmd_loss(means: Tensor, counts: Tensor, target: Tensor) -> Tensor:
    """Sum over moments and present classes of |target - means|^2."""
    return ((target - means)[:, counts > 0] ** 2).sum()
