"""The differentiable operations, stateless: class means of bounded features, and the squared MMD.

Both follow Harder et al. 2023 (arXiv 2205.12900), section 3: with the feature maps phi1 (the
features of an image at all taps, normalised) and phi2 (their squares, normalised), the squared MMD
of the kernel <phi(x), phi(x')> is the squared distance of the two mean embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpmmd import backends

BOUNDS = ("sphere", "ball", "sphere-per-tap", "ball-per-tap")
MOMENTS = ((1,), (2,), (1, 2))


def mean_embedding(
    features: Sequence[Tensor],
    labels: Tensor | None = None,
    num_classes: int = 1,
    *,
    moments: Sequence[int] = (1,),
    bound: str = "sphere",
    clip: float = 1.0,
    joint_weight: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Class means of the bounded moments of per-image features, differentiable in the features.

    Per image, f is the concatenation of its taps (never formed), ``phi1 = B(f)``,
    ``phi2 = B(f * f)``, and B bounds the L2 norm:

    - ``"sphere"``: v c / \\|v\\| (the paper's);
    - ``"ball"``: v min(1, c / \\|v\\|);
    - ``"sphere-per-tap"``, ``"ball-per-tap"``: each of the L taps on its own, to c / sqrt(L).

    A vector that is zero or not finite becomes zero, with zero gradient.

    Args:
        features: L tensors [n, ...], one per tap, same floating dtype and device. Taps [n, C, H, W]
            are flattened in channels-last order (no copy where memory is channels-last).
        labels: int64 [n] with values in 0..num_classes-1, or None for one class.
        num_classes: K.
        moments: ``(1,)``, ``(2,)`` or ``(1, 2)``.
        bound: see above.
        clip: c > 0. With ``"sphere"`` and an encoder's features 1.0 is the paper's.
        joint_weight: None bounds each moment on its own. A number w > 0 bounds the vector
            (f, w f * f) once; needs ``moments=(1, 2)``.
        backend: see `dpmmd.backends`.

    Returns:
        ``means`` [M, K, D], zero where a class is absent, and ``counts`` [K], both in the features'
        dtype (float32 for half precision).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or range.
    """
    backends.resolve(backend)  # refuses what cannot run; this build has one implementation
    taps, labels = _check(features, labels, num_classes, moments, bound, clip, joint_weight)
    accumulate = torch.float64 if taps[0].dtype == torch.float64 else torch.float32
    counts = torch.bincount(labels, minlength=num_classes).to(accumulate)
    means = _MeanEmbedding.apply(
        labels, counts, tuple(moments), bound, float(clip), joint_weight, *taps
    )
    return means, counts


def mmd_loss(means: Tensor, counts: Tensor, target: Tensor) -> Tensor:
    """Squared MMD: the sum over moments and present classes of \\|target - means\\|^2.

    Args:
        means: [M, K, D], from `mean_embedding`.
        counts: [K]; classes with count 0 are left out.
        target: [M, K, D], e.g. ``release.target``.

    Returns:
        Scalar, differentiable in ``means``.

    Raises:
        ValueError: shapes differ.
    """
    return mean_difference(means, counts, target).square().sum()


def mean_difference(means: Tensor, counts: Tensor, target: Tensor) -> Tensor:
    """``target - means`` [M, K, D], zero for classes with count 0; arguments as in `mmd_loss`."""
    if means.shape != target.shape or counts.shape != means.shape[1:2]:
        raise ValueError(
            f"target: shape {tuple(target.shape)}, expected that of means {tuple(means.shape)} "
            f"with counts [{means.shape[1]}] (got {tuple(counts.shape)}): [moments, classes, "
            "features]. Use the encoder, taps, moments and classes that the target was made with."
        )
    return torch.where(counts[None, :, None] > 0, target - means, 0)


