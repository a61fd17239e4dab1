"""In which precision a generator trains: what is refused, what stays float32, what is the same."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dpmmd
from dpmmd import precision
from dpmmd import train as training
from dpmmd.distributed import _SyncedBatchNorm2d
from dpmmd.generators import ConvGenerator, ResNetGenerator
from dpmmd.nn import ESTIMATORS, MMDLoss
from dpmmd.privacy import Release
from dpmmd.recipe import RecipeError, parse, with_changes
from dpmmd.train import CheckpointError, ahead, plan, train
from dpmmd.train.state import Average, adam
from dpmmd.train.step import Stepper, rate
from tests.conftest import small_encoder
from tests.train.test_recipe import MINIMAL
from tests.train.test_train import (
    GENERATOR,
    Interrupting,
    assert_same,
    quick,
    run,
    state_of,
)
from tests.train.test_train_graph import Played, played

__all__ = ["played"]

CPU, GPU = torch.device("cpu"), torch.device("cuda:1")
VALUES = ("float32", "tf32", "bfloat16")


@pytest.fixture
def in_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """This CPU says that it has bfloat16, which it computes slowly if it has none."""
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: True)


@pytest.fixture
def without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "_cpu_has_bfloat16", lambda: False)


def capability(monkeypatch: pytest.MonkeyPatch, found: tuple[int, int]) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")


# ----------------------------------------------------------------------------- what is chosen


def test_the_device_decides_where_nothing_is_said(
    in_bfloat16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never bfloat16, whose quality nobody has measured on a GPU."""
    capability(monkeypatch, (9, 0))
    assert precision.of_generator(None, CPU) == "float32"
    assert precision.of_generator(None, GPU) == "tf32"
    for value in VALUES:
        assert precision.of_generator(value, CPU) == precision.of_generator(value, GPU) == value
        settings, written = with_changes(MINIMAL, [f"train.precision={value}"])
        assert parse(written).train.precision == settings.train.precision == value
    assert parse(MINIMAL).train.precision is None


