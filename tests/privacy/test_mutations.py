"""The harness that injects faults: it cannot rot, and every fault is caught by its test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutations import MUTATIONS, ROOT, Edit, Mutation, apply, caught


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m.name)
def test_a_mutation_still_fits_the_code(mutation: Mutation) -> None:
    """What it replaces occurs once, what it makes is Python, and its tests are there."""
    texts: dict[str, str] = {}
    for edit in mutation.edits:
        text = texts.get(edit.file) or (ROOT / edit.file).read_text()
        assert text.count(edit.old) == 1, f"{edit.file}: not once, but {text.count(edit.old)} times"
        texts[edit.file] = text.replace(edit.old, edit.new)
    for file, text in texts.items():
        compile(text, file, "exec")
    assert mutation.tests
    for test in mutation.tests:
        file, name = test.split("[")[0].split("::")
        assert f"def {name}(" in (ROOT / file).read_text(), test


def test_names_are_unique() -> None:
    assert len({m.name for m in MUTATIONS}) == len(MUTATIONS)


def test_what_counts_as_caught() -> None:
    tests = ("tests/a.py::one", "tests/a.py::two")
    lines = "FAILED tests/a.py::one[x - y] - assert 1 == 2\nFAILED tests/a.py::two\n"
    assert caught(1, lines, tests) is None
    assert "SURVIVED" in str(caught(0, "", tests))
    assert caught(1, "FAILED tests/a.py::two - boo\n", tests) == "SURVIVED tests/a.py::one"
    assert "not by the fault" in str(caught(1, f"{lines}E  NameError: x\n", tests))
    assert "ended with 2" in str(caught(2, "", tests))


def test_edits_are_exact(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("a = 1\nb = 1\n")
    with pytest.raises(Exception, match="has 2 times"):
        apply(tmp_path, [Edit("x.py", "= 1", "= 2")])
    before = apply(tmp_path, [Edit("x.py", "a = 1", "a = 2"), Edit("x.py", "b = 1", "b = 2")])
    assert path.read_text() == "a = 2\nb = 2\n"
    assert before == {path: "a = 1\nb = 1\n"}


@pytest.mark.long
def test_every_mutation_is_caught() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.mutations"], cwd=ROOT, capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{len(MUTATIONS)} of {len(MUTATIONS)} mutations caught" in done.stdout
