"""A release of any number of images takes the memory of its sums and of one batch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benches import release_memory as bench

DOCUMENT = Path(bench.__file__).parent.parent / "docs" / "MEMORY.md"


def test_made_images_are_the_same_at_every_call_and_padded() -> None:
    source = bench.MadeImages(7, 8, 3)
    first, again = (list(source.batches(4)) for _ in range(2))
    assert [b.valid.tolist() for b in first] == [[True] * 4, [True] * 3 + [False]]
    assert not first[1].images[3].any()
    for a, b in zip(first, again, strict=True):
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
    assert not torch.equal(first[0].images, first[1].images)
    assert torch.equal(next(source.part(4, range(1, 2))).images, first[1].images)


def test_the_documented_table_is_the_committed_one() -> None:
    (path,) = bench.RESULTS.glob("*.json")
    rows = json.loads(path.read_text())["rows"]
    assert f"{bench.BEGIN}\n{bench.table(rows)}\n{bench.END}" in DOCUMENT.read_text()
    assert {r["case"] for r in rows} == set(bench.CASES)
    assert max(r["images"] for r in rows) == 100_000
    for name in bench.CASES:
        found = [r for r in rows if r["case"] == name]
        assert {r["images"] for r in found} == set(bench.CASES[name].counts)
        assert all(r["peak"] - r["sums"] < 2 << 30 for r in found)
        assert max(r["peak"] for r in found) - min(r["peak"] for r in found) < 200 << 20


NOISED = """
import torch, dpmmd
from benches.release_memory import MadeImages
from dpmmd._memory import Meter
from tests.conftest import small_encoder
encoder = small_encoder()
meter = Meter(torch.device("cpu"))
def release(num_classes):
    return dpmmd.release(MadeImages(4, 16, 2), encoder, epsilon=1.0, delta=1e-6,
        adjacency="replace-one", num_classes=num_classes, batch_size=4, progress=False,
        insecure_test_noise=lambda n, sd: torch.ones(n, dtype=torch.int64).numpy())
release(2)  # what is loaded late is loaded now
meter.settle()
before = meter.used()
peak, _, made = meter(lambda: release((1 << 24) // encoder.dim))
print(8 * made.sums.numel(), peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads /proc")
def test_the_noise_takes_no_memory_of_the_size_of_the_sums() -> None:
    """2^24 numbers: 128 MiB of sums and 64 MiB of what is released."""
    command = [sys.executable, "-c", NOISED]  # a process of its own has no holes to fill
    root = Path(__file__).parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    sums, taken = map(int, done.stdout.split())
    assert sums > 120 << 20
    # Beside sums and result: pieces of 2^22 numbers, drawn and multiplied in float64.
    assert taken < 1.5 * sums + 3 * (8 << 22) + (24 << 20)
