"""The GPU benchmark without a GPU: its program by a dry run, its logic with a played device.

Only what stands in `benches.gpu.device.Cuda` is not run here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import site
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from benches import table
from benches.backends import ON_GPU, PLAIN, compiled
from benches.gpu import (
    __main__ as program,
)
from benches.gpu import (
    ambient,
    checks,
    device,
    inputs,
    measure,
    operations,
    released,
    report,
    sanitizer,
    steps,
    sweep,
)
from benches.gpu.budget import Budget, OutOfTimeError, Section
from dpmmd import backends, functional, injection
from dpmmd._contract.protocol import Core, Saved
from dpmmd._cores import named
from dpmmd._ops import matching
from tests.core import conformance, interpreted

ROOT = Path(__file__).resolve().parents[2]
LIBRARY = inputs.library


class Played(device.Host):
    """A CPU that passes for a CUDA device: a graph runs its function again, memory is made up."""

    dry = False

    def __init__(self) -> None:
        super().__init__()
        self.captures = 0

    def capture(self, run: Any) -> Any:
        self.captures += 1
        with backends.captured():  # as `Cuda` does, by which the library chooses
            run()
        return run

    def allocated(self) -> int:
        return 1000

    def peak(self, run: Any) -> int:
        run()
        return 3000

    def describe(self) -> dict[str, Any]:
        return {
            "gpu": "NVIDIA Played 80GB", "multiprocessors": 1, "memory_gb": 80, "l2_mb": 50,
            "driver": "1.2", "cuda": "13.0", "torch": "2.11.0", "triton": "", "python": "3.12.3",
        }  # fmt: skip


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Runs the program on a played device, with the CPU's core in the place of CUDA's."""
    missing = {"triton": "ValueError: not here"}
    monkeypatch.setattr(inputs, "library", lambda _: (["torch", "cpu"], missing))

    def go(*sections: str, on: Any = None) -> tuple[int, dict[str, Any]]:
        arguments = ["--tiny", "--sections", ",".join(sections or program.SECTIONS)]
        options = program.arguments([*arguments, "--results", str(tmp_path)])
        code = program.run(on or Played(), options)
        return code, json.loads((tmp_path / "nvidia-played-80gb.json").read_text("utf-8"))

    return go


def rows_of(results: dict[str, Any], operation: str) -> dict[str, dict[str, Any]]:
    return {r["variant"]: r for r in results["rows"] if r["operation"] == operation}


def test_a_step_injects_where_its_name_says_so() -> None:
    """The library, which may choose for itself where a graph is captured, is told."""
    timed = steps.Steps(measure.Measure(Played(), Budget(60)), inputs.TINY, (32, 2), "float32")
    made = timed.losses(["cpu"], set())
    found = {name: make().inject for name, make in made.items() if name != steps.FLOOR}
    assert {name: name.endswith(steps.INJECTED) for name in found} == found
    assert set(found.values()) == {True, False}


# The whole program -------------------------------------------------------------------------------


