"""The loss as a CUDA graph, in a loop of the caller's: what can be known of it without a GPU."""

from __future__ import annotations

import copy
import pickle
import random
import warnings
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpmmd import _capture, _graphed, backends
from dpmmd._contract.capturing import is_captured
from dpmmd._contract.lending import lend
from dpmmd.encoders import Encoder
from dpmmd.nn import ESTIMATORS, MMDLoss
from dpmmd.privacy import Release
from tests.conftest import TwoTaps, small_encoder
from tests.core.test_nn import batch, make_release, value_and_gradient
from tests.played import Played
from tests.played import played as played

RELEASES: dict[str, dict[str, Any]] = {
    "labelled": {"moments": (1, 2)},
    "unlabelled": {"num_classes": None},
    "shared": {"shared_taps": 1},
}


def pair(release: Release, encoder: Encoder | None = None, **options: Any) -> list[MMDLoss]:
    """The same loss launched and as a graph, each with an encoder of its own."""
    found = []
    for graph in (False, True):
        own = copy.deepcopy(encoder) if encoder is not None else small_encoder()
        found.append(MMDLoss(release, own, graph=graph, **options).train())
    return found


def state_of(loss: MMDLoss) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in loss.state_dict().items() if not k.startswith("encoder.")}


def assert_same(plain: MMDLoss, graphed: MMDLoss) -> None:
    expected, found = state_of(plain), state_of(graphed)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def step(losses: list[MMDLoss], x: Tensor, y: Tensor | None) -> None:
    """One call of both, which agree in everything."""
    (value, gradient), (found, theirs) = (value_and_gradient(loss, x, y) for loss in losses)
    assert torch.equal(found, value)
    assert torch.equal(theirs, gradient)
    assert float(gradient.norm()) > 0
    assert_same(*losses)


@pytest.mark.parametrize(
    ("kind", "estimator"), [c for c in product(RELEASES, ESTIMATORS) if c != ("shared", "unbiased")]
)
def test_a_loop_is_as_without_a_graph(played: Played, estimator: str, kind: str) -> None:
    release = make_release(**RELEASES[kind])
    losses = pair(release, estimator=estimator)
    for seed in range(4):
        x, labels = batch(seed=seed)
        step(losses, x, labels if release.metadata.labelled else None)
    assert played.replays == 4


def test_a_generator_trains_as_without_a_graph(played: Played) -> None:
    """Through an optimiser, with the images an intermediate result."""
    release = make_release()
    found = []
    for loss in pair(release):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(5, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
        optimizer = torch.optim.Adam(generator.parameters(), lr=1e-2)
        y = torch.arange(12) % 3
        for _ in range(5):
            optimizer.zero_grad()
            loss(generator(torch.randn(12, 5)), y).backward()
            optimizer.step()
        found.append([p.detach() for p in generator.parameters()])
    assert played.replays == 5
    for expected, value in zip(*found, strict=True):
        assert torch.equal(value, expected)


def write_in_place(graph: _graphed._Graph) -> None:
    """Lets replays write to where the capture's results lie, as a CUDA graph does."""
    replay, value, gradient = graph.replay, graph.value, graph.gradient

    def replayed() -> None:
        replay()
        value.copy_(graph.value)
        gradient.copy_(graph.gradient)
        graph.value, graph.gradient = value, gradient

    graph.replay = replayed


def test_two_losses_at_once_do_not_mix(played: Played) -> None:
    """What a later call replays does not reach a gradient that is still to be taken."""
    found = []
    for loss in pair(make_release()):
        value_and_gradient(loss, *batch(seed=2))
        if loss._graphs is not None:
            (graph,) = loss._graphs._made.values()
            write_in_place(graph)
        xs = [batch(seed=seed)[0].requires_grad_() for seed in (0, 1)]
        values = [loss(x, batch(seed=seed)[1]) for seed, x in enumerate(xs)]
        (2 * values[1]).backward(retain_graph=True)
        (values[0] + values[1]).backward()
        found.append([*(v.detach() for v in values), *(x.grad for x in xs)])
    for expected, value in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9)
    assert played.replays == 3


