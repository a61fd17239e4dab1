"""Training: resumption to the bit, checkpoints that are refused, schedules, sampling, logs."""

from __future__ import annotations

import builtins
import os
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import dpmmd
from dpmmd import train as training
from dpmmd.generators import ConvGenerator
from dpmmd.nn import ESTIMATORS
from dpmmd.privacy import Release
from dpmmd.recipe import GeneratorSection, TrainSection
from dpmmd.train import (
    CheckpointError,
    Trained,
    load_checkpoint,
    load_generator,
    sample,
    sample_grid,
    save_png,
    tile,
    train,
)
from dpmmd.train.plan import Limits
from dpmmd.train.selection import Selection
from dpmmd.train.state import State
from dpmmd.train.step import Stepper, rate
from tests.conftest import images, no_noise, nonnegative_encoder, small_encoder

GENERATOR = GeneratorSection(name="conv", image_size=8, channels=1, z_dim=5, base_channels=4)
QUICK: dict[str, Any] = {
    "steps": 12,
    "batch_size": 10,  # not a multiple of the classes: labels go on where the last batch ended
    "lr": 1e-2,
    "warmup": 3,
    "checkpoint_every": 5,
    "grid_every": 4,
    "log_every": 2,
}


def make_release(**options: Any) -> Release:
    arguments = {
        "epsilon": 5.0,
        "delta": 1e-3,
        "adjacency": "replace-one",
        "num_classes": 3,
        "progress": False,
    }
    return dpmmd.release(images(200), small_encoder(), **{**arguments, **options})


def quick(**changes: Any) -> TrainSection:
    return TrainSection(**{**QUICK, **changes})


def run(release: Release, settings: TrainSection, **options: Any) -> Trained:
    if "generator" not in options:
        options.setdefault("generator_settings", GENERATOR)
    return train(release, small_encoder(), settings=settings, progress=False, **options)


def state_of(folder: Path) -> dict[str, Any]:
    """A checkpoint without what may differ between two equal runs."""
    state = load_checkpoint(folder / "checkpoints" / "last.pt")
    del state["seconds"]
    return state


def assert_same(a: Any, b: Any, where: str = "state") -> None:
    assert type(a) is type(b), where
    if isinstance(a, Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}.{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        assert a == b, where


class Interrupting(nn.Module):
    """A generator that sends its process a real signal in the middle of one forward pass."""

    def __init__(self, at: int | None, number: int = signal.SIGINT, times: int = 1) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(3)
            self.inner = ConvGenerator(num_classes=3, image_size=8, z_dim=5, base_channels=4)
        self.dropout = nn.Dropout(0.3)
        self.z_dim, self.calls, self.at = 5, 0, at
        self.number, self.times = number, times

    def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
        self.calls += self.training
        if self.training and self.calls == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)
        noise = 0.02 * torch.rand(len(z), 1, 8, 8)  # also in eval mode: disturbs a shared state
        return self.dropout(self.inner(z, y)) * 0.65 + noise


# ----------------------------------------------------------------------------- resumption


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_interrupted_and_resumed_is_the_same_to_the_bit(
    released: Release, tmp_path: Path, estimator: str, number: int
) -> None:
    """With dropout and noise drawn from the global state, and grids in between."""
    settings = quick(estimator=estimator)
    whole = run(released, settings, generator=Interrupting(None), out=tmp_path / "whole")

    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt):
        run(released, settings, generator=Interrupting(7, number), out=tmp_path / "parts")
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert state_of(tmp_path / "parts")["step"] == 7  # the step was finished
    torch.manual_seed(99)  # nothing may depend on where the caller's generator is
    resumed = run(released, settings, generator=Interrupting(None), out=tmp_path / "parts")

    assert resumed.step == whole.step == 12
    assert_same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))
    assert_same(resumed.generator.state_dict(), whole.generator.state_dict())
    pictures = [sample(t.generator, 9, 3)[0] for t in (whole, resumed)]
    np.testing.assert_array_equal(*pictures)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_a_crash_resumes_from_the_last_checkpoint(
    released: Release,
    tmp_path: Path,
    estimator: str,
    ema_decay: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = quick(estimator=estimator, ema_decay=ema_decay)
    run(released, settings, out=tmp_path / "whole")
    advance = Stepper.advance

    def fails(self: Any, *arguments: Any) -> Tensor:
        if self.state.step == 8:
            raise MemoryError
        return advance(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "advance", fails)
        with pytest.raises(MemoryError):
            run(released, settings, out=tmp_path / "parts")
    assert state_of(tmp_path / "parts")["step"] == 5
    run(released, settings, out=tmp_path / "parts")
    assert_same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))


