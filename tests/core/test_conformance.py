"""The suite of `tests.core.conformance` on every backend that a CPU can run.

Triton's kernels run under their interpreter, in processes of their own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpmmd import backends
from tests.core import interpreted
from tests.core.conformance import EMULATED, INTERPRETED, SUMS, Check, checks
from tests.core.emulated import emulated, emulated_module  # noqa: F401


def of(backend: str, *chosen: Check) -> Any:
    """A parameter for each check."""
    return pytest.mark.parametrize("check", [c for c in chosen if backend in c.backends], ids=str)


def levels() -> list[str]:
    """What this processor has beside the level of the native core that is in use."""
    try:
        from dpmmd import _native
    except ImportError:
        return []
    now = _native.level()
    found = [name for name in ("baseline", "avx2", "avx512") if _native.choose(name)]
    _native.choose(now)
    return [name for name in found if name != now]


if interpreted.ACTIVE:
    INTERPRETER = [
        c if c.short else pytest.param(c, marks=pytest.mark.long)
        for c in checks(INTERPRETED)
        if "triton" in c.backends
    ]

    @pytest.mark.parametrize("check", INTERPRETER, ids=str)
    def test_triton(check: Check, monkeypatch: pytest.MonkeyPatch) -> None:
        small = check.operation in ("mean_embedding", "estimator", "sums")
        interpreted.set_blocks(monkeypatch, 8 if small else 64)
        check.run("triton")

else:
    native = pytest.mark.skipif(
        backends.resolve() != "cpu", reason="dpmmd._native is not built, or not asked for"
    )

    # In float64 and, as a sample, below it. Most checks of sums compare with torch's own.
    @of(
        "torch",
        *(c for c in checks() if c.operation != SUMS and (c.short or c.dtype == torch.float64)),
        *(c for c in checks() if c.operation == SUMS and "Python" in c.name),
    )
    def test_torch(check: Check) -> None:
        check.run("torch")

    @native
    @of("cpu", *checks())
    def test_cpu(check: Check) -> None:
        check.run("cpu")

    @native
    @pytest.mark.parametrize("level", levels())
    @of("cpu", *(c for c in checks() if c.short or c.name.startswith("odd,")))
    def test_levels_of_the_cpu(check: Check, level: str) -> None:
        from dpmmd import _native

        before = _native.level()
        assert _native.choose(level)
        try:
            check.run("cpu")
        finally:
            _native.choose(before)

    @of("cuda", *checks(EMULATED))
    def test_cuda(check: Check, emulated: Any) -> None:
        check.run("cuda")

    test_interpreted_embeddings = interpreted.whole(__file__, chosen="mean_embedding")
    test_interpreted_sums = interpreted.whole(__file__, chosen="estimator or sums")
    test_interpreted_steps = interpreted.whole(__file__, chosen="step or release")
    test_interpreted_long = pytest.mark.long(interpreted.whole(__file__, "long"))
