"""What is computed on what: sizes of a run, and the backends that are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from benches.backends import ON_GPU, usable
from benches.gpu.budget import Budget
from benches.gpu.device import brief
from benches.shapes import Case


@dataclass(frozen=True)
class Scale:
    """The sizes of a run.

    Attributes:
        taps: whose features, a name in `benches.shapes`.
        encoder: torchvision's name of the same network.
        encoder_taps: which of its taps a step uses; None: all.
        n, pixels: images of a batch, sides of images.
        step: (side, images) of each training step that is timed.
        precisions: of the encoder, in steps and releases; the first is the one that counts.
        width: base channels of the generator.
        classes: K where there are labels.
        train_steps: (few, many) steps of `dpmmd.train.train`; their difference is timed.
        release: (side, images of a batch, batches).
        rounds, seconds: see `measure.Measure`.
        compile, authors: whether torch.compile, and the authors' procedure, are measured.
    """

    taps: str = "VGG19"
    encoder: str = "vgg19"
    encoder_taps: tuple[str, ...] | None = None
    n: int = 128
    pixels: tuple[int, ...] = (32, 64, 128, 256)
    step: tuple[tuple[int, int], ...] = ((32, 128), (128, 64))
    precisions: tuple[str, ...] = ("bfloat16", "float32")
    width: int = 64
    classes: int = 10
    train_steps: tuple[int, int] = (40, 160)
    release: tuple[int, int, int] = (32, 512, 20)
    rounds: tuple[int, int] = (10, 50)
    seconds: float = 0.5
    compile: bool = True
    authors: bool = True


FULL = Scale()
TINY = Scale(
    taps="Tiny",
    encoder="resnet18",
    encoder_taps=("layer4.1",),
    n=3,
    pixels=(32,),
    step=((32, 2),),
    precisions=("float32",),  # not every CPU computes in bfloat16
    width=4,
    classes=2,
    train_steps=(1, 2),
    release=(32, 2, 1),
    rounds=(1, 1),
    seconds=0.0,
    compile=False,
    authors=False,
)


def case(
    scale: Scale, pixels: int, dtype: torch.dtype, classes: int = 1, moments: tuple[int, ...] = (1,)
) -> Case:
    return Case(scale.n, classes, moments, scale.taps, pixels, dtype)


def library(
    device: torch.device, names: Sequence[str] = ON_GPU
) -> tuple[list[str], dict[str, str]]:
    """The library's backends that run on the device, the plain one first; why others do not."""
    return usable(names, device, brief)


def note_missing(
    missing: Mapping[str, str], stood_in: Sequence[str], budget: Budget, errors: list[str]
) -> None:
    """Says what a run goes without: backends of `library`, of which broken ones are errors."""
    for name, why in missing.items():
        budget.skip(name, f"backend {name}: {why}")
        if not why.startswith("ValueError"):  # it is there, and breaks
            errors.append(f"backend {name}: {why}")
    if stood_in:
        budget.skip("", f"not installed, stood in for: {', '.join(stood_in)}")
