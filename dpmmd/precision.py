"""In which precision numbers are computed: what a device can do, and PyTorch's switches for it.

A generator trains in one of three, with float32 weights in each:

- ``"float32"``: IEEE's, on a GPU too;
- ``"tf32"``: float32 whose convolutions and products a GPU's matrix units may compute, which round
  factors to 11 bits. On a CPU it is float32 to the bit;
- ``"bfloat16"``: autocast. Convolutions and products round their factors to 8 bits, and what lies
  between them is bfloat16 as well; batch norm's statistics and the weights stay float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

_LEAST_CAPABILITY = (8, 0)  # of a CUDA device that has bfloat16


def of_generator(wanted: str | None, device: torch.device) -> str:
    """The precision in which a generator trains on a device.

    Args:
        wanted: "float32", "tf32" or "bfloat16"; None: "tf32" on a CUDA device, "float32" elsewhere.
        device: where it trains.

    Raises:
        ValueError: the device has no bfloat16.
    """
    if wanted != "bfloat16":
        return wanted or ("tf32" if device.type == "cuda" else "float32")
    why = bfloat16_hindrance(device)
    if why is not None:
        raise ValueError(
            f"train.precision='bfloat16': {why}; expected 'float32' or 'tf32' on {device}. Leave "
            "the key out, or train on another device (--device)."
        )
    return wanted


def bfloat16_hindrance(device: torch.device) -> str | None:
    """Why a device cannot compute in bfloat16; None if it can."""
    if device.type == "cpu" and not _cpu_has_bfloat16():
        return "this CPU has no usable bfloat16 (AVX-512, or ARM with bf16)"
    if device.type == "cuda":
        found = torch.cuda.get_device_capability(device)
        if found < _LEAST_CAPABILITY:
            return (
                f"{torch.cuda.get_device_name(device)} is of compute capability "
                f"{'.'.join(map(str, found))}, and bfloat16 needs "
                f"{'.'.join(map(str, _LEAST_CAPABILITY))}"
            )
    return None


def _cpu_has_bfloat16() -> bool:
    """What torch asks before it gives a bfloat16 convolution to oneDNN; otherwise it loops."""
    return torch.backends.mkldnn.is_available() and bool(
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def generated(
    generator: nn.Module, z: Tensor, y: Tensor | None, precision: str, device: torch.device
) -> Tensor:
    """A generator's images, of a forward pass in a precision; never of less than float32.

    Its backward pass belongs into `products`, for convolutions ask for the switch there again.

    Args:
        generator, z, y: called as ``generator(z, y)``.
        precision: "float32", "tf32" or "bfloat16".
        device: of the generator.
    """
    if precision != "bfloat16":
        with products(precision, device):
            images: Tensor = generator(z, y)
        return images
    # A cache of cast weights would outlive the forward pass of a step that is being captured.
    half = torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    with products(precision, device), half:
        images = generator(z, y)
    return images.float() if images.dtype == torch.bfloat16 else images


@contextlib.contextmanager
def products(precision: str, device: torch.device) -> Iterator[None]:
    """Within the block a device's products of float32 numbers are those of a precision."""
    if device.type != "cuda":
        yield
        return
    with float32_products("ieee" if precision == "float32" else "tf32"):
        yield


@contextlib.contextmanager
def float32_products(how: str) -> Iterator[None]:
    """Within the block products of float32 numbers on CUDA are "ieee" or may be "tf32"."""
    switches, before = _switches(), switched()
    turned = how == "tf32" and _older_switch_is_off()
    try:
        if turned:
            torch.backends.cuda.matmul.allow_tf32 = True
        for where, name in switches:
            setattr(where, name, how if name == "fp32_precision" else how == "tf32")
        yield
    finally:
        if turned:
            torch.backends.cuda.matmul.allow_tf32 = False
        for (where, name), value in zip(switches, before, strict=True):
            setattr(where, name, value)


def switched() -> tuple[Any, ...]:
    """How PyTorch's switches for such products are."""
    return tuple([getattr(where, name) for where, name in _switches()])


def _switches() -> list[tuple[Any, str]]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):  # PyTorch 2.9 and newer
        return [(cudnn.conv, "fp32_precision"), (matmul, "fp32_precision")]
    return [(cudnn, "allow_tf32"), (matmul, "allow_tf32")]


def _older_switch_is_off() -> bool:
    """Whether that is off which PyTorch from 2.9 on keeps beside the switch of matrix products.

    torch.compile of 2.9 and 2.10 asks it, and fails where it is off and the other one on. These two
    also warn, once a process, of who asks.
    """
    matmul = torch.backends.cuda.matmul
    if not hasattr(torch.backends.cudnn, "conv"):
        return False
    try:
        return not matmul.allow_tf32
    except RuntimeError:  # they do not agree
        return bool(matmul.fp32_precision == "tf32")


def told(encoder: str, generator: str, device: torch.device, *, released: bool) -> str:
    """One line that says in which precision a run computes.

    Args:
        encoder: its `dpmmd.encoders.Encoder.precision`.
        generator: as `of_generator` returns it.
        device: of both.
        released: whether the release exists. It has fixed the encoder's precision, and another
            release would cost privacy again; the line then suggests no other precision.
    """
    slow = encoder == "float32" and device.type == "cuda"
    kind = " (IEEE)" if slow else ""
    hint = ""
    if slow and not released:
        hint = '; encoder.precision = "tf32" lets it use the matrix units'
    return f"precision: encoder {encoder}{kind}, generator {generator}{hint}"
