"""What the trusted code is and imports, and how many lines it has.

python -m tests.trusted             the table
python -m tests.trusted --update    writes it into docs/THREAT_MODEL.md, rounded up
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

from dpmmd.privacy.evidence import MODULES, NATIVE

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs/THREAT_MODEL.md"
BEGIN, END = "<!-- trusted: begin -->", "<!-- trusted: end -->"
HEADROOM = 50  # lines that may be added before the table has to be renewed

TRUSTED = frozenset(name for names in MODULES.values() for name in names)
# What runs inside the boundary, reached from the trusted modules, that the claim does not rest on;
# a name ending in a dot stands for a package. What each of these must keep to is said here.
INSIDE = {
    "dpmmd": "names of public modules; the trusted code takes __version__ of it and nothing else",
    "dpmmd._cores": "a table of the cores by name",
    "dpmmd._cores.blocks": "memory for gradients of generated images",
    "dpmmd._cores.calls": "sizes of means of generated images",
    "dpmmd._cores.matching": "losses of generated images; sums nothing",
    "dpmmd._cores.plain": "means and losses of generated images; sums nothing",
    "dpmmd._choices": "how gradients of generated images are computed; features are the same",
    "dpmmd._contract": "a docstring",
    "dpmmd._contract.capturing": "keeps what CUDA graphs read alive; a release has none",
    "dpmmd._contract.lending": "estimates of generated images' losses; a release has none",
    "dpmmd._contract.plans": "what is kept from step to step of training; a release keeps nothing",
    "dpmmd._contract.protocol": "what a core provides: names and types",
    "dpmmd._contract.slot": "ReLUs of a generator's training; sums nothing",
    "dpmmd._fastest": "which core is the fastest; every core that it can name for sums is trusted",
    "dpmmd._lazy": "imports what a package offers when it is first used",
    "dpmmd._memory": "asks the C library and the native core to return freed memory",
    "dpmmd._torchvision": "imports torchvision, whose models are encoders",
    "dpmmd._version": "a constant",
    "dpmmd._warn": "gives a warning the line of the caller",
    "dpmmd.bounds": "names of bounds, and what arguments are refused",
    "dpmmd.devices": "which device a module is on",
    "dpmmd.errors": "an exception that a release never raises",
    "dpmmd.files": "writes released files whole or not at all",
    "dpmmd.data": "sources: one image's pixels are a function of that image alone, in silence",
    "dpmmd.data.": "the same",
    "dpmmd.encoders": "one image's features are a function of that image alone",
    "dpmmd.encoders.": "the same; whatever they compute is certified before it counts",
    "dpmmd.kernels": "a docstring",
    "dpmmd.kernels.class_sums": "means of generated images; the sums of a release are others",
    "dpmmd.kernels.estimator": "losses of generated images",
    "dpmmd.kernels.gradient": "gradients of generated images",
    "dpmmd.kernels.injection": "means and gradients of generated images",
    "dpmmd.kernels.matching": "losses of generated images, in one pass",
    "dpmmd.kernels.mean_embedding": "means and gradients of generated images",
    "dpmmd.kernels.maps": "layers in training; a release's encoders run without gradients",
    "dpmmd.kernels.pooling": "the same",
    "dpmmd.kernels.row_dots": "gradients of generated images",
    "dpmmd.kernels.row_statistics": "means of generated images",
    "dpmmd.precision": "which numbers a device multiplies, and in which precision",
    "dpmmd.privacy": "names of public functions",
    "dpmmd.privacy.canaries": "attacks releases of made-up images; a release never calls it",
    "dpmmd.privacy.evidence": "what the report says of tests; sees nothing private",
    "dpmmd.privacy.pipeline": "checks the data holder's pipeline; a release never calls it",
    "dpmmd.privacy.probes": "the same",
    "dpmmd.privacy.readings": "the same",
    "dpmmd.privacy.verdicts": "the same",
    "dpmmd.privacy.printed": "writes released numbers for people, rounded outward",
    "dpmmd.privacy.rows": "merges released rows; sees noised numbers only",
    "dpmmd.privacy.report": "sees noised releases only",
}
# Modules that could import what no name in them shows, and what they import or look for.
DYNAMIC = {
    "dpmmd._lazy": "imports what the packages that use it name in constants",
    "dpmmd.privacy.evidence": "looks for the files of the modules above",
    "dpmmd._torchvision": "imports torchvision, a constant",
    "dpmmd._choices": "looks for triton, a constant",
    "dpmmd._cores.triton": "the same",
    "dpmmd.data.named": "imports torchvision's data sets, and looks for a package: constants",
    "dpmmd.data.photographs": "looks for a package: a constant",
    "dpmmd.encoders.weights": "looks for packages that carry weights: constants",
}
_IMPORTERS = ("importlib", "runpy", "pkgutil", "imp", "zipimport")
_BUILTINS = ("__import__", "exec", "eval", "compile")


@cache
def path_of(name: str) -> Path | None:
    """The file of a module of this package; None if there is no such module."""
    parts = name.split(".")
    if parts[0] != "dpmmd":
        return None
    base = ROOT.joinpath(*parts)
    if parts[1:2] == ["kernels"]:
        base = ROOT.joinpath(*parts[1:])
    for path in (base / "__init__.py", base.with_suffix(".py")):
        if path.is_file():
            return path
    return None


def _executed(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under ``if TYPE_CHECKING``, which never runs."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        if isinstance(node, ast.If) and _chain(node.test)[-1:] == ["TYPE_CHECKING"]:
            waiting += node.orelse
        else:
            waiting += ast.iter_child_nodes(node)


def _chain(node: ast.AST) -> list[str]:
    """The names of ``a.b.c``; empty for anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [*names, node.id][::-1] if isinstance(node, ast.Name) else []


