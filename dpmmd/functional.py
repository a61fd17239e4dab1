"""The differentiable operations, stateless: class means of bounded features, and the squared MMD.

Both follow Harder et al. 2023 (arXiv 2205.12900), section 3: with the feature maps phi1 (the
features of an image at all taps, normalised) and phi2 (their squares, normalised), the squared MMD
of the kernel <phi(x), phi(x')> is the squared distance of the two mean embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpmmd import backends
from dpmmd._cores import checks, cpu, cuda
from dpmmd._cores.checks import brief
from dpmmd._cores.protocol import Saved, Step
from dpmmd._cores.taps import empty_gradients, rows_of, statistics_shape
from dpmmd.bounds import Bound

if TYPE_CHECKING:
    from dpmmd.injection import Slot


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

    A vector that is zero or not finite becomes zero, with zero gradient. The gradient itself cannot
    be differentiated again.

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
    _check(features, labels, num_classes, moments, bound, clip, joint_weight)
    first = features[0]
    core = backends.resolve(backend, first.device.type, first.dtype)
    if core != "torch":
        options = num_classes, list(moments), bound, float(clip), joint_weight, core
        if _plain(*features, labels):
            means, counts = _Embedding.apply(labels, options, *features)
        else:
            means, counts, *_ = torch.ops.dpmmd.mean_embedding(list(features), labels, *options)
        return means, counts
    labels = _checked_values(labels, first, num_classes)
    taps = [rows_of(f) for f in features]
    accumulate = torch.float64 if taps[0].dtype == torch.float64 else torch.float32
    counts = class_counts(labels, num_classes, accumulate)
    means = _MeanEmbedding.apply(
        labels, counts, tuple(moments), bound, float(clip), joint_weight, None, *taps
    )
    return means, counts


def mmd_loss(means: Tensor, counts: Tensor, target: Tensor, *, backend: str = "auto") -> Tensor:
    """Squared MMD: the sum over moments and present classes of \\|target - means\\|^2.

    Args:
        means: [M, K, D], from `mean_embedding`.
        counts: [K]; classes with count 0 are left out.
        target: [M, K, D], e.g. ``release.target``.
        backend: see `dpmmd.backends`.

    Returns:
        Scalar, differentiable in ``means``.

    Raises:
        ValueError: shapes differ.
    """
    core = _core(backend, means, counts, target)
    if core != "torch":
        return _loss(_mmd, torch.ops.dpmmd.squared_mmd, means, (counts, target), (core,))
    return mean_difference(means, counts, target).square().sum()


def ema_loss(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    *,
    estimate: Tensor,
    steps: Tensor,
    decay: float,
    update: bool = True,
    backend: str = "auto",
) -> Tensor:
    """<v, d> for d = target - means and its exponential moving average v over the steps.

    For classes that are present, ``estimate += (1 - decay) (d - estimate)``; v is the estimate
    divided by ``1 - decay^steps``. The gradient takes v as a constant.

    Args:
        means, counts, target, backend: as in `mmd_loss`.
        estimate: [M, K, D], zero at the start; changed in place.
        steps: [K] in the dtype of ``estimate``, zero at the start; changed in place.
        decay: in [0, 1).
        update: whether to move the state.

    Returns:
        Scalar, differentiable in ``means``.

    Raises:
        ValueError: shapes differ.
    """
    core = _core(backend, means, counts, target, estimate, steps)
    if core != "torch":
        tensors, moved = (counts, target, estimate, steps), (estimate, steps) if update else ()
        options = (decay, update, core)
        return _loss(_ema, torch.ops.dpmmd.ema_step, means, tensors, options, moved)
    d = mean_difference(means, counts, target)
    with torch.no_grad():
        if update:
            present = counts > 0
            steps += present
            rate = (1 - decay) * present.to(estimate.dtype)
            estimate.lerp_(d.to(estimate.dtype), rate[None, :, None])
        v = estimate / (1 - decay ** steps.clamp(min=1))[None, :, None]
    return (v * d).sum()


def adam_loss(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    *,
    estimate: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    steps: Tensor,
    lr: float,
    numbers: int | None = None,
    update: bool = True,
    backend: str = "auto",
) -> Tensor:
    """<v, d> for d = target - means and a vector v that Adam trains on mean((v - d)^2).

    Harder et al. 2023, section 3.2, after Santos et al. 2019. Adam (betas 0.9, 0.999, eps 1e-8)
    takes one step for the classes that are present. The gradient takes v as a constant.

    Args:
        means, counts, target, backend: as in `mmd_loss`.
        estimate, first_moment, second_moment: [M, K, D], zero at the start; changed in place.
        steps: [K] in the dtype of ``estimate``, zero at the start; changed in place.
        lr: Adam's rate.
        numbers: over how many numbers the mean is taken; None for M K D. Give it where v is a part
            of a longer vector.
        update: whether to move the state.

    Returns:
        Scalar, differentiable in ``means``.

    Raises:
        ValueError: shapes differ.
    """
    states = (estimate, first_moment, second_moment, steps)
    core = _core(backend, means, counts, target, *states)
    if core != "torch":
        tensors, options = (counts, target, *states), (lr, numbers, update, core)
        moved = states if update else ()
        return _loss(_adam, torch.ops.dpmmd.adam_step, means, tensors, options, moved)
    d = mean_difference(means, counts, target)
    if update:
        with torch.no_grad():
            beta1, beta2, eps = 0.9, 0.999, 1e-8
            present = counts > 0
            steps += present
            slope = (estimate - d) * (2.0 / (d.numel() if numbers is None else numbers))
            where = present.to(estimate.dtype)[None, :, None]
            first_moment.lerp_(slope, (1 - beta1) * where)
            second_moment.lerp_(slope.square(), (1 - beta2) * where)
            taken = steps.clamp(min=1)[None, :, None]
            denominator = (second_moment / (1 - beta2**taken)).sqrt_().add_(eps)
            estimate -= first_moment / (1 - beta1**taken) / denominator * lr * where
    return (estimate.clone() * d).sum()


def mean_difference(means: Tensor, counts: Tensor, target: Tensor) -> Tensor:
    """``target - means`` [M, K, D], zero for classes with count 0; arguments as in `mmd_loss`."""
    _check_target(means, counts, target)
    return torch.where(counts[None, :, None] > 0, target - means, 0)


def _check_target(means: Tensor, counts: Tensor, target: Tensor) -> None:
    if means.shape != target.shape or counts.shape != means.shape[1:2]:
        raise ValueError(
            f"target: shape {tuple(target.shape)}, expected that of means {tuple(means.shape)} "
            f"with counts [{means.shape[1]}] (got {tuple(counts.shape)}): [moments, classes, "
            "features]. Use the encoder, taps, moments and classes that the target was made with."
        )


def _core(backend: str, means: Tensor, counts: Tensor, target: Tensor, *states: Tensor) -> str:
    """What runs these: a core if all are float32, the gradient in means alone.

    Raises:
        ValueError: they are on more than one device.
    """
    _check_target(means, counts, target)
    others = (counts, target, *states)
    for name, tensor in zip(("counts", "target", *["state"] * len(states)), others, strict=True):
        if tensor.device != means.device:
            raise ValueError(
                f"{name}: {brief(tensor)}, expected it on {means.device}, where the means are; "
                f"move it with .to({str(means.device)!r})."
            )
    odd = [t for t in (means, *others) if t.dtype != torch.float32]
    like = odd[0] if odd else means
    chosen = backends.resolve(backend, like.device.type, like.dtype)
    return "torch" if odd or any(t.requires_grad for t in others) else chosen


def _check(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
) -> None:
    """Refuses what does not fit."""
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
    Bound.checked(moments, bound, clip, joint_weight)
    if labels is None:
        if num_classes != 1:
            raise ValueError(f"labels=None: expected labels, since num_classes={num_classes}.")
    else:
        checks.check_labels(labels, first.shape[0], first.device)


def check_labels(labels: Tensor, like: Tensor, num_classes: int) -> None:
    """Refuses labels that are not int64 [n] on the device of ``like`` [n, ...], in 0..K-1."""
    checks.check_labels(labels, like.shape[0], like.device)
    _checked_values(labels, like, num_classes)


def _checked_values(labels: Tensor | None, like: Tensor, num_classes: int) -> Tensor:
    """The labels, zeros for None; refuses values out of range, as the native core does."""
    n = like.shape[0]
    if labels is None:
        return torch.zeros(n, dtype=torch.int64, device=like.device)
    if labels.device.type == "cpu":
        if n and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
            raise ValueError(
                f"labels: values from {int(labels.min())} to {int(labels.max())}, "
                f"expected 0..{num_classes - 1} (num_classes={num_classes})."
            )
    else:  # checked on the device: reading the values here would wait for it
        torch._assert_async(((labels >= 0) & (labels < num_classes)).all())
    return labels


def class_counts(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """[K]; unlike torch.bincount it never makes the host wait for a device."""
    classes = torch.arange(num_classes, device=labels.device)
    return (labels[:, None] == classes).sum(dim=0).to(dtype)


class _MeanEmbedding(torch.autograd.Function):
    """Class means of bounded moments over a list of taps, in two sweeps over the features.

    With v_m = w_m f^m the m-th moment before its bound, s its scale (one an image, or one an image
    and tap) and W[i, k] = [y_i = k] / n_k:

        forward    means[m] = (W s)^T v_m            a product: nothing is normalised in memory
        backward   dv_m = s (W G_m) - p <v_m, W G_m> v_m   (p = s^3 / c^2; 0 for an inactive ball)
                   df = dv_1 + 2 w_2 f dv_2

    Saved for backward: the taps themselves and O(n L) scales.

    A tap with a slot (`dpmmd.injection`) brings its squared norms; its gradient is left there.
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
        slots: Sequence[Slot | None] | None,
        *taps: Tensor,
    ) -> Tensor:
        n, num_classes, dtype = labels.shape[0], counts.shape[0], counts.dtype
        joint = joint_weight is not None
        weights = [1.0 if m == 1 or joint_weight is None else joint_weight for m in moments]
        squares = counts.new_empty(len(moments), n, len(taps))  # |v_m|^2 by tap
        for column, tap in enumerate(taps):
            if slots is not None and (slot := slots[column]) is not None:
                for row, square in enumerate(slot.squares):
                    squares[row, :, column] = weights[row] ** 2 * square
                continue
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
        ctx.slots = slots
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
            if not ctx.needs_input_grad[7 + column]:
                grads.append(None)
                continue
            gradient = partial(
                _tap_gradient,
                piece=pieces[column],
                mean_of=mean_of,
                scale=[_of(scale, row, column) for row in range(len(moments))],
                projection=[_of(projection, row, column) for row in range(len(moments))],
                moments=moments,
                weights=weights,
                blank=ctx.blank,
            )
            if ctx.slots is not None and (slot := ctx.slots[column]) is not None:
                slot.gradient = gradient
                grads.append(None)
            else:
                grads.append(gradient(tap).to(tap.dtype))
        return None, None, None, None, None, None, None, *grads


