"""What a release's guarantee rests on stays small, and apart from training."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from dpmmd.privacy.report import EVIDENCE

ROOT = Path(__file__).resolve().parent.parent
# What (epsilon, delta) of one release rests on; what writes files for it. The ledger, the report
# and the audit stand beside them: they see noised releases only.
CORE = ("accounting", "sensitivity", "sums", "noise", "mechanism", "ranks")
TRUSTED = (*CORE, "release_file", "partial")
MAY_IMPORT = {
    *("dpmmd", "dpmmd._memory", "dpmmd.bounds", "dpmmd.files", "dpmmd.data", "dpmmd.encoders"),
    "dpmmd.encoders.pixels",  # features like any others: bounded and certified before they count
    *(f"dpmmd.privacy.{name}" for name in (*TRUSTED, "checks", "ledger", "printed", "report")),
}


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor comment, nor docstring."""
    text = path.read_text()
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            skipped |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in skipped
        for number, line in enumerate(text.splitlines(), start=1)
    )


def test_the_trusted_core_is_small() -> None:
    lines = {name: code_lines(ROOT / f"dpmmd/privacy/{name}.py") for name in TRUSTED}
    assert sum(lines[name] for name in CORE) <= 1200, lines
    assert sum(lines.values()) <= 1550, lines


@pytest.mark.parametrize("name", TRUSTED)
def test_the_trusted_core_imports_nothing_of_training(name: str) -> None:
    for node in ast.walk(ast.parse((ROOT / f"dpmmd/privacy/{name}.py").read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            modules = [str(node.module)]
        for module in modules:
            assert not module.startswith("dpmmd") or module in MAY_IMPORT, module


def test_the_tests_that_the_report_names_are_there() -> None:
    for _, test in EVIDENCE:
        file, name = test.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), flags=re.MULTILINE), test
