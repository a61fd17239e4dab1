"""Fashion-MNIST: every way of finding and fetching it, without a network."""

import gzip
import hashlib
import http.server
import os
import shutil
import stat
import sys
import threading

import numpy as np
import pytest

from dpmmd.data import fetch, fetch_fashion_mnist, open_source

RNG = np.random.default_rng(0)
COUNTS = {"train": 7, "t10k": 4}


@pytest.fixture
def files(monkeypatch, tmp_path):
    """Four small idx files that take Fashion-MNIST's place; no other way is open."""
    content = {}
    for part, count in COUNTS.items():
        images = RNG.integers(0, 256, count * 28 * 28, dtype=np.uint8).tobytes()
        shape = np.array([count, 28, 28], dtype=">u4").tobytes()
        content[f"{part}-images-idx3-ubyte.gz"] = b"\0\0\x08\x03" + shape + images
        labels = (np.arange(count, dtype=np.uint8) % 10).tobytes()
        shape = np.array([count], dtype=">u4").tobytes()
        content[f"{part}-labels-idx1-ubyte.gz"] = b"\0\0\x08\x01" + shape + labels
    assert set(content) == set(fetch.FASHION_MNIST_FILES)
    pins = {name: (hashlib.sha256(data).hexdigest(), len(data)) for name, data in content.items()}
    monkeypatch.setattr(fetch, "FASHION_MNIST_FILES", pins)
    monkeypatch.setattr(fetch, "SYSTEM_FOLDER", tmp_path / "usr" / "share" / "fashion-mnist")
    monkeypatch.setattr(fetch, "MIRRORS", ("http://127.0.0.1:9/", "http://127.0.0.1:9/b/"))
    monkeypatch.setenv("DPMMD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    return {name: gzip.compress(data) for name, data in content.items()}


def put(folder, files):
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def tool(tmp_path, name, body):
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\nimport os, sys, shutil\nargs = sys.argv[1:]\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def fake_debian(tmp_path, files, *, needs_update):
    """apt-get and dpkg that hand out `files`; calls are noted in calls.txt."""
    package = put(tmp_path / "package", files)
    inside = fetch.SYSTEM_FOLDER.relative_to("/")
    log = tmp_path / "calls.txt"
    note = f"open({str(log)!r}, 'a').write(' '.join(args) + '\\n')\n"
    tool(
        tmp_path,
        "apt-get",
        note
        + f"""
lists = [a.split("=", 1)[1] for a in args if a.startswith("Dir::State::Lists=")]
if args[-1] == "update":
    open(os.path.join(lists[0], "Packages"), "w").close()
    sys.exit(100)  # as when one of several archives is down
ready = lists and os.path.exists(os.path.join(lists[0], "Packages"))
if {needs_update} and not ready:
    print("E: Unable to locate package", args[-1])
    sys.exit(100)
open(args[-1] + "_1_all.deb", "w").close()
""",
    )
    tool(
        tmp_path,
        "dpkg",
        note
        + f"""
assert args[0] == "-x" and args[1].endswith(".deb"), args
shutil.copytree({str(package)!r}, os.path.join(args[2], {str(inside)!r}))
""",
    )
    return log


def names(folder):
    return sorted(entry.name for entry in folder.iterdir())


@pytest.mark.parametrize("layout", [".", "FashionMNIST/raw"])
def test_a_complete_root_is_used(files, tmp_path, layout):
    folder = put(tmp_path / "data" / layout, files)
    assert fetch_fashion_mnist(tmp_path / "data").resolve() == folder.resolve()


def test_the_systems_folder_is_used(files):
    put(fetch.SYSTEM_FOLDER, files)
    assert fetch_fashion_mnist() == fetch.SYSTEM_FOLDER


@pytest.mark.parametrize("needs_update", [False, True])
def test_debian_package(files, tmp_path, needs_update, capfd):
    log = fake_debian(tmp_path, files, needs_update=needs_update)
    folder = fetch_fashion_mnist()
    assert folder == tmp_path / "cache" / "fashion-mnist"
    assert names(folder) == sorted(files)
    assert names(folder.parent) == ["fashion-mnist"]
    calls = log.read_text().splitlines()
    assert ("update" in calls[1]) == needs_update
    for call in calls[1:-1]:  # after the first failure, nothing of the machine's is written
        assert "Dir::State::Lists=" in call
        assert "Dir::Cache=" in call
    assert capfd.readouterr().err.startswith("Fashion-MNIST: fetching the Debian package")
    assert fetch_fashion_mnist(progress=False) == folder
    assert len(log.read_text().splitlines()) == len(calls)


def test_debian_package_with_other_content(files, tmp_path):
    wrong = {**files, "t10k-labels-idx1-ubyte.gz": gzip.compress(b"other")}
    fake_debian(tmp_path, wrong, needs_update=False)
    with pytest.raises(FileNotFoundError, match=r"t10k-labels.*another sha256"):
        fetch_fashion_mnist(progress=False)
    assert names(tmp_path / "cache") == []


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    folder = tmp_path / "mirror"
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/"
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(fetch, "MIRRORS", (address + "missing/", address))
    yield folder
    server.shutdown()
    server.server_close()
    thread.join()


def test_mirrors(files, tmp_path, mirror):
    for name, data in files.items():
        (mirror / name).write_bytes(data)
    folder = fetch_fashion_mnist(tmp_path / "mine", progress=False)
    assert folder == tmp_path / "mine"
    assert {name: (folder / name).read_bytes() for name in names(folder)} == files
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_a_mirror_with_other_content(files, tmp_path, mirror):
    for name, data in files.items():
        (mirror / name).write_bytes(data[:-9])
    with pytest.raises(FileNotFoundError, match=r"train-images.* from it has another sha256"):
        fetch_fashion_mnist(tmp_path / "mine", progress=False)
    assert not (tmp_path / "mine").exists()


def test_when_nothing_works_the_error_says_what_was_tried(files, tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        fetch_fashion_mnist(progress=False)
    text = str(caught.value)
    for part in (
        str(tmp_path / "cache" / "fashion-mnist"),
        str(fetch.SYSTEM_FOLDER),
        "no apt-get on this machine",
        "http://127.0.0.1:9/b/",
        "Put the files train-images-idx3-ubyte.gz",
        "by hand",
    ):
        assert part in text
    with pytest.raises(FileNotFoundError, match="download=True"):
        open_source("fashion-mnist", download=False)


def test_a_folder_that_cannot_be_made(files, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="cannot write there"):
        fetch_fashion_mnist(tmp_path / "file" / "x", progress=False)


@pytest.mark.parametrize("damage", ["cut", "other", "bomb", "flipped"])
def test_damaged_files_are_never_used(files, tmp_path, mirror, damage):
    for name, data in files.items():
        (mirror / name).write_bytes(data)
    name = "train-images-idx3-ubyte.gz"
    whole = files[name]
    bad = {
        "cut": whole[: len(whole) // 2],
        "other": gzip.compress(b"other"),
        "bomb": gzip.compress(bytes(50_000_000)),
        "flipped": whole[:300] + bytes([whole[300] ^ 255]) + whole[301:],
    }[damage]
    mine = put(tmp_path / "mine", {**files, name: bad})
    with pytest.raises(ValueError, match=f"root=.*{name}.*Remove it"):
        fetch_fashion_mnist(mine, progress=False)
    assert (mine / name).read_bytes() == bad
    cache = put(tmp_path / "cache" / "fashion-mnist", {**files, name: bad})
    assert fetch_fashion_mnist(progress=False) == cache
    assert (cache / name).read_bytes() == whole


def test_open_source_reads_the_files(files, tmp_path):
    root = put(tmp_path / "data", files)
    for split, part in (("train", "train"), ("test", "t10k")):
        source = open_source("fashion-mnist", split=split, root=root, num_classes=10)
        assert source.name == f"fashion-mnist/{split}"
        assert source.num_images == COUNTS[part]
        assert source.image_shape == (1, 28, 28)
        assert source.class_names[9] == "Ankle boot"
        images, labels = source.arrays()
        idx = gzip.decompress(files[f"{part}-images-idx3-ubyte.gz"])
        assert images.numpy().tobytes() == idx[16:]
        assert labels.tolist() == list(range(COUNTS[part]))
    copy = shutil.copytree(root, tmp_path / "elsewhere")
    other = open_source("fashion-mnist", split="test", root=copy, download=False)
    assert other.identity == source.identity


def test_read_idx_refuses_what_is_no_idx_file(tmp_path):
    for content in (b"", b"\0\0\x0d\x01" + bytes(8), b"\0\0\x08\x01\0\0\0\x09" + bytes(8)):
        path = tmp_path / "x.gz"
        path.write_bytes(gzip.compress(content))
        with pytest.raises(ValueError, match="not a complete idx file"):
            fetch.read_idx(path)


@pytest.mark.skipif(fetch.find_fashion_mnist() is None, reason="Fashion-MNIST is not on this disk")
def test_the_real_data():
    source = open_source("fashion-mnist", download=False, num_classes=10, image_size=32)
    assert source.num_images == 60_000
    batch = next(source.batches(100))
    assert batch.images.shape == (100, 1, 32, 32)
    assert batch.valid.all()
    labels = source.arrays(10_000)[1]
    assert labels.bincount().tolist() == [6000] * 10


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("DPMMD_CACHE", str(tmp_path))
    assert fetch.cache_folder() == tmp_path
    monkeypatch.delenv("DPMMD_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert str(fetch.cache_folder()) == os.path.join(tmp_path, ".cache", "dpmmd")
