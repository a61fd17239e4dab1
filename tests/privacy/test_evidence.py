"""A report cites tests only where they ran on exactly the code that is installed."""

from __future__ import annotations

import importlib.machinery
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import dpmmd
from dpmmd.privacy import Release, evidence, report
from dpmmd.privacy.evidence import EVIDENCE, MODULES, MUTATIONS
from tests import record

NOBODY = "No run of the tests is on record for exactly this code."


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the record is looked for; there is none."""
    monkeypatch.setattr(evidence, "RECORD", tmp_path / "evidence.json")
    monkeypatch.setattr(evidence, "native_digest", lambda: "c" * 64)
    return tmp_path / "evidence.json"


def write(file: Path, **changes: Any) -> None:
    """A record of the code that runs here."""
    found = {
        "version": dpmmd.__version__,
        "date": "2025-01-31",
        "python_sha256": evidence.python_digest(),
        "native_sha256": "c" * 64,
        "tests": {test: 2 for _, test in EVIDENCE},
        "mutations": 99,
    }
    file.write_text(json.dumps({**found, **changes}))


def test_without_a_record_no_test_is_cited(file: Path, released: Release) -> None:
    f = report.facts(released)
    assert f["evidence"] == []
    assert f["tested"].startswith(NOBODY)
    assert "python -m tests.record" in f["tested"]
    assert "dpmmd audit" in f["tested"]
    text = released.report()
    assert NOBODY in text
    assert "tests/" not in text


def test_a_record_of_this_code_is_cited(file: Path, released: Release) -> None:
    write(file)
    f = report.facts(released)
    assert [(e["what"], e["test"], e["passed"]) for e in f["evidence"]] == [
        (what, test, 2) for what, test in EVIDENCE
    ]
    passed = f"{2 * len(EVIDENCE)} tests passed, 99 injected faults were caught"
    assert passed in f["tested"]
    assert "2025-01-31" in f["tested"]
    text = released.report()
    assert passed in text
    for what, test in EVIDENCE:
        assert f"- {what} (`{test}`)" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"python_sha256": "0" * 64},
        {"native_sha256": "0" * 64},
        {"version": "0.0.1"},
        {"tests": {test: 2 for _, test in EVIDENCE[1:]}},
        {"tests": {**{test: 2 for _, test in EVIDENCE}, EVIDENCE[3][1]: 0}},
        {"tests": ["a"]},
        {"mutations": None},
    ],
    ids=str,
)
def test_a_record_of_other_code_is_not_cited(
    changes: dict[str, Any], file: Path, released: Release
) -> None:
    write(file, **changes)
    f = report.facts(released)
    assert f["evidence"] == []
    assert f["tested"].startswith(NOBODY)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"tests": {}}'])
def test_a_damaged_record_is_none(content: bytes, file: Path) -> None:
    file.write_bytes(content)
    assert evidence.record() is None


def test_a_release_of_another_version_cites_nothing(file: Path, released: Release) -> None:
    """The tests ran on this code, and other code made the release."""
    write(file)
    other = released.metadata.model_copy(update={"version": "0.0.1"})
    f = report.facts(Release(released.sums, released.counts, other))
    assert f["evidence"] == []
    assert "'0.0.1'" in f["tested"]
    assert "no run of the tests is on record" in f["tested"]


def test_every_trusted_file_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = evidence.python_digest()
    assert before is not None
    find = evidence.importlib.util.find_spec
    for name in (name for names in MODULES.values() for name in names):
        spec = find(name)
        assert spec is not None
        assert spec.origin is not None
        changed = tmp_path / "changed.py"
        changed.write_bytes(Path(spec.origin).read_bytes() + b"\n")
        other = importlib.machinery.ModuleSpec(name, None, origin=str(changed))
        with monkeypatch.context() as patch:
            patch.setattr(
                evidence.importlib.util,
                "find_spec",
                lambda n, name=name, other=other: other if n == name else find(n),
            )
            assert evidence.python_digest() not in (None, before)
            changed.unlink()
            assert evidence.python_digest() is None
    assert evidence.python_digest() == before


def test_the_command_line_says_so_too(file: Path, released: Release, tmp_path: Path) -> None:
    from dpmmd.cli import app

    path = str(released.save(tmp_path / "r.safetensors"))
    runner = CliRunner()
    assert NOBODY in " ".join(runner.invoke(app, ["privacy", path]).output.split())
    write(file)
    shown = " ".join(runner.invoke(app, ["privacy", path]).output.split())
    assert "99 injected faults were caught" in shown
    assert EVIDENCE[0][0] in shown


# ----------------------------------------------------------------------------- the recorder


@pytest.fixture
def recorder(file: Path, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A recorder whose tests all pass at once, on a checkout that is in order."""
    monkeypatch.setattr(record, "refuse_other_code", lambda: None)
    monkeypatch.setattr(record, "run_mutations", lambda: 7)
    monkeypatch.setattr(record, "run_tests", lambda tests: dict.fromkeys(tests, 3))
    return monkeypatch


