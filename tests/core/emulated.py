"""The CUDA kernels on the host: csrc/cuda/ compiled as C++, a block's threads as fibres."""

from __future__ import annotations

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dpmmd._cores import cuda

ROOT = Path(__file__).resolve().parents[2]
SANITIZED = "DPMMD_TEST_SANITIZED"  # set by tests/core/test_cuda_sanitized.py


def build(name: str, *options: str) -> Path:
    """The module dpmmd_emulated, built in build/NAME; by one process at a time."""
    import pybind11

    folder = ROOT / "build" / name
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cmake = shutil.which("cmake", path=Path(sys.executable).parent) or "cmake"
        configure = [cmake, "-S", str(ROOT), "-B", str(folder), "-DDPMMD_MODULE=OFF"]
        configure += ["-DDPMMD_EMULATED=ON", f"-DPython_EXECUTABLE={sys.executable}", *options]
        configure += [f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"]
        target = ["--target", "dpmmd_emulated", "--parallel", "2"]
        for command in (configure, [cmake, "--build", str(folder), *target]):
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("dpmmd_emulated*.so")
    return path


def load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("dpmmd_emulated", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def emulated_module() -> Any:
    if shutil.which("c++") is None and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    if os.environ.get(SANITIZED):
        return load(build("sanitized", "-DDPMMD_SANITIZE=ON"))
    return load(build("emulated"))


@pytest.fixture
def emulated(emulated_module: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Within a test backend="cuda" runs on tensors of the CPU."""
    monkeypatch.setattr(cuda, "_native", emulated_module)
    monkeypatch.setattr(cuda, "DEVICE", "cpu")
    return emulated_module
