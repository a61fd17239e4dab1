"""The probe without a GPU: every section on a played device, and what it makes of times."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from benches import table
from benches.backends import ON_CPU, compiled
from benches.gpu import __main__ as main
from benches.gpu import inputs, probe, report, steps
from benches.gpu.budget import Budget
from benches.gpu.measure import Row
from benches.gpu.probe import (
    answers,
    convolutions,
    cores,
    host,
    ladder,
    one_pass,
    parts,
    program,
    recipe,
    sizes,
    step,
    variants,
)
from benches.gpu.probe.rungs import Rungs
from dpmmd import recipe as recipes
from dpmmd.data.named import NAMED
from dpmmd.generators.layers import UpsampledConv
from tests.benches.test_bench_gpu import Played
from tests.core import interpreted

ROOT = Path(__file__).resolve().parents[2]
CARD = "probe-nvidia-played-80gb.json"


@pytest.fixture
def rungs() -> Rungs:
    return Rungs(Played(), Budget(600), sizes.TINY, compiled(ON_CPU))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs sections on a played device, with the CPU's core in the place of a GPU's."""
    monkeypatch.setattr(program, "ON_GPU", ON_CPU)

    def go(*sections: str) -> tuple[int, dict[str, Any]]:
        wanted = ["--sections", ",".join(sections)] if sections else []
        options = main.arguments(["--probe", "--tiny", *wanted, "--results", str(tmp_path)])
        code = program.run(Played(), options)
        return code, json.loads((tmp_path / CARD).read_text("utf-8"))

    return go


def rows_of(results: dict[str, Any], operation: str) -> dict[str, dict[str, Any]]:
    return {r["variant"]: r for r in results["rows"] if r["operation"] == operation}


# The whole of it ----------------------------------------------------------------------------------


QUICK = ("ceilings", "ladder32", "ladder64", "parts", "one_pass", "cores", "convolutions")
OPERATIONS = {
    "ceilings": (parts.COPY, parts.PRODUCT, parts.LAUNCH),
    "ladder32": (step.OPERATION,),
    "parts": (parts.PART,),
    "one_pass": (one_pass.ONE_PASS,),
    "cores": (cores.LAUNCHED,),
    "host": (host.HOST, host.LOOP, steps.TRAIN),
    "recipe": (recipe.RECIPE,),
    "convolutions": (convolutions.OPERATION,),
}


