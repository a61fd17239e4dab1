"""Plans: budgets read, choices that fit, predictions near what is measured, the result the same."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import dpmmd
from benches import memory as bench
from dpmmd import generators
from dpmmd import run as runs
from dpmmd.bounds import Bound
from dpmmd.cli import app
from dpmmd.generators.layers import recomputed
from dpmmd.recipe import GeneratorSection, RecipeError, TrainSection, revised
from dpmmd.train import plan
from dpmmd.train.plan import PlanError, parse
from tests.conftest import images, no_noise, small_encoder

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
TARGET = plan.Target(Bound((1, 2)), num_classes=3, labelled=True, shared_taps=0)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8GiB", 8 << 30),
        (" 1.5 GiB ", 3 << 29),
        ("500MB", 500_000_000),
        ("2TB", 2 * 10**12),
        ("64KiB", 65536),
        ("0.8", 0.8),
        (".5", 0.5),
        ("1", 1.0),
    ],
)
def test_budgets(text: str, value: float) -> None:
    assert parse(text) == value


@pytest.mark.parametrize("text", ["", "8", "8 Gb", "0", "0GiB", "-1GiB", "1.5", "lots", "GiB"])
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(PlanError, match=r"memory=.*expected a size such as '8GiB'.*fraction"):
        parse(text)


def test_a_recipe_refuses_what_is_no_budget() -> None:
    assert revised(TrainSection(), {"memory": "8GiB"}).memory == "8GiB"
    with pytest.raises(RecipeError, match="memory = 'lots'"):
        revised(TrainSection(), {"memory": "lots"})


# ------------------------------------------------------------------ recomputed generator blocks


def make_generator(**options: Any) -> generators.ResNetGenerator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return generators.ResNetGenerator(
            num_classes=3, image_size=32, z_dim=5, base_channels=2, **options
        )


@pytest.mark.parametrize("momentum", [0.1, None])
def test_recomputed_blocks_give_the_same_bits(momentum: float | None) -> None:
    z, y = torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 3
    states = []
    for recompute in (False, True):
        generator = make_generator().train()
        generator.recompute = recompute
        for layer in generator.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.momentum = momentum
        for _ in range(2):
            out = generator(z, y)
            out.square().sum().backward()
        grads = {f"grad of {k}": p.grad for k, p in generator.named_parameters()}
        states.append({**generator.state_dict(), **grads, "out": out.detach()})
        assert all(
            layer.momentum == momentum
            for layer in generator.modules()
            if isinstance(layer, nn.BatchNorm2d)
        )
    for name, value in states[0].items():
        assert value is not None
        assert torch.equal(states[1][name], value), name
    assert int(states[1]["norm.num_batches_tracked"]) == 2
    assert int(states[1]["blocks.0.norm1.num_batches_tracked"]) == 2


def test_recomputed_blocks_keep_their_inputs_only() -> None:
    def kept(recompute: bool) -> int:
        generator = make_generator().train()
        generator.recompute = recompute
        found: dict[int, int] = {}

        def pack(t: torch.Tensor) -> torch.Tensor:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = generator(torch.randn(16, 5), torch.arange(16) % 3)
        # Hooks of the checkpoint are inner: what its blocks would keep does not get here.
        weights = {p.untyped_storage().data_ptr() for p in generator.parameters()}
        del out
        return sum(size for at, size in found.items() if at not in weights)

    assert kept(True) < 0.5 * kept(False)


def test_evaluation_does_not_recompute() -> None:
    generator = make_generator().eval()
    generator.recompute = True
    plain = make_generator().eval()
    z, y = torch.randn(4, 5), torch.arange(4) % 3
    assert torch.equal(generator(z, y), plain(z, y))


def test_dropout_in_a_recomputed_block_draws_the_same() -> None:
    block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    x = torch.ones(8, 4, requires_grad=True)
    torch.manual_seed(0)
    out = recomputed(block, x)
    out.sum().backward()
    torch.manual_seed(0)
    other = x.detach().clone().requires_grad_()
    block(other).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, other.grad)


# ------------------------------------------------------------------ plans


def small_plan(memory: str, **options: Any) -> plan.Plan:
    settings = TrainSection(batch_size=12, **options)
    return plan.make(memory, small_encoder(), make_generator(), TARGET, settings)


@linux
def test_the_batch_in_one_piece_where_it_fits_and_the_least_where_not() -> None:
    encoder, generator = small_encoder(), make_generator()
    before = {k: v.clone() for k, v in generator.state_dict().items()}
    state = torch.get_rng_state()
    settings = TrainSection(batch_size=12, estimator="adam")
    roomy = plan.make("1TiB", encoder, generator, TARGET, settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in generator.state_dict().items())
    assert all(p.grad is None for p in generator.parameters())
    assert roomy.budget == 1 << 40
    assert 0 < roomy.least <= roomy.peak
    assert roomy.seconds <= roomy.whole[1]
    assert "predicted peak" in str(roomy)
    assert json.loads(json.dumps(roomy.facts()))["whole"]["peak"] == roomy.whole[0]
    with pytest.raises(PlanError, match=r"memory='10MiB': 10 MiB on cpu; the least .* needs is"):
        plan.make("10MiB", encoder, generator, TARGET, settings)


@linux
def test_a_fraction_is_one_of_what_is_free() -> None:
    half = small_plan("0.5")
    assert 0 < half.budget < small_plan("1").budget


def test_a_system_that_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: Any, device: torch.device) -> None:
        raise FileNotFoundError("no /proc/self/clear_refs")

    monkeypatch.setattr(plan.Meter, "__init__", fails)
    with pytest.raises(PlanError, match=r"cannot be measured here \(no /proc.*needs Linux"):
        small_plan("1GiB")


@linux
def test_training_within_a_plan_is_training(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With any plan the same generator, but for rounding."""
    encoder = small_encoder()
    release = dpmmd.release(
        images(60),
        encoder,
        epsilon=5.0,
        delta=1e-3,
        adjacency="replace-one",
        num_classes=3,
        progress=False,
        insecure_test_noise=no_noise,
    )
    look = GeneratorSection(name="resnet", image_size=32, channels=3, z_dim=5, base_channels=2)
    make = plan.make

    def tight(*arguments: Any, **options: Any) -> plan.Plan:
        return dataclasses.replace(make(*arguments, **options), micro_batch=5, recompute=True)

    monkeypatch.setattr(plan, "make", tight)
    trained = {}
    for memory in (None, "1TiB"):
        settings = TrainSection(steps=3, batch_size=12, memory=memory, estimator="adam")
        trained[memory] = dpmmd.train.train(
            release, encoder, settings=settings, generator_settings=look, progress=True
        )
    told = capsys.readouterr().err
    assert told.count("memory: 5 of 12 images at a time, generator blocks computed again") == 1
    other = trained["1TiB"].generator.state_dict()
    for name, value in trained[None].generator.state_dict().items():
        torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-3)


