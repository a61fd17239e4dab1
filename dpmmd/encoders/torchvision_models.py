"""VGG and ResNet as torchvision defines them, tapped after their ReLUs.

The paper's encoder is VGG19 with a tap after each of its 16 convolutional ReLUs (Harder et al.,
arXiv 2205.12900). ResNets are tapped after the stem's ReLU and the last ReLU of every block; their
batch norms are folded into the convolutions. Classifiers are left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from dpmmd._torchvision import import_torchvision
from dpmmd.encoders.base import StagedBackbone, fold_batch_norm
from dpmmd.encoders.layers import Convolution, MaxPool, Rectified
from dpmmd.encoders.weights import StrPath, WeightsError, download, existing_file, load_state_dict

_MEAN = (0.485, 0.456, 0.406)
_STD = (0.229, 0.224, 0.225)

# Convolutions per block, with a pooling between blocks.
_VGG = {
    "vgg11": (1, 1, 2, 2, 2),
    "vgg13": (2, 2, 2, 2, 2),
    "vgg16": (2, 2, 3, 3, 3),
    "vgg19": (2, 2, 4, 4, 4),
}
# Blocks per layer.
_RESNET = {
    "resnet18": (2, 2, 2, 2),
    "resnet34": (3, 4, 6, 3),
    "resnet50": (3, 4, 6, 3),
}

SIGNS = {
    **{
        name: {
            f"relu{block}_{i}": "nonnegative"
            for block, count in enumerate(counts, 1)
            for i in range(1, count + 1)
        }
        for name, counts in _VGG.items()
    },
    **{
        name: {
            "relu1": "nonnegative",
            **{
                f"layer{layer}.{i}": "nonnegative"
                for layer, count in enumerate(counts, 1)
                for i in range(count)
            },
        }
        for name, counts in _RESNET.items()
    },
}

_CLASSIFIERS = ("classifier", "fc")

RANDOM = "random"


class Residual(nn.Module):
    """A ResNet block without its last ReLU: convolutions with ReLUs between, the skip added."""

    def __init__(self, convolutions: list[nn.Module], skip: nn.Module) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(convolutions)
        self.skip = skip

    def forward(self, x: Tensor) -> Tensor:
        y = x
        for i, convolution in enumerate(self.convolutions):
            y = convolution(y.relu_() if i else y)
        return y + self.skip(x)


def build(name: str, weights: StrPath | None = None) -> tuple[StagedBackbone, str]:
    """The backbone and what identifies its weights: the file's sha256, or "random".

    Args:
        name: a key of SIGNS.
        weights: None for torchvision's ImageNet weights (IMAGENET1K_V1), from torch's cache or
            fetched; the path of a state dict; or "random", for tests.
    """
    models = import_torchvision().models
    with torch.device("meta"):  # neither memory nor random numbers for what is replaced below
        model = models.get_model(name, weights=None)
    for classifier in _CLASSIFIERS:
        if hasattr(model, classifier):
            setattr(model, classifier, nn.Identity())
    if weights == RANDOM:
        _initialise(model.to_empty(device="cpu"))
        digest = RANDOM
    else:
        digest = _load(model, name, _default_file(models, name) if weights is None else weights)
    model.eval().requires_grad_(False)
    stages = _vgg_stages(name, model) if name in _VGG else _resnet_stages(name, model)
    return StagedBackbone(stages, mean=_MEAN, std=_STD), digest


def _default_file(models: object, name: str) -> Path:
    url = models.get_model_weights(name)["IMAGENET1K_V1"].url  # type: ignore[attr-defined]
    return download(url, sha256_prefix=Path(url).stem.rpartition("-")[2])


def _load(model: nn.Module, name: str, path: StrPath) -> str:
    found = existing_file(path, f"give the path of a state dict of torchvision's {name}")
    state, digest = load_state_dict(found)
    state = {k: v for k, v in state.items() if k.partition(".")[0] not in _CLASSIFIERS}
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        reasons = [line.strip() for line in str(error).splitlines()[1:3]]
        raise WeightsError(
            f"weights={str(path)!r}: not the state dict of torchvision's {name} "
            f"({' '.join(reasons)[:300]})"
        ) from error
    return digest


def _initialise(model: nn.Module) -> None:
    """He initialisation from a fixed seed, batch norms as identities."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight[:, 0].numel()
            nn.init.normal_(module.weight, std=(2 / fan_out) ** 0.5, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()


def _vgg_stages(name: str, model: nn.Module) -> dict[str, nn.Module]:
    stages: dict[str, nn.Module] = {}
    names = iter(SIGNS[name])
    pending: list[nn.Module] = []
    for module in cast(nn.Sequential, model.features):
        if isinstance(module, nn.ReLU):
            stages[next(names)] = Rectified(nn.Sequential(*pending))
            pending = []
        elif isinstance(module, nn.Conv2d):
            pending.append(_frozen(module.weight, cast(Tensor, module.bias), module))
        else:
            pending.append(MaxPool(2, 2))
    return stages


def _resnet_stages(name: str, model: nn.Module) -> dict[str, nn.Module]:
    stages: dict[str, nn.Module] = {
        "relu1": Rectified(_folded(cast(nn.Conv2d, model.conv1), cast(nn.BatchNorm2d, model.bn1)))
    }
    for tap in list(SIGNS[name])[1:]:
        block = _residual(model.get_submodule(tap))
        first = tap == "layer1.0"
        stages[tap] = Rectified(nn.Sequential(MaxPool(3, 2, 1), block) if first else block)
    return stages


def _residual(block: nn.Module) -> Residual:
    pairs: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
    while hasattr(block, f"conv{len(pairs) + 1}"):
        i = len(pairs) + 1
        pairs.append((getattr(block, f"conv{i}"), getattr(block, f"bn{i}")))
    skip = cast("nn.Sequential | None", block.downsample)
    return Residual(
        [_folded(conv, norm) for conv, norm in pairs],
        nn.Identity() if skip is None else _folded(*skip),
    )


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Convolution:
    weight, bias = fold_batch_norm(conv.weight, norm.state_dict(), eps=norm.eps)
    return _frozen(weight, bias, conv)


def _frozen(weight: Tensor, bias: Tensor, conv: nn.Conv2d) -> Convolution:
    """The convolution `conv` with this weight and bias."""
    return Convolution(
        weight, bias, stride=conv.stride[0], padding=cast(int, conv.padding[0]), groups=conv.groups
    )
