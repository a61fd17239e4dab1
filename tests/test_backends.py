from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from dpmmd import _cpu, backends, functional


def test_resolution_order(monkeypatch: pytest.MonkeyPatch) -> None:
    best = "torch" if _cpu.missing else "cpu"
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
    if fits and _cpu.missing is None:
        assert backends.resolve("auto", device, dtype) == "cpu"
        assert backends.resolve("cpu", device, dtype) == "cpu"
        return
    assert backends.resolve("auto", device, dtype) == "torch"
    with (
        backends.use("cpu"),
        pytest.raises(ValueError, match=f"backend='cpu': cannot run {dtype} on {device}"),
    ):
        backends.resolve("auto", device, dtype)


def test_triton_is_taken_on_request_only() -> None:
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float64)):
        with pytest.raises(ValueError, match=f"backend='triton': cannot run {dtype} on {device}"):
            backends.resolve("triton", device, dtype)
    assert backends.resolve("auto", "cuda") == "torch"
    if importlib.util.find_spec("triton"):
        assert backends.resolve("triton", "cuda") == "triton"


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
    monkeypatch.setattr(_cpu, "missing", "no such file")
    monkeypatch.setattr(backends, "_warned", False)
    with pytest.warns(RuntimeWarning, match=r"dpmmd._native did not load \(no such file\)"):
        means, _ = functional.mean_embedding(fs)
    assert torch.equal(means, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.mean_embedding(fs)
    with pytest.raises(ValueError, match=r"backend='cpu': dpmmd._native did not load"):
        functional.mean_embedding(fs, backend="cpu")
