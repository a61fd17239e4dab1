"""A whole step as a graph, and compiled: what can be known of them without a GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpmmd import train as training
from dpmmd.nn import ESTIMATORS
from dpmmd.privacy import Release
from dpmmd.recipe import TrainSection
from dpmmd.train import train
from tests.conftest import small_encoder
from tests.test_train import GENERATOR, assert_same, make_release, quick, run, state_of

Work = Callable[[], None]


class Played:
    """Plays a graph on the CPU: what is recorded is run again at each replay, in place."""

    def __init__(self, warm_up_steps: int = 3) -> None:
        self.warm_up_steps, self.replays = warm_up_steps, 0

    def warm_up(self, work: Work, device: torch.device) -> None:
        for _ in range(self.warm_up_steps):
            work()

    def record(self, work: Work) -> Work:
        def replay() -> None:
            self.replays += 1
            work()

        return replay


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    it = Played()
    monkeypatch.setattr(training, "_GRAPHED_ON", ("cpu",))
    monkeypatch.setattr(training, "_warm_up", lambda *a: it.warm_up(*a))
    monkeypatch.setattr(training, "_record", lambda work: it.record(work))
    return it


def weights(state: dict[str, Any]) -> dict[str, Tensor]:
    return {**state["generator"], **{f"averaged.{k}": v for k, v in state["averaged"].items()}}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_graphed_steps_are_ordinary_steps(
    released: Release, played: Played, estimator: str, tmp_path: Path
) -> None:
    """Also with a schedule, an average of the weights and batch norm, whose states all move."""
    run(released, quick(estimator=estimator), out=tmp_path / "plain")
    run(released, quick(estimator=estimator, graph=True), out=tmp_path / "graph")
    assert played.replays == quick().steps
    plain, graphed = (state_of(tmp_path / name) for name in ("plain", "graph"))
    for key, value in weights(plain).items():
        torch.testing.assert_close(
            weights(graphed)[key], value, rtol=1e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}"
        )
    for key, value in plain["loss"].items():
        torch.testing.assert_close(graphed["loss"][key], value, rtol=1e-3, atol=1e-4)
    assert int(graphed["averaged"]["n_averaged"]) == quick().steps


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_the_warm_up_leaves_no_trace(
    released: Release, played: Played, estimator: str, tmp_path: Path
) -> None:
    settings = quick(estimator=estimator, graph=True)
    for steps in (0, 3):
        played.warm_up_steps = steps
        run(released, settings, out=tmp_path / str(steps))
    assert_same(state_of(tmp_path / "0"), state_of(tmp_path / "3"))


@pytest.mark.parametrize("first", [True, False])
def test_a_graphed_training_resumes_with_or_without_a_graph(
    released: Release, played: Played, first: bool, tmp_path: Path
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(released, quick(graph=not first), out=whole)

    class Stop(Exception):
        pass

    advance, taken = training._Run.advance, []

    def stopping(self: training._Run) -> Tensor:
        taken.append(self.step)
        if len(taken) == 8:
            raise Stop
        return advance(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training._Run, "advance", stopping)
        with pytest.raises(Stop):
            run(released, quick(graph=first), out=parts)
    assert state_of(parts)["step"] == 5
    run(released, quick(graph=not first), out=parts)
    expected = weights(state_of(whole))
    for key, value in weights(state_of(parts)).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=2e-4)


def test_a_graph_needs_cuda(released: Release) -> None:
    with pytest.raises(ValueError, match=r"settings.graph=True with the encoder on cpu"):
        run(released, quick(graph=True))


def test_a_graph_has_no_micro_batches(released: Release, played: Played) -> None:
    with pytest.raises(ValueError, match=r"settings.memory='8GiB': micro-batches are cut on the"):
        run(released, quick(graph=True, memory="8GiB"))


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("options", [{}, {"num_classes": None}], ids=["labelled", "unlabelled"])
def test_a_step_reads_nothing_from_the_device(estimator: str, options: dict[str, Any]) -> None:
    """On the meta device, where tensors have no values, any read by the host raises.

    The optimiser, whose part is PyTorch's (`capturable`), is left out.
    """
    encoder = small_encoder()
    release = make_release(**options)
    encoder.to("meta")
    settings = quick(estimator=estimator, graph=True)
    stepped = []

    def advance(self: training._Run) -> Tensor:
        self.optimizer.step = lambda: stepped.append(True)  # type: ignore[assignment,method-assign]
        self._work()
        self.step += 1
        return torch.zeros(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "_GRAPHED_ON", ("meta",))
        patch.setattr(training, "_adam", lambda model, *_: torch.optim.Adam(model.parameters()))
        patch.setattr(training._Run, "_captured", lambda self: self._work)
        patch.setattr(training._Run, "advance", advance)
        train(release, encoder, settings=settings, generator_settings=GENERATOR, progress=False)
    assert len(stepped) == settings.steps

    def reads(x: Tensor) -> None:
        x.sum().item()

    with pytest.raises(RuntimeError):  # such a read would have been found
        reads(torch.ones(2, device="meta"))


@pytest.mark.long
@pytest.mark.parametrize("estimator", ["batch", "adam"])
def test_compiled_steps_are_ordinary_steps(
    released: Release, estimator: str, tmp_path: Path
) -> None:
    """Generator and encoder whole, without a break; the loss between them stays as it is."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    for name, compiled in (("plain", False), ("compiled", True)):
        settings = quick(estimator=estimator, compile=compiled)
        run(released, settings, out=tmp_path / name)
    assert counters["stats"]["unique_graphs"] >= 2
    assert not counters["graph_break"]
    plain, compiled_ = (weights(state_of(tmp_path / name)) for name in ("plain", "compiled"))
    for key, value in plain.items():
        torch.testing.assert_close(compiled_[key], value, rtol=1e-2, atol=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("name", ["squeezenet1.1", "efficientnet-lite0", "vgg11", "resnet18"])
def test_encoders_compile_whole(name: str) -> None:
    """One graph, forward and backward, channels-last taps, the same features."""
    import dpmmd

    weights = "random" if name in ("vgg11", "resnet18") else None
    encoder = dpmmd.encoders.load(name, weights=weights)
    x = torch.rand(2, 3, 32, 32, requires_grad=True)
    maps = encoder(x)
    (expected,) = torch.autograd.grad(sum(m.square().mean() for m in maps), x)
    encoder.backbone.compile(fullgraph=True, dynamic=False)
    compiled = encoder(x)
    (found,) = torch.autograd.grad(sum(m.square().mean() for m in compiled), x)
    for a, b in zip(maps, compiled, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-3 * float(a.detach().abs().max()))
        assert b.is_contiguous(memory_format=torch.channels_last)
    assert float((found - expected).norm()) <= 1e-3 * float(expected.norm())


def test_modules_are_not_left_compiled(released: Release) -> None:
    encoder, generator = small_encoder(), nn.Identity()
    assert encoder.backbone._compiled_call_impl is None
    with contextlib.suppress(KeyError), training._compiled([encoder.backbone, generator]):
        assert encoder.backbone._compiled_call_impl is not None
        raise KeyError
    assert encoder.backbone._compiled_call_impl is None
    assert generator._compiled_call_impl is None
    assert TrainSection().graph is TrainSection().compile is False
