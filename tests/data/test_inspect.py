"""`dpmmd inspect`: what is there, before anything is spent."""

from __future__ import annotations

import io
import itertools
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset
from typer.testing import CliRunner

from dpmmd.cli import app
from dpmmd.data import Batch, ImageSource, open_source
from dpmmd.data.heads import FIRST, _by_pillow, head_of, plain_head
from dpmmd.data.inspect import Inspection, inspect
from dpmmd.data.inspection import YOURS
from tests.data.test_containers import folder, png, put, tar

RNG = np.random.default_rng(0)


def picture(path: Path, size: tuple[int, int] = (4, 4), mode: str = "RGB", **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = RNG.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    Image.fromarray(noise, "RGBA").convert(mode).save(path, **options)
    return path


def test_it_says_what_is_there(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    for i in range(6):
        picture(root / "ill" / f"{i}.png", (40 + i, 30))
    for i in range(3):
        picture(root / "well" / f"{i}.jpg", (64, 64), "L")
    picture(root / "well" / "glass.png", (64, 64), "RGBA")
    frames = [Image.new("L", (64, 64), i) for i in range(3)]
    frames[0].save(root / "well" / "film.gif", save_all=True, append_images=frames[1:])
    (root / "well" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n junk")
    (root / "well" / "x.heic").write_bytes(b"x")
    (root / "well" / "notes.txt").write_bytes(b"x")
    (root / "__MACOSX").mkdir()
    os.link(root / "ill" / "0.png", root / "ill" / "again.png")
    put(root / "well" / "a.png", 7)
    put(root / "well" / "a (1).png", 7)
    put(root / "well" / "a - Copy.png", 7)
    found = inspect(root)
    assert (found.records, found.looked_at, found.decoded) == (15, 15, 0)
    assert found.classes == {"ill": 6, "well": 9}
    assert found.sizes is not None
    assert (found.sizes.least, found.sizes.greatest) == ((4, 4), (64, 64))
    assert found.sizes.commonest["64 x 64"] == 5
    assert found.formats == {"PNG": 8, "JPEG": 3, "GIF": 1}
    assert sum(found.modes.values()) == 12
    assert (found.transparent, found.several_frames) == (1, 1)
    assert sum(found.unusable.values()) == 3  # the broken one, and the copies
    assert sum(found.passed_over.values()) == 4
    assert "an image of a kind that is not read: .heic" in found.passed_over
    assert not found.suspicions
    assert any("mixed sizes" in why for why in found.refused)
    assert any("grey and colour" in why for why in found.refused)
    options = "--num-classes 2 --image-size 28 --crop center --channels 3"
    assert found.command.endswith(options)
    assert found.command.startswith(f"dpmmd release {root} --out scans.safetensors --epsilon 1")
    assert json.loads(json.dumps(found.facts()))["for"] == YOURS
    whole = inspect(root, everything=True)
    assert (whole.looked_at, whole.decoded) == (15, 15)
    assert sum(whole.unusable.values()) == 3
    assert not whole.suspicions


def test_all_finds_what_headers_do_not_say(tmp_path: Path) -> None:
    root = folder(tmp_path / "x")
    data = (root / "a" / "1.png").read_bytes()
    (root / "a" / "1.png").write_bytes(data[:-20])
    assert not inspect(root).unusable
    assert sum(inspect(root, everything=True).unusable.values()) == 1


def test_the_guessed_command_opens_the_source(tmp_path: Path) -> None:
    root = folder(tmp_path / "x", classes=3)
    picture(root / "a" / "large.jpg", (90, 60))
    words = inspect(root).command.split()
    options = dict(zip(words[3::2], words[4::2], strict=True))
    source = open_source(
        root,
        num_classes=int(options["--num-classes"]),
        image_size=int(options["--image-size"]),
        channels=int(options["--channels"]),
        crop=options.get("--crop"),
    )
    assert source.image_shape == (3, 4, 4)


def test_what_a_release_would_refuse_is_said(tmp_path: Path) -> None:
    folder(tmp_path / "x" / "x")
    found = inspect(tmp_path / "x", num_classes=2)
    assert any("1 class folder, x;" in why for why in found.refused)
    assert found.records == 6
    assert "--num-classes 1" in found.command
    with pytest.raises(FileNotFoundError, match="does not exist"):
        inspect(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    found = inspect(tmp_path / "empty")
    assert (found.records, found.sizes) == (0, None)
    assert any("holds no images" in why for why in found.refused)


def test_folders_without_permission_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(tmp_path / "x")
    real = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    found = inspect(root)
    assert (found.records, found.classes) == (3, {"a": 3, "b": 0})
    assert found.passed_over == {"a folder that may not be read": 1}
    assert any("x/b may not be read" in why for why in found.refused)
    with pytest.raises(PermissionError):
        open_source(root)


def test_groups_and_a_guess_of_them(tmp_path: Path) -> None:
    for i in range(7):
        put(tmp_path / "x" / "ill" / f"p{i // 3}" / f"{i}.png", i)
    found = inspect(tmp_path / "x")
    assert "--group-by folder" in found.command
    found = inspect(tmp_path / "x", group_by="folder", num_classes=1)
    assert found.groups is not None
    assert (found.groups.number, found.groups.largest) == (3, 3)
    assert found.groups.sizes == {1: 1, 3: 2}
    assert "--group-by folder" in found.command
    assert inspect(folder(tmp_path / "y")).command.count("--group-by") == 0


def test_every_kind_of_source(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    cells = [png(i) for i in range(5)]
    (tmp_path / "a.tar").write_bytes(
        tar({f"{i}.{e}": d for i in range(5) for e, d in (("png", cells[i]), ("cls", b"%d" % i))})
    )
    table = {"image": cells, "label": [0, 1, 2, 3, 4], "patient_id": list("ppqqr")}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    np.savez(tmp_path / "a.npz", x=np.zeros((5, 4, 4), np.uint8), y=np.arange(5))
    for name in ("a.tar", "a.parquet", "a.npz"):
        for everything in (False, True):
            found = inspect(str(tmp_path / name), everything=everything)
            assert found.records == found.looked_at == 5
            assert found.classes == {str(k): 1 for k in range(5)}
            assert found.sizes is not None
            assert found.sizes.commonest == {"4 x 4": 5}
            assert not found.unusable
            assert "--num-classes 5 --image-size 4 --channels 1" in found.command
    assert "--group-by patient_id" in inspect(tmp_path / "a.parquet").command
    grouped = open_source(tmp_path / "a.parquet", group_by="patient_id").inspect()
    assert grouped.groups is not None
    assert grouped.groups.sizes == {1: 1, 2: 2}
    assert inspect("digits").records == 1438


def test_a_long_header_in_a_shard_is_read_whole(tmp_path: Path) -> None:
    frames = [Image.fromarray(RNG.integers(0, 256, (64, 64), dtype=np.uint8)) for _ in range(3)]
    film, photo = io.BytesIO(), io.BytesIO()
    frames[0].save(film, "GIF", save_all=True, append_images=frames[1:])
    frames[0].save(photo, "JPEG", icc_profile=bytes(3 * FIRST))
    members = {"1.gif": film.getvalue(), "2.jpg": photo.getvalue()}
    (tmp_path / "a.tar").write_bytes(tar(members))
    found = inspect(tmp_path / "a.tar")
    assert (found.several_frames, found.formats, found.unusable) == (1, {"GIF": 1, "JPEG": 1}, {})


class Items(Dataset[Any]):
    def __init__(self, images: list[Any], labels: list[Any]) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.images[index], self.labels[index]


def test_items_of_a_dataset_are_looked_at() -> None:
    images = [torch.rand(3, 8, 6), torch.rand(3, 8, 6) * 255, Image.new("L", (9, 9)), png(1), "x"]
    found = inspect(Items(images * 100, list(range(5)) * 100))
    assert (found.records, found.looked_at) == (500, 256)
    assert found.sizes is not None
    assert set(found.sizes.commonest) == {"6 x 8", "9 x 9", "4 x 4"}
    assert found.unusable["values outside [0, 1]"] > 0
    whole = inspect(Items(images, list(range(5))), everything=True)
    assert (whole.decoded, sum(whole.unusable.values())) == (5, 2)
    mistaken = inspect(Items(images, ["cat"] * 5))
    assert any("integers" in why for why in mistaken.refused)


class Own(ImageSource):
    name, identity, num_images, image_shape = "own", "0" * 64, 5, (1, 2, 2)

    def batches(self, batch_size: int) -> Any:
        valid = torch.arange(batch_size) < 4
        yield Batch(torch.zeros(batch_size, 1, 2, 2), torch.zeros(batch_size).long(), valid)


def test_a_source_of_ones_own() -> None:
    found = Own().inspect(everything=True)
    assert (found.records, found.decoded, sum(found.unusable.values())) == (5, 5, 1)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "F"])
@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"])
def test_headers_are_read_as_pillow_reads_them(mode: str, format: str) -> None:
    image = Image.new("L", (7, 5)).convert(mode) if mode != "I;16" else Image.new("I;16", (7, 5))
    exif = Image.Exif()
    exif[0x0112] = 6
    for options in ({}, {"exif": exif}, {"icc_profile": bytes(9000)}, {"progressive": True}):
        file = io.BytesIO()
        try:
            image.save(file, format, **options)
        except (OSError, TypeError, AttributeError, ValueError):
            continue
        data = file.getvalue()
        assert head_of(data) == _by_pillow(data), options


def test_a_damaged_header_is_what_pillow_says_of_it() -> None:
    """Where the short way says anything, Pillow says the same."""
    file = io.BytesIO()
    Image.new("RGB", (7, 5)).save(file, "JPEG")
    agreed = 0
    for whole, _ in itertools.product((png(1), file.getvalue()), range(300)):
        data = bytearray(whole)
        for place in RNG.integers(2, min(len(data), 200), 2):
            data[place] = RNG.integers(256)
        short = plain_head(bytes(data[:FIRST]))
        if short is not None:
            try:
                agreed += short == _by_pillow(bytes(data))
            except Exception:  # refused when it is decoded, which a header need not know
                continue
            assert short == _by_pillow(bytes(data))
    assert agreed > 100


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["inspect", *words])


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path / "x")
    (root / "a").rename(root / "[red]a\x1b[31m")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.chdir(tmp_path)
    done = run(str(root), "--quiet")
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith(YOURS)
    assert "[red]a\\x1b[31m" in done.stdout.replace("\n", "")
    assert "\x1b" not in done.stdout
    assert "--num-classes 2" in done.stdout
    facts = json.loads(run(str(root), "--json", "--all", "--quiet").stdout)
    assert (facts["records"], facts["decoded"]) == (6, 6)
    assert facts.keys() >= set(Inspection.__dataclass_fields__)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    refused = run(str(root), "--num-classes", "3", "--quiet")
    assert refused.exit_code == 0
    assert "a release is refused" in refused.stdout


def test_headers_of_many_files_are_quick(tmp_path: Path) -> None:
    data = png(1)
    for i in range(500):
        path = tmp_path / "x" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    inspect(tmp_path / "x")
    started = time.process_time()
    found = inspect(tmp_path / "x")
    assert time.process_time() - started < 0.3  # 0.03 s on the machine it was written on
    assert Counter(found.formats) == {"PNG": 500}
