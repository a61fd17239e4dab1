"""A whole step as a graph, and compiled: what can be known of them without a GPU."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import dpmmd
from dpmmd import _capture, encoders, injection
from dpmmd import train as training
from dpmmd._contract.capturing import is_captured
from dpmmd.generators import ConvGenerator
from dpmmd.nn import ESTIMATORS
from dpmmd.privacy import Release
from dpmmd.recipe import TrainSection
from dpmmd.train import checkpoint as checkpoints
from dpmmd.train import train
from dpmmd.train.graph import GraphedStepper
from dpmmd.train.step import Stepper
from tests.conftest import images, small_encoder
from tests.played import Played
from tests.played import played as played
from tests.train.test_modes import releases
from tests.train.test_train import GENERATOR, assert_same, make_release, quick, run, state_of


def weights(state: dict[str, Any]) -> dict[str, Tensor]:
    return {**state["generator"], **{f"averaged.{k}": v for k, v in state["averaged"].items()}}


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_graphed_steps_are_ordinary_steps(played: Played, estimator: str, tmp_path: Path) -> None:
    """Also with a schedule, an average of the weights and batch norm, whose states all move.

    On one release, always the same: by chance another one makes Adam's first steps depend on the
    last bits of a gradient.
    """
    rng = np.random.default_rng(0)
    released = dpmmd.release(
        images(200), small_encoder(), epsilon=5.0, delta=1e-3, adjacency="replace-one",
        num_classes=3, progress=False,
        insecure_test_noise=lambda n, sd: np.rint(rng.standard_normal(n) * sd).astype(np.int64),
    )  # fmt: skip
    run(released, quick(estimator=estimator, graph=False), out=tmp_path / "plain")
    assert not played.replays
    run(released, quick(estimator=estimator, graph=None), out=tmp_path / "graph")
    assert played.replays == quick().steps
    plain, graphed = (state_of(tmp_path / name) for name in ("plain", "graph"))
    for key, value in weights(plain).items():
        torch.testing.assert_close(
            weights(graphed)[key], value, rtol=1e-3, atol=2e-4, msg=lambda m, key=key: f"{key}: {m}"
        )
    for key, value in plain["loss"].items():
        torch.testing.assert_close(graphed["loss"][key], value, rtol=1e-3, atol=1e-4)
    assert int(graphed["averaged"]["n_averaged"]) == quick().steps


def test_graphed_steps_have_the_rows_of_their_batches(played: Played, tmp_path: Path) -> None:
    """Labels change from step to step, and the graph reads those that the host filled in."""
    _, second = releases()
    settings = {"batch_size": 20, "steps": 4, "estimator": "unbiased"}
    for name, graph in (("plain", False), ("graph", None)):
        run(second, quick(**settings, graph=graph), out=tmp_path / name)
    assert played.replays == 4
    plain, graphed = (weights(state_of(tmp_path / name)) for name in ("plain", "graph"))
    for key, value in plain.items():
        torch.testing.assert_close(graphed[key], value, rtol=1e-3, atol=2e-4, msg=key)


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

    advance, taken = Stepper.advance, []

    def stopping(self: Stepper) -> Tensor:
        taken.append(self.state.step)
        if len(taken) == 8:
            raise Stop
        return advance(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Stepper, "advance", stopping)
        with pytest.raises(Stop):
            run(released, quick(graph=first), out=parts)
    assert state_of(parts)["step"] == 5
    run(released, quick(graph=not first), out=parts)
    expected = weights(state_of(whole))
    for key, value in weights(state_of(parts)).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-3, atol=2e-4)


def test_injected_steps_are_ordinary_steps(released: Release, tmp_path: Path) -> None:
    """Through an encoder that has ReLUs to inject into, in training and resumed without."""
    import dpmmd

    encoder = dpmmd.encoders.load("squeezenet1.1", taps=["conv1", "fire2"], precision="float64")
    x = (images(30)[0], images(30)[1])
    release = dpmmd.release(
        x, encoder, epsilon=5.0, delta=1e-3, adjacency="replace-one", num_classes=3, progress=False
    )
    found = []
    for inject in (False, True):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            generator = ConvGenerator(num_classes=3, image_size=8, z_dim=5, base_channels=2)
        trained = train(release, encoder, generator, quick(steps=3, inject=inject), progress=False)
        found.append(trained.generator.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_a_graph_needs_cuda(released: Release) -> None:
    with pytest.raises(ValueError, match=r"settings.graph=True with the encoder on cpu"):
        run(released, quick(graph=True))


def test_a_graph_has_no_micro_batches(released: Release, played: Played) -> None:
    with pytest.raises(ValueError, match=r"settings.memory='8GiB': micro-batches are cut on the"):
        run(released, quick(graph=True, memory="8GiB"))
    with pytest.raises(ValueError, match=r"settings.graph=True with a plan: micro-batches are"):
        training.is_graphed(quick(graph=True), torch.device("cpu"), planned=True)


def test_a_graph_is_the_default_where_it_can_be() -> None:
    def team(size: int) -> Any:
        """A group of one process is one, too."""
        return type("Team", (), {"group": object(), "size": size})()

    cpu, gpu = torch.device("cpu"), torch.device("cuda:1")
    ours, own = ConvGenerator(num_classes=3, image_size=8, z_dim=5, base_channels=4), Own()
    for graph, wanted in ((None, False), (True, True), (False, False)):
        assert training.is_graphed(TrainSection(graph=graph), gpu, None, own) is wanted
    assert training.is_graphed(TrainSection(), gpu, None, ours)
    for graph, wanted in ((None, True), (True, True), (False, False)):
        assert training.is_graphed(TrainSection(graph=graph), gpu) is wanted
    for graph in (None, False):
        assert not training.is_graphed(TrainSection(graph=graph), cpu)
        assert not training.is_graphed(TrainSection(graph=graph, memory="8GiB"), gpu)
        for size in (1, 2):
            assert not training.is_graphed(TrainSection(graph=graph), gpu, team(size))
    with pytest.raises(ValueError, match=r"settings.graph=True with 2 processes"):
        training.is_graphed(TrainSection(graph=True), gpu, team(2))


# ----------------------------------------------------------------------------- what cannot be one


class Own(nn.Module):
    """A generator of the user's own; the parts below leave some of its work to the host."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.inner = ConvGenerator(num_classes=3, image_size=8, z_dim=5, base_channels=4)
        self.z_dim, self.calls = 5, 0

    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self.inner(z, y)


