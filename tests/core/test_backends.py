from __future__ import annotations

import importlib.util
import json
import shutil
import threading
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from dpmmd import backends, functional, injection
from dpmmd._contract.capturing import hold, is_captured
from dpmmd._cores import cpu, cuda, triton
from dpmmd._fastest import EMBEDDING, ESTIMATOR, LARGE, SUMS, TABLE, Row, fastest
from tests.conftest import small_encoder
from tests.core.conformance import encoder_of

RESULTS = Path(__file__).resolve().parents[2] / "benches" / "results"


def test_resolution_order(monkeypatch: pytest.MonkeyPatch) -> None:
    best = "torch" if cpu.missing else "cpu"
    assert backends.resolve() == best
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "torch")
    assert backends.resolve() == "torch"
    with backends.use("auto"):
        assert backends.resolve() == best
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "fast")
    with pytest.raises(ValueError, match="DPMMD_BACKEND='fast'"):
        backends.resolve()
    assert backends.resolve("torch") == "torch"
    with backends.use("torch"):
        assert backends.resolve() == "torch"


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match=r"backend='opencl': this build has .*'triton', 'cuda'"):
        backends.resolve("opencl")
    with pytest.raises(ValueError, match="backend='nope': this build has"), backends.use("nope"):
        pass


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.float32, torch.bfloat16])
def test_auto_takes_what_fits_and_an_explicit_choice_raises(
    device: str, dtype: torch.dtype
) -> None:
    fits = device == "cpu" and dtype in (torch.float32, torch.bfloat16)
    if fits and cpu.missing is None:
        assert backends.resolve("auto", device, dtype) == "cpu"
        assert backends.resolve("cpu", device, dtype) == "cpu"
        return
    assert backends.resolve("auto", device, dtype) == "torch"
    with (
        backends.use("cpu"),
        pytest.raises(ValueError, match=f"backend='cpu': cannot run {dtype} on {device}"),
    ):
        backends.resolve("auto", device, dtype)


def test_triton_refuses_what_does_not_fit() -> None:
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float64)):
        with pytest.raises(ValueError, match=f"backend='triton': cannot run {dtype} on {device}"):
            backends.resolve("triton", device, dtype)
    if importlib.util.find_spec("triton"):
        assert backends.resolve("triton", "cuda") == "triton"


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, int]]]:
    """Compute capabilities of the CUDA devices that are visible: two, to be changed."""
    found = [(9, 0), (8, 0)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(found))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: found[i])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"card {i}")
    monkeypatch.setattr(cuda, "hindrance", lambda: None)
    monkeypatch.setattr(backends, "_warned", set())
    backends.fastest_on_cuda.cache_clear()
    yield found
    backends.fastest_on_cuda.cache_clear()


