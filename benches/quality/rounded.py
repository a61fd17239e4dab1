"""What a generator that trains in bfloat16 costs in accuracy, on a CPU that has no bfloat16.

python -m benches.quality.rounded FOLDER --seed N      two runs of fashion-demo, half an hour each

One release, and two generators trained on it: in float32, and with every convolution, product and
batch norm rounded where `torch.autocast` rounds it, forward and backward. Only the order of sums is
another than a GPU's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from dpmmd.generators import ConvGenerator
from dpmmd.run import run

RESULTS = Path(__file__).parents[1] / "results" / "quality" / "rounded.jsonl"
FLOAT32, ROUNDED = "float32", "rounded to bfloat16"
_OF_FACTORS = {F.conv2d, F.conv_transpose2d, F.linear}
_OF_RESULTS = {F.batch_norm, torch.add, Tensor.add, Tensor.__add__}


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to(torch.bfloat16).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to(torch.bfloat16).to(grad.dtype)


def _rounded(x: Any) -> Any:
    """A floating tensor to 8 bits, and its gradient; anything else as it is."""
    return _Round.apply(x) if isinstance(x, Tensor) and x.is_floating_point() else x


class Rounding(TorchFunctionMode):
    """Within it a generator's operations have the values that autocast to bfloat16 gives them."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        given = kwargs or {}
        if func in _OF_FACTORS:
            args = tuple(map(_rounded, args))
            given = {key: _rounded(value) for key, value in given.items()}
        out = func(*args, **given)
        return _rounded(out) if func in _OF_FACTORS | _OF_RESULTS else out


def trained(folder: Path, seed: int, rounded: bool) -> dict[str, Any]:
    """A run of the demo in a folder, whose release is taken if it has one."""
    plain = ConvGenerator.forward

    def forward(self: ConvGenerator, z: Tensor, y: Tensor | None = None) -> Tensor:
        with Rounding() if rounded and self.training else nullcontext():
            return plain(self, z, y)

    ConvGenerator.forward = forward  # type: ignore[method-assign]
    try:
        changes = [f"train.seed={seed}"]
        report = run("fashion-demo", folder, say=print, changes=changes, device="cpu")
    finally:
        ConvGenerator.forward = plain  # type: ignore[method-assign]
    found = {name: both["synthetic"] for name, both in report["accuracy"].items()}
    return {"training": ROUNDED if rounded else FLOAT32, "seed": seed, "accuracy": found}


def table(found: list[dict[str, Any]]) -> str:
    """Accuracies in percent, as Markdown."""
    lines = [
        "| training | seed | logistic regression | MLP | CNN |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in sorted(found, key=lambda row: (row["seed"], row["training"])):
        cells = [f"{100 * value:.1f}" for value in row["accuracy"].values()]
        lines.append(f"| {row['training']} | {row['seed']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def read() -> list[dict[str, Any]]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    one, other = options.folder / "float32", options.folder / "rounded"
    rows = [trained(one, options.seed, rounded=False)]
    other.mkdir()
    for name in ("recipe.toml", "release.safetensors"):
        shutil.copy(one / name, other / name)
    rows.append(trained(other, options.seed, rounded=True))
    with RESULTS.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
