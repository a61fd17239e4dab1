"""Over several processes (gloo, on this machine) everything is as in one that has all images."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dpmmd
from dpmmd import distributed
from dpmmd.generators import ConvGenerator
from dpmmd.nn import ESTIMATORS, MMDLoss
from tests.conftest import images, small_encoder

RELEASES: dict[str, dict[str, Any]] = {
    "phi1": {"num_classes": 3},
    "phi1 and phi2": {"num_classes": 3, "moments": (1, 2)},
    "joint": {"num_classes": 3, "moments": (1, 2), "joint_weight": 0.5},
    "unlabelled": {"num_classes": None},
    "hybrid": {"num_classes": 3, "shared_taps": 1},
}
N = 13  # not a multiple of the number of ranks


def run(world: int, work: Callable[[int, int], None], tmp_path: Path) -> None:
    """work(rank, world) in so many processes of one group."""
    mp.spawn(_process, (world, work, str(tmp_path / "store")), nprocs=world)  # type: ignore[no-untyped-call]


def _process(rank: int, world: int, work: Callable[[int, int], None], store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{store}", rank=rank, world_size=world)
    try:
        work(rank, world)
    except BaseException:
        traceback.print_exc()
        raise
    dist.destroy_process_group()


def whole_batch(labels: bool) -> tuple[Tensor, Tensor | None]:
    x, y = images(N, 3)
    y[:] = y % 2  # class 2 is absent, and the last rank may lack another
    return torch.from_numpy(x).double() / 255, torch.from_numpy(y) if labels else None


def part(x: Tensor | None, rank: int, world: int) -> Tensor | None:
    return None if x is None else x.tensor_split(world)[rank]


def loss_is_that_of_the_whole_batch(rank: int, world: int) -> None:
    encoder = small_encoder().double()
    for options in RELEASES.values():
        arguments = {"epsilon": 5.0, "delta": 1e-3, "adjacency": "replace-one", **options}
        # What is compared must not depend on noise, which every process would draw for itself.
        release = dpmmd.release(
            images(60),
            encoder,
            **arguments,
            progress=False,
            insecure_test_noise=lambda n, sd: torch.zeros(n, dtype=torch.int64).numpy(),
        )
        x, y = whole_batch(release.metadata.labelled)
        for estimator in ESTIMATORS:
            if estimator == "unbiased" and release.shared is not None:
                continue
            alone = MMDLoss(release, encoder, estimator=estimator, backend="torch")
            together = MMDLoss(
                release,
                encoder,
                estimator=estimator,
                backend="torch",
                process_group=dist.group.WORLD,
            )
            alone.double(), together.double()
            for _ in range(2):  # the second step has a state
                pixels = x.clone().requires_grad_()
                expected = alone(pixels, y)
                expected.backward()
                mine = part(x, rank, world).clone().requires_grad_()  # type: ignore[union-attr]
                value = together(mine, part(y, rank, world))
                value.backward()
                torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-14)
                assert pixels.grad is not None
                assert mine.grad is not None
                torch.testing.assert_close(
                    mine.grad / world,
                    part(pixels.grad, rank, world),
                    rtol=1e-10,
                    atol=1e-14,
                )
            for name, value in alone.state_dict().items():
                torch.testing.assert_close(together.state_dict()[name], value)


def generator_is_that_of_the_whole_batch(rank: int, world: int) -> None:
    """Parameters' gradients, and running statistics, under DDP with synchronised batch norm."""
    encoder = small_encoder().double()
    release = dpmmd.release(
        images(60),
        encoder,
        epsilon=5.0,
        delta=1e-3,
        adjacency="replace-one",
        num_classes=3,
        progress=False,
        insecure_test_noise=lambda n, sd: torch.zeros(n, dtype=torch.int64).numpy(),
    )
    torch.manual_seed(0)
    alone = ConvGenerator(num_classes=3, image_size=16, channels=3, z_dim=5, base_channels=2)
    together = ConvGenerator(num_classes=3, image_size=16, channels=3, z_dim=5, base_channels=2)
    together.load_state_dict(alone.state_dict())
    alone.double(), together.double()
    assert dist.group.WORLD is not None
    wrapped = DistributedDataParallel(
        distributed.synchronise_batch_norm(together, dist.group.WORLD), broadcast_buffers=False
    )
    z, y = torch.randn(N, 5, dtype=torch.float64), torch.arange(N) % 3
    MMDLoss(release, encoder, backend="torch").double()(alone(z, y), y).backward()
    loss = MMDLoss(release, encoder, backend="torch", process_group=dist.group.WORLD).double()
    mine, labels = part(z, rank, world), part(y, rank, world)
    loss(wrapped(mine, labels), labels).backward()
    names = set()
    for (name, a), b in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert a.grad is not None
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-8, atol=1e-13)
        if float(a.grad.abs().max()) > 1e-12:
            names.add(name)
    assert {"norm0.weight", "norm2.bias", "conv1.weight", "to_image.weight"} <= names
    for (name, a), b in zip(alone.named_buffers(), together.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)
    together.eval(), alone.eval()
    torch.testing.assert_close(together(z, y), alone(z, y))


def what_differs_is_refused_everywhere(rank: int, world: int) -> None:
    assert dist.group.WORLD is not None
    distributed.require_same("release", "same", dist.group.WORLD)
    with pytest.raises(ValueError, match=r"release: rank 1 has 'b', rank 0 has 'a'"):
        distributed.require_same("release", "ab"[min(rank, 1)], dist.group.WORLD)


def everything(rank: int, world: int) -> None:
    loss_is_that_of_the_whole_batch(rank, world)
    generator_is_that_of_the_whole_batch(rank, world)
    what_differs_is_refused_everywhere(rank, world)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_one_process(world: int, tmp_path: Path) -> None:
    run(world, everything, tmp_path)


def test_a_group_needs_to_be_initialised() -> None:
    encoder = small_encoder()
    release = dpmmd.release(
        images(20), encoder, epsilon=5.0, delta=1e-3, adjacency="replace-one", progress=False
    )
    with pytest.raises(RuntimeError, match=r"torch[.]distributed is not initialised"):
        MMDLoss(release, encoder, process_group=object())  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="start it with torchrun"):
        distributed.synchronise_batch_norm(nn.BatchNorm2d(3), None)  # type: ignore[arg-type]
