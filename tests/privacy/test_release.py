"""The release: exact sums, sensitivity, silence about single images, and its file."""

from __future__ import annotations

import copy
import hashlib
import json
import math
import pickle
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import dpmmd
from dpmmd import functional, reference
from dpmmd.bounds import BOUNDS, Bound
from dpmmd.data import Batch, ImageSource
from dpmmd.encoders.pixels import transform
from dpmmd.privacy import Block, PrivacyError, Release, sensitivity
from dpmmd.privacy.sums import GUARD, PrivateSums, bounded_integers
from tests.conftest import images, no_noise, nonnegative_encoder, small_encoder

LIMIT = 2**30
LIMITS = torch.tensor([LIMIT])
ARGUMENTS = {"epsilon": 1.0, "delta": 1e-3, "adjacency": "replace-one", "progress": False}


def exact(source: object, encoder: object = None, **options: object) -> Release:
    """A release whose noise is zero."""
    arguments = {**ARGUMENTS, "insecure_test_noise": no_noise, **options}
    return dpmmd.release(source, encoder or small_encoder(), **arguments)  # type: ignore[arg-type]


class Rows(ImageSource):
    """Given float images, labels and validity, as they are."""

    name, identity = "rows", "0" * 64

    def __init__(self, x: Tensor, y: Tensor, valid: Tensor) -> None:
        self.x, self.y, self.valid = x, y, valid
        self.num_images = len(x)
        self.image_shape = tuple(x.shape[1:])  # type: ignore[assignment]

    def look(self, positions: Sequence[int]) -> list[None]:
        return [None] * len(positions)  # nothing is read before the spend

    def batches(self, batch_size: int) -> Iterator[Batch]:
        if not self.num_images:
            return
        padding = -len(self.x) % batch_size
        x = torch.cat([self.x, self.x.new_zeros(padding, *self.x.shape[1:])])
        y = torch.cat([self.y, self.y.new_zeros(padding)])
        valid = torch.cat([self.valid, self.valid.new_zeros(padding)])
        for part in zip(*(t.split(batch_size) for t in (x, y, valid)), strict=True):
            yield Batch(*part)


