"""Packages that import what they offer when it is first used (PEP 562)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def importer(
    package: str, of_module: Mapping[str, Sequence[str]], modules: Sequence[str] = ()
) -> Callable[[str], Any]:
    """The ``__getattr__`` of a package.

    A name must not be that of a module of the package too: importing the module would hide it.

    Args:
        package: its name.
        of_module: module -> names that the package has from it.
        modules: names that are modules of the package.
    """
    where = {name: module for module, names in of_module.items() for name in names}

    def find(name: str) -> Any:
        if name in modules:
            return import_module(f"{package}.{name}")  # and becomes an attribute by that
        if name not in where:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(where[name]), name)
        setattr(import_module(package), name, value)
        return value

    return find
