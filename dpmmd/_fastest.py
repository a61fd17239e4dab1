"""Which core is the fastest on a GPU: the table that ``auto`` decides by, with what was measured.

The first row that fits a call and names a core that is present decides. The times are medians of
benches/results/nvidia-h200.json, which a test compares. What they say:

- A captured step costs the device's time alone. Triton's kernels take less of it, and with
  injection the encoder's ReLUs spare them passes.
- A launched step of few features waits for the host, and a launch of Triton's costs the host more.
  From about 0.8 GB of features on the device's time outweighs that. At 0.62 GB, 128 px in batches
  of 64, whole steps on the two cores were within 1 % of each other; at 1.2 GB, with one class and
  one moment, CUDA was still faster (2.75 against 3.10 ms).
- The estimator was not timed launched by itself. Replayed, it differs by 2 to 4 %, so that launched
  the host's time decides.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

EMBEDDING, ESTIMATOR, SUMS = OPERATIONS = "mean embedding", "estimator", "integer sums"
LARGE = 800_000_000  # bytes of features

_CASE = "n=128, K=10, moments 1+2"
_STEP, _REPLAYED = "training step, captured", "mmd_loss, forward + backward, replayed"
_LOSS, _ADAM = "mmd_loss, forward + backward", "estimator adam, step"
_RELEASE, _INJECTED = "release, integer class sums", "triton, injected"


class Measured(NamedTuple):
    """Times of one operation on one shape, in bfloat16 (an estimator's in float32)."""

    operation: str
    shape: str
    milliseconds: Mapping[str, float]


class Row(NamedTuple):
    """What to run where.

    Attributes:
        operation: one of OPERATIONS.
        captured: whether the step becomes a CUDA graph; None: either.
        large: whether the features have LARGE bytes or more; None: either.
        asked: whether the caller wants injection (True), none (False), or leaves it open (None).
        cores: the fastest first; the others stand in for one that is missing.
        injects: whether it runs with injection.
        measured: what the row rests on.
    """

    operation: str
    captured: bool | None
    large: bool | None
    cores: tuple[str, ...]
    measured: tuple[Measured, ...] = ()
    asked: tuple[bool | None, ...] = (None, False, True)
    injects: bool = False


TABLE = (
    Row(
        EMBEDDING,
        True,
        None,
        ("triton",),
        (
            Measured(
                _STEP, f"vgg19 32 px, {_CASE}", {_INJECTED: 4.604, "triton": 4.733, "cuda": 4.812}
            ),
            Measured(
                _STEP,
                "vgg19 128 px, n=64, K=10, moments 1+2",
                {_INJECTED: 28.31, "triton": 29.62, "cuda": 30.25},
            ),
        ),
        asked=(None, True),
        injects=True,
    ),
    Row(
        EMBEDDING,
        True,
        None,
        ("triton", "cuda"),
        (
            Measured(_REPLAYED, f"VGG19 32 px, {_CASE}", {"triton": 0.2061, "cuda": 0.2854}),
            Measured(_REPLAYED, f"VGG19 128 px, {_CASE}", {"triton": 2.839, "cuda": 3.961}),
        ),
        asked=(None, False),
    ),
    Row(EMBEDDING, False, None, ("triton",), asked=(True,), injects=True),  # CUDA has none
    Row(
        EMBEDDING,
        False,
        False,
        ("cuda", "triton"),
        (
            Measured(_LOSS, f"VGG19 32 px, {_CASE}", {"cuda": 1.383, "triton": 2.178}),
            Measured(
                "training step",
                f"vgg19 32 px, {_CASE}",
                {"cuda": 14.33, "triton": 15.23, _INJECTED: 17.67},
            ),
        ),
        asked=(None, False),
    ),
    Row(
        EMBEDDING,
        False,
        True,
        ("triton", "cuda"),
        (Measured(_LOSS, f"VGG19 128 px, {_CASE}", {"triton": 4.002, "cuda": 4.338}),),
        asked=(None, False),
    ),
    Row(
        ESTIMATOR,
        True,
        None,
        ("triton", "cuda"),
        (
            Measured(_ADAM, f"VGG19 32 px, {_CASE}", {"triton": 0.0602, "cuda": 0.0624}),
            Measured(_ADAM, f"VGG19 128 px, {_CASE}", {"triton": 0.8674, "cuda": 0.8843}),
        ),
    ),
    Row(
        ESTIMATOR,
        False,
        None,
        ("cuda", "triton"),
        (Measured(_LOSS, f"VGG19 32 px, {_CASE}", {"cuda": 1.383, "triton": 2.178}),),
    ),
    Row(
        SUMS,
        None,
        None,
        ("cuda", "triton"),
        (
            Measured(_RELEASE, f"VGG19 32 px, {_CASE}", {"cuda": 0.403, "triton": 0.4209}),
            Measured(_RELEASE, f"VGG19 128 px, {_CASE}", {"cuda": 5.924, "triton": 6.321}),
        ),
    ),
)


def size_of(features: Sequence[Tensor]) -> int:
    """Bytes of all features; 0 where the table does not ask, which spares counting them."""
    if features[0].device.type != "cuda" or torch.compiler.is_compiling():  # symbols, perhaps
        return 0
    return sum([f.nbytes for f in features])


def check_operation(operation: str) -> None:
    """Refuses what is none of OPERATIONS: a ValueError."""
    if operation not in OPERATIONS:
        raise ValueError(
            f"operation={operation!r}: expected one of {', '.join(map(repr, OPERATIONS))}."
        )


def fastest(
    operation: str, present: Collection[str], *, captured: bool, large: bool, inject: bool | None
) -> tuple[str, bool] | None:
    """The core of the first row that fits, and whether it injects; None: no core that is present.

    Args:
        operation: one of OPERATIONS.
        present: cores that can run on every CUDA device that is visible.
        captured, large: see `Row`.
        inject: what the caller asks for; see `Row`.
    """
    for row in TABLE:
        if (
            row.operation == operation
            and row.captured in (None, captured)
            and row.large in (None, large)
            and inject in row.asked
        ):
            for core in row.cores:
                if core in present:
                    return core, row.injects
    return None
