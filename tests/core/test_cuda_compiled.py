"""What nvcc made of the CUDA core, read from the module: registers, spills, wide accesses.

Nothing is run. Without a build that has CUDA, or without cuobjdump, there is nothing to read.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

import pytest

from dpmmd._cores import cpu, cuda

MOST_REGISTERS = 128  # two blocks of 256 threads fit a multiprocessor
# Kernels that go over features or D-sized rows, and so must do it 16 bytes at a time.
WIDE = ("gradient", "class_sums", "partial_statistics", "partial_dots", "step")


def _cuobjdump() -> str | None:
    if (found := shutil.which("cuobjdump")) is not None:
        return found
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(path) if path.is_file() else None


TOOL = _cuobjdump()
if cpu.missing is not None or not cuda._native.cuda_architectures():
    pytest.skip("this build is without CUDA", allow_module_level=True)
if TOOL is None:
    pytest.skip("needs cuobjdump", allow_module_level=True)


def dumped(*options: str) -> str:
    assert TOOL is not None
    return subprocess.run(
        [TOOL, *options, cuda._native.__file__], check=True, capture_output=True, text=True
    ).stdout


def test_registers_and_spills() -> None:
    """Of every kernel for every architecture."""
    architecture, kernel = "", ""
    seen: dict[str, set[str]] = defaultdict(set)
    for line in dumped("--dump-resource-usage").splitlines():
        if found := re.match(r"arch = (sm_\d+)", line.strip()):
            architecture = found[1]
        if found := re.search(r"Function (\S+):", line):
            kernel = found[1]
        if found := re.search(r"REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", line):
            registers, stack, local = map(int, found.groups())
            assert stack == 0, (architecture, kernel)
            assert local == 0, (architecture, kernel)
            assert 0 < registers <= MOST_REGISTERS, (architecture, kernel)
            seen[architecture].add(kernel)
    names = re.findall(r"\d+", cuda._native.cuda_architectures())
    assert set(seen) == {f"sm_{name}" for name in names}
    assert len(set(map(frozenset, seen.values()))) <= len(seen)
    assert min(map(len, seen.values())) >= 15


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100"])
def test_accesses_of_16_bytes(architecture: str) -> None:
    """In every kernel that goes over features there are such loads, and stores in the gradient."""
    number = architecture.removeprefix("sm_")
    if number not in re.findall(r"\d+", cuda._native.cuda_architectures()):
        pytest.skip(f"not built for {architecture}")
    loads: dict[str, int] = defaultdict(int)
    stores: dict[str, int] = defaultdict(int)
    kernel = ""
    for line in dumped("--dump-sass", "-arch", architecture).splitlines():
        if found := re.search(r"Function : (\S+)", line):
            kernel = found[1]
            loads[kernel] += 0
        loads[kernel] += bool(re.search(r"\bLDG\.E\.128", line))
        stores[kernel] += bool(re.search(r"\bSTG\.E\.128", line))
    for name in WIDE:
        of_name = [k for k in loads if re.search(rf"\d{name}", k)]
        assert of_name, f"{name}: not among {sorted(loads)}"
        assert all(loads[k] for k in of_name), {k: loads[k] for k in of_name}
    assert all(stores[k] for k in loads if re.search(r"\dgradient", k))
