"""EfficientNet-Lite0 with ImageNet weights: 18 taps, of which the stem and the head end in a ReLU6
and the 16 blocks in a linear bottleneck, which is signed.

Tan and Le, "EfficientNet", arXiv 1905.11946; the Lite variants drop squeeze-and-excitation and
use ReLU6. The weights are a port of the TensorFlow model, hence its 'SAME' padding, its batch norm
eps and its pixel scale (255 x - 127) / 128. Batch norm is folded into the convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor, nn

from dpmmd.encoders.base import StagedBackbone, fold_batch_norm
from dpmmd.encoders.layers import Convolution, Rectified
from dpmmd.encoders.weights import EFFICIENTNET_LITE0, StrPath, load_state_dict

_MEAN = (127 / 255, 127 / 255, 127 / 255)
_STD = (128 / 255, 128 / 255, 128 / 255)
_EPS = 1e-3

# Per group of blocks: how many, stride of the first, whether they expand their channels.
_GROUPS = (
    (1, 1, False),
    (2, 2, True),
    (2, 2, True),
    (3, 2, True),
    (3, 1, True),
    (4, 2, True),
    (1, 1, True),
)
_STRIDES = tuple(
    (stride if i == 0 else 1, expands) for count, stride, expands in _GROUPS for i in range(count)
)

SIGNS = {
    "stem": "nonnegative",
    **{f"block{i}": "signed" for i in range(len(_STRIDES))},
    "head": "nonnegative",
}


class SameConvolution(Convolution):
    """A convolution with TensorFlow's 'SAME' padding: ceil(n / stride) outputs per side."""

    def convolve(
        self, x: Tensor, bias: Tensor | None, padding: tuple[int, int] | None = None
    ) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        rows, columns = (
            max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in x.shape[-2:]
        )
        if rows % 2 or columns % 2:  # uneven: more at the end
            x = F.pad(x, (columns // 2, -(-columns // 2), rows // 2, -(-rows // 2)))
            rows = columns = 0
        return super().convolve(x, bias, padding or (rows // 2, columns // 2))


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project: with a skip where input and output agree in shape."""

    def __init__(self, expand: nn.Module | None, depthwise: nn.Conv2d, project: nn.Conv2d) -> None:
        super().__init__()
        self.expand = expand
        self.depthwise = depthwise
        self.project = project
        self.skip_channels = project.out_channels if depthwise.stride[0] == 1 else None

    def forward(self, x: Tensor) -> Tensor:
        y = x if self.expand is None else F.relu6(self.expand(x))
        y = self.project(F.relu6(self.depthwise(y)))
        return x + y if x.shape[1] == self.skip_channels else y


def build(path: StrPath | None = None) -> tuple[StagedBackbone, str]:
    """The backbone and the sha256 of its weights."""
    found = EFFICIENTNET_LITE0.find(path)
    with found.open("rb") as file:
        EFFICIENTNET_LITE0.verify(file)
    state, digest = load_state_dict(found)

    def convolution(conv: str, norm: str, *, stride: int = 1, groups: int = 1) -> SameConvolution:
        weight, bias = fold_batch_norm(state[f"{conv}.weight"], _under(state, norm), eps=_EPS)
        return SameConvolution(weight, bias, stride=stride, groups=groups)

    def block(prefix: str, stride: int, expands: bool) -> InvertedResidual:
        channels = state[f"{prefix}._depthwise_conv.weight"].shape[0]
        return InvertedResidual(
            convolution(f"{prefix}._expand_conv", f"{prefix}._bn0") if expands else None,
            convolution(
                f"{prefix}._depthwise_conv", f"{prefix}._bn1", stride=stride, groups=channels
            ),
            convolution(f"{prefix}._project_conv", f"{prefix}._bn2"),
        )

    stages: dict[str, nn.Module] = {
        "stem": Rectified(convolution("_conv_stem", "_bn0", stride=2), ceiling=6.0)
    }
    for i, (stride, expands) in enumerate(_STRIDES):
        stages[f"block{i}"] = block(f"_blocks.{i}", stride, expands)
    stages["head"] = Rectified(convolution("_conv_head", "_bn1"), ceiling=6.0)
    return StagedBackbone(stages, mean=_MEAN, std=_STD), digest


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(f"{prefix}."): value
        for key, value in state.items()
        if key.startswith(f"{prefix}.")
    }