@pytest.mark.parametrize(
    "sections",
    [QUICK, pytest.param(("host", "recipe", "profile", "compiled"), marks=pytest.mark.long)],
)
def test_every_section_on_a_played_device(
    run: Any, sections: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    code, results = run(*sections)
    assert code == 0, results["errors"]
    assert not any(row.get("note") for row in results["rows"]), results["rows"]
    assert set(results["seconds"]) == set(sections)
    for section in sections:
        for operation in OPERATIONS.get(section, ()):
            assert rows_of(results, operation), operation
    if "ladder32" in sections:
        whole = rows_of(results, step.OPERATION)
        for name in ("cpu, as it is", ladder.CHOSEN, f"cpu, {ladder.CHOSEN}"):
            assert whole[name]["how"] == "graph"
        for choice, options in variants.CHOICES.items():
            assert {f"{choice}: {o}" for o in options if o != variants.OURS} <= set(whole)
        assert set(results["chosen"]) == {"32", "64"}
        assert "over floor" in capsys.readouterr().out
    else:
        assert rows_of(results, host.LOOP)["cpu"]["how"] == "launches"
        assert all(found[0][0] == "all of them" for found in results["kernels"].values())
        assert "compiled: all of it: a dry run does not compile" in results["skipped"]


@pytest.mark.long
def test_a_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benches.gpu", "--probe", "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "DRY RUN" in done.stdout
    results = table.load(tmp_path / "probe-dry-run.json")
    known = {*program.RUN, *sizes.TINY.steps}
    assert list(results["seconds"]) == [name for name in probe.SECTIONS if name in known]
    assert str(ROOT) not in json.dumps(results)


def test_a_section_that_raises_loses_itself_alone(
    run: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    saved: list[list[str]] = []

    def fails(_: Any) -> None:
        saved.append(list(json.loads((tmp_path / CARD).read_text("utf-8"))["seconds"]))
        raise KeyError("no such thing")

    monkeypatch.setitem(program.RUN, "one_pass", fails)
    code, results = run("ceilings", "one_pass", "cores")
    assert code == 1
    assert saved == [["ceilings"]]  # each is written as it ends
    assert "one_pass: the rest of it: KeyError: 'no such thing'" in results["skipped"]
    assert rows_of(results, parts.COPY)
    assert rows_of(results, cores.LAUNCHED)
    assert list(results["seconds"]) == ["ceilings", "one_pass", "cores"]


def test_a_variant_that_raises_is_a_row_with_a_note(
    rungs: Rungs, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no such kernel")

    def no_memory() -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    given = "op", "shape", "float32", {"bad": fails, "big": no_memory, "good": lambda: lambda: 1}
    assert set(rungs(*given, choice="a")) == {"good"}
    notes = {row["variant"]: row["note"] for row in rungs.rows}
    assert notes == {"bad": "RuntimeError: no such kernel", "big": "out of memory", "good": ""}
    assert {row["choice"] for row in rungs.rows} == {"a"}
    assert rungs.errors == ["op, shape, float32, bad: RuntimeError: no such kernel"]
    rungs(*given, theirs=True)
    rungs.host("op", "shape", "launched", lambda: fails)
    assert len(rungs.errors) == 2
    assert rungs.rows[-1]["note"] == "RuntimeError: no such kernel"
    # A trial of the ladder's that fails is no error of the library's; a loss of the library's is.
    network = step.network_of(rungs, (32, 2))
    monkeypatch.setattr(steps.Step, "__call__", fails)
    rungs.errors.clear()
    assert network.time("x", {"upsampled convolution": "einsum"}) is None
    assert not rungs.errors
    assert network.time("x", {}, "cpu") is None
    assert len(rungs.errors) == 1


def test_no_time_left() -> None:
    rungs = Rungs(Played(), Budget(0), sizes.TINY, compiled(ON_CPU))
    assert rungs("op", "shape", "float32", {"a": lambda: lambda: 1}) == {}
    rungs.host("op", "shape", "b", lambda: lambda: 1)
    assert not rungs.rows
    assert rungs.budget.skipped == ["no time left"]


def test_the_sections_fit_in_less_than_eight_minutes() -> None:
    options = main.arguments(["--probe"])
    assert options.sections == list(probe.SECTIONS)
    assert sum(probe.SECTIONS.values()) + 10 <= options.budget <= 470
    assert set(probe.SECTIONS) == {*program.RUN, *sizes.FULL.steps}
    assert set(sizes.FULL.steps.values()) == set(answers.FLOORS)
    with pytest.raises(SystemExit):
        main.arguments(["--probe", "--sections", "checks"])


def test_the_recipe_of_the_probe_is_that_of_the_package() -> None:
    theirs, _ = recipes.read("fashion-eps1")
    image_size, batch = sizes.FULL.recipe
    assert (theirs.encoder.name, theirs.encoder.image_size) == ("squeezenet1.1", image_size)
    assert (theirs.train.batch_size, theirs.train.estimator) == (batch, recipe.ESTIMATOR)
    assert (theirs.data.num_classes, tuple(theirs.release.moments)) == (
        recipe.CLASSES,
        recipe.MOMENTS,
    )
    _, side, _ = NAMED[theirs.data.source].shape or (0, 0, 0)
    assert (theirs.generator.base_channels, side) == (recipe.WIDTH, recipe.PIXELS)


def test_a_dry_run_is_written_nowhere_near_the_measurements(tmp_path: Path) -> None:
    found = {"machine": {"dry_run": True}, "rows": []}
    for folder in (report.RESULTS, report.RESULTS / "memory"):
        with pytest.raises(ValueError, match="dry run"):
            report.save(folder, found, report.PROBE)
    report.save(tmp_path, found, report.PROBE)
    assert (tmp_path / "probe-dry-run.json").exists()
    assert table.measured(tmp_path) == []  # the tables do not take it for a benchmark


# How a step is done -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(variants.CHOICES["upsampled convolution"]))
def test_every_upsampled_convolution_is_the_same_function(name: str) -> None:
    torch.manual_seed(0)
    layer, x = UpsampledConv(3, 5).double(), torch.randn(2, 3, 4, 6, dtype=torch.float64)
    call = variants.within({"upsampled convolution": name}, lambda: layer(x))
    expected = F.conv2d(F.interpolate(x, scale_factor=2), layer.weight, padding=1)
    torch.testing.assert_close(call(), expected, rtol=0, atol=1e-13)


def test_what_a_step_changes_it_sets_back() -> None:
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [s.allow_tf32 for s in switches], UpsampledConv.forward
    for choice, options in variants.CHOICES.items():
        for option in options:

            def fails() -> None:
                raise KeyError

            with pytest.raises(KeyError):
                variants.within({choice: option}, fails)()
            assert ([s.allow_tf32 for s in switches], UpsampledConv.forward) == before


def test_the_generator_s_precision(rungs: Rungs) -> None:
    """Under autocast convolutions compute in bfloat16, and images are float32 all the same."""
    network = step.network_of(rungs, (32, 2))
    y = torch.zeros(2, dtype=torch.int64)
    for precision, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        found = network.step({variants.PRECISION: precision})
        seen: list[torch.dtype] = []
        found.generator.to_image.register_forward_hook(  # type: ignore[union-attr]
            lambda *args, seen=seen: seen.append(args[-1].dtype)
        )
        assert found.images(y).dtype == torch.float32
        assert seen == [dtype]
    loops = network.step({variants.OPTIMIZER: variants.FOREACH}).optimizer
    assert loops.param_groups[0]["foreach"]


def test_a_search_of_algorithms_has_a_thread_of_its_own(rungs: Rungs) -> None:
    """PyTorch keeps an algorithm a shape and thread: elsewhere the search would change nothing."""
    seen: list[tuple[bool, bool]] = []

    class Told(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            at_home = threading.current_thread() is threading.main_thread()
            seen.append((at_home, torch.backends.cudnn.benchmark))
            return grad

    def make() -> Any:
        x = torch.ones(1, requires_grad=True)
        return lambda: torch.autograd.grad(Told.apply(x).sum(), x)

    before = torch.backends.cudnn.benchmark
    for searched in (False, True):
        seen.clear()
        rungs("op", "shape", "float32", {"a": make}, searched=searched)
        assert set(seen) == {(not searched, searched or before)}
    assert torch.backends.cudnn.benchmark == before


def test_the_ladder_takes_what_saves_time(rungs: Rungs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are played: each option saves what it saves, on top of those that were taken."""
    saves = {("generator", "bfloat16"): 3.0, ("generator", "tf32"): 1.0, ("Adam", "foreach"): 0.05}
    saves |= {
        ("max pool", "bytes"): 1.0,
        ("encoder's ReLU", "with the convolution"): -2.0,
    }
    tried: list[dict[str, str]] = []

    def time(_: Any, variant: str, how: Any, loss: str = step.FLOOR, **more: Any) -> float:
        tried.append(dict(how))
        seconds = 10.0 - sum(saves.get(pair, 0.0) for pair in how.items())
        seconds += {step.FLOOR: 0.0, "cpu": 1.0, "cuda": 0.5}[loss] + more.get("average", 0)
        rungs.measure.keep(Row(step.OPERATION, "vgg19 32 px, n=128, K=10", "", variant, seconds))
        rungs.rows[-1].update(more)
        return seconds

    monkeypatch.setattr(step.Network, "time", time)
    rungs.cores[:] = ["cpu", "cuda"]
    ladder.ladder(rungs, (32, 2))
    # Adam saves less than a hundredth, and the other one costs time.
    assert rungs.chosen[32, 2] == {"generator": "bfloat16", "max pool": "bytes"}
    assert {"generator": "bfloat16", "Adam": "foreach"} in tried
    ladder.brief_ladder(rungs, (64, 1))
    assert rungs.chosen[64, 1] == rungs.chosen[32, 2]
    (cells,) = answers._steps(rungs.rows)
    found = dict(zip(answers._STEPS, cells, strict=True))
    assert (found["as it is"], found["fastest"], found["with average"]) == (
        "10.50 s",
        "6.50 s",
        "7.50 s",
    )
    assert found["over floor"] == "8125.00"
    assert found["loss, fastest"] == "+500.000 ms"
    assert found["combination"] == "cuda; generator bfloat16, max pool bytes"


# Answers ------------------------------------------------------------------------------------------


def test_where_one_core_overtakes_the_other() -> None:
    def row(size: float, core: str, seconds: float) -> dict[str, Any]:
        head = {"operation": cores.LAUNCHED, "shape": f"{size:g}", "variant": core}
        return head | {"features": size * 1e9, "seconds": seconds}

    times = {0.1: (1.0, 2.0), 0.4: (3.0, 4.0), 1.6: (4.0, 3.0)}
    rows = [
        row(size, *pair) for size, both in times.items() for pair in zip("ab", both, strict=True)
    ]
    found = list(answers._launched(rows))
    assert [cells[2] for cells in found] == ["a", "a", "a = b", "b"]
    assert found[2][0] == "0.80 GB"
    assert found[0][3] == "2.00"


def test_when_compiling_has_paid() -> None:
    def row(before: float, seconds: float) -> dict[str, Any]:
        more = {"compiling": 20.0, "modules": ["generator"], "before": before}
        return {"shape": "s", "seconds": seconds} | more

    found = list(answers._compiling([row(0.004, 0.003), row(0.004, 0.005)]))
    assert [cells[-1] for cells in found] == ["20000 steps", "never"]


def test_the_floors_count_what_a_step_multiplies() -> None:
    """Of the encoder forward and by its input, of the generator also by its weights."""
    flop_counter = pytest.importorskip("torch.utils.flop_counter")
    (pixels, batch), (gflop, _) = next(iter(answers.FLOORS.items()))
    with torch.device("meta"):
        generator = steps.generator_of(inputs.FULL, pixels, torch.device("meta"))
        z, y = torch.randn(batch, 100), torch.zeros(batch, dtype=torch.int64)
        counter = flop_counter.FlopCounterMode(display=False)
        with counter, torch.no_grad():
            generator(z, y)
    counted = 3 * counter.get_total_flops()
    channels, side = 3, pixels
    for outputs, count in zip(sizes.FULL.blocks, (2, 2, 4, 4, 4), strict=True):
        for _ in range(count):
            shape = convolutions.Convolution(
                batch, channels, outputs, side, False, torch.float32, False
            )
            counted, channels = counted + 2 * shape.flops, outputs
        side //= 2
    assert counted == pytest.approx(1e9 * gflop, rel=0.02)


@pytest.mark.long
@pytest.mark.skipif(interpreted.HINDRANCE is not None, reason=interpreted.HINDRANCE or "")
def test_sections_with_interpreted_kernels() -> None:
    """With the core that a GPU has, and what it does in one pass."""
    code = """if True:
        from benches.gpu.budget import Budget
        from benches.gpu.probe import cores, one_pass, sizes
        from benches.gpu.probe.rungs import Rungs
        from tests.benches.test_bench_gpu import Played
        rungs = Rungs(Played(), Budget(600), sizes.TINY, ["triton"])
        one_pass.one_pass(rungs)
        cores.cores(rungs)
        assert not rungs.errors, rungs.errors
        print(len(rungs.rows), "rows")
    """
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "rows" in done.stdout, done.stderr
