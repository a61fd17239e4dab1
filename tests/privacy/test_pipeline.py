"""The check of a data holder's own pipeline: healthy ones are consistent, each fault is found."""

from __future__ import annotations

import io
import json
import random
import tarfile
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from typer.testing import CliRunner

import dpmmd
from dpmmd import cli
from dpmmd.data import ArraySource, Batch, ImageSource, open_source
from dpmmd.encoders import Encoder
from dpmmd.privacy import SourceAudit, audit_source, mechanism, noising, probes, readings, spending
from dpmmd.privacy.layout import Asked, bound_of
from tests.conftest import TwoTaps, images, no_noise, small_encoder, small_modes

N = 22
X, Y = images(N)
LONG = pytest.mark.long
DECLARED: dict[str, Any] = {"image_size": 8, "channels": 1}


def audited(source: Any = (X, Y), encoder: Encoder | None = None, **options: Any) -> SourceAudit:
    defaults: dict[str, Any] = {
        "adjacency": "replace-one",
        "num_classes": 3,
        "batch_size": 8,
        "progress": False,
    }
    return audit_source(source, encoder or small_encoder(), **{**defaults, **options})


@pytest.fixture
def two_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exchanges two units, not four: each costs a process where a Dataset is read."""
    monkeypatch.setattr(probes.Probes, "_chosen", lambda self: [self.units[0], self.units[9]])


def violated(result: SourceAudit) -> dict[str, str]:
    """What was found, with the cause."""
    return {check.name: check.why for check in result.checks if check.outcome == "VIOLATED"}


def assert_healthy(result: SourceAudit) -> None:
    assert result.verdict == "consistent", violated(result)
    assert not violated(result)
    assert 0.3 < result.largest_distance <= 1
    compared = [check for check in result.checks if check.moved is not None]
    assert all(check.moved == 0 == check.rows_moved and check.compared for check in compared)
    assert len(compared) >= 5


class Items(Dataset):
    """Images in the order given; a subclass has a fault."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.change(index, torch.from_numpy(X[index])), int(Y[index])

    def change(self, index: int, image: Tensor) -> Tensor:
        return image


class Streams(Items):
    """Flips and shifts from the streams that every record gets keys for."""

    def change(self, index: int, image: Tensor) -> Tensor:
        image = image.flip(2) if torch.rand(()) < 0.5 else image
        return image.roll((random.randrange(8), int(np.random.randint(8))), (1, 2))  # noqa: NPY002


class Plain(ImageSource):
    """A source that can read batches, and nothing else; a subclass has a fault."""

    name, identity, labelled = "plain", "0" * 64, True
    num_images, image_shape = N, (1, 8, 8)

    def batches(self, batch_size: int) -> Iterator[Batch]:
        for start in range(0, N, batch_size):
            rows = min(batch_size, N - start)
            pixels = torch.zeros(batch_size, 1, 8, 8)
            labels = torch.zeros(batch_size, dtype=torch.int64)
            pixels[:rows] = torch.from_numpy(X[start : start + rows]).float() / 255
            labels[:rows] = torch.from_numpy(Y[start : start + rows])
            yield Batch(pixels, labels, torch.arange(batch_size) < rows)


# ----------------------------------------------------------------------------- healthy pipelines


def folder(path: Path) -> Path:
    for i, (image, label) in enumerate(zip(X, Y, strict=True)):
        target = path / str(label)
        target.mkdir(exist_ok=True)
        Image.fromarray(image[0]).save(target / f"{i:03d}.png")
    (path / "0" / "broken.png").write_bytes(b"no image")
    return path


