"""Launch parameters by operation, architecture, dtype and size: no autotuning at run time.

Chosen among neighbours by time on an H200 (VGG19's taps, 128 images of 32 and 128 px, 1 and 10
classes). `estimator`, `bounded_sums` and those of layers (`normalise`, `upsampling`, `pooling`,
which no GPU has run yet) are chosen by arithmetic: 64 numbers or fewer a thread, so that
several programs share a multiprocessor and keep some 40 KiB of loads in flight on it (latency times
bandwidth). `tests/core/kernels_aot.py` holds every entry to its register budget.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Config:
    """Launch parameters.

    Attributes:
        block: columns a program, a power of two.
        rows: images a tile, a power of two.
        num_warps, num_stages: Triton's.
        registers: budget a thread where rows are aligned (what is not need only not spill); 65536 /
            (32 num_warps registers) programs fit a multiprocessor.
    """

    block: int
    rows: int
    num_warps: int
    num_stages: int
    registers: int

    @property
    def options(self) -> dict[str, int]:
        """What a launch is given of it."""
        return {
            "ROWS": self.rows,
            "BLOCK": self.block,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


ARCHITECTURES = (80, 90, 100)

# Images a tile of one class; `schedule` and its kernels agree on it, so it is not in the table.
TILE_ROWS = 16

# Kernels that finish a reduction: a program an image, or one program for all (VALUE_WARPS).
FINISH_WARPS = 2
VALUE_WARPS = 8
FINISH_REGISTERS = 64

# Of a batch norm: programs that reduce rows, some for each multiprocessor, and channels a program
# that adds up what they found.
REDUCING_PROGRAMS = 512
FINISH_COLUMNS = 8

# operation -> (greatest number of columns D, parameters) in ascending order, the last without end.
_BF16: dict[str, tuple[tuple[float, Config], ...]] = {
    "row_statistics": ((float("inf"), Config(2048, 4, 4, 1, 128)),),
    "class_sums": ((float("inf"), Config(256, 16, 1, 1, 168)),),
    "row_dots": ((float("inf"), Config(512, TILE_ROWS, 4, 1, 168)),),
    "gradient": ((float("inf"), Config(512, TILE_ROWS, 4, 1, 168)),),
    "estimator": ((float("inf"), Config(1024, 1, 4, 1, 80)),),
    "bounded_sums": ((float("inf"), Config(256, 8, 4, 1, 168)),),  # checked so on an H200
    "normalise": ((float("inf"), Config(64, 64, 4, 1, 128)),),
    "upsampling": ((float("inf"), Config(64, 64, 4, 1, 64)),),
    "pooling": ((float("inf"), Config(64, 16, 4, 1, 112)),),
}
_FP32: dict[str, tuple[tuple[float, Config], ...]] = _BF16 | {
    "row_statistics": ((float("inf"), Config(512, 8, 4, 1, 128)),),
    "class_sums": ((float("inf"), Config(128, 16, 1, 1, 168)),),
    "row_dots": ((float("inf"), Config(512, TILE_ROWS, 4, 1, 168)),),
    "gradient": ((float("inf"), Config(512, TILE_ROWS, 4, 1, 168)),),
    "normalise": ((float("inf"), Config(64, 32, 4, 1, 80)),),
    "upsampling": ((float("inf"), Config(64, 32, 4, 1, 64)),),
}
TABLE: dict[int, dict[torch.dtype, dict[str, tuple[tuple[float, Config], ...]]]] = {
    architecture: {torch.bfloat16: _BF16, torch.float32: _FP32} for architecture in ARCHITECTURES
}


def lookup(operation: str, device: torch.device, dtype: torch.dtype, columns: int) -> Config:
    """The parameters for a device: those of the greatest architecture that is not above its own."""
    sizes = TABLE[_architecture(device)][dtype][operation]
    return next(config for most, config in sizes if columns <= most)


_architectures: dict[int, int] = {}


def _architecture(device: torch.device) -> int:
    if device.type != "cuda":  # Triton's interpreter
        return ARCHITECTURES[0]
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _architectures:
        major, minor = torch.cuda.get_device_capability(index)
        fitting = [a for a in ARCHITECTURES if a <= 10 * major + minor]
        if not fitting:
            raise ValueError(
                f"backend='triton': {torch.cuda.get_device_name(index)} is sm_{major}{minor}, "
                f"expected sm_{ARCHITECTURES[0]} or newer; use backend='torch'."
            )
        _architectures[index] = fitting[-1]
    return _architectures[index]
