"""One file, one record: whatever names an image has, and whatever a container says of its bytes."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
import os
import shutil
import sys
import tarfile
import tempfile
import types
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import ConcatDataset, Dataset, Subset

from dpmmd.data import ImageSource, open_source
from dpmmd.data.folder import FolderSource
from dpmmd.data.leftovers import family_of, leftover
from dpmmd.data.members import BLOCK, DamagedTar, Walk
from dpmmd.data.once import inside as file_inside
from dpmmd.data.pixels import Unusable

OPTIONS: dict[str, Any] = {"image_size": 4, "channels": 1}
SECOND_NAME = "a second name of a file that is counted already"
SECOND_WAY = "a second way into a folder that was entered already"


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((4, 4), value, np.uint8)).save(file, "PNG")
    return file.getvalue()


def put(path: Path, value: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(png(value))
    return path


def folder(root: Path, classes: int = 2, each: int = 3) -> Path:
    for k, i in itertools.product(range(classes), range(each)):
        put(root / "abcdefghijklmnop"[k] / f"{i}.png", 10 * k + i + 1)
    return root


def opened(source: Any, **options: Any) -> ImageSource:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_source(source, **OPTIONS, **options)


def summed(source: ImageSource) -> Counter[tuple[int, int]]:
    """What a release sums: (the image, its label) of each valid record."""
    found: Counter[tuple[int, int]] = Counter()
    for batch in source.batches(4):
        for image, label in zip(
            batch.images[batch.valid], batch.labels[batch.valid].tolist(), strict=True
        ):
            found[round(float(image.max()) * 255), label] += 1
    return found


# ------------------------------------------------------------------- one file, several names
def test_a_folder_that_leads_to_itself_is_entered_once(tmp_path: Path) -> None:
    root = folder(tmp_path / "x")
    before = summed(opened(root, num_classes=2))
    (root / "a" / "latest").symlink_to(".")
    (root / "b" / "up").symlink_to("..")
    (root / "z").symlink_to(".")
    source = opened(root, num_classes=2)
    assert (source.num_images, source.class_names) == (6, ("a", "b"))
    assert summed(source) == before
    assert source.passed_over == {SECOND_WAY: 3}


@pytest.mark.parametrize("way", ["hard", "symbolic", "case"])
def test_a_second_name_of_a_file_counts_once(tmp_path: Path, way: str) -> None:
    root = folder(tmp_path / "x")
    before = summed(opened(root, num_classes=2))
    for name in ("again.png", "deep/again.jpg"):
        target = root / "a" / name
        target.parent.mkdir(exist_ok=True)
        if way == "symbolic":
            target.symlink_to(root / "a" / "1.png")
        else:
            os.link(root / "a" / "1.png", target.with_name("1.PNG") if way == "case" else target)
    source = opened(root, num_classes=2)
    assert source.num_images == 6
    assert summed(source) == before
    assert source.passed_over == {SECOND_NAME: 2}
    with pytest.warns(UserWarning, match=r"'x' holds .*2 x a second name.*eyes alone"):
        open_source(root, num_classes=2, **OPTIONS)


def test_images_without_classes_count_once_too(tmp_path: Path) -> None:
    for i in range(3):
        put(tmp_path / "x" / f"{i}.png", i)
    os.link(tmp_path / "x" / "1.png", tmp_path / "x" / "newest.png")
    assert opened(tmp_path / "x").num_images == 3


@pytest.mark.parametrize("way", ["file", "folder", "class"])
def test_one_file_in_two_classes_is_refused_with_both_names(tmp_path: Path, way: str) -> None:
    root = folder(tmp_path / "x")
    if way == "file":
        os.link(root / "a" / "1.png", root / "b" / "again.png")
    elif way == "folder":
        (root / "b" / "more").symlink_to("../a")
    else:
        shutil.rmtree(root / "b")
        (root / "b").symlink_to("a")
    first = "a/1.png and b/again.png" if way == "file" else "a and b"
    with pytest.raises(ValueError, match=rf"{first}.* in two classes"):
        opened(root, num_classes=2)
    unlabelled = opened(root)  # no classes: it counts once
    assert len(summed(unlabelled)) == unlabelled.num_images
    with pytest.raises(ValueError, match="in two classes"):
        unlabelled.check_labels(2)


def test_one_file_in_two_groups_is_refused_with_both_names(tmp_path: Path) -> None:
    for i in range(4):
        put(tmp_path / "x" / "a" / f"p{i // 2}" / f"{i}.png", i)
    opened(tmp_path / "x", num_classes=1, group_by="folder")
    os.link(tmp_path / "x/a/p0/1.png", tmp_path / "x/a/p1/1.png")
    with pytest.raises(ValueError, match=r"a/p0/1.png and a/p1/1.png.*in two groups"):
        opened(tmp_path / "x", num_classes=1, group_by="folder")
    assert opened(tmp_path / "x", num_classes=1).num_images == 4
    (tmp_path / "x/a/p1/1.png").unlink()
    (tmp_path / "x/a/p1/more").symlink_to("../p0")
    with pytest.raises(ValueError, match=r"a/p0.* and a/p1/more.*in two groups"):
        opened(tmp_path / "x", num_classes=1, group_by="folder")


def test_shards_are_read_once(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar({"1.png": png(1), "2.png": png(2)}))
    for name in ("{a,a}", "{a,./a}", "{a,b}"):
        (tmp_path / "b.tar").unlink(missing_ok=True)
        (tmp_path / "b.tar").symlink_to("a.tar")
        source = opened(str(tmp_path / f"{name}.tar"))
        assert (source.num_images, source.passed_over) == (2, {SECOND_NAME: 1})
    assert opened(tmp_path).num_images == 2
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    shards = tmp_path / "p"
    shards.mkdir()
    pq.write_table(pa.table({"image": [png(1), png(2)]}), shards / "a.parquet")
    os.link(shards / "a.parquet", shards / "b.parquet")
    source = opened(shards)
    assert (source.num_images, source.passed_over) == (2, {SECOND_NAME: 1})


def test_the_list_of_a_named_set_names_each_file_once(tmp_path: Path) -> None:
    from dpmmd.data.once import refuse_second_names

    paths = [str(put(tmp_path / f"{i}.png", i)) for i in range(3)]
    refuse_second_names([*paths, str(tmp_path / "gone.png")], "celeba/train")
    with pytest.raises(ValueError, match=r"'celeba/train'.*one file several times"):
        refuse_second_names([*paths, paths[0]], "celeba/train")


class Numbers(Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return torch.full((1, 4, 4), index, dtype=torch.uint8), 0


def test_a_data_set_that_has_a_record_several_times_is_refused(tmp_path: Path) -> None:
    one, other = Numbers(), Numbers()
    good = (one, Subset(one, [3, 0]), ConcatDataset([one, other]), Subset(Subset(one, [1, 2]), [0]))
    halves = ConcatDataset([Subset(one, [0, 1]), Subset(one, [2, 3])])
    for dataset in (*good, halves):
        opened(dataset)
    several = (Subset(one, [1, 1]), Subset(one, [3, -1]), ConcatDataset([one, other, one]))
    nested = Subset(ConcatDataset([other, Subset(one, [2, 1]), Subset(one, [1, 3])]), [5, 6])
    for dataset in (*several, nested, ConcatDataset([Subset(one, [0, 1]), Subset(one, [1])])):
        with pytest.raises(ValueError, match="one record several times"):
            opened(dataset)


def test_a_folder_of_torchvision_names_each_file_once(tmp_path: Path) -> None:
    from dpmmd._torchvision import import_torchvision

    if importlib.util.find_spec("torchvision") is None:
        pytest.skip("torchvision is not installed")
    torchvision = import_torchvision()
    folder(tmp_path / "x")
    assert opened(torchvision.datasets.ImageFolder(tmp_path / "x")).num_images == 6
    os.link(tmp_path / "x" / "a" / "1.png", tmp_path / "x" / "a" / "again.png")
    with pytest.raises(ValueError, match="one record several times"):
        opened(torchvision.datasets.ImageFolder(tmp_path / "x"))


def test_a_database_named_twice_is_refused(tmp_path: Path) -> None:
    from dpmmd.data.lmdb import _refuse_one_database_twice

    put(tmp_path / "a" / "data.mdb", 0)
    put(tmp_path / "c" / "data.mdb", 0)
    (tmp_path / "b").symlink_to("a")
    _refuse_one_database_twice([tmp_path / "a", tmp_path / "c"])
    with pytest.raises(ValueError, match="one database"):
        _refuse_one_database_twice([tmp_path / "a", tmp_path / "b"])


def test_a_key_with_several_values_is_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Database:
        """One that keeps two values under one key, as LMDB's DUPSORT does."""

        def begin(self, write: bool) -> Any:
            return contextlib.nullcontext(self)

        def cursor(self) -> Any:
            return self

        def iternext(self, keys: bool, values: bool) -> Any:
            return iter([b"a", b"a", b"b"])

        def get(self, key: bytes) -> bytes:
            return png(key[0])

    lmdb = types.ModuleType("lmdb")
    lmdb.open = lambda path, **_: Database()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lmdb", lmdb)
    put(tmp_path / "tower_train_lmdb" / "data.mdb", 0)
    source = opened("lsun:tower", root=tmp_path)
    assert summed(source) == {(97, 0): 1, (98, 0): 1}


