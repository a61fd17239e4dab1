"""Feature maps that look like an encoder's: half sparse, channels-last, sizes of real taps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

# (channels, side) of every tap at 32 px.
TAPS = {
    "squeezenet1.1": [(64, 15), *[(128, 7)] * 2, *[(256, 3)] * 2, *[(384, 1)] * 2, *[(512, 1)] * 2],
    "vgg19": [*[(64, 32)] * 2, *[(128, 16)] * 2, *[(256, 8)] * 4, *[(512, 4)] * 4, *[(512, 2)] * 4],
}


def make_features(name: str, n: int) -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [
        torch.randn(n, c, side, side, generator=rng)
        .relu_()
        .contiguous(memory_format=torch.channels_last)
        for c, side in TAPS[name]
    ]


@pytest.fixture(params=["squeezenet1.1", "vgg19"])
def encoder_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)
