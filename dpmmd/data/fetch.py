"""Fashion-MNIST: find it, or fetch it from a Debian package or a download mirror."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import uuid
import zlib
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

# sha256 and size of the idx data inside each .gz file: the Debian package and the download
# mirrors compress the same data differently (with and without the file name in the header).
FASHION_MNIST_FILES: dict[str, tuple[str, int]] = {
    "train-images-idx3-ubyte.gz": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        16 + 60_000 * 28 * 28,
    ),
    "train-labels-idx1-ubyte.gz": (
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        8 + 60_000,
    ),
    "t10k-images-idx3-ubyte.gz": (
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        16 + 10_000 * 28 * 28,
    ),
    "t10k-labels-idx1-ubyte.gz": (
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        8 + 10_000,
    ),
}
DEBIAN_PACKAGE = "dataset-fashion-mnist"
SYSTEM_FOLDER = Path("/usr/share/datasets/fashion-mnist")
MIRRORS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
)
_TIMEOUT_S = 300
_CHUNK = 1 << 20


def cache_folder() -> Path:
    """Where fetched data sets are kept: ``$DPMMD_CACHE``, or ``~/.cache/dpmmd``."""
    chosen = os.environ.get("DPMMD_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "dpmmd"


def fetch_fashion_mnist(root: str | os.PathLike[str] | None = None, progress: bool = True) -> Path:
    """A folder with the four complete, verified files of Fashion-MNIST.

    Looked for in this order: `root` (or the cache folder) itself; ``/usr/share/datasets``; the
    Debian package ``dataset-fashion-mnist``, unpacked without installing it and without root
    rights; the project's download mirrors. What is fetched is checked against pinned sha256
    sums, and put in place by renaming.

    Args:
        root: folder for the files; by default ``fashion-mnist`` in ``$DPMMD_CACHE`` or
            ``~/.cache/dpmmd``. torchvision's own folder layout is understood too.
        progress: say on standard error what is being fetched, with a bar for downloads.

    Returns:
        The folder that holds the four ``.gz`` files.

    Raises:
        FileNotFoundError: nothing worked; the message lists what was tried.
        ValueError: `root` holds a file of that name with other content.
    """
    found = find_fashion_mnist(root)
    if found is not None:
        return found
    target = _target(root)
    if root is not None:
        for name in FASHION_MNIST_FILES:
            if (target / name).exists() and not _is_complete(target / name):
                raise ValueError(
                    f"root={str(root)!r}: the file {name} there is not Fashion-MNIST's, or is "
                    "damaged; expected the sha256 of the original. Remove it or give another root."
                )
    tried = [f"{target}: not complete", f"{SYSTEM_FOLDER}: not complete"]
    for fetch in (_from_debian, _from_mirrors):
        try:
            # Staged beside the target, so that each rename stays within one file system.
            target.parent.mkdir(parents=True, exist_ok=True)
            stage = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
            stage.mkdir()
        except OSError as error:
            tried.append(f"{target}: cannot write there ({error.strerror})")
            break
        try:
            fetch(stage, progress)
            target.mkdir(exist_ok=True)
            for name in FASHION_MNIST_FILES:
                os.replace(stage / name, target / name)
            return target
        except (_NotFetched, OSError) as error:
            tried.append(str(error))
        finally:
            shutil.rmtree(stage, ignore_errors=True)
    listing = "\n".join(f"  - {line}" for line in tried)
    raise FileNotFoundError(
        f"source='fashion-mnist' could not be found or fetched. Tried:\n{listing}\n"
        f"Put the files {', '.join(FASHION_MNIST_FILES)} into {target} by hand (they are in the "
        f"Debian package {DEBIAN_PACKAGE} and at {MIRRORS[1]}), or give the folder that holds "
        "them as root."
    )


def find_fashion_mnist(root: str | os.PathLike[str] | None = None) -> Path | None:
    """A folder on this machine with the four verified files, or None; nothing is fetched."""
    target = _target(root)
    for folder in (target, target / "FashionMNIST" / "raw", SYSTEM_FOLDER):
        if all(_is_complete(folder / name) for name in FASHION_MNIST_FILES):
            return folder
    return None


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array in an idx file (``.gz``), of as many dimensions as its header says.

    Raises:
        ValueError: the file is not a complete idx file of bytes.
    """
    try:
        with gzip.open(path, "rb") as file:
            data = file.read()
        if data[:3] != b"\0\0\x08":
            raise ValueError("header")
        rank = data[3]
        start = 4 + 4 * rank
        shape = tuple(int(side) for side in np.frombuffer(data[4:start], dtype=">u4"))
        array = np.frombuffer(data, dtype=np.uint8, offset=start).reshape(shape)
    except (ValueError, OSError, EOFError, IndexError, zlib.error) as error:
        raise ValueError(
            f"{path} is not a complete idx file ({type(error).__name__}): expected unsigned bytes "
            "behind an idx header; fetch it again."
        ) from None
    return array


