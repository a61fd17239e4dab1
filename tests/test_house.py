"""The rooms of the code: who imports whom, and how large a function, a signature and a file may be.

The floors stand in docs/ARCHITECTURE.md. A file imports only what lies on a lower floor, or files
of its own room in no circle; imports for types alone and those within functions count as well.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
LINES, PARAMETERS, FILE_LINES = 80, 10, 600
# Signatures whose keywords are the public API. Commands of the CLI (options) and kernels of Triton
# (launches) are not asked.
PUBLIC = {
    "dpmmd.data.open.open_source",
    "dpmmd.functional.adam_loss",
    "dpmmd.nn.__init__",
    "dpmmd.privacy.mechanism.release",
    "dpmmd.privacy.pipeline.audit_source",
    "dpmmd.train.loop.train",
}


def floors() -> list[list[str]]:
    """The rooms of each floor, from the ground up."""
    table = re.search(r"<!-- floors: begin -->(.*?)<!-- floors: end -->", PAGE, re.DOTALL)
    assert table is not None
    rows = re.findall(r"^\| \d+ \| ([^|]+) \|", table[1], re.MULTILINE)
    return [re.findall(r"`([\w./]+)`", row) for row in rows[::-1]]


@cache
def files() -> dict[str, Path]:
    """Modules of dpmmd and dpmmd.kernels, by name."""
    found = {}
    for folder, package in ((ROOT / "dpmmd", "dpmmd"), (ROOT / "kernels", "dpmmd.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            if package == "dpmmd" and parts[0] == "kernels":
                continue  # a link to the other folder
            name = ".".join([package, *parts])
            found[name.removesuffix(".__init__")] = path
    return found


def imported(name: str) -> Iterator[str]:
    """The modules that the module ``name`` imports, wherever in it."""
    path = files()[name]
    base = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files())
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                upper = base.split(".")[: len(base.split(".")) - node.level + 1]
                source = ".".join([*upper, *([source] if source else [])])
            if source not in files():
                continue
            names = [f"{source}.{a.name}" for a in node.names if a.name != "_native"]  # in C++
            yield from (whole for whole in names if whole in files())
            if any(whole not in files() for whole in names):
                yield source


def room_of(name: str) -> tuple[int, str]:
    """Floor and room of a module: the longest entry of the page that it lies in."""
    fitting = []
    for floor, rooms in enumerate(floors()):
        for room in rooms:
            module = "dpmmd." + room.rstrip("/").removesuffix(".py").replace("/", ".")
            if module == "dpmmd.kernels" or name == module or name.startswith(f"{module}."):
                if module == "dpmmd.kernels" and not name.startswith(module):
                    continue
                fitting.append((len(module), floor, room))
    assert fitting, f"docs/ARCHITECTURE.md: {name} has no floor"
    return max(fitting)[1:]


MODULES = sorted(set(files()) - {"dpmmd", "dpmmd.__main__"})  # the faces of the package


def test_there_are_ten_floors_or_fewer() -> None:
    assert 5 < len(floors()) <= 10


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_below(name: str) -> None:
    """None but the command line imports the package itself, whose face leads everywhere."""
    floor, room = room_of(name)
    for other in imported(name):
        if other == name or (other == "dpmmd" and room == "cli/"):
            continue
        assert other != "dpmmd", f"{name} imports dpmmd as a whole: import the module that it needs"
        below, theirs = room_of(other)
        assert theirs == room or below < floor, f"{name} (floor {floor}) imports {other} ({below})"


def test_there_is_no_circle() -> None:
    graph = {name: set(imported(name)) - {name, "dpmmd"} for name in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' <- '.join(error.args[1])}")


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("dpmmd.kernels")])
def test_a_file_is_not_too_long(name: str) -> None:
    assert len(files()[name].read_text().splitlines()) <= FILE_LINES


def _is_launch(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(d).startswith("triton.jit") for d in node.decorator_list)


@pytest.mark.parametrize("name", MODULES)
def test_functions_are_short_and_signatures_narrow(name: str) -> None:
    """Of what users call, and of the commands, what runs is short: the rest is the reference."""
    for node in ast.walk(ast.parse(files()[name].read_text())):
        if not isinstance(node, ast.FunctionDef):
            continue
        where, end = f"{name}.{node.name}", int(node.end_lineno or 0)
        if where in PUBLIC or (name.startswith("dpmmd.cli.") and node.name[0] != "_"):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            assert end - body[0].lineno < LINES, where
            continue
        assert end - node.lineno < LINES, where
        named = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
        more = [a.arg for a in (node.args.vararg, node.args.kwarg) if a is not None]
        wide = len([a for a in named if a not in ("self", "cls", "ctx")] + more)
        assert wide <= PARAMETERS or _is_launch(node), f"{where}: {wide} parameters"
