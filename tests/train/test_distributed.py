"""Over several processes (gloo, on this machine) everything is as in one that has all images."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import dpmmd
from dpmmd import distributed
from dpmmd import train as training
from dpmmd.generators import ConvGenerator
from dpmmd.nn import ESTIMATORS, MMDLoss
from dpmmd.recipe import GeneratorSection, TrainSection
from dpmmd.train import CheckpointError, plan
from dpmmd.train.plan import PlanError
from tests.conftest import images, small_encoder
from tests.train.test_modes import releases

RELEASES: dict[str, dict[str, Any]] = {
    "phi1": {"num_classes": 3},
    "phi1 and phi2": {"num_classes": 3, "moments": (1, 2)},
    "joint": {"num_classes": 3, "moments": (1, 2), "joint_weight": 0.5},
    "unlabelled": {"num_classes": None},
    "hybrid": {"num_classes": 3, "shared_taps": 1},
}
N = 13  # not a multiple of the number of ranks


def run(world: int, work: Callable[[int, int, Path], None], folder: Path) -> None:
    """work(rank, world, folder) in so many processes of one group."""
    mp.spawn(_process, (world, work, folder), nprocs=world)  # type: ignore[no-untyped-call]


def _process(rank: int, world: int, work: Callable[[int, int, Path], None], folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", store, rank=rank, world_size=world)
    try:
        work(rank, world, folder)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)  # see `dpmmd.distributed.leave`


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
        distributed.synchronise_batch_norm(together, dist.group.WORLD),
        **distributed.BUFFERS_STAY,
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
    odd = rank == world - 1

    def made(n: int, encoder: dpmmd.encoders.Encoder, **options: Any) -> MMDLoss:
        release = dpmmd.release(
            images(n),
            encoder,
            epsilon=5.0,
            delta=1e-3,
            adjacency="replace-one",
            progress=False,
            insecure_test_noise=lambda n, sd: torch.zeros(n, dtype=torch.int64).numpy(),
        )
        return MMDLoss(release, small_encoder(), process_group=dist.group.WORLD, **options)

    last, encoder = world - 1, small_encoder()
    with pytest.raises(ValueError, match=rf"release: rank {last} has '\w+', rank 0 has '\w+'"):
        made(30 - odd, encoder)
    with pytest.raises(ValueError, match=rf"loss: rank {last} has lr=0.002, rank 0 has lr=0.001"):
        made(30, encoder, lr=0.002 if odd else 0.001)
    with pytest.raises(ValueError, match=rf"loss: rank {last} has estimator='no', rank 0 has"):
        made(30, encoder, estimator="no" if odd else "ema")  # refused by one, and so by all
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "__version__", "0.0.9" if odd else dpmmd.__version__)
        with pytest.raises(ValueError, match=f"version: rank {last} has '0.0.9', rank 0 has"):
            made(30, encoder)
    spec = dpmmd.encoders.Encoder.spec
    with pytest.MonkeyPatch.context() as patch:
        if odd:
            patch.setattr(dpmmd.encoders.Encoder, "spec", lambda self: {**spec(self), "pool": 3})
        with pytest.raises(ValueError, match=f"encoder: rank {last} has pool=3, rank 0 has pool="):
            made(30, encoder)


def what_one_refuses_stops_all(rank: int, world: int) -> None:
    team = distributed.Team(dist.group.WORLD, torch.device("cpu"))
    assert team.each(lambda: rank) == rank

    def refuse() -> None:
        if rank == 1:
            raise OSError("no such disk")

    kind = OSError if rank == 1 else RuntimeError
    message = "^no such disk" if rank == 1 else "^rank 1 has stopped.*no such disk"
    with pytest.raises(kind, match=message):
        team.each(refuse)


def a_budget_too_small_for_one_stops_all(rank: int, world: int, folder: Path) -> None:
    make = plan.make

    def tight(memory: str, *arguments: Any, **options: Any) -> plan.Plan:
        return make("1MiB" if rank == 1 else memory, *arguments, **options)

    kind: type[Exception] = PlanError if rank == 1 else RuntimeError
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "make", tight)
        with pytest.raises(kind, match=r"the least that a step of batch_size=\d+ needs is"):
            training.train(
                dpmmd.Release.load(folder / "release.safetensors"),
                small_encoder().double(),
                settings=TrainSection(steps=1, batch_size=N, memory="1TiB"),
                generator_settings=GeneratorSection(name="conv", image_size=8, base_channels=2),
                process_group=dist.group.WORLD,
                progress=False,
            )


class Double(nn.Module):
    """A generator in float64: what rounding makes of a gradient that is zero does not move it."""

    z_dim = 5

    def __init__(self, labels: int = 3) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            inner = ConvGenerator(
                num_classes=labels, image_size=8, channels=1, z_dim=5, base_channels=2
            )
        self.inner = inner.double()

    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self.inner(z.double(), y)


def trained(folder: Path, steps: int, **options: Any) -> training.Trained:
    encoder = small_encoder().double()
    release = dpmmd.Release.load(folder / "release.safetensors")
    settings = TrainSection(
        steps=steps, batch_size=N, lr=1e-2, checkpoint_every=2, schedule="constant"
    )
    return training.train(
        release, encoder, Double(), settings, progress=False, **{"out": None, **options}
    )


def training_is_that_of_one_process(rank: int, world: int, folder: Path) -> None:
    group = dist.group.WORLD
    expected = trained(folder, 6).generator.state_dict()
    start = Double().state_dict()
    out = folder / "run"
    found = trained(folder, 6, process_group=group, out=out)
    assert found.step == 6
    for name, value in found.generator.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=name)
    moved = found.generator.state_dict()["inner.to_image.weight"] - start["inner.to_image.weight"]
    assert float(moved.abs().max()) > 1e-3
    assert (out / "checkpoints" / "last.pt").is_file()

    with pytest.raises(ValueError, match=r"settings: rank 1 has .* rank 0 has"):
        trained(folder, 6 + min(rank, 1), process_group=group)
    if rank == 0:
        (folder / "damaged" / "checkpoints").mkdir(parents=True)
        (folder / "damaged" / "checkpoints" / "last.pt").write_bytes(b"PK")
    dist.barrier()
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):  # in every process
        trained(folder, 6, process_group=group, out=folder / "damaged")

    # Begun by one process, gone on with by all.
    if rank == 0:
        trained(folder, 4, out=folder / "alone")
        state = training.load_checkpoint(folder / "alone" / "checkpoints" / "last.pt")
        state["settings"]["steps"] = 6
        torch.save(state, folder / "alone" / "checkpoints" / "last.pt")
    dist.barrier()
    with pytest.raises(CheckpointError, match=rf"written by 1 process.*now there are {world}"):
        trained(folder, 6, process_group=group, out=folder / "alone")
    resumed = trained(folder, 6, process_group=group, out=folder / "alone", elastic=True)
    for name, value in resumed.generator.state_dict().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-9, msg=name)


def training_by_rows_is_that_of_one_process(rank: int, world: int, folder: Path) -> None:
    """A process has few of the rows of a batch, and one has some images of a row alone."""
    release = dpmmd.Release.load(folder / "modes.safetensors")
    settings = TrainSection(
        steps=4, batch_size=11, images_per_row=5, lr=1e-2, estimator="unbiased", schedule="constant"
    )

    def trained(**options: Any) -> training.Trained:
        encoder, generator = small_encoder().double(), Double(release.num_rows)
        return training.train(release, encoder, generator, settings, progress=False, **options)

    expected = trained()
    found = trained(process_group=dist.group.WORLD)
    assert found.modes == expected.modes is not None
    for name, value in found.generator.state_dict().items():
        own = expected.generator.state_dict()[name]
        torch.testing.assert_close(value, own, rtol=1e-6, atol=1e-9, msg=name)


def everything(rank: int, world: int, folder: Path) -> None:
    training_is_that_of_one_process(rank, world, folder)
    training_by_rows_is_that_of_one_process(rank, world, folder)
    loss_is_that_of_the_whole_batch(rank, world)
    generator_is_that_of_the_whole_batch(rank, world)
    what_differs_is_refused_everywhere(rank, world)
    what_one_refuses_stops_all(rank, world)
    if sys.platform == "linux":
        a_budget_too_small_for_one_stops_all(rank, world, folder)


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_are_one_process(world: int, tmp_path: Path) -> None:
    dpmmd.release(
        images(60),
        small_encoder().double(),
        epsilon=5.0,
        delta=1e-3,
        adjacency="replace-one",
        num_classes=3,
        progress=False,
        out=tmp_path / "release.safetensors",
    )
    releases(double=True)[1].save(tmp_path / "modes.safetensors")
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


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    dpmmd.release(
        images(30),
        dpmmd.encoders.load("squeezenet1.1", taps=["conv1"]),
        epsilon=5.0,
        delta=1e-3,
        adjacency="replace-one",
        num_classes=3,
        progress=False,
        out=tmp_path / "release.safetensors",
    )
    (tmp_path / "recipe.toml").write_text(
        "[data]\nsource = 'unused'\n[release]\nepsilon = 5\ndelta = 1e-3\nadjacency = 'replace-one'"
        "\n[generator]\nbase_channels = 2\n[train]\ncheckpoint_every = 20\n"
    )
    return tmp_path


def torchrun(folder: Path, *options: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", "-m", "dpmmd", "train", str(folder / "release.safetensors")]
    command += ["--recipe", str(folder / "recipe.toml"), "--out", str(folder / "run"), "--json"]
    command += map(str, options)
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_torchrun_trains_and_the_first_process_alone_speaks(toy: Path) -> None:
    job = torchrun(toy, "--steps", 3, "--batch-size", 8)
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert json.loads(out)["step"] == 3
    assert "warning:" not in err  # of PyTorch's, about what a user cannot change
    assert training.load_checkpoint(toy / "run" / "checkpoints" / "last.pt")["processes"] == 2
    job = torchrun(toy, "--steps", 3, "--batch-size", 1)
    _, err = job.communicate(timeout=120)
    assert job.returncode != 0
    assert "batch_size=1: expected at least one image for each of the 2 processes" in err


def test_a_killed_process_stops_them_all(toy: Path) -> None:
    job = torchrun(toy, "--steps", 100_000, "--batch-size", 8)
    children: list[psutil.Process] = []
    deadline = time.monotonic() + 90
    while len(children) < 2 or not (toy / "run" / "checkpoints" / "last.pt").exists():
        assert time.monotonic() < deadline
        assert job.poll() is None
        time.sleep(0.2)
        children = psutil.Process(job.pid).children()
    children[-1].kill()
    job.communicate(timeout=90)
    assert job.returncode != 0
    assert not any(child.is_running() for child in children)
    training.load_checkpoint(toy / "run" / "checkpoints" / "last.pt")  # whole


LAST = """
import atexit, sys
import torch.distributed as dist
from dpmmd.distributed import leave
leave(1)  # nothing was begun
dist.init_process_group("gloo", f"file://{sys.argv[1]}", rank=0, world_size=1)
atexit.register(print, "the interpreter was taken down")
print("said before")
leave(3)
"""


def test_leaving_ends_the_process_as_it_is(tmp_path: Path) -> None:
    # Taking down the interpreter now and then aborts one of gloo's threads, and the process.
    command = [sys.executable, "-c", LAST, str(tmp_path / "store")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (3, "said before\n"), done.stderr