def test_a_second_interrupt_does_not_wait(released: Release, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(released, quick(), generator=Interrupting(7, times=2), out=tmp_path)
    assert state_of(tmp_path)["step"] == 5
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["last.pt"]


def test_a_finished_training_is_not_repeated(released: Release, tmp_path: Path) -> None:
    first = run(released, quick(), out=tmp_path)
    before = (tmp_path / "checkpoints" / "last.pt").read_bytes()
    again = run(released, quick(), out=tmp_path)
    assert again.step == 12
    assert again.seconds == first.seconds > 0
    assert (tmp_path / "checkpoints" / "last.pt").read_bytes() == before
    assert_same(again.generator.state_dict(), first.generator.state_dict())


def test_tensorboard_and_checkpoints_change_nothing(released: Release, tmp_path: Path) -> None:
    with_folder = run(released, quick(), out=tmp_path)
    without = run(released, quick(grid_every=1000, log_every=1000, checkpoint_every=1000))
    assert_same(with_folder.generator.state_dict(), without.generator.state_dict())


def test_the_seed_decides(released: Release) -> None:
    one, again, other = (run(released, quick(seed=seed)).generator for seed in (1, 1, 2))
    assert_same(one.state_dict(), again.state_dict())
    weights = [dict(g.named_parameters())["to_image.weight"] for g in (one, other)]
    assert not torch.equal(*weights)


def test_the_callers_random_state_is_left_alone(released: Release, tmp_path: Path) -> None:
    encoder, generator = small_encoder(), Interrupting(None)
    torch.manual_seed(17)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    for arguments in ({"generator": generator}, {"generator_settings": GENERATOR}):
        folder = tmp_path / next(iter(arguments))
        trained = train(
            released, encoder, settings=quick(), out=folder, progress=False, **arguments
        )
    sample(trained.generator, 5, 3)
    sample_grid(trained.generator, 3, torch.device("cpu"))
    assert torch.equal(before, torch.get_rng_state())
    np.testing.assert_array_equal(numpy_before, np.random.get_state()[1])  # noqa: NPY002


def test_it_works_outside_the_main_thread(released: Release) -> None:
    results: list[Trained] = []
    thread = threading.Thread(target=lambda: results.append(run(released, quick(steps=3))))
    thread.start()
    thread.join()
    assert results[0].step == 3


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("keep", [0, 1, 100, -1, -1000])
def test_a_truncated_checkpoint_is_refused(released: Release, tmp_path: Path, keep: int) -> None:
    run(released, quick(steps=2), out=tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    damaged = path.read_bytes()[:keep]
    path.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"last\.pt: not a readable checkpoint .*remove it"):
        run(released, quick(steps=2), out=tmp_path)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_generator(tmp_path)
    assert path.read_bytes() == damaged


def test_a_damaged_checkpoint_is_refused(released: Release, tmp_path: Path) -> None:
    run(released, quick(steps=2), out=tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    good = path.read_bytes()
    for position in np.linspace(40, len(good) - 1, 60).astype(int):
        damaged = bytearray(good)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        try:
            state = load_checkpoint(path)
        except CheckpointError:
            continue
        assert_same(state, state_of_bytes(good, tmp_path))  # padding between the entries


def state_of_bytes(data: bytes, folder: Path) -> dict[str, Any]:
    path = folder / "good.pt"
    path.write_bytes(data)
    return load_checkpoint(path)


def test_other_files_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for value in ({"format": 9}, [1, 2], torch.zeros(3)):
        torch.save(value, path)
        with pytest.raises(CheckpointError, match="not a checkpoint of this version"):
            load_checkpoint(path)
    torch.save({"format": Path("code")}, path)
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no such checkpoint"):
        load_generator(tmp_path)


def test_a_checkpoint_of_another_release_is_refused(released: Release, tmp_path: Path) -> None:
    run(released, quick(steps=2), out=tmp_path)
    with pytest.raises(CheckpointError, match="another release"):
        run(make_release(), quick(steps=2), out=tmp_path)


CHANGES: dict[str, Any] = {
    "steps": 3,
    "batch_size": 7,
    "lr": 2e-3,
    "betas": (0.9, 0.999),
    "schedule": "linear",
    "warmup": 1,
    "estimator": "ema",
    "ema_decay": 0.5,
    "seed": 1,
}


@pytest.mark.parametrize(("key", "value"), CHANGES.items(), ids=CHANGES)
def test_other_settings_are_refused_by_name(
    released: Release, tmp_path: Path, key: str, value: Any
) -> None:
    run(released, quick(steps=2), out=tmp_path)
    with pytest.raises(CheckpointError, match=f"made with {key} = "):
        run(released, quick(**{"steps": 2, key: value}), out=tmp_path)


def test_another_generator_is_refused(released: Release, tmp_path: Path) -> None:
    run(released, quick(steps=2), out=tmp_path)
    wider = GENERATOR.model_copy(update={"base_channels": 5})
    with pytest.raises(CheckpointError, match=r"'base_channels': 4.*'base_channels': 5"):
        run(released, quick(steps=2), out=tmp_path, generator_settings=wider)
    with pytest.raises(CheckpointError, match="Interrupting"):
        run(released, quick(steps=2), out=tmp_path, generator=Interrupting(None))


# ----------------------------------------------------------------------------- one's own generator


def test_a_generator_of_ones_own(released: Release, tmp_path: Path) -> None:
    trained = run(released, quick(), generator=Interrupting(None), out=tmp_path)
    with pytest.raises(
        CheckpointError, match=r"generator of your own \(Interrupting\).*generator="
    ):
        load_generator(tmp_path)
    loaded = load_generator(tmp_path / "checkpoints" / "last.pt", Interrupting(None))
    assert (loaded.num_classes, loaded.step, loaded.private) == (3, 12, True)
    assert_same(loaded.generator.state_dict(), trained.generator.state_dict())
    for a, b in zip(sample(loaded.generator, 7, 3), sample(trained.generator, 7, 3), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_wrong_instance_is_refused(released: Release, tmp_path: Path) -> None:
    run(released, quick(steps=2), generator=Interrupting(None), out=tmp_path)
    wider = Interrupting(None)
    wider.inner = ConvGenerator(num_classes=3, image_size=8, z_dim=5, base_channels=6)
    with pytest.raises(CheckpointError, match="not those of the generator"):
        load_generator(tmp_path, wider)
    with pytest.raises(CheckpointError, match="not those of the generator"):
        run(released, quick(steps=2), generator=wider, out=tmp_path)


def test_a_generator_without_z_dim_is_refused(released: Release) -> None:
    with pytest.raises(TypeError, match=r"Linear has no integer attribute z_dim"):
        run(released, quick(), generator=nn.Linear(2, 2))


def test_an_unlabelled_release_trains_a_generator_without_labels(tmp_path: Path) -> None:
    release = make_release(num_classes=None)
    trained = run(release, quick(steps=2), out=tmp_path)
    assert trained.num_classes is None
    assert load_generator(tmp_path).num_classes is None
    assert sample(trained.generator, 4, None)[1] is None


# ----------------------------------------------------------------------------- what it computes


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_training_lowers_the_loss(estimator: str) -> None:
    released = make_release(epsilon=1000.0)
    loss = dpmmd.nn.MMDLoss(released, small_encoder(), estimator="batch")
    z = torch.randn(90, 5, generator=torch.Generator().manual_seed(0))
    y = torch.arange(90) % 3

    def value(trained: Trained) -> float:
        with torch.no_grad():
            return float(loss(trained.generator.train()(z, y), y))

    settings = {"estimator": estimator, "estimator_lr": 0.1, "batch_size": 30, "ema_decay": 0.0}
    one = run(released, quick(**settings, steps=1, lr=1e-12))
    many = run(released, quick(**settings, steps=80, lr=3e-3))
    assert value(many) < 0.5 * value(one)


def test_averaged_weights_are_those_of_the_recursion(released: Release) -> None:
    expected: dict[str, Tensor] = {}
    snapshots: list[dict[str, Tensor]] = []
    update = torch.optim.swa_utils.AveragedModel.update_parameters

    def spy(self: Any, model: nn.Module) -> None:
        snapshots.append({k: v.detach().clone() for k, v in model.named_parameters()})
        update(self, model)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.swa_utils.AveragedModel, "update_parameters", spy)
        trained = run(released, quick(steps=6, schedule="constant", ema_decay=0.2))
    for t, weights in enumerate(snapshots):
        decay = min(0.2, (1 + t) / (10 + t)) if t else 0.0  # starts from the first
        for key, value in weights.items():
            expected[key] = value if not t else decay * expected[key] + (1 - decay) * value
    for key, value in trained.generator.named_parameters():
        torch.testing.assert_close(value, expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("constant", 1.0, 1.0), ("linear", 0.5, 0.01), ("cosine", 0.5, 0.000247)],
)
def test_schedules(schedule: str, middle: float, last: float) -> None:
    settings = quick(steps=110, warmup=10, lr=2.0, schedule=schedule)
    assert rate(settings, 0) == pytest.approx(0.2)
    assert rate(settings, 4) == pytest.approx(1.0)
    assert rate(settings, 9) == rate(settings, 10) == pytest.approx(2.0)
    assert rate(settings, 60) == pytest.approx(2 * middle)
    assert rate(settings, 109) == pytest.approx(2 * last, rel=1e-2)
    rates = [rate(settings, step) for step in range(10, 110)]
    assert rates == sorted(rates, reverse=True)
    assert min(rates) > 0
    assert rate(quick(steps=100, warmup=0, lr=2.0, schedule=schedule), 0) == 2.0


def test_the_stamp_is_carried_on(tmp_path: Path) -> None:
    for noise, private in ((no_noise, False), (None, True)):
        release = make_release(insecure_test_noise=noise)
        folder = tmp_path / str(private)
        assert run(release, quick(steps=1), out=folder).private is private
        assert load_checkpoint(folder / "checkpoints" / "last.pt")["private"] is private
        assert load_generator(folder).private is private


# ----------------------------------------------------------------------------- sampling


def test_samples_are_balanced_and_follow_the_seed(released: Release) -> None:
    generator = run(released, quick(steps=2)).generator
    generator.train()  # sample switches to eval mode by itself
    x, y = sample(generator, 31, 3, batch_size=7)
    assert x.shape == (31, 1, 8, 8)
    assert x.dtype == np.uint8
    assert y is not None
    assert y.dtype == np.int64
    assert sorted(np.bincount(y).tolist()) == [10, 10, 11]
    x2, y2 = sample(generator, 31, 3, batch_size=7)
    np.testing.assert_array_equal(x, x2)
    np.testing.assert_array_equal(y, y2)
    assert (x != sample(generator, 31, 3, batch_size=7, seed=1)[0]).any()


def test_temperature_scales_the_latent_points(released: Release) -> None:
    class Latent(nn.Module):
        z_dim = 16

        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, z: Tensor, y: Tensor | None) -> Tensor:
            return 0.5 + z.view(-1, 1, 4, 4) / 100

    def spread(images: np.ndarray) -> float:
        return float(images.std()) / 2.55

    assert spread(sample(Latent(), 500, None)[0]) == pytest.approx(1, abs=0.05)
    assert spread(sample(Latent(), 500, None, temperature=3)[0]) == pytest.approx(3, abs=0.15)
    cpu = torch.device("cpu")
    assert spread(sample_grid(Latent(), None, cpu, temperature=3)) == pytest.approx(3, abs=0.3)