@pytest.mark.parametrize("keyword", ["graph", "inject"])
@pytest.mark.parametrize("value", ["yes", 1])
def test_switches_are_booleans(keyword: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{keyword}={value!r}: expected True"):
        MMDLoss(make_release(), small_encoder(), **{keyword: value})


def test_a_gradient_of_the_gradient_is_refused(played: Played) -> None:
    x, y = batch()
    x.requires_grad_()
    loss = pair(make_release())[1]
    (gradient,) = torch.autograd.grad(loss(x, y), x, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        gradient.sum().backward()
    assert played.replays == 1


def test_shapes_that_change_are_bounded_and_right(played: Played) -> None:
    losses = pair(make_release())
    for n in (5, 6, 7, 8):
        step(losses, *batch(n))
    with pytest.warns(UserWarning, match=r"graph=True: images \[9, 1, 8, 8\].*Keep to one batch"):
        step(losses, *batch(9))
    assert played.replays == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n in (10, 5, 9, 8):
            step(losses, *batch(n))
    assert played.replays == 6


def test_colour_and_dtype_have_graphs_of_their_own(played: Played) -> None:
    losses = pair(make_release())
    x, y = batch()
    for images in (x, x.expand(-1, 3, -1, -1), x.double(), x.transpose(2, 3)):
        step(losses, images, y)
    assert played.replays == 4
    assert losses[1]._graphs is not None
    assert len(losses[1]._graphs._made) == 3


def test_calls_without_a_gradient_are_launched(played: Played) -> None:
    losses = pair(make_release())
    x, y = batch()
    for i in range(2):
        step(losses, *batch(seed=i))
        values = []
        for loss in losses:
            loss.eval()
            values.append(value_and_gradient(loss, x, y)[1])
            loss.train()
            with torch.no_grad():
                values.append(loss(x.clone().requires_grad_(), y))
            values.append(loss(x, y))
        for expected, value in zip(values[:3], values[3:], strict=True):
            assert torch.equal(value, expected)
        assert_same(*losses)
    assert played.replays == 2


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("estimator", ["ema", "adam"])
def test_a_state_that_is_loaded_is_used(played: Played, estimator: str, assign: bool) -> None:
    losses = pair(make_release(), estimator=estimator)
    step(losses, *batch(seed=0))
    before = [copy.deepcopy(loss.state_dict()) for loss in losses]
    step(losses, *batch(seed=1))
    for loss, state in zip(losses, before, strict=True):
        loss.load_state_dict(state, assign=assign)
    assert_same(*losses)
    step(losses, *batch(seed=2))
    step(losses, *batch(seed=3))
    assert played.replays == 4


def other_target(loss: MMDLoss) -> None:
    loss.by_class.target = loss.by_class.target * 0.5


def other_weights(loss: MMDLoss) -> None:
    for p in loss.encoder.parameters():
        p.data = p.data * 1.1


def other_dtype(loss: MMDLoss) -> None:
    loss.double()


def other_module(loss: MMDLoss) -> None:
    backbone: Any = loss.encoder.backbone
    backbone.first = copy.deepcopy(backbone.first)
    nn.init.constant_(backbone.first.bias, 0.1)


def other_encoder(loss: MMDLoss) -> None:
    loss.encoder = small_encoder()
    other_weights(loss)


def filled_module(loss: MMDLoss) -> None:
    backbone: Any = loss.encoder.backbone
    backbone.last.append(nn.Softplus())


def other_rate(loss: MMDLoss) -> None:
    loss.by_class.lr = 0.5


def other_estimator(loss: MMDLoss) -> None:
    loss.estimator = "unbiased"


def in_place(loss: MMDLoss) -> None:
    loss.by_class.target.mul_(0.5)


CHANGES = [
    other_target,
    other_weights,
    other_dtype,
    other_module,
    other_encoder,
    filled_module,
    other_rate,
    other_estimator,
]


class Open(TwoTaps):
    """With a place for more modules."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Sequential()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(self.last(x))


@pytest.mark.parametrize("change", [*CHANGES, in_place])
def test_what_lies_elsewhere_is_noticed(played: Played, change: Any) -> None:
    """A replay reads addresses and numbers of the capture."""
    losses = pair(make_release(), encoder_of(Open()))
    step(losses, *batch(seed=0))
    made = losses[1]._graphs
    assert made is not None
    first = next(iter(made._made.values()))
    for loss in losses:
        change(loss)
    step(losses, *batch(seed=1))
    step(losses, *batch(seed=2))
    assert played.replays == 3
    assert (next(reversed(made._made.values())) is first) is (change is in_place)


def test_an_encoder_that_is_trained_is_launched(played: Played) -> None:
    losses = pair(make_release())
    step(losses, *batch(seed=0))
    found = []
    for loss in losses:
        loss.encoder.requires_grad_(True)
        loss(*batch(seed=1)).backward()
        x, y = batch(seed=2)
        loss(x.requires_grad_(), y).backward()
        found.append([p.grad for p in loss.encoder.parameters()])
        loss.encoder.requires_grad_(False)
    for expected, value in zip(*found, strict=True):
        assert expected is not None
        assert torch.equal(value, expected)
    assert played.replays == 1
    step(losses, *batch(seed=3))
    assert played.replays == 2


def test_autocast_has_a_graph_of_its_own(played: Played) -> None:
    losses = pair(make_release(), backend="torch")
    x, y = batch()
    for enabled in (True, False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled):
            value, found = (loss(x.clone().requires_grad_(), y) for loss in losses)
        torch.testing.assert_close(found, value)
    assert losses[1]._graphs is not None
    assert len(losses[1]._graphs._made) == 2


def test_a_graph_is_made_for_one_backend(played: Played) -> None:
    losses = pair(make_release())
    for name in ("torch", "auto", "torch"):
        with backends.use(name):
            step(losses, *batch())
    assert losses[1]._graphs is not None
    assert len(losses[1]._graphs._made) == 2


def test_copies_have_graphs_of_their_own(played: Played) -> None:
    plain, graphed = pair(make_release())
    step([plain, graphed], *batch(seed=0))
    for theirs in (copy.deepcopy(graphed), pickle.loads(pickle.dumps(graphed))):
        assert theirs._graphs._made == {}
        step([copy.deepcopy(plain), theirs], *batch(seed=1))
    assert played.replays == 3


def test_warm_up_and_capture_are_known_to_be_captured(
    played: Played, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that ``auto`` takes the same core in both."""
    seen = []
    forward = TwoTaps.forward

    def spied(self: TwoTaps, x: Tensor) -> dict[str, Tensor]:
        seen.append(is_captured())
        return forward(self, x)

    plain, graphed = pair(make_release())
    monkeypatch.setattr(TwoTaps, "forward", spied)
    value_and_gradient(plain, *batch())
    assert seen == [False]
    seen.clear()
    value_and_gradient(graphed, *batch())
    assert seen == [True] * 4 + [False]  # the last one is what is played


# ----------------------------------------------------------------------------- what cannot be one


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_failed_capture_leaves_no_trace(played: Played, estimator: str) -> None:
    losses = pair(make_release(), estimator=estimator)
    step(losses, *batch(seed=0))
    played.fails = RuntimeError("not permitted when stream is capturing.\nCompile with ...")
    x, y = batch(9)
    message = r"graph=True: the loss cannot be a CUDA graph \(not permitted when .*:\d+\)\. Leave"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            losses[1](x.clone().requires_grad_(), y)
    assert_same(*losses)
    played.fails = None
    step(losses, *batch(seed=1))
    step(losses, x, y)
    assert played.replays == 3


class Counts(TwoTaps):
    calls = 0

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        return super().forward(x * (1 if self.calls % 3 else 0.8))


class Assigns(TwoTaps):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        self.mean = 0.5 * self.mean + 0.5 * x.mean().detach()
        return super().forward(x)


class Draws(TwoTaps):
    drawing = False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(x * (random.random() if self.drawing else 1))


class Waits(TwoTaps):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return super().forward(x * (1 if x.mean().item() > -1 else 0.8))


def encoder_of(backbone: TwoTaps) -> Encoder:
    return Encoder(
        backbone,
        name="two-taps",
        weights_sha256="0" * 64,
        image_size=8,
        tap_signs={"a": "signed", "b": "nonnegative"},
    )


HOSTS: dict[type[TwoTaps], str] = {
    Counts: r"a forward pass changes Counts\.calls",
    Assigns: r"a forward pass changes Assigns\.mean",
    Draws: "a forward pass changes the host's random numbers: Python's",
}


@pytest.mark.parametrize("kind", HOSTS)
def test_work_of_the_host_is_found_before_it_is_left_out(
    played: Played, kind: type[TwoTaps]
) -> None:
    encoder = encoder_of(kind())
    loss = MMDLoss(make_release(), encoder, graph=True).train()
    if kind is Draws:
        encoder.backbone.drawing = True  # type: ignore[assignment]
    before, drawn = state_of(loss), random.getstate()
    x, y = batch()
    with pytest.raises(RuntimeError, match=rf"graph=True: the loss cannot .*\({HOSTS[kind]}\)"):
        loss(x.requires_grad_(), y)
    assert all(torch.equal(value, before[name]) for name, value in state_of(loss).items())
    assert random.getstate() == drawn
    assert not played.replays


def test_what_the_loss_refuses_is_refused_and_leaves_no_trace(played: Played) -> None:
    losses = pair(make_release())
    step(losses, *batch(seed=0))
    x, y = batch()
    bad: list[tuple[Tensor, Tensor | None]] = [
        (x, y.int()),
        (x, y[:-1]),
        (x, y + 3),
        (x, None),
        (x[0], y),
        (x + 2, y),
        (x.expand(-1, 2, -1, -1), y),
    ]
    for images, labels in bad:
        messages = []
        for loss in losses:
            with pytest.raises(ValueError) as caught:  # noqa: PT011 - the same message as launched
                loss(images.clone().requires_grad_(), labels)
            messages.append(str(caught.value))
        assert messages[0] == messages[1]
    assert_same(*losses)
    step(losses, *batch(seed=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"micro_batch": 4}, r"graph=True with micro_batch=4: micro-batches are cut on the host"),
        ({"state": "host"}, r"graph=True with state='host'"),
    ],
)
def test_what_does_not_go_with_a_graph(
    played: Played, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MMDLoss(make_release(), small_encoder(), graph=True, **options)


def test_a_graph_needs_cuda() -> None:
    with pytest.raises(ValueError, match=r"graph=True with the encoder on cpu: only CUDA devices"):
        MMDLoss(make_release(), small_encoder(), graph=True)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """One process, alone in its group."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="built without torch.distributed")
def test_with_processes_the_generator_alone_is_distributed(played: Played, group: Any) -> None:
    release = make_release()
    with pytest.raises(ValueError, match="graph=True with process_group: a graph holds the work"):
        MMDLoss(release, small_encoder(), graph=True, process_group=group)
    found = []
    for loss in pair(release):
        torch.manual_seed(0)
        generator = nn.Sequential(nn.Linear(5, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))
        model = nn.parallel.DistributedDataParallel(generator)
        for _ in range(2):
            loss(model(torch.randn(12, 5)), torch.arange(12) % 3).backward()
        found.append([p.grad for p in generator.parameters()])
    for expected, value in zip(*found, strict=True):
        assert value is not None
        assert torch.equal(value, expected)
    assert played.replays == 2


def test_an_estimate_that_is_lent_is_settled_before_a_replay(played: Played) -> None:
    """A launched loss, on Triton's core, may read it in a backward pass that is still to come."""
    x, y = batch()
    loss = pair(make_release())[1]
    loss(x.requires_grad_(), y)
    assert loss._graphs is not None
    (graph,) = loss._graphs._made.values()
    graph.replay = lambda: None  # what moves the state beside the host
    estimate = loss.by_class.difference
    lent, before = lend(estimate), estimate.clone()
    torch.autograd.graph.increment_version(estimate)  # as the node does after a core has lent it
    loss(x, y)
    estimate.zero_()
    assert torch.equal(lent.read(), before)


class Traced(Tensor):
    """What may be a tensor of somebody who traces."""


def test_a_graph_is_off_where_others_trace(played: Played) -> None:
    """There the loss is an operator of theirs, or kernels of their graph."""
    losses = pair(make_release(), backend="torch")
    x, y = batch()
    step(losses, x.as_subclass(Traced), y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_graphed, "_is_capturing", lambda device: True)
        step(losses, x, y)
    assert not played.replays


def test_autograd_is_told_that_a_replay_moves_the_state(played: Played) -> None:
    """What somebody has saved of it for a backward pass is then refused, not wrong."""
    x, y = batch()
    loss = pair(make_release())[1]
    loss(x.requires_grad_(), y)
    assert loss._graphs is not None
    (graph,) = loss._graphs._made.values()
    graph.replay = lambda: None
    weight = torch.ones((), requires_grad=True)
    product = (weight * loss.by_class.difference).sum()
    loss(x, y)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@on_a_gpu
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_loop_on_a_gpu_is_as_without_a_graph(estimator: str) -> None:
    release = make_release(moments=(1, 2))
    losses = pair(release, small_encoder().cuda(), estimator=estimator)
    for i in range(6):
        x, y = (t.cuda() for t in batch(12 if i % 3 else 9, seed=i))
        (value, gradient), (found, theirs) = (value_and_gradient(loss, x, y) for loss in losses)
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-6)
        assert float((theirs - gradient).norm()) <= 1e-3 * float(gradient.norm())
    for name, value in state_of(losses[0]).items():
        torch.testing.assert_close(state_of(losses[1])[name], value, rtol=1e-3, atol=1e-4)


@on_a_gpu
@pytest.mark.parametrize("kind", [Waits, Counts])
def test_an_encoder_that_waits_on_a_gpu_is_refused(kind: type[TwoTaps]) -> None:
    loss = MMDLoss(make_release(), encoder_of(kind()).cuda(), graph=True).train()
    before = state_of(loss)
    x, y = (t.cuda() for t in batch())
    with pytest.raises(RuntimeError, match="graph=True: the loss cannot be a CUDA graph"):
        loss(x.requires_grad_(), y)
    assert all(torch.equal(value, before[name]) for name, value in state_of(loss).items())
    assert torch.cuda.get_sync_debug_mode() == 0
    assert _capture.GRAPHED_ON == ("cuda",)
