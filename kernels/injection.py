"""The mean embedding whose gradient a tap's ReLU adds to its own; see `dpmmd.injection`.

Launches: a `rectify` and a `rectified_gradient` a tap, which read and write what the ReLU reads and
writes anyway; forward 2 more (finish, class sums) and backward 2 more (partial dots, finish).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpmmd._contract.protocol import Saved
from dpmmd.bounds import Bound
from dpmmd.kernels import table
from dpmmd.kernels.class_sums import class_sums
from dpmmd.kernels.gradient import Terms, gradient
from dpmmd.kernels.row_dots import row_dots
from dpmmd.kernels.row_statistics import empty_statistics, finish_into, partial_statistics_of
from dpmmd.kernels.taps import Taps


def forward(
    features: Sequence[Tensor],
    partials: Sequence[Tensor | None],
    labels: Tensor | None,
    num_classes: int,
    bound: Bound,
) -> tuple[Tensor, Tensor, Saved]:
    """As `mean_embedding.forward`, with the partial statistics that taps bring.

    Args:
        features: taps [n, C, H, W], channels-last (others are copied), or [n, d].
        partials: from `row_statistics.rectify`, or None for a tap that has none.
    """
    taps = Taps(features, planes=False)
    saved, counts = statistics(taps, partials, labels, num_classes, bound)
    return class_sums(taps, num_classes, bound, saved), counts, saved


def statistics(
    taps: Taps,
    partials: Sequence[Tensor | None],
    labels: Tensor | None,
    num_classes: int,
    bound: Bound,
) -> tuple[Saved, Tensor]:
    """As `row_statistics`, with the partial statistics that taps bring."""
    saved, counts = empty_statistics(taps, labels, num_classes, bound)
    for buffer in (*saved, counts):
        buffer.zero_()
    if taps.n and taps.dim:
        config = table.lookup("row_statistics", taps.device, taps.dtype, taps.dim)
        whole = [
            partial_statistics_of(Taps([tap]), config, bound, saved.schedule)
            if given is None
            else given
            for tap, given in zip(taps.tensors, partials, strict=True)
        ]
        labels = None if labels is None else labels.contiguous()
        finish_into(taps, labels, bound, torch.cat(whole, dim=2), config.block, saved, counts)
    return saved, counts


def backward(
    features: Sequence[Tensor],
    labels: Tensor | None,
    bound: Bound,
    saved: Saved,
    upstream: Tensor,
    needed: Sequence[bool],
) -> tuple[Taps, Terms, list[Tensor]]:
    """What `rectified_gradient` takes of all taps, and the gradients of those that need one here.

    The taps returned hold no tensor: each lives as long as its own ReLU needs it.
    """
    taps = Taps(features, planes=False)
    terms = Terms(bound, saved, row_dots(taps, labels, bound, saved, upstream), upstream)
    gradients = gradient(taps, terms, needed)
    return taps.places(), terms, gradients
