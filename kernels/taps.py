"""The features as kernels see them: every tap by address, cut into blocks of columns.

One launch covers all taps. Their addresses travel by value, as kernel parameters (so there is no
table to copy to the device, to keep alive or to rebuild in a captured graph), and a map on the
device says which part of which tap a program has. The map depends on shapes alone: it is made once
for each of them and copied to the device at the first call.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpmmd._cores.taps import PLANES, layout

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}

# Addresses a launch: a kernel's parameters are limited to 4 KiB, and a program finds its address
# in as many comparisons. More taps take several launches.
MOST_TAPS = 64

# CUDA's limit on a grid's second dimension.
MOST_PROGRAMS = 65_535

# A block's record: which tap of the launch it is in, its first column there, the tap's columns and
# its first column in D, the step from image to image, the tap's number among all taps, and the
# block's number among all blocks, in the order of columns.
FIELDS = tl.constexpr(8)


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


class Taps:
    """Features of n images at L taps: checked, and in one piece a tap and image.

    Args:
        features: L tensors [n, ...], float32 or bfloat16, on one device.
        planes: whether maps [n, C, H, W] may stay in that order; else they are copied to
            channels-last.

    Raises:
        ValueError: dtype, device, layout or shape do not fit.
    """

    def __init__(self, features: Sequence[Tensor], *, planes: bool = True) -> None:
        if not features:
            raise ValueError("features: expected at least one tap.")
        first = features[0]
        self.tensors: list[Tensor] = []
        for i, tap in enumerate(features):
            if tap.layout != torch.strided or tap.device != first.device:
                raise ValueError(
                    f"features[{i}]: {brief(tap)}, expected a dense tensor on {first.device}."
                )
            if tap.dtype not in TYPES or tap.dtype != first.dtype:
                expected = first.dtype if first.dtype in TYPES else "float32 or bfloat16"
                raise ValueError(f"features[{i}]: {brief(tap)}, expected {expected}.")
            if tap.ndim < 2 or tap.shape[0] != first.shape[0]:
                raise ValueError(
                    f"features[{i}]: {brief(tap)}, expected [n, ...] with n={first.shape[0]} as "
                    "in features[0]."
                )
            how = layout(tap)
            if how is None or (how == PLANES and not planes):
                tap = tap.contiguous(
                    memory_format=torch.channels_last if tap.ndim == 4 else torch.contiguous_format
                )
            self.tensors.append(tap)
        self.n, self.dtype, self.device = first.shape[0], first.dtype, first.device
        self.type = TYPES[first.dtype]
        n = self.n
        self.widths = tuple([t.numel() // n if n else prod(t.shape[1:]) for t in self.tensors])
        self.dim = sum(self.widths)
        self.steps = tuple([t.stride(0) for t in self.tensors]) if n > 1 else self.widths
        self.addresses = tuple([t.data_ptr() for t in self.tensors])

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
            for chosen, records, vector in _groups(*key)
        ]

    def blocks(self, block: int) -> int:
        """How many blocks all taps are cut into."""
        return sum(-(-width // block) for width in self.widths)

    def ranges(self, block: int, per_tap: bool) -> Tensor:
        """int32 [B + 1] on the device: the blocks of each tap, or all of them as one (B = 1)."""
        return _ranges(self.widths, block, per_tap, self.device)


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


def check_buffer(
    name: str,
    buffer: Tensor,
    shape: Sequence[int],
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Refuses a tensor that a kernel could not take by its address."""
    if (
        buffer.dtype != dtype
        or tuple(buffer.shape) != tuple(shape)
        or buffer.device != device
        or not buffer.is_contiguous()
    ):
        raise ValueError(
            f"{name}: {brief(buffer)}{'' if buffer.is_contiguous() else ', not contiguous'}; "
            f"expected {dtype} {list(shape)} on {device}, contiguous."
        )


def brief(value: object) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)} on {value.device}"
    return type(value).__name__