class _NotFetched(Exception):
    """One way of fetching did not work; the message says which and why."""


def _target(root: str | os.PathLike[str] | None) -> Path:
    return cache_folder() / "fashion-mnist" if root is None else Path(root).expanduser()


def _is_complete(path: Path) -> bool:
    digest, size = FASHION_MNIST_FILES[path.name]
    found, total = hashlib.sha256(), 0
    try:
        with gzip.open(path, "rb") as file:
            while chunk := file.read(_CHUNK):
                total += len(chunk)
                if total > size:  # whatever it is, do not inflate it further
                    return False
                found.update(chunk)
    except (OSError, EOFError, ValueError, zlib.error):
        return False
    return found.hexdigest() == digest


def _say(text: str, progress: bool) -> None:
    if progress:
        print(text, file=sys.stderr, flush=True)


def _from_debian(stage: Path, progress: bool) -> None:
    way = f"Debian package {DEBIAN_PACKAGE}"
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise _NotFetched(f"{way}: no {tool} on this machine")
    _say(f"Fashion-MNIST: fetching the Debian package {DEBIAN_PACKAGE}", progress)
    with tempfile.TemporaryDirectory(prefix="dpmmd-apt-") as temporary:
        # apt drops its rights while downloading and wants to reach the folder as that user.
        os.chmod(temporary, 0o755)
        base = Path(temporary)
        lists, cache, tree = base / "lists", base / "cache", base / "tree"
        (lists / "partial").mkdir(parents=True)
        (cache / "archives" / "partial").mkdir(parents=True)
        # The machine's own package lists may be empty or stale; private ones need no rights.
        private = ["-o", f"Dir::State::Lists={lists}", "-o", f"Dir::Cache={cache}"]
        common = ["apt-get", "-q", "-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=30"]
        failure = _call([*common, "download", DEBIAN_PACKAGE], base)
        if failure is not None:
            # An update may fail for an unrelated source; the download then tells.
            update = _call([*common, *private, "update"], base)
            failure = _call([*common, *private, "download", DEBIAN_PACKAGE], base)
            if failure is not None:
                failure = f"{failure}; apt-get update: {update or 'done'}"
        if failure is not None:
            raise _NotFetched(f"{way}: {failure}")
        packages = sorted(base.glob(f"{DEBIAN_PACKAGE}_*.deb"))
        if not packages:
            raise _NotFetched(f"{way}: apt-get download left no package")
        failure = _call(["dpkg", "-x", str(packages[0]), str(tree)], base)
        if failure is not None:
            raise _NotFetched(f"{way}: {failure}")
        folder = tree / SYSTEM_FOLDER.relative_to("/")
        for name in FASHION_MNIST_FILES:
            if not _is_complete(folder / name):
                raise _NotFetched(f"{way}: {name} in it is missing or has another sha256")
            shutil.copyfile(folder / name, stage / name)


def _call(command: list[str], folder: Path) -> str | None:
    """Run a command; None when it succeeded, else one line on why not."""
    what = " ".join(part for part in command[:1] + command[-2:] if not part.startswith("-"))
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"{what} took more than {_TIMEOUT_S} s"
    except OSError as error:
        return f"{what} did not start ({error.strerror})"
    if done.returncode == 0:
        return None
    lines = done.stdout.decode("utf-8", "replace").strip().splitlines()
    return f"{what} failed ({lines[-1].strip() if lines else f'exit code {done.returncode}'})"


def _from_mirrors(stage: Path, progress: bool) -> None:
    reasons = []
    for mirror in MIRRORS:
        _say(f"Fashion-MNIST: downloading from {mirror}", progress)
        try:
            for name in FASHION_MNIST_FILES:
                _download(mirror + name, stage / name, progress)
                if not _is_complete(stage / name):
                    raise _NotFetched(f"{name} from it has another sha256")
            return
        except (_NotFetched, OSError, ValueError) as error:
            reasons.append(f"{mirror}: {error}")
    raise _NotFetched("download: " + "; ".join(reasons))


def _download(url: str, path: Path, progress: bool) -> None:
    with urllib.request.urlopen(url, timeout=30) as response, open(path, "wb") as file:
        length = response.headers.get("Content-Length")
        with tqdm(
            total=int(length) if length else None,
            unit="B",
            unit_scale=True,
            desc=path.name,
            disable=not progress,
        ) as bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                bar.update(len(chunk))
