"""Maps [n, C, H, W] as layers' kernels see them: rows of channels, cut into tiles.

A map is channels-last in memory, which makes it a matrix of n H W rows and C columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd.kernels import table
from dpmmd.kernels.taps import launch


@triton.jit
def tile_of(rows, channels, tile, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The tile's rows [ROWS], this program's columns [BLOCK], and what of both is in the map."""
    at = tile * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    return at, columns, (at < rows)[:, None] & (columns < channels)[None, :]


@triton.jit
def offsets(rows, columns, channels):
    """Where the elements [ROWS, BLOCK] of some rows stand in a map."""
    return rows.to(tl.int64)[:, None] * channels + columns[None, :]


@dataclass(frozen=True)
class Cut:
    """How a map is cut into tiles, by its shape and dtype alone.

    Attributes:
        rows, channels: of the map.
        options: rows and columns a tile, and Triton's.
        device: of the map.
    """

    rows: int
    channels: int
    options: dict[str, int]
    device: torch.device

    @classmethod
    def of(cls, operation: str, x: Tensor) -> Cut:
        """Tiles of the table's size, but no wider than a narrow map is."""
        channels = x.shape[1]
        config = table.lookup(operation, x.device, x.dtype, channels)
        block = min(config.block, triton.next_power_of_2(channels))
        rows = config.rows * config.block // block
        options = config.options | {"ROWS": rows, "BLOCK": block}
        return cls(x.numel() // channels, channels, options, x.device)

    @property
    def tiles(self) -> int:
        """How many there are in a column of tiles."""
        return triton.cdiv(self.rows, self.options["ROWS"])

    @property
    def blocks(self) -> int:
        """How many there are in a row of tiles."""
        return triton.cdiv(self.channels, self.options["BLOCK"])

    def launch(self, kernel: Any, count: int, *args: Any, **options: Any) -> None:
        """A kernel of ``count`` programs for each block of channels."""
        launch(kernel, (count, self.blocks), self.device, *args, **self.options, **options)
