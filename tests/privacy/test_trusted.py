"""What a release's guarantee rests on stays small, known, and apart from training."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dpmmd.privacy.evidence import EVIDENCE, NATIVE
from tests import trusted
from tests.trusted import DYNAMIC, INSIDE, ROOT, TRUSTED, path_of

# Hard limits: a part that passes its limit wants a reason, and not a larger number alone.
LIMITS = {
    "the mechanism": 1700,  # its steps are functions with signatures; 140 are the rule of modes
    "its files: releases, partial sums, the ledger": 1450,  # half: messages, checks of files
    "which core sums, and its only caller": 650,
    "sums on the CPU, in C++": 1050,
    "sums on a CUDA device, in CUDA C++: the caller": 370,
    "sums on a CUDA device, in CUDA C++": 1000,
    "sums on a CUDA device, in Triton": 1450,
}


def test_the_trusted_code_is_small() -> None:
    lines = trusted.counted()
    assert lines.keys() == LIMITS.keys()
    assert {part: n for part, n in lines.items() if n > LIMITS[part]} == {}


def test_the_threat_model_states_how_small() -> None:
    """After `python -m tests.trusted --update`; a few lines more or less change nothing."""
    text = trusted.DOCUMENT.read_text()
    stated = trusted.documented(text)
    found = trusted.counted()
    assert stated.keys() == found.keys(), "python -m tests.trusted --update"
    for part, lines in found.items():
        assert lines <= stated[part] <= lines + 250, f"{part}: python -m tests.trusted --update"
    for paths in trusted.parts().values():
        for path in paths:
            assert f"`{path.relative_to(ROOT).as_posix()}`" in text, path


def test_everything_that_the_trusted_code_reaches_is_known() -> None:
    """Trusted and counted, or on the list of what runs inside the boundary, with a reason."""
    found = trusted.reached()
    unknown = {n: by for n, by in found.items() if n not in TRUSTED and not trusted.is_inside(n)}
    assert unknown == {}  # name: what imports it
    for name in INSIDE:  # no reason outlives its module
        assert name in found or any(other.startswith(name) for other in found), name
    assert not any(trusted.is_inside(name) for name in TRUSTED)
    # Nor does a release train, generate or evaluate.
    for name in ("train", "nn", "functional", "generators", "evaluate", "run", "cli", "injection"):
        assert f"dpmmd.{name}" not in found
        assert path_of(f"dpmmd.{name}") is not None


def test_nothing_is_imported_in_ways_that_cannot_be_seen() -> None:
    texts = {name: trusted.path_of(name).read_text() for name in trusted.reached()}  # type: ignore[union-attr]
    assert {name for name, text in texts.items() if trusted.dynamic(text)} == DYNAMIC.keys()
    for name in TRUSTED:
        assert trusted.handed_on(texts[name]) == set(), name
        assert trusted.of_the_package(texts[name]) <= {"__version__"}, name


@pytest.mark.parametrize(
    "line",
    [
        "import dpmmd.train",
        "import dpmmd.train as t",
        "from dpmmd import train",
        "from dpmmd import backends, train as t",
        "from dpmmd.train import train",
        "from .. import train",
        "from ..train import train",
        "def f():\n    from dpmmd import train",
        "import dpmmd\ndef f():\n    dpmmd.train.train()",
        "import dpmmd as d\nx = d.train",
        "import importlib\nimportlib.import_module('dpmmd.train')",
        "X = {'a': 'dpmmd.train'}",
        "if not TYPE_CHECKING:\n    import dpmmd.train",
        "if TYPE_CHECKING:\n    pass\nelse:\n    import dpmmd.train",
    ],
)
def test_every_way_to_import_training_is_seen(line: str) -> None:
    assert "dpmmd.train" in trusted.imports("dpmmd.privacy.sums", line)


def test_names_of_a_package_lead_to_their_modules() -> None:
    seen = trusted.imports("dpmmd.privacy.x", "from dpmmd.data import open_source")
    assert {"dpmmd.data", "dpmmd.data.open"} <= seen
    assert "dpmmd.privacy" in trusted.imports("dpmmd.privacy.x", "from dpmmd import release")
    line = "from .arrays import ArraySource"
    assert "dpmmd.data.arrays" in trusted.imports("dpmmd.data", line, package=True)
    assert "dpmmd.data.arrays" in trusted.imports("dpmmd.data.open", line)
    typed = "if TYPE_CHECKING:\n    from dpmmd import train\n"
    assert trusted.imports("dpmmd.privacy.x", typed) == set()


@pytest.mark.parametrize(
    "line",
    [
        "from importlib import import_module as im",
        "import importlib as i",
        "x = __import__",
        "exec('import dpmmd.train')",
        "import sys\nsys.modules['dpmmd.' + 'train']",
        "import runpy",
    ],
)
def test_hidden_imports_are_seen(line: str) -> None:
    assert trusted.dynamic(line)


def test_a_package_that_is_handed_on_is_seen() -> None:
    assert trusted.handed_on("import dpmmd\ngetattr(dpmmd, 'tr' + 'ain')") == {"dpmmd"}
    assert trusted.handed_on("from dpmmd import data as d\nvars(d)") == {"d"}
    assert trusted.handed_on("import dpmmd\nprint(dpmmd.__version__)") == set()


def test_the_native_code_that_certifies_is_counted_whole() -> None:
    """Every file that one of them includes is one of them."""
    files = {name for names in NATIVE.values() for name in names}
    assert "csrc/cpu/bounded_sums.cpp" in files
    for name in files:
        for other in re.findall(r'^#include "(.+)"', (ROOT / name).read_text(), flags=re.MULTILINE):
            included = (ROOT / name).parent.joinpath(other).resolve().relative_to(ROOT)
            if not included.is_relative_to("csrc/tests"):  # compiled for tests alone
                assert included.as_posix() in files, f"{name} includes {other}"


def test_lines_are_counted_without_comments(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text(
        '"""Two\nlines."""\n\n# one\nasync def f():\n    """Doc."""\n    return 1  # a\n'
    )
    assert trusted.code_lines(path) == 2
    path = tmp_path / "x.cpp"
    path.write_text("// one\n/* two\n   three */\n\nint x;  // four\n#include <x>\n")
    assert trusted.code_lines(path) == 2


def test_the_tests_that_the_report_names_are_there() -> None:
    for _, test in EVIDENCE:
        file, name = test.split("::")
        assert re.search(rf"^def {name}\(", (ROOT / file).read_text(), flags=re.MULTILINE), test
