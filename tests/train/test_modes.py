"""Training and sampling by the rows of a release with modes."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import dpmmd
from dpmmd import export
from dpmmd.functional import mean_embedding
from dpmmd.generators import ConvGenerator
from dpmmd.nn import MMDLoss
from dpmmd.privacy import Release
from dpmmd.recipe import RecipeError, TrainSection, revised
from dpmmd.train import (
    CheckpointError,
    Mixture,
    Trained,
    batch_labels,
    load_checkpoint,
    load_generator,
    sample,
    sample_grid,
    train,
)
from dpmmd.train.plan import Limits, Target
from dpmmd.train.selection import Selection
from dpmmd.train.step import Stepper
from tests.conftest import nonnegative_encoder, small_encoder
from tests.train.test_train import GENERATOR, assert_same, quick, state_of


def two_sided(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images of three classes, bright above or, more often, below."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 60, (n, 1, 8, 8), dtype=np.uint8)
    y = np.arange(n, dtype=np.int64) % 3
    below = rng.random(n) < 0.7
    x[below, 0, 4:] += 150
    x[~below, 0, :4] += 150
    return x, y


OPTIONS: dict[str, Any] = {
    "epsilon": 50.0,
    "delta": 1e-3,
    "adjacency": "replace-one",
    "progress": False,
}


@cache
def releases(
    num_classes: int | None = 3, double: bool = False, **options: Any
) -> tuple[Release, Release]:
    """A release of pixel moments, and one with modes that were fitted to it; always the same."""
    rng = np.random.default_rng(0)

    def noise(n: int, sd: float) -> np.ndarray:
        return np.rint(rng.standard_normal(n) * sd).astype(np.int64)

    data = two_sided(400)
    given = {**OPTIONS, "num_classes": num_classes, "insecure_test_noise": noise}
    first = dpmmd.release(data, None, pixel_moments=8, **given)
    rule = dpmmd.modes.fit(first, 2)
    encoder = small_encoder().double() if double else small_encoder()
    if "selection" in options:
        options["selection"] = nonnegative_encoder()
    return first, dpmmd.release(data, encoder, modes=rule, **given, **options)


def run(release: Release, settings: TrainSection, **options: Any) -> Trained:
    if "generator" not in options:
        options.setdefault("generator_settings", GENERATOR)
    return train(release, small_encoder(), settings=settings, progress=False, **options)


class Label(nn.Module):
    """Images whose pixels are the label."""

    z_dim = 2

    def __init__(self, num_classes: int | None = None) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.scale * (y / 255).view(-1, 1, 1, 1).expand(-1, 1, 8, 8)


# ----------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("n", [1, 7, 1000, 1003])
def test_classes_come_in_turn_and_rows_by_their_counts(n: int) -> None:
    """To the image: each row has its share of any first images of its class, rounded."""
    modes = Mixture((0, 1, 2, 0, 2, 0), (60.0, 5.0, 10.0, 30.5, 30.0, 9.5))
    rows = modes.drawn(n)
    classes = torch.tensor(modes.classes)[rows]
    assert classes.tolist() == [i % 3 for i in range(n)]
    counts = torch.tensor(modes.counts, dtype=torch.float64)
    for row, k in enumerate(modes.classes):
        share = counts[row] / counts[torch.tensor(modes.classes) == k].sum()
        drawn = (rows[k::3] == row).cumsum(0)
        due = share * torch.arange(1, len(drawn) + 1)
        assert bool(((drawn - due).abs() < 1).all())
    assert torch.equal(modes.drawn(n + 50)[:n], rows)


def test_the_modes_of_a_class_are_numbered_from_0_on() -> None:
    assert Mixture((0, 1, 2, 0, 2, 0), (1.0,) * 6).modes().tolist() == [0, 0, 0, 1, 1, 2]


def test_the_mixture_is_that_of_the_release() -> None:
    _, second = releases()
    modes = Mixture.of(second)
    assert modes is not None
    assert modes.classes == (0, 1, 2, 0, 1, 2)
    assert modes.counts == tuple(second.rows.counts.tolist())
    shares = [max(modes.counts[k], modes.counts[k + 3]) / 133 for k in range(3)]
    assert shares == pytest.approx([0.7] * 3, abs=0.15)
    assert Mixture.of(releases()[0]) is None


def test_samples_have_classes_and_alignment_gets_them() -> None:
    modes = Mixture((0, 1, 0), (3.0, 1.0, 1.0))

    class Classes(nn.Module):
        def forward(self, images: Tensor, labels: Tensor) -> Tensor:
            seen.extend(labels.tolist())
            return images

    seen: list[int] = []
    x, y = sample(Label(3), 21, 2, modes=modes, batch_size=4, alignment=Classes())
    assert y is not None
    assert y.tolist() == seen == [i % 2 for i in range(21)]
    rows = modes.drawn(21)
    assert x[:, 0, 0, 0].tolist() == rows.tolist()
    assert np.bincount(x[::2, 0, 0, 0]).tolist() == [8, 0, 3]
    assert sample(Label(3), 5, None, modes=Mixture((0, 0, 0), (1.0, 1.0, 1.0)))[1] is None


def test_a_grid_has_a_row_for_each_class() -> None:
    modes = Mixture((0, 1, 0), (3.0, 1.0, 1.0))
    picture = sample_grid(Label(3), 2, torch.device("cpu"), columns=4, modes=modes)
    assert picture[0, ::8, ::8].tolist() == [[0, 0, 2, 0], [1, 1, 1, 1]]


def test_labels_are_not_taken_for_classes() -> None:
    modes = Mixture((0, 1, 0), (3.0, 1.0, 1.0))
    with pytest.raises(ValueError, match=r"modes: of 3 rows, the generator has num_classes=2"):
        sample(Label(2), 4, 2, modes=modes)
    trained = Trained(Label(3), 2, True, 1, 0.0, 1, modes=modes)
    with pytest.raises(ValueError, match=r"num_classes=2 without modes: .* labels are 3 rows"):
        sample(trained.generator, 4, trained.num_classes)
    assert sample(trained.generator, 4, 3)[0][:, 0, 0, 0].tolist() == [0, 1, 2, 0]  # row by row
    with pytest.raises(ValueError, match=r"num_classes=5: the modes are of 2 classes"):
        sample(trained.generator, 4, 5, modes=modes)
    with pytest.raises(ValueError, match=r"num_classes=2 without modes: .* labels are 3 rows"):
        sample_grid(trained.generator, 2, torch.device("cpu"))


# ----------------------------------------------------------------------------- batches


@pytest.mark.parametrize(
    ("n", "rows", "each"), [(20, 80, 10), (25, 7, 10), (100, 6, 10), (9, 4, 2)]
)
def test_rows_come_in_turn_with_enough_images(n: int, rows: int, each: int) -> None:
    taken = min(rows, n // each)
    seen = torch.zeros(rows, dtype=torch.int64)
    for step in range(rows):
        counts = torch.bincount(batch_labels(n, rows, each, step), minlength=rows)
        assert int((counts > 0).sum()) == taken
        assert int(counts[counts > 0].min()) >= min(each, n // taken)
        assert int(counts.max() - counts[counts > 0].min()) <= 1
        seen += counts > 0
    assert seen.tolist() == [taken] * rows  # equally often
    first = [batch_labels(n, rows, each, step).unique().tolist() for step in range(2)]
    if 2 * taken <= rows:
        assert first == [list(range(taken)), list(range(taken, 2 * taken))]


def batches(release: Release, **changes: Any) -> list[list[int]]:
    """The labels of a training's batches."""
    generator, seen = Label(release.num_rows), []
    generator.register_forward_pre_hook(
        lambda _, given: seen.append(given[1].tolist()) if generator.training else None
    )
    run(release, quick(steps=3, **changes), generator=generator)
    return seen