@cache
def _resolved(name: str, attribute: str) -> frozenset[str]:
    """The modules that ``attribute`` of the module ``name`` brings in."""
    if path_of(whole := f"{name}.{attribute}"):
        return frozenset({name, whole})
    path = path_of(name)
    if path is not None and path.name == "__init__.py":  # a name that the package imports itself
        for node in ast.walk(ast.parse(path.read_text())):  # TYPE_CHECKING: what it has lazily
            if isinstance(node, ast.ImportFrom) and any(
                (alias.asname or alias.name) == attribute for alias in node.names
            ):
                source = _absolute(name, node, package=True)
                if source != name and path_of(source):
                    return frozenset({name, source})
    return frozenset({name})


def _absolute(name: str, node: ast.ImportFrom, *, package: bool) -> str:
    """The module that an ImportFrom in ``name`` is from."""
    if not node.level:
        return str(node.module)
    base = name.split(".")
    base = base[: len(base) - node.level + package]
    return ".".join([*base, *([node.module] if node.module else [])])


def imports(name: str, text: str, *, package: bool = False) -> set[str]:
    """The modules of this package that the module ``name`` imports when it is run.

    Sees ``import a.b``, ``from a import b`` where b is a module or a name of one, relative imports,
    attributes of an imported package (``dpmmd.train``), imports within functions, and, since
    importlib takes any string, every string that is the name of a module.
    """
    found: set[str] = set()
    bound: dict[str, str] = {}  # local name -> package
    nodes = list(_executed(ast.parse(text)))
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                found.add(alias.name)
                bound[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(name, node, package=package)
            for alias in node.names:
                found |= _resolved(source, alias.name) if path_of(source) else set()
                if path_of(f"{source}.{alias.name}"):
                    bound[alias.asname or alias.name] = f"{source}.{alias.name}"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    for node in nodes:
        if not isinstance(node, ast.Attribute):
            continue
        chain = _chain(node)
        source = bound.get(chain[0], "") if chain else ""
        for attribute in chain[1:]:
            if not path_of(source):
                break
            found |= _resolved(source, attribute)
            source = f"{source}.{attribute}"
    return {module for module in found if path_of(module)}


def dynamic(text: str) -> set[str]:
    """Names in a module by which it can import what no other name in it shows."""
    found: set[str] = set()
    for node in _executed(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names} & {*_IMPORTERS}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {str(node.module).split(".")[0]} & {*_IMPORTERS}
        elif isinstance(node, ast.Name):
            found |= {node.id} & {*_BUILTINS}
        elif isinstance(node, ast.Attribute):
            whole = ".".join(_chain(node))
            found |= {whole} & {"sys.modules", "builtins.__import__", "__builtins__.__import__"}
    return found


def handed_on(text: str) -> set[str]:
    """Modules of this package that a module uses as values, as getattr would need them."""
    nodes = list(_executed(ast.parse(text)))
    names = {
        alias.asname or alias.name.split(".")[0]
        for node in nodes
        if isinstance(node, ast.Import)
        for alias in node.names
        if alias.name.split(".")[0] == "dpmmd"
    }
    names |= {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "dpmmd"
        for alias in node.names
        if path_of(f"{node.module}.{alias.name}")
    }
    owners = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}
    return {
        n.id for n in nodes if isinstance(n, ast.Name) and n.id in names and id(n) not in owners
    }