def _tap_gradient(
    tap: Tensor,
    *,
    piece: Tensor,
    mean_of: Tensor,
    scale: Sequence[Tensor],
    projection: Sequence[Tensor],
    moments: Sequence[int],
    weights: Sequence[float],
    blank: bool,
) -> Tensor:
    """df [n, d] of one tap [n, d], in the dtype of ``piece`` = its columns of G."""
    f = tap.to(piece.dtype)
    if blank:
        f = torch.where(torch.stack(list(scale)).amax(dim=0) > 0, f, 0)
    df = torch.zeros_like(f)
    for row, moment in enumerate(moments):
        upstream = (mean_of * scale[row]) @ piece[row]  # s W G_m
        if moment == 1:
            df += upstream.addcmul_(f, projection[row], value=-1)
        else:
            upstream.addcmul_(f * f, projection[row], value=-weights[row])
            df.addcmul_(upstream, f, value=2 * weights[row])
    return df


def _of(values: Tensor, row: int, column: int) -> Tensor:
    """Entry [row, :, column] of values [M or 1, n, L or 1] as [n, 1]."""
    return values[min(row, values.shape[0] - 1), :, min(column, values.shape[2] - 1), None]


def _usable_rows(f: Tensor, scale: Tensor, column: int, blank: bool) -> Tensor:
    """f with the rows that no moment can use set to zero, if there may be any."""
    if not blank:
        return f
    usable = torch.stack([_of(scale, row, column) for row in range(scale.shape[0])]).amax(dim=0)
    return torch.where(usable > 0, f, 0)


