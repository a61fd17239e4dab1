"""How a step divides over GPUs, on paper: operations and bytes counted, times modelled.

python -m benches.scaling --update docs/SCALING.md

Operations are counted by PyTorch's FlopCounterMode on the meta device, bytes follow from shapes.
Rates are assumptions, written at the top of the table; nothing here was timed.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

import dpmmd
from benches.rows import between
from dpmmd.generators import ResNetGenerator

BEGIN, END = "<!-- model: begin -->", "<!-- model: end -->"
CLASSES, MOMENTS = 10, 2


@dataclass(frozen=True)
class Machine:
    """Rates a GPU: matrix arithmetic in FLOP/s, memory and links in bytes/s (one direction)."""

    matrix: float = 0.4 * 790e12  # bf16: 40 % of a large product's rate on an H200
    memory: float = 4.3e12  # bytes read plus written, a device's copy on an H200
    within: float = 0.8 * 450e9  # NVLink, 8 GPUs a machine
    between: float = 0.8 * 50e9  # 400 Gb/s a GPU between machines


@dataclass(frozen=True)
class Work:
    """What one image and one step need."""

    resolution: int
    flops: float  # encoder and generator, forward and backward, an image
    features: int  # D
    parameters: int  # of the generator


def count(resolution: int) -> Work:
    """VGG19, all taps, and the ResNet generator (64 channels at full resolution)."""
    encoder = dpmmd.encoders.load("vgg19", image_size=resolution, weights="random")
    features = encoder.dim
    encoder = encoder.to("meta")
    generator = ResNetGenerator(
        num_classes=CLASSES, image_size=resolution, channels=3, base_channels=64
    ).to("meta")
    n = 2
    z = torch.empty(n, generator.z_dim, device="meta")
    y = torch.empty(n, dtype=torch.int64, device="meta")
    with FlopCounterMode(display=False) as counter:
        # The encoder's own check reads pixels, which meta tensors do not have.
        maps = encoder._maps(generator(z, y))
        torch.autograd.grad(
            [m.sum() for m in maps], list(generator.parameters()), allow_unused=True
        )
    parameters = sum(p.numel() for p in generator.parameters())
    return Work(resolution, counter.get_total_flops() / n, features, parameters)


@dataclass(frozen=True)
class Step:
    """Modelled seconds of a step on `gpus` GPUs."""

    arithmetic: float
    features: float
    replicated: float
    reduced: float
    gradients: float

    @property
    def total(self) -> float:
        """Gradients of the generator travel while its backward goes on."""
        return self.arithmetic + self.features + self.replicated + self.reduced + self.hidden

    @property
    def hidden(self) -> float:
        return max(0.0, self.gradients - self.arithmetic / 2)


def model(work: Work, batch: int, gpus: int, machine: Machine) -> Step:
    rows = MOMENTS * CLASSES * work.features
    share = batch / gpus
    link = machine.within if gpus <= 8 else machine.between
    ring = 2 * (gpus - 1) / gpus / link if gpus > 1 else 0.0
    return Step(
        arithmetic=share * work.flops / machine.matrix,
        features=share * work.features * 2 * 5 / machine.memory,  # bf16: 4 reads and 1 write
        # Sums in and out, target, the state of the adam estimator in and out, the gradient.
        replicated=4 * rows * 10 / machine.memory,
        reduced=4 * rows * ring,
        gradients=4 * work.parameters * ring,
    )


def table() -> str:
    machine = Machine()
    lines = [
        f"Assumed a GPU: {machine.matrix / 1e12:.0f} TFLOP/s in bf16, memory "
        f"{machine.memory / 1e12:.1f} TB/s, links {machine.within / 1e9:.0f} GB/s within a machine "
        f"of 8 and {machine.between / 1e9:.0f} GB/s between machines, one direction. VGG19, all "
        f"taps, {CLASSES} classes, moments 1 and 2, `adam` estimator, ResNet generator with 64 "
        "channels.",
        "",
        "| px | batch | features D | GFLOP an image | reduced a step | generator's gradients | "
        "1 GPU | 8 GPUs | 64 GPUs |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for resolution in (32, 64, 128, 256):
        work = count(resolution)
        for batch in (128, 2048, 16384):
            steps = {gpus: model(work, batch, gpus, machine) for gpus in (1, 8, 64)}
            one = steps[1].total

            def cell(gpus: int, one: float = one, steps: dict[int, Step] = steps) -> str:
                step = steps[gpus]
                text = f"{1e3 * step.total:.3g} ms"
                return text if gpus == 1 else f"{text} ({one / step.total:.1f} x)"

            lines.append(
                f"| {resolution} | {batch:,} | {work.features:,} | {work.flops / 1e9:.1f} | "
                f"{4 * MOMENTS * CLASSES * work.features / 1e6:,.0f} MB | "
                f"{4 * work.parameters / 1e6:,.0f} MB | {cell(1)} | {cell(8)} | {cell(64)} |"
            )
    return "\n".join(lines)


def updated(text: str) -> str:
    """The document with its table made anew."""
    return between(text, BEGIN, END, table())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--update", type=Path, help="document to put the table in")
    arguments = parser.parse_args()
    if arguments.update is None:
        print(table())
    else:
        arguments.update.write_text(updated(arguments.update.read_text()))


if __name__ == "__main__":
    main()