def test_batches_hold_rows_of_a_release_with_modes(released: Release) -> None:
    _, second = releases()
    assert batches(second, batch_size=20) == [
        sorted([a, b] * 10) for a, b in ((0, 1), (2, 3), (4, 5))
    ]
    assert batches(second, batch_size=5)[1] == [1] * 5  # fewer than ten
    assert batches(second, batch_size=6, images_per_row=2)[1] == [3, 3, 4, 4, 5, 5]
    assert batches(released, batch_size=4) == [[0, 1, 2, 0], [1, 2, 0, 1], [2, 0, 1, 2]]
    assert batches(released, batch_size=4, images_per_row=2)[1] == [2, 2, 0, 0]


def test_batches_without_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"batch_size=1 with .*'unbiased': it takes pairs"):
        run(releases()[1], quick(batch_size=1, estimator="unbiased"))
    with pytest.raises(RecipeError, match=r"images_per_row = 1 .* at least 2, or 'batch'"):
        revised(TrainSection(), {"images_per_row": 1, "estimator": "unbiased"})
    with pytest.raises(
        RecipeError, match=r"images_per_row = 200: more than train.batch_size = 100"
    ):
        revised(TrainSection(), {"images_per_row": 200})


@pytest.mark.parametrize("estimator", ["ema", "adam"])
def test_the_estimates_of_rows_that_are_not_in_a_batch_stay(estimator: str) -> None:
    loss = MMDLoss(releases()[1], small_encoder(), estimator=estimator)
    x = torch.rand(4, 1, 8, 8, requires_grad=True)
    loss(x, torch.tensor([0, 0, 4, 4])).backward()
    before = loss.by_class.difference.clone()
    assert loss.by_class.steps.tolist() == [1, 0, 0, 0, 1, 0]
    loss(x, torch.tensor([1, 1, 4, 4])).backward()
    assert loss.by_class.steps.tolist() == [1, 1, 0, 0, 2, 0]
    assert torch.equal(loss.by_class.difference[:, [0, 2]], before[:, [0, 2]])
    assert not torch.equal(loss.by_class.difference[:, 4], before[:, 4])