def rows(n: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    x, y = images(n)
    return torch.from_numpy(x).float() / 255, torch.from_numpy(y), torch.ones(n, dtype=torch.bool)


# ----------------------------------------------------------------------------- integer vectors


vectors = st.lists(
    st.one_of(
        st.floats(allow_nan=True, allow_infinity=True, width=32),
        st.floats(-1, 1, width=32),
        st.sampled_from([0.0, 1e38, -1e38, 1e-45, -1e-45, 1e-38, 2.0**-126]),
    ),
    min_size=1,
    max_size=12,
)


@given(values=vectors, bound=st.sampled_from(BOUNDS), clip=st.floats(1e-6, 1e6))
@settings(max_examples=400, deadline=None)
def test_no_vector_passes_the_limit(values: list[float], bound: str, clip: float) -> None:
    v = torch.tensor([values], dtype=torch.float64)
    taps = [v[:, : len(values) // 2], v[:, len(values) // 2 :]]
    q, within = bounded_integers(
        taps, LIMITS, bound=Bound(kind=bound, clip=clip), nonnegative=False
    )
    numbers = [int(x) for part in q for x in part.flatten()]
    square = sum(x * x for x in numbers)  # Python integers: exact
    assert square <= LIMIT**2
    assert bool(within) == (square > 0)
    finite = all(np.isfinite(values)) and any(values)
    if bound == "sphere" and finite and max(map(abs, values)) > 1e-300:
        assert square > (LIMIT * GUARD * (1 - 1e-6)) ** 2 * 0.999999 - 13 * LIMIT
    if not all(np.isfinite(values)) and not bound.endswith("per-tap"):
        assert square == 0


@pytest.mark.parametrize("bound", BOUNDS)
def test_integers_are_the_bounded_features(bound: str) -> None:
    """q / 2^30 is B(f) / c up to the grid and the guard."""
    rng = torch.Generator().manual_seed(0)
    taps = [torch.randn(6, d, generator=rng, dtype=torch.float64) for d in (40, 7)]
    clip = 5.0
    q, within = bounded_integers(
        taps, LIMITS, bound=Bound(kind=bound, clip=clip), nonnegative=False
    )
    assert within.all()
    ours = torch.cat(q, dim=1).double() / LIMIT * clip
    truth = torch.cat(
        [reference.bounded([t[i : i + 1] for t in taps], bound, clip) for i in range(6)]
    )
    torch.testing.assert_close(ours, truth, rtol=2e-6, atol=2e-8)


def test_integers_do_not_depend_on_the_batch() -> None:
    rng = torch.Generator().manual_seed(0)
    v = torch.randn(33, 1001, generator=rng, dtype=torch.float64)
    whole, _ = bounded_integers([v], LIMITS, bound=Bound(), nonnegative=False)
    for i in (0, 17, 32):
        one, _ = bounded_integers([v[i : i + 1]], LIMITS, bound=Bound(), nonnegative=False)
        assert torch.equal(one[0][0], whole[0][i])
    shuffled = torch.randperm(1001, generator=rng)
    other, _ = bounded_integers([v[:, shuffled]], LIMITS, bound=Bound(), nonnegative=False)
    assert torch.equal(other[0], whole[0][:, shuffled])


def test_negative_entries_fail_a_nonnegative_block() -> None:
    v = torch.tensor([[1.0, 2.0], [1.0, -1e-3]], dtype=torch.float64)
    _, within = bounded_integers([v], LIMITS, bound=Bound(), nonnegative=True)
    assert within.tolist() == [True, False]


def test_raw_sums_cannot_be_looked_at() -> None:
    sums = PrivateSums(2, 3)
    assert repr(sums) == "<PrivateSums>"
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy, list, len, np.asarray, "{:s}".format):
        with pytest.raises(TypeError, match="raw private statistics"):
            attempt(sums)  # type: ignore[operator]
    with pytest.raises(TypeError):
        sums[0]
    with pytest.raises(TypeError):
        torch.tensor(sums)
    sums.take()
    with pytest.raises(RuntimeError, match="have been taken"):
        sums.take()


# ----------------------------------------------------------------------------- the release


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("moments", [(1,), (2,), (1, 2)])
def test_sums_are_those_of_the_features(moments: tuple[int, ...], bound: str) -> None:
    encoder = small_encoder()
    x, y, _ = rows(50)
    released = exact(images(50), encoder, num_classes=3, moments=moments, bound=bound, clip=2.0)
    means, counts = functional.mean_embedding(
        encoder(x), y, 3, moments=moments, bound=bound, clip=2.0
    )
    torch.testing.assert_close(released.counts, counts.double())
    torch.testing.assert_close(released.target, means, rtol=1e-5, atol=1e-6)


def test_joint_bound_matches_the_loss_side() -> None:
    encoder = small_encoder()
    x, y, _ = rows(50)
    options = {"moments": (1, 2), "joint_weight": 0.5}
    released = exact(images(50), encoder, num_classes=3, **options)
    means, _ = functional.mean_embedding(encoder(x), y, 3, **options)  # type: ignore[arg-type]
    torch.testing.assert_close(released.target, means, rtol=1e-5, atol=1e-6)
    assert [b.name for b in released.metadata.blocks] == ["phi1+phi2", "counts"]


@pytest.mark.parametrize("batch_size", [1, 7, 50, 64])
def test_batch_size_changes_no_bit_but_the_encoders(batch_size: int) -> None:
    """With an encoder that computes each row alone, sums are the same bits for any batch size."""

    encoder = small_encoder()
    forward = encoder.forward
    encoder.forward = lambda p: _alone(forward, p)  # type: ignore[method-assign]
    part = exact(images(50), encoder, num_classes=3, batch_size=batch_size)
    whole = exact(images(50), encoder, num_classes=3, batch_size=25)
    assert torch.equal(part.sums, whole.sums)
    assert torch.equal(part.counts, whole.counts)


def _alone(forward: object, pixels: Tensor) -> list[Tensor]:
    maps = [forward(p[None]) for p in pixels]  # type: ignore[operator]
    return [torch.cat([m[tap] for m in maps]) for tap in range(len(maps[0]))]


def test_order_changes_no_bit() -> None:
    x, y = images(64)
    order = np.random.default_rng(3).permutation(64)
    encoder = small_encoder()
    forward = encoder.forward
    encoder.forward = lambda p: _alone(forward, p)  # type: ignore[method-assign]
    a = exact((x, y), encoder, num_classes=3, batch_size=16)
    b = exact((x[order], y[order]), encoder, num_classes=3, batch_size=16)
    assert torch.equal(a.sums, b.sums)
    assert torch.equal(a.counts, b.counts)


BAD_ROWS = {
    "nan": lambda x, y, v: x[3].fill_(float("nan")),
    "one nan": lambda x, y, v: x[3, 0, 0, 0].fill_(float("nan")),
    "inf": lambda x, y, v: x[3].fill_(float("inf")),
    "huge": lambda x, y, v: x[3].fill_(1e38),
    "below": lambda x, y, v: x[3].fill_(-0.1),
    "invalid": lambda x, y, v: v[3].fill_(False),
    "label high": lambda x, y, v: y[3].fill_(99),
    "label low": lambda x, y, v: y[3].fill_(-5),
}


@pytest.mark.parametrize("adjacency", ["replace-one", "zero-out", "add-remove"])
@pytest.mark.parametrize("damage", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_image_contributes_zero_in_silence(
    damage: object,
    adjacency: str,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    x, y, valid = rows()
    good = exact(Rows(x, y, valid), num_classes=3, adjacency=adjacency, batch_size=8, delta=1e-9)
    x2, y2, valid2 = x.clone(), y.clone(), valid.clone()
    damage(x2, y2, valid2)  # type: ignore[operator]
    bad = exact(Rows(x2, y2, valid2), num_classes=3, adjacency=adjacency, batch_size=8, delta=1e-9)
    without = torch.ones(20, dtype=torch.bool)
    without[3] = False
    rest = exact(Rows(x, y, without), num_classes=3, adjacency=adjacency, batch_size=8, delta=1e-9)
    assert torch.equal(bad.sums, rest.sums)
    assert torch.equal(bad.counts, rest.counts)
    assert (good.counts - bad.counts).abs().sum() == 1
    assert bad.sums.shape == good.sums.shape
    hidden = {"array_sha256"}
    assert bad.metadata.model_dump(exclude=hidden) == good.metadata.model_dump(exclude=hidden)
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


@pytest.mark.parametrize("adjacency", ["replace-one", "zero-out", "add-remove"])
@pytest.mark.parametrize("make", [small_encoder, nonnegative_encoder])
@pytest.mark.parametrize("moments", [(1,), (1, 2)])
def test_replay_neighbours_differ_by_at_most_the_sensitivity(
    adjacency: str, make: object, moments: tuple[int, ...]
) -> None:
    """With the noise frozen to zero: the released vector of neighbours, in units of the bound."""
    encoder = make()  # type: ignore[operator]
    x, y, valid = rows()
    options = {"num_classes": 3, "adjacency": adjacency, "moments": moments, "delta": 1e-9}
    base = exact(Rows(x, y, valid), encoder, **options)
    m = base.metadata
    blocks = [Block(b.name, b.kind, b.bound * 2.0**m.grid_bits, b.nonnegative) for b in m.blocks]
    declared = sensitivity(adjacency, blocks)
    assert m.sensitivity == declared
    worst = 0.0
    for change in range(6):
        x2, y2, valid2 = x.clone(), y.clone(), valid.clone()
        if adjacency == "replace-one":
            x2[0] = [1 - x[0], x[5], torch.ones_like(x[0]), x[0], x[7], 0 * x[0]][change]
            y2[0] = (y[0] + change) % 3
        elif adjacency == "zero-out":
            valid2[change] = False
        else:
            keep = torch.arange(20) != change
            x2, y2, valid2 = x[keep], y[keep], valid[keep]
        other = exact(Rows(x2, y2, valid2), encoder, **options)
        sums = (base.sums.double() - other.sums.double()).square().sum()
        counts = (0.1 * (base.counts - other.counts)).square().sum()
        worst = max(worst, float((sums + counts).sqrt()) * 2**m.grid_bits)
    assert worst <= declared * (1 + 1e-6)  # float32 of the file
    assert worst > 0.2 * declared


# Features by the grey level of a pixel, in steps of 1 / 15: all that floating point has to offer.
EXTREMES = torch.tensor([
    0.0, 1.0, -1.0, 2.0, -3.0, 1e38, -1e38, 3e-39,
    -1e-45, 1e-20, 0.5, -0.25, math.nan, math.inf, -math.inf, 7.0,
])  # fmt: skip


class _Extremes(torch.nn.Module):
    """Two taps of two features each, any numbers at all."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        v = EXTREMES[(x[:, :1] * 15).round().long()]
        return {"a": v[..., :2], "b": v[..., 2:].abs()}


def extremes() -> dpmmd.encoders.Encoder:
    with pytest.MonkeyPatch.context() as patch:  # its probe would refuse NaN
        patch.setattr(
            dpmmd.encoders.Encoder,
            "_probe",
            lambda self, signs: tuple(
                dpmmd.encoders.base.Tap(name, (1, 1, 2), sign) for name, sign in signs.items()
            ),
        )
        return dpmmd.encoders.Encoder(
            _Extremes(), name="extremes", weights_sha256="0" * 64, image_size=(1, 4),
            tap_signs={"a": "signed", "b": "nonnegative"},
        )  # fmt: skip


image = st.tuples(
    st.lists(st.integers(0, 15), min_size=4, max_size=4), st.integers(0, 2), st.booleans()
)
data_sets = st.lists(image, min_size=0, max_size=4)
MOMENTS: list[dict[str, object]] = [
    {"moments": (1,)},
    {"moments": (2,)},
    {"moments": (1, 2)},
    {"moments": (1, 2), "joint_weight": 0.7},
    {"moments": (1,), "shared_taps": 1},
]


@given(
    rest=data_sets,
    one=image,
    other=image,
    adjacency=st.sampled_from(["replace-one", "zero-out", "add-remove"]),
    moments=st.sampled_from(MOMENTS),
    bound=st.sampled_from(["sphere", "ball"]),
    classes=st.sampled_from([None, 3]),
)
@settings(max_examples=300, deadline=None)
def test_adversarial_neighbours_differ_by_at_most_the_sensitivity(
    rest: list, one: tuple, other: tuple, adjacency: str, moments: dict, bound: str, classes: object
) -> None:
    """Any features, labels and undecodable images, down to a data set of one image, or of none."""
    options = {**moments, "bound": bound, "num_classes": classes, "adjacency": adjacency}
    if classes is None:
        options.pop("shared_taps", None)

    def released(items: list) -> tuple[Tensor, Release]:
        x = torch.tensor([i[0] for i in items], dtype=torch.float32).reshape(-1, 1, 1, 4) / 15
        y = torch.tensor([i[1] for i in items], dtype=torch.int64)
        valid = torch.tensor([i[2] for i in items], dtype=torch.bool)
        taken = []
        take = PrivateSums.take

        def watch(self: PrivateSums) -> tuple[Tensor, Tensor]:
            sums = take(self)
            taken.extend(s.clone().flatten() for s in sums)
            return sums

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(PrivateSums, "take", watch)
            result = exact(Rows(x, y, valid), extremes(), batch_size=2, delta=1e-9, **options)
        return torch.cat(taken), result

    first = [*rest, one]
    second = [*rest, other]
    if adjacency == "zero-out":
        second = [*rest, (*one[:2], False)]
    if adjacency == "add-remove":
        second = rest
    (a, left), (b, right) = released(first), released(second)
    square = sum(int(d) ** 2 for d in (a - b))  # Python integers: exact
    assert square <= left.metadata.sensitivity**2
    hidden = {"array_sha256"}
    assert left.metadata.model_dump(exclude=hidden) == right.metadata.model_dump(exclude=hidden)
    assert left.sums.shape == right.sums.shape


def test_noise_has_the_declared_sd(encoder: dpmmd.encoders.Encoder) -> None:
    options = {"num_classes": 3, **ARGUMENTS}
    clean = exact(images(100), encoder, num_classes=3)
    noise = [
        dpmmd.release(images(100), encoder, **options).sums - clean.sums  # type: ignore[arg-type]
        for _ in range(30)
    ]
    values = torch.stack(noise).flatten() / clean.metadata.noise_sd
    assert values.mean().abs() < 5 / values.numel() ** 0.5
    assert (values.square().mean() - 1).abs() < 5 * (2 / values.numel()) ** 0.5
    counts_sd = clean.metadata.noise_sd / 0.1
    assert counts_sd == pytest.approx(10 * clean.metadata.sd / 2**30)


def test_n_stays_private_under_add_remove(
    encoder: dpmmd.encoders.Encoder, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    sizes, texts = [], []
    for n in (40, 41):
        path = tmp_path / f"{n}.safetensors"
        released = dpmmd.release(
            images(n),
            encoder,
            epsilon=1.0,
            delta=1e-9,
            adjacency="add-remove",
            progress=True,
            out=path,
        )
        assert released.metadata.num_units is None
        assert released.counts[0] != n
        sizes.append(path.stat().st_size)
        texts.append(released.metadata.model_dump_json(exclude={"array_sha256"}))
    assert sizes[0] == sizes[1]
    assert texts[0] == texts[1]
    assert capfd.readouterr() == ("", "")


def test_counts_policy(encoder: dpmmd.encoders.Encoder) -> None:
    unlabelled = exact(images(30), encoder, delta=1e-9)
    assert unlabelled.counts.tolist() == [30.0]
    assert [b.kind for b in unlabelled.metadata.blocks] == ["sums"]
    labelled = exact(images(30), encoder, num_classes=3, delta=1e-9)
    assert [b.kind for b in labelled.metadata.blocks] == ["sums", "counts"]
    assert labelled.metadata.num_units == 30
    private = exact(images(30), encoder, adjacency="add-remove", delta=1e-9)
    assert [b.kind for b in private.metadata.blocks] == ["sums", "counts"]


def test_sign_of_the_taps_sets_the_sensitivity() -> None:
    def delta_of(encoder: object, **options: object) -> float:
        released = exact(images(10), encoder, delta=1e-9, **options)
        return released.metadata.sensitivity / 2**30

    assert delta_of(small_encoder()) == pytest.approx(2.0)
    assert delta_of(nonnegative_encoder()) == pytest.approx(2**0.5)
    assert delta_of(nonnegative_encoder(), moments=(1, 2)) == pytest.approx(2.0)
    assert delta_of(small_encoder(), moments=(1, 2)) == pytest.approx(6**0.5)
    assert delta_of(small_encoder(), adjacency="zero-out") == pytest.approx(1.0)
    assert delta_of(small_encoder(), num_classes=3) == pytest.approx(2.0)  # counts are free
    assert delta_of(nonnegative_encoder(), num_classes=3) == pytest.approx(2.02**0.5)


def test_weights_scale_the_noise_and_not_the_sums() -> None:
    encoder = small_encoder()
    options = {"num_classes": 3, "moments": (1, 2), "delta": 1e-9}
    even = exact(images(40), encoder, **options)
    weights = {"phi2": 0.25, "counts": 0.5}
    uneven = exact(images(40), encoder, weights=weights, **options)
    torch.testing.assert_close(uneven.sums, even.sums, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(uneven.counts, even.counts)
    assert [b.bound for b in uneven.metadata.blocks] == [1.0, 0.25, 0.5]
    assert uneven.metadata.sensitivity / 2**30 == pytest.approx((4 + 2 / 16) ** 0.5)
    noisy = [
        dpmmd.release(images(40), encoder, weights=weights, **{**ARGUMENTS, **options})  # type: ignore[arg-type]
        for _ in range(40)
    ]
    noise = torch.stack([r.sums - uneven.sums for r in noisy]).transpose(0, 1).flatten(1)
    ratio = float(noise[1].std() / noise[0].std())
    assert ratio == pytest.approx(4.0, rel=0.03)
    with pytest.raises(ValueError, match="unknown block 'phi3'"):
        exact(images(4), encoder, weights={"phi3": 1.0})
    with pytest.raises(ValueError, match=r"weights\['phi1'\]=2.0"):
        exact(images(4), encoder, weights={"phi1": 2.0})


def test_selection_block(tmp_path: Path) -> None:
    encoder, other = small_encoder(), nonnegative_encoder()
    x, y, _ = rows(50)
    options = {"num_classes": 3, "clip": 2.0, "selection": other}
    released = exact(images(50), encoder, **options)
    means, _ = functional.mean_embedding(other(x), y, 3)
    assert released.selection_target is not None
    torch.testing.assert_close(released.selection_target, means[0], rtol=1e-5, atol=1e-6)
    assert [b.name for b in released.metadata.blocks] == ["phi1", "selection", "counts"]
    assert released.metadata.selection_encoder == other.spec()
    again = Release.load(released.save(tmp_path / "r.safetensors"))
    assert again.selection is not None
    assert torch.equal(again.selection, released.selection)  # type: ignore[arg-type]
    noisy = dpmmd.release(images(50), encoder, **{**ARGUMENTS, **options})  # type: ignore[arg-type]
    assert noisy.selection is not None
    noise = (noisy.selection - released.selection).flatten()  # type: ignore[operator]
    expected = noisy.metadata.sd / 2**30 / 0.25
    assert float(noise.std()) == pytest.approx(expected, rel=6 / noise.numel() ** 0.5)


def test_pixel_moments(tmp_path: Path) -> None:
    """The block holds what it says, to float32, of images brought to its side."""
    x, y, _ = rows(50)
    options = {"num_classes": 3, "clip": 2.0, "selection": small_encoder(), "pixel_moments": 5}
    released = exact(images(50), small_encoder(), **options)
    blocks = {b.name: b for b in released.metadata.blocks}
    assert list(blocks) == ["phi1", "pixels", "products", "selection", "counts"]
    signs = {name: (block.nonnegative, block.spread) for name, block in blocks.items()}
    assert signs["pixels"] == (False, False)
    assert signs["products"] == (True, True)
    assert (blocks["pixels"].size, blocks["pixels"].shared) == (3 * 26, 0)
    assert (blocks["products"].size, blocks["products"].shared) == (26 * 27 // 2, 26 * 27 // 2)
    small = F.interpolate(x, (5, 5), mode="bilinear", align_corners=False).double().flatten(1)
    u = small @ transform(1, 5, 5).T
    v = torch.cat((u, torch.full((50, 1), (25 / 8) ** 0.5)), dim=1)
    v = v / v.norm(dim=1, keepdim=True)
    again = Release.load(released.save(tmp_path / "r.safetensors"))
    assert again.products is not None
    assert again.pixels is not None
    means = F.one_hot(y, 3).double().T @ v
    torch.testing.assert_close(again.pixels.double(), means, rtol=1e-5, atol=1e-5)
    assert again.products.trace() == pytest.approx(50, rel=0.01)
    second = again.products.double() * 50 / again.products.double().trace()
    torch.testing.assert_close(second, v.T @ v, rtol=0, atol=50 * 2e-5)  # v in steps of 2^-15
    for other in (
        {"pixels": again.pixels},
        {"products": again.products},
        {"pixels": again.pixels, "products": again.products[:-1]},
        {"pixels": again.pixels, "products": again.products, "class_products": torch.zeros(3)},
    ):
        bare = Release(again.sums, again.counts, again.metadata, again.selection, **other)
        with pytest.raises(PrivacyError, match="do not match its metadata"):
            Release.load(bare.save(tmp_path / "bare.safetensors", overwrite=True))
    both = exact(images(50), small_encoder(), weights={"class_products": 0.5}, **options)
    by_class = both.metadata.blocks[3]
    assert (by_class.name, by_class.nonnegative, by_class.spread) == ("class_products", True, False)
    assert (by_class.size, by_class.shared) == (3 * 26 * 27 // 2, 0)
    both = Release.load(both.save(tmp_path / "both.safetensors"))
    assert both.class_products is not None
    for k, found in enumerate(both.class_products.double()):
        n = int((y == k).sum())
        assert found.trace() == pytest.approx(n, rel=0.01)
        of_class = v[y == k].T @ v[y == k]
        torch.testing.assert_close(found * n / found.trace(), of_class, rtol=0, atol=50 * 4e-5)
    without = exact(images(50), small_encoder(), weights={"products": 0}, **options)
    assert [b.name for b in without.metadata.blocks] == ["phi1", "pixels", "selection", "counts"]
    assert without.products is None
    assert torch.equal(without.pixels, again.pixels)  # type: ignore[arg-type]
    Release.load(without.save(tmp_path / "without.safetensors"))
    for side in (0, 56, 2.0):
        with pytest.raises(ValueError, match="pixel_moments="):
            exact(images(4), small_encoder(), pixel_moments=side)


@pytest.mark.parametrize("adjacency", ["replace-one", "zero-out"])
def test_pixel_moments_keep_to_the_sensitivity(adjacency: str) -> None:
    """Extreme images, of one class or of two, and images that are exchanged for nothing."""
    options = {"num_classes": 2, "pixel_moments": 8, "adjacency": adjacency, "delta": 1e-9}
    half = torch.arange(64).view(1, 1, 8, 8) % 2
    pictures = [*torch.cat((torch.zeros_like(half), half, 1 - half, half | 1)).float()]
    every = [(p[None], torch.tensor([k]), True) for p in pictures for k in (0, 1)]
    nothing = (torch.zeros(1, 1, 8, 8), torch.tensor([0]), False)
    pairs = [(a, b) for a in every for b in every]
    if adjacency == "zero-out":
        pairs = [(a, nothing) for a in every]
    weights = {"phi1": 2.0**-20, "pixels": 1.0, "products": 1.0, "counts": 1.0}
    weights["class_products"] = 1.0
    others = torch.cat([torch.full((1, 1, 8, 8), k / 4) for k in range(4)])
    largest = 0.0
    for pair in pairs:
        a, b = (
            exact(
                Rows(
                    torch.cat((others, x)),
                    torch.cat((torch.arange(4) % 2, y)),
                    torch.tensor([True] * 4 + [valid]),
                ),
                _pixel_encoder("nonnegative"),
                weights=weights,
                **options,
            )
            for x, y, valid in pair
        )
        square = float((a.counts - b.counts).square().sum())
        for name in ("pixels", "products", "class_products"):
            one, other = getattr(a, name), getattr(b, name)
            assert one is not None
            assert other is not None
            square += float((one - other).double().square().sum())
        largest = max(largest, square)
        assert square**0.5 <= a.metadata.sensitivity / 2**30 * (1 + 1e-6)
    assert largest > (3.9 if adjacency == "zero-out" else 7.4)  # of at most 4, or 10


def test_every_block_has_noise_of_its_own() -> None:
    """Noise of each block: the declared sd, and independent of every other block's and release's.

    Thresholds are six standard deviations.
    """
    encoder, runs = small_encoder(), 30
    options = {"num_classes": 3, "moments": (1, 2), "selection": small_encoder(), "delta": 1e-9}
    options |= {"pixel_moments": 6, "weights": {"class_products": 0.4}}
    clean = exact(images(2000), encoder, **options)
    noisy = [
        dpmmd.release(images(2000), encoder, **{**ARGUMENTS, "epsilon": 5.0, **options})  # type: ignore[arg-type]
        for _ in range(runs)
    ]
    sd = noisy[0].metadata.sd / 2**30
    rows, columns = torch.triu_indices(37, 37, 1)

    def scaled(values: list[Tensor], weight: float) -> Tensor:
        return torch.stack(values).double().flatten(1) * weight / sd  # [runs, numbers]

    noise = {
        "phi1": scaled([r.sums[0] - clean.sums[0] for r in noisy], 1.0),
        "phi2": scaled([r.sums[1] - clean.sums[1] for r in noisy], 1.0),
        "selection": scaled([r.selection - clean.selection for r in noisy], 0.25),  # type: ignore[operator]
        "pixels": scaled([r.pixels - clean.pixels for r in noisy], 0.7),  # type: ignore[operator]
        "squares": scaled([(r.products - clean.products).diagonal() for r in noisy], 0.7),  # type: ignore[operator]
        "products": scaled(
            [(r.products - clean.products)[rows, columns] for r in noisy],  # type: ignore[operator]
            0.7 * 2**0.5,
        ),
        "squares of a class": scaled(
            [
                (r.class_products - clean.class_products).diagonal(dim1=1, dim2=2)  # type: ignore[operator]
                for r in noisy
            ],
            0.4,
        ),
        "products of a class": scaled(
            [(r.class_products - clean.class_products)[:, rows, columns] for r in noisy],  # type: ignore[operator]
            0.4 * 2**0.5,
        ),
        "counts": scaled([r.counts - clean.counts for r in noisy], 0.1),
    }
    for name, values in noise.items():
        n = values.numel()
        assert abs(float(values.mean())) < 6 / n**0.5, name
        assert abs(float(values.square().mean()) - 1) < 6 * (2 / n) ** 0.5, name
        for other, others in noise.items():
            if other != name and others.shape == values.shape:
                assert abs(float((values * others).mean())) < 6 / n**0.5, (name, other)
        if name != "counts":
            again = (values[1:] * values[:-1]).mean()
            assert abs(float(again)) < 6 / values[1:].numel() ** 0.5, name


@pytest.mark.parametrize("adjacency", ["replace-one", "zero-out", "add-remove"])
def test_a_release_passes_its_own_check(adjacency: str, tmp_path: Path) -> None:
    """Noise, sensitivity and claim in the file of a release of many blocks fit together."""
    released = dpmmd.release(
        images(30),
        small_encoder(),
        epsilon=1.0,
        delta=1e-9,
        adjacency=adjacency,
        num_classes=3,
        moments=(1, 2),
        selection=nonnegative_encoder(),
        pixel_moments=4,
        progress=False,
    )
    Release.load(released.save(tmp_path / "r.safetensors"))


def test_messages_under_add_remove_do_not_depend_on_n(
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Two neighbours on either side of the delta that warns, and the same noisy count."""
    caplog.set_level(0)
    for n in (20, 21):
        exact(
            images(n),
            adjacency="add-remove",
            delta=1 / 20.5,
            progress=True,
            insecure_test_noise=lambda size, sd: np.full(size, -(2**40)),  # a count of less than 1
        )
        assert not caplog.records
        assert capfd.readouterr() == ("", "")
        assert not recwarn.list


class _Pixel(torch.nn.Module):
    """One tap: the pixels less a half, or what of that is positive."""

    def __init__(self, sign: str) -> None:
        super().__init__()
        self.sign = sign

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        v = x[:, :1] - 0.5
        return {"t": v.relu() if self.sign == "nonnegative" else v}


def _pixel_encoder(sign: str) -> dpmmd.encoders.Encoder:
    return dpmmd.encoders.Encoder(
        _Pixel(sign), name=sign, weights_sha256="0" * 64, image_size=8, tap_signs={"t": sign}
    )


def test_an_image_that_is_zero_in_one_block_alone_keeps_to_the_sensitivity() -> None:
    """Replace-one, same class: antipodal in phi1, and in one of the two no selection features.

    If such an image were not counted, its class count would move beside phi1's full 2 c.
    """
    x = torch.full((9, 1, 8, 8), 0.75)
    x2 = x.clone()
    x2[0] = 0.25  # phi1 turns round, the selection features are zero
    y, valid = torch.zeros(9, dtype=torch.int64), torch.ones(9, dtype=torch.bool)
    options = {
        "num_classes": 1,
        "selection": _pixel_encoder("nonnegative"),
        "weights": {"counts": 1.0},
        "delta": 1e-9,
    }
    a, b = (exact(Rows(t, y, valid), _pixel_encoder("signed"), **options) for t in (x, x2))
    assert a.selection is not None
    assert b.selection is not None
    square = float((a.sums - b.sums).double().square().sum())
    square += 0.25**2 * float((a.selection - b.selection).double().square().sum())
    square += float((a.counts - b.counts).square().sum())
    declared = a.metadata.sensitivity / 2**30
    assert square > 4  # phi1 alone reaches 2 c
    assert square**0.5 <= declared * (1 + 1e-6)


@pytest.mark.parametrize(
    "change",
    [{"epsilon": 0.5}, {"mu": 0.01}, {"sd": 1.0}, {"adjacency": "zero-out"}, {"sensitivity": 1.0}],
)
def test_an_altered_claim_is_refused(
    released: Release, tmp_path: Path, change: dict[str, object]
) -> None:
    metadata = released.metadata.model_copy(update=change)
    path = Release(released.sums, released.counts, metadata).save(tmp_path / "r.safetensors")
    with pytest.raises(PrivacyError, match=r"the claim .* does not follow"):
        Release.load(path)


def test_test_noise_is_stamped(encoder: dpmmd.encoders.Encoder) -> None:
    released = exact(images(10), encoder, delta=1e-9)
    assert not released.metadata.private
    assert "NOT PRIVATE" in repr(released)
    assert "NOT PRIVATE" in released.report()
    real = dpmmd.release(
        images(10), encoder, epsilon=1, delta=1e-9, adjacency="zero-out", progress=False
    )
    assert real.metadata.private
    assert "NOT PRIVATE" not in real.report()


def test_delta_above_one_over_n_warns(encoder: dpmmd.encoders.Encoder) -> None:
    with pytest.warns(UserWarning, match="delta=0.1 is above 1 / N"):
        exact(images(20), encoder, delta=0.1)


# ----------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adjacency": "neighbours"}, "adjacency='neighbours'.*replace-one"),
        ({"epsilon": 0.0}, "epsilon=0.0"),
        ({"epsilon": float("nan")}, "epsilon=nan"),
        ({"delta": 0.0}, "delta=0.0"),
        ({"delta": 1.5}, "delta=1.5"),
        ({"moments": (3,)}, r"moments=\(3,\)"),
        ({"bound": "box"}, "bound='box'"),
        ({"clip": -1.0}, "clip=-1.0"),
        ({"joint_weight": 1.0}, "joint_weight=1.0"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"num_classes": 2}, r"0\.\.1"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_refusals(options: dict[str, object], message: str, tmp_path: Path) -> None:
    out = tmp_path / "r.safetensors"
    with pytest.raises(ValueError, match=message):
        dpmmd.release(images(20), small_encoder(), **{**ARGUMENTS, **options}, out=out)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_adjacency_epsilon_and_delta_have_no_default() -> None:
    for missing in ("epsilon", "delta", "adjacency"):
        arguments = {k: v for k, v in ARGUMENTS.items() if k != missing}
        with pytest.raises(TypeError, match=missing):
            dpmmd.release(images(20), small_encoder(), **arguments)  # type: ignore[arg-type]


def test_an_existing_file_is_refused_before_any_image_is_read(tmp_path: Path) -> None:
    class Unreadable(Rows):
        def batches(self, batch_size: int) -> Iterator[Batch]:
            raise AssertionError("read")

    out = tmp_path / "r.safetensors"
    out.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="exists"):
        exact(Unreadable(*rows()), out=out)
    assert out.read_bytes() == b"mine"


def test_an_interrupted_release_leaves_nothing(tmp_path: Path) -> None:
    class Breaks(Rows):
        def batches(self, batch_size: int) -> Iterator[Batch]:
            yield from list(super().batches(batch_size))[:1]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        exact(Breaks(*rows()), out=tmp_path / "r.safetensors", batch_size=4)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- the file


def test_round_trip(released: Release, tmp_path: Path) -> None:
    path = released.save(tmp_path / "deep" / "r.safetensors")
    again = Release.load(path)
    assert torch.equal(again.sums, released.sums)
    assert torch.equal(again.counts, released.counts)
    assert torch.equal(again.target, released.target)
    assert again.metadata == released.metadata
    with pytest.raises(FileExistsError, match="not overwritten"):
        released.save(path)
    released.save(path, overwrite=True)
    assert [p.name for p in path.parent.iterdir()] == ["r.safetensors"]


@pytest.mark.parametrize("keep", [0, 7, 100, -1, -1000])
def test_truncated_files_are_refused(released: Release, tmp_path: Path, keep: int) -> None:
    path = released.save(tmp_path / "r.safetensors")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(PrivacyError, match="not a readable release"):
        Release.load(path)


def test_altered_files_are_refused(released: Release, tmp_path: Path) -> None:
    path = released.save(tmp_path / "r.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PrivacyError, match="do not match the hash"):
        Release.load(path)


def test_altered_metadata_are_refused(released: Release, tmp_path: Path) -> None:
    path = released.save(tmp_path / "r.safetensors")
    data = path.read_bytes()
    assert data.count(b"two-taps") == 1
    path.write_bytes(data.replace(b"two-taps", b"two-tips"))
    with pytest.raises(PrivacyError, match="metadata do not match their hash"):
        Release.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "x.safetensors"
    save_file({"w": torch.zeros(2)}, path)
    with pytest.raises(PrivacyError, match="not a dpmmd release"):
        Release.load(path)
    save_file({"sums": torch.zeros(2), "counts": torch.zeros(1)}, path, {"dpmmd": '{"format": 9}'})
    with pytest.raises(PrivacyError, match="format 9"):
        Release.load(path)
    text = '{"format": 2}'
    kept = {"dpmmd": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file({"sums": torch.zeros(2), "counts": torch.zeros(1)}, path, kept)
    with pytest.raises(PrivacyError, match="not a readable release"):
        Release.load(path)
    with pytest.raises(FileNotFoundError, match="no such release"):
        Release.load(tmp_path / "absent")


def test_the_file_holds_released_numbers_and_public_facts_only(released: Release) -> None:
    fields = set(json.loads(released.metadata.model_dump_json()))
    assert fields == {
        "format", "version", "private", "adjacency", "unit", "epsilon", "delta", "mu", "sd",
        "sensitivity", "noise_sd", "grid_bits", "moments", "bound", "clip", "joint_weight",
        "blocks", "num_classes", "labelled", "class_names", "num_units", "image_shape", "source",
        "encoder", "pixel_encoder", "selection_encoder", "decoding", "shared_taps", "modes",
        "array_sha256",
    }  # fmt: skip


def test_report(released: Release) -> None:
    from dpmmd.privacy.report import facts

    f = facts(released)
    assert f["mu"] == pytest.approx(1 / f["sd_over_sensitivity"])
    assert f["epsilon_at"]["0.001"] == pytest.approx(5.0, rel=1e-6)
    assert f["attacker_true_positive_rate_at"]["0.01"] < 1
    json.dumps(f)
    text = released.report()
    for phrase in ("(5, 0.001)", "replace-one", "Not covered", "N = 200", "private"):
        assert phrase in text


def test_the_reported_noise_norm_is_what_happens(encoder: dpmmd.encoders.Encoder) -> None:
    from dpmmd.privacy.report import facts

    clean = exact(images(300), encoder, num_classes=3, delta=1e-9)
    noisy = dpmmd.release(
        images(300),
        encoder,
        epsilon=1.0,
        delta=1e-9,
        adjacency="replace-one",
        num_classes=3,
        progress=False,
    )
    expected = np.array(facts(noisy)["blocks"][0]["expected_noise_norm_per_class"])
    noise = (noisy.sums - clean.sums)[0].norm(dim=1).numpy() / noisy.counts.numpy()
    np.testing.assert_allclose(noise, expected, rtol=0.35)


@pytest.mark.parametrize("clip", [1e300, 1e-300])
def test_a_clip_that_float32_does_not_hold_is_refused_before_the_spend(
    clip: float, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"clip=.*float32"):
        dpmmd.release(
            images(8), small_encoder(), **ARGUMENTS, clip=clip, ledger=tmp_path / "ledger"
        )
    assert not (tmp_path / "ledger").exists()