# The operations of the cores: `core` is "cpu", the native one, "cuda", or "triton", whose modules
# are imported when they are first asked for. There are two ways to call them. As custom operators
# they are opaque to torch.compile, torch.export and whatever else traces; but a call of such an
# operator with twenty taps takes a millisecond of Python. Where nothing traces, `_Embedding` and
# `_Loss` call them as they are.


def _plain(*tensors: Tensor | None) -> bool:
    """Whether nothing stands between a call and its kernels but autograd."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return all(type(t) is Tensor or type(t) is nn.Parameter for t in tensors if t is not None)


class _Embedding(torch.autograd.Function):
    """`_mean_embedding` and its derivative."""

    @staticmethod
    def forward(
        ctx: Any,
        labels: Tensor | None,
        options: tuple[int, list[int], str, float, float | None, str],
        *features: Tensor,
    ) -> tuple[Tensor, Tensor]:
        means, counts, *statistics = _embed(features, labels, *options)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(labels, *statistics, *features)
        ctx.options = options
        return means, counts

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[2:]
        if grad is None:
            return (None,) * (2 + len(needed))
        # With create_graph=True the operator, whose gradient is an error.
        traced = torch.is_grad_enabled()
        run = torch.ops.dpmmd.mean_embedding_backward if traced else _embed_backward
        return None, None, *_gradients(run, ctx, grad, needed)


def _gradients(
    run: Callable[..., list[Tensor]], ctx: Any, grad: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Those of the features that are needed, by ``run``, from what a forward pass has saved."""
    labels, scale, projection, schedule, *features = ctx.saved_tensors
    num_classes, moments, bound, _clip, joint_weight, core = ctx.options
    grads = run(
        features,
        labels,
        num_classes,
        moments,
        bound,
        joint_weight,
        scale,
        projection,
        schedule,
        grad,
        list(needed),
        core,
    )
    return [g if need else None for g, need in zip(grads, needed, strict=True)]


