"""The only caller of the native core: checks everything before an address leaves Python.

Operations of mean embeddings come in halves (`Phases` in csrc/dpmmd.h): row statistics and class
sums forward, row dots and gradient backward. ``STATISTICS | CLASS_SUMS`` and ``DOTS | GRADIENT``
do two halves in one pass over the features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from dpmmd._cores.checks import address, brief, check_apart, check_buffer, check_labels, check_sums
from dpmmd._cores.taps import Taps, empty_gradients, statistics_shape
from dpmmd.bounds import Bound

try:
    from dpmmd import _native
except ImportError as error:  # pragma: no cover - a build without the extension
    missing: str | None = str(error)
else:
    missing = None
    _level = os.environ.get("DPMMD_CPU")
    if _level and not _native.choose(_level):
        raise ValueError(
            f"DPMMD_CPU={_level!r}: this processor or build has no such level; leave the variable "
            f"unset ({_native.level()!r} then), or use 'baseline', 'avx2' or 'avx512'."
        )

STATISTICS = DOTS = 1
CLASS_SUMS = GRADIENT = 2
BOTH = 3

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float64: 2}
_FEATURES = (torch.float32, torch.bfloat16)
SUMMED = tuple(_TYPES)  # what `bounded_sums` takes
_ESTIMATORS = {"batch": 0, "ema": 1, "adam": 2}
_LABEL_OUT_OF_RANGE = 1
_CPU = torch.device("cpu")


def _empty(size: Sequence[int]) -> Tensor:
    """What the core writes: float32 on the CPU, whatever torch's defaults are."""
    return torch.empty(size, dtype=torch.float32, device="cpu")


