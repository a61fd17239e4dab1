"""The one place that imports torchvision, so that it also imports beside a CPU-only torch."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import torch

# Operators whose fake implementations torchvision registers on import whether or not its compiled
# library could be loaded. The library on PyPI is linked against CUDA: beside a CPU-only torch it
# does not load, the operators do not exist, and the import ends in
# "operator torchvision::nms does not exist".
_SCHEMAS = {
    "torchvision::nms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "torchvision::qnms": "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
}


def import_torchvision() -> ModuleType:
    """Import torchvision and return it.

    Models, datasets and transforms work also where torchvision's compiled operators cannot be
    loaded (a CPU-only torch with the torchvision from PyPI); the detection operators, such as
    non-maximum suppression, then raise when called.

    Raises:
        ImportError: torchvision is not installed, or does not match the installed torch.
    """
    try:
        return importlib.import_module("torchvision")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchvision":
            raise ImportError(
                f"torchvision needs the module {error.name!r}, which is not installed; "
                f"try: pip install {error.name}"
            ) from error
        raise ImportError(
            "torchvision is not installed; try: pip install torchvision "
            "(beside a CPU-only torch: pip install --no-deps torchvision pillow)"
        ) from error
    except RuntimeError as error:
        if "torchvision::" not in str(error):
            raise
        # Only after a failed import: a torchvision that loads its own library must define the
        # operators itself, and would fail if they existed already.
        _define_missing_operators()
    for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
        del sys.modules[module]  # half-imported
    try:
        return importlib.import_module("torchvision")
    except (RuntimeError, ImportError) as error:
        raise ImportError(
            f"torchvision cannot be imported beside torch {torch.__version__}: {error}. "
            "Install the torchvision release made for this torch "
            "(table at https://github.com/pytorch/vision#installation)"
        ) from error


def _define_missing_operators() -> None:
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.torchvision, name.partition("::")[2]):
            torch.library.define(name, schema)