# ----------------------------------------------------------------------------- the loss


def test_the_loss_is_by_row() -> None:
    _, second = releases()
    loss = MMDLoss(second, small_encoder(), estimator="batch")
    assert "classes=3, rows=6" in repr(loss)
    assert loss.by_class.target.shape[1] == 6
    x = torch.rand(12, 1, 8, 8)
    means = [loss._embed(x[i : i + 2], None, 1)[0][:, 0] for i in range(0, 12, 2)]
    expected = sum((second.target[:, a] - mean).square().sum() for a, mean in enumerate(means))
    assert loss(x, torch.arange(6).repeat_interleave(2)) == pytest.approx(float(expected), rel=1e-4)


def test_labels_that_are_no_rows_are_refused() -> None:
    loss = MMDLoss(releases()[1], small_encoder(), estimator="batch")
    x = torch.rand(6, 1, 8, 8)
    with pytest.raises(ValueError, match=r"values from 0 to 6, expected rows of the release, 0..5"):
        loss(x, torch.arange(6) + (torch.arange(6) == 5))
    with pytest.raises(ValueError, match=r"pass the labels"):
        loss(x, None)


def test_classes_in_the_place_of_rows_are_refused() -> None:
    """Classes are rows too: what gives them away is that no other rows ever come."""
    loss = MMDLoss(releases()[1], small_encoder(), estimator="batch")
    x, classes = torch.rand(6, 1, 8, 8), torch.arange(6) % 3
    loss.eval()
    for _ in range(9):
        loss(x, classes)
    loss.train()
    with pytest.raises(ValueError, match=r"in \d\d batches.* the 3 classes.* num_classes=6"):  # noqa: PT012
        for _ in range(60):
            loss(x, classes)
    in_turn = MMDLoss(releases()[1], small_encoder(), estimator="batch")
    for step in range(9):
        in_turn(x, batch_labels(6, 6, 6, step))


