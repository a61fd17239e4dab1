"""The functional layer on Triton's core, under its interpreter, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpmmd import backends, functional
from dpmmd._contract.protocol import Step
from tests.conftest import nonnegative_encoder
from tests.core import interpreted
from tests.core.interpreted import small_blocks  # noqa: F401

if not interpreted.ACTIVE:
    test_interpreted = interpreted.whole(__file__)
else:
    from dpmmd.kernels.estimator import estimate

    pytestmark = pytest.mark.usefixtures("small_blocks")

    def features() -> list[Tensor]:
        rng = torch.Generator().manual_seed(0)
        fs = [torch.randn(6, 2, 3, 3, generator=rng).relu(), torch.rand(6, 5, generator=rng)]
        fs[0] = fs[0].contiguous(memory_format=torch.channels_last)
        fs[0][4], fs[1][4] = 0, 0
        return fs

    def test_an_unlabelled_embedding_by_context() -> None:
        with backends.use("triton"):
            means, counts = functional.mean_embedding(features())
        expected, _ = functional.mean_embedding(features(), backend="torch")
        assert counts.tolist() == [6.0]
        torch.testing.assert_close(means, expected)

    def test_opcheck() -> None:
        fs: list[Any] = [f.requires_grad_() for f in features()]
        arguments = (fs, torch.tensor([0, 1, 2, 0, 1, 2]), 3, [1], "sphere", 1.0, None, "triton")
        utilities = ("test_schema", "test_faketensor")
        torch.library.opcheck(
            torch.ops.dpmmd.mean_embedding.default, arguments, test_utils=utilities
        )

    def test_other_encoders_still_run() -> None:
        """What Triton does not take is refused by name, not run elsewhere."""
        fs = [f.double() for f in nonnegative_encoder()(torch.rand(2, 3, 8, 8))]
        with pytest.raises(ValueError, match=r"backend='triton': cannot run torch.float64"):
            functional.mean_embedding(fs, backend="triton")

    def test_what_an_estimator_refuses() -> None:
        means, counts = torch.zeros(1, 3, 4), torch.tensor([2.0, 0.0, 1.0])
        with pytest.raises(ValueError, match=r"target: torch.float32 \[1, 3, 5\]"):
            estimate(means, counts, torch.zeros(1, 3, 5), Step())
        with pytest.raises(ValueError, match=r"means: torch.float64"):
            estimate(means.double(), counts, means, Step())
        its_own = Step("ema", estimate=means, steps=torch.zeros(3), decay=0.5)
        with pytest.raises(ValueError, match="estimate: shares memory with means"):
            estimate(means, counts, means.clone(), its_own)
