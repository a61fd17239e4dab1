"""Layers of a frozen network: for backward they keep what the gradient of their input needs.

torch's own keep more: a convolution its input, though only the gradient of a weight would read it;
a max pooling one int64 index for every output. Where the input is a tap, or a ReLU's output, it is
alive anyway; behind a pooling or a padding it is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dpmmd._choices import CHOICES, has_kernels
from dpmmd._contract.capturing import hold

_Pair = tuple[int, int]


class Rectify(Protocol):
    """Does the work of a ReLU: min(max(pre + bias, 0), ceiling).

    ``pre`` may be overwritten; a bias or ceiling of None is none. ``adds_bias`` says whether it
    wants the bias of the layer before for itself.
    """

    adds_bias: bool

    def __call__(self, pre: Tensor, bias: Tensor | None, ceiling: float | None) -> Tensor: ...


class Convolution(nn.Conv2d):
    """A convolution built from its weight [out, in / groups, k, k] and bias [out].

    As long as both are frozen its backward keeps the weight and the size of the input.
    """

    _flipped: _Flipped | None = None

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
    ) -> None:
        out_channels, in_channels, kernel = weight.shape[:3]
        with torch.device("meta"):  # no memory, no random numbers
            super().__init__(
                in_channels * groups, out_channels, kernel, stride, padding, groups=groups
            )
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.convolve(x, self.bias)

    def unbiased(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """The output without its bias, and the bias."""
        return self.convolve(x, None), self.bias

    def convolve(self, x: Tensor, bias: Tensor | None, padding: _Pair | None = None) -> Tensor:
        """With this bias, and zero padding (rows, columns) where it is not the layer's own."""
        stride, weight = cast(_Pair, self.stride), self.weight
        padding = cast(_Pair, self.padding) if padding is None else padding
        if weight.requires_grad or (bias is not None and bias.requires_grad):
            return F.conv2d(x, weight, bias, stride, padding, 1, self.groups)
        layer = self if CHOICES.flipped_convolutions and self._may_flip(stride, padding) else None
        return _FrozenConvolution.apply(x, weight, bias, stride, padding, self.groups, layer)

    def _may_flip(self, stride: _Pair, padding: _Pair) -> bool:
        """Whether the gradient of the input is a convolution, which pads by k - 1 - padding."""
        return (
            stride == (1, 1)
            and self.groups == 1
            and all(p < k for p, k in zip(padding, self.weight.shape[2:], strict=True))
            and not torch.compiler.is_compiling()
        )

    def flipped(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight flipped, [in, out, k, k] in a dtype; made again if it is another or changed.

        Where a CUDA graph is being captured a new one is not kept: it lies in the graph's memory.
        One that is kept lives as long as the graphs that read it.
        """
        weight = weight.detach()
        key = weight.data_ptr(), weight._version, weight.device, dtype
        if self._flipped is None or self._flipped.key != key:
            turned = weight.flip(2, 3).transpose(0, 1).to(dtype)
            turned = turned.contiguous(memory_format=torch.channels_last)
            if weight.is_cuda and torch.cuda.is_current_stream_capturing():
                return turned
            self._flipped = _Flipped(key, weight, turned)
        return hold(self._flipped.turned)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Convolution:
        self._flipped = None  # of a weight that is about to move or to change its dtype
        return super()._apply(fn, recurse)


class _Flipped(NamedTuple):
    """A flipped weight and what it was made of, which keeps its address from being given away."""

    key: tuple[int, int, torch.device, torch.dtype]
    weight: Tensor
    turned: Tensor


class _FrozenConvolution(torch.autograd.Function):
    """y = x * w + b for constant w, b: dx is the transposed convolution of dy, which needs no x.

    Of a layer that is given, a convolution of dy with its flipped weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: _Pair,
        padding: _Pair,
        groups: int,
        layer: Convolution | None,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.layer = layer if x.device.type in CHOICES.flipped_convolutions else None
        ctx.size, ctx.stride, ctx.padding, ctx.groups = x.shape[2:], stride, padding, groups
        return F.conv2d(x, weight, bias, stride, padding, 1, groups)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        nothing = (None,) * 6
        if ctx.layer is not None:
            padding = [k - 1 - p for k, p in zip(weight.shape[2:], ctx.padding, strict=True)]
            return F.conv2d(grad, ctx.layer.flipped(weight, grad.dtype), None, 1, padding), *nothing
        rest = [  # rows and columns at the end that no step of the kernel reached
            size - ((steps - 1) * stride - 2 * padding + kernel)
            for size, steps, stride, padding, kernel in zip(
                ctx.size, grad.shape[2:], ctx.stride, ctx.padding, weight.shape[2:], strict=True
            )
        ]
        # Under autocast the gradient has another dtype than the weight.
        dx = F.conv_transpose2d(
            grad, weight.to(grad.dtype), None, ctx.stride, ctx.padding, rest, ctx.groups
        )
        return dx, *nothing


class Rectified(nn.Module):
    """A stage that ends in a ReLU: min(max(body(x), 0), ceiling); it overwrites the body's output.

    Another function may do the ReLU's work (`Rectify`), for ``pre`` the body's output without the
    bias [C] that is still to be added. A body has its bias left to it where its last module has a
    method ``unbiased(x)`` that returns the two, as `Convolution` has.
    """

    def __init__(self, body: nn.Module, ceiling: float | None = None) -> None:
        super().__init__()
        self.body, self.ceiling = body, ceiling

    def forward(self, x: Tensor, rectify: Rectify | None = None) -> Tensor:
        if rectify is not None and rectify.adds_bias:
            return rectify(*_unbiased(self.body, x), self.ceiling)
        if rectify is not None:
            return rectify(self.body(x), None, self.ceiling)
        y = self.body(x)
        return y.relu_() if self.ceiling is None else F.hardtanh(y, 0.0, self.ceiling)


def _unbiased(body: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
    if isinstance(body, nn.Sequential) and len(body):
        for module in list(body)[:-1]:
            x = module(x)
        return _unbiased(body[-1], x)
    if hasattr(body, "unbiased"):
        return cast(Any, body).unbiased(x)
    return body(x), None


class MaxPool(nn.MaxPool2d):
    """Max pooling k x k that keeps no indices: it finds its maxima again in backward.

    Where Triton's kernels are taken it keeps a byte for each of them.
    """

    def __init__(self, kernel_size: int, stride: int, padding: int = 0) -> None:
        super().__init__(kernel_size, stride, padding)
        self.window = kernel_size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        needed = x.requires_grad and torch.is_grad_enabled()
        if CHOICES.byte_pools and needed and has_kernels(x) and _fits_bytes(x, *self.window):
            return _BytePool.apply(x, *self.window)
        return _MaxPool.apply(x, *self.window)


def _fits_bytes(x: Tensor, kernel: int, stride: int, padding: int) -> bool:
    """Whether windows have less than 256 places, and fit into the map, which PyTorch checks."""
    return kernel <= 15 and 2 * padding <= kernel <= min(x.shape[2:]) + 2 * padding and stride > 0


class _BytePool(torch.autograd.Function):
    """Saved for backward: a byte for each maximum, its place in its window."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
        from dpmmd.kernels import pooling

        x = x.contiguous(memory_format=torch.channels_last)
        pooled, places = pooling.max_pool(x, kernel, stride, padding)
        ctx.save_for_backward(places)
        ctx.options = x.shape, kernel, stride, padding
        return pooled

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from dpmmd.kernels import pooling

        (places,) = ctx.saved_tensors
        grad = grad.contiguous(memory_format=torch.channels_last)
        return pooling.max_pool_gradient(grad, places, *ctx.options), None, None, None


class _MaxPool(torch.autograd.Function):
    """Saved for backward: the input, which in an encoder is the output of a ReLU, alive anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: int, stride: int, padding: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.options = kernel, stride, padding
        return F.max_pool2d(x, kernel, stride, padding)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        kernel, stride, padding = ([size, size] for size in ctx.options)
        with torch.no_grad():
            _, indices = torch.ops.aten.max_pool2d_with_indices(x, kernel, stride, padding)
        dx = torch.ops.aten.max_pool2d_with_indices_backward(
            grad, x.detach(), kernel, stride, padding, [1, 1], False, indices
        )
        return dx, None, None, None
