"""The only caller of the native core: checks everything before an address leaves Python.

Operations of mean embeddings come in halves (`Phases` in csrc/dpmmd.h): row statistics and class
sums forward, row dots and gradient backward. ``STATISTICS | CLASS_SUMS`` and ``DOTS | GRADIENT``
do two halves in one pass over the features.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from math import prod
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

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

# How the features of one image lie in memory.
ROWS, PLANES = 0, 1  # in the order of columns; [C, H, W] where columns are [H, W, C]


def layout(tap: Tensor) -> int | None:
    """ROWS, PLANES, or None where an image's features are not in one piece."""
    if tap.ndim != 4:
        return ROWS if tap.is_contiguous() or _one_piece(tap) else None
    if _channels_last(tap):
        return ROWS
    if tap.is_contiguous():
        return PLANES
    if _one_piece(tap.permute(0, 2, 3, 1)):
        return ROWS
    return PLANES if _one_piece(tap) else None


def _channels_last(tap: Tensor) -> bool:
    return tap.ndim == 4 and tap.is_contiguous(memory_format=torch.channels_last)


def _one_piece(tap: Tensor) -> bool:
    """Whether each image of a view is dense in the order of its dimensions."""
    step = 1
    for size, stride in zip(reversed(tap.shape[1:]), reversed(tap.stride()[1:]), strict=True):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _empty(size: Sequence[int]) -> Tensor:
    """What the core writes: float32 on the CPU, whatever torch's defaults are."""
    return torch.empty(size, dtype=torch.float32, device="cpu")


def empty_gradient(tap: Tensor) -> Tensor:
    """Uninitialised, with the tap's shape and memory format."""
    if tap.is_contiguous() or _channels_last(tap):
        return torch.empty_like(tap)
    if tap.ndim == 4 and layout(tap) != PLANES:
        return torch.empty_like(tap, memory_format=torch.channels_last)
    return torch.empty_like(tap, memory_format=torch.contiguous_format)