def forward(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    *,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
    statistics: tuple[Tensor, Tensor] | None = None,
    phases: int = BOTH,
    threads: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Class means of bounded moments; see `dpmmd.functional.mean_embedding`.

    Args:
        statistics: scale and projection, for ``phases=CLASS_SUMS``.
        phases: STATISTICS leaves means and counts undefined.
        threads: None for PyTorch's number.

    Returns:
        means [M, K, D], counts [K], and per norm, image and block of taps scale and projection
        [N, n, B], all float32. N is 1 for a joint bound, else M; B is 1, or L for per-tap bounds.
    """
    taps = Taps(features, _FEATURES, "cpu")
    n = features[0].shape[0]
    size = statistics_shape(Bound(tuple(moments), bound, 1.0, joint_weight), n, len(features))
    if statistics is None:
        scale, projection = _empty(size), _empty(size)
    else:
        scale, projection = statistics
        check_buffer("scale", scale, size, _CPU)
        check_buffer("projection", projection, size, _CPU)
    means = _empty((len(moments), num_classes, taps.dim))
    counts = _empty((num_classes,))
    labels = _checked_labels(labels, n)
    _run(
        taps, None, labels, num_classes, moments, bound, clip, joint_weight,
        scale, projection, means, counts, None, None, phases, threads,
    )  # fmt: skip
    if phases & CLASS_SUMS:
        taps.to_columns(means)
    return means, counts, scale, projection


def backward(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    *,
    moments: Sequence[int],
    bound: str,
    joint_weight: float | None,
    scale: Tensor,
    projection: Tensor,
    upstream: Tensor,
    needed: Sequence[bool] | None = None,
    coefficients: Tensor | None = None,
    phases: int = BOTH,
    threads: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Gradients of `forward`'s means with respect to the features.

    Args:
        scale, projection: from `forward`.
        upstream: float32 [M, K, D], gradient with respect to the means.
        needed: for which taps; None for all.
        coefficients: [N, n, B], for ``phases=GRADIENT``.
        phases: DOTS leaves the gradients undefined.

    Returns:
        One gradient per tap, with its shape, dtype and memory format (empty where not needed), and
        the coefficients.
    """
    taps = Taps(features, _FEATURES, "cpu")
    n = features[0].shape[0]
    size = statistics_shape(Bound(tuple(moments), bound, 1.0, joint_weight), n, len(features))
    for name, buffer in (("scale", scale), ("projection", projection)):
        check_buffer(name, buffer, size, _CPU)
    if coefficients is None:
        coefficients = _empty(size)
    else:
        check_buffer("coefficients", coefficients, size, _CPU)
    if not upstream.is_contiguous():
        upstream = upstream.contiguous()
    check_buffer("upstream", upstream, (len(moments), num_classes, taps.dim), _CPU)
    upstream = taps.from_columns(upstream)
    if needed is None:
        needed = [True] * len(taps.tensors)
    gradients = empty_gradients(taps.tensors, needed)
    labels = _checked_labels(labels, n)
    _run(
        taps, gradients, labels, num_classes, moments, bound, 1.0, joint_weight,
        scale, projection, None, None, upstream, coefficients, phases, threads,
    )  # fmt: skip
    return gradients, coefficients


def rectified_gradient(
    tap: Tensor,
    incoming: Tensor | None,
    ceiling: float | None,
    labels: Tensor | None,
    num_classes: int,
    *,
    moments: Sequence[int],
    joint_weight: float | None,
    scale: Tensor,
    projection: Tensor,
    coefficients: Tensor,
    upstream: Tensor,
    threads: int | None = None,
) -> Tensor:
    """Gradient of the input of the ReLU that a tap f comes from: (incoming + E) [0 < f < ceiling].

    E is what `backward` would write for this tap.

    Args:
        tap: f, [n, C, H, W], channels-last.
        incoming: what reaches f from elsewhere, with its shape and dtype; None: nothing.
        ceiling: of the ReLU; None: it has none.
        scale, projection, coefficients: [N, n], from `forward` and from ``phases=DOTS``.
        upstream: [M, K, C H W], this tap's columns of the gradient with respect to the means.

    Returns:
        A new tensor like f.
    """
    piece = Taps([tap], _FEATURES, "cpu", planes=False)
    n, columns = tap.shape[0], piece.widths[0]
    factors = {"scale": scale, "projection": projection, "coefficients": coefficients}
    size = (1 if joint_weight is not None else len(moments), n)
    for name, buffer in factors.items():
        check_buffer(name, buffer, size, _CPU)
    check_buffer("upstream", upstream, (len(moments), num_classes, columns), _CPU)
    if ceiling is not None and not ceiling > 0:
        raise ValueError(f"ceiling={ceiling!r}: expected None or a number > 0.")
    if incoming is not None:
        if incoming.shape != tap.shape or incoming.dtype != tap.dtype:
            raise ValueError(f"incoming: {brief(incoming)}, expected it like tap: {brief(tap)}.")
        incoming = Taps([incoming], _FEATURES, "cpu", planes=False).tensors[0]
    top = torch.tensor(float("inf") if ceiling is None else ceiling, dtype=tap.dtype).item()
    out = torch.empty_like(piece.tensors[0], memory_format=torch.preserve_format)
    _run(
        piece, [out], _checked_labels(labels, n), num_classes, moments, "sphere", 1.0,
        joint_weight, scale, projection, None, None, upstream, coefficients, GRADIENT, threads,
        top, incoming,
    )  # fmt: skip
    return out


def _run(
    taps: Taps,
    gradients: Sequence[Tensor] | None,
    labels: Tensor | None,
    num_classes: int,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
    scale: Tensor,
    projection: Tensor,
    means: Tensor | None,
    counts: Tensor | None,
    upstream: Tensor | None,
    coefficients: Tensor | None,
    phases: int,
    threads: int | None,
    ceiling: float = 0.0,
    incoming: Tensor | None = None,
) -> None:
    status = _native.mean_embedding(
        upstream is not None,
        phases,
        taps.for_native(gradients),
        _TYPES[taps.tensors[0].dtype],
        taps.tensors[0].shape[0],
        address(labels),
        num_classes,
        sum(moments),  # the bits of (1,), (2,) and (1, 2)
        bound.startswith("ball"),
        bound.endswith("-per-tap"),
        joint_weight is not None,
        clip,
        1.0 if joint_weight is None else joint_weight,
        address(scale),
        address(projection),
        address(means),
        address(counts),
        address(upstream),
        address(coefficients),
        ceiling,
        address(incoming),
        0 if incoming is None else incoming.stride(0),
        torch.get_num_threads() if threads is None else threads,
    )
    if status == _LABEL_OUT_OF_RANGE and labels is not None:
        raise ValueError(
            f"labels: values from {int(labels.min())} to {int(labels.max())}, "
            f"expected 0..{num_classes - 1} (num_classes={num_classes})."
        )
    _check_status(status)


def difference(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    *,
    estimator: str = "batch",
    estimate: Tensor | None = None,
    steps: Tensor | None = None,
    first_moment: Tensor | None = None,
    second_moment: Tensor | None = None,
    decay: float = 0.0,
    lr: float = 0.0,
    numbers: int | None = None,
    update: bool = True,
    threads: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of a difference estimator and its gradient in ``means``; moves the state in place.

    See `dpmmd.functional.mmd_loss`, `ema_loss` and `adam_loss`. All tensors are float32 and
    contiguous: means, target, estimate, first_moment, second_moment [M, K, D]; counts, steps [K].

    Returns:
        A scalar and [M, K, D].
    """
    shape = tuple(means.shape)
    means, counts, target = means.contiguous(), counts.contiguous(), target.contiguous()
    inputs = {"means": means, "target": target}
    named = {"estimate": estimate, "first_moment": first_moment, "second_moment": second_moment}
    states = {name: state for name, state in named.items() if state is not None}
    for name, buffer in (inputs | states).items():
        check_buffer(name, buffer, shape, _CPU)
    check_buffer("counts", counts, shape[1:2], _CPU)
    if steps is not None:
        check_buffer("steps", steps, shape[1:2], _CPU)
        states["steps"] = steps
    check_apart(states, inputs | {"counts": counts})
    value, gradient = _empty(()), _empty(shape)
    status = _native.difference(
        _ESTIMATORS[estimator],
        update,
        shape[0],
        shape[1],
        shape[2],
        address(means),
        address(counts),
        address(target),
        address(estimate),
        address(first_moment),
        address(second_moment),
        address(steps),
        decay,
        lr,
        float(means.numel() if numbers is None else numbers),
        address(gradient),
        address(value),
        torch.get_num_threads() if threads is None else threads,
    )
    _check_status(status)
    return value, gradient


def bounded_sums(
    features: Sequence[Tensor],
    labels: Tensor,
    valid: Tensor,
    limits: Tensor,
    *,
    bound: Bound,
    nonnegative: bool,
    sums: Tensor,
    shared: Tensor | None = None,
    shared_taps: int = 0,
    threads: int | None = None,
) -> None:
    """Adds the bounded integer vectors of a batch to int64 class sums: `PrivateSums.add` exactly.

    What the images hold never raises: rows that are not valid, whose label is not in 0..K-1, whose
    limit is not in 1..2^30 or which fail the certificate add nothing.

    Args:
        features: L tensors [n, ...], float32, bfloat16 or float64.
        labels: int64 [n].
        valid: bool [n].
        limits: int64 [n], greatest norm of each image's vector in grid units.
        bound, nonnegative: as `dpmmd.privacy.sums.PrivateSums.add`.
        sums: int64 [K, M D'], D' the columns of the taps that are not shared; added to.
        shared: int64 [1, M (D - D')], added to whatever the label; None where ``shared_taps`` is 0.
        shared_taps: how many leading taps are shared by all classes.
    """
    taps = Taps(features, _TYPES, "cpu", planes=False)
    n = features[0].shape[0]
    check_sums(features, taps.widths, labels, valid, limits, bound, sums, shared, shared_taps)
    status = _native.bounded_sums(
        taps.for_native(),
        _TYPES[features[0].dtype],
        n,
        address(labels),
        sums.shape[0],
        address(valid),
        address(limits),
        bound.bits,
        bound.ball,
        bound.per_tap,
        nonnegative,
        bound.clip,
        bound.weight,
        shared_taps,
        address(sums),
        address(shared),
        torch.get_num_threads() if threads is None else threads,
    )
    _check_status(status)


def _checked_labels(labels: Tensor | None, n: int) -> Tensor | None:
    if labels is None:
        return None
    check_labels(labels, n, _CPU, "the CPU")
    return labels.contiguous()


def _check_status(status: int) -> None:
    if status:
        raise MemoryError(f"dpmmd._native: no workspace (status {status}).")