# --------------------------------------------------------------------- what machines leave behind
LEFT = [
    "__MACOSX", "lost+found", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information",
    ".Trash-1000", ".ipynb_checkpoints", "old.bak", "cats~",
]  # fmt: skip
LEFT_FILES = [
    ".DS_Store", "Thumbs.db", "._1.png", ".#1.png", "#1.png#", "1.png~", "1.png.tmp", "1.png.part",
    "1.png.crdownload", "1.png.bak", ".1.png.swp", "1.sync-conflict-20240102-101010-ABCDEF7.png",
    "1 (Anna's conflicted copy 2024-01-02).png", "1 (conflicted copy 2024-01-02 101010).png",
    "1_conflict-20240102-101010.png", "1 (SFConflict anna@example.org 2024-01-02-10-10-10).png",
]  # fmt: skip


def test_what_machines_leave_is_neither_image_nor_class(tmp_path: Path) -> None:
    root = folder(tmp_path / "x")
    before = summed(opened(root, num_classes=2))
    for name in LEFT:
        put(root / name / "thumb.png", 99)
        put(root / "a" / name / "thumb.png", 99)
    for name in LEFT_FILES:
        put(root / name, 99)
        put(root / "a" / name, 99)
    source = opened(root, num_classes=2)
    assert (source.class_names, summed(source), source.num_images) == (("a", "b"), before, 6)
    assert sum(source.passed_over.values()) == 2 * (len(LEFT) + len(LEFT_FILES))
    assert len(source.passed_over) == 3