def test_labels_go_with_their_images(released: Release) -> None:
    class Label(nn.Module):
        z_dim = 2

        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(()))

        def forward(self, z: Tensor, y: Tensor) -> Tensor:
            return (y / 255).view(-1, 1, 1, 1).expand(-1, 1, 2, 2)

    x, y = sample(Label(), 31, 3, batch_size=7)
    np.testing.assert_array_equal(x[:, 0, 0, 0], y)
    picture = sample_grid(Label(), 3, torch.device("cpu"), columns=4)
    assert picture.shape == (1, 6, 8)
    np.testing.assert_array_equal(picture[0, ::2, ::2], [[k] * 4 for k in range(3)])


def test_tile_and_png(tmp_path: Path) -> None:
    x = np.arange(6, dtype=np.uint8).reshape(6, 1, 1, 1).repeat(2, axis=2).repeat(2, axis=3)
    grid = tile(x, columns=3)
    assert grid[0, ::2, ::2].tolist() == [[0, 1, 2], [3, 4, 5]]
    path = tmp_path / "deep" / "grid.png"
    save_png(path, grid)
    np.testing.assert_array_equal(np.asarray(Image.open(path))[::4, ::4], [[0, 1, 2], [3, 4, 5]])
    colour = np.zeros((3, 2, 2), np.uint8)
    colour[0] = 255
    save_png(path, colour)
    assert np.asarray(Image.open(path))[0, 0].tolist() == [255, 0, 0]
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


