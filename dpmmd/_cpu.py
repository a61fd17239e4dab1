"""The only caller of the native core: checks everything before an address leaves Python.

Operations of mean embeddings come in halves (`Phases` in csrc/dpmmd.h): row statistics and class
sums forward, row dots and gradient backward. ``STATISTICS | CLASS_SUMS`` and ``DOTS | GRADIENT``
do two halves in one pass over the features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

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

# How the features of one image lie in memory.
ROWS, PLANES = 0, 1  # in the order of columns; [C, H, W] where columns are [H, W, C]


def layout(tap: Tensor) -> int | None:
    """ROWS, PLANES, or None where an image's features are not in one piece."""
    if tap.ndim != 4:
        return ROWS if tap.is_contiguous() or _one_piece(tap) else None
    if tap.is_contiguous(memory_format=torch.channels_last):
        return ROWS
    if tap.is_contiguous():
        return PLANES
    if _one_piece(tap.permute(0, 2, 3, 1)):
        return ROWS
    return PLANES if _one_piece(tap) else None


def _one_piece(tap: Tensor) -> bool:
    """Whether each image of a view is dense in the order of its dimensions."""
    step = 1
    for size, stride in zip(reversed(tap.shape[1:]), reversed(tap.stride()[1:]), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def empty_gradient(tap: Tensor) -> Tensor:
    """Uninitialised, with the tap's shape and memory format."""
    if tap.is_contiguous():
        return torch.empty_like(tap)
    if tap.ndim == 4 and layout(tap) != PLANES:
        return torch.empty_like(tap, memory_format=torch.channels_last)
    return torch.empty_like(tap, memory_format=torch.contiguous_format)


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
    taps = _pieces(features)
    n, dim = features[0].shape[0], sum(prod(f.shape[1:]) for f in features)
    size = statistics_shape(features, moments, bound, joint_weight)
    if statistics is None:
        scale, projection = torch.empty(size), torch.empty(size)
    else:
        scale, projection = statistics
        _check_buffer("scale", scale, size)
        _check_buffer("projection", projection, size)
    means = torch.empty(len(moments), num_classes, dim)
    counts = torch.empty(num_classes)
    labels = _checked_labels(labels, n)
    _run(
        taps, None, labels, num_classes, moments, bound, clip, joint_weight,
        scale, projection, means, counts, None, None, phases, threads,
    )  # fmt: skip
    if phases & CLASS_SUMS:
        widths = [prod(t.shape[1:]) for t in taps]
        for piece, tap in zip(means.split(widths, dim=2), taps, strict=True):
            if layout(tap) == PLANES:
                by_plane = piece.unflatten(2, (tap.shape[1], -1))
                piece.copy_(by_plane.transpose(2, 3).flatten(2))
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
    taps = _pieces(features)
    n, widths = features[0].shape[0], [prod(f.shape[1:]) for f in features]
    size = statistics_shape(features, moments, bound, joint_weight)
    for name, buffer in (("scale", scale), ("projection", projection)):
        _check_buffer(name, buffer, size)
    if coefficients is None:
        coefficients = torch.empty(size)
    else:
        _check_buffer("coefficients", coefficients, size)
    if not upstream.is_contiguous():
        upstream = upstream.contiguous()
    _check_buffer("upstream", upstream, (len(moments), num_classes, sum(widths)))
    if any(layout(tap) == PLANES for tap in taps):
        ordered = upstream.clone()
        for source, piece, tap in zip(
            upstream.split(widths, dim=2), ordered.split(widths, dim=2), taps, strict=True
        ):
            if layout(tap) == PLANES:
                by_pixel = source.unflatten(2, (-1, tap.shape[1]))
                piece.unflatten(2, (tap.shape[1], -1)).copy_(by_pixel.transpose(2, 3))
        upstream = ordered
    if needed is None:
        needed = [True] * len(taps)
    gradients = [
        empty_gradient(tap) if wanted else tap.new_empty(0)
        for tap, wanted in zip(taps, needed, strict=True)
    ]
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
    (piece,) = _pieces([tap], planes=False)
    n, columns = tap.shape[0], prod(tap.shape[1:])
    factors = {"scale": scale, "projection": projection, "coefficients": coefficients}
    size = (1 if joint_weight is not None else len(moments), n)
    for name, buffer in factors.items():
        _check_buffer(name, buffer, size)
    _check_buffer("upstream", upstream, (len(moments), num_classes, columns))
    if ceiling is not None and not ceiling > 0:
        raise ValueError(f"ceiling={ceiling!r}: expected None or a number > 0.")
    if incoming is not None:
        if incoming.shape != tap.shape or incoming.dtype != tap.dtype:
            raise ValueError(f"incoming: {_brief(incoming)}, expected it like tap: {_brief(tap)}.")
        (incoming,) = _pieces([incoming], planes=False)
    top = torch.tensor(float("inf") if ceiling is None else ceiling, dtype=tap.dtype).item()
    out = torch.empty_like(piece, memory_format=torch.preserve_format)
    _run(
        [piece], [out], _checked_labels(labels, n), num_classes, moments, "sphere", 1.0,
        joint_weight, scale, projection, None, None, upstream, coefficients, GRADIENT, threads,
        top, incoming,
    )  # fmt: skip
    return out


def statistics_shape(
    features: Sequence[Tensor], moments: Sequence[int], bound: str, joint_weight: float | None
) -> tuple[int, int, int]:
    blocks = len(features) if bound.endswith("-per-tap") else 1
    return (1 if joint_weight is not None else len(moments), features[0].shape[0], blocks)


def _run(
    taps: Sequence[Tensor],
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
        _addresses(taps, gradients),
        _TYPES[taps[0].dtype],
        taps[0].shape[0],
        _address(labels),
        num_classes,
        sum(moments),  # the bits of (1,), (2,) and (1, 2)
        bound.startswith("ball"),
        bound.endswith("-per-tap"),
        joint_weight is not None,
        clip,
        1.0 if joint_weight is None else joint_weight,
        _address(scale),
        _address(projection),
        _address(means),
        _address(counts),
        _address(upstream),
        _address(coefficients),
        ceiling,
        _address(incoming),
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
        _check_buffer(name, buffer, shape)
    _check_buffer("counts", counts, shape[1:2])
    if steps is not None:
        _check_buffer("steps", steps, shape[1:2])
        states["steps"] = steps
    _check_apart(states, inputs | {"counts": counts})
    value, gradient = torch.empty(()), torch.empty(shape)
    status = _native.difference(
        _ESTIMATORS[estimator],
        update,
        shape[0],
        shape[1],
        shape[2],
        _address(means),
        _address(counts),
        _address(target),
        _address(estimate),
        _address(first_moment),
        _address(second_moment),
        _address(steps),
        decay,
        lr,
        float(means.numel() if numbers is None else numbers),
        _address(gradient),
        _address(value),
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
    moments: Sequence[int],
    joint_weight: float,
    bound: str,
    clip: float,
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
        moments: (1,), (2,) or (1, 2); the last is the joint vector (f, joint_weight f^2).
        joint_weight, bound, clip, nonnegative: as `dpmmd.privacy.sums.PrivateSums.add`.
        sums: int64 [K, M D'], D' the columns of the taps that are not shared; added to.
        shared: int64 [1, M (D - D')], added to whatever the label; None where ``shared_taps`` is 0.
        shared_taps: how many leading taps are shared by all classes.
    """
    taps = _pieces(features, _TYPES, planes=False)
    n, widths = features[0].shape[0], [prod(f.shape[1:]) for f in features]
    if not 0 <= shared_taps <= len(taps):
        raise ValueError(f"shared_taps={shared_taps!r}: expected 0..{len(taps)}.")
    if (shared is None) != (shared_taps == 0):
        raise ValueError(
            f"shared: {_brief(shared)} with shared_taps={shared_taps}; give both or neither."
        )
    of_shared = len(moments) * sum(widths[:shared_taps])
    own = len(moments) * sum(widths[shared_taps:])
    _check_buffer("labels", labels, (n,), torch.int64)
    _check_buffer("valid", valid, (n,), torch.bool)
    _check_buffer("limits", limits, (n,), torch.int64)
    _check_buffer("sums", sums, (sums.shape[0] if sums.ndim else 1, own), torch.int64)
    outputs = {"sums": sums}
    if shared is not None:
        _check_buffer("shared", shared, (1, of_shared), torch.int64)
        outputs["shared"] = shared
    inputs = {f"features[{i}]": tap for i, tap in enumerate(features)}
    _check_apart(outputs, inputs | {"labels": labels, "valid": valid, "limits": limits})
    status = _native.bounded_sums(
        _addresses(taps, None),
        _TYPES[taps[0].dtype],
        n,
        _address(labels),
        sums.shape[0],
        _address(valid),
        _address(limits),
        sum(moments),
        bound.startswith("ball"),
        bound.endswith("-per-tap"),
        nonnegative,
        clip,
        joint_weight,
        shared_taps,
        _address(sums),
        _address(shared),
        torch.get_num_threads() if threads is None else threads,
    )
    _check_status(status)


def _pieces(
    features: Sequence[Tensor],
    dtypes: Sequence[torch.dtype] | dict[torch.dtype, int] = _FEATURES,
    *,
    planes: bool = True,
) -> list[Tensor]:
    """The taps, checked; a tap whose images are not in one piece as a copy that is."""
    if not features:
        raise ValueError("features: expected at least one tap.")
    first = features[0]
    pieces = []
    for i, tap in enumerate(features):
        if tap.device.type != "cpu" or tap.layout != torch.strided:
            raise ValueError(f"features[{i}]: {_brief(tap)}, expected a dense tensor on the CPU.")
        if tap.dtype not in dtypes or tap.dtype != first.dtype:
            expected = first.dtype if first.dtype in dtypes else " or ".join(map(str, dtypes))
            raise ValueError(f"features[{i}]: {_brief(tap)}, expected {expected}.")
        if tap.ndim < 2:
            raise ValueError(f"features[{i}]: {_brief(tap)}, expected [n, ...], at least 2-d.")
        if tap.shape[0] != first.shape[0]:
            raise ValueError(
                f"features[{i}]: {_brief(tap)}, expected n={first.shape[0]} as in features[0]."
            )
        how = layout(tap)
        if how is None or (how == PLANES and not planes):
            tap = tap.contiguous(
                memory_format=torch.channels_last if tap.ndim == 4 else torch.contiguous_format
            )
        pieces.append(tap)
    return pieces


def _addresses(
    taps: Sequence[Tensor], gradients: Sequence[Tensor] | None
) -> list[tuple[int, int, int, int, int]]:
    numbers = []
    for i, tap in enumerate(taps):
        columns = prod(tap.shape[1:])
        gradient, stride = 0, 0
        if gradients is not None and gradients[i].numel():
            gradient, stride = gradients[i].data_ptr(), columns
        numbers.append((tap.data_ptr(), tap.stride(0), columns, gradient, stride))
    return numbers


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _checked_labels(labels: Tensor | None, n: int) -> Tensor | None:
    if labels is None:
        return None
    if labels.dtype != torch.int64 or labels.shape != (n,) or labels.device.type != "cpu":
        raise ValueError(f"labels: {_brief(labels)}, expected int64 [{n}] on the CPU.")
    return labels.contiguous()


def _check_buffer(
    name: str, buffer: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> None:
    if (
        buffer.dtype != dtype
        or tuple(buffer.shape) != tuple(shape)
        or buffer.device.type != "cpu"
        or not buffer.is_contiguous()
    ):
        raise ValueError(
            f"{name}: {_brief(buffer)}{'' if buffer.is_contiguous() else ', not contiguous'}; "
            f"expected {dtype} {list(shape)} on the CPU, contiguous."
        )


def _check_apart(outputs: dict[str, Tensor], inputs: dict[str, Tensor]) -> None:
    """Refuses an output that shares memory with another output or an input."""
    names = list(outputs)
    for i, name in enumerate(names):
        others = {n: outputs[n] for n in names[:i]} | inputs
        begin, end = _span(outputs[name])
        for other, tensor in others.items():
            low, high = _span(tensor)
            if begin < high and low < end:
                raise ValueError(f"{name}: shares memory with {other}; pass a buffer of its own.")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and one past the last byte, that a tensor's elements lie in."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def _check_status(status: int) -> None:
    if status:
        raise MemoryError(f"dpmmd._native: no workspace (status {status}).")


def _brief(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__