class Counts(Own):
    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        self.calls += self.training
        return self.inner(z, y) * (1 if self.calls % 3 else 0.8)


class Draws(Own):
    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self.inner(z, y) * (1 if torch.rand(()) < 0.5 else 0.8)


class DrawsOfPython(Own):
    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self.inner(z, y) * (1 if random.random() < 0.5 else 0.8)


class DrawsOfNumPy(Own):
    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        return self.inner(z, y) * (1 if np.random.random() < 0.5 else 0.8)  # noqa: NPY002


class Prepares(Own):
    """Does something once."""

    def __init__(self) -> None:
        super().__init__()
        self.ready, self.scale = False, nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        images = self.inner(z, y)
        if not self.ready:
            self.scale.data.copy_(images.mean().detach())
            self.ready = True
        return images * self.scale.clamp(0, 1)


class Assigns(Own):
    """Has a new tensor in the place of a buffer after every step."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        images = self.inner(z, y)
        self.mean = 0.5 * self.mean + 0.5 * images.mean().detach()
        return images * self.mean.clamp(0, 1)


class Breaks(Own):
    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        raise RuntimeError("a mistake")


class Waits(Own):
    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        images = self.inner(z, y)
        return images * (1 if images.mean().item() > 0.5 else 0.8)


class Repeats(Own):
    """Reads the state of the random generator, which only the capture itself refuses."""

    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        def part(z: Tensor) -> Tensor:
            images = self.inner(z, y)
            return 0.8 * nn.functional.dropout(images, 0.2, self.training)  # within [0, 1]

        return checkpoint(part, z, use_reentrant=False)


HOSTS = {
    Counts: r"a forward pass changes Counts\.calls",
    Prepares: r"a forward pass changes Prepares\.ready",
    Assigns: r"a forward pass changes Assigns\.mean",
    Draws: "a forward pass changes the host's random numbers: torch's",
    DrawsOfPython: "a forward pass changes the host's random numbers: Python's",
    DrawsOfNumPy: "a forward pass changes the host's random numbers: NumPy's",
}


@pytest.mark.parametrize("kind", HOSTS)
def test_work_of_the_host_is_found_before_it_is_left_out(
    released: Release, played: Played, kind: type[Own]
) -> None:
    """By itself a generator of the caller's is never recorded."""
    with pytest.raises(RuntimeError, match=rf"graph=True: a step cannot .*\({HOSTS[kind]}\)"):
        run(released, quick(graph=True), generator=kind())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(released, quick(), generator=kind())
    assert not played.replays