def test_rows_that_are_drawn_are_not_taken_for_classes() -> None:
    """One image a batch: of 4 rows of 3 classes the last one may not come in 4 batches, nor 60."""
    counts = torch.tensor([100.0, 100, 100, 0, 100, 0], dtype=torch.float64)
    released = dataclasses.replace(releases()[1], counts=counts)
    assert released.num_rows == 4
    loss = MMDLoss(released, small_encoder(), estimator="batch").train()
    x = torch.rand(1, 1, 8, 8)
    for step in range(60):
        loss(x, torch.tensor([step % 3]))
    with pytest.raises(ValueError, match="seem to be the 3 classes"):  # noqa: PT012
        for step in range(60):
            loss(x, torch.tensor([step % 3]))


def test_a_generator_for_classes_is_refused() -> None:
    generator = ConvGenerator(num_classes=3, image_size=8, z_dim=5, base_channels=4)
    with pytest.raises(
        ValueError, match=r"num_classes=3; .* 6 rows of 3 classes.*release.num_rows"
    ):
        run(releases()[1], quick(), generator=generator)


def test_moments_alone_are_nothing_to_train_on() -> None:
    with pytest.raises(dpmmd.PrivacyError, match="moments of pixels alone"):
        run(releases()[0], quick())


def test_shared_taps_do_not_go_with_rows_in_turn() -> None:
    with pytest.raises(ValueError, match=r"both modes and shared_taps=1"):
        run(releases(shared_taps=1)[1], quick())


# ----------------------------------------------------------------------------- training