class Pieces(NamedTuple):
    """Taps whose images are in one piece, with what is asked of each more than once.

    Attributes:
        tensors: the taps.
        widths: columns of each.
        planes: indices of those that lie as PLANES.
    """

    tensors: list[Tensor]
    widths: list[int]
    planes: list[int]

    def to_columns(self, means: Tensor) -> None:
        """Puts [M, K, D] as the taps lie into the order of columns, in place."""
        if self.planes:
            pieces = means.split(self.widths, dim=2)
            for i in self.planes:
                by_plane = pieces[i].unflatten(2, (self.tensors[i].shape[1], -1))
                pieces[i].copy_(by_plane.transpose(2, 3).flatten(2))

    def from_columns(self, upstream: Tensor) -> Tensor:
        """[M, K, D] in the order of columns as the taps lie."""
        if not self.planes:
            return upstream
        ordered = upstream.clone()
        sources, pieces = upstream.split(self.widths, dim=2), ordered.split(self.widths, dim=2)
        for i in self.planes:
            channels = self.tensors[i].shape[1]
            by_pixel = sources[i].unflatten(2, (-1, channels))
            pieces[i].unflatten(2, (channels, -1)).copy_(by_pixel.transpose(2, 3))
        return ordered


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
    pieces = gather(features, _FEATURES)
    n = features[0].shape[0]
    size = statistics_shape(features, moments, bound, joint_weight)
    if statistics is None:
        scale, projection = _empty(size), _empty(size)
    else:
        scale, projection = statistics
        _check_buffer("scale", scale, size)
        _check_buffer("projection", projection, size)
    means = _empty((len(moments), num_classes, sum(pieces.widths)))
    counts = _empty((num_classes,))
    labels = _checked_labels(labels, n)
    _run(
        pieces, None, labels, num_classes, moments, bound, clip, joint_weight,
        scale, projection, means, counts, None, None, phases, threads,
    )  # fmt: skip
    if phases & CLASS_SUMS:
        pieces.to_columns(means)
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
    pieces = gather(features, _FEATURES)
    n = features[0].shape[0]
    size = statistics_shape(features, moments, bound, joint_weight)
    for name, buffer in (("scale", scale), ("projection", projection)):
        _check_buffer(name, buffer, size)
    if coefficients is None:
        coefficients = _empty(size)
    else:
        _check_buffer("coefficients", coefficients, size)
    if not upstream.is_contiguous():
        upstream = upstream.contiguous()
    _check_buffer("upstream", upstream, (len(moments), num_classes, sum(pieces.widths)))
    upstream = pieces.from_columns(upstream)
    if needed is None:
        needed = [True] * len(pieces.tensors)
    gradients = [
        empty_gradient(tap) if wanted else tap.new_empty(0)
        for tap, wanted in zip(pieces.tensors, needed, strict=True)
    ]
    labels = _checked_labels(labels, n)
    _run(
        pieces, gradients, labels, num_classes, moments, bound, 1.0, joint_weight,
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
    piece = gather([tap], _FEATURES, planes=False)
    n, columns = tap.shape[0], piece.widths[0]
    factors = {"scale": scale, "projection": projection, "coefficients": coefficients}
    size = (1 if joint_weight is not None else len(moments), n)
    for name, buffer in factors.items():
        _check_buffer(name, buffer, size)
    _check_buffer("upstream", upstream, (len(moments), num_classes, columns))
    if ceiling is not None and not ceiling > 0:
        raise ValueError(f"ceiling={ceiling!r}: expected None or a number > 0.")
    if incoming is not None:
        if incoming.shape != tap.shape or incoming.dtype != tap.dtype:
            raise ValueError(f"incoming: {brief(incoming)}, expected it like tap: {brief(tap)}.")
        incoming = gather([incoming], _FEATURES, planes=False).tensors[0]
    top = torch.tensor(float("inf") if ceiling is None else ceiling, dtype=tap.dtype).item()
    out = torch.empty_like(piece.tensors[0], memory_format=torch.preserve_format)
    _run(
        piece, [out], _checked_labels(labels, n), num_classes, moments, "sphere", 1.0,
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
    pieces: Pieces,
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
        addresses(pieces, gradients),
        _TYPES[pieces.tensors[0].dtype],
        pieces.tensors[0].shape[0],
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
    value, gradient = _empty(()), _empty(shape)
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
    pieces = gather(features, _TYPES, planes=False)
    n = features[0].shape[0]
    if not 0 <= shared_taps <= len(features):
        raise ValueError(f"shared_taps={shared_taps!r}: expected 0..{len(features)}.")
    if (shared is None) != (shared_taps == 0):
        raise ValueError(
            f"shared: {brief(shared)} with shared_taps={shared_taps}; give both or neither."
        )
    of_shared = len(bound.moments) * sum(pieces.widths[:shared_taps])
    own = len(bound.moments) * sum(pieces.widths[shared_taps:])
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
        addresses(pieces),
        _TYPES[features[0].dtype],
        n,
        _address(labels),
        sums.shape[0],
        _address(valid),
        _address(limits),
        bound.bits,
        bound.ball,
        bound.per_tap,
        nonnegative,
        bound.clip,
        bound.weight,
        shared_taps,
        _address(sums),
        _address(shared),
        torch.get_num_threads() if threads is None else threads,
    )
    _check_status(status)


def gather(
    features: Sequence[Tensor],
    dtypes: Sequence[torch.dtype] | dict[torch.dtype, int],
    kind: str = "cpu",
    *,
    planes: bool = True,
) -> Pieces:
    """The taps, checked; a tap whose images are not in one piece as a copy that is.

    Args:
        features: on one device, of type ``kind``.
        dtypes: that are taken.
        planes: whether maps may stay in that order; else they are copied to channels-last.
    """
    if not features:
        raise ValueError("features: expected at least one tap.")
    first = features[0]
    n, dtype, device = first.shape[:1], first.dtype, first.device
    if device.type != kind or dtype not in dtypes:
        _refuse(features, dtypes, kind)
    tensors, widths, of_planes = [], [], []
    for i, tap in enumerate(features):
        shape = tap.shape
        if (
            tap.dtype != dtype
            or tap.device != device
            or len(shape) < 2
            or shape[:1] != n
            or tap.layout != torch.strided
        ):
            _refuse(features, dtypes, kind)
        how = layout(tap)
        if how is None or (how == PLANES and not planes):
            tap, how = _in_rows(tap), ROWS
        tensors.append(tap)
        widths.append(prod(shape[1:]))
        if how == PLANES and widths[-1]:
            of_planes.append(i)
    return Pieces(tensors, widths, of_planes)


def _in_rows(tap: Tensor) -> Tensor:
    last = torch.channels_last if tap.ndim == 4 else torch.contiguous_format
    return tap.contiguous(memory_format=last)


def _refuse(
    features: Sequence[Tensor], dtypes: Sequence[torch.dtype] | dict[torch.dtype, int], kind: str
) -> NoReturn:
    first = features[0]
    for i, tap in enumerate(features):
        if tap.device.type != kind or tap.device != first.device or tap.layout != torch.strided:
            where = str(first.device) if first.device.type == kind else f"a {kind} device"
            raise ValueError(f"features[{i}]: {brief(tap)}, expected a dense tensor on {where}.")
        if tap.dtype not in dtypes or tap.dtype != first.dtype:
            expected = first.dtype if first.dtype in dtypes else " or ".join(map(str, dtypes))
            raise ValueError(f"features[{i}]: {brief(tap)}, expected {expected}.")
        if tap.ndim < 2:
            raise ValueError(f"features[{i}]: {brief(tap)}, expected [n, ...], at least 2-d.")
        if tap.shape[0] != first.shape[0]:
            raise ValueError(
                f"features[{i}]: {brief(tap)}, expected n={first.shape[0]} as in features[0]."
            )
    raise AssertionError("taps that fit")


def addresses(
    pieces: Pieces, gradients: Sequence[Tensor] | None = None
) -> list[tuple[int, int, int, int, int]]:
    """What the native cores know of each tap: its address, step and columns, and the gradient's."""
    tensors, widths, _ = pieces
    if gradients is None:
        return [
            (tap.data_ptr(), tap.stride(0), columns, 0, 0)
            for tap, columns in zip(tensors, widths, strict=True)
        ]
    return [
        (
            tap.data_ptr(),
            tap.stride(0),
            columns,
            *((out.data_ptr(), columns) if len(out) else (0, 0)),
        )
        for tap, columns, out in zip(tensors, widths, gradients, strict=True)
    ]


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _checked_labels(labels: Tensor | None, n: int) -> Tensor | None:
    if labels is None:
        return None
    if labels.dtype != torch.int64 or labels.shape != (n,) or labels.device.type != "cpu":
        raise ValueError(f"labels: {brief(labels)}, expected int64 [{n}] on the CPU.")
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
            f"{name}: {brief(buffer)}{'' if buffer.is_contiguous() else ', not contiguous'}; "
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


def brief(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__
