"""The README's benchmark table is what the committed results say, and the table's arithmetic."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benches import harness, table
from benches.gpu import report
from benches.harness import COPY, READ, READ_READ_WRITE, Row

ROOT = Path(__file__).parents[2]
FORWARD = "mean_embedding, forward"
BOTH = "mmd_loss, forward + backward"
SHAPE = "VGG19 32 px, n=64, K=1, moments 1"


def row(variant, seconds, *, operation=FORWARD, ours=False, shape=SHAPE, **fields):
    fields = {"fastest": seconds, "rounds": 5, "bytes": 80_000_000, **fields}
    return asdict(Row(operation, shape, "float32", variant, ours, seconds, **fields))


@pytest.fixture
def results():
    """Times in ms: 4 against 60 (eager) and 30 (compile); read 2, copy 4."""
    rows = [
        row("eager", 0.060, error=1e-6),
        row("compile", 0.030),
        row("cpu", 0.004, ours=True, error=2e-8, peak_bytes=3_000_000),
        row(READ, 0.002),
        row(COPY, 0.004, bytes=160_000_000),
        asdict(Row(FORWARD, SHAPE, "bfloat16", "cpu", True, 0.001, 0.001, 5, 40_000_000)),
        row("cpu", 0.010, operation=BOTH, ours=True, fastest=0.008, d_vectors=2.5),
        row(READ_READ_WRITE, 0.005, operation=BOTH),
        asdict(Row(BOTH, SHAPE, "float32", "eager", False, note="needs more than 6 GiB")),
    ]
    return {"machine": {**harness.machine(), "load": 0.1}, "rows": rows}


@pytest.mark.parametrize("name", ["README.md", "benches/README.md"])
def test_tables_are_generated_from_the_committed_results(name):
    readme = (ROOT / name).read_text("utf-8")
    assert table.updated(readme) == readme, f"run: python -m benches.table --update {name}"
    files = table.measured(ROOT / "benches" / "results")
    for file in files:
        results = table.load(file)
        if report.is_gpu(results):
            assert file.stem == report.kind(results["machine"])
            assert not report.is_dry(results)
            continue
        assert file.stem == harness.kind(results["machine"])
        assert set(results["machine"]) == set(harness.machine())
        for ours in (r for r in results["rows"] if r["ours"] and name != "README.md"):
            assert f"| {ours['operation']} | {ours['shape']} | {ours['dtype']} |" in readme


def test_ratios(results):
    text = table.text(results)
    ours = next(line for line in text.splitlines() if line.startswith(FORWARD))
    # 80 MB in 4 ms: 20 GB/s, half of the copy's 160 MB in 4 ms.
    assert ours.split("  cpu  ")[1].split() == [
        "4.00", "15.00", "7.50", "20.0", "50%", "2.0e-08", "3",
    ]  # fmt: skip
    assert text.index("  cpu  ") < text.index("  eager  ") < text.index(READ)
    assert "needs more than 6 GiB" in text
    assert "disturbed" not in text
    results["machine"]["load"] = 3.0
    assert "disturbed" in table.text(results)


def test_targets(results):
    found = {name: rest for name, *rest in table.targets(results)}
    assert found == {
        "forward, against eager": [pytest.approx(15), pytest.approx(15), "at least 15", True],
        "forward, against torch.compile": [
            pytest.approx(7.5),
            pytest.approx(7.5),
            "at least 8",
            False,
        ],
        "forward, over reading the features once": [
            pytest.approx(2),
            pytest.approx(2),
            "at most 2",
            True,
        ],
        "forward + backward, over two reads + one write": [
            pytest.approx(2),
            pytest.approx(1.6),
            "at most 1.8",
            False,
        ],
        "extra memory of forward + backward, in D-vectors for each moment and class": [
            2.5,
            2.5,
            "at most 4",
            True,
        ],
    }


def test_every_target_is_measured_by_a_benchmark():
    """The names in TARGETS are those of the suites' cases, so that no row falls silent."""
    from benches import bench_mean_embedding, bench_mmd_loss, bench_sums

    shapes = {
        FORWARD: bench_mean_embedding.CASES,
        BOTH: bench_mmd_loss.CASES,
        "release, integer class sums": bench_sums.CASES,
    }
    for _, operation, shape, other, _ in table.TARGETS:
        if operation in shapes:
            (case,) = [
                c
                for c in shapes[operation]
                if c.shape == f"VGG19 32 px, n=64, {shape}" and c.dtype_name == "float32"
            ]
            assert case.compiled or other != "compile"


def test_save_and_load(results, tmp_path):
    path = tmp_path / "folder" / "machine.json"
    results["rows"][0]["seconds"] = 0.123456789
    table.save(path, results)
    loaded = table.load(path)
    assert loaded["machine"] == results["machine"]
    assert loaded["rows"][0]["seconds"] == 0.1235
    assert "note" not in loaded["rows"][0]
    assert [line for _, *line in table.targets(loaded)][1:]
    assert len(path.read_text().splitlines()) == len(results["rows"]) + 5
    assert str(Path.home()) not in json.dumps(loaded)


def test_the_short_table_has_the_measurements_with_a_target(results, tmp_path):
    table.save(tmp_path / "a.json", results)
    new = table.updated(f"{table.SHORT_BEGIN}\n{table.SHORT_END}\n", tmp_path)
    assert f"| {FORWARD} | {SHAPE} | 4.00 | 15.00 | 7.50 |" in new
    assert "bfloat16" not in new


def test_update_needs_the_markers(results, tmp_path):
    table.save(tmp_path / "a.json", results)
    document = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    new = table.updated(document, tmp_path)
    assert new.startswith(f"before\n{table.BEGIN}\n{results['machine']['cpu']}")
    assert new.endswith(f"{table.END}\nafter\n")
    assert "old" not in new
    assert table.updated(new, tmp_path) == new
    for broken in ("", table.BEGIN, document + document):
        with pytest.raises(ValueError, match="expected one line"):
            table.updated(broken, tmp_path)


def test_floors_move_what_they_say():
    import torch

    features = [torch.rand(2, 8, 4, 4), torch.rand(2, 3, 5, 5).bfloat16()]
    wanted = harness.floors(features, backward=True)
    size = 2 * 8 * 16 * 4 + 2 * 3 * 25 * 2
    assert [floor.bytes for floor in wanted.values()] == [size, 2 * size, 3 * size]
    for floor in wanted.values():
        floor()
    copy = wanted[COPY]
    assert all(torch.equal(a, b) for a, b in zip(copy._out, copy._flat, strict=True))
    assert not wanted[READ]._out


def test_kind_is_a_file_name():
    machine = {"cpu": "AMD EPYC", "cores": 2, "freed_memory": "kept"}
    assert harness.kind(machine) == "amd-epyc-2-cores-memory-kept"
    machine = {"cpu": "Intel(R) Xeon(R) @ 2.10GHz", "cores": 8, "freed_memory": "returned"}
    assert harness.kind(machine) == "intel-r-xeon-r-2-10ghz-8-cores"


def test_peak_memory_is_that_of_the_call():
    import torch

    size = 64 << 20
    kept = torch.ones(size // 4)  # there before: not counted
    peak = harness.peak_bytes(lambda: torch.ones(size // 4) + kept)
    if peak is None:
        pytest.skip("no /proc/self/clear_refs on this system")
    assert abs(peak - 2 * size) <= 8 << 20  # pages, and what other threads do
    assert harness.peak_bytes(lambda: None) < 4 << 20
