"""Which of two ways a layer takes on a device, where both compute the same."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass
class Choices:
    """What measurements on a device decide; nothing is on that no measurement has shown to gain.

    No GPU has measured the kernels against cuDNN's yet, so they are off: ``python -m benches.gpu
    --probe`` turns each on to measure it. They run on CUDA devices where Triton does, and
    elsewhere PyTorch's own operations run whatever is said here.

    Attributes:
        fused_norms: generators' batch norm and ReLU as one operation.
        fused_upsampling: the sum of a map and an upsampled one in one pass.
        byte_pools: encoders' max pooling, which keeps the place of each maximum in a byte.
        flipped_convolutions: types of devices where the input gradient of a frozen convolution is a
            convolution with flipped weights, of which a copy is kept. On a CPU it gains 1 % of a
            pass of SqueezeNet and VGG19 at 32 px, which is not worth the copy.
    """

    fused_norms: bool = False
    fused_upsampling: bool = False
    byte_pools: bool = False
    flipped_convolutions: frozenset[str] = frozenset()


CHOICES = Choices()


def has_kernels(x: Tensor) -> bool:
    """Whether Triton's kernels take a map [n, C, H, W], one that nothing traces."""
    return (
        x.is_cuda
        and x.ndim == 4
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and _runs_triton(x.device)
    )


@cache
def _runs_triton(device: torch.device) -> bool:
    return importlib.util.find_spec("triton") is not None and torch.cuda.get_device_capability(
        device
    ) >= (8, 0)
