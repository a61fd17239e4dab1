"""The classifiers that are convolutional networks, on any device: a small one and WRN-28-10."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dpmmd.evaluate.classical import Predictor

CNN_EPOCHS = 5
WRN_EPOCHS = 50


class SmallCNN(nn.Module):
    """Two convolutions with max pooling, a hidden layer of 128; images [n, C, H, W] to [n, K]."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 16, 128)
        self.out = nn.Linear(128, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        h = F.max_pool2d(F.relu(self.conv1(x)), 2)
        h = F.adaptive_max_pool2d(F.relu(self.conv2(h)), 4).flatten(1)
        return self.out(F.dropout(F.relu(self.hidden(h)), 0.3, self.training))


class WideResNet(nn.Module):
    """WRN-depth-width (Zagoruyko, Komodakis 2016): images [n, C, H, W] to logits [n, K].

    Args:
        channels: C.
        num_classes: K.
        depth: 6 n + 4, with n blocks in each of the three stages.
        width: factor on the 16, 32 and 64 channels of the stages.
        dropout: between the two convolutions of a block.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        depth: int = 28,
        width: int = 10,
        dropout: float = 0.3,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        blocks, inputs = [], 16
        for stage in range(3):
            for i in range((depth - 4) // 6):
                stride = 2 if stage and not i else 1
                blocks.append(_WideBlock(inputs, 16 * width << stage, stride, dropout))
                inputs = 16 * width << stage
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(inputs)
        self.out = nn.Linear(inputs, num_classes)
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm(self.blocks(self.stem(x))))
        return self.out(h.mean(dim=(2, 3)))


class _WideBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = inputs == outputs and stride == 1
        self.skip = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        skip = x if self.skip is None else self.skip(h)
        return skip + self.conv2(self.dropout(F.relu(self.norm2(self.conv1(h)))))


def _cnn(images: NDArray[Any], labels: NDArray[np.int64], seed: int, where: str) -> Predictor:
    def optimiser(model: nn.Module, steps: int) -> tuple[Any, Any]:
        adam = torch.optim.Adam(model.parameters(), lr=2e-3)
        return adam, torch.optim.lr_scheduler.OneCycleLR(adam, 2e-3, total_steps=steps)

    return _fit(SmallCNN, optimiser, CNN_EPOCHS, images, labels, seed, where)


def _wrn28_10(images: NDArray[Any], labels: NDArray[np.int64], seed: int, where: str) -> Predictor:
    """WRN-28-10 with dropout 0.3; SGD with Nesterov momentum, 0.1 to 0 by a cosine, 50 epochs.

    The last epoch's weights: no test image chooses among epochs.
    """

    def optimiser(model: nn.Module, steps: int) -> tuple[Any, Any]:
        sgd = torch.optim.SGD(
            model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        return sgd, torch.optim.lr_scheduler.CosineAnnealingLR(sgd, steps)

    return _fit(WideResNet, optimiser, WRN_EPOCHS, images, labels, seed, where)


def _fit(
    build: Callable[[int, int], nn.Module],
    optimiser: Callable[[nn.Module, int], tuple[Any, Any]],
    epochs: int,
    images: NDArray[Any],
    labels: NDArray[np.int64],
    seed: int,
    where: str,
    batch: int = 128,
) -> Predictor:
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    device = torch.device(where)
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else None):
        torch.manual_seed(seed)
        model = build(x.shape[1], int(y.max()) + 1).to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer, schedule = optimiser(model, epochs * -(-len(x) // batch))
        model.train()
        for _ in range(epochs):
            for part in torch.randperm(len(x)).split(batch):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(model(_as_input(x[part], device)), y[part].to(device)).backward()
                optimizer.step()
                schedule.step()
    model.eval()

    @torch.no_grad()
    def predict(test: NDArray[Any]) -> NDArray[np.int64]:
        parts = torch.from_numpy(test).split(1000)
        return torch.cat([model(_as_input(p, device)).argmax(dim=1).cpu() for p in parts]).numpy()

    return predict


def _as_input(images: Tensor, device: torch.device) -> Tensor:
    return images.to(device).float().div_(255).contiguous(memory_format=torch.channels_last)


NETWORKS: dict[str, Callable[[NDArray[Any], NDArray[np.int64], int, str], Predictor]] = {
    "cnn": _cnn,
    "wrn28_10": _wrn28_10,
}
