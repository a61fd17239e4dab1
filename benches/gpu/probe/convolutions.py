"""Every convolution of a step: cuDNN's own choice, the fastest it finds, and the flipped one."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benches.gpu.measure import Call
from benches.gpu.probe.rungs import Rungs
from benches.gpu.probe.sizes import Size, Sizes

FORWARD, BY_INPUT, BY_WEIGHT = "forward", "backward by input", "backward by weight"
FLIPPED = "backward by input, flipped"
OPERATION = "convolution"


class Convolution(NamedTuple):
    """A 3x3 convolution, or the transposed 4x4 one with stride 2 of `UpsampledConv`."""

    batch: int
    inputs: int
    outputs: int
    side: int  # of the input
    transposed: bool
    dtype: torch.dtype
    trained: bool  # the generator's: its weight has a gradient

    @property
    def shape(self) -> str:
        kind = "upsampled " if self.transposed else ""
        name = "generator" if self.trained else "encoder"
        return f"{name}, {kind}{self.inputs} to {self.outputs}, {self.side} px, n={self.batch}"

    @property
    def flops(self) -> int:
        side, taps = (2 * self.side, 4) if self.transposed else (self.side, 9)
        return 2 * self.batch * self.inputs * self.outputs * side**2 * taps


def convolutions(rungs: Rungs) -> None:
    """Whether cuDNN's search pays, and the flipped convolution in the encoder's backward (6)."""
    half = torch.float32 if rungs.device.dry else torch.bfloat16
    for size in rungs.sizes.deep:
        found = dict.fromkeys(shapes(size, rungs.sizes, half))
        for shape in sorted(found, key=lambda c: -c.flops):  # what takes the most comes first
            if not rungs.budget.fits(f"the smaller convolutions of {size[0]} px"):
                break
            _time(rungs, shape)


def shapes(size: Size, sizes: Sizes, half: torch.dtype) -> Iterator[Convolution]:
    """Of VGG19 and of the paper's generator, in half precision."""
    pixels, batch = size
    channels = 3
    for block, outputs in enumerate(sizes.blocks):
        for inputs in (channels, outputs):  # of a block all but the first have one shape
            yield Convolution(batch, inputs, outputs, pixels >> block, False, half, False)
        channels = outputs
    doublings = pixels.bit_length() - 3
    widths = [sizes.scale.width * min(8, 1 << i) for i in range(doublings, -1, -1)]
    for i, (a, b) in enumerate(pairwise(widths)):
        yield Convolution(batch, a, b, 4 << i, True, half, True)
        yield Convolution(batch, b, b, 8 << i, False, half, True)


def _time(rungs: Rungs, shape: Convolution) -> None:
    directions = [FORWARD, BY_INPUT, BY_WEIGHT if shape.trained else FLIPPED]
    dtype = str(shape.dtype).removeprefix("torch.")
    for searched in (False, True):
        variants = {
            f"{direction}{', searched' * searched}": partial(
                _call, shape, direction, rungs.device.device
            )
            for direction in directions
        }
        given = OPERATION, shape.shape, dtype, variants
        rungs(*given, searched=searched, flops=shape.flops, theirs=True)


def _call(shape: Convolution, direction: str, device: torch.device) -> Call:
    n, i, o, s, up = shape[:5]
    kernel, stride, out = (4, 2, 2 * s) if up else (3, 1, s)

    def random(*sizes: int) -> Tensor:
        found = torch.randn(sizes, device=device, dtype=shape.dtype)
        return found.contiguous(memory_format=torch.channels_last)

    x, grad = random(n, i, s, s), random(n, o, out, out)
    weight = random(*((i, o) if up else (o, i)), kernel, kernel)
    options = [stride, stride], [1, 1], [1, 1], up, [0, 0], 1
    if direction == FORWARD:
        return lambda: torch.convolution(x, weight, None, *options)
    if direction == FLIPPED:
        flipped = weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        return lambda: F.conv2d(grad, flipped, padding=1)
    wanted = [direction == BY_INPUT, direction == BY_WEIGHT, False]
    backward = torch.ops.aten.convolution_backward
    return lambda: backward(grad, x, weight, None, *options, wanted)