def test_names_of_originals_are_images() -> None:
    for name in (
        "1.png",
        "scan (1).png",
        "tmp.png",
        "#1.png",
        "conflict.png",
        "part.1.png",
        "~.png",
    ):
        assert leftover(name) is None, name


def test_what_machines_leave_in_shards(tmp_path: Path) -> None:
    names = {"1.png": png(1), "./._1.png": b"mac", "__MACOSX/x/2.png": png(2), "a/.git/3.png": b"x"}
    (tmp_path / "a.tar").write_bytes(tar(names))
    (tmp_path / "._a.tar").write_bytes(b"mac")
    source = opened(tmp_path)
    assert summed(source) == {(1, 0): 1}
    assert sum(source.passed_over.values()) == 4
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"image": [png(1)]}), tmp_path / "p" / "a.parquet")
    (tmp_path / "p" / "._a.parquet").write_bytes(b"mac")
    assert opened(tmp_path / "p").num_images == 1


@pytest.mark.parametrize(
    "name",
    ["x - Copy.png", "x - Copy (2).png", "Copy of x.png", "Copy (2) of x.png", "x copy.png",
     "x copy 3.png", "x (copy).png", "x (another copy).png", "x (3rd copy).png", "x_copy.png",
     "x - Kopie.png", "Kopie von x.png", "x - Copy - Copy.png", "Copy of Copy of x.png",
     "x (1).png", "x(2).png", "x 2.png", "x (1)(2).png", "X.PNG", "x.jpg",
     "X - Copy.png", "x - copy.PNG",
     "x - コピー.png", "x のコピー 2.png", "x - 副本 (2).png", "x副本.png", "x — копия.png",
     "Копия x.png", "x - Co\u0301pia.png", "x（1）.png"],
)  # fmt: skip
def test_a_copy_that_a_file_manager_made_contributes_nothing(tmp_path: Path, name: str) -> None:
    put(tmp_path / "x" / "x.png", 1)
    put(tmp_path / "x" / name, 1)
    source = opened(tmp_path / "x")
    assert (source.num_images, summed(source)) == (2, {(1, 0): 1})
    put(tmp_path / "x" / name, 2)  # the name alone is no reason
    assert summed(opened(tmp_path / "x")) == {(1, 0): 1, (2, 0): 1}


def test_other_names_with_equal_bytes_are_two_images(tmp_path: Path) -> None:
    for name in ("x.png", "x1.png", "y.png", "photocopy.png", "copy.png", "deep/x - Copy.png"):
        put(tmp_path / "y" / "x" / name, 1)
    assert summed(opened(tmp_path / "y")) == {(1, 0): 6}
    assert family_of("a/photocopy.png") == "a/photocopy"


def test_folders_that_are_copies_count_once(tmp_path: Path) -> None:
    for day in ("day", "day - Copy", "day (2)", "Day copy", "day — копия (3)"):
        put(tmp_path / "ill" / day / "x.png", 1)
        put(tmp_path / "ill" / day / "deep copy" / "y.png", 2)
    put(tmp_path / "well" / "day" / "x.png", 1)
    source = opened(tmp_path)
    assert source.num_images == 11
    assert summed(source) == {(1, 0): 1, (2, 0): 1, (1, 1): 1}


def test_copies_across_classes_and_groups_count_and_are_suspicions(tmp_path: Path) -> None:
    """A family has one label and one group: else an exchange would move a vector to another."""
    for place in ("ill/p/x.png", "ill/p - Copy/x.png", "ill/p - Copy/x (1).png", "well/p/x.png"):
        put(tmp_path / "x" / place, 1)
    by_class = opened(tmp_path / "x")
    assert summed(by_class) == {(1, 0): 1, (1, 1): 1}
    by_group = opened(tmp_path / "x", num_classes=2, group_by="folder")
    assert isinstance(by_group, FolderSource)
    assert (len(by_group.copies), by_group.copies_elsewhere()) == (1, 1)


def test_only_families_of_several_files_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(30):
        put(tmp_path / "x" / f"scan_{number:04d}.png", 1)
    monkeypatch.setattr("dpmmd.data.once._digest", lambda file: pytest.fail(f"read {file}"))
    assert opened(tmp_path).num_images == 30