def of_the_package(text: str) -> set[str]:
    """Attributes of ``dpmmd`` that a module uses."""
    nodes = ast.walk(ast.parse(text))
    return {
        node.attr
        for node in nodes
        if isinstance(node, ast.Attribute) and _chain(node.value) == ["dpmmd"]
    }


def reached(start: Sequence[str] = tuple(sorted(TRUSTED))) -> dict[str, str]:
    """Every module that these import, directly or not, with the one that imports it.

    The packages that a module lies in run before it, so theirs count as well. ``dpmmd`` itself,
    which imports every public module, is not followed.
    """
    found = dict.fromkeys(start, "")
    waiting = list(start)
    while waiting:
        name = waiting.pop()
        path = path_of(name)
        assert path is not None, name
        if name == "dpmmd":
            continue
        parts = name.split(".")
        packages = {".".join(parts[:i]) for i in range(1, len(parts))}
        package = path.name == "__init__.py"
        for other in packages | imports(name, path.read_text(), package=package):
            if other not in found:
                found[other] = name
                waiting.append(other)
    return found


def is_inside(name: str) -> bool:
    """Whether a module is on the list of what is not trusted."""
    return name in INSIDE or f"{name.rpartition('.')[0]}." in INSIDE


# ----------------------------------------------------------------------------- lines


def code_lines(path: Path) -> int:
    """Lines that are neither blank, nor comment, nor docstring."""
    text = path.read_text()
    if path.suffix != ".py":
        text = re.sub(r"/\*.*?\*/", "", text, flags=re.DOTALL)
        return sum(not line.strip().startswith("//") for line in text.splitlines() if line.strip())
    skipped: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(
            node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        ) and ast.get_docstring(node):
            skipped |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in skipped
        for number, line in enumerate(text.splitlines(), start=1)
    )


def parts() -> dict[str, list[Path]]:
    """The files of each part."""
    modules = {part: [path_of(name) for name in names] for part, names in MODULES.items()}
    assert all(path for paths in modules.values() for path in paths), modules
    found = {part: [p for p in paths if p] for part, paths in modules.items()}
    found |= {part: [ROOT / name for name in names] for part, names in NATIVE.items()}
    return dict(sorted(found.items(), key=lambda item: "CUDA" in item[0]))  # those last


def counted() -> dict[str, int]:
    """Lines of code of each part."""
    return {part: sum(map(code_lines, paths)) for part, paths in parts().items()}


def table() -> str:
    """For the document: lines are rounded up to the next hundred, with room for a few more."""
    lines = counted()
    rows = ["| part | files | lines of code, at most |", "| --- | --- | --- |"]
    for part, paths in parts().items():
        names = ", ".join(f"`{p.relative_to(ROOT).as_posix()}`" for p in paths)
        rows.append(f"| {part} | {names} | {-(-(lines[part] + HEADROOM) // 100) * 100:,} |")
    return "\n".join(rows)


def documented(text: str) -> dict[str, int]:
    """The lines that the document's table states, by part."""
    inner = text.split(BEGIN)[1].split(END)[0]
    found = re.findall(r"^\| (.+?) \| .* \| ([\d,]+) \|$", inner, flags=re.MULTILINE)
    return {part: int(number.replace(",", "")) for part, number in found}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.trusted", description=__doc__)
    parser.add_argument("--update", action="store_true", help="write docs/THREAT_MODEL.md")
    if not parser.parse_args(arguments).update:
        print("\n".join(f"{number:6,}  {part}" for part, number in counted().items()))
        return 0
    text = DOCUMENT.read_text()
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