def tar(path: Path) -> Path:
    with tarfile.open(path / "shard.tar", "w") as archive:
        for i, (image, label) in enumerate(zip(X, Y, strict=True)):
            held = io.BytesIO()
            Image.fromarray(image[0]).save(held, "png")
            for name, data in ((f"{i:03d}.png", held.getvalue()), (f"{i:03d}.cls", b"%d" % label)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return path / "shard.tar"


def npz(path: Path) -> Path:
    np.savez(path / "set.npz", x=X, y=Y)
    return path / "set.npz"


def parquet(path: Path) -> Path:
    arrow = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    cells = []
    for image in X:
        held = io.BytesIO()
        Image.fromarray(image[0]).save(held, "png")
        cells.append({"bytes": held.getvalue(), "path": None})
    pq.write_table(arrow.table({"image": cells, "label": Y}), path / "set.parquet")
    return path / "set.parquet"


@pytest.mark.parametrize("make", [folder, tar, npz, parquet])
def test_files_are_consistent(make: Any, tmp_path: Path) -> None:
    assert_healthy(audited(make(tmp_path), adjacency="add-remove", **DECLARED))


@pytest.mark.parametrize("adjacency", ["replace-one", "zero-out", "add-remove"])
def test_arrays_are_consistent_under_every_adjacency(adjacency: str) -> None:
    result = audited(adjacency=adjacency)
    assert_healthy(result)
    assert (result.adjacency, result.unit, result.records) == (adjacency, "image", N)
    left_out = [check for check in result.checks if check.name.endswith("left out")]
    assert bool(left_out) == (adjacency == "add-remove")
    assert all(0.99 < (check.distance or 0) <= 1 for check in left_out)  # a sphere: all of Delta


@pytest.mark.parametrize(
    "options",
    [
        {"moments": (1, 2), "shared_taps": 1},
        {"moments": (1, 2), "joint_weight": 0.5, "bound": "ball", "clip": 3.0},
        {"pixel_moments": 4, "weights": {"class_products": 0.5}},
        {"num_classes": None, "selection": small_encoder()},
    ],
    ids=["shared taps", "joint", "products", "selection"],
)
@pytest.mark.parametrize("adjacency", ["replace-one", "add-remove"])
def test_every_kind_of_block(options: dict[str, Any], adjacency: str) -> None:
    assert_healthy(audited(adjacency=adjacency, **options))


@pytest.mark.usefixtures("two_units")
def test_keyed_augmentation_is_consistent() -> None:
    encoder = small_encoder()
    before = torch.get_rng_state(), random.getstate()
    assert_healthy(audited(Streams(), encoder, adjacency="add-remove", **DECLARED))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_a_source_of_batches_alone_and_what_could_not_be_tried() -> None:
    result = audited(Plain(), adjacency="add-remove")
    assert result.verdict == "consistent", violated(result)
    not_made = {check.name for check in result.checks if check.outcome == "not made"}
    assert "in reversed order" in not_made
    assert "record 0 left out" in not_made
    assert all("neighbour=" in c.why for c in result.checks if c.outcome == "not made")


def groups(n: int = N) -> list[str]:
    return [f"p{i % 5}" if i < 15 else f"q{i}" for i in range(n)]


@pytest.mark.parametrize("adjacency", ["replace-one", "zero-out", "add-remove"])
def test_groups_are_exchanged_whole(adjacency: str) -> None:
    result = audited((X, Y, groups()), adjacency=adjacency, group_by="patient")
    assert_healthy(result)
    assert result.unit == "group by patient"
    first = next(check for check in result.checks if check.name.startswith("group of record 0"))
    assert first.compared == N - 3 - 1  # without the three of p0 and the one kept to exchange for


@pytest.mark.parametrize("n", [1, 2, 3])
def test_few_records(n: int) -> None:
    for adjacency in ("replace-one", "add-remove"):
        assert audited((X[:n], Y[:n]), adjacency=adjacency).verdict == "consistent"


def test_a_record_that_cannot_be_used_is_exchanged_as_well() -> None:
    x = X.astype(np.float32) / 255
    x[5] = np.nan
    result = audited((x, Y))
    assert result.verdict == "consistent"
    assert result.usable == N - 2  # and one is kept to exchange for
    assert any("unusable" in check.name for check in result.checks)


# ----------------------------------------------------------------------------- as a release does it


@pytest.mark.parametrize("group_by", [None, "patient"])
def test_the_sums_are_those_of_a_release(group_by: str | None) -> None:
    options: dict[str, Any] = {"num_classes": 3, "adjacency": "replace-one", "batch_size": 8}
    source = (X, Y) if group_by is None else (X, Y, groups())
    encoder = small_encoder()
    released = dpmmd.release(
        source,
        encoder,
        epsilon=5e3,
        delta=1e-6,
        insecure_test_noise=no_noise,
        progress=False,
        group_by=group_by,
        **options,
    )
    opened = open_source(source, num_classes=3, group_by=group_by)
    asked = Asked(
        encoder=encoder,
        **options,
        bound=bound_of(encoder, 1, "sphere", 1.0, None),
        pixel_moments=None,
        selection=None,
        weights=None,
        shared_taps=0,
        modes=None,
    )
    plan = readings.Plan.of(asked, opened)
    seen = readings.read(opened, plan, plan.encoders())
    sums, _, counts, _ = seen.sums
    blocks = plan.layout.blocks
    unit = 1 / blocks.parts[0].block.bound
    assert torch.equal((sums.double() * unit).float(), released.sums[0])
    assert blocks.counts is not None
    counted = counts[:, 0].double() / blocks.counts.bound
    assert torch.allclose(counted.clamp(min=1), released.counts, rtol=1e-12)
    assert plan.delta("replace-one") == released.metadata.sensitivity


def test_nothing_raw_is_returned_and_it_says_whose_eyes_it_is_for() -> None:
    result = audited()
    told = json.loads(json.dumps(result.facts()))
    assert next(iter(told)) == "notice"
    assert "eyes alone" in told["notice"]
    for check in told["checks"]:
        assert {type(value) for value in check.values()} <= {str, int, float, type(None)}


def test_no_ledger_noise_or_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> Any:
        raise AssertionError

    monkeypatch.chdir(tmp_path)
    for module, name in (
        (mechanism, "rounded_gaussian"),
        (mechanism, "Ledger"),
        (noising, "with_noise"),
        (spending, "PartialSums"),
    ):
        monkeypatch.setattr(module, name, never)
    audited()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("adjacency", ["replace-one", "add-remove"])
def test_releases_with_modes_are_consistent(adjacency: str) -> None:
    modes = small_modes(side=5)
    result = audited(adjacency=adjacency, modes=modes, pixel_moments=4)
    assert_healthy(result)
    assert result.encoder == "two-taps"


def test_moments_of_pixels_alone_are_consistent() -> None:
    result = audit_source(
        (X, Y), None, adjacency="replace-one", num_classes=3, pixel_moments=4, batch_size=8,
        progress=False,
    )  # fmt: skip
    assert_healthy(result)
    assert result.encoder == "none"


@pytest.mark.usefixtures("two_units")
def test_modes_that_depend_on_the_batch_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """As they would if thresholds were the medians of what is read."""

    def by_rank(modes: Any, pixels: Tensor, labels: Tensor) -> Tensor:
        grey = pixels.flatten(1).mean(1)
        return labels * modes.per_class + (grey > grey.median()).long()

    monkeypatch.setattr("dpmmd.privacy.collecting.rows_of", by_rank)
    result = audited(modes=small_modes())
    assert result.verdict == "VIOLATED"
    assert any(check.moved for check in result.checks)


# ----------------------------------------------------------------------------- faults of data sets

_hidden = random.Random(0)


class HiddenFlips(Items):
    """Flips from a generator that no attribute leads to."""

    def change(self, index: int, image: Tensor) -> Tensor:
        return image.flip(2) if _hidden.random() < 0.5 else image


class Counts(Items):
    calls = 0

    def change(self, index: int, image: Tensor) -> Tensor:
        self.calls += 1
        return image.roll(self.calls, 2)


class WrongCache(Items):
    """Keeps images under a number that several of them have."""

    def __init__(self) -> None:
        self.kept: dict[int, Tensor] = {}

    def change(self, index: int, image: Tensor) -> Tensor:
        return self.kept.setdefault(index % 8, image)


class Neighbours(Items):
    """Subtracts the record that was read before."""

    last: Tensor | None = None

    def change(self, index: int, image: Tensor) -> Tensor:
        before, self.last = self.last, image
        return image if before is None else image // 2 + before // 2


@pytest.mark.usefixtures("two_units")
@pytest.mark.parametrize("adjacency", ["replace-one", pytest.param("add-remove", marks=LONG)])
@pytest.mark.parametrize("make", [HiddenFlips, Counts, WrongCache, Neighbours])
def test_a_data_set_whose_items_depend_on_each_other(make: type, adjacency: str) -> None:
    result = audited(make(), adjacency=adjacency, **DECLARED)
    assert result.verdict == "VIOLATED"
    found = violated(result)
    assert any("cache" in why for why in found.values())
    if make in (Neighbours, WrongCache) or adjacency == "add-remove":
        assert any("record" in name for name in found)  # a neighbour shows it
    moved = [c for c in result.checks if c.outcome == "VIOLATED" and c.rows_moved]
    assert moved


@pytest.mark.usefixtures("two_units")
def test_a_counter_moves_the_sums_by_many_times_delta() -> None:
    result = audited(Counts(), adjacency="add-remove", **DECLARED)
    left_out = [check for check in result.checks if check.name.endswith("left out")]
    worst = max(left_out, key=lambda check: check.distance or 0)
    assert worst.distance is not None
    assert worst.limit is not None
    assert worst.distance > 2 * worst.limit
    assert worst.moved == worst.compared == N - 2
    assert result.largest_distance > 2


class Brightened(Plain):
    """Divides each batch by its greatest value."""

    def batches(self, batch_size: int) -> Iterator[Batch]:
        scale = torch.linspace(0.5, 1, N)  # not every batch has a white pixel
        start = 0
        for batch in super().batches(batch_size):
            rows = scale[start : start + batch_size]
            batch.images[: len(rows)] *= rows[:, None, None, None]
            start += batch_size
            yield Batch(batch.images / batch.images.amax(), batch.labels, batch.valid)


class Drops(Plain):
    """Says that there are more records than come."""

    num_images = N + 9


class WrongPart(Plain):
    """Goes to a batch directly, and misses: so does each process of a release but the first."""

    def part(self, batch_size: int, numbers: range) -> Iterator[Batch]:
        early = int(numbers.start > 0)
        return super().part(batch_size, range(numbers.start - early, numbers.stop - early))


class NotCleared(Plain):
    """Fills one array; where a record cannot be read, the one of an earlier batch stays."""

    def batches(self, batch_size: int) -> Iterator[Batch]:
        held = torch.zeros(batch_size, 1, 8, 8)
        for number, batch in enumerate(super().batches(batch_size)):
            for row in range(batch_size):
                if number * batch_size + row != 11:
                    held[row] = batch.images[row]
            yield Batch(held, batch.labels, batch.valid)


@pytest.mark.parametrize("make", [Brightened, Drops, WrongPart, NotCleared])
def test_a_source_whose_rows_depend_on_their_batch(make: type[Plain]) -> None:
    result = audited(make(), num_classes=None)
    found = violated(result)
    assert result.verdict == "VIOLATED"
    assert any("batch" in why for why in found.values())
    if make is WrongPart:
        assert set(found) == {"part against batches"}
    if make is Drops:
        assert all("drops records" in why for why in found.values())
        assert "read again" in found  # also where both readings lack the same records


class Refilled(Plain):
    """Yields the same array every time, filled again when the next batch is asked for."""

    def batches(self, batch_size: int) -> Iterator[Batch]:
        held = torch.zeros(batch_size, 1, 8, 8)
        for batch in super().batches(batch_size):
            held.copy_(batch.images)
            yield Batch(held, batch.labels, batch.valid)


class FilledAhead(Plain):
    """A thread fills the array for the next batch while this one is in use."""

    def batches(self, batch_size: int) -> Iterator[Batch]:
        held = torch.zeros(batch_size, 1, 8, 8)
        batches = list(super().batches(batch_size))
        for batch, after in zip(batches, [*batches[1:], batches[0]], strict=True):
            held.copy_(batch.images)
            ahead = threading.Thread(
                target=lambda after=after: (time.sleep(0.005), held.copy_(after.images))
            )
            ahead.start()
            yield Batch(held, batch.labels, batch.valid)
            ahead.join()


def test_an_array_that_is_refilled_between_batches_is_noted_and_allowed() -> None:
    result = audited(Refilled())
    assert result.verdict == "consistent", violated(result)
    assert any(c.outcome == "note" and "refills" in c.why for c in result.checks)


def test_an_array_that_is_refilled_while_it_is_in_use() -> None:
    result = audited(FilledAhead())
    assert "a batch stays as it is while it is in use" in violated(result)


class Fixed(ArraySource):
    """Its groups stay where they are when its records move."""

    def rearranged(self, order: Sequence[int]) -> Any:
        other: Any = super().rearranged(order)
        assert self.groups is not None
        other.groups = self.groups[: len(other._images)]
        return other


def test_groups_that_do_not_follow_their_records() -> None:
    source = Fixed(X, Y, groups=groups(), group_by="patient")
    result = audited(source, adjacency="add-remove")
    assert any("groups" in why for why in violated(result).values())
    assert any(c.moved and not c.rows_moved for c in result.checks)


# ----------------------------------------------------------------------------- faults of encoders


class Faulty(TwoTaps):
    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault, self.calls = fault, 0
        self.settled: Tensor | None = None

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        taps = super().forward(x)
        n = len(x)
        if self.fault == "counts":
            self.calls += 1
            taps["a"] = taps["a"] * (1 + max(0, self.calls - 4)) + max(0, self.calls - 4)
        elif self.fault == "mixes" and n > 2:  # the probe has two images
            taps["a"] = taps["a"] - taps["a"].mean(dim=0)
        elif self.fault == "last bits" and n > 2:
            taps["a"] = taps["a"] * (1 + 1e-6 * torch.arange(n).view(-1, 1, 1, 1))
        elif self.fault == "settles" and n > 2:
            if self.settled is None:  # by the first batch, for all that come
                self.settled = taps["a"].mean(dim=0)
            taps["a"] = taps["a"] - self.settled
        elif self.fault == "draws" and n > 2:
            taps["a"] = nn.functional.dropout(taps["a"], 0.5, training=True)
        return taps


def faulty(fault: str) -> Encoder:
    return Encoder(
        Faulty(fault),
        name=fault,
        weights_sha256="0" * 64,
        image_size=8,
        tap_signs={"a": "signed", "b": "nonnegative"},
    )


@pytest.mark.parametrize("fault", ["counts", "mixes", "settles", "draws"])
@pytest.mark.parametrize("source", [(X, Y), Plain()], ids=["arrays", "batches"])
def test_an_encoder_that_slipped_through(fault: str, source: Any) -> None:
    result = audited(source, faulty(fault))
    assert result.verdict == "VIOLATED"
    assert all(c.rows_moved == 0 for c in result.checks if c.moved is not None)
    assert any("encoder" in why for why in violated(result).values())


def test_an_encoder_whose_last_bits_depend_on_the_place() -> None:
    result = audited((X, Y), faulty("last bits"), adjacency="add-remove")
    name = "record 0 left out"
    assert name in violated(result)
    found = next(check for check in result.checks if check.name == name)
    assert found.distance is not None
    assert found.distance <= 1  # too little to see in the sums
    assert found.moved == N - 2
    assert audited((X, Y), faulty("last bits")).verdict == "consistent"  # no place changes there


# ----------------------------------------------------------------------------- the claim itself


def test_a_unit_that_moves_the_sums_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readings, "sensitivity", lambda *_: 1e9 / 2)
    result = audited(adjacency="zero-out")
    assert result.verdict == "VIOLATED"
    assert result.largest_distance > 1.5
    assert all(c.moved == 0 for c in result.checks if c.moved is not None)


