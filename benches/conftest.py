"""Collects the rows of a run, prints the one table and, with --results, writes them to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benches import table
from benches.harness import Measure, kind, machine

_ROWS = pytest.StashKey[list[dict[str, Any]]]()
_MACHINE = pytest.StashKey[dict[str, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--results",
        metavar="FOLDER",
        help="write the rows of this run to FOLDER/<machine kind>.json (dpmmd benchmarks)",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []
    config.stash[_MACHINE] = machine()  # before the load is our own


@pytest.fixture
def measure(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Measure:
    return Measure(benchmark, request.config.stash[_ROWS])


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not (rows := config.stash[_ROWS]):
        return
    results = {"machine": config.stash[_MACHINE], "rows": rows}
    terminalreporter.write_line("")
    terminalreporter.write_line(table.text(results))
    if folder := config.getoption("results", default=None):
        path = Path(folder) / f"{kind(results['machine'])}.json"
        table.save(path, results)
        terminalreporter.write_line(f"written: {path}")
