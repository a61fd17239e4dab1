"""In which ways a training step can be done: a table of choices, and contexts that make them.

Of each choice the first option is what the package does, but for cuDNN's search: that takes
seconds, so that `dpmmd.train` alone makes it, before it captures a step. What the package can do
otherwise is switched on in it (`dpmmd._choices`); what it cannot do stands here, and takes the
place of a method of the package's while a step runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benches.gpu.measure import Call
from dpmmd._choices import CHOICES as SWITCHES
from dpmmd.encoders.layers import Convolution, Rectified
from dpmmd.generators.layers import UpsampledConv

How = Mapping[str, str]  # a choice -> the option that is taken
Context = Callable[[], AbstractContextManager[object]]

OURS = "as it is"
PRECISION, OPTIMIZER, ALGORITHMS = "generator", "Adam", "algorithms"
HALF, FOREACH, SEARCHED = "bfloat16", "foreach", "searched"

# UpsampledConv ------------------------------------------------------------------------------------


def by_einsum(self: UpsampledConv, x: Tensor) -> Tensor:
    """The kernel of the transposed convolution as products with a matrix of zeros and ones."""
    spread = [[0.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    matrix = _constant(spread, self.weight)
    kernel = torch.einsum("ku,oiuv,lv->iokl", matrix, self.weight, matrix)
    return F.conv_transpose2d(x, kernel, stride=2, padding=1)


def by_upsampling(self: UpsampledConv, x: Tensor) -> Tensor:
    """What it stands for: 9/4 of the products, in a convolution that libraries are tuned for."""
    return F.conv2d(F.interpolate(x, scale_factor=2), self.weight, padding=1)


def by_shuffling(self: UpsampledConv, x: Tensor) -> Tensor:
    """A 3x3 convolution to four phases of the output, each with zeros in its kernel."""
    kernel = self.weight
    for axis, place in ((-2, 2), (-1, 3)):
        a, b, c = kernel.unbind(axis)
        zero = torch.zeros_like(a)
        phases = torch.stack((a, b + c, zero), axis), torch.stack((zero, a + b, c), axis)
        kernel = torch.stack(phases, place)  # [out, in, 2, 2, 3, 3] in the end
    outputs, inputs = self.weight.shape[:2]
    kernel = kernel.permute(0, 2, 3, 1, 4, 5).reshape(4 * outputs, inputs, 3, 3)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    return F.pixel_shuffle(F.conv2d(x, kernel, padding=1), 2)


_constants: dict[tuple[torch.device, torch.dtype], Tensor] = {}


def _constant(values: list[list[float]], like: Tensor) -> Tensor:
    """On the device once: a graph cannot hold a copy from the host."""
    key = like.device, like.dtype
    if key not in _constants:
        _constants[key] = torch.tensor(values, device=like.device, dtype=like.dtype)
    return _constants[key]


# Convolution with bias and ReLU -------------------------------------------------------------------


class _ConvolutionRelu(torch.autograd.Function):
    """cuDNN's convolution + bias + ReLU in one kernel, for frozen weights."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Convolution) -> Tensor:
        options: Any = layer.stride, layer.padding, layer.dilation, layer.groups
        y = torch.cudnn_convolution_relu(x, layer.weight, layer.bias, *options)
        ctx.save_for_backward(y)
        ctx.layer = layer
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (y,), layer = ctx.saved_tensors, ctx.layer
        grad = torch.ops.aten.threshold_backward(grad, y, 0)
        options = layer.stride, layer.padding, 0, layer.groups
        return F.conv_transpose2d(grad, layer.weight, None, *options), None


def _with_convolution(self: Rectified, x: Tensor, rectify: Any = None) -> Tensor:
    parts = list(self.body) if isinstance(self.body, nn.Sequential) else [self.body]
    plain = isinstance(parts[-1], Convolution) and self.ceiling is None and rectify is None
    if not (plain and x.is_cuda):
        return _RECTIFIED(self, x, rectify)
    for part in parts[:-1]:
        x = part(x)
    return _ConvolutionRelu.apply(x, parts[-1])


_RECTIFIED = Rectified.forward

# The table ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block owner.name is value."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _upsampled(forward: Callable[[UpsampledConv, Tensor], Tensor]) -> Context:
    return partial(patched, UpsampledConv, "forward", forward)


def _switched(name: str, value: Any) -> Context:
    return partial(patched, SWITCHES, name, value)


# A choice -> its options -> the context of a step. What else an option does, `step` knows.
CHOICES: dict[str, dict[str, Context]] = {
    PRECISION: {
        OURS: nullcontext,
        "float32": nullcontext,
        "tf32": nullcontext,
        HALF: nullcontext,
    },
    OPTIMIZER: {OURS: nullcontext, FOREACH: nullcontext},
    "upsampled convolution": {
        OURS: nullcontext,
        "einsum": _upsampled(by_einsum),
        "upsample + 3x3": _upsampled(by_upsampling),
        "3x3 + pixel shuffle": _upsampled(by_shuffling),
    },
    "batch norm + ReLU": {OURS: nullcontext, "fused": _switched("fused_norms", True)},
    "add + upsample": {OURS: nullcontext, "fused": _switched("fused_upsampling", True)},
    "max pool": {OURS: nullcontext, "bytes": _switched("byte_pools", True)},
    "encoder's backward": {
        OURS: nullcontext,
        "flipped": _switched("flipped_convolutions", frozenset({"cuda"})),
    },
    "encoder's ReLU": {
        OURS: nullcontext,
        "with the convolution": partial(patched, Rectified, "forward", _with_convolution),
    },
    ALGORITHMS: {OURS: nullcontext, SEARCHED: nullcontext},
}
# Options that are not the package's: if one fails, that is no error of ours.
_TRIALS = ("upsampled convolution", "encoder's ReLU", ALGORITHMS)
# Chosen first, since it decides what the others are worth; chosen last, since it takes long.
FIRST, LAST = PRECISION, ALGORITHMS


def is_trial(how: How) -> bool:
    return any(how.get(choice, OURS) != OURS for choice in _TRIALS)


def described(how: How) -> str:
    """The options that are not the package's own."""
    options = [f"{choice} {option}" for choice, option in how.items() if option != OURS]
    return ", ".join(options) or OURS


def within(how: How, call: Call) -> Call:
    """The call, in the contexts of its options."""
    contexts = [CHOICES[choice][option] for choice, option in how.items()]
    contexts = [context for context in contexts if context is not nullcontext]

    def run() -> Any:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return call()

    return run
