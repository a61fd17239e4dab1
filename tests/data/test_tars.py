"""WebDataset shards and shards at URLs (in fsspec's memory:// storage)."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpmmd.data import open_source
from dpmmd.data.tars import expand
from tests.conftest import images

N = 11
OPTIONS: dict[str, Any] = {"image_size": 8, "channels": 1}


def png(x: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(x).save(file, "PNG")
    return file.getvalue()


def tar(records: list[dict[str, bytes]], start: int = 0) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, record in enumerate(records, start):
            for extension, data in record.items():
                member = tarfile.TarInfo(f"part.1/{number:06d}.{extension}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return file.getvalue()


def records(kind: str = "cls") -> list[dict[str, bytes]]:
    x, y = images(N)
    found = []
    for image, label, patient in zip(x[:, 0], y, np.arange(N) // 2, strict=True):
        facts = {"label": int(label), "patient": f"p{patient}"}
        beside = {"cls": str(label).encode()} if kind == "cls" else {}
        if kind == "json":
            beside = {"json": json.dumps(facts).encode()}
        found.append({"png": png(image), "txt": b"a caption", **beside})
    return found


def write(folder: Path, kind: str = "cls") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "a-000.tar").write_bytes(tar(records(kind)[:6]))
    (folder / "a-001.tar").write_bytes(tar(records(kind)[6:], 6))
    return folder


def check(source: Any, labelled: bool = True) -> None:
    x, y = images(N)
    batches = list(source.batches(4))
    assert torch.equal(
        torch.cat([b.images for b in batches])[:N], torch.from_numpy(x).float() / 255
    )
    assert torch.cat([b.valid for b in batches]).tolist() == [True] * N + [False]
    expected = y.tolist() if labelled else [0] * N
    assert torch.cat([b.labels for b in batches])[:N].tolist() == expected
    assert source.labelled is labelled


@pytest.mark.parametrize("kind", ["cls", "json", "none"])
@pytest.mark.parametrize("workers", [0, 2])
def test_shards(tmp_path: Path, kind: str, workers: int) -> None:
    folder = write(tmp_path / "shards", kind)
    labelled = kind != "none"
    for name in (folder, str(folder / "a-{000..001}.tar"), f"{folder}/a-00{{0,1}}.tar"):
        source = open_source(name, workers=workers, **OPTIONS)
        check(source, labelled)
    one = open_source(folder / "a-000.tar", workers=workers)  # the shape from the headers
    assert (one.num_images, one.image_shape) == (6, (1, 8, 8))
    (batch,) = source.part(4, range(2, 3))
    assert batch.valid.tolist() == [True, True, True, False]


def test_patterns() -> None:
    assert expand("x.tar") == ["x.tar"]
    assert expand("a{08..10}b{c,d}.tar") == [
        f"a{n}b{x}.tar" for n in ("08", "09", "10") for x in "cd"
    ]


def test_groups(tmp_path: Path) -> None:
    source = open_source(write(tmp_path / "s", "json"), group_by="patient", **OPTIONS)
    assert source.groups is not None
    assert source.groups.tolist() == (np.arange(N) // 2).tolist()
    with pytest.raises(ValueError, match="group_by='person'"):
        open_source(tmp_path / "s", group_by="person", **OPTIONS)


@pytest.mark.parametrize("bad", [b"", b"\x89PNG\r\n junk", None])
def test_a_record_that_cannot_be_decoded_is_a_silent_zero_row(
    tmp_path: Path,
    bad: bytes | None,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    recwarn: pytest.WarningsRecorder,
) -> None:
    caplog.set_level(0)
    found = records()
    found[2] = {"cls": b"1"} if bad is None else {"png": bad, "cls": b"1"}
    (tmp_path / "x.tar").write_bytes(tar(found))
    batches = list(open_source(tmp_path / "x.tar", num_classes=3, **OPTIONS).batches(4))
    assert batches[0].valid.tolist() == [True, True, False, True]
    assert not batches[0].images[2].any()
    assert batches[0].labels[2] == 0
    assert not recwarn.list
    assert not caplog.records
    assert capfd.readouterr() == ("", "")


def test_refusals(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"

    def refused(found: list[dict[str, bytes]], message: str, **options: Any) -> None:
        path.write_bytes(tar(found))
        with pytest.raises((ValueError, TypeError), match=message) as error:
            open_source(path, **OPTIONS, **options)
        assert "000002" not in str(error.value)

    one = records()[0]
    refused([*records(), {"png": one["png"]}], "have missing values")
    refused([{**one, "cls": b"two"}], "not a whole number")
    refused([{"png": one["png"], "json": b"[1]"}], "not a JSON object")
    refused([{"png": one["png"], "json": b'{"label": "cat"}'}], "expected integers")
    refused(records(), "label_key='kind'", label_key="kind")
    refused(records(), r"0\.\.1", num_classes=2)
    refused([], "holds no images")
    path.write_bytes(b"junk" * 1000)
    with pytest.raises(ValueError, match="not a readable tar file"):
        open_source(path, **OPTIONS)
    path.write_bytes(tar(records())[:2000])
    with pytest.raises(ValueError, match="not a readable tar file"):
        open_source(path, **OPTIONS)
    (tmp_path / "x-000.tar").write_bytes(tar(records()))
    with pytest.raises(FileNotFoundError, match=r"x-001\.tar.*does not exist"):
        open_source(str(tmp_path / "x-{000..001}.tar"), **OPTIONS)


# ----------------------------------------------------------------------------- at a URL


@pytest.fixture
def storage() -> Any:
    import fsspec

    memory = fsspec.filesystem("memory")
    yield memory
    memory.rm("/", recursive=True) if memory.ls("/") else None


@pytest.mark.parametrize("workers", [0, 1])
def test_tars_at_a_url(storage: Any, workers: int) -> None:
    storage.pipe("/bucket/a-0.tar", tar(records()[:6]))
    storage.pipe("/bucket/a-1.tar", tar(records()[6:], 6))
    for url in ("memory://bucket", "memory://bucket/a-{0..1}.tar"):
        check(open_source(url, workers=workers, **OPTIONS))


def test_parquet_at_a_url(storage: Any, tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    x, y = images(N)
    cells = [png(image) for image in x[:, 0]]
    table = pa.table({"image": cells, "label": y})
    for shard, rows in enumerate((table[:6], table[6:])):
        pq.write_table(rows, tmp_path / f"{shard}.parquet", row_group_size=4)
        storage.pipe(f"/data/{shard}.parquet", (tmp_path / f"{shard}.parquet").read_bytes())
    source = open_source("memory://data", **OPTIONS)
    check(source)
    assert source.name == "data"
    assert source.identity == open_source("memory:///data", **OPTIONS).identity
    assert source.identity != open_source(tmp_path, **OPTIONS).identity
    # A cell with a path and no bytes is read from beside its shard.
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    paths = pa.array([{"bytes": None, "path": f"{i}.png"} for i in range(N)], kind)
    pq.write_table(pa.table({"image": paths, "label": y}), tmp_path / "paths.parquet")
    storage.pipe("/other/paths.parquet", (tmp_path / "paths.parquet").read_bytes())
    for i, cell in enumerate(cells):
        storage.pipe(f"/other/{i}.png", cell)
    check(open_source("memory://other/paths.parquet", **OPTIONS))


def test_urls_that_are_refused(storage: Any) -> None:
    with pytest.raises(ValueError, match="no storage of that kind"):
        open_source("nosuch://bucket/x.tar")
    with pytest.raises(FileNotFoundError, match="memory://nowhere"):
        open_source("memory://nowhere/x.tar")
    storage.pipe("/bucket/x.zip", b"x")
    with pytest.raises(ValueError, match="of an unknown kind"):
        open_source("memory://bucket/x.zip")
