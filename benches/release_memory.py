"""Peak memory of a private release, by the number of images that stream through it.

python -m benches.release_memory                          measure what is missing (half an hour)
python -m benches.release_memory --row vgg19 64           one row alone, printed
python -m benches.release_memory --update docs/MEMORY.md  rewrite the table there

Every row is a process of its own: images of one size made on the fly from a seed, batch by batch,
go through `dpmmd.release` on the CPU, freed memory kept by the process as the command line does.
"Peak" is the resident memory of the whole process at its highest, interpreter and weights included,
"beyond" what is left of it without the exact int64 sums. Progress is that of the release.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from benches.rows import Kept, update
from dpmmd.data import Batch, ImageSource, source_identity

BEGIN, END = "<!-- release: begin -->", "<!-- release: end -->"
RESULTS = Path(__file__).parent / "results" / "release_memory"


@dataclass(frozen=True)
class Case:
    """What is released, of how many images."""

    encoder: str
    taps: tuple[str, ...] | None
    classes: int
    batch: int
    counts: tuple[int, ...]
    pixels: int = 256
    moments: tuple[int, ...] = (1, 2)


CASES = {
    "squeezenet": Case("squeezenet1.1", ("fire3", "fire5", "fire9"), 10, 32, (3_200, 100_000)),
    "vgg19": Case("vgg19", None, 1, 2, (16, 64)),
    "vgg19-10": Case("vgg19", None, 10, 2, (16, 64)),
}


class MadeImages(ImageSource):
    """N random images and labels, those of each batch from a seed of its own; none are kept."""

    def __init__(self, num_images: int, pixels: int, classes: int, seed: int = 0) -> None:
        self.name, self.seed, self.classes = f"made-{pixels}px", seed, classes
        self.identity = source_identity("made", self.name, str(seed))
        self.num_images, self.image_shape = num_images, (3, pixels, pixels)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        for number in range(self.num_batches(batch_size)):
            random = torch.Generator().manual_seed((self.seed << 32) + number)
            valid = torch.arange(batch_size) < self.num_images - number * batch_size
            images = torch.rand(batch_size, *self.image_shape, generator=random)
            labels = torch.randint(self.classes, (batch_size,), generator=random)
            yield Batch(images * valid[:, None, None, None], labels * valid, valid)


def one(name: str, count: int, progress: bool = True) -> dict[str, Any]:
    """One row, in this process."""
    import dpmmd
    from dpmmd._memory import Meter, keep_freed_memory

    keep_freed_memory()
    case = CASES[name]
    random = None if case.encoder == "squeezenet1.1" else "random"
    encoder = dpmmd.encoders.load(
        case.encoder, image_size=case.pixels, taps=case.taps, weights=random
    )
    meter = Meter(torch.device("cpu"))
    before = meter.used()
    meter._reset()
    started = perf_counter()
    release = dpmmd.release(
        MadeImages(count, case.pixels, case.classes),
        encoder,
        epsilon=1.0,
        delta=1e-6,
        adjacency="replace-one",
        moments=case.moments,
        num_classes=case.classes if case.classes > 1 else None,
        batch_size=case.batch,
        progress=progress,
    )
    seconds = perf_counter() - started
    return {
        "case": name,
        "encoder": case.encoder,
        "taps": len(encoder.taps),
        "pixels": case.pixels,
        "dim": encoder.dim,
        "classes": case.classes,
        "moments": case.moments,
        "batch": case.batch,
        "images": count,
        "before": before,
        "peak": meter.peak(),
        "sums": 8 * (release.sums.numel() + (case.classes if case.classes > 1 else 0)),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = [
        "| encoder, taps | D | classes | batch | images | int64 sums | peak | beyond | images/s |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in rows:
        gib = [f"{v / 2**30:.2f}" for v in (r["sums"], r["peak"], r["peak"] - r["sums"])]
        lines.append(
            f"| {r['encoder']}, {r['taps']} | {r['dim']:,} | {r['classes']} | {r['batch']} | "
            f"{r['images']:,} | {' | '.join(gib)} | {r['images'] / r['seconds']:.3g} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--row", nargs=2, metavar=("CASE", "IMAGES"))
    parser.add_argument("--update", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(one(arguments.row[0], int(arguments.row[1]))))
        return
    kept = Kept(RESULTS)
    if arguments.update:
        update(arguments.update, BEGIN, END, table(kept.rows))
        return
    wanted = {(name, n): (name, n) for name, case in CASES.items() for n in case.counts}
    kept.measure("benches.release_memory", wanted, lambda r: (r["case"], r["images"]), table)


if __name__ == "__main__":
    main()