def _check(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
) -> tuple[list[Tensor], Tensor]:
    """Refuses what does not fit; returns the taps as [n, d_l] and the labels as int64 [n]."""
    if isinstance(features, Tensor) or not features:
        raise TypeError(
            "features: expected a non-empty sequence of tensors, one per tap; "
            "wrap a single tensor as [tensor]."
        )
    first = features[0]
    for i, f in enumerate(features):
        if not isinstance(f, Tensor) or not f.is_floating_point() or f.ndim < 2:
            raise TypeError(f"features[{i}]: expected a floating tensor [n, ...], got {_brief(f)}.")
        if f.shape[0] != first.shape[0] or f.dtype != first.dtype or f.device != first.device:
            raise ValueError(
                f"features[{i}]: {_brief(f)}, expected n, dtype and device of "
                f"features[0]: {_brief(first)}."
            )
    if not isinstance(num_classes, int) or num_classes < 1:
        raise ValueError(f"num_classes={num_classes!r}: expected an int >= 1.")
    if tuple(moments) not in MOMENTS:
        raise ValueError(f"moments={moments!r}: expected (1,), (2,) or (1, 2).")
    if bound not in BOUNDS:
        raise ValueError(f"bound={bound!r}: expected one of {', '.join(BOUNDS)}.")
    if not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"clip={clip!r}: expected a finite number > 0.")
    if joint_weight is not None:
        if tuple(moments) != (1, 2):
            raise ValueError(
                f"joint_weight={joint_weight!r} bounds both moments together: "
                f"it needs moments=(1, 2), got {tuple(moments)}."
            )
        if bound.endswith("-per-tap"):
            raise ValueError(f"joint_weight with bound={bound!r}: expected 'sphere' or 'ball'.")
        if not (math.isfinite(joint_weight) and joint_weight > 0):
            raise ValueError(f"joint_weight={joint_weight!r}: expected a finite number > 0.")
    n = first.shape[0]
    if labels is None:
        if num_classes != 1:
            raise ValueError(f"labels=None: expected labels, since num_classes={num_classes}.")
        labels = torch.zeros(n, dtype=torch.int64, device=first.device)
    if labels.dtype != torch.int64 or labels.shape != (n,) or labels.device != first.device:
        raise ValueError(f"labels: {_brief(labels)}, expected int64 [{n}] on {first.device}.")
    if labels.device.type == "cpu":
        if n and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
            raise ValueError(
                f"labels: values from {int(labels.min())} to {int(labels.max())}, "
                f"expected 0..{num_classes - 1} (num_classes={num_classes})."
            )
    else:  # checked on the device: reading the values here would wait for it
        torch._assert_async(((labels >= 0) & (labels < num_classes)).all())
    taps = [
        (f.permute(0, 2, 3, 1) if f.ndim == 4 else f).reshape(n, math.prod(f.shape[1:]))
        for f in features
    ]
    return taps, labels


