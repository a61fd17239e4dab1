"""The page of known faults: every test that it names is there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "FAULTS.md").read_text()
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_named_by_the_page_exists(file: str, name: str) -> None:
    assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), flags=re.MULTILINE)


def test_every_fault_has_a_cost_a_remedy_and_a_test() -> None:
    faults = PAGE.split("\n### ")[1:]
    assert len(faults) >= 15
    for fault in faults:
        for part in ("- **Costs**:", "- **Here**:", "- **Tests**: `tests/"):
            assert fault.count(part) == 1, fault.splitlines()[0]
