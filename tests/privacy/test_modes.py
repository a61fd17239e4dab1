"""Modes: the rule in exact integers, releases by class and mode, merging, two releases' total."""

from __future__ import annotations

import dataclasses
import itertools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dpmmd
from dpmmd import Modes
from dpmmd.privacy import Ledger, PrivacyError, Release, accounting, report, split_epsilon
from dpmmd.privacy.metadata import Statement
from dpmmd.privacy.modes import _integers, rows_of
from dpmmd.privacy.rows import LEAST, MOST_NOISE, STANDS_OUT, Rows, groups, needed, stands_out
from tests.conftest import images, no_noise, nonnegative_encoder, small_encoder, small_modes
from tests.privacy.test_release import Rows as Source
from tests.privacy.test_release import exact, rows

LARGEST = 1 << 20


# ----------------------------------------------------------------------------- the rule


def weights(size: int, side: int) -> list[dict[int, int]]:
    """Of each place of an axis: what linear interpolation takes, in units of 1 / (2 side)."""
    result = []
    for i in range(side):
        place = max(0, (2 * i + 1) * size - side)
        low, part = divmod(place, 2 * side)
        one = {low: 2 * side - part}
        high = min(low + 1, size - 1)
        one[high] = one.get(high, 0) + part
        result.append(one)
    return result