@pytest.mark.parametrize("value", ["float16", "bf16", "", "float64"])
def test_a_recipe_refuses_other_words(value: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.precision = '.*': .*'float32', 'tf32' or 'bf"):
        with_changes(MINIMAL, [f'train.precision="{value}"'])


def test_what_a_device_cannot_do_is_refused(
    released: Release, without_bfloat16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = quick(precision="bfloat16")
    message = r"train\.precision='bfloat16': this CPU has no usable bfloat16 .*expected 'float32' "
    with pytest.raises(ValueError, match=message):
        run(released, settings)
    target, generator = plan.Target.of(released.metadata), ConvGenerator(num_classes=3)
    with pytest.raises(ValueError, match=message):
        plan.make("1TiB", small_encoder(), generator, target, settings)
    capability(monkeypatch, (7, 5))
    with pytest.raises(ValueError, match=r"T4 is of compute capability 7\.5, .*needs 8\.0.*cuda:1"):
        precision.of_generator("bfloat16", GPU)
    assert precision.of_generator("tf32", GPU) == "tf32"


def test_a_run_says_in_what_it_computes() -> None:
    on_cpu = "precision: encoder float32, generator float32"
    for released in (False, True):
        assert precision.told("float32", "float32", CPU, released=released) == on_cpu
        for encoder in ("tf32", "bfloat16"):
            told = precision.told(encoder, "bfloat16", GPU, released=released)
            assert told == f"precision: encoder {encoder}, generator bfloat16"


def test_a_release_that_exists_is_not_to_be_made_again() -> None:
    """Its encoder's precision is fixed: a word about another one would lead to a second release."""
    slow = "precision: encoder float32 (IEEE), generator tf32"
    told = precision.told("float32", "tf32", GPU, released=False)
    assert told == slow + '; encoder.precision = "tf32" lets it use the matrix units'
    assert precision.told("float32", "tf32", GPU, released=True) == slow


# ----------------------------------------------------------------------------- float32, tf32


def plain_training(released: Release, settings: Any) -> dict[str, Any]:
    """The same in one backward pass over loss and generator, and no word about precision."""
    with training.sampling.seeded(settings.seed):
        generator = training.loop.build(**GENERATOR.arguments(), num_classes=3).train()
    loss = MMDLoss(released, small_encoder(), estimator=settings.estimator).train()
    optimizer = adam(generator, settings, CPU, graphed=False)
    averaged = Average(generator, settings.ema_decay, CPU)
    rng = torch.Generator().manual_seed(settings.seed)
    for step in range(settings.steps):
        optimizer.param_groups[0]["lr"] = rate(settings, step)
        z = torch.randn(settings.batch_size, 5, generator=rng)
        y = training.balanced_labels(settings.batch_size, 3, offset=step * settings.batch_size)
        averaged.begin(step)
        optimizer.zero_grad()
        loss(generator(z, y), y).backward()
        optimizer.step()
        averaged.update_parameters(generator)
    return {"generator": generator.state_dict(), "averaged": averaged.state_dict()}


@pytest.mark.parametrize("value", [None, "float32", "tf32"])
def test_float32_and_tf32_are_plain_training_to_the_bit(
    released: Release, value: str | None, tmp_path: Path
) -> None:
    for estimator in ESTIMATORS if value is None else ("batch",):
        settings = quick(estimator=estimator, precision=value, estimator_lr=1e-3, steps=5)
        run(released, settings, out=tmp_path / estimator)
        state = state_of(tmp_path / estimator)
        assert state["settings"]["precision"] == (value or "float32")
        for key, expected in plain_training(released, settings).items():
            assert_same({**state[key]}, {**expected}, key)


def switches() -> list[bool]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    if hasattr(cudnn, "conv"):
        return [cudnn.conv.fp32_precision == "tf32", matmul.fp32_precision == "tf32"]
    return [cudnn.allow_tf32, matmul.allow_tf32]


class Look(torch.autograd.Function):
    """Notes the switches where forward and backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, note: Callable[[str], None], name: str) -> Tensor:
        note(name)
        ctx.note, ctx.name = note, name
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.note(f"{ctx.name}, backward")
        return grad, None, None


@pytest.mark.parametrize(("value", "allowed"), [("float32", False), ("tf32", True)])
@pytest.mark.parametrize("outside", [True, False])
def test_the_switch_holds_for_both_passes_of_the_generator_alone(
    released: Release, value: str, allowed: bool, outside: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The encoder keeps its own; PyTorch's settings are for the rest, and left as they were."""
    seen: dict[str, list[bool]] = {}

    def note(name: str) -> None:
        seen[name] = switches()

    class Noted(Interrupting):
        def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
            return Look.apply(super().forward(z, y), note, "generator")

    def as_on_a_gpu(value: str, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return precision.float32_products("ieee" if value == "float32" else "tf32")

    monkeypatch.setattr(precision, "products", as_on_a_gpu)
    encoder = small_encoder()
    plain = encoder.backbone.forward
    encoder.backbone.forward = lambda x: plain(Look.apply(x, note, "loss"))  # type: ignore[method-assign]
    with precision.float32_products("tf32" if outside else "ieee"):
        before = switches()
        settings = quick(steps=1, precision=value)
        train(released, encoder, Noted(None), settings, progress=False)
        assert switches() == before == [outside] * 2
    assert seen == {
        "generator": [allowed] * 2,
        "generator, backward": [allowed] * 2,
        "loss": [outside] * 2,
        "loss, backward": [outside] * 2,
    }


def test_the_switch_is_for_cuda_devices() -> None:
    before = switches()
    for value, wanted in (("float32", False), ("tf32", True), ("bfloat16", True)):
        with precision.products(value, GPU):
            assert switches() == [wanted] * 2
        with precision.products(value, CPU):
            assert switches() == before
    assert switches() == before


def all_that_pytorch_says() -> list[Any]:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    found: list[Any] = [cudnn.conv.fp32_precision, matmul.fp32_precision]
    for asked in (lambda: matmul.allow_tf32, torch.get_float32_matmul_precision):
        try:
            found.append(asked())
        except RuntimeError:
            found.append("they differ")
    return found


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch 2.9 and newer")
@pytest.mark.parametrize("how", ["ieee", "tf32"])
@pytest.mark.parametrize("outside", ["highest", "high", "medium", "newer", "differ"])
def test_the_older_switch_agrees_where_compilers_ask_it(outside: str, how: str) -> None:
    """torch.compile of PyTorch 2.9 and 2.10 fails where the two switches differ."""
    matmul = torch.backends.cuda.matmul
    try:
        torch.set_float32_matmul_precision(outside if outside in ("high", "medium") else "highest")
        if outside == "newer":
            matmul.fp32_precision = "tf32"
        elif outside == "differ":
            matmul.allow_tf32 = True
            matmul.fp32_precision = "ieee"
        before = all_that_pytorch_says()
        with precision.float32_products(how):
            if how == "tf32":
                assert matmul.allow_tf32
                assert torch.get_float32_matmul_precision() in ("high", "medium")
            assert matmul.fp32_precision == how
        assert all_that_pytorch_says() == before
    finally:
        torch.set_float32_matmul_precision("highest")


# ----------------------------------------------------------------------------- bfloat16


@contextlib.contextmanager
def handed_to_the_loss(seen: list[Tensor]) -> Iterator[None]:
    forward = MMDLoss.forward

    def noted(self: MMDLoss, images: Tensor, labels: Tensor | None = None) -> Tensor:
        assert not torch.is_autocast_enabled("cpu")
        seen.append(images)
        return forward(self, images, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MMDLoss, "forward", noted)
        yield


def test_a_step_in_bfloat16(released: Release, in_bfloat16: None, tmp_path: Path) -> None:
    """Weights, statistics, moments and images stay float32; every weight moves; it is rounded."""
    states = {}
    for value in ("float32", "bfloat16"):
        seen: list[Tensor] = []
        with handed_to_the_loss(seen):
            run(released, quick(steps=2, precision=value), out=tmp_path / value)
        assert {x.dtype for x in seen} == {torch.float32}
        states[value] = state_of(tmp_path / value)
    exact, half = states["float32"], states["bfloat16"]
    for key in ("generator", "averaged"):
        assert {v.dtype for v in half[key].values()} <= {torch.float32, torch.int64}
    moments = half["optimizer"]["state"].values()
    assert {m["exp_avg"].dtype for m in moments} == {torch.float32}
    for name, value in half["generator"].items():
        assert not value.is_floating_point() or not torch.equal(value, exact["generator"][name])
        torch.testing.assert_close(value, exact["generator"][name], rtol=0.1, atol=0.05)
    assert all(bool(m["exp_avg"].any()) for m in moments)


def test_an_average_of_many_is_no_average_of_bfloat16(in_bfloat16: None) -> None:
    """Running statistics and normalising are float32: 8 bits would lose small steps."""
    norm = nn.BatchNorm2d(3)
    x = torch.randn(64, 3, 5, 5) + 100
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x.bfloat16())
    assert norm.running_mean is not None
    assert norm.running_mean.dtype == torch.float32
    exact = nn.BatchNorm2d(3)
    exact(x.bfloat16().float())
    torch.testing.assert_close(norm.running_mean, exact.running_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_var, exact.running_var, rtol=1e-4, atol=0)
    assert out.dtype == torch.bfloat16


def test_synchronised_statistics_are_float32_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    norm, exact = _SyncedBatchNorm2d(3), nn.BatchNorm2d(3)
    norm.group = None  # type: ignore[assignment]
    x = (torch.randn(67, 3, 5, 5) + 20).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = norm(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact(x.float()), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(norm.running_mean, exact.running_mean, rtol=1e-5, atol=0)
    torch.testing.assert_close(norm.running_var, exact.running_var, rtol=1e-4, atol=0)
    out.float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_blocks_are_computed_again_in_bfloat16(in_bfloat16: None) -> None:
    """With the same result: what is recomputed runs under the same autocast."""
    found = []
    for recompute in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            generator = ResNetGenerator(num_classes=None, image_size=32, base_channels=2, z_dim=5)
        generator.recompute = recompute
        z = torch.randn(4, 5, generator=torch.Generator().manual_seed(1))
        images = precision.generated(generator, z, None, "bfloat16", CPU)
        images.square().sum().backward()
        found.append({name: p.grad for name, p in generator.named_parameters()})
        assert all(bool(gradient.any()) for gradient in found[-1].values())
    assert_same(*found)


def test_a_generator_of_ones_own_gives_the_loss_float32(
    released: Release, in_bfloat16: None
) -> None:
    class Rounded(Interrupting):
        def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
            return super().forward(z, y).bfloat16()

    seen: list[Tensor] = []
    with handed_to_the_loss(seen):
        run(released, quick(steps=1, precision="bfloat16"), generator=Rounded(None))
    assert seen[0].dtype == torch.float32


def test_graphed_steps_in_bfloat16_are_launched_ones(
    released: Release, in_bfloat16: None, played: Played, tmp_path: Path
) -> None:
    for graph in (False, True):
        settings = quick(steps=2, precision="bfloat16", graph=graph)
        run(released, settings, out=tmp_path / str(graph))
    plain, graphed = (state_of(tmp_path / str(graph))["generator"] for graph in (False, True))
    for name, value in plain.items():
        torch.testing.assert_close(graphed[name], value, rtol=1e-2, atol=1e-3)


def test_sampling_is_in_float32(released: Release, in_bfloat16: None) -> None:
    trained = run(released, quick(steps=1, precision="bfloat16"))
    seen = []
    trained.generator.register_forward_hook(
        lambda *_: seen.append(torch.is_autocast_enabled("cpu"))
    )
    training.sample(trained.generator, 3, 3)
    assert seen == [False]


def test_a_plan_measures_in_the_precision_of_the_training(
    released: Release, in_bfloat16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = set()
    generated = precision.generated

    def noted(*given: Any) -> Tensor:
        seen.add(given[3])
        return generated(*given)

    class Linear(nn.Module):
        z_dim = 5

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 64)

        def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
            return self.linear(z).view(-1, 1, 8, 8).sigmoid()

    monkeypatch.setattr(precision, "generated", noted)
    encoder, generator = small_encoder(), Linear()
    target = plan.Target.of(released.metadata)
    settings = quick(precision="bfloat16", memory="1TiB")
    made = plan.make("1TiB", encoder, generator, target, settings)
    assert seen == {made.precision} == {"bfloat16"}
    assert ("generator's precision", "bfloat16") in made.rows()
    other = quick(batch_size=made.batch_size)
    with pytest.raises(plan.PlanError, match=r"in bfloat16 on cpu; .* in float32 on cpu"):
        train(released, encoder, generator, other, plan=made, progress=False)


# ----------------------------------------------------------------------------- resumption


def test_a_training_goes_on_in_bfloat16_or_in_none(
    released: Release, in_bfloat16: None, tmp_path: Path
) -> None:
    """float32 and tf32 differ by rounding, and old checkpoints say neither."""
    run(released, quick(steps=2), out=tmp_path / "a")
    for value in ("tf32", "float32", None):
        assert run(released, quick(steps=2, precision=value), out=tmp_path / "a").step == 2
    with pytest.raises(CheckpointError, match="with precision = 'float32', now 'bfloat16'"):
        run(released, quick(steps=2, precision="bfloat16"), out=tmp_path / "a")
    path = tmp_path / "a" / "checkpoints" / "last.pt"
    old = training.load_checkpoint(path)
    del old["settings"]["precision"]
    old["settings"]["inject"] = False
    torch.save(old, path)
    assert run(released, quick(steps=2), out=tmp_path / "a").step == 2
    with pytest.raises(CheckpointError, match="with precision = None, now 'bfloat16'"):
        run(released, quick(steps=2, precision="bfloat16"), out=tmp_path / "a")
    run(released, quick(steps=2, precision="bfloat16"), out=tmp_path / "b")
    with pytest.raises(CheckpointError, match="with precision = 'bfloat16', now 'float32'"):
        run(released, quick(steps=2), out=tmp_path / "b")


def test_bfloat16_resumes_to_the_bit(released: Release, in_bfloat16: None, tmp_path: Path) -> None:
    settings = quick(steps=4, precision="bfloat16", checkpoint_every=2)
    run(released, settings, out=tmp_path / "whole")
    advance = Stepper.advance

    def fails(self: Stepper) -> Tensor:
        if self.state.step == 3:
            raise MemoryError
        return advance(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "advance", fails)
        with pytest.raises(MemoryError):
            run(released, settings, out=tmp_path / "parts")
    run(released, settings, out=tmp_path / "parts")
    assert_same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


def test_precision_is_refused_before_the_spend(
    tmp_path: Path, without_bfloat16: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: object) -> None:
        raise AssertionError("something was loaded")

    monkeypatch.setattr(ahead, "loaded", loaded)
    (tmp_path / "mine.toml").write_text(MINIMAL + '[train]\nprecision = "bfloat16"\n')
    with pytest.raises(ValueError, match=r"train\.precision='bfloat16': this CPU"):
        dpmmd.run.run(tmp_path / "mine.toml", tmp_path / "out", say=print, device="cpu")
    assert not (tmp_path / "out").exists()
