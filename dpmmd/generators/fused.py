"""Triton's kernels for the elementwise work of a generator in training, as autograd sees them.

Whether they run is decided in `dpmmd._choices`; `dpmmd.generators.layers` asks it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpmmd._choices import has_kernels


def takes_norm(norm: nn.Module, x: Tensor) -> bool:
    """Whether `NormRelu` does all that norm(x) does: a plain batch norm in training, no hooks."""
    return (
        type(norm) is nn.BatchNorm2d
        and norm.training
        and norm.affine
        and norm.track_running_stats
        and norm.momentum is not None
        and norm.weight.dtype == torch.float32
        and not (norm._forward_hooks or norm._forward_pre_hooks)
        and not (norm._backward_hooks or norm._backward_pre_hooks)
        and has_kernels(x)
        and x.shape[1] == norm.num_features
        and x.numel() > x.shape[1]
    )


def takes_sum(h: Tensor, s: Tensor) -> bool:
    """Whether `AddUpsampled` takes the two: one dtype and device, the second of half the side."""
    n, channels, height, width = s.shape
    return (
        has_kernels(h)
        and (h.dtype, h.device) == (s.dtype, s.device)
        and tuple(h.shape) == (n, channels, 2 * height, 2 * width)
    )


class NormRelu(torch.autograd.Function):
    """relu(norm(x)) of a batch norm in training mode, whose running statistics move."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, norm: nn.BatchNorm2d) -> Tensor:
        from dpmmd.kernels import normalise

        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        assert norm.momentum is not None
        x = x.contiguous(memory_format=torch.channels_last)
        moved = norm.running_mean, norm.running_var, norm.num_batches_tracked
        layer = normalise.Layer(weight, bias, *moved, norm.momentum, norm.eps)
        y, mean, rstd = normalise.norm_relu(x, layer)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from dpmmd.kernels import normalise

        x, *rest = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        return *normalise.norm_relu_backward(x, grad, *rest), None


class AddUpsampled(torch.autograd.Function):
    """h + (s upsampled x 2, nearest)."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, s: Tensor) -> Tensor:
        from dpmmd.kernels import upsampling

        h, s = (t.contiguous(memory_format=torch.channels_last) for t in (h, s))
        return upsampling.add_upsampled(h, s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        from dpmmd.kernels import upsampling

        folded = upsampling.upsampled_gradient(grad.contiguous(memory_format=torch.channels_last))
        return grad, folded
