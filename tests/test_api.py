"""The public API is what docs/API.md lists, no less and no more."""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "API.md"
LISTED = re.findall(r"`(dpmmd(?:\.\w+)+)`", DOCUMENT.read_text().split("Everything else")[1])
LISTED = [name for name in LISTED if "." in name]


def found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize("name", LISTED)
def test_what_is_listed_is_there_and_explained(name: str) -> None:
    value = found(name)
    if inspect.isfunction(value) or inspect.isclass(value):
        assert inspect.getdoc(value)
    assert not name.rpartition(".")[2].startswith("_")


@pytest.mark.parametrize("package", ["privacy", "encoders", "generators", "data"])
def test_what_a_package_exports_is_listed(package: str) -> None:
    module = importlib.import_module(f"dpmmd.{package}")
    assert {f"dpmmd.{package}.{name}" for name in module.__all__} <= set(LISTED)
