"""Gradients in memory that the native core keeps between backward passes (csrc/cpu/blocks.h).

Under glibc's default settings a large tensor may be mapped whenever it is allocated. The kernel
then clears its pages as they are first written, which takes as long as computing the gradients. A
tensor from here owns its block alone, so that autograd adds to it in place. When the tensor is
freed, the block waits for the next backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from dpmmd._contract.taps import Taps, empty_gradient
from dpmmd._cores.arguments import TYPES

with suppress(ImportError):  # dpmmd._cores.cpu says so to whoever asks for it
    from dpmmd import _native

LEAST = 1 << 19  # bytes; glibc hands out smaller tensors again without clearing their pages


def empty_gradients(taps: Taps, needed: Sequence[bool]) -> list[Tensor]:
    """As `Taps.empty_gradients`, for a backward pass that begins.

    Storages of blocks cannot grow (`resize_`); in every other way the tensors are as usual.
    """
    _native.begin_pass()
    if taps.n * max(taps.widths) * taps.dtype.itemsize < LEAST:
        return taps.empty_gradients(needed)
    return [
        _empty_gradient(tap) if wanted else tap.new_empty(0)
        for tap, wanted in zip(taps.tensors, needed, strict=True)
    ]


def _empty_gradient(tap: Tensor) -> Tensor:
    # Deterministic algorithms have torch fill what is empty.
    if tap.nbytes >= LEAST and _dense(tap) and not torch.are_deterministic_algorithms_enabled():
        capsule = _native.lend(tap.shape, tap.stride(), TYPES[tap.dtype])
        if capsule is not None:
            return from_dlpack(capsule)
    return empty_gradient(tap)


def _dense(tap: Tensor) -> bool:
    return tap.is_contiguous() or (
        tap.ndim == 4 and tap.is_contiguous(memory_format=torch.channels_last)
    )