def _brief(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__


class _MeanEmbedding(torch.autograd.Function):
    """Class means of bounded moments over a list of taps, in two sweeps over the features.

    With v_m = w_m f^m the m-th moment before its bound, s its scale (one an image, or one an image
    and tap) and W[i, k] = [y_i = k] / n_k:

        forward    means[m] = (W s)^T v_m            a product: nothing is normalised in memory
        backward   dv_m = s (W G_m) - p <v_m, W G_m> v_m   (p = s^3 / c^2; 0 for an inactive ball)
                   df = dv_1 + 2 w_2 f dv_2

    Saved for backward: the taps themselves and O(n L) scales.
    """

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor,
        counts: Tensor,
        moments: tuple[int, ...],
        bound: str,
        clip: float,
        joint_weight: float | None,
        *taps: Tensor,
    ) -> Tensor:
        n, num_classes, dtype = labels.shape[0], counts.shape[0], counts.dtype
        joint = joint_weight is not None
        weights = [1.0 if m == 1 or joint_weight is None else joint_weight for m in moments]
        squares = counts.new_empty(len(moments), n, len(taps))  # |v_m|^2 by tap
        for column, tap in enumerate(taps):
            f = tap.to(dtype)
            for row, moment in enumerate(moments):
                norm = torch.linalg.vector_norm(f if moment == 1 else f * f, dim=1)
                squares[row, :, column] = (weights[row] * norm).square()
        if bound.endswith("-per-tap"):
            clip = clip / math.sqrt(len(taps))
        else:
            squares = squares.sum(dim=2, keepdim=True)
        if joint:
            squares = squares.sum(dim=0, keepdim=True)

        # A row with a NaN has scale 0, but 0 * NaN is NaN: such rows must be blanked by value. On
        # the CPU asking whether there are any is free; elsewhere it would wait for the device.
        usable = torch.isfinite(squares) & (squares > 0)  # [M or 1, n, L or 1]
        blank = labels.device.type != "cpu" or not bool(usable.all())
        scale = torch.where(usable, clip * squares.where(usable, 1).rsqrt(), 0)
        active = usable
        if bound.startswith("ball"):
            active = usable & (scale < 1)
            scale = scale.clamp(max=1)
        projection = torch.where(active, scale / clip, 0)  # 1 / |v|; s^3 / c^2 would overflow

        mean_of = counts.new_zeros(n, num_classes)  # W
        mean_of.scatter_(1, labels[:, None], counts.clamp(min=1).reciprocal()[labels][:, None])
        means = counts.new_empty(len(moments), num_classes, sum(t.shape[1] for t in taps))
        pieces = means.split([t.shape[1] for t in taps], dim=2)
        for column, tap in enumerate(taps):
            f = _usable_rows(tap.to(dtype), scale, column, blank)
            for row, moment in enumerate(moments):
                weighted = mean_of * _of(scale, row, column)
                pieces[column][row] = weights[row] * (weighted.T @ (f if moment == 1 else f * f))
        ctx.save_for_backward(mean_of, scale, projection, *taps)
        ctx.moments, ctx.weights, ctx.joint, ctx.blank = moments, weights, joint, blank
        return means

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean_of, scale, projection, *taps = ctx.saved_tensors
        moments, weights, joint = ctx.moments, ctx.weights, ctx.joint
        pieces = grad.split([t.shape[1] for t in taps], dim=2)

        dots = mean_of.new_empty(len(moments), mean_of.shape[0], len(taps))  # <v_m, W G_m> by tap
        for column, tap in enumerate(taps):
            f = _usable_rows(tap.to(grad.dtype), scale, column, ctx.blank)
            for row, moment in enumerate(moments):
                by_class = (f if moment == 1 else f * f) @ pieces[column][row].T  # [n, K]
                dots[row, :, column] = weights[row] * (by_class * mean_of).sum(dim=1)
        if scale.shape[2] == 1:
            dots = dots.sum(dim=2, keepdim=True)
        if joint:
            dots = dots.sum(dim=0, keepdim=True)
        projection = projection * dots * projection * scale

        grads: list[Tensor | None] = []
        for column, tap in enumerate(taps):
            if not ctx.needs_input_grad[6 + column]:
                grads.append(None)
                continue
            f = _usable_rows(tap.to(grad.dtype), scale, column, ctx.blank)
            df = torch.zeros_like(f)
            for row, moment in enumerate(moments):
                upstream = (mean_of * _of(scale, row, column)) @ pieces[column][row]  # s W G_m
                coefficient = _of(projection, row, column)
                if moment == 1:
                    df += upstream.addcmul_(f, coefficient, value=-1)
                else:
                    upstream.addcmul_(f * f, coefficient, value=-weights[row])
                    df.addcmul_(upstream, f, value=2 * weights[row])
            grads.append(df.to(tap.dtype))
        return None, None, None, None, None, None, *grads


def _of(values: Tensor, row: int, column: int) -> Tensor:
    """Entry [row, :, column] of values [M or 1, n, L or 1] as [n, 1]."""
    return values[min(row, values.shape[0] - 1), :, min(column, values.shape[2] - 1), None]


def _usable_rows(f: Tensor, scale: Tensor, column: int, blank: bool) -> Tensor:
    """f with the rows that no moment can use set to zero, if there may be any."""
    if not blank:
        return f
    usable = torch.stack([_of(scale, row, column) for row in range(scale.shape[0])]).amax(dim=0)
    return torch.where(usable > 0, f, 0)
