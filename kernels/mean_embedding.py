"""Class means of the bounded moments and their gradient, with the arguments of `Core`.

Launches: forward 3 (partial statistics, finish, class sums), backward 3 (partial dots, finish,
gradient), each over all taps; one more of each that reads the features where some taps are aligned
and others are not, or beyond `taps.MOST_TAPS` taps. Features are read twice each way and gradients
written once. Saved for backward: the features, O(n B) statistics and the schedule of the labels.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dpmmd._contract.checks import check_buffer, check_labels
from dpmmd._contract.protocol import Saved
from dpmmd.bounds import Bound
from dpmmd.kernels.class_sums import class_sums
from dpmmd.kernels.gradient import Terms, gradient
from dpmmd.kernels.row_dots import row_dots
from dpmmd.kernels.row_statistics import check_saved, row_statistics
from dpmmd.kernels.taps import Taps


def forward(
    features: Sequence[Tensor], labels: Tensor | None, num_classes: int, bound: Bound
) -> tuple[Tensor, Tensor, Saved]:
    """Class means of bounded moments; see `dpmmd.functional.mean_embedding`.

    Returns:
        means [M, K, D], counts [K], and what `backward` needs: per norm, image and block of taps
        scale and projection [N, n, B], all float32 and as the other cores have them, and the
        schedule of the labels, int32 [`schedule.size`(n, K)] (empty without labels).
    """
    taps = Taps(features)
    labels = _checked_labels(labels, taps)
    saved, counts = row_statistics(taps, labels, num_classes, bound)
    means = class_sums(taps, num_classes, bound, saved)
    taps.to_columns(means)
    return means, counts, saved


def backward(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    bound: Bound,
    saved: Saved,
    upstream: Tensor,
    needed: Sequence[bool],
) -> list[Tensor]:
    """Gradients of `forward`'s means with respect to the features.

    Args:
        features, labels, num_classes, bound: as in `forward`.
        saved: from `forward`.
        upstream: float32 [M, K, D], gradient with respect to the means.
        needed: for which taps.

    Returns:
        One gradient per tap, with its shape, dtype and memory format (empty where not needed).
    """
    taps = Taps(features)
    labels = _checked_labels(labels, taps)
    upstream = upstream.contiguous()
    size = (len(bound.moments), num_classes, taps.dim)
    check_buffer("upstream", upstream, size, taps.device)
    check_saved(taps, labels, num_classes, bound, saved)
    upstream = taps.from_columns(upstream)
    coefficients = row_dots(taps, labels, bound, saved, upstream)
    return gradient(taps, Terms(bound, saved, coefficients, upstream), needed)


def _checked_labels(labels: Tensor | None, taps: Taps) -> Tensor | None:
    if labels is None:
        return None
    check_labels(labels, taps.n, taps.device)
    return labels.contiguous()
