"""What every core checks before an address leaves Python: buffers, labels, memory that is shared.

The messages name the argument, say what it is, and what was expected of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor

from dpmmd.bounds import Bound


def brief(value: object) -> str:
    """A tensor's dtype, shape and device; the type of anything else."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__


def address(tensor: Tensor | None) -> int:
    """Where the elements start; 0 for no tensor."""
    return 0 if tensor is None else tensor.data_ptr()


def check_buffer(
    name: str,
    buffer: Tensor,
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Refuses a tensor that a core could not take by its address."""
    if (
        buffer.dtype != dtype
        or tuple(buffer.shape) != tuple(shape)
        or buffer.device != device
        or not buffer.is_contiguous()
    ):
        raise ValueError(
            f"{name}: {brief(buffer)}{'' if buffer.is_contiguous() else ', not contiguous'}; "
            f"expected {dtype} {list(shape)} on {_place(device)}, contiguous."
        )


def _place(device: torch.device) -> str:
    if device.type == "cpu":
        return "the CPU"
    return f"a {device.type} device" if device.index is None else str(device)


def check_labels(labels: Tensor, n: int, device: torch.device, place: str | None = None) -> None:
    """Refuses labels that are not int64 [n] on a device, which messages call ``place``."""
    if labels.dtype != torch.int64 or labels.shape != (n,) or labels.device != device:
        raise ValueError(f"labels: {brief(labels)}, expected int64 [{n}] on {place or device}.")


def check_values(labels: Tensor, num_classes: int) -> None:
    """Refuses labels out of 0..K-1; on another device than the CPU it is the device that does."""
    if labels.device.type != "cpu":  # reading the values here would wait for it
        torch._assert_async(((labels >= 0) & (labels < num_classes)).all())
    elif labels.numel() and not (int(labels.min()) >= 0 and int(labels.max()) < num_classes):
        refuse_values(labels, num_classes)


def refuse_values(labels: Tensor, num_classes: int) -> NoReturn:
    raise ValueError(
        f"labels: values from {int(labels.min())} to {int(labels.max())}, "
        f"expected 0..{num_classes - 1} (num_classes={num_classes})."
    )


def check_apart(outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> None:
    """Refuses an output that shares memory with another output or an input."""
    if not outputs:
        return
    spans = {name: _span(tensor) for name, tensor in {**outputs, **inputs}.items()}
    names = list(outputs)
    for i, name in enumerate(names):
        begin, end = spans[name]
        for other in (*names[:i], *inputs):
            low, high = spans[other]
            if begin < high and low < end:
                raise ValueError(f"{name}: shares memory with {other}; pass a buffer of its own.")


def _span(tensor: Tensor) -> tuple[int, int]:
    """First byte, and one past the last byte, that a tensor's elements lie in."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


def check_sums(
    features: Sequence[Tensor],
    widths: Sequence[int],
    labels: Tensor,
    valid: Tensor,
    limits: Tensor,
    bound: Bound,
    sums: Tensor,
    shared: Tensor | None,
    shared_taps: int,
) -> None:
    """Refuses arguments of `Core.bounded_sums` that do not fit features of ``widths`` columns."""
    n, device = features[0].shape[0], features[0].device
    if not 0 <= shared_taps <= len(widths):
        raise ValueError(f"shared_taps={shared_taps!r}: expected 0..{len(widths)}.")
    if (shared is None) != (shared_taps == 0):
        raise ValueError(
            f"shared: {brief(shared)} with shared_taps={shared_taps}; give both or neither."
        )
    moments = len(bound.moments)
    own = moments * sum(widths[shared_taps:])
    check_buffer("labels", labels, (n,), device, torch.int64)
    check_buffer("valid", valid, (n,), device, torch.bool)
    check_buffer("limits", limits, (n,), device, torch.int64)
    check_buffer("sums", sums, (sums.shape[0] if sums.ndim else 1, own), device, torch.int64)
    outputs = {"sums": sums}
    if shared is not None:
        of_shared = moments * sum(widths[:shared_taps])
        check_buffer("shared", shared, (1, of_shared), device, torch.int64)
        outputs["shared"] = shared
    inputs = {f"features[{i}]": tap for i, tap in enumerate(features)}
    check_apart(outputs, inputs | {"labels": labels, "valid": valid, "limits": limits})


def check_estimate(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    state: Mapping[str, Tensor],
    device: torch.device,
) -> None:
    """Refuses arguments of `Core.estimate` that a core could not take by their addresses."""
    _check_step({"means": means, "counts": counts, "target": target}, state, means.shape, device)


def check_match(
    target: Tensor, state: Mapping[str, Tensor], shape: Sequence[int], device: torch.device
) -> None:
    """Refuses a target and state of `Core.match` for means of a shape [M, K, D]."""
    _check_step({"target": target}, state, shape, device)


def _check_step(
    inputs: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    shape: Sequence[int],
    device: torch.device,
) -> None:
    for name, buffer in (*inputs.items(), *state.items()):
        check_buffer(name, buffer, shape[1:2] if name in ("counts", "steps") else shape, device)
    check_apart(state, inputs)