# ----------------------------------------------------------------------------- logs


def test_tensorboard_gets_scalars_and_grids(released: Release, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(released, quick(), out=tmp_path)
    log = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    log.Reload()
    assert [e.step for e in log.Scalars("loss")] == [2, 4, 6, 8, 10, 12]
    lr = {e.step: e.value for e in log.Scalars("lr")}
    assert lr[2] == pytest.approx(rate(quick(), 1))
    assert [e.step for e in log.Images("samples")] == [4, 8, 12]


def test_it_trains_without_tensorboard(
    released: Release, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_import = builtins.__import__

    def refuse(name: str, *arguments: Any, **options: Any) -> Any:
        if name.startswith(("torch.utils.tensorboard", "tensorboard")):
            raise ImportError(name)
        return real_import(name, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "__import__", refuse)
        without = run(released, quick(), generator=Interrupting(None), out=tmp_path / "a")
    assert not (tmp_path / "a" / "tensorboard").exists()
    logged = run(released, quick(), generator=Interrupting(None), out=tmp_path / "b")
    assert_same(without.generator.state_dict(), logged.generator.state_dict())


def test_progress_goes_to_standard_error(
    released: Release, capsys: pytest.CaptureFixture[str]
) -> None:
    train(released, small_encoder(), settings=quick(), generator_settings=GENERATOR, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "12/12" in err
    assert "loss=" in err


def test_selection_keeps_the_best_step_and_survives_resuming(tmp_path: Path) -> None:
    """The weights kept are those of the step with the least recorded score."""
    encoder, other = small_encoder(), nonnegative_encoder()
    release = dpmmd.release(
        images(300),
        encoder,
        epsilon=50.0,
        delta=1e-3,
        adjacency="replace-one",
        num_classes=3,
        selection=other,
        progress=False,
    )
    settings = TrainSection(
        steps=12, batch_size=12, checkpoint_every=2, ema_decay=0.0, lr=0.3, schedule="constant"
    )
    scores: dict[int, float] = {}
    original = State.consider

    def recorded(self: State, score: float) -> None:
        scores[self.step] = score
        original(self, score)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "consider", recorded)
        trained = training.train(
            release,
            encoder,
            settings=settings,
            selection_encoder=other,
            out=tmp_path / "a",
            progress=False,
        )
    assert sorted(scores) == [2, 4, 6, 8, 10, 12]
    best = min(scores, key=lambda step: scores[step])
    assert trained.selected_step == best
    assert trained.step == 12
    scorer = Selection(release, other, torch.device("cpu"), Limits())
    assert scorer.score(trained.generator) == pytest.approx(scores[best], rel=1e-6)
    loaded = training.load_generator(tmp_path / "a")
    assert loaded.selected_step == best
    assert scorer.score(loaded.generator) == pytest.approx(scores[best], rel=1e-6)
    again = training.train(
        release,
        encoder,
        settings=settings,
        selection_encoder=other,
        out=tmp_path / "a",
        progress=False,
    )
    assert again.selected_step == best


def test_selection_needs_a_selection_block_and_its_encoder(tmp_path: Path) -> None:
    encoder = small_encoder()
    without = dpmmd.release(
        images(50), encoder, epsilon=5.0, delta=1e-3, adjacency="zero-out", progress=False
    )
    with pytest.raises(dpmmd.PrivacyError, match="no selection block"):
        training.train(without, encoder, selection_encoder=encoder, progress=False)
    released = dpmmd.release(
        images(50),
        encoder,
        epsilon=5.0,
        delta=1e-3,
        adjacency="zero-out",
        selection=nonnegative_encoder(),
        progress=False,
    )
    with pytest.raises(dpmmd.PrivacyError, match="encoder: its taps"):
        training.train(released, encoder, selection_encoder=encoder, progress=False)
