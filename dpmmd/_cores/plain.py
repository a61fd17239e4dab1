"""The operations in plain PyTorch, for every floating dtype and device.

Class means of bounded moments over a list of taps take two sweeps over the features. With
v_m = w_m f^m the m-th moment before its bound, s its scale (one an image, or one an image and tap)
and W[i, k] = [y_i = k] / n_k:

    forward    means[m] = (W s)^T v_m            a product: nothing is normalised in memory
    backward   dv_m = s (W G_m) - p <v_m, W G_m> v_m   (p = s^3 / c^2; 0 for an inactive ball)
               df = dv_1 + 2 w_2 f dv_2

The losses are written so that autograd differentiates them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor

from dpmmd._contract.checks import check_values
from dpmmd._contract.protocol import Core, Saved, Step
from dpmmd._contract.slot import Slot, gated
from dpmmd._contract.taps import rows_of
from dpmmd.bounds import Bound


class Plain(Core):
    """Plain PyTorch; its integer sums are their definition, in `dpmmd.privacy.sums`."""

    name = "torch"
    opaque = False

    def forward(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        slots: Sequence[Slot | None] | None = None,
    ) -> tuple[Tensor, Tensor, Saved]:
        """As `Core.forward`, in the features' dtype (float32 for half precision)."""
        first = features[0]
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        if labels is not None:
            check_values(labels, num_classes)
        labels = _labels(labels, first)
        counts = _class_counts(labels, num_classes, dtype)
        taps = [rows_of(f) for f in features]
        squares = _squares(taps, bound, dtype, slots)
        scale, projection = _factors(squares, bound, len(taps))
        blank, mean_of = _blank(scale), _shares(labels, counts)
        means = counts.new_empty(len(bound.moments), num_classes, sum(t.shape[1] for t in taps))
        pieces = means.split([t.shape[1] for t in taps], dim=2)
        for column, tap in enumerate(taps):
            f = _usable_rows(tap.to(dtype), scale, column, blank)
            for row, (moment, weight) in enumerate(_weights(bound)):
                weighted = mean_of * _of(scale, row, column)
                pieces[column][row] = weight * (weighted.T @ _power(f, moment))
        return means, counts, Saved(scale, projection, first.new_empty(0, dtype=torch.int32))

    def backward(
        self,
        features: Sequence[Tensor],
        labels: Tensor | None,
        num_classes: int,
        bound: Bound,
        saved: Saved,
        upstream: Tensor,
        needed: Sequence[bool],
        slots: Sequence[Slot | None] | None = None,
    ) -> list[Tensor]:
        scale, projection, _ = saved
        labels = _labels(labels, features[0])
        mean_of = _shares(labels, _class_counts(labels, num_classes, upstream.dtype))
        blank = _blank(scale)
        taps = [rows_of(f) for f in features]
        pieces = upstream.split([t.shape[1] for t in taps], dim=2)
        dots = _dots(taps, pieces, mean_of, scale, bound, blank)
        projection = projection * dots * projection * scale
        gradients = []
        for column, (f, tap) in enumerate(zip(features, taps, strict=True)):
            if not needed[column]:
                gradients.append(f.new_empty(0))
                continue
            gradient = partial(
                _tap_gradient,
                piece=pieces[column],
                mean_of=mean_of,
                scale=[_of(scale, row, column) for row in range(len(bound.moments))],
                projection=[_of(projection, row, column) for row in range(len(bound.moments))],
                bound=bound,
                blank=blank,
            )
            if slots is not None and (slot := slots[column]) is not None:
                slot.left = partial(_rectified_gradient, gradient)
                gradients.append(f.new_empty(0))
            else:
                gradients.append(_like(gradient(tap).to(f.dtype), f))
        return gradients

    def estimate(
        self, means: Tensor, counts: Tensor, target: Tensor, step: Step
    ) -> tuple[Tensor, None]:
        d = torch.where(counts[None, :, None] > 0, target - means, 0)
        if step.estimator == "batch":
            return d.square().sum(), None
        return ((_ema if step.estimator == "ema" else _adam)(d, counts, step) * d).sum(), None

    def bounded_sums(self, *_: Any, **__: Any) -> NoReturn:
        # `summed` names no dtype, so that nobody calls this: `PrivateSums.add` is the definition,
        # and lies in the trusted code.
        raise NotImplementedError("the sums of plain PyTorch are those of dpmmd.privacy.sums")

    def slot(self, bound: Bound, dim: int) -> Slot:
        return Slot(bound, dim)


