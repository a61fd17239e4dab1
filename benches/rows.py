"""Benchmarks whose rows are processes of their own, kept in a file and shown in a document."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class Kept:
    """The results of this kind of machine, in a folder of results."""

    def __init__(self, folder: Path) -> None:
        from benches.harness import kind, machine  # PyTorch, which a table does not need

        here = machine()
        self.path = folder / f"{kind(here)}.json"
        self.path.parent.mkdir(exist_ok=True)
        self.content: dict[str, Any] = {"machine": here, "rows": []}
        if self.path.exists():
            self.content = json.loads(self.path.read_text())

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]  # type: ignore[no-any-return]

    def write(self) -> None:
        self.path.write_text(json.dumps(self.content, indent=1) + "\n")

    def measure(
        self,
        module: str,
        wanted: Mapping[Any, tuple[Any, ...]],
        key: Callable[[Row], Any],
        table: Callable[[list[Row]], str],
    ) -> None:
        """Measures what is missing, in the order of ``wanted``.

        Args:
            module: prints a row as JSON when it is called with ``--row`` and arguments.
            wanted: those arguments, by the row's key.
            key: of a row.
            table: of rows, as Markdown; printed row by row.
        """
        order = list(wanted)
        done = {key(row) for row in self.rows}
        for each in order:
            if each in done:
                continue
            command = [sys.executable, "-m", module, "--row", *map(str, wanted[each])]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
            if run.returncode:
                raise SystemExit(run.returncode)
            found = json.loads(run.stdout.splitlines()[-1])
            self.rows.append(found)
            self.rows.sort(key=lambda row: order.index(key(row)))
            self.write()
            print(table([found]).splitlines()[-1], flush=True)


def between(text: str, begin: str, end: str, body: str) -> str:
    """The text with what stands between two lines made anew."""
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n{body}\n{end}{rest.partition(end)[2]}"


def update(document: Path, begin: str, end: str, body: str) -> None:
    """`between`, in a file."""
    document.write_text(between(document.read_text(), begin, end, body))
