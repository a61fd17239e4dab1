"""Every Triton kernel compiles for every architecture: no spills, wide loads, few registers."""

from __future__ import annotations

import importlib.util
import re

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs the package triton", allow_module_level=True)

from tests.core import interpreted

if interpreted.ACTIVE:
    pytest.skip("compiles what the interpreter would run", allow_module_level=True)

from dpmmd.kernels import table
from tests.core import kernels_aot
from tests.core.kernels_aot import Case, Compiled

FEATURES = {
    "partial_statistics",
    "class_sums_kernel",
    "partial_dots",
    "gradient_kernel",
    "partial_largest",
    "partial_squares",
    "partial_certificate",
    "add_sums",
    "step_kernel",
    "rectify_kernel",
    "partial_moments",
    "apply_norm",
    "partial_slopes",
    "apply_slopes",
    "add_kernel",
    "fold_kernel",
    "pool_kernel",
    "unpool_kernel",
}
STORES = {
    "gradient_kernel": 128,
    "rectify_kernel": 128,
    "step_kernel": 128,
    "apply_norm": 128,
    "apply_slopes": 128,
    "add_kernel": 128,
    "fold_kernel": 128,
    "pool_kernel": 128,
    "unpool_kernel": 128,
    "class_sums_kernel": 64,
    "add_sums": 64,
}


def check(case: Case, result: Compiled, architecture: int) -> None:
    assert result.spilled == 0, case.name
    if case.aligned:
        assert result.registers <= kernels_aot.budget(case, architecture), case.name
    if case.kernel.__name__ in FEATURES and case.aligned:
        assert max(result.loads) >= 128, case.name
        assert max(result.stores) >= STORES.get(case.kernel.__name__, 0), case.name
    if case.operation == "bounded_sums":
        # The sums are exact only if float64 is IEEE's and small numbers are not flushed to zero.
        assert not re.search(r"\.ftz|\.approx|fma\.rn\.f(32|64)", result.ptx), case.name
    if case.kernel.__name__ == "finish_squares":
        assert "sqrt.rn.f64" in result.ptx
        assert "div.rn.f64" in result.ptx
    if case.kernel.__name__ == "finish_statistics" and "labelled=1" in case.name:
        assert "__assertfail" in result.ptx  # labels out of range stop the device


@pytest.mark.parametrize("architecture", table.ARCHITECTURES)
def test_typical_kernels_compile(architecture: int) -> None:
    cases = kernels_aot.cases(architecture, quick=True)
    assert {case.kernel.__name__ for case in cases} >= FEATURES
    for case in cases:
        check(case, kernels_aot.compile_case(case, architecture), architecture)


@pytest.mark.long
@pytest.mark.parametrize("architecture", table.ARCHITECTURES)
def test_all_kernels_compile(architecture: int) -> None:
    cases = kernels_aot.cases(architecture)
    assert len(cases) > 150
    for case in cases:
        check(case, kernels_aot.compile_case(case, architecture), architecture)