@pytest.mark.parametrize("estimator", ["unbiased", "ema"])
def test_a_checkpoint_keeps_the_modes_and_resumes_to_the_bit(
    estimator: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, second = releases()
    settings = quick(estimator=estimator, batch_size=20)
    whole = run(second, settings, out=tmp_path / "whole")
    advance = Stepper.advance

    def interrupted(self: Stepper) -> Tensor:
        if self.state.step == 5:
            raise KeyboardInterrupt
        return advance(self)

    with monkeypatch.context() as patch:
        patch.setattr(Stepper, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(second, settings, out=tmp_path / "parts")
    run(second, settings, out=tmp_path / "parts")
    assert_same(state_of(tmp_path / "parts"), state_of(tmp_path / "whole"))

    loaded = load_generator(tmp_path / "whole")  # without the release
    assert loaded.num_classes == 3
    assert loaded.modes == whole.modes == Mixture.of(second)
    assert loaded.generator.num_classes == 6
    draws = [sample(t.generator, 9, t.num_classes, modes=t.modes) for t in (whole, loaded)]
    np.testing.assert_array_equal(draws[0][0], draws[1][0])


def test_a_checkpoint_of_other_rows_is_refused(tmp_path: Path) -> None:
    _, second = releases()
    run(second, quick(steps=2), out=tmp_path)
    path = tmp_path / "checkpoints" / "last.pt"
    content = load_checkpoint(path)
    content["modes"]["counts"] = (1.0,) * 6
    torch.save(content, path)
    with pytest.raises(CheckpointError, match="other rows than those of the release"):
        run(second, quick(steps=2), out=tmp_path)


def test_a_checkpoint_from_before_modes_is_gone_on_from(released: Release, tmp_path: Path) -> None:
    settings = quick(steps=10)
    run(released, settings, out=tmp_path / "whole")
    path = tmp_path / "whole" / "checkpoints" / "last.pt"
    content = load_checkpoint(path)
    del content["modes"], content["settings"]["images_per_row"]
    torch.save(content, path)
    trained = run(released, settings, out=tmp_path / "whole")
    assert trained.modes is None
    assert load_generator(path).modes is None


def test_it_learns_both_modes_of_each_class() -> None:
    """What is bright above, and what is bright below, in the proportion of the data."""
    _, second = releases()
    settings = quick(steps=30, batch_size=60, estimator="batch", ema_decay=0.0)
    trained = run(second, settings)
    x, y = sample(trained.generator, 300, 3, modes=trained.modes)
    assert y is not None
    for k in range(3):
        own = x[y == k].astype(float)
        below = own[:, 0, 4:].mean((1, 2)) > own[:, 0, :4].mean((1, 2))
        assert below.mean() == pytest.approx(0.7, abs=0.15)


def test_unlabelled_images_have_modes_too() -> None:
    _, second = releases(num_classes=None)
    assert second.num_rows == 2
    trained = run(second, quick(steps=2))
    assert trained.num_classes is None
    x, y = sample(trained.generator, 5, None, modes=trained.modes)
    assert (x.shape[0], y) == (5, None)


@pytest.mark.parametrize("labelled", [True, False])
def test_selection_is_by_row_without_pairs_of_an_image_with_itself(labelled: bool) -> None:
    _, second = releases(num_classes=3 if labelled else None, selection=True)
    selection = Selection(second, nonnegative_encoder(), torch.device("cpu"), Limits())
    rows, classes = second.num_rows, second.num_classes
    assert selection.images == 200 * classes // rows
    trained = run(second, quick(steps=2), selection_encoder=nonnegative_encoder())
    score = selection.score(trained.generator)
    images, y = sample(trained.generator, selection.images * rows, rows, seed=1)
    features = nonnegative_encoder()(torch.from_numpy(images).float() / 255)
    phi = mean_embedding(features, torch.arange(len(images)), len(images))[0][0]  # [n, D']
    target = second.selection_target
    assert target is not None
    assert y is not None
    expected = 0.0
    for row in range(rows):
        own = phi[torch.from_numpy(y) == row]
        pairs = own @ own.T
        n = len(own)
        inner = (pairs.sum() - pairs.diagonal().sum()) / (n * (n - 1))
        t = target[row].flatten()
        expected += float(t @ t - 2 * t @ own.mean(0) + inner)
    assert score == pytest.approx(expected, rel=1e-3, abs=1e-4)


def test_a_plan_knows_the_rows_of_a_batch() -> None:
    release = releases()[1]
    target = Target.of(release)
    assert Target.of(release.metadata) == target  # here nothing is merged
    assert (target.num_classes, target.labelled, target.modes) == (6, True, True)
    assert target.rows_of(TrainSection(batch_size=20)) == 2
    assert target.rows_of(TrainSection(batch_size=5)) == 1
    assert target.rows_of(TrainSection(batch_size=100)) == 6


# ----------------------------------------------------------------------------- files


def test_modes_are_an_array_or_a_column(tmp_path: Path) -> None:
    x, y = two_sided(12)
    modes = np.arange(12, dtype=np.int64) % 2
    export.write(tmp_path / "a.npz", x, y, format="npz", modes=modes)
    with np.load(tmp_path / "a.npz") as written:
        assert written["modes"].tolist() == modes.tolist()
    assert len(dpmmd.data.open_source(tmp_path / "a.npz").arrays()[0]) == 12
    with pytest.raises(ValueError, match="a folder of PNGs has no place"):
        export.write(tmp_path / "a", x, y, format="folder", modes=modes)
    parquet = pytest.importorskip("pyarrow.parquet")
    export.write(tmp_path / "a.parquet", x, y, format="parquet", modes=modes)
    table = parquet.read_table(tmp_path / "a.parquet")
    assert table.column_names == ["image", "label", "mode"]
    assert table["mode"].to_pylist() == modes.tolist()
    assert len(dpmmd.data.open_source(tmp_path / "a.parquet").arrays()[0]) == 12