@pytest.mark.parametrize(
    "names",
    [
        ("x.png", "x - Copy.png", "x copy 2.png"),
        ("x.png", "X (1).png", "x - 副本.PNG"),
        ("day/x.png", "day - Copy/x.png", "day (2)/X (1).png"),
    ],
)
def test_copies_keep_the_claim_for_every_exchange_and_removal(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    """All neighbours over a family of three names: one vector leaves and one comes, at most."""
    tmp_path = tmp_path / "source" / "class"
    tmp_path.mkdir(parents=True)

    def released(values: tuple[int | None, ...]) -> Counter[tuple[int, int]]:
        for name, value in zip(names, values, strict=True):
            (tmp_path / name).unlink(missing_ok=True)
            if value is not None:
                put(tmp_path / name, value)
        return summed(opened(tmp_path.parent, allow_empty=True))

    every = {v: released(v) for v in itertools.product((None, 1, 2), repeat=3)}
    for one, other in itertools.permutations(every, 2):
        changed = [(a, b) for a, b in zip(one, other, strict=True) if a != b]
        if len(changed) > 1:
            continue
        gone, come = every[one] - every[other], every[other] - every[one]
        assert gone.total() <= 1
        assert come.total() <= 1
        if changed[0][1] is None:  # removed: nothing may come instead
            assert gone.total() + come.total() <= 1


# ------------------------------------------------------------------------------ tar files
def tar(members: dict[str, bytes], **options: Any) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", **options) as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def header(name: str, size: int, kind: bytes = b"0", **fields: bytes) -> bytes:
    """A header as it stands, with a true checksum."""
    block = bytearray(BLOCK)
    block[: len(name.encode())] = name.encode()
    block[100:108] = b"0000644\0"
    block[124:136] = fields.get("stated", b"%011o\0" % size)
    block[156:157] = kind
    block[257:265] = b"ustar  \0"
    for start, value in fields.items():
        if start.startswith("at_"):
            block[int(start[3:]) : int(start[3:]) + len(value)] = value
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % BLOCK)


END = bytes(2 * BLOCK)


def pax(kind: bytes = b"x", **records: bytes) -> bytes:
    text = b""
    for key, value in records.items():
        body = b" " + key.replace("__", ".").encode() + b"=" + value + b"\n"
        size = len(body) + 1
        while len(b"%d" % size) + len(body) != size:
            size += 1
        text += b"%d" % size + body
    return header("pax", len(text), kind) + padded(text)


def own_bytes(source: Any) -> list[bytes | None]:
    found = source.encoded(range(source.num_images))
    return [None if isinstance(each, Unusable) else each for each in found]


FIRST, LAST = padded(png(1)), padded(png(2))


def sparse(kind: str) -> bytes:
    """A member that states more bytes than are stored for it."""
    size = len(png(2)) + 3 * BLOCK
    if kind == "gnu":
        table = b"%011o\0%011o\0" % (0, BLOCK)
        fields = {"at_386": table, "at_483": b"%011o\0" % size}
        return header("0.png", BLOCK, b"S", **fields) + FIRST[:BLOCK]
    if kind == "gnu-extended":
        table = b"%011o\0%011o\0" % (0, BLOCK)
        fields = {"at_386": table, "at_482": b"\1", "at_483": b"%011o\0" % size}
        return header("0.png", BLOCK, b"S", **fields) + bytes(BLOCK) + FIRST[:BLOCK]
    real = b"%d" % size
    if kind == "pax-0.0":
        before = pax(GNU__sparse__size=real, GNU__sparse__numblocks=b"1")
    elif kind == "pax-0.1":
        before = pax(GNU__sparse__size=real, GNU__sparse__map=b"0,512", GNU__sparse__name=b"0.png")
    else:
        before = pax(
            GNU__sparse__major=b"1",
            GNU__sparse__minor=b"0",
            GNU__sparse__name=b"0.png",
            GNU__sparse__realsize=real,
        )
        return before + header("0.png", 2 * BLOCK) + padded(b"1\n0\n512\n") + FIRST[:BLOCK]
    return before + header("0.png", BLOCK) + FIRST[:BLOCK]


@pytest.mark.parametrize("kind", ["gnu", "gnu-extended", "pax-0.0", "pax-0.1", "pax-1.0"])
def test_a_sparse_member_reads_nothing_of_others(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(sparse(kind) + header("1.png", len(png(2))) + LAST + END)
    source = opened(path)
    assert source.num_images == 2
    assert own_bytes(source) == [None, png(2)]


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"6", b"M", b"V", b"Z"])
def test_links_devices_and_parts_have_no_bytes(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "x.tar"
    stored = b"" if kind in b"12346" else FIRST
    linked = header("0.png", len(png(1)), kind, at_157=b"1.png") + stored
    path.write_bytes(header("1.png", len(png(2))) + LAST + linked + END)
    source = opened(path)
    assert own_bytes(source) == [png(2), None]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (header("0.png", 10**6) + FIRST + END, "middle of a member"),
        (header("0.png", 0, stated=b"\xff" * 12) + FIRST + END, "number that is none"),
        (header("0.png", 0, stated=b"\x80" + b"\x7f" * 11) + FIRST + END, "middle of a member"),
        (header("0.png", 0, stated=b"0000-000010\0") + FIRST + END, "number that is none"),
        (pax(size=b"-512") + header("0.png", 5) + FIRST + END, "number that is none"),
        (pax(size=b"99999999") + header("0.png", 5) + FIRST + END, "middle of a member"),
        (pax(b"g", size=b"1024") + header("0.png", 5) + FIRST + END, "global header"),
        (pax(b"g", GNU__sparse__size=b"9") + header("0.png", 5) + FIRST + END, "global header"),
        (header("x", 0, b"L", stated=b"\x80" + bytes(6) + b"\x7f" * 5) + END, "more than 1048576"),
        (header("pax", 9, b"x") + padded(b"99 a=b\n") + END, "PAX header"),
        (header("0.png", len(png(1))) + FIRST + END + header("1.png", 0) + END, "behind its end"),
        (header("0.png", len(png(1))) + FIRST + b"\1" * BLOCK + END, "number that is none"),
        (header("0.png", 9)[:-1] + b"x" + FIRST + END, "checksum"),
        (header("0.png", len(png(1))) + FIRST + END[:100], "middle of a header"),
    ],
)
def test_tar_files_whose_members_cannot_be_told_apart(
    tmp_path: Path, data: bytes, message: str
) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=f"not a readable tar file.*{message}"):
        opened(path)