# ----------------------------------------------------------------------------- a neighbour by hand


def exchanged(position: int = 3) -> np.ndarray:
    x = X.copy()
    x[position] = 255 - x[position]
    return x


@pytest.mark.parametrize("adjacency", ["replace-one", "add-remove"])
def test_a_neighbour_that_the_data_holder_built(adjacency: str) -> None:
    keep = np.arange(N) != 3
    other = (exchanged(), Y) if adjacency == "replace-one" else (X[keep], Y[keep])
    result = audited(neighbour=other, position=3, adjacency=adjacency)
    assert_healthy(result)
    check = next(c for c in result.checks if c.name.startswith("neighbour"))
    assert check.compared == N - 1
    assert check.distance


def test_a_neighbour_in_which_one_file_stands_twice() -> None:
    x, other = X.copy(), exchanged()
    x[9], other[9] = x[3], other[3]
    result = audited((x, Y), neighbour=(other, Y), position=3)
    assert "several names" in violated(result)["neighbour: record 3 exchanged"]
    assert any(c.name == "records apart" for c in audited((x, np.zeros(N, np.int64))).checks)


def test_a_neighbour_of_another_length() -> None:
    with pytest.raises(ValueError, match=f"neighbour: it has {N} records, expected {N - 1}"):
        audited(neighbour=(X, Y), position=3, adjacency="add-remove")
    with pytest.raises(ValueError, match="position=99"):
        audited(neighbour=(X, Y), position=99)
    with pytest.raises(ValueError, match="neighbour and position"):
        audited(position=3)


