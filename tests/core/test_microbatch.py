"""Micro-batches: the loss and gradient of the whole batch, the state moved once, memory bounded."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import dpmmd
from dpmmd import functional
from dpmmd.microbatch import out_of_memory
from dpmmd.nn import ESTIMATORS, MMDLoss
from dpmmd.privacy import Release
from tests.conftest import images, no_noise, small_encoder
from tests.train.test_distributed import run

N = 13
RELEASES: dict[str, dict[str, Any]] = {
    "phi1": {},
    "phi2": {"moments": (2,)},
    "phi1 and phi2": {"moments": (1, 2)},
    "joint": {"moments": (1, 2), "joint_weight": 0.5},
    "ball": {"bound": "ball", "clip": 3.0},
    "sphere per tap": {"bound": "sphere-per-tap", "moments": (1, 2), "clip": 2.0},
    "ball per tap": {"bound": "ball-per-tap", "clip": 2.0},
    "unlabelled": {"num_classes": None, "moments": (1, 2)},
    "hybrid": {"shared_taps": 1, "moments": (1, 2)},
}


def make_release(encoder: dpmmd.encoders.Encoder, **options: Any) -> Release:
    arguments = {
        "epsilon": 5.0,
        "delta": 1e-3,
        "adjacency": "replace-one",
        "num_classes": 4,
        "progress": False,
        "insecure_test_noise": no_noise,
    }
    return dpmmd.release(images(60, classes=4), encoder, **{**arguments, **options})


def batch(labelled: bool, seed: int = 3) -> tuple[Tensor, Tensor | None]:
    """N images; class 1 is absent, class 3 has one image."""
    x, y = images(N, seed)
    y[:] = y % 2 * 2
    y[seed % N] = 3
    return torch.from_numpy(x).double() / 255, torch.from_numpy(y) if labelled else None


def step(loss: MMDLoss, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    value = loss(x, y)
    (2 * value).backward()  # an upstream gradient that is not 1
    assert x.grad is not None
    return value.detach(), x.grad


def far(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def fits(release: Release, estimator: str) -> bool:
    sphere = release.metadata.bound.startswith("sphere") and release.shared is None
    return estimator != "unbiased" or sphere


@pytest.mark.parametrize("options", RELEASES.values(), ids=RELEASES)
def test_it_is_the_whole_batchs_loss_and_gradient(options: dict[str, Any]) -> None:
    encoder = small_encoder().double()
    release = make_release(encoder, **options)
    for estimator in filter(lambda e: fits(release, e), ESTIMATORS):
        whole = MMDLoss(release, encoder, estimator=estimator, lr=1e-2).double()
        parts = {
            m: MMDLoss(release, encoder, estimator=estimator, lr=1e-2, micro_batch=m).double()
            for m in (1, 4, 5, 12, N)
        }
        for seed in (3, 5):  # the second step has a state
            x, y = batch(release.metadata.labelled, seed)
            value, gradient = step(whole, x, y)
            assert float(gradient.flatten(1).norm(dim=1).min()) > 0
            for m, loss in parts.items():
                other, found = step(loss, x, y)
                assert abs(other - value) <= 1e-12 * abs(value), (estimator, m)
                assert far(found, gradient) <= 1e-12, (estimator, m)
                for name, tensor in whole.state_dict().items():
                    kept = loss.state_dict()[name]
                    torch.testing.assert_close(kept, tensor, rtol=1e-11, atol=1e-15)


@pytest.mark.parametrize("options", [RELEASES["phi1 and phi2"], RELEASES["hybrid"]])
@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_in_float32_it_errs_no_more_than_the_whole_batch(
    options: dict[str, Any], backend: str
) -> None:
    encoder = small_encoder()
    release = make_release(encoder, **options)
    x, y = batch(True)
    exact = MMDLoss(release, copy.deepcopy(encoder), estimator="batch").double()
    value, gradient = step(exact, x.float().double(), y)
    found = {}
    for m in (None, 3):
        loss = MMDLoss(release, encoder, estimator="batch", micro_batch=m, backend=backend)
        found[m] = step(loss, x.float(), y)
    assert far(found[3][1], gradient) <= 3 * far(found[None][1], gradient)
    floor = 1e-7 * abs(value)  # the whole batch's one number may be right by chance
    assert abs(found[3][0] - value) <= 2 * max(abs(found[None][0] - value), floor)


def test_half_precision_features_are_summed_in_float32() -> None:
    class Halved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = small_encoder().backbone

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {name: tap.bfloat16() for name, tap in self.inner(x).items()}

    encoder = dpmmd.encoders.Encoder(
        Halved(),
        name="halved",
        weights_sha256="0" * 64,
        image_size=8,
        tap_signs={"a": "signed", "b": "nonnegative"},
    )
    release = make_release(encoder, moments=(1, 2))
    x, y = batch(True)
    (value, gradient), (other, found) = (
        step(MMDLoss(release, encoder, estimator="batch", micro_batch=m), x.float(), y)
        for m in (None, 3)
    )
    assert abs(other - value) <= 1e-5 * abs(value)  # bfloat16 sums would be off by 1e-3
    assert far(found, gradient) <= 1e-2  # the gradient in a tap is rounded to 8 bits


class Counting(nn.Module):
    """Counts encoder passes and the images whose features are alive, at the most."""

    def __init__(self, fail: dict[int, Exception] | None = None) -> None:
        super().__init__()
        self.inner = small_encoder().backbone
        self.passes: list[int] = []
        self.alive = self.most = 0
        self.fail = fail or {}
        self.counting = False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        if self.counting:
            self.passes.append(len(x))
            if error := self.fail.pop(len(self.passes), None):
                raise error
        taps = self.inner(x)
        if self.counting:
            self.alive += len(x)
            self.most = max(self.most, self.alive)
            weakref.finalize(taps["b"].untyped_storage(), self._gone, len(x))
        return taps

    def _gone(self, n: int) -> None:
        self.alive -= n


def counting(fail: dict[int, Exception] | None = None) -> tuple[Counting, dpmmd.encoders.Encoder]:
    backbone = Counting(fail)
    encoder = dpmmd.encoders.Encoder(
        backbone,
        name="counting",
        weights_sha256="0" * 64,
        image_size=8,
        tap_signs={"a": "signed", "b": "nonnegative"},
    )
    return backbone, encoder


def test_one_sweep_forward_and_one_backward_but_for_the_last_chunk() -> None:
    backbone, encoder = counting()
    release = make_release(encoder)
    loss = MMDLoss(release, encoder, micro_batch=4)
    x, y = batch(True)
    x = x.float().requires_grad_()
    backbone.counting = True
    value = loss(x, y)
    assert backbone.passes == [1, 4, 4, 4]
    value.backward()
    assert backbone.passes == [1, 4, 4, 4, 1, 4, 4]
    assert backbone.most == 4
    del value
    assert backbone.alive == 0

    backbone.passes.clear()
    with torch.no_grad():
        assert not loss(x, y).requires_grad
    assert not loss(x.detach(), y).requires_grad
    assert backbone.passes == [1, 4, 4, 4] * 2
    assert backbone.alive == 0


def test_a_chunk_has_rows_for_its_own_classes_only(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = small_encoder()
    loss = MMDLoss(make_release(encoder), encoder, micro_batch=4)
    seen: list[int] = []
    embed = MMDLoss._embed

    def watched(self: MMDLoss, x: Tensor, y: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
        seen.append(k)
        return embed(self, x, y, k)

    monkeypatch.setattr(MMDLoss, "_embed", watched)
    x = torch.from_numpy(images(16)[0]).float() / 255
    step(loss, x, torch.arange(16) % 4)  # dealt in turn, but taken class by class
    assert seen == [1] * 7


def test_backward_again_gives_the_same(encoder: dpmmd.encoders.Encoder) -> None:
    loss = MMDLoss(make_release(encoder), encoder, estimator="batch", micro_batch=5)
    x, y = batch(True)
    x = x.float().requires_grad_()
    value = loss(x, y)
    (first,) = torch.autograd.grad(value, x, retain_graph=True)
    (second,) = torch.autograd.grad(value, x, retain_graph=True)  # the last chunk's graph is gone
    assert far(second, first) < 1e-6
    (gradient,) = torch.autograd.grad(value, x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_the_second_sweep_computes_as_the_first_under_autocast() -> None:
    encoder = small_encoder()
    release = make_release(encoder)
    x, y = batch(True)
    found = []
    for m in (None, 5):
        pixels = x.float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            value = MMDLoss(release, encoder, estimator="batch", micro_batch=m)(pixels, y)
        value.backward()  # outside, as PyTorch recommends
        assert pixels.grad is not None
        found.append((value.detach(), pixels.grad))
    plain, _ = step(MMDLoss(release, encoder, estimator="batch", micro_batch=5), x.float(), y)
    assert abs(found[1][0] - found[0][0]) < 1e-4 * abs(found[0][0]) < abs(plain - found[0][0])
    assert far(found[1][1], found[0][1]) < 1e-2


@pytest.mark.parametrize("m", [0, -1, True, 2.0, "4"])
def test_a_size_that_is_none_is_refused(m: Any) -> None:
    encoder = small_encoder()
    with pytest.raises(ValueError, match=r"micro_batch=.*expected None or an int >= 1"):
        MMDLoss(make_release(encoder), encoder, micro_batch=m)


def test_what_does_not_fit_the_batch_is_refused_before_anything_moves() -> None:
    encoder = small_encoder()
    release = make_release(encoder)
    loss = MMDLoss(release, encoder, micro_batch=14)
    x, y = batch(True)
    x = x.float()
    assert y is not None
    with pytest.raises(ValueError, match=r"micro_batch=14: more than the batch's 13 images"):
        loss(x, y)
    loss = MMDLoss(release, encoder, micro_batch=4)
    before = copy.deepcopy(loss.state_dict())
    with pytest.raises(ValueError, match=r"labels: values from 0 to 4, expected 0\.\.3"):
        loss(x, y.clamp(max=1) * 4)
    with pytest.raises(ValueError, match=r"labels: torch.int32 \[13\].*expected int64 \[13\]"):
        loss(x, y.int())
    with pytest.raises(ValueError, match=r"labels: .*\[12\].*expected int64 \[13\]"):
        loss(x, y[1:])
    x[y.argmax()] = 2.0  # in the last chunk
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        loss(x, y)
    for name, tensor in loss.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    with pytest.raises(ValueError, match=r"state='disk': expected 'device' or 'host'"):
        MMDLoss(release, encoder, state="disk")


# ------------------------------------------------------------------------ out of memory


def test_what_is_a_lack_of_memory() -> None:
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError("shapes differ"))
    assert not out_of_memory(ValueError("can't allocate memory"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60)
    assert out_of_memory(caught.value)


@pytest.mark.parametrize("at", [1, 3, 4, 5, 7])  # passes 1 to 4 are the first sweep
@pytest.mark.parametrize("estimator", ["ema", "adam"])
def test_a_lack_of_memory_halves_the_chunk_once(at: int, estimator: str) -> None:
    error = MemoryError() if at % 2 else torch.OutOfMemoryError("CUDA out of memory")
    backbone, encoder = counting({at: error})
    release = make_release(encoder)
    whole = MMDLoss(release, encoder, estimator=estimator)
    loss = MMDLoss(release, encoder, estimator=estimator, micro_batch=4)
    x, y = batch(True)
    expected = step(whole, x.float(), y)
    backbone.counting = True
    with pytest.warns(RuntimeWarning, match=r"micro_batch=4: out of memory; going on with 2"):
        found = step(loss, x.float(), y)
    assert loss.micro_batch == 2
    assert loss.by_class.steps.tolist() == whole.by_class.steps.tolist() == [1, 0, 1, 1]
    torch.testing.assert_close(found[0], expected[0])
    assert far(found[1], expected[1]) < 1e-5
    torch.testing.assert_close(loss.by_class.difference, whole.by_class.difference)
    expected, found = (step(each, x.float(), y) for each in (whole, loss))
    assert far(found[1], expected[1]) < 1e-5

    backbone.fail = {len(backbone.passes) + 1: MemoryError("no more")}
    with pytest.raises(MemoryError, match="no more"):
        step(loss, x.float(), y)


def test_other_errors_are_not_taken_for_it() -> None:
    backbone, encoder = counting({2: RuntimeError("shapes differ")})
    loss = MMDLoss(make_release(encoder), encoder, micro_batch=4)
    backbone.counting = True
    with pytest.raises(RuntimeError, match="shapes differ"):
        step(loss, *batch(True))
    assert loss.micro_batch == 4


REAL = """
import re, resource, torch, dpmmd, numpy as np
from dpmmd.nn import MMDLoss
torch.set_num_threads(1)
encoder = dpmmd.encoders.load("vgg11", image_size=64, weights="random")
x = np.random.default_rng(0).integers(0, 256, (64, 3, 64, 64), dtype=np.uint8)
release = dpmmd.release((x[:4], np.arange(4) % 2), encoder, epsilon=1.0, delta=1e-3,
                        adjacency="replace-one", progress=False)