def test_a_pax_size_is_that_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    first = pax(size=b"%d" % len(png(1))) + header("0.png", 0) + FIRST
    path.write_bytes(first + header("1.png", len(png(2))) + LAST)
    source = opened(path)
    assert summed(source) == {(1, 0): 1, (2, 0): 1}
    assert source.passed_over == {"a shard without the mark of its end, perhaps cut short": 1}


def test_a_checksum_over_signed_bytes_is_one_too() -> None:
    block = bytearray(header("é.png", len(png(1))))
    block[148:156] = b"%06o\0 " % (int(block[148:154], 8) - 2 * 256)
    (member,) = Walk(io.BytesIO(bytes(block) + FIRST + END))
    assert member.name == "é.png"


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_walk_agrees_with_tarfile(format: int) -> None:
    names = ["a.png", "b/" * 60 + "c.png", "d" * 90 + "/" + "e" * 90 + ".png", "ü.png"]
    if format != tarfile.USTAR_FORMAT:
        names.append("x" * 300 + ".png")
    members = {name: os.urandom(510 + i + 3000 * i) for i, name in enumerate(names)}
    data = tar(members, format=format)
    walk = Walk(io.BytesIO(data))
    found = {m.name: data[m.offset : m.offset + m.size] for m in walk if m.own}
    assert found == members
    assert walk.ended