def _loss(
    plain: Callable[..., tuple[Tensor, Tensor]],
    operator: Callable[..., tuple[Tensor, Tensor]],
    means: Tensor,
    tensors: tuple[Tensor, ...],
    options: tuple[Any, ...],
    moved: tuple[Tensor, ...] = (),
) -> Tensor:
    """What a difference estimator says of the means, by its function or by the operator of it.

    ``moved`` are tensors that it changes in place.
    """
    if _plain(means, *tensors):
        return _Loss.apply(means, lambda means: plain(means, *tensors, *options), moved)
    value, gradient = operator(means.detach(), *tensors, *options)
    return torch.ops.dpmmd.with_gradient(means, value, gradient)


class _Loss(torch.autograd.Function):
    """What ``run(means)``, a difference estimator, returns: its value, with its gradient.

    ``states`` are tensors that it changes in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        means: Tensor,
        run: Callable[[Tensor], tuple[Tensor, Tensor]],
        states: tuple[Tensor, ...],
    ) -> Tensor:
        value, gradient = run(means.detach())
        for state in states:
            torch.autograd.graph.increment_version(state)
        ctx.save_for_backward(means, gradient)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _give_gradient(ctx, grad)


def _embed(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
    core: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Means, counts, scale, projection and, of the GPU cores, the labels' schedule."""
    options = {"moments": moments, "bound": bound, "clip": clip, "joint_weight": joint_weight}
    if core == "triton":
        from dpmmd.kernels import mean_embedding as kernels

        its = Bound(tuple(moments), bound, clip, joint_weight)
        means, counts, saved = kernels.forward(features, labels, num_classes, its)
        return means, counts, *saved
    if core == "cuda":
        return cuda.forward(features, labels, num_classes, **options)  # type: ignore[arg-type]
    nothing = features[0].new_empty(0, dtype=torch.int32)
    return (*cpu.forward(features, labels, num_classes, **options), nothing)  # type: ignore[arg-type]


