"""Units that reach several rows: groups of images, and taps that all classes share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Subset, TensorDataset

import dpmmd
from dpmmd import reference
from dpmmd.data import open_source
from dpmmd.nn import MMDLoss
from dpmmd.privacy import Release, sensitivity
from tests.conftest import images, no_noise, nonnegative_encoder, small_encoder

ADJACENCIES = ("replace-one", "zero-out", "add-remove")
TAU = 0.1


def exact(source: Any, encoder: Any = None, **options: Any) -> Release:
    arguments = {"epsilon": 1.0, "delta": 1e-9, "adjacency": "replace-one", "num_classes": 3}
    arguments.update({"progress": False, "insecure_test_noise": no_noise, **options})
    return dpmmd.release(source, encoder or small_encoder(), **arguments)


def vector(released: Release) -> torch.Tensor:
    """All that is released, in units of one image's bound; counts as far as they are above 1."""
    parts = [released.sums.double().flatten(), TAU * released.counts]
    if released.shared is not None:
        parts.append(released.shared.double().flatten())
    return torch.cat(parts)


def grouped(n: int = 30, people: int = 8, seed: int = 0) -> tuple[Any, Any, Any]:
    x, y = images(n, seed)
    rng = np.random.default_rng(seed)
    groups = np.concatenate([np.arange(people), rng.integers(0, people, n - people)])
    return x, y, np.array([f"patient {g}" for g in groups])


# ----------------------------------------------------------------------------- groups


def test_a_group_shares_one_contribution_among_its_images() -> None:
    x, y, groups = grouped()
    encoder = small_encoder()
    released = exact((x, y, groups), encoder, group_by="patient", moments=(1, 2))
    taps = reference.flatten(encoder(torch.from_numpy(x).float() / 255))
    share = torch.tensor([1 / (groups == g).sum() for g in groups], dtype=torch.float64)
    labels = torch.from_numpy(y)
    counts = torch.zeros(3, dtype=torch.float64).index_add_(0, labels, share)
    for row, moment in enumerate((1, 2)):
        phi = reference.bounded([t.double() ** moment for t in taps], "sphere", 1.0)
        sums = torch.zeros(3, phi.shape[1], dtype=torch.float64)
        sums.index_add_(0, labels, phi * share[:, None])
        torch.testing.assert_close(released.sums[row].double(), sums, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(released.counts, counts, rtol=1e-6, atol=1e-6)
    assert released.metadata.unit == "group by patient"
    assert released.metadata.num_units == 8
    assert all(b.spread for b in released.metadata.blocks)


@pytest.mark.parametrize("adjacency", ADJACENCIES)
@pytest.mark.parametrize("make", [small_encoder, nonnegative_encoder])
def test_neighbours_in_a_group_differ_by_at_most_the_sensitivity(make: Any, adjacency: str) -> None:
    """A person of one image becomes one of fifteen, is blanked, or leaves."""
    encoder = make()
    x, y, groups = grouped(40, people=8)
    base = exact((x, y, groups), encoder, group_by="g", adjacency=adjacency)
    declared = base.metadata.sensitivity / 2**30
    other_x, other_y = images(15, seed=5)
    worst = 0.0
    for person in np.unique(groups):
        rest = groups != person
        changed = (x[rest], y[rest], groups[rest])
        if adjacency == "replace-one":
            changed = (
                np.concatenate([changed[0], 255 - other_x]),
                np.concatenate([changed[1], other_y]),
                np.concatenate([changed[2], np.repeat([person], 15)]),
            )
        elif adjacency == "zero-out":
            blank = np.where(rest[:, None, None, None], x / np.float32(255), np.float32("nan"))
            changed = (blank.astype(np.float32), y, groups)
        other = exact(changed, encoder, group_by="g", adjacency=adjacency)
        assert other.metadata.model_dump(exclude={"array_sha256"}) == base.metadata.model_dump(
            exclude={"array_sha256"}
        )
        worst = max(worst, float((vector(base) - vector(other)).norm()))
    assert 0.2 * declared < worst <= declared * (1 + 1e-6)


def test_a_large_group_weighs_no_more_than_a_small_one() -> None:
    """A thousand copies of one image in one group are as one image."""
    x, y = images(4)
    options = {"group_by": "g", "pixel_moments": 5}
    once = exact((x, y, [0, 1, 2, 3]), **options)
    many = exact(
        (np.concatenate([x, *[x[:1]] * 999]), np.r_[y, [y[0]] * 999], [0, 1, 2, 3, *[0] * 999]),
        **options,
    )
    torch.testing.assert_close(many.sums, once.sums, rtol=0, atol=3e-6)
    torch.testing.assert_close(many.pixels, once.pixels, rtol=0, atol=3e-6)
    assert many.products.trace() < once.products.trace()  # type: ignore[union-attr]
    torch.testing.assert_close(many.products, once.products, rtol=0, atol=0.01)
    torch.testing.assert_close(many.counts, once.counts, rtol=0, atol=1e-4)


def test_the_number_of_images_of_a_group_is_private(capfd: pytest.CaptureFixture[str]) -> None:
    """Under replace-one too: a group is exchanged for one of another size."""
    options: dict[str, Any] = {"group_by": "g", "num_classes": None, "progress": True}
    a = exact((*images(30), np.arange(30) % 5), **options)
    b = exact((*images(31), np.arange(31) % 5), **options)
    hidden = {"array_sha256"}
    assert a.metadata.model_dump(exclude=hidden) == b.metadata.model_dump(exclude=hidden)
    assert a.counts.tolist() == b.counts.tolist() == [5.0]
    assert a.metadata.num_units == 5
    assert capfd.readouterr() == ("", "")


def test_delta_is_compared_with_the_number_of_groups() -> None:
    with pytest.warns(UserWarning, match="above 1 / N"):
        exact((*images(30), np.arange(30) % 5), group_by="g", delta=0.21)


def test_the_report_names_the_unit() -> None:
    text = exact(grouped(), group_by="patient").report()
    assert "one group by patient, all its images" in text
    assert "N = 8" in text
    assert "the unit is one group" in text


def folder_of(root: Path, names: list[str]) -> Path:
    for i, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images(len(names))[0][i, 0]).save(path)
    return root


