"""The features as kernels see them: every tap by address, cut into blocks of columns.

One launch covers all taps. Their addresses travel by value, as kernel parameters (so there is no
table to copy to the device, to keep alive or to rebuild in a captured graph), and a map on the
device says which part of which tap a program has. The map depends on shapes alone: it is made once
for each of them and copied to the device at the first call.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import nullcontext
from copy import copy
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd._contract import taps
from dpmmd._contract.capturing import hold
from dpmmd.kernels.table import Config

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

# Addresses a launch: a kernel's parameters are limited to 4 KiB, and a program finds its address
# in as many comparisons. More taps take several launches.
MOST_TAPS = 64

# CUDA's limit on a grid's second dimension.
MOST_PROGRAMS = 65_535

# How many partial results a program that finishes a reduction takes at a time.
PARTS = tl.constexpr(256)

# A block's record: which tap of the launch it is in, its first column there, the tap's columns and
# its first column in D, the step from image to image, the tap's number among all taps, and the
# block's number among all blocks, in the order of columns.
FIELDS = tl.constexpr(8)


@triton.jit
def number(bits):
    """The float64 whose bits an int64 has: arguments of kernels are float32 otherwise."""
    return bits.to(tl.int64).to(tl.float64, bitcast=True)


def bits_of(value: float) -> int:
    """What `number` takes."""
    bits: int = struct.unpack("<q", struct.pack("<d", value))[0]
    return bits


@triton.jit
def tap_address(addresses, tap):
    """addresses[tap]."""
    address = addresses[0]
    for i in tl.static_range(1, len(addresses)):
        address = tl.where(tap == i, addresses[i], address)
    return address


@triton.jit
def find_block(addresses, records, TYPE: tl.constexpr, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    """This program's block of columns.

    Returns:
        Pointer to its first column in image 0, the step to the next image, how many columns are
        left in the tap, the first column in D, the tap's number and the block's number.
    """
    record = records + tl.program_id(0).to(tl.int64) * FIELDS
    tap = tl.load(record)
    begin = tl.load(record + 1)
    width = tl.load(record + 2)
    column = tl.load(record + 3)
    stride = tl.load(record + 4)
    number = tl.load(record + 5)
    block = tl.load(record + 6)
    start = tap_address(addresses, tap).to(tl.pointer_type(TYPE))
    if VECTOR > 1:
        # Guaranteed by `Taps.launches`: lets rows be loaded 16 bytes at a time.
        begin = tl.multiple_of(begin, VECTOR)
        width = tl.multiple_of(width, VECTOR)
        column = tl.multiple_of(column, VECTOR)
        stride = tl.multiple_of(stride, VECTOR)
        start = tl.multiple_of(start, 16)
    rest = tl.minimum(width - begin, BLOCK).to(tl.int32)
    if VECTOR > 1:
        rest = tl.multiple_of(rest, VECTOR)
    return start + begin, stride, rest, column + begin, number, block


@triton.jit
def load_tile(pointer, stride, images, live, rest, BLOCK: tl.constexpr):
    """Features of `images` [ROWS] in a block as float32 [ROWS, BLOCK]; 0 where not live."""
    columns = tl.arange(0, BLOCK)
    rows = pointer + images.to(tl.int64)[:, None] * stride
    mask = live[:, None] & (columns < rest)[None, :]
    return tl.load(rows + columns[None, :], mask=mask, other=0.0).to(tl.float32)


class Launch(NamedTuple):
    """One launch over some of the taps, all aligned or all not.

    Attributes:
        addresses: of the taps.
        partners: of the tensors given to `Taps.launches`, as many.
        records: int64 [blocks, FIELDS] on the device.
        vector: elements in 16 bytes where every row starts on 16 bytes, else 1.
        blocks: how many, the first dimension of a grid.
    """

    addresses: tuple[int, ...]
    partners: tuple[int, ...]
    records: Tensor
    vector: int
    blocks: int


class Taps(taps.Taps):
    """Features of n images at L taps, float32 or bfloat16 on one device, in blocks of columns.

    Args:
        features: L tensors [n, ...].
        planes: whether maps [n, C, H, W] may stay in that order; else they are copied to
            channels-last.
    """

    def __init__(self, features: Sequence[Tensor], *, planes: bool = True) -> None:
        super().__init__(features, TYPES, planes=planes)
        self.type = TYPES[self.dtype]

    def launches(self, block: int, partners: Sequence[Tensor | None] | None = None) -> list[Launch]:
        """The taps that have columns (and partners, where given), in as few launches as can be.

        Args:
            block: columns a program.
            partners: one tensor a tap, dense and laid out as the tap is, or None for no partner.
        """
        if partners is None:
            theirs: tuple[int | None, ...] = self.addresses
        else:
            theirs = tuple([None if p is None else p.data_ptr() for p in partners])
        off = tuple(
            [
                None if partner is None else (address | partner) & 15
                for address, partner in zip(self.addresses, theirs, strict=True)
            ]
        )
        key = (self.widths, self.steps, off, self.dtype.itemsize, block, self.device)
        return [
            Launch(
                tuple([self.addresses[i] for i in chosen]),
                tuple([theirs[i] for i in chosen]),  # type: ignore[misc]
                records,
                vector,
                records.shape[0],
            )
            for chosen, records, vector in hold(_groups(*key))
        ]

    def places(self) -> Taps:
        """Where the taps lie, without the tensors; `at` says where one of them lies later."""
        places = copy(self)
        places.addresses, places.steps, places.tensors = self.addresses, self.steps, []
        return places

    def at(self, column: int, tap: Tensor) -> Taps:
        """The same places, but for tap number ``column``, which is ``tap``."""
        places = copy(self)
        places.addresses = (
            *self.addresses[:column],
            tap.data_ptr(),
            *self.addresses[column + 1 :],
        )
        return places

    def blocks(self, block: int) -> int:
        """How many blocks all taps are cut into."""
        return sum(-(-width // block) for width in self.widths)

    def ranges(self, block: int, per_tap: bool) -> Tensor:
        """int32 [B + 1] on the device: the blocks of each tap, or all of them as one (B = 1)."""
        return hold(_ranges(self.widths, block, per_tap, self.device))


@lru_cache(maxsize=256)
def _groups(
    widths: tuple[int, ...],
    steps: tuple[int, ...],
    off: tuple[int | None, ...],
    itemsize: int,
    block: int,
    device: torch.device,
) -> list[tuple[tuple[int, ...], Tensor, int]]:
    """Taps, their records and elements an access, a launch; off: bytes that addresses are off."""
    whole = 16 // itemsize
    dim, column = sum(widths), 0
    groups: dict[int, list[int]] = {whole: [], 1: []}
    for tap, (width, step, bytes_off) in enumerate(zip(widths, steps, off, strict=True)):
        if width and bytes_off is not None:
            counts = (bytes_off, width % whole, step % whole, column % whole, dim % whole)
            groups[1 if any(counts) else whole].append(tap)
        column += width
    return [
        (chosen, _records(widths, steps, chosen, block, device), vector)
        for vector, members in groups.items()
        for start in range(0, len(members), MOST_TAPS)
        if (chosen := tuple(members[start : start + MOST_TAPS]))
    ]


def _records(
    widths: tuple[int, ...],
    steps: tuple[int, ...],
    chosen: tuple[int, ...],
    block: int,
    device: torch.device,
) -> Tensor:
    records = []
    members = {tap: i for i, tap in enumerate(chosen)}
    column = number = 0
    for tap, (width, step) in enumerate(zip(widths, steps, strict=True)):
        for begin in range(0, width, block):
            if tap in members:
                records.append((members[tap], begin, width, column, step, tap, number, 0))
            number += 1
        column += width
    return to_device(torch.tensor(records, dtype=torch.int64), device)


@lru_cache(maxsize=256)
def _ranges(widths: tuple[int, ...], block: int, per_tap: bool, device: torch.device) -> Tensor:
    ends = [0]
    for width in widths:
        ends.append(ends[-1] + -(-width // block))
    ends = ends if per_tap else [0, ends[-1]]
    return to_device(torch.tensor(ends, dtype=torch.int32), device)


def to_device(values: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, which waits for it: refused while a CUDA graph is being captured."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "dpmmd.kernels: these shapes are new, and what the kernels need to know of them cannot "
            "be copied to the device while a CUDA graph is being captured. Run one step with the "
            "same shapes before the capture (PyTorch's recipe does so, on a side stream)."
        )
    return values.to(device)


def launch(
    kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any
) -> None:
    """kernel[grid](*args, **options) on the current stream of a device."""
    if len(grid) > 1 and grid[1] > MOST_PROGRAMS:
        raise ValueError(
            f"backend='triton': {grid[1]} tiles of images or classes, expected at most "
            f"{MOST_PROGRAMS}; use smaller batches, fewer classes or backend='torch'."
        )
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*args, **options)


def launch_blocks(
    kernel: Any, taps: Taps, config: Config, rows: int, *args: Any, **options: Any
) -> None:
    """A kernel over all blocks of columns: the features' addresses and records, then ``args``.

    Args:
        rows: the second dimension of the grid.
    """
    for piece in taps.launches(config.block):
        launch(
            kernel,
            (piece.blocks, rows),
            taps.device,
            piece.addresses,
            piece.records,
            *args,
            TYPE=taps.type,
            VECTOR=piece.vector,
            **config.options,
            **options,
        )
