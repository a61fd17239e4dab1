"""Which device a module is on, and which one a name means."""

from __future__ import annotations

import torch
from torch import nn

from dpmmd.errors import RunError, first_line


def device_of(module: nn.Module) -> torch.device:
    """The device of a module's parameters; the CPU where it has none."""
    return next((p.device for p in module.parameters()), torch.device("cpu"))


def choose_device(name: str) -> torch.device:
    """``"auto"``: a GPU if PyTorch sees one, else the CPU; any other name as it is.

    Raises:
        RunError: no such device in this machine, or PyTorch was built without it.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device, reason = None, ""
    try:
        device, reason = torch.device(name), "integer sums and float64 run on CPUs and CUDA"
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        device, reason = None, first_line(error)
    if device is None or device.type not in ("cpu", "cuda"):
        raise RunError(
            f"device={name!r}: cannot be used here ({reason}); expected 'auto', 'cpu', 'cuda' or "
            "'cuda:1'. Use 'cpu', or install a PyTorch with CUDA and its driver."
        )
    return device