# ----------------------------------------------------------------------------- what is refused


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="records=1"):
        audited(records=1)
    with pytest.raises(ValueError, match="adjacency"):
        audited(adjacency="near")
    with pytest.raises(TypeError, match=r"encoders\.load"):
        audit_source((X, Y), "squeezenet1.1", adjacency="zero-out")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=f"none of the {N} records"):
        audited((X.astype(np.float32), Y))


def test_only_so_many_records_are_read() -> None:
    asked: list[int] = []

    class Watched(Items):
        def change(self, index: int, image: Tensor) -> Tensor:
            asked.append(index)
            return image

    result = audited(Watched(), records=9, batch_size=4, **DECLARED)
    assert result.records == 9
    assert max(asked) < 14  # nothing after the batch of the ninth (seven are read at once, too)


# ----------------------------------------------------------------------------- command line


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpmmd.encoders, "load", lambda name, **_: small_encoder())
    source = ["audit", "--source", str(npz(tmp_path)), "--num-classes", "3", "--batch-size", "8"]
    done = CliRunner().invoke(cli.app, source)
    assert done.exit_code == 0, done.output
    assert "record 0 exchanged" in done.stdout
    assert done.stderr.startswith("For the data holder's eyes alone")
    assert "does not prove" in done.stderr
    done = CliRunner().invoke(cli.app, [*source, "--json", "--quiet"])
    assert json.loads(done.stdout)["verdict"] == "consistent"

    monkeypatch.setattr(dpmmd.encoders, "load", lambda name, **_: faulty("mixes"))
    done = CliRunner().invoke(cli.app, [*source, "--adjacency", "zero-out"])
    assert done.exit_code == 2
    assert "VIOLATED" in done.stderr
    assert "batch statistics" in done.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--source", "x.npz", "--canaries", "100", "--sign", "signed"], "--canaries, --sign"),
        (["--source", "x.npz", "--epsilon", "1"], "--epsilon"),
        (["--encoder", "vgg11", "--num-classes", "3"], "--encoder, --num-classes"),
        (["--records", "9"], "--records"),
    ],
)
def test_options_that_make_no_sense_together(options: list[str], named: str) -> None:
    done = CliRunner().invoke(cli.app, ["audit", *options])
    assert isinstance(done.exception, ValueError)
    assert str(done.exception).startswith(f"{named}: makes sense with")
