"""Makes `dpmmd` importable from a bare checkout, without installing anything.

A machine lent for a measurement may have a PyTorch and no package index. Two things are wanting
there: the place of `dpmmd.kernels`, which an installation maps to kernels/, and packages that a
training step never uses, but that `import dpmmd` imports. For the latter stand-ins serve: a
pydantic that checks nothing, and a cryptography that cannot make noise, so that no release can be
private. Both are for benchmarks alone, and only where the real package is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import types
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
_REQUIRED = object()


class BaseModel:
    """Fields with defaults, as annotated; nothing is checked."""

    model_fields: dict[str, Any] = {}  # noqa: RUF012

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        own = {
            name: cls.__dict__.get(name, _REQUIRED)
            for name in inspect.get_annotations(cls)
            if name not in ("model_config", "model_fields") and not name.startswith("_")
        }
        cls.model_fields = cls.model_fields | own

    def __init__(self, **values: Any) -> None:
        for name, default in self.model_fields.items():
            value = values.pop(name, default)
            if value is _REQUIRED:
                raise TypeError(f"{type(self).__name__}: {name} is missing.")
            setattr(self, name, value)
        if values:
            raise TypeError(f"{type(self).__name__}: no field is called {next(iter(values))!r}.")

    def model_dump(self, **_: Any) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.model_fields}

    def model_copy(self, *, update: dict[str, Any] | None = None) -> BaseModel:
        return type(self)(**self.model_dump() | (update or {}))

    @classmethod
    def model_validate(cls, values: dict[str, Any]) -> BaseModel:
        return cls(**values)


class TypeAdapter:
    """Refuses to be used; can be asked for."""

    def __init__(self, kind: Any) -> None:
        self.kind = kind


def _field(default: Any = _REQUIRED, **_: Any) -> Any:
    return default


def _pass(*_: Any, **__: Any) -> Any:
    return lambda function: function


class Cipher:
    """Refuses to be made: there is no noise without the package cryptography."""

    def __init__(self, *_: Any, **__: Any) -> None:
        _no_noise()


def _no_noise(*_: Any, **__: Any) -> NoReturn:
    raise RuntimeError(
        "the package cryptography is missing, and what stands in for it here makes no noise; "
        "pip install cryptography to make a release."
    )


def _modules() -> dict[str, dict[str, dict[str, Any]]]:
    """Package -> its modules -> what dpmmd takes from them."""
    ciphers = "cryptography.hazmat.primitives.ciphers"
    return {
        "pydantic": {
            "pydantic": {
                "BaseModel": BaseModel,
                "ConfigDict": dict,
                "Field": _field,
                "TypeAdapter": TypeAdapter,
                "ValidationError": type("ValidationError", (ValueError,), {}),
                "ValidationInfo": object,
                "field_validator": _pass,
                "model_validator": _pass,
            }
        },
        "cryptography": {
            "cryptography": {},
            "cryptography.hazmat": {},
            "cryptography.hazmat.primitives": {},
            ciphers: {"Cipher": Cipher},
            f"{ciphers}.algorithms": {"ChaCha20": _no_noise},
        },
    }


def prepare() -> list[str]:
    """Does what is needed, once; returns the names of the packages that are stood in for."""
    stood_in = []
    for package, modules in _modules().items():
        present = sys.modules.get(package)
        if present is None and importlib.util.find_spec(package) is None:
            for name, content in modules.items():
                module = types.ModuleType(name)
                module.__dict__.update(content, __path__=[], __stand_in__=True)
                sys.modules[name] = module
                parent, _, child = name.rpartition(".")
                if parent:
                    setattr(sys.modules[parent], child, module)
            present = sys.modules[package]
        if getattr(present, "__stand_in__", False):
            stood_in.append(package)
    if importlib.util.find_spec("dpmmd.kernels") is None:
        _map_kernels()
    return stood_in


def _map_kernels() -> None:
    folder = ROOT / "kernels"
    spec = importlib.util.spec_from_file_location(
        "dpmmd.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["dpmmd.kernels"] = module
    spec.loader.exec_module(module)
    importlib.import_module("dpmmd").kernels = module  # type: ignore[attr-defined]
