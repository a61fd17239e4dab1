"""The suite of `tests.core.conformance` on every backend that a CPU can run.

Triton's kernels run under their interpreter, in processes of their own.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dpmmd import backends, functional
from dpmmd._cores import named
from dpmmd.bounds import Bound
from tests.core import conformance, interpreted
from tests.core.conformance import EMULATED, INTERPRETED, SUMS, Check, On, Wrong, checks
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
        small = check.operation in ("mean_embedding", "estimator", "matching", "sums")
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
    test_interpreted_sums = interpreted.whole(__file__, chosen="estimator or matching or sums")
    test_interpreted_steps = interpreted.whole(__file__, chosen="step or release")
    test_interpreted_long = pytest.mark.long(interpreted.whole(__file__, "long"))

    # That the checks can fail ---------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("fault", "why"),
        [
            ("unwritten", "two runs differ, or are NaN"),
            ("unsteady", "two runs differ"),
            ("absent", "counts"),
            ("rounded", "means: error"),
            ("gradient", "gradient: error"),
            ("row", "gradient: error|a row of the gradient is 0"),
        ],
    )
    def test_a_faulty_mean_embedding(monkeypatch: pytest.MonkeyPatch, fault: str, why: str) -> None:
        batch = conformance.Batch(5, ((8, 2, 2), (8,)), classes=3)
        check = partial(conformance.embedding, batch, Bound((1, 2)), True, On("torch"))
        check()
        right, calls = functional.mean_embedding, iter(range(100))

        def wrong(fs: list[Tensor], *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            if fault == "gradient":
                fs = [f + 1e-4 * (f - f.detach()) for f in fs]
            if fault == "row":
                fs = [torch.cat([f[:-1], f[-1:].detach()]) for f in fs]
            means, counts = right(fs, *args, **options)
            if fault == "unwritten":
                means = torch.empty_like(means) + 0 * means
            if fault == "unsteady":
                means = means * (1 + 1e-7 * next(calls))
            if fault == "rounded":
                means = means.bfloat16().float()
            return means, counts.clamp(min=1) if fault == "absent" else counts

        monkeypatch.setattr(functional, "mean_embedding", wrong)
        with pytest.raises(Wrong, match=why):
            check()

    def test_a_faulty_estimator(monkeypatch: pytest.MonkeyPatch) -> None:
        adam = conformance.Estimator("adam", {"lr": 1e-2}, (2, 3, 33))
        right = functional.adam_loss
        wrong = partial(right, lr=1.5e-2)
        monkeypatch.setattr(functional, "adam_loss", lambda *a, lr, **more: wrong(*a, **more))
        with pytest.raises(Wrong, match="step 0, value: error"):
            conformance.estimator_steps(adam, torch.float32, On("torch"))

    @native
    @pytest.mark.parametrize("of", ["sums", "release"])
    def test_a_wrong_integer(monkeypatch: pytest.MonkeyPatch, of: str) -> None:
        core = named("cpu")
        right = core.bounded_sums

        def off(*args: Any, sums: Tensor, **options: Any) -> None:
            right(*args, sums=sums, **options)
            sums[0, 0] += 1 << 20  # a release's numbers are float32

        monkeypatch.setattr(core, "bounded_sums", off)
        conformance.released.cache_clear()
        check = next(c for c in checks() if c.operation == of and c.dtype == torch.float32)
        with pytest.raises(Wrong, match=r"of \d+ integers differ"):
            check.run("cpu")
        conformance.released.cache_clear()

    @native
    @pytest.mark.parametrize("inject", [True, False])
    def test_a_faulty_step(monkeypatch: pytest.MonkeyPatch, inject: bool) -> None:
        core = named("cpu")
        right = core.estimate

        def wrong(means: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
            return right((1 + 1e-4) * means, *args)

        monkeypatch.setattr(core, "estimate", wrong)
        problem = conformance.Problem("fire", loss=(("estimator", "batch"),))
        with pytest.raises(Wrong, match="step 0, value: error"):
            conformance.step(problem, torch.float32, inject, On("cpu"))