def test_what_passed_is_recorded_and_cited(
    file: Path, recorder: pytest.MonkeyPatch, released: Release
) -> None:
    assert record.main() == 0
    found = json.loads(file.read_text())
    assert found["mutations"] == 7
    assert found["tests"] == {test: 1 if test == MUTATIONS else 3 for _, test in EVIDENCE}
    assert len(found["date"]) == len("2025-01-31")  # a day, no time
    assert "7 injected faults were caught" in report.facts(released)["tested"]


@pytest.mark.parametrize("name", ["refuse_other_code", "run_mutations", "run_tests"])
def test_what_failed_is_not_recorded_and_takes_the_last_record_back(
    name: str, file: Path, recorder: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: object) -> None:
        raise record.Refused("for a reason")

    write(file)
    recorder.setattr(record, name, refuse)
    assert record.main() == 1
    assert not file.exists()
    assert "not recorded: for a reason" in capsys.readouterr().out


def test_code_that_changes_meanwhile_is_not_recorded(
    file: Path, recorder: pytest.MonkeyPatch
) -> None:
    digests = iter(["a", "b"])
    recorder.setattr(evidence, "python_digest", lambda: next(digests))
    assert record.main() == 1
    assert not file.exists()


TESTS = {
    "passes": ("def test_x():\n    pass\n", None),
    "fails": ("def test_x():\n    assert False\n", "test_x failed"),
    "is skipped": ("import pytest\n\ndef test_x():\n    pytest.skip()\n", "test_x skipped"),
    "is not there": ("", "pytest ended with"),
    "fails once": (
        "import pytest\n\n@pytest.mark.parametrize('i', [1, 2])\n"
        "def test_x(i):\n    assert i == 1\n",
        "test_x[2] failed",
    ),
    "fails before": (
        "import pytest\n\n@pytest.fixture\ndef f():\n    1 / 0\n\ndef test_x(f):\n    pass\n",
        "test_x failed",
    ),
    "cannot be read": ("import nothing_of_this_name\n", "pytest ended with"),
}


@pytest.mark.parametrize(("text", "refused"), TESTS.values(), ids=TESTS)
def test_every_test_must_pass(text: str, refused: str | None, tmp_path: Path) -> None:
    name = f"test_of_a_record_{abs(hash(text))}.py"
    (tmp_path / name).write_text(text)
    if refused is None:
        assert record.run_tests([f"{name}::test_x"], tmp_path) == {f"{name}::test_x": 1}
        return
    with pytest.raises(record.Refused) as found:
        record.run_tests([f"{name}::test_x"], tmp_path)
    assert refused in str(found.value)


@pytest.mark.parametrize(
    ("line", "code", "caught"),
    [
        ("5 of 5 mutations caught, 3 s", 0, 5),
        ("4 of 5 mutations caught, 3 s", 1, None),
        ("4 of 5 mutations caught, 3 s", 0, None),
        ("5 of 5 mutations caught, 3 s", 1, None),
        ("0 of 0 mutations caught, 0 s", 0, None),
        ("unmutated, the named tests do not pass:", 1, None),
        ("", 0, None),
    ],
)
def test_every_mutation_must_be_caught(line: str, code: int, caught: int | None) -> None:
    command = [sys.executable, "-c", f"import sys; print({line!r}); sys.exit({code})"]
    if caught is not None:
        assert record.run_mutations(command) == caught
        return
    with pytest.raises(record.Refused, match=r"tests\.mutations ended with"):
        record.run_mutations(command)


def test_other_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(record.Refused, match="make install"):
        record.refuse_other_code(tmp_path)  # what is imported does not lie there
    monkeypatch.setattr(record, "MODULES", {})
    monkeypatch.setattr(evidence, "native_digest", record.native_sources)
    record.refuse_other_code()
    monkeypatch.setattr(evidence, "native_digest", lambda: "0" * 64)
    with pytest.raises(record.Refused, match="compiled from other sources"):
        record.refuse_other_code()


def test_the_native_digest_is_over_all_sources(tmp_path: Path) -> None:
    for name in ("csrc/cpu/a.cpp", "csrc/b.h", "CMakeLists.txt", "csrc/tests/driver.cpp"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    digests = {record.native_sources(tmp_path)}
    (tmp_path / "csrc/cpu/a.cpp").write_text("x")
    digests.add(record.native_sources(tmp_path))
    (tmp_path / "csrc/cuda").mkdir()
    (tmp_path / "csrc/cuda/c.cu").write_text("x")
    digests.add(record.native_sources(tmp_path))
    assert len(digests) == 3
    (tmp_path / "csrc/tests/driver.cpp").write_text("x")  # not in the module
    assert record.native_sources(tmp_path) in digests