def test_no_damage_makes_members_share_bytes() -> None:
    rng = np.random.default_rng(0)
    whole = tar({f"{i}.png": rng.bytes(600 * i) for i in range(6)}, format=tarfile.PAX_FORMAT)
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), 4):
            data[place] = rng.integers(256)
        start = int(rng.integers(len(data) // BLOCK)) * BLOCK
        block = data[start : start + BLOCK]
        block[148:156] = b" " * 8
        data[start + 148 : start + 156] = b"%06o\0 " % sum(block)  # a checksum that hides it
        end = 0
        try:
            for member in Walk(io.BytesIO(data)):
                assert member.offset >= end
                end = member.offset + member.size
                assert end <= len(data)
        except DamagedTar:
            pass


# ------------------------------------------------------------------------------- keys
def test_names_with_dots_are_records_of_their_own(tmp_path: Path) -> None:
    dicom = {f"1.2.840.{i}.png": png(i) for i in range(20)}
    (tmp_path / "a.tar").write_bytes(tar(dicom))
    assert len(summed(opened(tmp_path / "a.tar"))) == 20
    versions: dict[str, bytes] = {}
    for i in range(20):
        versions |= {f"scan.v{i}.0.png": png(i), f"scan.v{i}.0.cls": b"%d" % (i % 2)}
    (tmp_path / "b.tar").write_bytes(tar(versions))
    found = summed(opened(tmp_path / "b.tar", num_classes=2))
    assert found == {(i, i % 2): 1 for i in range(20)}


def test_a_key_ends_at_the_first_dot_where_the_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar({"1.png": png(1), "1.seg.png": png(9), "1.cls": b"0", "1.txt": b"x"}))
    with pytest.raises(ValueError, match=r"several images.*image_key='png'"):
        opened(path)
    source = opened(path, image_key="png")
    assert summed(source) == {(1, 0): 1}
    assert source.passed_over == {
        "a name with several dots, beside image_key": 1,
        "extension .txt": 1,
    }
    assert summed(opened(path, image_key="seg.png")) == {(9, 0): 1}
    path.write_bytes(tar({"1.png": png(1), "1.jpg": png(9)}))
    with pytest.raises(ValueError, match="several images"):
        opened(path)
    path.write_bytes(tar({"1.png": png(1), "1.meta.json": b"{}", "README.md": b"x"}))
    source = opened(path)
    assert summed(source) == {(1, 0): 1}
    assert source.num_images == 1
    assert sum(source.passed_over.values()) == 2


def test_members_of_one_name_are_one_record(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    members = io.BytesIO()
    with tarfile.open(fileobj=members, mode="w") as archive:
        for name, value in (("1.png", 1), ("2.png", 2), ("1.png", 3)):
            member = tarfile.TarInfo(name)
            member.size = len(png(value))
            archive.addfile(member, io.BytesIO(png(value)))
    path.write_bytes(members.getvalue())
    source = opened(path)
    assert summed(source) == {(3, 0): 1, (2, 0): 1}
    assert source.passed_over == {"an earlier version of a member of the same name": 1}
    # Members of a record that lie apart, as `tar cf x.tar FOLDER` writes them.
    path.write_bytes(tar({"1.png": png(1), "2.cls": b"1", "2.png": png(2), "1.cls": b"0"}))
    assert summed(opened(path, num_classes=2)) == {(1, 0): 1, (2, 1): 1}


def shard(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, mode="w") as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def test_the_last_label_of_a_name_counts(tmp_path: Path) -> None:
    first, last, none = b'{"label": 0}', b'{"label": 1}', b'{"other": 1}'
    path = tmp_path / "a.tar"
    shard(path, ("0.png", png(1)), ("0.json", first), ("0.json", last))
    assert summed(opened(path, num_classes=2)) == {(1, 1): 1}
    shard(path, ("0.png", png(1)), ("0.cls", b"0"), ("0.cls", b"1"))
    assert summed(opened(path, num_classes=2)) == {(1, 1): 1}
    for members in (("0.cls", b"1"), ("0.json", first)), (("0.json", first), ("0.cls", b"1")):
        shard(path, ("0.png", png(1)), *members)  # .cls counts before .json
        assert summed(opened(path, num_classes=2)) == {(1, 1): 1}
    shard(path, ("0.png", png(1)), ("0.json", last), ("0.json", none))
    with pytest.raises(ValueError, match="no labels"):
        opened(path, num_classes=2)


@pytest.mark.parametrize(
    "again", ["./0.png", "z/../0.png", "/0.png", ".//0.png", "../0.png", "./z/./../0.png"]
)
def test_spellings_of_one_name_are_one_record(tmp_path: Path, again: str) -> None:
    for names in ("0.png", again), (again, "0.png"):
        members = zip(names, (png(1), png(2)), strict=True)
        source = opened(shard(tmp_path / "a.tar", *members))
        assert summed(source) == {(2, 0): 1}
        assert source.passed_over == {"an earlier version of a member of the same name": 1}


@pytest.mark.parametrize("pair", [("0.png", "0.PNG"), ("0.cls", "0.Cls"), ("./0.png", "0.Png")])
def test_names_that_differ_in_the_case_of_the_extension_are_refused(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    path = shard(tmp_path / "a.tar", ("1.png", png(1)), *((name, b"1") for name in pair))
    with pytest.raises(ValueError, match=r"members 0\.\w+ and 0\.\w+ in one shard.*rename"):
        opened(path)


def test_a_shard_without_members_holds_no_images(tmp_path: Path) -> None:
    path = shard(tmp_path / "a.tar")
    for number in (None, 1, 2):
        with pytest.raises(ValueError, match="holds no images"):
            opened(path, num_classes=number)
        assert opened(path, num_classes=number, allow_empty=True).num_images == 0


@pytest.mark.parametrize("kind", ["tar", "parquet"])
@pytest.mark.parametrize("name", ["a (1)", "a - Copy", "A", "a - 副本"])
def test_copies_of_shards_are_refused(tmp_path: Path, kind: str, name: str) -> None:
    def write(name: str, value: int) -> None:
        path = tmp_path / f"{name}.{kind}"
        if kind == "tar":
            shard(path, ("0.png", png(value)))
        else:
            pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
            pq.write_table(pa.table({"image": [png(value)]}), path)

    write("a", 1)
    write("b", 1)  # the bytes alone are no reason
    assert opened(tmp_path).num_images == 2
    write(name, 2)  # nor is the name
    assert opened(tmp_path).num_images == 3
    write(name, 1)
    with pytest.raises(ValueError, match=r"is a copy of .*remove the copy"):
        opened(tmp_path)
    if kind == "tar":
        with pytest.raises(ValueError, match="is a copy of"):
            opened(str(tmp_path / f"{{a,{name}}}.tar"))


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b'{"label": 1' + b"0" * 9000])
def test_json_that_is_a_bomb_is_refused(tmp_path: Path, text: bytes) -> None:
    path = tmp_path / "a.tar"
    path.write_bytes(tar({"1.png": png(1), "1.json": text}))
    with pytest.raises(ValueError, match="not a JSON object"):
        opened(path)
    path.write_bytes(tar({"1.png": png(1), "1.cls": b"1" * 5000}))
    with pytest.raises(ValueError, match="not a whole number"):
        opened(path)
    path.write_bytes(tar({"1.png": png(1), "1.json": b" " * (9 << 20)}))
    with pytest.raises(ValueError, match="expected at most"):
        opened(path)


# --------------------------------------------------------------------------- parquet cells
def cells(path: Path, names: list[str], **columns: Any) -> Path:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    image = [{"bytes": None, "path": name} for name in names]
    pq.write_table(pa.table({"image": image, **columns}), path, row_group_size=3)
    return path


def test_a_file_that_ten_cells_name_counts_once(tmp_path: Path) -> None:
    put(tmp_path / "0.png", 5)
    put(tmp_path / "deep" / "1.png", 6)
    os.link(tmp_path / "0.png", tmp_path / "same.png")
    names = ["0.png", "deep/1.png", "./0.png", "deep//1.png", "same.png", *["0.png"] * 8]
    source = opened(cells(tmp_path / "x.parquet", names))
    assert (source.num_images, summed(source)) == (13, {(5, 0): 1, (6, 0): 1})
    for options in ({"label": [0, 1] + [0, 1] + [0] * 9}, {"label": [0] * 12 + [1]}):
        path = cells(tmp_path / "y.parquet", names, **options)
        if sum(options["label"]) == 2:
            assert summed(opened(path, num_classes=2)) == {(5, 0): 1, (6, 1): 1}
        else:
            with pytest.raises(ValueError, match=r"several rows name one image.*labels"):
                opened(path, num_classes=2)
    path = cells(tmp_path / "z.parquet", names, patient=["p", "q", "p", "q"] + ["p"] * 8 + ["r"])
    with pytest.raises(ValueError, match=r"several rows name one image.*groups"):
        opened(path, group_by="patient")


def test_a_cell_reads_no_file_outside_of_its_folder(tmp_path: Path) -> None:
    outside, inside = put(tmp_path / "secret.png", 9), tmp_path / "data"
    put(inside / "0.png", 5)
    (inside / "deep").mkdir()
    (inside / "link.png").symlink_to("../secret.png")
    (inside / "up").symlink_to("..")
    (inside / "good.png").symlink_to("1.png")
    put(inside / "1.png", 6)
    os.mkfifo(inside / "pipe.png")
    names = [str(outside), "../secret.png", "link.png", "up/secret.png", "a/../0.png", "pipe.png"]
    names += ["", str(inside / "0.png"), "file:///etc/passwd", "a\0b", ".", "0.png", "good.png"]
    assert file_inside(inside, "deep/../0.png") is None
    source = opened(cells(inside / "x.parquet", names))
    assert summed(source) == {(5, 0): 1, (6, 0): 1}
    assert source.num_images == len(names)


def test_cells_at_a_url_stay_in_their_folder() -> None:
    fsspec = pytest.importorskip("fsspec")
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    memory = fsspec.filesystem("memory")
    names = ["0.png", "0.png", "../secret.png", "memory://secret.png", "/secret.png", "gone.png"]
    file = io.BytesIO()
    pq.write_table(pa.table({"image": [{"bytes": None, "path": n} for n in names]}), file)
    memory.pipe({"/d/x.parquet": file.getvalue(), "/d/0.png": png(5), "/secret.png": png(9)})
    source = opened("memory://d/x.parquet")
    assert (source.num_images, summed(source)) == (6, {(5, 0): 1})


def test_row_groups_that_share_bytes_are_refused(tmp_path: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path, footer = tmp_path / "x.parquet", tmp_path / "footer"
    pq.write_table(pa.table({"image": [png(i) for i in range(9)]}), path, row_group_size=3)
    assert opened(path).num_images == 9
    whole = path.read_bytes()
    metadata = pq.ParquetFile(path).metadata
    metadata.append_row_groups(pq.ParquetFile(path).metadata)  # the same bytes once more
    metadata.write_metadata_file(footer)
    data = whole[: -8 - int.from_bytes(whole[-8:-4], "little")]
    path.write_bytes(data + footer.read_bytes()[4:])
    assert pq.ParquetFile(path).metadata.num_rows == 18
    with pytest.raises(ValueError, match="share bytes"):
        opened(path)


@pytest.mark.parametrize("suffix", [".tar", ".parquet", ".npz"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("pyarrow")
    folder = tmp_path / "x"
    folder.mkdir()
    os.mkfifo(folder / f"a{suffix}")
    for source in (folder / f"a{suffix}", folder):
        with pytest.raises((ValueError, OSError)):
            opened(source)


# ------------------------------------------------------------------------- folders and classes
def test_a_folder_without_permission_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "x")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(PermissionError, match=r"the folder .*x/b may not be read.*mode"):
        opened(root)
    monkeypatch.setattr(os, "scandir", real)
    real_stat = os.stat

    def stat(path: Any, **options: Any) -> Any:
        if "/b/" in str(path):
            raise PermissionError(13, "Permission denied")
        return real_stat(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(PermissionError, match=r"the folder .*x/b may not be read"):
        opened(root)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="gives up root's rights")
@pytest.mark.parametrize("mode", [0o000, 0o644])
def test_a_real_folder_without_permission(mode: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = folder(Path(place, "x"))
        Path(place).chmod(0o755)
        (root / "b").chmod(mode)
        process = os.fork()
        if not process:
            code = 1
            try:
                os.seteuid(65534)
                opened(root)
            except PermissionError as error:
                code = 0 if "x/b may not be read" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitpid(process, 0)[1] == 0


def test_folders_whose_names_are_numbers_sort_as_numbers(tmp_path: Path) -> None:
    for k in range(12):
        put(tmp_path / "x" / str(k) / "1.png", k + 1)
    source = opened(tmp_path / "x", num_classes=12)
    assert source.class_names == tuple(str(k) for k in range(12))
    assert summed(source) == {(k + 1, k): 1 for k in range(12)}
    (tmp_path / "x" / "ten").mkdir()
    source = opened(tmp_path / "x", num_classes=13)
    assert source.class_names == ("0", "1", "10", "11", *map(str, range(2, 10)), "ten")


def test_other_numbers_of_classes_are_refused_with_their_names(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", classes=3)
    for number in (1, 2, 4):
        with pytest.raises(ValueError, match=f"num_classes={number}.*3 class folders, a, b, c"):
            opened(root, num_classes=number)
        with pytest.raises(ValueError, match=f"num_classes={number}.*3 class folders, a, b, c"):
            opened(root).check_labels(number)
    shutil.rmtree(root / "b")
    (root / "b").mkdir()
    source = opened(root, num_classes=3)  # an empty class folder is a class
    assert source.class_names == ("a", "b", "c")
    assert {label for _, label in summed(source)} == {0, 2}


def test_a_folder_that_wraps_the_classes_is_refused_with_their_names(tmp_path: Path) -> None:
    folder(tmp_path / "scans" / "scans")
    with pytest.raises(
        ValueError, match=r"1 class folder, scans;.*the folders a, b; give .*scans'"
    ):
        opened(tmp_path / "scans", num_classes=2)
    put(tmp_path / "one" / "ill" / "patient1" / "1.png", 1)
    assert opened(tmp_path / "one", num_classes=1).num_images == 1


def test_splits_inside_of_classes_are_refused(tmp_path: Path) -> None:
    for name in ("ill/train", "ill/Test", "well/train"):
        put(tmp_path / "x" / name / "1.png", 1)
    for number in (None, 2):
        with pytest.raises(ValueError, match=r"ill.*sub-folders Test, train, which are splits"):
            opened(tmp_path / "x", num_classes=number)
    folder(tmp_path / "y" / "y" / "train")
    with pytest.raises(ValueError, match="train, which are splits"):
        opened(tmp_path / "y", num_classes=2)


@pytest.mark.parametrize(
    "names",
    [("training", "testing"), ("Train", "dev"), ("train", "eval"), ("train", "evaluation"),
     ("train", "holdout")],
)  # fmt: skip
def test_other_names_of_splits_are_refused(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        put(tmp_path / name / "1.png", 1)
    with pytest.raises(ValueError, match="which are splits and not classes"):
        opened(tmp_path, num_classes=2)
    put(tmp_path / "other" / "1.png", 1)
    assert opened(tmp_path, num_classes=3).num_images == 3


@pytest.mark.parametrize("names", [("images", "masks"), ("Images", "labels", "annotations")])
@pytest.mark.parametrize("below", [".", "ill"])
def test_images_beside_their_masks_are_no_classes(
    tmp_path: Path, names: tuple[str, ...], below: str
) -> None:
    for name in names:
        put(tmp_path / below / name / "1.png", 1)
    put(tmp_path / below / "masks" / "1.png", 1)
    with pytest.raises(ValueError, match=r"images beside their masks.*give '.*[Ii]mages'"):
        opened(tmp_path)
    put(tmp_path / "x" / "images" / "1.png", 1)
    assert opened(tmp_path / "x").num_images == 1


@pytest.mark.parametrize("text", ["", " ", "\t\n", "s3://", "file://", "memory:// "])
def test_an_empty_source_is_refused(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(tmp_path / "1.png", 1)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"source=.*: expected a name, a path or a URL"):
        opened(text)
    assert opened(".").num_images == 1


def test_the_type_of_a_column_that_is_not_read_is_named(tmp_path: Path) -> None:
    pq, pa = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    path, column = tmp_path / "a.parquet", pa.array([png(1), png(2)])
    if hasattr(pa, "binary_view"):
        pq.write_table(pa.table({"image": column.cast(pa.binary_view())}), path)
        assert summed(opened(path)) == {(1, 0): 1, (2, 0): 1}
    pq.write_table(pa.table({"image": column.dictionary_encode()}), path)
    for key in (None, "image"):
        with pytest.raises(ValueError, match=r"'image' is of type dictionary.*cast\(pa.binary"):
            opened(path, image_key=key)


def test_pipes_among_images_do_not_hang(tmp_path: Path) -> None:
    root = folder(tmp_path / "x")
    for name in ("pipe.png", "x.png", "x - Copy.png"):
        os.mkfifo(root / "a" / name)
    for options in ({}, {"image_size": None}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source = open_source(root, **{**OPTIONS, **options})
        assert (source.num_images, summed(source).total()) == (9, 6)
    assert Counter(str(why) for why in source.look(range(9)) or ()) == {
        "None": 6,
        "not a regular file": 3,
    }


def test_links_to_nothing_are_images_that_cannot_be_decoded(tmp_path: Path) -> None:
    root = folder(tmp_path / "x")
    (root / "a" / "gone.png").symlink_to("nowhere.png")
    (root / "a" / "round.png").symlink_to("round.png")
    source = opened(root, num_classes=2)
    assert (source.num_images, summed(source).total()) == (8, 6)
    assert torch.equal(next(iter(source.batches(8))).labels, torch.tensor([0] * 5 + [1] * 3))
