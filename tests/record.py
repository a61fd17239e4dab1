"""Runs the tests that a privacy report names and every injected fault, and records what passed.

    python -m tests.record

writes dpmmd/privacy/evidence.json, which is installed with the package (see
`dpmmd.privacy.evidence`), for exactly the code of this checkout. It refuses, and leaves no record,
where a test fails, is skipped or is not there, a fault survives, the code changes meanwhile, or
what runs is not this checkout or was compiled from other sources.
"""

from __future__ import annotations

import datetime
import hashlib
import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import dpmmd
from dpmmd.privacy import evidence
from dpmmd.privacy.evidence import EVIDENCE, MODULES, MUTATIONS

ROOT = Path(__file__).resolve().parent.parent


class Refused(Exception):
    """Nothing is recorded, and why."""


def native_sources(root: Path = ROOT) -> str:
    """sha256 over what the native module is compiled from, as CMakeLists.txt takes it."""
    patterns = ("CMakeLists.txt", "csrc/*.h", "csrc/*.cpp", "csrc/cpu/*.h", "csrc/cpu/*.cpp")
    patterns += ("csrc/cuda/*.h", "csrc/cuda/*.cu")
    names = sorted(p.relative_to(root).as_posix() for one in patterns for p in root.glob(one))
    lines = [f"{hashlib.sha256((root / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def refuse_other_code(root: Path = ROOT) -> None:
    """Raises Refused where what runs here is not the code of ``root``."""
    for name in (name for names in MODULES.values() for name in names):
        spec = importlib.util.find_spec(name)
        origin = None if spec is None else spec.origin
        if origin is None or not Path(origin).resolve().is_relative_to(root):
            raise Refused(f"{name} is {origin}, not of {root}: run `make install` there")
    if (found := evidence.native_digest()) != native_sources(root):
        raise Refused(
            f"dpmmd._native was compiled from other sources than csrc/ (has {found or 'none'}, "
            f"expected {native_sources(root)}): run `make install`"
        )


class _Tally:
    """A plugin that counts how often each test passed, and keeps what did not pass."""

    def __init__(self) -> None:
        self.passed: Counter[str] = Counter()
        self.wrong: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed":
            self.wrong.append(f"{report.nodeid} {report.outcome}")
        elif report.when == "call":
            self.passed[report.nodeid.split("[")[0]] += 1


def run_tests(tests: Sequence[str], root: Path = ROOT) -> dict[str, int]:
    """How often each of the tests passed; raises Refused unless all did, and were there."""
    tally = _Tally()
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--rootdir", str(root)]
    code = pytest.main([*options, *(str(root / test) for test in tests)], plugins=[tally])
    if tally.wrong or code != 0:
        raise Refused(f"pytest ended with {int(code)}: {'; '.join(tally.wrong) or 'see above'}")
    passed = {test: tally.passed[test] for test in tests}
    if missing := [test for test, n in passed.items() if not n]:
        raise Refused(f"not run: {', '.join(missing)}")
    return passed


def run_mutations(command: Sequence[str] = (sys.executable, "-m", "tests.mutations")) -> int:
    """How many injected faults were caught; raises Refused unless all were."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        last = ""
        for last in process.stdout:
            print(last, end="", flush=True)
    found = re.match(r"(\d+) of (\d+) mutations caught", last)
    if process.returncode or found is None or found[1] != found[2] or not int(found[1]):
        raise Refused(f"python -m tests.mutations ended with {process.returncode}: {last.strip()}")
    return int(found[1])


def main() -> int:
    """0 if all of it passed and is on record."""
    evidence.RECORD.unlink(missing_ok=True)  # of other code, or of a run that this one replaces
    try:
        refuse_other_code()
        before = evidence.python_digest(), evidence.native_digest()
        caught = run_mutations()
        passed = run_tests([test for _, test in EVIDENCE if test != MUTATIONS])
        refuse_other_code()
        if (evidence.python_digest(), evidence.native_digest()) != before:
            raise Refused("the trusted files changed while the tests ran")
    except Refused as error:
        print(f"not recorded: {error}")
        return 1
    record: dict[str, Any] = {
        "version": dpmmd.__version__,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "python_sha256": before[0],
        "native_sha256": before[1],
        "tests": {**passed, MUTATIONS: 1},
        "mutations": caught,
    }
    evidence.RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="ascii")
    print(f"recorded in {evidence.RECORD}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