x = (torch.from_numpy(x).float() / 255).requires_grad_()
MMDLoss(release, encoder, micro_batch=32)(x).backward()  # what is loaded late is loaded now
used = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
for limit in range(400, 0, -20):
    x.grad = None
    loss = MMDLoss(release, encoder, estimator="ema", micro_batch=64)
    resource.setrlimit(resource.RLIMIT_AS, (used + (limit << 20), resource.RLIM_INFINITY))
    loss(x).backward()
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(loss.micro_batch, loss.by_class.steps.tolist(), bool(x.grad.flatten(1).any(1).all()))
    if loss.micro_batch < 64:
        break
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of Linux")
def test_a_real_lack_of_memory() -> None:
    # Freed memory goes back, so that every pass has to ask for it again.
    returned = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    done = subprocess.run(
        [sys.executable, "-c", REAL], capture_output=True, text=True, env=os.environ | returned
    )
    assert done.returncode == 0, done.stderr
    *enough, last = done.stdout.splitlines()
    assert set(enough) <= {"64 [1.0] True"}
    assert last == "32 [1.0] True"
    assert "micro_batch=64: out of memory; going on with 32 images" in done.stderr


# ------------------------------------------------------------------------ processes


def parts_of_ranks_in_micro_batches(rank: int, world: int, _: Path) -> None:
    encoder = small_encoder().double()
    release = make_release(encoder, moments=(1, 2))
    alone = MMDLoss(release, encoder).double()
    together = MMDLoss(release, encoder, micro_batch=2, process_group=dist.group.WORLD).double()
    x, y = batch(True)
    assert y is not None
    for _ in range(2):
        value, gradient = step(alone, x, y)
        mine, found = step(together, x.tensor_split(world)[rank], y.tensor_split(world)[rank])
        assert abs(mine - value) <= 1e-12 * abs(value)
        torch.testing.assert_close(
            found / world, gradient.tensor_split(world)[rank], rtol=1e-10, atol=1e-14
        )


def test_ranks_take_their_parts_in_micro_batches(tmp_path: Path) -> None:
    run(2, parts_of_ranks_in_micro_batches, tmp_path)


def test_means_of_the_batch_come_from_the_reference() -> None:
    """The sums over chunks against the definition, not only against the other path."""
    encoder = small_encoder().double()
    release = make_release(encoder, moments=(1, 2))
    loss = MMDLoss(release, encoder, estimator="batch", micro_batch=3).double()
    x, y = batch(True)
    means, counts = functional.mean_embedding(encoder(x), y, 4, moments=(1, 2), backend="torch")
    truth = functional.mmd_loss(means, counts, release.target.double())
    torch.testing.assert_close(loss(x, y), truth, rtol=1e-12, atol=0)
