"""What the native core's caller refuses, each time naming the tensor; and the choice of a level."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dpmmd._contract.protocol import Saved, Step
from dpmmd._cores import cpu
from dpmmd._cores.matching import CORE
from dpmmd.bounds import Bound

pytestmark = pytest.mark.skipif(cpu.missing is not None, reason="dpmmd._native is not built")

GOOD = [torch.rand(3, 4), torch.rand(3, 2, 2, 2)]


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (torch.rand(3, 4, device="meta"), "expected a dense tensor on (cpu|a cpu device)"),
        (torch.rand(3, 4).to_sparse(), "expected a dense tensor on (cpu|a cpu device)"),
        (torch.rand(3, 4).double(), r"torch.float64 \[3, 4\] on cpu, expected torch.float32"),
        (torch.rand(3, 4).bfloat16(), "expected torch.float32"),
        (torch.rand(3), "expected .n, ...., at least 2-d"),
        (torch.rand(2, 4), r"expected n=3 as in features\[0\]"),
    ],
)
def test_a_tap_that_does_not_fit_is_named(tap: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=rf"features\[2\]: .*{message}"):
        CORE.forward([*GOOD, tap], None, 1, Bound())


def test_first_tap_and_no_tap() -> None:
    with pytest.raises(ValueError, match=r"features\[0\]: torch.float16"):
        CORE.forward([torch.rand(3, 4).half()], None, 1, Bound())
    with pytest.raises(ValueError, match="features: expected at least one tap"):
        CORE.forward([], None, 1, Bound())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2]), r"labels: values from 0 to 2, expected 0\.\.1"),
        (torch.tensor([0, -1, 1]), r"labels: values from -1 to 1"),
        (torch.tensor([0, 1]), r"labels: torch.int64 \[2\] on cpu, expected int64 \[3\]"),
        (torch.tensor([0, 1, 1], dtype=torch.int32), "labels: torch.int32"),
        (torch.zeros(3, dtype=torch.int64, device="meta"), "labels: .* on meta"),
    ],
)
def test_labels(labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CORE.forward(GOOD, labels, 2, Bound())


def test_strided_labels_are_read_as_they_are() -> None:
    y = torch.tensor([0, 9, 1, 9, 1, 9])[::2]
    assert CORE.forward(GOOD, y, 2, Bound())[1].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", torch.rand(1, 3)),
        ("scale", torch.rand(1, 3, 1).double()),
        ("projection", torch.rand(1, 4, 1)),
        ("upstream", torch.rand(1, 1, 11)),
        ("upstream", torch.rand(1, 1, 12).double()),
        ("upstream", torch.rand(1, 1, 12, device="meta")),
        ("coefficients", torch.rand(2, 3, 1)),
        ("coefficients", torch.rand(1, 3, 2)[..., :1]),
    ],
)
def test_buffers_of_backward(name: str, value: Tensor) -> None:
    buffers = {
        "scale": torch.rand(1, 3, 1),
        "projection": torch.rand(1, 3, 1),
        "upstream": torch.rand(1, 1, 12),
        "coefficients": torch.rand(1, 3, 1),
    }
    buffers[name] = value
    scale, projection, upstream, coefficients = buffers.values()
    given = GOOD, None, 1, Bound(), Saved(scale, projection, torch.empty(0)), upstream, [True] * 2
    with pytest.raises(ValueError, match=f"{name}: .*expected torch.float32"):
        CORE.gradients(*given, coefficients=coefficients)


def test_statistics_of_class_sums() -> None:
    statistics = torch.rand(1, 3, 1), torch.rand(3)
    with pytest.raises(ValueError, match=r"projection: .*expected"):
        CORE.forward(GOOD, None, 1, Bound(), phases=cpu.CLASS_SUMS, statistics=statistics)


STATE = {name: torch.zeros(1, 2, 5) for name in ("estimate", "first_moment", "second_moment")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": torch.rand(1, 2, 6)}, "target: .*expected"),
        ({"counts": torch.ones(3)}, "counts: .*expected"),
        ({"estimate": torch.zeros(2, 5)}, "estimate: .*expected"),
        ({"first_moment": torch.zeros(1, 2, 5).double()}, "first_moment: torch.float64"),
        ({"second_moment": torch.zeros(1, 2, 10)[..., ::2]}, "second_moment: .*not contiguous"),
        ({"steps": torch.zeros(1)}, "steps: .*expected"),
        ({"estimate": STATE["first_moment"]}, "first_moment: shares memory with estimate"),
        ({"means": STATE["second_moment"]}, "second_moment: shares memory with means"),
    ],
)
def test_estimator(change: dict[str, Tensor], message: str) -> None:
    good = {
        "means": torch.rand(1, 2, 5), "counts": torch.ones(2), "target": torch.rand(1, 2, 5),
        "steps": torch.zeros(2), **STATE,
    }  # fmt: skip
    given = good | change
    inputs = [given.pop(name) for name in ("means", "counts", "target")]
    with pytest.raises(ValueError, match=message):
        CORE.estimate(*inputs, Step("adam", **given))


SUMS = torch.zeros(2, 12, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.zeros(2, dtype=torch.int64)}, "labels: .*expected torch.int64"),
        ({"labels": torch.zeros(3)}, "labels: torch.float32"),
        ({"valid": torch.ones(3)}, "valid: .*expected torch.bool"),
        ({"limits": torch.ones(3)}, "limits: .*expected torch.int64"),
        ({"sums": torch.zeros(2, 11, dtype=torch.int64)}, r"sums: .*\[2, 12\]"),
        ({"sums": torch.zeros(2, 12)}, "sums: torch.float32"),
        ({"sums": torch.zeros((), dtype=torch.int64)}, "sums: .*expected"),
        ({"shared_taps": 3}, r"shared_taps=3: expected 0\.\.2"),
        ({"shared_taps": 1}, "shared: NoneType with shared_taps=1"),
        ({"shared": torch.zeros(1, 4, dtype=torch.int64)}, "shared: .*shared_taps=0"),
        (
            {
                "shared_taps": 1,
                "sums": SUMS.flatten()[:16].view(2, 8),
                "shared": SUMS.flatten()[12:16].view(1, 4),
            },
            "shared: shares memory with sums",
        ),
        (
            {"features": [GOOD[0], SUMS.view(torch.float32)[:1].view(3, 2, 2, 2)]},
            r"sums: shares memory with features\[1\]",
        ),
        ({"labels": SUMS.flatten()[:3]}, "sums: shares memory with labels"),
    ],
)
def test_bounded_sums(change: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {
        "features": GOOD, "labels": torch.zeros(3, dtype=torch.int64),
        "valid": torch.ones(3, dtype=torch.bool), "limits": torch.ones(3, dtype=torch.int64),
        "bound": Bound(), "nonnegative": True, "sums": SUMS,
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        CORE.bounded_sums(**(good | change))


def test_level_by_environment_variable() -> None:
    code = "from dpmmd import _native; from dpmmd._cores import cpu; print(_native.level())"
    for level, expected in (("baseline", "baseline\n"), ("nonsense", "")):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"DPMMD_CPU": level},
            capture_output=True,
            text=True,
        )
        assert done.stdout == expected
        assert expected or "DPMMD_CPU='nonsense': this processor or build" in done.stderr