def test_a_generator_of_the_callers_is_recorded_if_asked_for(
    released: Release, played: Played
) -> None:
    run(released, quick(graph=True), generator=Own())
    assert played.replays == quick().steps


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_failed_capture_leaves_no_trace(
    released: Release, played: Played, estimator: str, tmp_path: Path
) -> None:
    run(released, quick(estimator=estimator, graph=False), out=tmp_path / "False")
    played.fails = RuntimeError("not permitted when stream is capturing.\nCompile with ...")
    with pytest.warns(RuntimeWarning, match=r"\(not permitted when stream is capturing, .*:\d+\)"):
        run(released, quick(estimator=estimator), out=tmp_path / "None")
    assert not played.replays
    compare_eager(tmp_path)


def compare_eager(folder: Path) -> None:
    """What was to be a graph is to the bit what was not, to the optimiser's options."""
    states = [state_of(folder / name) for name in ("False", "None")]
    for state in states:
        del state["settings"]["graph"]
    assert_same(*states)


def test_a_failed_capture_resumes_where_it_was(
    released: Release, played: Played, tmp_path: Path
) -> None:
    """The state before the warm-up is then not that of a new training."""
    for name in ("False", "None"):
        run(released, quick(steps=5, schedule="constant", graph=False), out=tmp_path / name)
    played.fails = RuntimeError("not permitted")
    go_on = {"steps": 9, "schedule": "constant"}
    with pytest.MonkeyPatch.context() as patch:
        without = checkpoints.WITHOUT_EFFECT | {"steps"}
        patch.setattr(checkpoints, "WITHOUT_EFFECT", without)
        run(released, quick(**go_on, graph=False), out=tmp_path / "False")
        with pytest.warns(RuntimeWarning, match="not permitted"):
            run(released, quick(**go_on), out=tmp_path / "None")
    compare_eager(tmp_path)


def test_a_graph_that_was_asked_for_is_no_less(released: Release, played: Played) -> None:
    played.fails = RuntimeError("not permitted")
    with pytest.raises(RuntimeError, match=r"graph=True: a step cannot .*\(not permitted,"):
        run(released, quick(graph=True))


@pytest.mark.parametrize("graph", [None, True])
def test_a_mistake_is_not_taken_for_a_capture(
    released: Release, played: Played, graph: bool | None
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="a mistake"):
            run(released, quick(graph=graph), generator=Breaks())