CORE = Plain()


def _class_counts(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """[K]; unlike torch.bincount it never makes the host wait for a device."""
    classes = torch.arange(num_classes, device=labels.device)
    return (labels[:, None] == classes).sum(dim=0).to(dtype)


def _labels(labels: Tensor | None, like: Tensor) -> Tensor:
    if labels is None:
        return torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)
    return labels


def _shares(labels: Tensor, counts: Tensor) -> Tensor:
    """W [n, K]: 1 / n_k in the column of an image's class."""
    mean_of = counts.new_zeros(labels.shape[0], counts.shape[0])
    return mean_of.scatter_(1, labels[:, None], counts.clamp(min=1).reciprocal()[labels][:, None])


def _weights(bound: Bound) -> list[tuple[int, float]]:
    """The moments, each with what it is multiplied with before it is bounded."""
    return [(m, 1.0 if m == 1 else bound.weight) for m in bound.moments]


def _power(f: Tensor, moment: int) -> Tensor:
    return f if moment == 1 else f * f


def _squares(
    taps: Sequence[Tensor],
    bound: Bound,
    dtype: torch.dtype,
    slots: Sequence[Slot | None] | None,
) -> Tensor:
    """|v_m|^2 of each block [N, n, B]; a tap with a slot brings its own."""
    n, weights = taps[0].shape[0], _weights(bound)
    squares = taps[0].new_empty(len(weights), n, len(taps), dtype=dtype)
    for column, tap in enumerate(taps):
        if slots is not None and (slot := slots[column]) is not None:
            for row, square in enumerate(slot.squares):
                squares[row, :, column] = weights[row][1] ** 2 * square
            continue
        f = tap.to(dtype)
        for row, (moment, weight) in enumerate(weights):
            norm = torch.linalg.vector_norm(_power(f, moment), dim=1)
            squares[row, :, column] = (weight * norm).square()
    return _summed(squares, bound)


def _summed(values: Tensor, bound: Bound) -> Tensor:
    """[M, n, L] summed over what is bounded together: [N, n, B]."""
    if not bound.per_tap:
        values = values.sum(dim=2, keepdim=True)
    return values.sum(dim=0, keepdim=True) if bound.joint else values


def _factors(squares: Tensor, bound: Bound, taps: int) -> tuple[Tensor, Tensor]:
    """Scale and projection [N, n, B]: 0 where a vector is 0 or not finite."""
    clip = bound.radius(taps)
    usable = torch.isfinite(squares) & (squares > 0)
    scale = torch.where(usable, clip * squares.where(usable, 1).rsqrt(), 0)
    active = usable
    if bound.ball:
        active = usable & (scale < 1)
        scale = scale.clamp(max=1)
    return scale, torch.where(active, scale / clip, 0)  # 1 / |v|; s^3 / c^2 would overflow


def _blank(scale: Tensor) -> bool:
    """Whether rows may have to be blanked by value: scale 0 of a NaN is not enough, as 0 * NaN.

    On the CPU asking whether there are any is free; elsewhere it would wait for the device.
    """
    return scale.device.type != "cpu" or not bool((scale > 0).all())


def _of(values: Tensor, row: int, column: int) -> Tensor:
    """Entry [row, :, column] of values [M or 1, n, L or 1] as [n, 1]."""
    return values[min(row, values.shape[0] - 1), :, min(column, values.shape[2] - 1), None]


def _usable_rows(f: Tensor, scale: Tensor, column: int, blank: bool) -> Tensor:
    """f with the rows that no moment can use set to zero, if there may be any."""
    if not blank:
        return f
    usable = torch.stack([_of(scale, row, column) for row in range(scale.shape[0])]).amax(dim=0)
    return torch.where(usable > 0, f, 0)


