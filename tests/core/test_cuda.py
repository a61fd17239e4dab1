"""The CUDA core: its kernels on the host, against float64 and bit for bit; what it refuses."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import dpmmd
from dpmmd import backends, functional
from dpmmd._contract.protocol import Step
from dpmmd._contract.taps import empty_gradient
from dpmmd._cores import cpu, cuda
from dpmmd.bounds import BOUNDS, Bound
from dpmmd.nn import MMDLoss
from dpmmd.privacy.sums import PrivateSums
from tests.conftest import images, no_noise, nonnegative_encoder
from tests.core import test_bounded_sums as cpu_sums
from tests.core import test_mean_embedding as cpu_embedding
from tests.core.emulated import emulated, emulated_module  # noqa: F401

LABELS = torch.tensor([0, 3, 3, 0, 1, 0, 3, 1, 3, 0, 0])  # class 2 is absent
N = len(LABELS)
EVEN = ((8, 4, 4), (16, 2, 2), (64,))
ODD = ((3, 7, 5), (33,), (1,))
MANY = ((4,),) * 70  # more than a launch has addresses for
LONG = ((8, 40, 40),)  # several blocks of columns a tap


def features(
    sizes: Sequence[tuple[int, ...]],
    dtype: torch.dtype = torch.float32,
    n: int = N,
    *,
    planes: bool = False,
) -> list[Tensor]:
    """Half sparse; one row zero, one not a number, one infinite."""
    rng = torch.Generator().manual_seed(0)
    made = []
    for size in sizes:
        f = torch.randn(n, *size, generator=rng).relu().to(dtype)
        if n > 8:
            f[4] = 0
            if size == sizes[-1]:
                f[7] = float("nan")
            if size == sizes[0]:
                f[2] = float("inf")
        if f.ndim == 4 and not planes:
            f = f.contiguous(memory_format=torch.channels_last)
        made.append(f)
    return made


def results(
    fs: Sequence[Tensor], labels: Tensor | None, classes: int, backend: str, **options: Any
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Means, counts, and gradients of a fixed function of the means."""
    fs = [f.clone(memory_format=torch.preserve_format).requires_grad_() for f in fs]
    means, counts = functional.mean_embedding(fs, labels, classes, backend=backend, **options)
    weights = torch.randn(means.shape, generator=torch.Generator().manual_seed(1)).to(means.dtype)
    return means.detach(), counts, list(torch.autograd.grad((means * weights).sum(), fs))


def compare(
    fs: Sequence[Tensor], labels: Tensor | None = LABELS, classes: int = 4, **options: Any
) -> None:
    means, counts, gradients = results(fs, labels, classes, "cuda", **options)
    exact = [f.double() for f in fs]
    truth, numbers, slopes = results(exact, labels, classes, "torch", **options)
    assert counts.tolist() == numbers.tolist()
    assert means.dtype == torch.float32
    scale = float(truth.abs().max()) or 1.0
    torch.testing.assert_close(means.double(), truth, rtol=2e-5, atol=2e-6 * scale)
    # Of all taps: the gradient of a tap of one column is what two equal terms leave.
    most = max(float(expected.abs().max()) for expected in slopes) or 1.0
    for f, found, expected in zip(fs, gradients, slopes, strict=True):
        assert found.dtype == f.dtype
        assert found.stride() == empty_gradient(f).stride()
        rtol = 3e-5 if f.dtype == torch.float32 else 2**-8
        torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol / 8 * most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("moments", [(1,), (2,), (1, 2)])
def test_embedding(emulated: Any, dtype: torch.dtype, bound: str, moments: Any) -> None:  # noqa: F811
    compare(features(EVEN, dtype), bound=bound, moments=moments, clip=2.0)


@pytest.mark.parametrize("sizes", [ODD, MANY, LONG], ids=["odd", "many", "long"])
@pytest.mark.parametrize("bound", ["sphere", "ball-per-tap"])
@pytest.mark.parametrize("labelled", [True, False])
def test_embedding_of_other_sizes(emulated: Any, sizes: Any, bound: str, labelled: bool) -> None:  # noqa: F811
    labels, classes = (LABELS, 4) if labelled else (None, 1)
    compare(features(sizes), labels, classes, bound=bound, moments=(1, 2), clip=2.0)


