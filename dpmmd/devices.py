"""Which device a module is on, and which one a name means."""

from __future__ import annotations

import torch
from torch import nn


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters; the CPU where it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))