def test_auto_on_a_gpu(gpus: list[tuple[int, int]]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        assert backends.resolve("auto", "cuda", dtype) == "cuda"
    assert backends.resolve("auto", "cuda", torch.float64) == "torch"
    with backends.use("torch"):
        assert backends.resolve("auto", "cuda") == "torch"


SMALL, BIG = LARGE - 1, LARGE
# operation, captured, bytes, injected -> where both cores are, where one is missing: Triton, CUDA
CHOICES = {
    (EMBEDDING, True, SMALL, False): ("triton", "cuda", "triton"),
    (EMBEDDING, True, BIG, False): ("triton", "cuda", "triton"),
    (EMBEDDING, True, SMALL, True): ("triton", "torch", "triton"),
    (EMBEDDING, True, BIG, True): ("triton", "torch", "triton"),
    (EMBEDDING, False, SMALL, False): ("cuda", "cuda", "triton"),
    (EMBEDDING, False, BIG, False): ("triton", "cuda", "triton"),
    (EMBEDDING, False, SMALL, True): ("triton", "torch", "triton"),
    (EMBEDDING, False, BIG, True): ("triton", "torch", "triton"),
    (ESTIMATOR, True, 0, False): ("triton", "cuda", "triton"),
    (ESTIMATOR, False, 0, False): ("cuda", "cuda", "triton"),
    (SUMS, True, BIG, False): ("cuda", "cuda", "triton"),
    (SUMS, False, BIG, False): ("cuda", "cuda", "triton"),
}


@pytest.mark.parametrize("missing", [None, "triton", "cuda"])
@pytest.mark.parametrize(("case", "wanted"), CHOICES.items(), ids=str)
def test_the_table_decides_on_a_gpu(
    case: tuple[str, bool, int, bool],
    wanted: tuple[str, str, str],
    missing: str | None,
    gpus: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(triton, "hindrance", lambda: "gone" if missing == "triton" else None)
    monkeypatch.setattr(cuda, "hindrance", lambda: "gone" if missing == "cuda" else None)
    operation, capture, size, inject = case
    expected = wanted[[None, "triton", "cuda"].index(missing)]
    options: dict[str, Any] = {"operation": operation, "size": size, "inject": inject}
    with backends.captured() if capture else nullcontext():
        assert backends.resolve("auto", "cuda", **options) == expected
        assert backends.resolve("torch", "cuda", **options) == "torch"
    if cpu.missing is None:
        assert backends.resolve("auto", "cpu", **options) == "cpu"


def test_every_row_of_the_table_decides_something() -> None:
    """A row that another one hides, or that no choice above meets, is a mistake."""
    met = set()
    for operation, capture, size, inject in CHOICES:
        for asked in (inject, None):
            for present in (("cuda", "triton"), ("cuda",)):
                given: dict[str, Any] = {"captured": capture, "large": size >= LARGE}
                found = fastest(operation, present, **given, inject=asked)
                rows = [
                    row
                    for row in TABLE
                    if row.operation == operation
                    and row.captured in (None, capture)
                    and row.large in (None, size >= LARGE)
                    and asked in row.asked
                    and set(row.cores) & set(present)
                ]
                if rows:
                    met.add(TABLE.index(rows[0]))
                    core = next(core for core in rows[0].cores if core in present)
                    assert found == (core, rows[0].injects)
                else:
                    assert found is None
    assert met == set(range(len(TABLE)))
    with pytest.raises(ValueError, match="operation='sums': expected one of 'mean embedding'"):
        backends.resolve("auto", "cuda", operation="sums")


@pytest.mark.parametrize(
    "row", TABLE, ids=lambda row: f"{row.operation}-{row.captured}-{row.large}"
)
def test_the_table_says_what_was_measured(row: Row) -> None:
    """After a new run on a GPU: the times, and what they decide."""
    rows = json.loads((RESULTS / "nvidia-h200.json").read_text())["rows"]
    assert row.measured or row.asked == (True,)  # no core but one can inject
    for operation, shape, milliseconds in row.measured:
        dtype = "float32" if "estimator" in operation else "bfloat16"
        times = {
            r["variant"]: 1e3 * r["seconds"]
            for r in rows
            if (r["operation"], r["shape"], r["dtype"]) == (operation, shape, dtype)
        }
        assert {name: pytest.approx(times[name], rel=1e-3) for name in milliseconds} == milliseconds
        best = row.cores[0] + (", injected" if row.injects else "")
        assert min(milliseconds, key=lambda name: milliseconds[name]) == best


def test_a_captured_loss_injects_where_it_is_left_open(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Gpu(NamedTuple):
        """What is asked of images."""

        device: torch.device = torch.device("cuda")
        dtype: torch.dtype = torch.float32

    images: Any = Gpu()
    encoder = encoder_of("vgg").float()
    monkeypatch.setattr(triton, "hindrance", lambda: None)
    assert not injection.wanted(encoder, images, "auto")
    assert not injection.wanted(encoder, images, "triton")
    with backends.captured():
        for backend, wanted in {
            "auto": True,
            "triton": True,
            "cuda": False,
            "torch": False,
        }.items():
            assert injection.wanted(encoder, images, backend) is wanted
            with backends.use(backend):
                assert injection.wanted(encoder, images, "auto") is wanted
        assert not injection.wanted(encoder.double(), images, "auto")
        assert not injection.wanted(small_encoder(), images, "auto")  # no ReLU to inject into
        encoder.float()
        assert not injection.wanted(encoder, torch.zeros(1), "auto")
        monkeypatch.setattr(triton, "hindrance", lambda: "gone")
        backends.fastest_on_cuda.cache_clear()
        assert not injection.wanted(encoder, images, "auto")
    assert not injection.wanted(encoder, images, "auto")


def test_what_a_cache_hands_out_while_captured_is_held() -> None:
    """A graph reads it by its address when the cache has dropped it; also from other threads."""
    hold("before")
    with backends.captured() as held, backends.captured() as inner:
        thread = threading.Thread(target=hold, args=("within",))
        thread.start()
        thread.join()
    hold("after")
    assert held == inner == ["within"]
    assert not is_captured()


@pytest.mark.parametrize("capabilities", [[(7, 5)], [(9, 0), (7, 5)]])
def test_auto_on_gpus_without_kernels_takes_torch_and_says_so(
    capabilities: list[tuple[int, int]], gpus: list[tuple[int, int]]
) -> None:
    gpus[:] = capabilities
    last = len(capabilities) - 1
    with pytest.warns(RuntimeWarning, match=rf"card {last} \(cuda:{last}\) is of .* 7\.5"):
        assert backends.resolve("auto", "cuda") == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backends.resolve("auto", "cuda") == "torch"


def test_auto_without_a_gpu(gpus: list[tuple[int, int]]) -> None:
    gpus.clear()
    assert backends.resolve("auto", "cuda") == "torch"


def test_auto_on_a_gpu_without_the_cuda_core(
    gpus: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "hindrance", lambda: "this build is without CUDA")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    assert backends.resolve("auto", "cuda") == "triton"
    backends.fastest_on_cuda.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(RuntimeWarning, match="without CUDA; Triton finds no C compiler"):
        assert backends.resolve("auto", "cuda") == "torch"
    backends.fastest_on_cuda.cache_clear()
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.warns(RuntimeWarning, match="without CUDA; the package triton is not installed"):
        assert backends.resolve("auto", "cuda") == "torch"


def test_triton_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'dpmmd\[triton\]'"):
        backends.resolve("triton", "cuda")


def test_a_build_without_the_core_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fs = [torch.rand(3, 5)]
    with backends.use("torch"):
        expected, _ = functional.mean_embedding(fs)
    monkeypatch.setattr(cpu, "missing", "no such file")
    monkeypatch.setattr(backends, "_warned", set())
    with pytest.warns(RuntimeWarning, match=r"dpmmd._native did not load \(no such file\)"):
        means, _ = functional.mean_embedding(fs)
    assert torch.equal(means, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.mean_embedding(fs)
    with pytest.raises(ValueError, match=r"backend='cpu': dpmmd._native did not load"):
        functional.mean_embedding(fs, backend="cpu")