@pytest.mark.parametrize("moments", [(1,), (1, 2)])
@pytest.mark.parametrize("bound", ["sphere", "ball-per-tap"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shapes", cpu_embedding.SHAPES)
def test_errors_are_those_of_plain_torch(
    emulated: Any,  # noqa: F811
    shapes: str,
    dtype: torch.dtype,
    bound: str,
    moments: Any,
) -> None:
    """At most twice (gradients thrice) them: the CPU core's test and tolerances."""
    fs = cpu_embedding.features(9, cpu_embedding.SHAPES[shapes], dtype)
    norms = torch.cat([f.float().flatten(1) for f in fs], dim=1).norm(dim=1)
    cpu_embedding.check(
        fs, cpu_embedding.labels(9, 4), 4, backend="cuda", moments=moments, bound=bound,
        clip=1.01 * float(norms.median()),
    )  # fmt: skip


def test_a_square_that_overflows_leaves_the_first_moment_alone(emulated: Any) -> None:  # noqa: F811
    fs = [f * 1e10 for f in features(EVEN, n=4)]  # f^4 is beyond float32
    means, _, gradients = results(fs, None, 1, "cuda", moments=(1, 2))
    truth, _, _ = results([f.double() for f in fs], None, 1, "torch", moments=(1,))
    torch.testing.assert_close(means[:1].double(), truth, rtol=1e-6, atol=1e-7)
    assert not means[1].any()
    assert all(g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("label", [-1, 4, 2**40])
def test_a_label_out_of_range_stops_the_device(emulated: Any, label: int) -> None:  # noqa: F811
    labels = LABELS.clone()
    labels[5] = label
    with pytest.raises(RuntimeError, match=r"device-side assert triggered \(CUDA error 710\)"):
        functional.mean_embedding(features(EVEN), labels, 4, backend="cuda")


@pytest.mark.parametrize("bound", ["sphere", "ball"])
def test_embedding_under_a_joint_bound(emulated: Any, bound: str) -> None:  # noqa: F811
    compare(features(EVEN), bound=bound, moments=(1, 2), joint_weight=0.5, clip=3.0)


def test_embedding_of_planes_views_and_few_images(emulated: Any) -> None:  # noqa: F811
    compare(features(EVEN, planes=True), moments=(1, 2))
    wide = torch.randn(N, 3 * 41).relu()
    compare([wide[:, 1:42], wide[:, 42:83]], moments=(1, 2))  # rows apart, and off 16 bytes
    compare([torch.randn(2 * N, 8, 2, 2).relu().contiguous(memory_format=torch.channels_last)[::2]])
    compare(features(EVEN, n=1), torch.tensor([3]), 4)
    fs = [torch.zeros(0, 8, 2, 2, requires_grad=True)]
    means, counts = functional.mean_embedding(
        fs, torch.zeros(0, dtype=torch.int64), 3, backend="cuda"
    )
    assert not means.any()
    assert counts.tolist() == [0, 0, 0]


def test_the_same_bits_each_time(emulated: Any) -> None:  # noqa: F811
    first, second = (results(features(LONG), LABELS, 4, "cuda", moments=(1, 2)) for _ in range(2))
    torch.testing.assert_close(first, second, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("estimator", ["batch", "ema", "adam"])
@pytest.mark.parametrize("dim", [1, 33, 2048])
@pytest.mark.parametrize("update", [True, False])
def test_estimator(emulated: Any, estimator: str, dim: int, update: bool) -> None:  # noqa: F811
    rng = torch.Generator().manual_seed(0)
    new = [torch.randn(2, 3, dim, generator=rng) for _ in range(5)]
    counts, steps = torch.tensor([2.0, 0.0, 5.0]), torch.tensor([3.0, 1.0, 0.0])
    state: dict[str, Any] = {"estimate": new[2], "steps": steps} if estimator != "batch" else {}
    if estimator == "adam":
        state |= {"first_moment": new[3], "second_moment": new[4].square()}
    options = {"decay": 0.9, "lr": 1e-2, "update": update}
    ours, theirs = copy.deepcopy(state), copy.deepcopy(state)
    for _ in range(2):
        found, expected = (
            core.estimate(new[0], counts, new[1], Step(estimator, **options, **own))
            for core, own in ((cuda.CORE, ours), (cpu.CORE, theirs))
        )
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize(("moments", "shared"), [((1,), 0), ((2,), 1), ((1, 2), 0), ((1, 2), 1)])
def test_integer_sums_are_the_definition_bit_for_bit(
    emulated: Any,  # noqa: F811
    dtype: torch.dtype,
    bound: str,
    moments: tuple[int, ...],
    shared: int,
) -> None:
    for sizes in (((8 * 4 * 4,), (64,)), ((105,), (33,), (1,))):
        fs = features(sizes, dtype)
        fs[0][1] *= -1 if bound == "ball" else 1
        fs[0][3] *= 1e18 if dtype == torch.float32 else 1e15
        fs[0][5] *= 1e-30
        labels = LABELS.clone()
        valid = torch.arange(N) % 5 != 1
        limits = torch.full((N,), 2**30)
        limits[6], limits[8] = 12345, 0
        options: dict[str, Any] = {
            "bound": Bound(moments, bound, 1.5, 0.7),
            "nonnegative": True,
            "shared_taps": shared,
        }
        columns = [
            len(moments) * sum(f.shape[1] for f in part) for part in (fs[shared:], fs[:shared])
        ]
        truth = PrivateSums(4, *columns)
        with backends.use("torch"):
            truth.add(fs, labels, valid, limits, **options)
        sums = torch.zeros(4, columns[0], dtype=torch.int64)
        row = torch.zeros(1, columns[1], dtype=torch.int64) if shared else None
        cuda.CORE.bounded_sums(fs, labels, valid, limits, sums=sums, shared=row, **options)
        expected, expected_row = truth.take()
        assert expected.any()
        assert torch.equal(sums, expected)
        assert row is None or torch.equal(row, expected_row)


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("moments", [(1,), (2,), (1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", cpu_sums.WIDTHS)
def test_integer_sums_of_hostile_images(
    emulated: Any,  # noqa: F811
    widths: str,
    dtype: torch.dtype,
    moments: Any,
    bound: str,
) -> None:
    """The CPU core's test: NaN, infinity, what is tiny and what is huge."""
    fs = cpu_sums.rows(17, cpu_sums.WIDTHS[widths], dtype)
    valid = torch.ones(17, dtype=torch.bool)
    valid[[7, 9]] = False
    ours, expected = cpu_sums.both(
        fs, cpu_sums.labels(17, 3), valid, 3, core=cuda.CORE,
        bound=Bound(moments, bound, 2.5, 0.3), nonnegative=True,
    )  # fmt: skip
    assert torch.equal(ours, expected)
    assert ours.any()


@pytest.mark.parametrize("weight", [1e-200, 1e-30, 1e30, 1e200, 1e290])
def test_integer_sums_of_extreme_joint_weights(emulated: Any, weight: float) -> None:  # noqa: F811
    ours, expected = cpu_sums.both(
        cpu_sums.rows(9, [40, 3], torch.float32), cpu_sums.labels(9, 2),
        torch.ones(9, dtype=torch.bool), 2, core=cuda.CORE,
        bound=Bound((1, 2), "sphere", 1.0, weight), nonnegative=True,
    )  # fmt: skip
    assert torch.equal(ours, expected)
    assert ours.any()


def test_integer_sums_by_limit_label_and_validity(emulated: Any) -> None:  # noqa: F811
    cpu_sums.check_limits_labels_and_validity(cuda.CORE)


def test_a_whole_release_has_the_same_integers(emulated: Any) -> None:  # noqa: F811
    released = []
    for backend in ("torch", "cpu", "cuda"):
        with backends.use(backend):
            released.append(
                dpmmd.release(
                    images(50),
                    nonnegative_encoder(),
                    epsilon=1.0,
                    delta=1e-3,
                    adjacency="replace-one",
                    num_classes=3,
                    moments=(1, 2),
                    progress=False,
                    batch_size=16,
                    insecure_test_noise=no_noise,
                ).sums
            )
    assert torch.equal(released[0], released[1])
    assert torch.equal(released[0], released[2])


@pytest.mark.parametrize("estimator", ["batch", "ema", "adam"])
def test_the_loss_module(emulated: Any, estimator: str) -> None:  # noqa: F811
    encoder = nonnegative_encoder()
    release = dpmmd.release(
        images(50), encoder, epsilon=1.0, delta=1e-3, adjacency="replace-one", num_classes=3,
        progress=False,
    )  # fmt: skip
    x, y = images(6, seed=3)
    found = []
    for backend in ("cuda", "torch"):
        loss = MMDLoss(release, encoder, estimator=estimator, lr=1e-2, backend=backend)
        pixels = (torch.from_numpy(x).float() / 255).requires_grad_()
        for _ in range(2):
            pixels.grad = None
            loss(pixels, torch.from_numpy(y)).backward()
        assert pixels.grad is not None
        found.append(pixels.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4 * float(found[1].abs().max()))


def test_opcheck(emulated: Any) -> None:  # noqa: F811
    fs: list[Any] = [f.requires_grad_() for f in features(EVEN, n=6)]
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
    fs = features(EVEN, n=4)
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
        cuda.CORE.forward(features(EVEN), None, 1, Bound())