@linux
def test_a_plan_that_is_given_is_not_measured_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, released: dpmmd.Release
) -> None:
    encoder = small_encoder()
    settings = TrainSection(steps=1, batch_size=12, memory="1TiB")
    look = GeneratorSection(name="resnet", image_size=32, channels=1, z_dim=5, base_channels=2)
    generator = generators.build(**look.arguments(), num_classes=3)
    target = plan.Target.of(released.metadata)
    made = plan.make("1TiB", encoder, generator, target, settings)
    made = dataclasses.replace(made, micro_batch=5, recompute=True)

    def measured(*_: Any, **__: Any) -> plan.Plan:
        raise AssertionError("measured again")

    monkeypatch.setattr(plan, "make", measured)
    trained = dpmmd.train.train(
        released, encoder, generator, settings, plan=made, selection_encoder=None
    )
    assert "memory: 5 of 12 images at a time" in capsys.readouterr().err
    assert trained.limits == plan.Limits(5, 12, recompute=True)
    assert generator.recompute is True
    for changes in ({"batch_size": 10}, {"device": "cuda:3"}, {"precision": "tf32"}):
        other = dataclasses.replace(made, **changes)
        with pytest.raises(PlanError, match=r"plan: made for batches of .*this process trains"):
            dpmmd.train.train(released, encoder, generator, settings, plan=other, progress=False)
    plain = TrainSection(steps=1, batch_size=12)
    trained = dpmmd.train.train(released, encoder, generator, plain, plan=made, progress=False)
    assert trained.limits.generated == 12


RECIPE = """
[data]
source = "nowhere"
{data}
num_classes = 3
[encoder]
name = "vgg11"
weights = "random"
taps = ["relu1_1"]
[release]
epsilon = 1.0
delta = 1e-5
adjacency = "replace-one"
[train]
batch_size = 8
{train}
"""


RUN = """[generator]
image_size = 8
base_channels = 2
[encoder]
image_size = 16"""


def command(tmp_path: Path, *options: str, data: str = "", train: str = "") -> Any:
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE.format(data=data, train=train))
    return CliRunner().invoke(app, ["plan", str(path), "--device", "cpu", *options])


@linux
def test_the_command_reads_no_data(tmp_path: Path) -> None:
    data = "image_size = 16\nchannels = 3"
    done = command(tmp_path, "--memory", "4GiB", "--json", data=data)
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert told["batch_size"] == 8
    assert told["budget"] == 4 << 30
    assert 0 < told["least"] <= told["peak"] <= told["budget"]
    assert told["seconds"] > 0
    assert told["whole"].keys() == {"peak", "seconds"}
    done = command(tmp_path, data=data, train='memory = "3GiB"')
    assert "of 3.00 GiB" in done.stdout


@linux
def test_the_command_plans_the_largest_images(tmp_path: Path) -> None:
    data = "image_size = 512\nchannels = 3"
    done = command(
        tmp_path, "--memory", "8GiB", "--json", data=data, train="[generator]\nbase_channels = 1"
    )
    assert done.exit_code == 0, done.output
    assert 0 < json.loads(done.stdout)["peak"] <= 8 << 30