def test_every_kind_of_source_has_groups(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    x, y, groups = grouped(9, people=4)
    wanted = np.unique(groups, return_inverse=True)[1].tolist()

    np.savez(tmp_path / "a.npz", x=x, y=y, patient=groups)
    cells = []
    for i in range(9):
        Image.fromarray(x[i, 0]).save(tmp_path / "i.png")
        cells.append((tmp_path / "i.png").read_bytes())
    pq.write_table(
        pa.table({"image": cells, "label": y, "patient": groups.tolist()}), tmp_path / "a.parquet"
    )
    names = [f"{label}/{g}/{i}.png" for i, (label, g) in enumerate(zip(y, groups, strict=True))]
    folder = folder_of(tmp_path / "scans", names)

    data = TensorDataset(torch.from_numpy(x), torch.from_numpy(y))
    data.patient = groups  # type: ignore[attr-defined]
    for source in (tmp_path / "a.npz", tmp_path / "a.parquet", (x, y, groups), data):
        opened = open_source(source, num_classes=3, group_by="patient")
        assert opened.groups is not None
        assert opened.groups.tolist() == wanted
    opened = open_source(Subset(data, [8, 0]), num_classes=3, group_by="patient")
    assert opened.groups is not None
    assert opened.groups.tolist() == np.unique(groups[[8, 0]], return_inverse=True)[1].tolist()

    opened = open_source(folder, num_classes=3, group_by="folder")
    order = sorted(range(9), key=lambda i: names[i])
    assert opened.groups is not None
    assert opened.groups.tolist() == [wanted[i] for i in order]


def test_groups_that_are_refused(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    x, y, groups = grouped(9, people=4)
    np.savez(tmp_path / "a.npz", x=x, y=y, patient=groups)
    with pytest.raises(ValueError, match=r"group_by='who'.*expected one of x, y, patient"):
        open_source(tmp_path / "a.npz", group_by="who")
    pq.write_table(pa.table({"image": [b"1", b"2"], "p": ["a", None]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"group_by='who': no such column"):
        open_source(tmp_path / "a.parquet", group_by="who", image_size=8, channels=1)
    with pytest.raises(ValueError, match=r"group_by='p': some images .* have no group"):
        open_source(tmp_path / "a.parquet", group_by="p", image_size=8, channels=1)
    with pytest.raises(ValueError, match="groups of shape"):
        open_source((x, y, groups[:5]), group_by="g")
    with pytest.raises(ValueError, match="some images"):
        open_source((x, y, np.array([np.nan] * 9)), group_by="g")
    with pytest.raises(ValueError, match="does not say which images belong"):
        open_source((x, y), group_by="g")
    with pytest.raises(ValueError, match="no attribute"):
        open_source(TensorDataset(torch.from_numpy(x), torch.from_numpy(y)), group_by="g")
    folder = folder_of(tmp_path / "f", ["a/p/1.png", "b/2.png"])
    with pytest.raises(ValueError, match="outside of a group's folder"):
        open_source(folder, num_classes=2, group_by="folder")
    with pytest.raises(ValueError, match="expected 'folder'"):
        open_source(folder, num_classes=2, group_by="patient")
    with pytest.raises(ValueError, match="does not say"):
        open_source("digits", group_by="patient")


def test_a_source_of_ones_own_must_have_a_group_for_every_image() -> None:
    """Images without one would contribute as if they were alone."""
    from dpmmd.data import ArraySource

    source = ArraySource(*images(9), groups=np.arange(9) % 3, group_by="g")
    assert source.groups is not None
    for wrong in (source.groups[:5], source.groups.int(), source.groups[:, None]):
        source.groups = wrong
        with pytest.raises(ValueError, match="expected int64, one for each of its images"):
            exact(source)


# ----------------------------------------------------------------------------- shared taps


MOMENTS = [{"moments": (1,)}, {"moments": (1, 2)}, {"moments": (1, 2), "joint_weight": 0.5}]


@pytest.mark.parametrize("options", MOMENTS, ids=str)
def test_shared_taps_are_one_row(options: dict[str, Any]) -> None:
    encoder = small_encoder()
    plain = exact(images(50), encoder, **options)
    hybrid = exact(images(50), encoder, shared_taps=1, **options)
    size = encoder.taps[0].size
    assert hybrid.shared is not None
    assert hybrid.shared_target is not None
    torch.testing.assert_close(hybrid.sums, plain.sums[:, :, size:], rtol=1e-6, atol=1e-6)
    whole = plain.sums[:, :, :size].sum(dim=1, keepdim=True)
    torch.testing.assert_close(hybrid.shared, whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hybrid.shared_target, whole / 50, rtol=1e-5, atol=1e-6)


def test_the_reported_noise_norms_are_what_happens() -> None:
    from dpmmd.privacy.report import facts

    options = {"epsilon": 1.0, "delta": 1e-9, "adjacency": "replace-one", "num_classes": 3}
    clean = exact(images(50), shared_taps=1, moments=(1, 2))
    counts = clean.counts[:, None]
    own, shared = [], []
    for _ in range(30):
        noisy = dpmmd.release(images(50), small_encoder(), shared_taps=1, moments=(1, 2), **options)  # type: ignore[arg-type]
        own.append(((noisy.sums - clean.sums) / counts).square().sum(dim=2))
        shared.append((noisy.shared_target - clean.shared_target).square().sum(dim=(1, 2)))  # type: ignore[operator]
    for row, block in enumerate(facts(clean)["blocks"][:2]):
        found = torch.stack(own)[:, row].mean(dim=0).sqrt()
        wanted = torch.tensor(block["expected_noise_norm_per_class"])
        torch.testing.assert_close(found, wanted.double(), rtol=0.1, atol=0, check_dtype=False)
        whole = float(torch.stack(shared)[:, row].mean().sqrt())
        assert whole == pytest.approx(block["expected_noise_norm_shared"], rel=0.1)


def test_the_file_keeps_shared_taps(tmp_path: Path) -> None:
    released = exact(images(50), shared_taps=1)
    again = Release.load(released.save(tmp_path / "r.safetensors"))
    assert again.shared is not None
    assert torch.equal(again.shared, released.shared)  # type: ignore[arg-type]
    assert again.metadata == released.metadata


def test_shared_rows_get_noise_of_their_own() -> None:
    options = {"epsilon": 1.0, "delta": 1e-9, "adjacency": "add-remove", "num_classes": 3}
    clean = exact(images(50), shared_taps=1, adjacency="add-remove")
    noise = [
        dpmmd.release(images(50), small_encoder(), shared_taps=1, **options).shared - clean.shared  # type: ignore[operator, arg-type]
        for _ in range(20)
    ]
    values = torch.stack(noise).flatten() / clean.metadata.noise_sd
    assert abs(float(values.square().mean()) - 1) < 6 * (2 / values.numel()) ** 0.5


def test_shared_taps_and_counts_move_together() -> None:
    """Antipodal features that lie in the shared tap alone, under two labels: 4 c^2 + 2 tau^2."""

    class Taps(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            v = x[:, :1] - 0.5
            return {"a": v, "b": 0 * v}

    encoder = dpmmd.encoders.Encoder(
        Taps(), name="t", weights_sha256="0" * 64, image_size=8,
        tap_signs={"a": "signed", "b": "signed"},
    )  # fmt: skip
    white, black = (np.full((1, 1, 8, 8), v, np.float32) for v in (1.0, 0.0))
    x, y = images(20)
    rest = x.astype(np.float32) / 255
    a = exact((np.concatenate([rest, white]), np.r_[y, 0]), encoder, shared_taps=1)
    b = exact((np.concatenate([rest, black]), np.r_[y, 1]), encoder, shared_taps=1)
    declared = a.metadata.sensitivity / 2**30
    assert declared**2 == pytest.approx(4 + 2 * TAU**2)
    assert float((vector(a) - vector(b)).norm()) == pytest.approx(declared, rel=1e-5)
    plain = exact((rest, y), encoder).metadata.sensitivity / 2**30
    assert plain == pytest.approx(2)


@pytest.mark.parametrize("estimator", ["batch", "ema", "adam"])
def test_the_loss_matches_shared_taps_over_the_whole_batch(estimator: str) -> None:
    encoder = small_encoder()
    released = exact(images(50), encoder, shared_taps=1, moments=(1, 2))
    loss = MMDLoss(released, encoder, estimator=estimator, decay=0.0, lr=1e-2)
    x, y = images(12, seed=3)
    pixels = (torch.from_numpy(x).float() / 255).requires_grad_()
    labels = torch.from_numpy(y)
    loss(pixels, labels).backward()
    gradient = pixels.grad

    again = pixels.detach().clone().requires_grad_()
    taps = reference.flatten(encoder(again))
    size = encoder.taps[0].size
    d = []
    for row, moment in enumerate((1, 2)):
        phi = reference.bounded([t**moment for t in taps], "sphere", 1.0)
        d.append((released.shared_target[row, 0] - phi[:, :size].mean(dim=0)).flatten())  # type: ignore[index]
        for k in range(3):
            d.append(released.target[row, k] - phi[labels == k, size:].mean(dim=0))
    difference = torch.cat(d)
    if estimator == "adam":
        v = torch.zeros_like(difference).requires_grad_()
        optimizer = torch.optim.Adam([v], lr=1e-2)
        (v - difference.detach()).square().mean().backward()
        optimizer.step()
        (v.detach() * difference).sum().backward()
    elif estimator == "ema":
        (difference.detach() * difference).sum().backward()
    else:
        difference.square().sum().backward()
    assert gradient is not None
    assert again.grad is not None
    torch.testing.assert_close(gradient, again.grad, rtol=1e-4, atol=1e-7)


def test_shared_taps_that_are_refused() -> None:
    for wrong, message in ((2, "0 to 1 of 2"), (-1, "0 to 1"), (True, "0 to 1")):
        with pytest.raises(ValueError, match=message):
            exact(images(20), shared_taps=wrong)
    with pytest.raises(ValueError, match="needs num_classes"):
        exact(images(20), shared_taps=1, num_classes=None)
    encoder = small_encoder()
    with pytest.raises(ValueError, match="shared_taps"):
        MMDLoss(exact(images(20), encoder, shared_taps=1), encoder, estimator="unbiased")


# ----------------------------------------------------------------------------- reported


@pytest.mark.parametrize("adjacency", ADJACENCIES)
def test_epsilon_under_every_adjacency(adjacency: str) -> None:
    """From the sensitivity of the same blocks; no guarantee under add-remove where N is stated."""
    from dpmmd.privacy import Block, epsilon
    from dpmmd.privacy.report import facts

    released = dpmmd.release(
        images(20), small_encoder(), epsilon=1.0, delta=1e-6, adjacency=adjacency, num_classes=3,
        moments=(1, 2), progress=False,
    )  # fmt: skip
    m = released.metadata
    blocks = [Block(b.name, b.kind, b.bound, b.nonnegative, b.spread) for b in m.blocks]
    by = facts(released)["by_adjacency"]
    assert by[adjacency] == {"mu": m.mu, "epsilon": 1.0}
    for other in ADJACENCIES:
        if other == "add-remove" and adjacency != other:
            assert by[other] is None
        elif other != adjacency:
            mu = sensitivity(other, blocks) / (m.sd / 2**30)
            assert by[other]["mu"] == pytest.approx(mu, rel=1e-8)
            assert by[other]["mu"] >= mu
            assert by[other]["epsilon"] == pytest.approx(epsilon(mu=mu, delta=1e-6), rel=1e-8)
    assert ("under add-remove | no guarantee" in released.report()) == (adjacency != "add-remove")