def test_the_callers_random_states_are_left_alone(released: Release, played: Played) -> None:
    encoder, generator = small_encoder(), Draws()
    before = torch.get_rng_state(), random.getstate()
    with pytest.raises(RuntimeError, match="torch's"):
        train(released, encoder, generator, quick(steps=1, graph=True), progress=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


@pytest.mark.parametrize("graph", [False, True])
def test_a_gpus_checkpoint_resumes_on_a_cpu(
    released: Release, played: Played, graph: bool, tmp_path: Path
) -> None:
    """Its optimiser had the steps on the device and the rate in a tensor."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder, steps in ((whole, 12), (parts, 5)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(training.step, "rate", lambda settings, step: 1e-2)
            run(released, quick(steps=steps, graph=graph), out=folder)
    path = parts / "checkpoints" / "last.pt"
    state = training.load_checkpoint(path)
    for group in state["optimizer"]["param_groups"]:
        group.update(capturable=True, foreach=None, lr=torch.tensor(0.5))
    state["settings"].update(steps=12, graph=None)
    torch.save(state, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training.step, "rate", lambda settings, step: 1e-2)
        run(released, quick(graph=graph), out=parts)
    compare = [state_of(folder) for folder in (whole, parts)]
    assert_same(*(weights(state) for state in compare))
    for state in compare:
        (group,) = state["optimizer"]["param_groups"]
        assert group["capturable"] is False
        assert isinstance(group["lr"], Tensor) is graph
        assert float(group["lr"]) == pytest.approx(1e-2)


# ----------------------------------------------------------------------------- what it leaves out


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize(
    ("before", "deterministic", "within"),
    [(False, False, True), (False, True, False), (True, True, True)],
)
def test_kernels_are_searched_for_a_capture_alone(
    released: Release,
    played: Played,
    monkeypatch: pytest.MonkeyPatch,
    fails: bool,
    before: bool,
    deterministic: bool,
    within: bool,
) -> None:
    """Not where PyTorch is to be deterministic; what the caller has set is left as it was."""
    cudnn, seen = torch.backends.cudnn, []
    outside = cudnn.benchmark
    warm_up, record = played.warm_up, played.record

    def noted(play: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*given: Any) -> Any:
            seen.append(cudnn.benchmark)
            return play(*given)

        return noting

    played.warm_up, played.record = noted(warm_up), noted(record)  # type: ignore[method-assign]
    played.fails = RuntimeError("not permitted") if fails else None
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: deterministic)
    advance, steps = Stepper.advance, []

    def stepped(self: Stepper) -> Tensor:
        steps.append(cudnn.benchmark)
        return advance(self)

    monkeypatch.setattr(Stepper, "advance", stepped)
    try:
        cudnn.benchmark = before
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            run(released, quick(steps=2), out=None)
        assert cudnn.benchmark is before
    finally:
        cudnn.benchmark = outside
    assert seen == [within] * 2
    assert steps == [before] * 2


def test_batches_are_counted_beside_the_graph(
    released: Release, played: Played, tmp_path: Path
) -> None:
    """Within a replay nothing counts; afterwards the counters are those of launched steps."""
    during: list[list[int]] = []
    work = GraphedStepper._work

    def noted(self: GraphedStepper) -> None:
        work(self)
        during.append([int(n) for counters in self.counters for n in counters])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphedStepper, "_work", noted)
        run(released, quick(graph=True), out=tmp_path / "graph")
    assert during[:4] == [[0] * 6] * 4  # three of the warm-up, and the first replay
    assert during[4:] == [[step] * 6 for step in range(1, quick().steps)]
    run(released, quick(graph=False), out=tmp_path / "plain")
    states = [weights(state_of(tmp_path / name)) for name in ("graph", "plain")]
    counters = [{k: v for k, v in s.items() if "num_batches" in k} for s in states]
    assert len(counters[0]) == 6
    assert_same(*counters)


def looks(released: Release, generator: nn.Module | None, settings: TrainSection) -> list[bool]:
    """Whether each recorded step asks the encoder to look at the values of its images."""
    seen, check = [], encoders.base._check_images

    def noted(x: Tensor, values: bool = True) -> None:
        seen.append(values)
        check(x, values)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoders.base, "_check_images", noted)
        run(released, settings, generator=generator) if generator else run(released, settings)
    return seen


def test_images_are_looked_at_beside_the_graph(released: Release, played: Played) -> None:
    """Where a sigmoid ends the generator: another's images are looked at in every step."""
    settings = quick(steps=2, graph=True)
    assert set(looks(released, None, settings)) == {False}
    assert set(looks(released, Own(), settings)) == {True}
    assert set(looks(released, None, quick(steps=2, graph=False))) == {True}
    encoder = small_encoder()
    with pytest.raises(RuntimeError, match="a mistake"):
        train(released, encoder, Breaks(), quick(graph=True), progress=False)
    assert encoder._range_known is False


@pytest.mark.parametrize("every", [1, 100])
def test_a_diverged_training_is_found_and_not_kept(
    released: Release, played: Played, every: int, tmp_path: Path
) -> None:
    """At a step that is logged, at the latest before a checkpoint."""
    run_work, steps = GraphedStepper._run, []

    def diverging(self: GraphedStepper) -> None:
        steps.append(self.state.step)
        if len(steps) == 7:
            with torch.no_grad():
                next(self.state.generator.parameters()).fill_(torch.nan)
        run_work(self)

    settings = quick(graph=True, log_every=every)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GraphedStepper, "_run", diverging)
        with pytest.raises(ValueError, match=r"step (7|10): the generator's images are not numb"):
            run(released, settings, out=tmp_path)
    assert len(steps) == (7 if every == 1 else 10)
    kept = state_of(tmp_path)
    assert kept["step"] == 5
    assert all(value.isfinite().all() for value in weights(kept).values())