@linux
def test_what_the_command_refuses(tmp_path: Path) -> None:
    data = "image_size = 16\nchannels = 3"
    assert "no [train] memory; give a budget" in str(command(tmp_path, data=data).exception)
    error = command(tmp_path, "--memory", "1MiB", data=data).exception
    assert isinstance(error, PlanError)
    assert "the least that a step of batch_size=8 needs is" in str(error)
    error = command(tmp_path, "--memory", "1GiB").exception
    assert "does not say which size the images of 'nowhere' have" in str(error)


MEASURED = """
import json, sys, numpy as np, torch, dpmmd
from dpmmd.train import plan
from dpmmd._memory import Meter
from dpmmd.recipe import GeneratorSection, TrainSection
torch.set_num_threads(1)
name, px, n, classes, estimator, part, shared = sys.argv[1:]
px, n, classes, shared = int(px), int(n), int(classes), int(shared)
encoder = dpmmd.encoders.load(name, image_size=px, weights="random")
x = np.random.default_rng(0).integers(0, 256, (20, 3, px, px), dtype=np.uint8)
release = dpmmd.release((x, np.arange(20) % classes), encoder, epsilon=1.0, delta=1e-3,
                        adjacency="replace-one", num_classes=classes, moments=(1, 2),
                        shared_taps=shared, progress=False)
look = GeneratorSection(name="resnet", image_size=px, channels=3, base_channels=16)
make, found, meter = plan.make, [], Meter(torch.device("cpu"))
def made(memory, encoder, generator, target, settings):
    for _ in range(2):  # what the first leaves behind counts as in use
        roomy = make("1TiB", encoder, generator, target, settings)
    # Between the least, measured anew and not to the last page, and the batch in one piece.
    budget = 1.02 * roomy.least + float(part) * (roomy.whole[0] - roomy.least)
    chosen = make(f"{budget / 2**30:.6f}GiB", encoder, generator, target, settings)
    meter.settle()
    found.append((chosen, meter.used()))
    meter._reset()
    return chosen
plan.make = made
settings = TrainSection(steps=3, batch_size=n, estimator=estimator, memory="1TiB")
trained = dpmmd.train.train(release, encoder, settings=settings, generator_settings=look,
                            progress=False)
chosen, before = found[0]
print(json.dumps([chosen.facts(), meter.peak() - before, trained.seconds / 3]))
"""


@linux
def test_a_run_measures_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = images(30)
    np.savez(tmp_path / "x.npz", x=x, y=y)
    text = RECIPE.format(data="", train='steps = 2\nmemory = "1TiB"\n[sample]\nnum_images = 4')
    text = text.replace('"nowhere"', f'"{tmp_path}/x.npz"').replace("[encoder]", RUN)
    (tmp_path / "mine.toml").write_text(text)
    make, made = plan.make, []

    def counted(*arguments: Any, **options: Any) -> plan.Plan:
        made.append(make(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(plan, "make", counted)
    said: list[str] = []
    runs.run(tmp_path / "mine.toml", tmp_path / "run", say=said.append, progress=False)
    assert len(made) == 1
    assert (tmp_path / "run" / "synthetic.npz").exists()


def test_the_documented_table_is_the_committed_one() -> None:
    folder = Path(bench.__file__).parent
    text = (folder.parent / "docs" / "MEMORY.md").read_text()
    (path,) = (folder / "results" / "memory").glob("*.json")
    results = json.loads(path.read_text())
    assert f"{bench.BEGIN}\n{bench.table(results)}\n{bench.END}" in text
    for row in results["rows"]:
        if "plan" in row:
            assert row["peak"] <= row["plan"]["budget"]
            assert abs(row["plan"]["peak"] / row["peak"] - 1) < 0.15


@pytest.mark.long
@linux
@pytest.mark.parametrize("part", [0.05, 0.4, 1.5])
@pytest.mark.parametrize(
    ("name", "px", "n", "classes", "estimator", "shared"),
    [
        ("vgg11", 32, 512, 10, "batch", 0),
        ("vgg11", 64, 48, 3, "adam", 0),
        ("vgg11", 64, 48, 5, "ema", 3),
        ("resnet18", 128, 32, 1, "adam", 0),
    ],
)
def test_predictions_are_within_15_percent(
    name: str, px: int, n: int, classes: int, estimator: str, shared: int, part: float
) -> None:
    arguments = [name, px, n, classes, estimator, part, shared]
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *map(str, arguments)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    chosen, added, seconds = json.loads(done.stdout.splitlines()[-1])
    whole = chosen["micro_batch"] == n and not chosen["recompute"]
    assert whole == (part > 1)
    assert abs(chosen["added"] / added - 1) < 0.15, (chosen, added)
    # Time is what others leave of the machine: only that it is not of another kind.
    assert 0.3 < chosen["seconds"] / seconds < 3
    assert np.isfinite(chosen["whole"]["seconds"])