@pytest.mark.skipif(interpreted.HINDRANCE is not None, reason=interpreted.HINDRANCE or "")
def test_a_dry_run_of_everything(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benches.gpu", "--device", "cpu", "--tiny"]
    done = subprocess.run(
        [*command, "--results", str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1", "PATH": os.defpath},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = table.load(tmp_path / "dry-run.json")
    assert not results["checks"]["failed"]
    assert results["checks"]["passed"] > 30
    assert not results["errors"]
    assert {"triton", "torch"} <= set(rows_of(results, operations.LOSS))
    wanted = [*operations.BYTES, operations.FORWARD, operations.BACKWARD, operations.ESTIMATE]
    wanted += [operations.SUMS, steps.STEP, steps.TRAIN, released.RELEASE, released.WHOLE, "copy"]
    for operation in wanted:
        assert rows_of(results, operation)["triton" if operation != "copy" else "copy"]["seconds"]
    # Neither the program nor the tables take it for a measurement.
    assert "DRY RUN" in done.stdout
    assert all(kept is None for *_, kept in report.targets(results))
    document = f"{table.GPU_BEGIN}\n{table.GPU_END}\n"
    with pytest.raises(ValueError, match="dry run"):
        table.updated(document, tmp_path)
    with pytest.raises(ValueError, match="dry run"):
        report.save(report.RESULTS, results)
    assert str(ROOT) not in json.dumps(results)


def test_a_run_on_a_played_device(
    run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def authors(generator: Any, target: Tensor, batch: int, classes: int) -> Any:
        seen.append((target.shape[1], batch, classes))
        return lambda: seen.append(torch.backends.cudnn.allow_tf32)

    def no_compiler(*_: Any, **__: Any) -> Any:
        def fails(*_: Any) -> None:
            raise RuntimeError("no compiler")

        return fails

    seen: list[Any] = []
    before = torch.backends.cudnn.allow_tf32
    monkeypatch.setattr(steps, "AuthorsStep", authors)
    monkeypatch.setattr(torch, "compile", no_compiler)
    sizes = replace(inputs.TINY, compile=True, authors=True, step=((32, 2), (64, 1)))
    monkeypatch.setattr(inputs, "TINY", sizes)
    played = Played()
    sections = ("checks", "copy", "kernels", "loss", "steps")
    code, results = run(*sections, on=played)
    assert code == 0, results["errors"] + list(results["checks"]["failed"].items())
    assert played.captures > 3
    assert set(results) >= {"machine", "rows", "checks", "sanitizer", "skipped", "seconds"}
    captured = rows_of(results, steps.CAPTURED)
    assert captured["cpu"]["how"] == captured[steps.FLOOR]["how"] == "graph"
    assert "torch" not in captured
    of_steps = [r for r in results["rows"] if r["operation"] == steps.CAPTURED and r["seconds"]]
    for words in ("32 px, n=2,", "64 px, n=1,"):  # of all sizes, not of the first alone
        assert {r["variant"] for r in of_steps if words in r["shape"]} >= {"cpu", steps.FLOOR}
    assert set(steps.AUTHORS) <= set(rows_of(results, steps.STEP))
    assert {(2, 2, 2), (2, 1, 2), True, False} == set(seen)
    assert torch.backends.cudnn.allow_tf32 == before
    assert rows_of(results, operations.LOSS)["compile"]["note"] == "RuntimeError: no compiler"
    assert rows_of(results, f"{operations.LOSS}, replayed")["cpu"]["how"] == "graph"
    assert rows_of(results, steps.STEP)["cpu"]["peak_bytes"] == 2000
    assert "not here" in str(results["skipped"])
    assert "kernels: all of it: no Triton" in results["skipped"]
    assert list(results["seconds"]) == list(sections)
    output = capsys.readouterr().out
    assert "NVIDIA Played 80GB" in output
    assert "not measured" in output


def test_cores_are_replayed_where_a_graph_can_hold_them(run: Any) -> None:
    code, results = run("cores")
    assert code == 0, results["errors"]
    for operation in (operations.FORWARD, operations.ESTIMATE):
        rows = rows_of(results, operation)
        assert (rows["torch"]["how"], rows["cpu"]["how"]) == ("launches", "graph"), operation
    assert {r["how"] for r in rows_of(results, operations.BACKWARD).values()} == {"launches"}
    assert {v: r["how"] for v, r in rows_of(results, operations.SUMS).items()} == {"cpu": "graph"}


def test_kernels_are_replayed_where_the_device_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """What they compute is for `checks`: here they are played, and asked for as on a GPU."""
    pytest.importorskip("triton")
    from dpmmd.kernels import class_sums, gradient, row_dots, row_statistics

    like = inputs.case(inputs.TINY, 32, torch.float32)
    vector = like.target()
    statistics = (Saved(vector, vector, vector), vector)
    for module, name, result in (
        (row_statistics, "row_statistics", statistics), (row_statistics, "row_statistics_into", 0),
        (class_sums, "class_sums_into", 0), (row_dots, "row_dots", vector),
        (row_dots, "row_dots_into", 0), (gradient, "gradient_into", 0),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, lambda *_, result=result, **__: result)
    for on, broken, how in (
        (Played(), set(), "graph"),
        (device.Host(), set(), "launches"),
        (Played(), {("triton", "graph")}, "launches"),  # its capture failed a check
    ):
        timed = measure.Measure(on, Budget(60), (1, 1), 0.0)
        operations.pieces(timed, inputs.TINY, broken)
        assert {row["operation"] for row in timed.rows} == set(operations.BYTES)
        assert {row["how"] for row in timed.rows} == {how}
        assert ("no CUDA graphs" in timed.rows[0]["note"]) == on.dry


def test_a_release_is_measured_without_plain_torch(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "TINY", replace(inputs.TINY, precisions=("float32", "tf32")))
    code, results = run("release")
    assert code == 0, results["errors"]
    rows = [(r["operation"], r["dtype"], r["variant"]) for r in results["rows"]]
    sums, whole = released.RELEASE, released.WHOLE
    assert rows == [
        (sums, "float32", released.ALONE), (sums, "float32", "cpu"),
        (sums, "tf32", released.ALONE), (sums, "tf32", "cpu"),
        (whole, "float32", "cpu"), (whole, "tf32", "cpu"),
    ]  # fmt: skip
    assert all(r["seconds"] for r in results["rows"] if r["operation"] == sums)
    # Whole, it is a difference of two times, which a disturbance may make 0.
    assert not any(r.get("note") for r in results["rows"])


def test_wrong_use(capsys: pytest.CaptureFixture[str]) -> None:
    for bad in (["--device", "cpu"], ["--sections", "chekcs"], ["--probe", "--sweep"]):
        with pytest.raises(SystemExit) as stopped:
            program.main(bad)
        assert stopped.value.code == 2
    dry = ["--device", "cpu", "--tiny", "--results"]
    environment = dict(os.environ)
    try:
        for folder in (report.RESULTS, report.RESULTS / "memory"):
            assert program.main([*dry, str(folder)]) == 2
        if not torch.cuda.is_available():
            assert program.main([]) == program.main(["--probe"]) == 2
    finally:
        os.environ.clear()
        os.environ.update(environment)
    errors = capsys.readouterr().err
    assert errors.count("not for dry runs") == 2
    if not torch.cuda.is_available():
        assert errors.count("no CUDA device") == 2
        assert errors.count("`python3 -m benches.gpu --probe --device cpu --tiny`") == 1


# Checks that can fail ----------------------------------------------------------------------------


def test_a_wrong_result_is_an_error_and_is_not_timed(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = functional.mean_embedding

    def wrong(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        means, counts = right(*args, **options)
        return means * (1 + 1e-5), counts

    monkeypatch.setattr(functional, "mean_embedding", wrong)
    code, results = run("checks", "copy", "loss", "cores")
    assert code == 1
    failed = results["checks"]["failed"]
    assert any("torch, mean_embedding" in name for name in failed)
    assert all("error" in why for why in failed.values())
    assert set(rows_of(results, operations.LOSS)) == {"eager"}
    assert not rows_of(results, operations.FORWARD)
    assert rows_of(results, operations.SUMS)["cpu"]["seconds"]  # the rest goes on
    assert rows_of(results, "copy")


def test_graphs_and_many_elements() -> None:
    checks.graph(Played(), "torch", torch.float32)
    checks.huge(torch.device("cpu"), "torch", 2048, 3)

    class Stale(Played):
        """Replays what was computed when it was captured."""

        def capture(self, run: Any) -> Any:
            result = [t.clone() for t in run()]
            return lambda: result

    with pytest.raises(checks.Wrong, match="the replay differs"):
        checks.graph(Stale(), "torch", torch.float32)
    check = checks.Check(
        "torch", "graph", "", lambda: checks.graph(device.Host(), "torch", torch.float32)
    )
    assert checks.one(check) == "cannot be captured: a CPU has no CUDA graphs"


def test_the_loss_module_is_compared_with_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    checks.module(cpu, "cpu", "float32", False)
    right = matching.loss

    def wrong(core: Core, features: list[Tensor], *args: Any) -> Tensor:
        if core is named("cpu"):  # the last tap has no gradient
            features = [*features[:-1], features[-1].detach()]
        return right(core, features, *args)

    monkeypatch.setattr(matching, "loss", wrong)
    with pytest.raises(checks.Wrong, match="gradient of the images"):
        checks.module(cpu, "cpu", "float32", False)


def test_every_kind_of_check_is_in_the_full_list() -> None:
    full = checks.all_checks(Played(), list(ON_GPU))
    operations = {c.operation for c in conformance.checks()}
    for backend in compiled(ON_GPU):
        injects = backend in injection.BACKENDS
        wanted = operations if injects else operations - {conformance.INJECTED}
        assert {c.operation for c in full if c.backend == backend} == {*wanted, checks.GRAPH}
        for words in ("2^31", "joint", "ball-per-tap", "bfloat16", "unlabelled", "K=6", "seventy"):
            assert any(words in c.name for c in full if c.backend == backend), words
    short = [c for c in full if c.short and c.backend != PLAIN][::5]
    assert {c.operation for c in short} >= operations - {conformance.IN_PARTS}


def test_shares_and_workers_that_die(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Workers are played by a script: one dies at its second check, one is never done."""
    script = tmp_path / "python"
    script.write_text(
        "#!/bin/sh\n"
        "for last; do :; done; part=${last%%/*}; start=${last##*/}\n"
        'say() { echo "{\\"$1\\": $2, \\"why\\": ${3:-null}}"; }\n'
        "echo some other line; echo 17\n"
        'case "$part$start" in\n'
        "00) say begun 0; say done 0; say begun 2; echo illegal address >&2; exit 139;;\n"
        '02) say begun 4; say done 4 "\\"error 1\\"";;\n'
        "10) say begun 1; say done 1; say begun 3; exec sleep 60;;\n"
        "esac\n"
    )
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    all_of_them = [checks.Check("b", f"o{i}", "n", lambda: None) for i in range(6)]
    end = time.monotonic() + 1.5
    outcome = checks.spread(all_of_them, 2, ["--tiny"], lambda: end - time.monotonic())
    assert outcome.passed == 2
    assert list(outcome.failed) == ["b, o2: n", "b, o4: n"]
    assert "ended with status 139: RuntimeError: illegal address" in outcome.failed["b, o2: n"]
    assert outcome.failed["b, o4: n"] == "error 1"
    assert outcome.broken == {("b", "o2"), ("b", "o4")}
    assert outcome.missed == 2
    assert outcome.unreached == {"b, o3": 1, "b, o5": 1}


def test_a_worker_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise checks.Wrong("no")

    some = [checks.Check("b", "o", str(i), fail if i == 3 else lambda: None) for i in range(5)]
    assert checks.share(some, 1, 2, 1, sys.stdout) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == [{"begun": 3}, {"done": 3, "why": "no"}]
    outcome = checks.here(some, iter([1, 1, 1, 1, 0]).__next__)
    assert (outcome.passed, list(outcome.failed), outcome.missed) == (3, ["b, o: 3"], 1)
    assert outcome.unreached == {"b, o": 1}


def test_checks_that_are_not_reached_have_not_passed(run: Any) -> None:
    """However the run is told: in its table, in its file and in the README's section."""
    some = [checks.Check("b", "o", str(i), lambda: None) for i in range(5)]
    for outcome in (checks.here(some, lambda: 0.0), checks.spread(some, 2, [], lambda: 0.0)):
        assert (outcome.passed, outcome.failed, outcome.missed) == (0, {}, 5)
        assert outcome.unreached == {"b, o": 5}
    found = results()
    found["checks"] = {"passed": 0, "failed": {}, "missed": 5, "unreached": {"b, o": 5}}
    assert "0 passed, 0 failed, 5 not reached\n  not reached  b, o: 5" in report.text(found)
    assert "0 passed, 0 failed, 5 not reached in time." in report.markdown(found)


def test_what_a_worker_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    probed: list[Any] = []

    def library(_: Any, names: Any) -> Any:
        probed.append(names)
        return [n for n in ("torch", "cpu") if n != "torch" or n in names], {}

    monkeypatch.setattr(inputs, "library", library)
    for part in ("sanitize", "0/8/1"):
        assert program.worker(device.Host(), program.arguments(["--tiny", "--part", part])) == 0
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len(lines) >= 2
        assert all(line.get("why") is None for line in lines)
    assert probed == [compiled(ON_GPU), ON_GPU]  # torch's kernels are not sanitized

    def wrong(*_: Any) -> None:
        raise checks.Wrong("no")

    monkeypatch.setattr(conformance.Check, "run", wrong)
    assert program.worker(device.Host(), program.arguments(["--tiny", "--part", "sanitize"])) == 1


# What may be missing, or break -------------------------------------------------------------------


def test_a_backend_that_is_there_and_breaks_is_an_error(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, backend: str, **__: Any) -> None:
        if backend == "triton":
            raise KeyError("no such register")
        if backend == "cuda":
            raise ValueError("backend='cuda': not in this build")

    monkeypatch.setattr(functional, "mean_embedding", broken)
    found, missing = LIBRARY(torch.device("cpu"))
    assert found == ["torch"]
    monkeypatch.setattr(inputs, "library", lambda _: ([], missing))
    code, results = run("copy")
    assert code == 1
    assert results["errors"] == ["backend triton: KeyError: 'no such register'"]
    assert len(results["skipped"]) == 2


def test_out_of_memory_loses_a_row_and_nothing_else(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(operations, "_loss", full)
    monkeypatch.setattr(operations.baselines, "mean_embedding", full)
    code, results = run("copy", "loss", "cores")
    assert code == 0
    assert any("out of memory" in what for what in results["skipped"])
    assert rows_of(results, operations.FORWARD)


def test_a_variant_that_fails_is_noted() -> None:
    budget = Budget(60)
    timed = measure.Measure(Played(), budget, (2, 2), 0.0)

    def fails(*_: Any) -> None:
        raise RuntimeError(f"no compiler in {ROOT}/build\nand more")

    def memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    def slow() -> None:
        time.sleep(5)

    variants = {"compile": [fails], "big": [memory], "slow": [slow], "cpu": [lambda: None]}
    timed("op", "shape", "float32", variants, graph=("cpu",), theirs=("compile",), limit=0.2)
    rows = {row["variant"]: row for row in timed.rows}
    assert rows["compile"]["note"] == "RuntimeError: no compiler in ./build and more"
    assert rows["big"]["note"] == "out of memory"
    assert rows["slow"]["note"] == "not done in 0.2 s"
    assert rows["cpu"]["rounds"] == 2
    assert rows["cpu"]["how"] == "graph"
    assert not timed.errors
    timed("op", "shape", "float32", {"cpu": [fails]})
    assert timed.errors == [
        "op, shape, float32, cpu: RuntimeError: no compiler in ./build and more"
    ]
    dry = measure.Measure(device.Host(), budget, (1, 1), 0.0)
    dry("op", "shape", "float32", {"cpu": [lambda: None]}, graph=("cpu",))
    assert dry.rows[0]["note"] == "no graph: a CPU has no CUDA graphs"


def test_times_are_those_of_one_call() -> None:
    class Clock(Played):
        """Each call of the device takes what the calls in it say; launched, 100 us at least."""

        def __init__(self) -> None:
            super().__init__()
            self.replays: list[float] = []

        def capture(self, run: Any) -> Any:
            def replay() -> None:
                run()
                self.replays.append(sum(spent))
                graph.append(True)

            self.captures += 1
            return replay

        def seconds(self, run: Any) -> float:
            spent.clear()
            graph.clear()
            run()
            return sum(spent) if graph else sum(max(s, 100e-6) for s in spent)

    spent: list[float] = []
    graph: list[bool] = []
    clock = Clock()
    timed = measure.Measure(clock, Budget(60), (3, 3), 0.0)
    variants = {
        "short": [functools.partial(spent.append, 10e-6)] * 2,
        "launched": [functools.partial(spent.append, 10e-6)] * 2,
        "long": [functools.partial(spent.append, 0.25)] * 3,
    }
    timed("op", "shape", "float32", variants, min_bytes=7, graph=("short", "long"))
    short, launched, long = timed.rows
    assert (short["how"], launched["how"], long["how"]) == ("graph", "launches", "graph")
    assert short["seconds"] == pytest.approx(10e-6)
    assert launched["seconds"] == pytest.approx(100e-6)  # the host's
    assert long["seconds"] == pytest.approx(0.25)
    # The short one's graph was too short by what launching takes, and was captured again.
    assert clock.captures == 3
    assert clock.replays[-2] >= 0.99 * measure.GRAPH_SECONDS
    assert measure.sets_of(77_600_000, 50 << 20) == 3
    assert measure.sets_of(5 << 30, 50 << 20) == measure.sets_of(0, 0) == 1


@pytest.mark.parametrize(
    ("script", "expected", "errors"),
    [
        (
            'echo \'{"done": 0}\'; echo "========= ERROR SUMMARY: 0 errors"',
            "1 checks, no errors",
            0,
        ),
        (
            'echo "========= Invalid __global__ read of size 16 bytes"\n'
            'echo "========= ERROR SUMMARY: 3 errors"; exit 86',
            "3 errors, the first: Invalid __global__ read of size 16 bytes",
            2,
        ),
        ('echo "========= Error: Device not supported"; exit 1', "skipped: it refused", 0),
        ("exit 127", "skipped: it ended with status 127", 0),
        ("echo '{\"done\": 0}'; exit 1", "1 checks, some of them fail under it", 2),
        ("echo '{\"done\": 0}'; exec sleep 60", "stopped for want of time after 1 checks", 0),
        ('echo "========= Invalid read"; exec sleep 60', "some errors, the first: Invalid", 2),
    ],
)
def test_the_sanitizer_s_verdicts(tmp_path: Path, script: str, expected: str, errors: int) -> None:
    tool = tmp_path / "sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    end = time.monotonic() + 0.5
    found, wrong = sanitizer.sanitize([], lambda: end - time.monotonic(), str(tool))
    assert set(found) == {"memcheck", "racecheck"}
    assert all(what.startswith(expected) for what in found.values()), found
    assert len(wrong) == errors


def test_no_sanitizer() -> None:
    found, errors = sanitizer.sanitize([], lambda: 1.0, "no-such-tool")
    assert found["memcheck"] == "skipped: no-such-tool is not installed"
    assert not errors


def test_a_bare_checkout(tmp_path: Path) -> None:
    """Nothing is installed but what dpmmd's kernels need: no pydantic, cryptography, dpmmd."""
    for folder in site.getsitepackages():
        for entry in Path(folder).iterdir():
            if not re.match(r"pydantic|cryptography|dpmmd|_*editable|.*\.pth", entry.name, re.I):
                (tmp_path / entry.name).symlink_to(entry)
    code = """if True:
        from benches.gpu import ambient
        print(ambient.prepare() == ambient.prepare() == ["pydantic", "cryptography"])
        import dpmmd.kernels, torch
        from benches.gpu import checks, inputs, steps
        print(dpmmd.kernels.__file__.endswith("kernels/__init__.py"))
        from benches.shapes import small_release
        encoder = steps.encoder_of(inputs.TINY, 32, "float32", torch.device("cpu"))
        release = small_release(encoder, 2)
        print(release.metadata.private, tuple(release.target.shape) == (2, 2, encoder.dim))
        settings = dpmmd.recipe.TrainSection(steps=1, batch_size=2)
        dpmmd.train.train(release, encoder, None, settings, progress=False)
        try:
            data = torch.zeros(9, 3, 32, 32).byte().numpy(), torch.zeros(9).long().numpy()
            dpmmd.release(
                data, encoder, epsilon=1.0, delta=1e-5, adjacency="replace-one", progress=False
            )
        except RuntimeError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env=os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[:3] == ["True", "True", "False True"], done.stderr
    assert "makes no noise" in lines[3]


def test_stand_ins_refuse_what_they_do_not_know() -> None:
    class Section(ambient.BaseModel):
        size: int
        rate: float = 0.5

    assert Section(size=2).model_dump() == {"size": 2, "rate": 0.5}
    assert Section(size=2).model_copy(update={"rate": 1.0}).rate == 1.0  # type: ignore[attr-defined]
    for bad in ({}, {"size": 1, "length": 2}):
        with pytest.raises(TypeError, match=r"size|length"):
            Section.model_validate(bad)
    assert ambient.prepare() == []  # the real ones are here


# Time --------------------------------------------------------------------------------------------


def test_the_sections_together_fit_in_the_budget() -> None:
    starting = 10  # seconds, importing and compiling until the first section
    assert sum(program.SECTIONS.values()) + starting <= program.arguments([]).budget


def test_a_measurement_stops_when_the_time_is_over() -> None:
    now = [0.0]

    def work() -> None:
        now[0] += 1.0

    timed = measure.Measure(Played(), Budget(5.5, lambda: now[0]), (10, 50), 0.0)
    timed("op", "shape", "float32", {"cpu": [work]})  # twice to get going, rounds of a second
    assert timed.rows[0]["rounds"] == 4
    now[0] = 0.0
    timed = measure.Measure(Played(), Budget(3.5, lambda: now[0]), (10, 50), 0.0)
    timed("op", "shape", "float32", {"a": [work, work], "b": [work], "c": [work]})
    a, b, c = timed.rows
    assert (a["rounds"], b["note"], c["note"]) == (measure.FEWEST, "no time left", "no time left")


def test_sections_keep_to_the_budget() -> None:
    now, ran = [0.0], []

    def section(name: str, seconds: float) -> Section:
        def work() -> None:
            ran.append(name)
            now[0] += seconds
            if name == "broken":
                raise KeyError("x")

        return Section(name, 10.0, work)

    budget, written = Budget(30.0, lambda: now[0]), []
    names = [("quick", 1.0), ("broken", 1.0), ("long", 40.0), ("late", 1.0)]
    budget.run([section(*pair) for pair in names], lambda: written.append(list(budget.took)))
    assert ran == ["quick", "broken", "long"]
    assert budget.skipped == [
        "broken: the rest of it: KeyError: 'x'",
        "late: all of it: no time left",
    ]
    assert written[-1] == ran
    assert budget.took == {"quick": 1.0, "broken": 1.0, "long": 40.0}
    budget = Budget(30.0, lambda: now[0])
    now[0] += 20
    assert budget.fits("a", 9.0)
    assert not budget.fits("b", 11.0)


def test_at_most() -> None:
    budget = Budget(60)
    with pytest.raises(OutOfTimeError), budget.at_most(0.05):
        time.sleep(5)
    with budget.at_most(0.2):
        pass
    time.sleep(0.3)  # nothing rings behind it


# CUDA, played call by call -----------------------------------------------------------------------


def test_what_the_device_asks_of_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def says(word: str, result: Any = None) -> Any:
        return lambda *_, **__: said.append(word) or result

    @contextlib.contextmanager
    def within(word: str) -> Any:
        said.append(f"{word} begins")
        yield
        said.append(f"{word} ends")

    found = SimpleNamespace(
        name="NVIDIA Played 80GB", major=9, minor=0, multi_processor_count=132,
        total_memory=80 * 10**9, L2_cache_size=50 * 10**6,
    )  # fmt: skip
    stream = SimpleNamespace(wait_stream=says("waits"))
    event = SimpleNamespace(
        record=says("record"), synchronize=says("wait"), elapsed_time=lambda _: 2.5
    )
    played = {
        "current_device": lambda: 0,
        "get_device_properties": lambda _: found,
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda _: within("side"),
        "CUDAGraph": lambda: SimpleNamespace(replay=says("replay")),
        "graph": lambda _: within("capture"),
        "Event": lambda enable_timing: event,
        "synchronize": says("synchronize"),
        "memory_allocated": lambda _: 5,
        "max_memory_allocated": lambda _: 9,
        "reset_peak_memory_stats": says("reset"),
        "empty_cache": says("empty"),
    }
    for name, value in played.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setenv("PATH", "")
    cuda = device.Cuda()
    assert cuda.seconds(says("run")) == 0.0025
    assert said == ["record", "run", "record", "wait"]
    said.clear()
    replay = cuda.capture(says("run", 7))
    assert said == [
        "waits", "side begins", "run", "run", "side ends", "waits", "capture begins", "run",
        "capture ends",
    ]  # fmt: skip
    said.clear()
    assert replay() == 7
    assert said == ["replay"]

    def waits_for_the_device() -> None:
        if said[-1] == "capture begins":
            raise RuntimeError("operation not permitted when stream is capturing")

    with pytest.raises(device.NoGraph, match="not permitted"):
        cuda.capture(waits_for_the_device)

    def takes_all() -> None:
        if said[-1] == "capture begins":
            raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        cuda.capture(takes_all)
    said.clear()
    assert (cuda.allocated(), cuda.peak(says("run"))) == (5, 9)
    assert said == ["synchronize", "reset", "run", "synchronize"]
    cuda.free()
    assert said[-1] == "empty"
    described = cuda.describe()
    assert set(Played().describe()) <= set(described)
    assert (described["gpu"], described["l2_mb"], described["driver"]) == (found.name, 50, "")
    assert "H200" not in report.machine_line({"machine": described, "rows": []})


def test_a_table_names_the_commit_that_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found = device.Host().describe()["commit"]
    if (ROOT / ".git").exists():
        assert re.fullmatch(r"[0-9a-f]{7,}(-changed)?", found)
    line = report.machine_line({"machine": Played().describe() | {"commit": "12ab34c"}, "rows": []})
    assert line.endswith("; commit 12ab34c")
    monkeypatch.setattr(ambient, "ROOT", tmp_path)  # no repository
    without = device.Host().describe()
    assert without["commit"] == ""
    assert "commit" not in report.machine_line({"machine": without, "rows": []})


# Launch parameters -------------------------------------------------------------------------------


def test_the_search_finds_the_best_and_refuses_wrong_results(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    from dpmmd.kernels import table as parameters

    start = parameters.Config(512, 8, 4, 1, 128)
    best = parameters.Config(1024, 4, 4, 1, 128)
    result, current = [torch.ones(3)], []
    looked_up = parameters.lookup

    def call() -> None:
        config = parameters.lookup("class_sums", torch.device("cpu"), torch.float32, 1)
        current[:] = [config]
        result[0].fill_(2.0 if config.num_warps == 8 else 1.0)
        if config.num_stages == 2:
            raise RuntimeError("out of resource: shared memory")

    def seconds(*_: Any) -> float:
        config = current[0]
        away = abs(config.block // 512 - 2) + abs(config.rows - best.rows)
        return 1.0 + away if config.num_warps != 8 else 0.1

    monkeypatch.setattr(sweep, "seconds", seconds)
    said: list[str] = []
    found = sweep.climb(
        Played(), Budget(60), "class_sums", start, [call], lambda: result, said.append
    )
    assert found == best
    assert any("another result" in line for line in said)
    assert any("out of resource" in line for line in said)
    assert parameters.lookup is looked_up
    text = sweep.paste(
        {
            ("class_sums", torch.bfloat16): {1000: start, 4000: best},
            ("row_dots", torch.bfloat16): {1000: start, 4000: start},
        },
        SimpleNamespace(TILE_ROWS=8),
    )
    assert text.splitlines() == [
        "_BF16 = {",
        '    "class_sums": ((3999, Config(512, 8, 4, 1, 128)), '
        '(float("inf"), Config(1024, 4, 4, 1, 128)),),',
        '    "row_dots": ((float("inf"), Config(512, TILE_ROWS, 4, 1, 128)),),',
        "}",
        "_FP32 = {",
        "}",
    ]
    for name in ("row_dots", "class_sums"):
        rows = {c.rows for c in sweep.neighbours(name, start)}
        assert rows == ({8} if name == "row_dots" else {4, 8, 16})


@pytest.mark.long
@pytest.mark.skipif(interpreted.HINDRANCE is not None, reason=interpreted.HINDRANCE or "")
def test_a_dry_search() -> None:
    command = [sys.executable, "-m", "benches.gpu", "--device", "cpu", "--tiny", "--sweep"]
    done = subprocess.run([*command, "--budget", "20"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "_BF16 = {" in done.stdout
    assert "another result" not in done.stdout
    assert re.search(r"us with Config", done.stdout)


@pytest.mark.long
@pytest.mark.skipif(interpreted.HINDRANCE is not None, reason=interpreted.HINDRANCE or "")
def test_checks_spread_over_processes() -> None:
    played = device.Host()
    wanted = checks.all_checks(played, ["torch", "triton"], tiny=True)
    end = time.monotonic() + 120
    arguments = ["--device", "cpu", "--tiny"]
    outcome = checks.spread(wanted, 2, arguments, lambda: end - time.monotonic())
    assert (outcome.passed, outcome.failed, outcome.missed) == (len(wanted), {}, 0)


# Tables ------------------------------------------------------------------------------------------


def results(**seconds: float) -> dict[str, Any]:
    """As of a run on a card that copies 4 TB/s."""

    def row(operation: str, shape: str, variant: str, time: float, **more: Any) -> dict[str, Any]:
        head = {"operation": operation, "shape": shape, "dtype": "bfloat16", "variant": variant}
        return head | {"seconds": time, "fastest": time, "rounds": 5, "how": "launches"} | more

    loss, one, both = operations.LOSS, report._ONE, report._BOTH
    step = report._STEP_SHAPE
    rows = [
        row("copy", "4.3 GB", "copy", 0.002, bytes=8_000_000_000),
        *(row(p, one, "triton", 25e-6, bytes=90_000_000) for p in report._PIECES),
        row("class sums", both, "triton", 30e-6, bytes=90_000_000),
        *(
            row(loss, one, v, s)
            for v, s in (("eager", 2e-3), ("compile", 3e-4), ("triton", 1.5e-4))
        ),
        row(loss, one, "cuda", 1e-4),
        row(f"{loss}, replayed", one, "triton", 1.1e-4, how="graph"),
        row("training step", step, steps.FLOOR, 0.010),
        row("training step", step, "triton", 0.0105, peak_bytes=10**9),
        row("training step", step, "triton, injected", 0.0104),
        row("training step", step, "eager, TF32 off", 0.07, peak_bytes=4 * 10**9),
        row("training step", step, "eager, TF32 on", 0.04),
        row("training step, captured", step, "cuda", 0.005, how="graph"),
        row("release, encoder and sums", "any", "encoder alone", 0.9),
        row("release, encoder and sums", "any", "triton", 1.0),
        row("big", "any", "triton", 0.0, note="out of memory"),
    ]
    run = {"checks": {"passed": 9, "failed": {"triton, forward: x": "error 1"}, "missed": 2}}
    run |= {"sanitizer": {"memcheck": "3 checks, no errors"}, "skipped": ["steps: all of it: no"]}
    return {"machine": Played().describe(), "rows": rows} | run


def test_targets() -> None:
    found = {name: (value, bound, kept) for name, value, bound, kept in report.targets(results())}
    piece = "{}, bfloat16, over its own bytes, of copy speed (least of all sizes)"
    assert found[piece.format("row statistics")] == (pytest.approx(0.9), "at least 0.85", True)
    assert found[piece.format("class sums")] == (pytest.approx(0.75), "at least 0.85", False)
    loss = "loss, forward + backward, K=1, moments 1, against compile"
    assert found[loss] == (pytest.approx(3), "at least 2.5", True)
    all_launches = "loss, forward + backward, all launches, VGG19 32 px, n=128, bfloat16"
    assert found[all_launches] == (pytest.approx(0.11), "at most 0.12 ms", True)
    step = "training step{}, over the step with a trivial loss"
    assert found[step.format("")] == (pytest.approx(1.05), "at most 1.1", True)
    assert found[step.format(", injected")] == (pytest.approx(1.04), "at most 1.05", True)
    assert found[step.format(", captured")][0] is None
    added = "captured step less the step with a trivial loss, 32 px, n=128, K=10, moments 1+2"
    assert found[added] == (None, "at most 0.1 ms", None)
    whole = results()
    captured = next(r for r in whole["rows"] if r["operation"] == "training step, captured")
    whole["rows"].append(captured | {"variant": steps.FLOOR, "seconds": 0.0048})
    loss_alone = {name: rest for name, *rest in report.targets(whole)}[added]
    assert loss_alone == [pytest.approx(0.2), "at most 0.1 ms", False]
    authors = "training step against the authors' procedure (eager, TF32 {})"
    assert found[authors.format("off")] == (pytest.approx(70 / 10.5), "at least 6", True)
    assert found[authors.format("on")] == (pytest.approx(40 / 10.5), "at least 4", False)
    authors = "training step, captured, against the authors' procedure (eager, TF32 {})"
    assert found[authors.format("off")] == (pytest.approx(14), "at least 6", True)
    assert found[authors.format("on")] == (pytest.approx(8), "at least 4", True)
    release = "release throughput over that of the encoder alone, bfloat16"
    assert found[release] == (pytest.approx(0.9), "at least 0.95", False)
    peak = "peak memory of a step over the authors' procedure"
    assert found[peak] == (pytest.approx(0.25), "at most 0.333333", True)
    shapes = {inputs.case(inputs.FULL, 32, torch.bfloat16, *c).shape for c in operations.CASES}
    assert shapes == {report._ONE, report._BOTH}  # the names that targets look for
    assert inputs.FULL.step[0] == (32, 128)


def test_the_tables_of_a_card(tmp_path: Path) -> None:
    whole = report.text(results())
    for words in (
        "NVIDIA Played 80GB, 1 multiprocessors", "copy 4.00 TB/s", "90%", "NOT MET", "not measured",
        "out of memory", "FAILED  triton, forward: x: error 1", "memcheck: 3 checks, no errors",
        "9 passed, 1 failed, 2 not reached", "left out: steps: all of it",
        "the loss takes 150.0 us launched, 110.0 us replayed",
    ):  # fmt: skip
        assert words in whole, words
    # A captured step too is compared with the authors', which is launched.
    assert re.search(r"^training step, captured .* cuda +5\.00 ms +8\.00 ", whole, re.MULTILINE)
    assert report.time_text(1.54455) == "1.54 s"
    path = report.save(tmp_path, results())
    assert path.name == "nvidia-played-80gb.json"
    loaded = table.load(path)
    assert [r["operation"] for r in loaded["rows"]] == [r["operation"] for r in results()["rows"]]
    assert report.targets(loaded) == report.targets(results())
    for begin, end, rows in (
        (table.GPU_BEGIN, table.GPU_END, True),
        (table.GPU_SHORT_BEGIN, table.GPU_SHORT_END, False),
    ):
        new = table.updated(f"a\n{begin}\nold\n{end}\nz\n", tmp_path)
        assert new.startswith(f"a\n{begin}\nNVIDIA Played 80GB")
        assert "old" not in new
        assert "| at least 0.85 | 0.75 | not met |" in new
        assert ("| class sums |" in new) == rows
        assert table.updated(new, tmp_path) == new


def test_what_is_not_measured_is_said_to_be_so(tmp_path: Path) -> None:
    for begin, end in (
        (table.GPU_BEGIN, table.GPU_END),
        (table.GPU_SHORT_BEGIN, table.GPU_SHORT_END),
    ):
        assert report.NOT_MEASURED in table.updated(f"{begin}\n{end}\n", tmp_path)
    measured = any(report.is_gpu(table.load(p)) for p in table.measured(report.RESULTS))
    for name in ("README.md", "benches/README.md"):
        text = (ROOT / name).read_text("utf-8")
        assert (report.NOT_MEASURED in text) == (not measured), name
