"""On what the probe runs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benches.gpu import inputs
from benches.gpu.inputs import Scale

Size = tuple[int, int]  # side of the images in pixels, images of a batch


@dataclass(frozen=True)
class Sizes:
    """The sizes of a probe.

    Attributes:
        scale: encoder, classes, and the width of the generator.
        deep: whole steps that go through every variant.
        brief: whole steps that take what was best for the deep one before.
        crossing: batches whose loss is launched with each core; features of 0.08 to 1.2 GB.
        matrix, copied: rows of the square matrices and bytes of the copy that give the ceilings.
        empty: kernels without work in a graph.
        recipe: side and batch of the README's recipe, which uses SqueezeNet.
        precisions: of the recipe's encoder; its generator's too if bfloat16 is among them.
        blocks: channels of the encoder's blocks.
        repeats: calls of which the host's time is the median.
        profiled: steps that are profiled.
        train_steps: (few, many) of `dpmmd.train.train`.
        rounds, seconds: see `measure.Measure`.
        compile: whether torch.compile is measured.
    """

    scale: Scale = inputs.FULL
    deep: tuple[Size, ...] = ((32, 128), (128, 64))
    brief: tuple[Size, ...] = ((64, 128), (256, 16))
    crossing: tuple[Size, ...] = ((32, 128), (64, 128), (64, 256), (128, 64), (128, 96), (128, 128))
    matrix: int = 8192
    copied: int = 4 << 30
    empty: int = 1000
    recipe: Size = (64, 100)
    precisions: tuple[str, ...] = ("float32", "tf32", "bfloat16")
    blocks: tuple[int, ...] = (64, 128, 256, 512, 512)
    repeats: int = 200
    profiled: int = 3
    train_steps: tuple[int, int] = (40, 240)
    rounds: tuple[int, int] = (7, 25)
    seconds: float = 0.1
    compile: bool = True

    @property
    def steps(self) -> dict[str, Size]:
        """The sizes of whole steps, by the name of their section."""
        return {f"ladder{pixels}": (pixels, batch) for pixels, batch in (*self.deep, *self.brief)}


FULL = Sizes()
TINY = Sizes(
    scale=replace(inputs.TINY, width=1, encoder_taps=("layer1.0",)),
    deep=((32, 2),),
    brief=((64, 1),),
    crossing=((32, 2), (32, 3)),
    matrix=16,
    copied=1 << 12,
    empty=2,
    recipe=(32, 4),
    precisions=("float32",),  # not every CPU computes in bfloat16
    blocks=(2, 4),
    repeats=1,
    profiled=1,
    train_steps=(1, 2),
    rounds=(1, 1),
    seconds=0.0,
    compile=False,
)
