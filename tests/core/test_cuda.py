"""What the CUDA core refuses; what it computes is in `tests.core.conformance`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpmmd import backends, functional
from dpmmd._contract.protocol import Step
from dpmmd._cores import cuda
from dpmmd.bounds import Bound
from tests.core.emulated import emulated, emulated_module  # noqa: F401

LABELS = torch.tensor([0, 3, 3, 0, 1, 0])  # class 2 is absent


def features() -> list[Tensor]:
    rng = torch.Generator().manual_seed(0)
    maps = [torch.randn(6, *size, generator=rng).relu() for size in ((8, 4, 4), (16, 2, 2))]
    flat = torch.randn(6, 64, generator=rng).relu()
    return [*(f.contiguous(memory_format=torch.channels_last) for f in maps), flat]


@pytest.mark.parametrize("label", [-1, 4, 2**40])
def test_a_label_out_of_range_stops_the_device(emulated: Any, label: int) -> None:  # noqa: F811
    labels = LABELS.clone()
    labels[5] = label
    with pytest.raises(RuntimeError, match=r"device-side assert triggered \(CUDA error 710\)"):
        functional.mean_embedding(features(), labels, 4, backend="cuda")


def test_opcheck(emulated: Any) -> None:  # noqa: F811
    fs: list[Any] = [f.requires_grad_() for f in features()]
    arguments = (fs, torch.tensor([0, 1, 2, 0, 1, 2]), 3, [1], "sphere", 1.0, None, "cuda")
    torch.library.opcheck(
        torch.ops.dpmmd.mean_embedding.default,
        arguments,
        test_utils=("test_schema", "test_faketensor"),
    )


# What is refused ---------------------------------------------------------------------------------


def test_a_build_without_cuda_says_how_to_get_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Built:
        def __init__(self, architectures: str, count: int) -> None:
            self.cuda_architectures = lambda: architectures
            self.cuda_device_count = lambda: count
            self.cuda_describe = lambda error: f"error {-error}"

    for native, phrase in (
        (None, "did not load"),
        (Built("", 0), "without CUDA; install dpmmd where nvcc"),
        (
            Built("90", -35),
            r"no CUDA device can be used \(error 35\); install or update the NVIDIA",
        ),
        (Built("90", 0), "no CUDA device is visible; see CUDA_VISIBLE_DEVICES"),
    ):
        monkeypatch.setattr(cuda, "_native", native)
        with pytest.raises(ValueError, match=rf"backend='cuda': .*{phrase}.*or use 'auto'"):
            backends.resolve("cuda", "cuda")
    monkeypatch.setattr(cuda, "_native", Built("90", 1))
    assert backends.resolve("cuda", "cuda") == "cuda"
    with pytest.raises(ValueError, match=r"cannot run torch.float32 on cpu"):
        backends.resolve("cuda", "cpu")


def test_this_build_imports_without_a_driver() -> None:
    if not cuda._native.cuda_architectures():
        pytest.skip("built without nvcc")
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(ValueError, match=r"no CUDA device can be used .*driver"):
        backends.resolve("cuda", "cuda")


class Cuda:
    """What `_ready` asks of torch.cuda, of a device that has no kernels yet."""

    def __init__(self, capturing: bool) -> None:
        self.capturing = capturing

    def device(self, device: torch.device) -> Any:
        import contextlib

        return contextlib.nullcontext()

    def is_current_stream_capturing(self) -> bool:
        return self.capturing

    def get_device_capability(self, device: torch.device) -> tuple[int, int]:
        return 7, 5

    def get_device_name(self, device: torch.device) -> str:
        return "Tesla T4"


@pytest.mark.parametrize(
    ("capturing", "kind", "phrase"),
    [
        (True, RuntimeError, "Run one step before the capture"),
        (False, ValueError, r"no kernel for Tesla T4, sm_75 \(no kernel image\).*needs sm_80"),
    ],
)
def test_first_use_where_it_cannot_be(
    monkeypatch: pytest.MonkeyPatch, capturing: bool, kind: type[Exception], phrase: str
) -> None:
    class Native:
        cuda_load = staticmethod(lambda: -209)
        cuda_describe = staticmethod(lambda error: "no kernel image")
        cuda_architectures = staticmethod(lambda: "80 90")

    monkeypatch.setattr(torch, "cuda", Cuda(capturing))
    monkeypatch.setattr(cuda, "_native", Native)
    with pytest.raises(kind, match=phrase), cuda._ready(torch.device("cuda", 0)):
        pass


def test_bad_arguments_never_reach_a_kernel(emulated: Any) -> None:  # noqa: F811
    fs = [f[:4] for f in features()]
    meta = torch.zeros(4, 64, device="meta")
    for bad, phrase in (
        ([], "expected at least one tap"),
        ([fs[0].double()], "expected torch.float32 or torch.bfloat16"),
        ([fs[0], fs[1].bfloat16()], "expected torch.float32"),
        ([fs[0], fs[1][:2]], "expected n=4"),
        ([fs[0], meta], "expected a dense tensor on cpu"),
        ([meta], "on a cpu device"),
        ([fs[0][:, 0, 0, 0]], "at least 2-d"),
    ):
        with pytest.raises(ValueError, match=phrase):
            cuda.CORE.forward(bad, None, 1, Bound())
    for labels in (torch.zeros(3, dtype=torch.int64), torch.zeros(4), LABELS[:4].to("meta")):
        with pytest.raises(ValueError, match=r"labels: .*expected int64"):
            cuda.CORE.forward(fs, labels, 4, Bound())
    x = torch.zeros(1, 2, 3)
    with pytest.raises(ValueError, match=r"target: .*expected torch.float32"):
        cuda.CORE.estimate(x, torch.ones(2), x.double(), Step())
    y, steps, turned = x.clone(), torch.zeros(2), torch.zeros(1, 3, 2).transpose(1, 2)
    with pytest.raises(ValueError, match="estimate: shares memory with target"):
        cuda.CORE.estimate(x, torch.ones(2), y, Step("ema", y, steps))
    with pytest.raises(ValueError, match="not contiguous"):
        cuda.CORE.estimate(x, torch.ones(2), x, Step("ema", turned, steps))


def test_two_devices_are_told_apart() -> None:
    means, target = torch.zeros(1, 2, 3), torch.zeros(1, 2, 3, device="meta")
    with pytest.raises(ValueError, match=r"target: .* on meta, expected it on cpu"):
        functional.mmd_loss(means, torch.ones(2), target)
    with pytest.raises(ValueError, match=r"counts: .* on meta"):
        functional.mmd_loss(means, torch.ones(2, device="meta"), means)
    labels = torch.zeros(2, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"labels: .* on meta"):
        functional.mean_embedding([torch.rand(2, 3)], labels, 2)


def test_a_kernel_that_cannot_be_launched(emulated: Any, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    class Failing:
        cuda_describe = staticmethod(lambda error: "unspecified launch failure")
        cuda_mean_embedding = staticmethod(lambda *_: -719)

    monkeypatch.setattr(cuda, "_native", Failing)
    with pytest.raises(RuntimeError, match=r"unspecified launch failure \(CUDA error 719\)"):
        cuda.CORE.forward(features(), None, 1, Bound())
