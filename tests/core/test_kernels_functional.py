"""The functional layer and the loss module on Triton's core, under its interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpmmd import backends, functional
from dpmmd.bounds import BOUNDS
from dpmmd.nn import MMDLoss
from tests.conftest import images, nonnegative_encoder, small_encoder
from tests.core import interpreted
from tests.core.interpreted import small_blocks  # noqa: F401

if not interpreted.ACTIVE:
    test_interpreted = interpreted.whole(__file__)
else:
    pytestmark = pytest.mark.usefixtures("small_blocks")

    def features() -> list[Tensor]:
        rng = torch.Generator().manual_seed(0)
        fs = [torch.randn(6, 2, 3, 3, generator=rng).relu(), torch.rand(6, 5, generator=rng)]
        fs[0] = fs[0].contiguous(memory_format=torch.channels_last)
        fs[0][4], fs[1][4] = 0, 0
        return fs

    @pytest.mark.parametrize("bound", BOUNDS)
    @pytest.mark.parametrize("moments", [(1,), (1, 2)])
    def test_the_loss_and_its_gradient(moments: tuple[int, ...], bound: str) -> None:
        labels = torch.tensor([0, 2, 2, 0, 2, 0])
        target = torch.rand(len(moments), 3, 23, generator=torch.Generator().manual_seed(1))
        found = {}
        for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
            fs = [f.to(dtype).requires_grad_() for f in features()]
            means, counts = functional.mean_embedding(
                fs, labels, 3, moments=moments, bound=bound, clip=2.0, backend=backend
            )
            loss = functional.mmd_loss(means, counts, target.to(dtype), backend=backend)
            core, *_ = means.grad_fn.options  # type: ignore[union-attr]
            assert core.name == backend
            found[backend] = [loss.detach(), *torch.autograd.grad(loss, fs)]
        for ours, truth in zip(found["triton"], found["torch"], strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=2e-5, atol=1e-6)

    @pytest.mark.parametrize("estimator", ["batch", "ema", "adam"])
    @pytest.mark.parametrize("shared_taps", [0, 1])
    def test_the_loss_module(estimator: str, shared_taps: int) -> None:
        import dpmmd

        encoder = small_encoder()
        release = dpmmd.release(
            images(50), encoder, epsilon=1.0, delta=1e-9, adjacency="replace-one", num_classes=3,
            shared_taps=shared_taps, progress=False,
        )  # fmt: skip
        x, y = images(6, seed=3)
        gradients = []
        for backend in ("triton", "torch"):
            loss = MMDLoss(release, encoder, estimator=estimator, lr=1e-2, backend=backend)
            pixels = (torch.from_numpy(x).float() / 255).requires_grad_()
            for _ in range(2):
                pixels.grad = None
                loss(pixels, torch.from_numpy(y)).backward()
            assert pixels.grad is not None
            gradients.append(pixels.grad)
        torch.testing.assert_close(
            *gradients, rtol=1e-4, atol=1e-4 * float(gradients[1].abs().max())
        )

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