def test_injection_that_is_left_open_is_for_captured_steps(
    released: Release, played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It makes launched steps slower, also where a step is no graph after all."""
    seen: list[bool] = []
    monkeypatch.setattr(injection, "wanted", lambda *_: bool(seen.append(is_captured())))
    played.fails = RuntimeError("not permitted")
    for inject, expected in ((None, [True] * 4 + [False]), (False, [])):
        seen.clear()
        with pytest.warns(RuntimeWarning, match="not permitted"):
            run(released, quick(steps=1, inject=inject))
        assert seen == expected


# ----------------------------------------------------------------------------- the optimiser


def fused(generator: nn.Module, settings: TrainSection, *_: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(
        generator.parameters(), lr=settings.lr, betas=settings.betas, fused=True
    )


@pytest.mark.parametrize("first", [True, False])
def test_another_kind_of_adam_goes_on(released: Release, first: bool, tmp_path: Path) -> None:
    """From one kernel for each operation to one for all, as on a GPU, and back."""
    run(released, quick(), out=tmp_path / "whole")
    advance = Stepper.advance

    def fails(self: Stepper) -> Tensor:
        if self.state.step == 5 and len(kinds) == 1:
            raise MemoryError
        return advance(self)

    kinds: list[bool] = []
    for is_fused in (first, not first):
        kinds.append(is_fused)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Stepper, "advance", fails)
            if is_fused:
                patch.setattr(training.loop, "adam", fused)
            with pytest.raises(MemoryError) if len(kinds) == 1 else contextlib.nullcontext():
                run(released, quick(), out=tmp_path / "parts")
    state = state_of(tmp_path / "parts")
    (group,) = state["optimizer"]["param_groups"]
    assert (group["fused"], group["foreach"]) == ((None, True) if first else (True, None))
    for key, value in weights(state_of(tmp_path / "whole")).items():
        torch.testing.assert_close(weights(state)[key], value, rtol=1e-3, atol=2e-4)
    for moments in state["optimizer"]["state"].values():
        assert float(moments["step"]) == quick().steps


@pytest.mark.parametrize(
    ("options", "place"), [({"fused": True}, "meta"), ({"capturable": True}, "meta"), ({}, "cpu")]
)
def test_steps_lie_where_adam_reads_them(options: dict[str, bool], place: str) -> None:
    """On the device of the weights for one that is fused or in a graph, else on the host."""
    p = nn.Parameter(torch.zeros(2, device="meta"))
    old, new = (torch.optim.Adam([p], foreach=True) for _ in range(2))
    old.state[p] = {"step": torch.tensor(3.0), "exp_avg": torch.zeros(2, device="meta")}
    new.param_groups[0].update(options)
    training.state.take_over(new, old.state_dict())
    assert new.state[p]["step"].device.type == place


def test_a_gpu_has_one_kernel_for_adam(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, Any]] = []
    real, settings = ConvGenerator(num_classes=3, image_size=8), quick()
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, **given: made.append(given))
    monkeypatch.setattr(torch, "tensor", lambda value, device: value)
    complex_ = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    for model, device, graphed in (
        (real, "cuda", True), (real, "cuda", False), (complex_, "cuda", False), (real, "cpu", False)
    ):  # fmt: skip
        training.state.adam(model, settings, torch.device(device), graphed)
    kinds = [(m["fused"], m["foreach"], m["capturable"]) for m in made]
    assert kinds == [(True, None, True), (True, None, False), *[(None, True, False)] * 2]


def test_the_average_on_a_device_takes_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, with the numbers of the recursion; first it is the generator itself."""
    generator = ConvGenerator(num_classes=3, image_size=8, z_dim=5, base_channels=4)
    averaged = training.state.Average(generator, 0.9, torch.device("cpu"))
    for name in ("_foreach_sub", "_foreach_mul", "_foreach_add", "_foreach_lerp"):
        monkeypatch.delattr(torch, name, raising=False)
    before = {k: v.clone() for k, v in averaged.module.state_dict().items()}
    with torch.no_grad():
        for p in generator.parameters():
            p.add_(torch.randn(p.shape))
    averaged.on_device.fill_(0.3)
    averaged.update_on_device(generator)
    for key, value in averaged.module.named_parameters():
        ours = generator.get_parameter(key).detach()
        assert torch.equal(value, (before[key] - ours) * 0.3 + ours)
    averaged.on_device.fill_(0)
    averaged.update_on_device(generator)
    assert_same(dict(averaged.module.state_dict()), dict(generator.state_dict()))


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def picture(release: Release, kind: type[Own] | None, graph: bool | None) -> Tensor:
    """Samples of a generator trained on a GPU, float32 [C, H, W] in 0..255."""
    random.seed(5)
    encoder = small_encoder().cuda()
    generator = None if kind is None else kind()
    trained = train(
        release,
        encoder,
        generator,
        quick(graph=graph),
        generator_settings=GENERATOR,
        progress=False,
    )
    device = torch.device("cuda")
    return torch.from_numpy(training.sample_grid(trained.generator, 3, device)).float()


def all_is_as_before() -> None:
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.rand(3, device="cuda")  # raises in a random generator that is left in a capture


@on_a_gpu
def test_a_graph_on_a_gpu(released: Release) -> None:
    with warnings.catch_warnings():
        for category in (UserWarning, RuntimeWarning):
            warnings.simplefilter("error", category)
        plain, graphed, default = (picture(released, None, graph) for graph in (False, True, None))
        own = picture(released, Own, graph=True)
    assert float((plain - graphed).abs().mean()) < 3
    assert float((default - graphed).abs().mean()) < 3
    assert own.isfinite().all()
    all_is_as_before()


@on_a_gpu
@pytest.mark.parametrize(
    ("kind", "reason"), [(Waits, "synchronizing"), (Repeats, "captur"), *HOSTS.items()]
)
def test_what_cannot_be_a_graph_on_a_gpu(released: Release, kind: type[Own], reason: str) -> None:
    """It raises, and a training that draws on the device can follow."""
    with pytest.raises(RuntimeError, match=reason):
        picture(released, kind, graph=True)
    all_is_as_before()
    picture(released, Repeats, graph=False)
    picture(released, Own, graph=True)


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

    def advance(self: Stepper) -> Tensor:
        state = self.state
        state.optimizer.step = lambda: stepped.append(True)  # type: ignore[assignment,method-assign]
        self._work()
        state.step += 1
        return torch.zeros(())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_capture, "GRAPHED_ON", ("meta",))
        patch.setattr(training.loop, "adam", lambda model, *_: torch.optim.Adam(model.parameters()))
        patch.setattr(GraphedStepper, "capture", lambda self: None)
        patch.setattr(GraphedStepper, "check", lambda self: None)  # of the loop, now and then
        patch.setattr(Stepper, "advance", advance)
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
    with contextlib.suppress(KeyError), training.loop._compiled([encoder.backbone, generator]):
        assert encoder.backbone._compiled_call_impl is not None
        raise KeyError
    assert encoder.backbone._compiled_call_impl is None
    assert generator._compiled_call_impl is None
    assert TrainSection().compile is False