_mean_embedding = torch.library.custom_op(
    "dpmmd::mean_embedding", _embed, mutates_args=(), device_types=("cpu", "cuda")
)


@_mean_embedding.register_fake
def _(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    moments: Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
    core: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    length = 0
    if core == "triton":
        from dpmmd.kernels.schedule import size as length_of

        length = length_of(features[0].shape[0], None if labels is None else num_classes)
    elif core == "cuda":
        length = cuda.schedule_size(features[0].shape[0], None if labels is None else num_classes)
    dim = sum(math.prod(f.shape[1:]) for f in features)
    folded = Bound(tuple(moments), bound, clip, joint_weight)
    size = statistics_shape(folded, features[0].shape[0], len(features))
    new = features[0].new_empty
    return (
        new((len(moments), num_classes, dim), dtype=torch.float32),
        new((num_classes,), dtype=torch.float32),
        new(size, dtype=torch.float32),
        new(size, dtype=torch.float32),
        new((length,), dtype=torch.int32),
    )


def _embed_backward(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    moments: Sequence[int],
    bound: str,
    joint_weight: float | None,
    scale: Tensor,
    projection: Tensor,
    schedule: Tensor,
    upstream: Tensor,
    needed: Sequence[bool],
    core: str,
) -> list[Tensor]:
    if core == "triton":
        from dpmmd.kernels import mean_embedding as kernels

        its = Bound(tuple(moments), bound, joint_weight=joint_weight)
        saved = Saved(scale, projection, schedule)
        return kernels.backward(features, labels, num_classes, its, saved, upstream, needed)
    options: dict[str, Any] = {
        "moments": moments,
        "bound": bound,
        "joint_weight": joint_weight,
        "scale": scale,
        "projection": projection,
        "upstream": upstream,
        "needed": needed,
    }
    if core == "cuda":
        return cuda.backward(features, labels, num_classes, schedule=schedule, **options)[0]
    return cpu.backward(features, labels, num_classes, **options)[0]


_mean_embedding_backward = torch.library.custom_op(
    "dpmmd::mean_embedding_backward",
    _embed_backward,
    mutates_args=(),
    device_types=("cpu", "cuda"),
    # Written out: older versions of PyTorch cannot infer a list that is returned.
    schema="(Tensor[] features, Tensor? labels, SymInt num_classes, SymInt[] moments, str bound, "
    "float? joint_weight, Tensor scale, Tensor projection, Tensor schedule, Tensor upstream, "
    "bool[] needed, str core) -> Tensor[]",
)


@_mean_embedding_backward.register_fake
def _(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    moments: Sequence[int],
    bound: str,
    joint_weight: float | None,
    scale: Tensor,
    projection: Tensor,
    schedule: Tensor,
    upstream: Tensor,
    needed: Sequence[bool],
    core: str,
) -> list[Tensor]:
    return empty_gradients(features, needed)


def _save_mean_embedding(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    features, labels, *ctx.options = inputs
    _, counts, *statistics = output  # scale, projection, schedule
    ctx.mark_non_differentiable(counts, *statistics)
    ctx.save_for_backward(labels, *statistics, *features)


def _differentiate_mean_embedding(
    ctx: Any, grad: Tensor, *_: Tensor
) -> tuple[list[Tensor | None] | None, ...]:
    operator, needed = torch.ops.dpmmd.mean_embedding_backward, ctx.needs_input_grad[0]
    wanted = _gradients(operator, ctx, grad, needed)
    return wanted, None, None, None, None, None, None, None


_mean_embedding.register_autograd(_differentiate_mean_embedding, setup_context=_save_mean_embedding)


def _refuse_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError(
        "dpmmd.functional: its gradients cannot be differentiated again (the operations are "
        "once_differentiable); differentiate those of dpmmd.reference instead."
    )


_mean_embedding_backward.register_autograd(_refuse_double_backward)


def _difference(core: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if core == "triton":
        from dpmmd.kernels.estimator import estimate

        return lambda *tensors, **step: estimate(*tensors, Step(**step))
    return cuda.difference if core == "cuda" else cpu.difference


def _mmd(means: Tensor, counts: Tensor, target: Tensor, core: str) -> tuple[Tensor, Tensor]:
    return _difference(core)(means, counts, target)


_squared_mmd = torch.library.custom_op(
    "dpmmd::squared_mmd", _mmd, mutates_args=(), device_types=("cpu", "cuda")
)


@_squared_mmd.register_fake
def _(means: Tensor, counts: Tensor, target: Tensor, core: str) -> tuple[Tensor, Tensor]:
    return means.new_empty(()), means.new_empty(means.shape)


def _ema(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    estimate: Tensor,
    steps: Tensor,
    decay: float,
    update: bool,
    core: str,
) -> tuple[Tensor, Tensor]:
    return _difference(core)(
        means,
        counts,
        target,
        estimator="ema",
        estimate=estimate,
        steps=steps,
        decay=decay,
        update=update,
    )


_ema_step = torch.library.custom_op(
    "dpmmd::ema_step", _ema, mutates_args=("estimate", "steps"), device_types=("cpu", "cuda")
)


@_ema_step.register_fake
def _(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    estimate: Tensor,
    steps: Tensor,
    decay: float,
    update: bool,
    core: str,
) -> tuple[Tensor, Tensor]:
    return means.new_empty(()), means.new_empty(means.shape)


def _adam(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    estimate: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    steps: Tensor,
    lr: float,
    numbers: int | None,
    update: bool,
    core: str,
) -> tuple[Tensor, Tensor]:
    return _difference(core)(
        means,
        counts,
        target,
        estimator="adam",
        estimate=estimate,
        first_moment=first_moment,
        second_moment=second_moment,
        steps=steps,
        lr=lr,
        numbers=numbers,
        update=update,
    )


_adam_step = torch.library.custom_op(
    "dpmmd::adam_step",
    _adam,
    mutates_args=("estimate", "first_moment", "second_moment", "steps"),
    device_types=("cpu", "cuda"),
)


@_adam_step.register_fake
def _(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    estimate: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    steps: Tensor,
    lr: float,
    numbers: int | None,
    update: bool,
    core: str,
) -> tuple[Tensor, Tensor]:
    return means.new_empty(()), means.new_empty(means.shape)


@torch.library.custom_op("dpmmd::with_gradient", mutates_args=(), device_types=("cpu", "cuda"))
def _with_gradient(means: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value``, as a function of ``means`` whose gradient is known."""
    return value.clone()


@_with_gradient.register_fake
def _(means: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    return value.new_empty(())


class Once(torch.autograd.Function):
    """A gradient that is known as a number, not as a function of the means."""

    @staticmethod
    def forward(ctx: Any, means: Tensor, gradient: Tensor) -> Tensor:
        return gradient.clone()

    backward = staticmethod(_refuse_double_backward)


def _save_gradient(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[2])


def _give_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    means, gradient = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        return Once.apply(means, gradient * grad), None, None
    # A plain 1, the usual case, costs no pass and no memory. While a graph is traced (the tensor
    # is of another class then) there is no value to look at, and one on a device would have to be
    # waited for, which a CUDA graph cannot capture.
    if type(grad) is Tensor and grad.device.type == "cpu" and float(grad) == 1.0:
        return gradient, None, None
    return gradient * grad, None, None


_with_gradient.register_autograd(_give_gradient, setup_context=_save_gradient)