def by_hand(modes: Modes, image: Tensor, label: int) -> int:
    """The rule in Python's integers and fractions of them."""
    x = [[[_level(v) for v in line] for line in plane] for plane in image.double().tolist()]
    side, scores = modes.side, []
    down, across = weights(len(x[0]), side), weights(len(x[0][0]), side)
    small = []
    for plane in x:
        for rows_ in down:
            for columns in across:
                total = sum(
                    u * v * plane[a][b] for a, u in rows_.items() for b, v in columns.items()
                )
                small.append((2 * total + 4 * side * side) // (8 * side * side))  # nearest, .5 up
    own = modes.directions[label if len(modes.directions) > 1 else 0].numpy().astype(object)
    scores = own @ np.array(small, object)
    mode = 0
    for score, threshold in zip(scores, modes.thresholds[label].tolist(), strict=True):
        mode = 2 * mode + int(score > threshold)
    return label * modes.per_class + mode


def _level(value: float) -> int:
    """round(65535 x), to even; what is no number is 0."""
    if math.isnan(value):
        return 0
    return round(min(max(value, 0.0), 1.0) * 65535)


def random_modes(rng: torch.Generator, g: int, side: int, channels: int, classes: int) -> Modes:
    bits = 3
    d = channels * side * side
    directions = torch.randint(-LARGEST, LARGEST + 1, (g, bits, d), generator=rng)
    middle = (directions.sum(2) * 65535 // 2).expand(classes, bits)
    return Modes(side, channels, directions, middle.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("shape", "side", "g"),
    [((1, 8, 8), 8, 1), ((3, 5, 7), 4, 3), ((1, 3, 4), 7, 3), ((3, 6, 6), 3, 1), ((1, 1, 9), 2, 1)],
)
def test_rows_are_those_of_exact_integers(
    shape: tuple[int, int, int], side: int, g: int, dtype: torch.dtype
) -> None:
    rng = torch.Generator().manual_seed(side)
    modes = random_modes(rng, g, side, shape[0], 3)
    x = torch.rand(40, *shape, generator=rng, dtype=dtype)
    x[:8] = (x[:8] * 3).round() / 3  # of few levels: many equal scores
    x[8], x[9] = 0, 1
    y = torch.randint(0, 3, (40,), generator=rng)
    found = modes.rows(x, y)
    assert found.tolist() == [by_hand(modes, a, int(k)) for a, k in zip(x, y, strict=True)]
    assert len(set((found % 8).tolist())) > 2


def test_a_score_at_its_threshold_is_below_it() -> None:
    """And nothing is rounded between: one unit more, of 2 * 10^14, is above."""
    d = 3072
    directions = torch.full((1, 1, d), LARGEST)
    score = LARGEST * 65535 * d
    assert score > 2**47
    white = torch.ones(1, 3, 32, 32)
    for threshold, bit in ((score, 0), (score - 1, 1), (-score, 1)):
        modes = Modes(32, 3, directions, torch.tensor([[threshold]]))
        assert modes.rows(white).tolist() == [bit]
    directions[0, 0, ::2] *= -1
    directions[0, 0, -1] += -1  # the score is -65535, of terms that cancel to the last one
    for threshold, bit in ((-65535, 0), (-65536, 1)):
        assert Modes(32, 3, directions, torch.tensor([[threshold]])).rows(white).tolist() == [bit]


def test_a_row_is_a_function_of_its_record() -> None:
    """Whatever the batch is: its size, its order, the other images."""
    rng = torch.Generator().manual_seed(0)
    modes = random_modes(rng, 1, 5, 1, 3)
    x, y = torch.rand(60, 1, 9, 9, generator=rng), torch.randint(0, 3, (60,), generator=rng)
    whole = modes.rows(x, y)
    turned = torch.randperm(60, generator=rng)
    assert torch.equal(modes.rows(x[turned], y[turned]), whole[turned])
    assert torch.cat([modes.rows(x[i : i + 1], y[i : i + 1]) for i in range(60)]).equal(whole)
    assert torch.equal(modes.rows(x.to(memory_format=torch.channels_last), y), whole)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dpmmd.privacy.modes._AT_ONCE", 200)
        assert torch.equal(modes.rows(x, y), whole)
    assert modes.rows(x[:0], y[:0]).tolist() == []
    assert torch.equal(modes.rows(x), rows_of(modes, x, torch.zeros_like(y)))


def test_no_image_can_make_the_rule_raise_or_leave_its_rows() -> None:
    values = [math.nan, math.inf, -math.inf, -1.0, 2.0, 1e38, -1e-45, 0.0, 1.0]
    x = torch.tensor(values).view(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone()
    modes = small_modes()
    y = torch.arange(len(values)) % 3
    found = rows_of(modes, x, y)
    assert torch.equal(found // 4, y)
    same = torch.tensor([0.0, 1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0]).view(-1, 1, 1, 1)
    assert torch.equal(found, rows_of(modes, same.expand_as(x), y))
    assert torch.equal(_integers(x, 8), _integers(same.expand_as(x), 8))
    assert torch.equal(_integers(x, 5), _integers(same.expand_as(x), 5))


def test_images_are_brought_to_the_side_as_encoders_do() -> None:
    rng = torch.Generator().manual_seed(1)
    for size, side in (((28, 28), 14), ((9, 13), 8), ((4, 4), 11), ((32, 20), 28)):
        x = torch.rand(3, 3, *size, generator=rng, dtype=torch.float64)
        expected = F.interpolate(x, (side, side), mode="bilinear", align_corners=False)
        found = _integers(x, side)
        assert found.dtype == torch.int64
        assert (found.view(expected.shape) - expected * 65535).abs().max() <= 1 + 1e-6
        whole = (x * 65535).round().long().numpy().astype(object)
        down, across = (_matrix(length, side) for length in size)
        unit = (2 * side) ** 2
        exact_ = (2 * (down @ whole @ across.T) + unit) // (2 * unit)  # nearest, .5 up
        assert found.flatten().tolist() == exact_.ravel().tolist()
        assert _integers(torch.ones_like(x), side).unique().tolist() == [65535]


def _matrix(size: int, side: int) -> Any:
    """`weights` as a matrix [side, size] of Python's integers."""
    result = np.zeros((side, size), object)
    for i, taken in enumerate(weights(size, side)):
        for place, share in taken.items():
            result[i, place] = share
    return result


GOOD: dict[str, Any] = {
    "side": 2, "channels": 1, "directions": torch.ones(1, 1, 4, dtype=torch.int64),
    "thresholds": torch.ones(2, 1, dtype=torch.int64),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"side": 0}, ValueError, "side=0"),
        ({"side": -2}, ValueError, "side=-2"),
        ({"side": 2.0}, ValueError, r"side=2\.0"),
        ({"side": 60}, ValueError, "at most 3,072"),
        ({"channels": 2}, ValueError, "channels=2"),
        ({"directions": torch.ones(1, 1, 4)}, TypeError, "directions: expected an int64"),
        ({"directions": torch.ones(1, 4).long()}, TypeError, "3 dimensions"),
        ({"directions": torch.full((1, 1, 4), LARGEST + 1)}, ValueError, "-1048576 to 1048576"),
        ({"directions": torch.full((1, 1, 4), -(2**63))}, ValueError, "-1048576 to 1048576"),
        ({"directions": torch.ones(1, 1, 5).long()}, ValueError, r"directions: \[1, 1, 5\]"),
        ({"directions": torch.ones(3, 1, 4).long()}, ValueError, r"\[1 or 2, J, 4\]"),
        ({"directions": torch.ones(1, 0, 4).long()}, ValueError, "directions"),
        ({"directions": torch.ones(1, 17, 4).long()}, ValueError, "thresholds"),
        ({"thresholds": torch.ones(2, 2).long()}, ValueError, r"expected \[K, 1\]"),
        ({"thresholds": torch.full((2, 1), 1 << 50)}, ValueError, "thresholds: expected whole"),
        ({"thresholds": [[1]]}, TypeError, "thresholds: expected an int64"),
        ({"origin": {"mu": 1}}, TypeError, "origin: a dict"),
    ],
)
def test_modes_out_of_range_are_refused(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    assert Modes(**GOOD).per_class == 2
    with pytest.raises(error, match=message):
        Modes(**{**GOOD, **change})


def test_images_that_are_none_are_refused_by_the_public_rule() -> None:
    modes = small_modes()
    x = torch.rand(2, 1, 8, 8)
    for wrong, labels, message in (
        (x[0], None, r"shape is \[1, 8, 8\]"),
        (x.expand(-1, 3, -1, -1), None, r"expected \[n, 1, H, W\]"),
        ((x * 255).byte(), None, "divide 8-bit images by 255"),
        (x, torch.tensor([0, 3]), "3 classes"),
        (x, torch.tensor([0.0, 1.0]), "expected int64"),
        (x, torch.tensor([0]), "one an image"),
    ):
        with pytest.raises(ValueError, match=message):
            modes.rows(wrong, labels)


def test_the_hash_is_of_all_that_modes_are() -> None:
    modes, origin = small_modes(), exact(images(20), epsilon=1.0).metadata.statement
    changed = modes.directions.clone()
    changed[0, 0, 0] += 1
    others = [
        dataclasses.replace(modes, directions=changed),
        dataclasses.replace(modes, thresholds=modes.thresholds + 1),
        dataclasses.replace(modes, origin=origin),
        dataclasses.replace(modes, origin=origin.model_copy(update={"private": True})),
        dataclasses.replace(modes, origin=origin.model_copy(update={"mu": origin.mu / 2})),
        small_modes(bits=3),
        small_modes(classes=4),
    ]
    assert len({modes.sha256, *(other.sha256 for other in others)}) == len(others) + 1
    kept = dataclasses.replace(modes)
    changed[:] = 0
    modes.directions.numpy()  # a copy: what is done to the arrays that were given changes nothing
    assert kept.sha256 == modes.sha256 == small_modes().sha256


# ----------------------------------------------------------------------------- releases


def test_an_image_goes_to_the_row_of_its_class_and_mode() -> None:
    """Features, counts and selection by row, pixels by class; over modes it is the class's sum."""
    x, y, valid = rows(60)
    valid[3] = False
    x[4] = math.nan
    modes = small_modes()
    options: dict[str, Any] = {"num_classes": 3, "moments": (1, 2), "delta": 1e-9}
    options |= {"selection": nonnegative_encoder(), "pixel_moments": 4}
    options |= {"weights": {"class_products": 0.5}}
    split, plain = (
        exact(Source(x, y, valid), modes=modes, **options),
        exact(Source(x, y, valid), **options),
    )
    used = valid & ~x.isnan().flatten(1).any(1)
    cells = modes.rows(x[used], y[used])
    torch.testing.assert_close(split.counts, cells.bincount(minlength=12).double())
    assert split.sums.shape == (2, 12, plain.sums.shape[2])
    for row in range(12):
        if not bool((cells == row).any()):
            assert not split.sums[:, row].any()
            continue
        one = Source(*(t[used][cells == row] for t in (x, y, valid)))
        alone = exact(one, **options)
        assert torch.equal(split.sums[:, row], alone.sums[:, row // 4])
        assert torch.equal(split.selection[row], alone.selection[row // 4])  # type: ignore[index]
    merged = split.sums.double().view(2, 3, 4, -1).sum(2)
    torch.testing.assert_close(merged.float(), plain.sums, rtol=1e-6, atol=1e-6)
    for name in ("pixels", "products", "class_products"):
        assert torch.equal(getattr(split, name), getattr(plain, name))
    assert torch.equal(split.class_counts, plain.counts)


@pytest.mark.parametrize("adjacency", ["replace-one", "zero-out", "add-remove"])
@pytest.mark.parametrize("pixels", [None, 3])
def test_replay_neighbours_differ_by_at_most_the_sensitivity(
    adjacency: str, pixels: int | None
) -> None:
    """One image that changes its mode, its class, both or neither; all blocks, weights apart."""
    x, y, valid = rows()
    modes = small_modes(side=4)
    options: dict[str, Any] = {"num_classes": 3, "adjacency": adjacency, "delta": 1e-9}
    options |= {"modes": modes, "weights": {"counts": 1.0}, "selection": nonnegative_encoder()}
    options |= {"pixel_moments": pixels}
    if pixels is not None:
        options["weights"] = {"counts": 1.0, "class_products": 0.9, "pixels": 1.0}
    base = exact(Source(x, y, valid), nonnegative_encoder(), **options)
    weight = {b.name: b.bound for b in base.metadata.blocks}
    names = {"sums": "phi1", "pixels": "pixels", "products": "products"}
    names |= {n: n for n in ("class_products", "selection", "counts")}
    worst, moved = 0.0, set()
    for change in range(8):
        x2, y2, valid2 = x.clone(), y.clone(), valid.clone()
        if adjacency == "replace-one":
            x2[0] = [1 - x[0], x[5], 1 - x[1], x[1], x[7], 1 - x[2], x[8], x[9]][change]
            y2[0] = (y[0] + change // 4) % 3
        elif adjacency == "zero-out":
            valid2[change] = False
        else:
            keep = torch.arange(20) != change
            x2, y2, valid2 = x[keep], y[keep], valid[keep]
        other = exact(Source(x2, y2, valid2), nonnegative_encoder(), **options)
        square = 0.0
        for name, block in names.items():
            one, two = getattr(base, name), getattr(other, name)
            if one is not None:
                square += weight[block] ** 2 * float((one.double() - two.double()).square().sum())
        if adjacency == "replace-one":
            a, b = (int(modes.rows(u[:1], k[:1])) for u, k in ((x, y), (x2, y2)))
            moved.add((a // 4 != b // 4, a % 4 != b % 4))
        worst = max(worst, square**0.5)
    declared = base.metadata.sensitivity / 2**30
    assert worst <= declared * (1 + 1e-6)
    assert worst > 0.5 * declared
    if adjacency == "replace-one":
        assert {(False, True), (True, True)} <= moved


def test_groups_share_their_bound_over_modes() -> None:
    """A patient's images lie in several rows; together they add what one image would."""
    x, y = images(30)
    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    data.patients = [i // 3 for i in range(30)]  # type: ignore[attr-defined]
    options: dict[str, Any] = {"num_classes": 3, "group_by": "patients", "delta": 1e-9}
    whole = exact(data, modes=small_modes(), **options)
    assert all(block.spread for block in whole.metadata.blocks)
    assert float(whole.counts.sum()) == pytest.approx(10, rel=1e-6)
    fewer = torch.utils.data.TensorDataset(torch.tensor(x[3:]), torch.tensor(y[3:]))
    fewer.patients = [i // 3 for i in range(3, 30)]  # type: ignore[attr-defined]
    rest = exact(fewer, modes=small_modes(), **options)
    square = float((whole.sums - rest.sums).double().square().sum())
    square += 0.01 * float((whole.counts - rest.counts).square().sum())
    assert square**0.5 <= math.sqrt(1.01) * (1 + 1e-6)
    assert int(((whole.counts - rest.counts).abs() > 0.1).sum()) > 1


def test_an_unlabelled_release_has_modes_too(tmp_path: Path) -> None:
    released = exact(images(40), modes=small_modes(classes=1), delta=1e-9)
    assert not released.metadata.labelled
    assert released.counts.shape == (4,)
    assert float(released.counts.sum()) == pytest.approx(40)
    assert released.class_counts.tolist() == pytest.approx([40])
    assert [b.name for b in released.metadata.blocks] == ["phi1", "counts"]
    assert Release.load(released.save(tmp_path / "r.safetensors")).modes is not None


def test_n_stays_private_under_add_remove(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes, texts = [], []
    for n in (0, 40, 41):
        path = tmp_path / f"{n}.safetensors"
        released = dpmmd.release(
            images(n), small_encoder(), epsilon=1.0, delta=1e-9, adjacency="add-remove",
            num_classes=3, modes=small_modes(), out=path,
        )  # fmt: skip
        sizes.append(path.stat().st_size)
        texts.append(released.metadata.model_dump_json(exclude={"array_sha256"}))
    assert len(set(sizes)) == len(set(texts)) == 1
    assert capfd.readouterr() == ("", "")


def test_the_file_has_the_modes(tmp_path: Path) -> None:
    modes = small_modes()
    released = exact(images(40), modes=modes, num_classes=3, delta=1e-9)
    again = Release.load(released.save(tmp_path / "r.safetensors"))
    assert again.modes is not None
    assert again.modes.sha256 == modes.sha256 == again.metadata.modes.sha256  # type: ignore[union-attr]
    assert torch.equal(again.modes.directions, modes.directions)
    assert torch.equal(again.counts, released.counts)  # as noised, 0 of an empty mode
    assert again.rows.cells == released.rows.cells
    assert again.num_rows == len(again.rows.classes)


# ----------------------------------------------------------------------------- pixels alone


def test_moments_of_pixels_alone(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_classes": 3, "pixel_moments": 5, "delta": 1e-9}
    options |= {"weights": {"class_products": 0.5}, "insecure_test_noise": no_noise}
    options |= {"epsilon": 1.0, "adjacency": "replace-one", "progress": False}
    alone = dpmmd.release(images(40), None, **options)
    beside = dpmmd.release(images(40), small_encoder(), **options)
    for name in ("pixels", "products", "class_products", "counts"):
        assert torch.equal(getattr(alone, name), getattr(beside, name))
    m = alone.metadata
    assert (m.encoder, m.moments, alone.sums.shape) == (None, (), (0, 3, 0))
    assert m.sensitivity < beside.metadata.sensitivity  # the features' part is not paid for
    assert alone.target.shape == (0, 3, 0)
    again = Release.load(alone.save(tmp_path / "r.safetensors"))
    assert again.metadata == m
    assert "encoder=None" in repr(again)
    text = again.report()
    assert "none: moments of pixels alone" in text
    assert "training data" not in text.split("Not covered")[0]
    with pytest.raises(PrivacyError, match="moments of pixels alone"):
        dpmmd.nn.MMDLoss(again, small_encoder())


@pytest.mark.parametrize(
    "options",
    [{}, {"adjacency": "zero-out"}, {"adjacency": "add-remove"}, {"num_classes": None},
     {"num_classes": None, "adjacency": "add-remove"}, {"group_by": "patients"}],
    ids=["replace-one", "zero-out", "add-remove", "unlabelled", "neither", "groups"],
)  # fmt: skip
def test_pixels_alone_of_every_kind(options: dict[str, Any], tmp_path: Path) -> None:
    x, y = images(40)
    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    data.patients = [i // 2 for i in range(40)]  # type: ignore[attr-defined]
    path = tmp_path / "r.safetensors"
    released = first_of(data, **{"out": path, "epsilon": 3.0, **options})
    again = Release.load(path)
    assert again.metadata == released.metadata
    assert torch.equal(again.products, released.products)  # type: ignore[arg-type]
    assert "moments of pixels alone" in again.report()


def test_images_are_aligned_with_a_release_of_both() -> None:
    """Moments of pixels stay by class: the alignment of a release with modes is that without."""
    options: dict[str, Any] = {"num_classes": 3, "delta": 1e-9, "pixel_moments": 4}
    data = structured(300)
    split = exact(data, modes=small_modes(), **options)
    plain = exact(data, **options)
    one, other = (dpmmd.align.fit(released, *images(200, seed=1)) for released in (split, plain))
    torch.testing.assert_close(one.matrix, other.matrix)
    torch.testing.assert_close(one.after, other.after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pixel_moments": None}, "needs pixel_moments=SIDE"),
        ({"selection": small_encoder()}, "selection: given with encoder=None"),
        ({"modes": small_modes()}, "modes: given with encoder=None"),
        ({"moments": (1, 2)}, r"moments=\(1, 2\)"),
        ({"bound": "ball"}, "bound='ball'"),
        ({"clip": 2.0}, r"clip=2\.0"),
        ({"shared_taps": 1}, "shared_taps=1"),
        ({"weights": {"phi1": 1.0}}, "unknown block 'phi1'"),
    ],
)
def test_pixels_alone_refuse_what_is_of_features(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-9, "adjacency": "replace-one"}
    arguments |= {"num_classes": 3, "pixel_moments": 4, "ledger": tmp_path / "l", **options}
    with pytest.raises(ValueError, match=message):
        dpmmd.release(images(20), None, **arguments)
    assert not (tmp_path / "l").exists()


# ----------------------------------------------------------------------------- merging


@given(
    counts=st.integers(0, 4).flatmap(
        lambda bits: st.lists(st.floats(-200, 3000), min_size=2**bits, max_size=2**bits)
    ),
    needed=st.floats(0, 320),
)
@settings(max_examples=300, deadline=None)
def test_groups_are_a_partition_that_stands_out(counts: list[float], needed: float) -> None:
    found = groups(counts, needed)
    assert sorted(itertools.chain(*found)) == list(range(len(counts)))
    assert found == sorted(tuple(sorted(group)) for group in found)
    if len(found) > 1:
        for group in found:
            assert stands_out(sum(counts[cell] for cell in group), len(group), needed)
    assert groups(counts, needed) == found
    if all(stands_out(count, 1, needed) for count in counts):
        assert len(found) == len(counts)  # nothing is merged without need


def test_a_hidden_mode_joins_its_sibling() -> None:
    assert stands_out(40, 1, 40) and not stands_out(39.9, 1, 40)  # noqa: PT018
    assert stands_out(80, 4, 40) and not stands_out(79.9, 4, 40)  # noqa: PT018
    assert not stands_out(LEAST - 1, 1, 0)
    assert needed(count_sd=10.0, noise_norm=0.0) == 40  # 4 standard deviations of a count
    assert needed(count_sd=10.0, noise_norm=200.0) == 100  # the mean's noise has norm 2 at most
    assert groups([100, 100, 100, 3], 40) == [(0,), (1,), (2, 3)]
    assert groups([100, 3, 100, 3], 40) == [(0, 1), (2, 3)]
    assert groups([100, 90, 3, 3], 40) == [(0,), (1, 2, 3)]  # the sibling's smallest
    assert groups([3, 3, 3, 3], 40) == [(0, 1, 2, 3)]
    assert groups([50, -49, 100, 100], 40) == [(0, 1, 2), (3,)]
    assert groups([20.0], 40) == [(0,)]


def test_rows_hold_every_image_and_sum_once() -> None:
    rng = torch.Generator().manual_seed(0)
    counts = torch.randn(3 * 8, generator=rng, dtype=torch.float64) * 100 + 120
    sums, selection = torch.randn(2, 24, 5, generator=rng), torch.randn(24, 3, generator=rng)
    found = Rows.of(counts, sums, selection, 8, 80.0)
    assert sorted(itertools.chain(*found.cells)) == list(range(24))
    assert all({cell // 8 for cell in group} == {k} for group, k in zip(
        found.cells, found.classes.tolist(), strict=True))  # fmt: skip
    assert found.counts.min() >= 1
    torch.testing.assert_close(found.sums.sum(1), sums.sum(1))
    assert found.selection is not None
    torch.testing.assert_close(found.selection.sum(0), selection.sum(0))
    for row, group in enumerate(found.cells):
        expected = sums[:, list(group)].double().sum(1).float()
        assert torch.equal(found.sums[:, row], expected)
        assert found.counts[row] == pytest.approx(max(1.0, float(counts[list(group)].sum())))
    # Mode by mode: classes in turn, each class's groups in order of their first cells.
    by_class = [[g for g in found.cells if g[0] // 8 == k] for k in range(3)]
    assert all(own == sorted(own) for own in by_class)
    turns = [own[i] for i in range(8) for own in by_class if i < len(own)]
    assert list(found.cells) == turns


def test_without_modes_the_rows_are_the_classes() -> None:
    released = exact(images(40), num_classes=3, delta=1e-9)
    found = released.rows
    assert found.sums is released.sums
    assert found.counts is released.counts
    assert found.cells == ((0,), (1,), (2,))
    assert (released.num_rows, released.num_classes) == (3, 3)
    expected = (released.sums.double() / released.counts[None, :, None]).float()
    assert torch.equal(released.target, expected)


@pytest.mark.parametrize("epsilon", [0.05, 1.0, 200.0])
def test_targets_are_finite_whatever_the_noise(epsilon: float) -> None:
    """32 modes for 200 images: most counts are noise, many below 0."""
    released = dpmmd.release(
        images(200), small_encoder(), epsilon=epsilon, delta=1e-5, adjacency="replace-one",
        num_classes=3, modes=small_modes(bits=5), selection=small_encoder(), progress=False,
    )  # fmt: skip
    assert released.target.isfinite().all()
    assert released.target.shape == (1, released.num_rows, 88)
    assert released.selection_target is not None
    assert released.selection_target.shape == (released.num_rows, 88)
    assert released.rows.counts.min() >= 1
    if epsilon < 1:
        assert released.num_rows == 3
        assert float(released.counts.min()) < 1  # as noised
    noise = released.metadata.sd / 2**30
    for k in range(3):
        own = released.rows.counts[released.rows.classes == k]
        assert len(own) == 1 or float(own.min()) >= max(LEAST, STANDS_OUT * noise / 0.1)
        assert len(own) == 1 or noise * math.sqrt(88) / float(own.min()) <= MOST_NOISE


# ----------------------------------------------------------------------------- fitting


def structured(n: int = 900, classes: int = 3, channels: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Images that vary along two directions about the mean of their class, 5 to 2."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, classes, n)
    u, v = rng.normal(size=(2, channels, 8, 8)) / 8
    x = 0.5 + (y[:, None, None, None] - 1) * 0.1
    x = x + 0.5 * rng.normal(size=(n, 1, 1, 1)) * u + 0.2 * rng.normal(size=(n, 1, 1, 1)) * v
    return (x.clip(0, 1) * 255).round().astype(np.uint8), y


def first_of(data: Any, **options: Any) -> Release:
    arguments: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "adjacency": "replace-one"}
    arguments |= {"num_classes": 3, "pixel_moments": 8, "progress": False, **options}
    return dpmmd.release(data, None, **arguments)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("weights_", [None, {"class_products": 0.7, "products": 0.0}])
def test_modes_are_the_signs_along_the_leading_directions(
    weights_: dict[str, float] | None, channels: int
) -> None:
    x, y = structured(channels=channels)
    first = first_of((x, y), insecure_test_noise=no_noise, weights=weights_)
    modes = dpmmd.modes.fit(first, 4)
    assert modes.directions.shape == (3 if weights_ else 1, 2, channels * 64)
    assert int(modes.directions.abs().amax()) == LARGEST
    assert modes.origin == first.metadata.statement
    flat = x.reshape(len(x), -1) / 255
    cells = modes.rows(torch.from_numpy(x).float() / 255, torch.from_numpy(y)).numpy() - 4 * y
    for k in range(3):
        own = flat[y == k] - flat[y == k].mean(0)
        leading = np.linalg.svd(own, full_matrices=False)[2][:2]
        ours = modes.directions[k if weights_ else 0].numpy() / LARGEST
        for a, b in zip(leading, ours, strict=True):
            assert abs(a @ b) / np.linalg.norm(b) > 0.98
        share = np.bincount(cells[y == k], minlength=4) / (y == k).sum()
        assert share.min() > 0.15  # signs about the mean: halves of halves
    assert torch.equal(dpmmd.modes.fit(first, 4).directions, modes.directions)


@pytest.mark.parametrize("weights_", [None, {"class_products": 0.7, "products": 0.0}])
def test_brightness_is_a_direction_like_any_other(weights_: dict[str, float] | None) -> None:
    """The bound norms images, and most of all bright ones: moments are weighted means.

    Means that have other weights than the products would make the variance of brightness negative.
    """
    rng = np.random.default_rng(0)
    y = np.arange(900) % 3
    bright = 0.45 + 0.05 * y + 0.12 * rng.normal(size=900)
    x = bright[:, None, None, None] + 0.02 * rng.normal(size=(900, 1, 8, 8))
    first = first_of(
        ((x.clip(0, 1) * 255).round().astype(np.uint8), y),
        insecure_test_noise=no_noise,
        weights=weights_,
    )
    for own in dpmmd.modes.fit(first, 2).directions[:, 0].double():
        assert float(own.sum().abs() / own.norm()) > 0.95 * 8  # all ones, of length 8


def test_fitting_survives_noise_and_empty_classes() -> None:
    x, y = structured()
    rng = np.random.default_rng(0)

    def sampler(n: int, sd: float) -> np.ndarray:
        return (rng.normal(size=n) * sd).round().astype(np.int64)

    for epsilon in (0.1, 1.0):
        data = x, np.minimum(y, 1)  # class 2 has no image
        first = first_of(data, epsilon=epsilon, insecure_test_noise=sampler)
        assert float(first.class_counts.max()) > 2 * LEAST
        modes = dpmmd.modes.fit(first, 2)
        assert modes.num_classes == 3
        cells = modes.rows(torch.from_numpy(x).float() / 255, torch.from_numpy(y))
        assert torch.equal(cells // 2, torch.from_numpy(y))


def test_fit_takes_a_release_of_pixel_moments_alone() -> None:
    x, y = structured()
    first = first_of((x, y))
    for wrong in (x, torch.from_numpy(x), (x, y), first.pixels, first.metadata, "first", None):
        with pytest.raises(TypeError, match=r"release: a \w+, expected the dpmmd\.Release"):
            dpmmd.modes.fit(wrong, 4)  # type: ignore[arg-type]
    plain = exact((x, y), num_classes=3)
    with pytest.raises(PrivacyError, match="no moments of pixels"):
        dpmmd.modes.fit(plain, 4)
    with pytest.raises(PrivacyError, match="no moments of pixels"):
        dpmmd.modes.fit(first_of((x, y), weights={"products": 0}), 4)
    split = exact((x, y), num_classes=3, modes=dpmmd.modes.fit(first, 2), pixel_moments=8)
    with pytest.raises(PrivacyError, match="has modes of its own"):
        dpmmd.modes.fit(split, 4)


@pytest.mark.parametrize("per_class", [1, 0, -2, 3, 6, 2.0, True, None, "8"])
def test_modes_are_a_power_of_two(per_class: Any) -> None:
    with pytest.raises(ValueError, match=r"per_class=.*expected a power of two"):
        dpmmd.modes.fit(first_of(structured()), per_class)


def test_the_largest_number_of_modes_is_told() -> None:
    first = first_of(structured(), insecure_test_noise=no_noise)  # about 300 images a class
    assert dpmmd.modes.fit(first, 8).per_class == 8
    with pytest.raises(ValueError, match=r"per_class=16: no mode would stand out.*at most 8 can"):
        dpmmd.modes.fit(first, 16)
    few = first_of(images(60), insecure_test_noise=no_noise)
    with pytest.raises(ValueError, match=r"per_class=2: .*no modes can"):
        dpmmd.modes.fit(few, 2)


@pytest.mark.parametrize("place", ["first", "encoder"])
@pytest.mark.parametrize(
    "wrong", [None, "squeezenet1.1", images(3)], ids=["None", "name", "images"]
)
def test_modes_are_suggested_of_a_release_and_an_encoder(place: str, wrong: Any) -> None:
    arguments = {"first": first_of(images(100)), "encoder": small_encoder(), place: wrong}
    with pytest.raises(TypeError, match=f"{place}: a "):
        dpmmd.modes.suggest(**arguments, epsilon=1.0, delta=1e-3)


def test_fewer_modes_are_suggested_for_more_noise() -> None:
    first = first_of(structured(3000), insecure_test_noise=no_noise)
    found = [
        dpmmd.modes.suggest(first, small_encoder(), epsilon=e, delta=1e-5) for e in (0.1, 1, 5, 100)
    ]
    assert found == sorted(found)
    assert found[0] == 1 < found[-1] == dpmmd.modes.SUGGESTED
    assert all(c & (c - 1) == 0 for c in found)
    few = first_of(structured(600), insecure_test_noise=no_noise)  # of 200 images, 30 a mode
    assert dpmmd.modes.suggest(few, small_encoder(), epsilon=100, delta=1e-5) == 4


# ----------------------------------------------------------------------------- two releases


@pytest.mark.parametrize("share", [0.001, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize(("epsilon", "delta"), [(10.0, 1e-5), (1.0, 1e-6), (0.2, 1e-5), (3, 1e-9)])
def test_two_releases_never_exceed_what_was_split(
    epsilon: float, delta: float, share: float
) -> None:
    parts = split_epsilon(epsilon, delta, share)
    mus = [accounting.calibrate(epsilon=part, delta=delta).mu for part in parts]
    both = accounting.compose(mus)
    assert accounting.delta(mu=both, epsilon=epsilon) <= delta
    whole = accounting.calibrate(epsilon=epsilon, delta=delta).mu
    assert mus[0] ** 2 + mus[1] ** 2 > whole**2 * (1 - 1e-7)  # and nearly all of it is used
    assert mus[0] ** 2 == pytest.approx(share * whole**2, rel=1e-7)


@pytest.mark.parametrize("share", [0.0, 1.0, -1, 2, math.nan])
def test_a_share_is_a_part(share: float) -> None:
    with pytest.raises(ValueError, match="share="):
        split_epsilon(1.0, 1e-5, share)


def test_a_share_that_is_no_release_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share=1e-12: one of the two releases gets no epsilon"):
        split_epsilon(1.0, 1e-5, 1e-12)


@pytest.fixture(scope="module")
def pair() -> tuple[Release, Release]:
    data = structured()
    first = first_of(data, epsilon=0.6)
    second = dpmmd.release(
        data, small_encoder(), epsilon=0.9, delta=1e-6, adjacency="replace-one", num_classes=3,
        modes=dpmmd.modes.fit(first, 4), progress=False,
    )  # fmt: skip
    return first, second


def test_both_releases_are_stated_together(pair: tuple[Release, Release]) -> None:
    first, second = pair
    mu = accounting.compose([first.metadata.mu, second.metadata.mu])
    epsilon = accounting.epsilon(mu=mu, delta=1e-6)
    f = report.facts(second)
    assert f["mu"] == second.metadata.mu  # its own part
    assert f["together"]["mu"] == mu
    assert f["together"]["epsilon"] == epsilon
    assert f["together"]["origin"]["array_sha256"] == first.metadata.array_sha256
    assert f["together"]["attacker_advantage"] > f["attacker_advantage"]
    shown = report.up(epsilon)
    assert f"together ({shown}, 1e-06)-differentially private" in f["promise"]
    assert "by itself takes (0.9, 1e-06), and the other one (0.6, 1e-05)." in f["promise"]
    assert f"epsilon={shown} together" in repr(second)
    text = report.markdown(second)
    assert "| (epsilon, delta), this release alone | (0.9, 1e-06) |" in text
    assert f"| (epsilon, delta), with the release of its modes | ({shown}, 1e-06) |" in text
    assert "takes (0.6, 1e-05) under replace-one" in text
    alone = report.facts(first)
    assert alone["together"] is alone["modes"] is None
    card = dpmmd.export.card(
        second, name="x", format="npz", shape=(9, 1, 8, 8), step=1, temperature=1.0, seed=0
    )
    assert f["promise"] in card
    assert "follow from these releases alone" in card


def test_what_is_of_one_release_alone_says_so(pair: tuple[Release, Release]) -> None:
    names = [[name for name, _ in report.rows(report.facts(each))] for each in pair]
    for name in names[1]:
        if name.startswith(("mu ", "(eps", "epsilon", "zCDP", "attacker")) or "under" in name:
            assert ("this release alone" in name) != ("with the release of its modes" in name)
    assert "the same release under zero-out" in names[0]
    assert "this release alone, under zero-out" in names[1]


def test_modes_that_will_not_stand_out_are_warned_about(recwarn: pytest.WarningsRecorder) -> None:
    """Before the spend, from N, which is public; not a word of it where N is private."""
    arguments: dict[str, Any] = {"modes": small_modes(bits=3), "num_classes": 3, "delta": 1e-5}
    with pytest.warns(UserWarning, match=r"8 a class leave 38 of N = 900 .* at most 4 a class do"):
        exact(images(900), **arguments, epsilon=6.0)
    with pytest.warns(UserWarning, match=r"stand out from the noise.*; leave them out"):
        exact(images(900), **arguments, epsilon=0.1)
    recwarn.clear()
    exact(images(900), **arguments, epsilon=60.0)
    exact(images(900), **arguments, epsilon=0.1, adjacency="add-remove")
    assert not recwarn.list


def test_public_modes_take_nothing() -> None:
    released = exact(images(40), modes=small_modes(), num_classes=3, insecure_test_noise=None)
    f = report.facts(released)
    assert f["together"] is None
    assert f["modes"]["public"]
    assert "the rule by which each class is split into 4 modes" in f["assumed_public"]
    assert f["promise"].startswith("This release, and everything computed from it, is (1, 0.001)-")
    assert "a public rule" in report.markdown(released)


def test_a_ledger_has_both_as_ordinary_lines(tmp_path: Path) -> None:
    data, book = structured(), tmp_path / "ledger"
    first = first_of(data, ledger=book)
    arguments: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "adjacency": "replace-one"}
    arguments |= {"num_classes": 3, "modes": dpmmd.modes.fit(first, 2), "progress": False}
    second = dpmmd.release(data, small_encoder(), ledger=book, **arguments)
    total = Ledger(book).total()
    assert total.releases == 2
    assert total.mu["replace-one"] == report.facts(second)["together"]["mu"]
    with pytest.warns(
        UserWarning, match=r"modes: fitted to the release [0-9a-f]{12}, which is not"
    ):
        dpmmd.release(data, small_encoder(), ledger=tmp_path / "another", **arguments)
    apart = {**arguments, "ledger": tmp_path / "third"}
    one = first_of(data, ledger=apart["ledger"], population="ward 1")
    apart["modes"] = dpmmd.modes.fit(one, 2)
    with pytest.warns(UserWarning, match="or there for another population"):
        dpmmd.release(data, small_encoder(), population="ward 2", **apart)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="modes: fitted to")
        dpmmd.release(data, small_encoder(), population="Ward 1", **apart)


def statement(**change: Any) -> Statement:
    level = accounting.calibrate(epsilon=1.0, delta=1e-5)
    fields = {"array_sha256": "0" * 64, "mu": level.mu, "epsilon": 1.0, "delta": 1e-5}
    fields |= {"adjacency": "replace-one", "unit": "image", "private": True}
    return Statement(**{**fields, **change})


@pytest.mark.parametrize(
    ("origin", "options", "message"),
    [
        ({"private": False}, {}, "test noise, which promises nothing"),
        ({}, {"adjacency": "add-remove"}, "no total can be stated"),
        ({"unit": "group by patients"}, {"adjacency": "add-remove"}, "no total can be stated"),
        ({}, {"group_by": "patients"}, "no total can be stated"),
        ({"unit": "group by eyes"}, {"group_by": "patients"}, "no total can be stated"),
    ],
    ids=["test noise", "adjacency", "images of groups", "groups of images", "other groups"],
)
def test_two_releases_without_a_total_are_refused_before_the_spend(
    origin: dict[str, Any], options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    x, y = images(30)
    data = torch.utils.data.TensorDataset(torch.tensor(x), torch.tensor(y))
    data.patients = [i // 3 for i in range(30)]  # type: ignore[attr-defined]
    arguments: dict[str, Any] = {"epsilon": 1.0, "delta": 1e-5, "adjacency": "replace-one"}
    arguments |= {"num_classes": 3, "modes": small_modes(origin=statement(**origin)), **options}
    with pytest.raises(PrivacyError, match=message):
        dpmmd.release(data, small_encoder(), **arguments, ledger=tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


@pytest.mark.parametrize(
    ("origin", "factor"),
    [({}, 1), ({"adjacency": "zero-out"}, 2), ({"unit": "group by x"}, 1),
     ({"unit": "group by x", "adjacency": "add-remove"}, 2)],
)  # fmt: skip
def test_totals_are_stated_under_the_second_release(
    origin: dict[str, Any], factor: int, tmp_path: Path
) -> None:
    """With the factors of section 7: an exchange is two steps of a blank or a removal."""
    made = statement(**origin)
    released = exact(
        images(40), modes=small_modes(origin=made), num_classes=3, insecure_test_noise=None
    )
    mu = report.facts(released)["together"]["mu"]
    assert mu == accounting.compose([factor * made.mu, released.metadata.mu])
    assert Release.load(released.save(tmp_path / "r.safetensors")).metadata == released.metadata


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"array_sha256": "abc"}, "array_sha256 = 'abc'"),
        ({"adjacency": "replace"}, "adjacency = 'replace'"),
        ({"unit": ""}, "unit = ''"),
        ({"unit": "patient"}, "unit = 'patient'"),
        ({"epsilon": -1.0}, "epsilon"),
        ({"mu": 0.1}, "mu = 0.1"),
        ({"mu": -0.1}, "mu = -0.1"),
    ],
)
def test_a_statement_that_no_release_makes_is_refused_before_the_spend(
    change: dict[str, Any], field: str, tmp_path: Path
) -> None:
    """It would make a file that cannot be read again, and totals that are too small."""
    modes, ledger = small_modes(origin=statement(**change)), tmp_path / "ledger"
    with pytest.raises(PrivacyError, match=f"modes.origin.{field}.*Nothing was spent"):
        exact(images(100), modes=modes, num_classes=3, insecure_test_noise=None, ledger=ledger)
    assert not ledger.exists()


def test_test_noise_is_stamped_whatever_the_modes_come_from() -> None:
    modes = small_modes(origin=statement(private=False))
    released = exact(images(40), modes=modes, num_classes=3)
    assert report.facts(released)["promise"].startswith("NOT PRIVATE")
    assert "NOT PRIVATE" in repr(released)


@pytest.mark.parametrize(
    ("modes", "error", "message"),
    [
        (torch.zeros(3), TypeError, r"modes: a Tensor, expected dpmmd\.Modes.*modes\.fit\(first"),
        ("first.safetensors", TypeError, "modes: a str"),
        (8, TypeError, "modes: a int"),
        (small_modes(classes=10), ValueError, "modes: of 10 classes, num_classes=3"),
        (small_modes(channels=3), ValueError, "modes: of images with 3 channels"),
    ],
)
def test_modes_that_do_not_go_with_the_source_cost_nothing(
    modes: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        exact(images(30), modes=modes, num_classes=3, ledger=tmp_path / "ledger")
    assert not (tmp_path / "ledger").exists()


def test_a_release_in_the_place_of_modes_is_refused(pair: tuple[Release, Release]) -> None:
    with pytest.raises(TypeError, match=r"modes: a Release, .*dpmmd\.modes\.fit\(first_release"):
        exact(structured(), modes=pair[0], num_classes=3)
