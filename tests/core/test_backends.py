from __future__ import annotations

import importlib.util
import shutil
import warnings
from collections.abc import Iterator

import pytest
import torch

from dpmmd import backends, functional
from dpmmd._cores import cpu, cuda


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
    backends._on_cuda.cache_clear()
    yield found
    backends._on_cuda.cache_clear()


def test_auto_on_a_gpu_takes_the_cuda_core(gpus: list[tuple[int, int]]) -> None:
    assert backends.resolve("auto", "cuda") == "cuda"
    assert backends.resolve("auto", "cuda", torch.bfloat16) == "cuda"
    assert backends.resolve("auto", "cuda", torch.float64) == "torch"
    with backends.use("torch"):
        assert backends.resolve("auto", "cuda") == "torch"


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
    backends._on_cuda.cache_clear()
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.warns(RuntimeWarning, match="without CUDA; Triton finds no C compiler"):
        assert backends.resolve("auto", "cuda") == "torch"
    backends._on_cuda.cache_clear()
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