def _dots(
    taps: Sequence[Tensor],
    pieces: Sequence[Tensor],
    mean_of: Tensor,
    scale: Tensor,
    bound: Bound,
    blank: bool,
) -> Tensor:
    """<v_m, W G_m> of each block [N, n, B]."""
    weights = _weights(bound)
    dots = mean_of.new_empty(len(weights), mean_of.shape[0], len(taps))
    for column, tap in enumerate(taps):
        f = _usable_rows(tap.to(mean_of.dtype), scale, column, blank)
        for row, (moment, weight) in enumerate(weights):
            by_class = _power(f, moment) @ pieces[column][row].T  # [n, K]
            dots[row, :, column] = weight * (by_class * mean_of).sum(dim=1)
    return _summed(dots, bound)


def _tap_gradient(
    tap: Tensor,
    *,
    piece: Tensor,
    mean_of: Tensor,
    scale: Sequence[Tensor],
    projection: Sequence[Tensor],
    bound: Bound,
    blank: bool,
) -> Tensor:
    """df [n, d] of one tap [n, d], in the dtype of ``piece`` = its columns of G."""
    f = tap.to(piece.dtype)
    if blank:
        f = torch.where(torch.stack(list(scale)).amax(dim=0) > 0, f, 0)
    df = torch.zeros_like(f)
    for row, (moment, weight) in enumerate(_weights(bound)):
        upstream = (mean_of * scale[row]) @ piece[row]  # s W G_m
        if moment == 1:
            df += upstream.addcmul_(f, projection[row], value=-1)
        else:
            upstream.addcmul_(f * f, projection[row], value=-weight)
            df.addcmul_(upstream, f, value=2 * weight)
    return df


def _rectified_gradient(
    gradient: Callable[[Tensor], Tensor],
    f: Tensor,
    incoming: Tensor | None,
    ceiling: float | None,
) -> Tensor:
    """The gradient of the input of the ReLU that a tap f comes from: (incoming + E) [0 < f < c]."""
    own = _like(gradient(rows_of(f)), f)
    return gated(own if incoming is None else own.add_(incoming), f, ceiling)


def _like(rows: Tensor, f: Tensor) -> Tensor:
    """What `rows_of` makes of a tensor like f, undone."""
    if f.ndim != 4:
        return rows.view(f.shape)
    n, channels, height, width = f.shape
    return rows.view(n, height, width, channels).permute(0, 3, 1, 2)


def _ema(d: Tensor, counts: Tensor, step: Step) -> Tensor:
    """The vector v of the loss <v, d>; the state moves."""
    states = step.state()
    estimate, steps = states["estimate"], states["steps"]
    with torch.no_grad():
        if step.update:
            present = counts > 0
            steps += present
            rate = (1 - step.decay) * present.to(estimate.dtype)
            estimate.lerp_(d.to(estimate.dtype), rate[None, :, None])
        return estimate / (1 - step.decay ** steps.clamp(min=1))[None, :, None]


def _adam(d: Tensor, counts: Tensor, step: Step) -> Tensor:
    """The vector v of the loss <v, d>; the state moves."""
    estimate, first_moment, second_moment, steps = step.state().values()
    if step.update:
        with torch.no_grad():
            beta1, beta2, eps = 0.9, 0.999, 1e-8
            present = counts > 0
            steps += present
            slope = (estimate - d) * (2.0 / (d.numel() if step.numbers is None else step.numbers))
            where = present.to(estimate.dtype)[None, :, None]
            first_moment.lerp_(slope, (1 - beta1) * where)
            second_moment.lerp_(slope.square(), (1 - beta2) * where)
            taken = steps.clamp(min=1)[None, :, None]
            denominator = (second_moment / (1 - beta2**taken)).sqrt_().add_(eps)
            estimate -= first_moment / (1 - beta1**taken) / denominator * step.lr * where
    return estimate.clone()
