"""Peak memory and time of a training step against resolution and batch, with and without a budget.

python -m benches.memory                    measure what is not measured yet, and write the results
python -m benches.memory --plot docs/memory.png   draw them (needs matplotlib)
python -m benches.memory --ratio 256 16     time micro-batches against a batch in one piece
python -m benches.memory --update docs/MEMORY.md  rewrite the table there

Every row is a process of its own: VGG19 (random weights, which cost what others would), all taps,
moments 1 and 2, one class, the "adam" estimator, the ResNet generator of the default width. "plain"
is `dpmmd train` without a budget. Peaks are resident memory of the whole process. What would need
more than ROOM is not run: its row says what the plan predicts.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

import dpmmd
from benches.rows import Kept, update
from dpmmd._memory import Meter, keep_freed_memory
from dpmmd.encoders import Encoder
from dpmmd.recipe import GeneratorSection, TrainSection
from dpmmd.train import plan

BEGIN, END = "<!-- memory: begin -->", "<!-- memory: end -->"
RESULTS = Path(__file__).parent / "results"
ROOM = 17 << 30  # bytes that a row may use on the machine at hand
STEPS = 2
# pixels, batch, budgets in GiB (0: plain)
ROWS = (
    *((32, n, (0, 4)) for n in (128, 512, 2048)),
    *((64, n, (0, 4, 8)) for n in (128, 512)),
    (128, 128, (0, 4, 8, 16)),
    (256, 128, (0, 4, 8, 16)),
    (512, 8, (0, 4, 8, 16)),
)


def released(pixels: int) -> tuple[Encoder, dpmmd.Release]:
    """VGG19 and a release made with it, of two images."""
    encoder = dpmmd.encoders.load("vgg19", image_size=pixels, weights="random")
    images = np.random.default_rng(0).integers(0, 256, (2, 3, pixels, pixels), dtype=np.uint8)
    release = dpmmd.release(
        (images, None),
        encoder,
        epsilon=1.0,
        delta=1e-5,
        adjacency="replace-one",
        moments=(1, 2),
        batch_size=2,
        progress=False,
    )
    return encoder, release


def one(pixels: int, batch: int, budget: int, steps: int) -> dict[str, Any]:
    """One row, in this process."""
    encoder, release = released(pixels)
    row: dict[str, Any] = {"pixels": pixels, "batch": batch, "budget_gib": budget}
    settings = TrainSection(
        steps=steps,
        batch_size=batch,
        estimator="adam",
        memory=f"{budget}GiB" if budget else None,
    )
    look = GeneratorSection(name="resnet", image_size=pixels, channels=3)
    meter = Meter(torch.device("cpu"))
    meter.settle()
    meter._reset()
    generator = dpmmd.generators.build(**look.arguments(), num_classes=None)
    target = plan.Target.of(release.metadata)
    try:
        made = plan.make(settings.memory or "1TiB", encoder, generator, target, settings)
    except plan.PlanError as error:
        return {**row, "note": f"refused: {error}"}
    del generator
    if not budget:
        row["predicted"] = dict(zip(("peak", "seconds"), made.whole, strict=True))
        if made.whole[0] > ROOM:
            return {**row, "note": "not run: needs more memory than there is"}
        keep_freed_memory()  # as the command line does
        meter.settle()
        meter._reset()
    trained = dpmmd.train.train(
        release,
        encoder,
        settings=settings,
        generator_settings=look,
        plan=made if budget else None,
        progress=False,
    )
    row |= {"peak": meter.peak(), "seconds": trained.seconds / steps, "steps": steps}
    return row | ({"plan": made.facts()} if budget else {})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--row", nargs=4, type=int, metavar=("PIXELS", "BATCH", "GIB", "STEPS"))
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--ratio", nargs=2, type=int, metavar=("PIXELS", "BATCH"))
    parser.add_argument("--update", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(one(*arguments.row)))
        return
    kept = Kept(RESULTS / "memory")
    if arguments.plot:
        plot(kept.content, arguments.plot)
    elif arguments.ratio:
        found = ratio(*arguments.ratio)
        others = [r for r in kept.content.get("ratio", []) if r["pixels"] != found["pixels"]]
        kept.content["ratio"] = sorted([*others, found], key=lambda r: r["pixels"])
        kept.write()
    elif arguments.update:
        update(arguments.update, BEGIN, END, table(kept.content))
    else:
        wanted = {
            (pixels, batch, budget): (pixels, batch, budget, 1 if pixels >= 256 else STEPS)
            for pixels, batch, budgets in ROWS
            for budget in budgets
        }
        kept.measure(
            "benches.memory",
            wanted,
            lambda r: (r["pixels"], r["batch"], r["budget_gib"]),
            lambda rows: table({"rows": rows}),
        )


def table(results: dict[str, Any]) -> str:
    """As Markdown."""
    lines = [
        "| pixels | batch | budget | peak RSS | predicted | s a step | how |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in sorted(results["rows"], key=lambda r: (r["pixels"], r["batch"], r["budget_gib"])):
        found = r.get("plan", r.get("predicted", {}))
        how = r.get("note", "plain")
        if how.startswith("refused"):
            how = "refused: the least is " + how.split("needs is ")[1].split(",")[0]
        if "plan" in r:
            p = r["plan"]
            how = f"{p['micro_batch']} at a time" + (", recompute" if p["recompute"] else "")
        gib = [f"{v / 2**30:.2f}" if v else "" for v in (r.get("peak"), found.get("peak"))]
        seconds = f"{r['seconds']:.3g}" if "seconds" in r else ""
        budget = f"{r['budget_gib']} GiB" if r["budget_gib"] else "none"
        lines.append(
            f"| {r['pixels']} | {r['batch']} | {budget} | {gib[0]} | {gib[1]} | {seconds} | {how} |"
        )
    for r in results.get("ratio", []):
        lines += [
            "",
            f"| {r['pixels']} px, batch {r['batch']}, in turn | least s | x in one piece |",
            "| --- | --- | --- |",
        ]
        whole = min(r["rows"][0]["seconds"])
        for each in r["rows"]:
            how = f"{each['micro_batch']} at a time" + (", recompute" if each["recompute"] else "")
            least = min(each["seconds"])
            lines.append(f"| {how} | {least:.2f} | {least / whole:.2f} |")
    return "\n".join(lines)


def ratio(pixels: int, batch: int, rounds: int = 5) -> dict[str, Any]:
    """Forward and backward of generator and loss, in turn, freed memory kept by all."""
    keep_freed_memory()
    encoder, release = released(pixels)
    generator = dpmmd.generators.build(
        "resnet", num_classes=None, image_size=pixels, channels=3, base_channels=32
    ).train()
    cases: list[dict[str, Any]] = [
        {"micro_batch": m, "recompute": recompute, "seconds": []}
        for m, recompute in (
            *((batch // parts, False) for parts in (1, 2, 4, 8)),
            (batch // 4, True),
        )
    ]
    losses = {
        case["micro_batch"]: dpmmd.nn.MMDLoss(
            release,
            encoder,
            micro_batch=None if case["micro_batch"] == batch else case["micro_batch"],
        ).train()
        for case in cases
    }
    for _ in range(rounds):
        for case in cases:
            generator.recompute = case["recompute"]
            started = perf_counter()
            generator.zero_grad()
            z = torch.randn(batch, int(generator.z_dim))
            losses[case["micro_batch"]](generator(z)).backward()
            case["seconds"].append(round(perf_counter() - started, 3))
    return {"pixels": pixels, "batch": batch, "rows": cases}


def plot(results: dict[str, Any], path: Path) -> None:
    """Peak and time against pixels at batch 128, and of 8 images of 512 px."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4))
    for budget, marker in ((0, "o"), (4, "v"), (8, "s"), (16, "^")):
        rows = sorted(
            (
                r
                for r in results["rows"]
                if r["batch"] == 128 and r["budget_gib"] == budget and "peak" in r
            ),
            key=lambda r: r["pixels"],
        )
        label = f"budget {budget} GiB" if budget else "plain"
        for axis, values in zip(
            axes, ([r["peak"] / 2**30 for r in rows], [r["seconds"] for r in rows]), strict=True
        ):
            axis.plot([r["pixels"] for r in rows], values, marker=marker, label=label, alpha=0.8)
        for r in results["rows"]:  # the largest images: a smaller batch
            if r["pixels"] == 512 and r["budget_gib"] == budget and "peak" in r:
                for axis, value in zip(axes, (r["peak"] / 2**30, r["seconds"]), strict=True):
                    colour = axis.lines[-1].get_color()
                    axis.plot(512, value, marker, color=colour, fillstyle="none")
    beyond = [r for r in results["rows"] if r["batch"] == 128 and "predicted" in r and "note" in r]
    axes[0].plot(
        [r["pixels"] for r in beyond],
        [r["predicted"]["peak"] / 2**30 for r in beyond],
        "x",
        label="plain, predicted (does not fit)",
    )
    for axis, name in zip(axes, ("peak resident memory, GiB", "seconds a step"), strict=True):
        axis.set(xlabel="pixels", ylabel=name, xscale="log", yscale="log")
        axis.set_xticks([32, 64, 128, 256, 512], ["32", "64", "128", "256", "512\n(batch 8)"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
