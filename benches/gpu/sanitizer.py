"""A short selection of the checks under compute-sanitizer, in processes of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence

TOOLS = ("memcheck", "racecheck")
FOUND = 86  # the status it ends with where it found errors
# Every tensor has memory of its own, so that reading past its end is not reading its neighbour.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def sanitize(
    arguments: Sequence[str],
    left: Callable[[], float],
    tool: str = "compute-sanitizer",
) -> tuple[dict[str, str], list[str]]:
    """Runs ``python -m benches.gpu ARGUMENTS --part sanitize`` under each of TOOLS, at once.

    Args:
        arguments: which device, which sizes.
        left: how many seconds there are.
        tool: the program.

    Returns:
        What each found, in words, and which of them found errors.
    """
    path = shutil.which(tool)
    if path is None:
        return dict.fromkeys(TOOLS, f"skipped: {tool} is not installed"), []
    running = {}
    for name in TOOLS:
        command = [path, "--tool", name, "--error-exitcode", str(FOUND)]
        if name == "memcheck":
            command += ["--report-api-errors", "no"]
        command += [sys.executable, "-m", "benches.gpu", *arguments, "--part", "sanitize"]
        output = tempfile.TemporaryFile()  # noqa: SIM115
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT
        )
        running[name] = process, output
    found, errors = {}, []
    for name, (process, output) in running.items():
        try:
            code: int | None = process.wait(timeout=max(0.01, left()))
        except subprocess.TimeoutExpired:
            code = None
            process.kill()
            process.wait()
        output.seek(0)
        text = output.read().decode(errors="replace")
        output.close()
        found[name], bad = verdict(code, text)
        if bad:
            errors.append(f"{name}: {found[name]}")
    return found, errors


def verdict(code: int | None, text: str) -> tuple[str, bool]:
    """What a run's status (None: stopped) and output mean, and whether that is an error of ours."""
    checks = len(re.findall(r'^\{"done"', text, re.MULTILINE))
    refused = re.search(r"Device not supported|not supported on|error 999|No attachable", text)
    if refused and code != 0:
        return f"skipped: it refused the device ({refused[0]})", False
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", text)
    first = re.search(r"========= ((?:Invalid|Error:|Warning:|Misaligned|Race).*)", text)
    if code == FOUND or (summary and int(summary[1])) or (code is None and first):
        count = summary[1] if summary else "some"
        return f"{count} errors, the first: {first[1] if first else 'not shown'}", True
    if code is None:
        return f"stopped for want of time after {checks} checks, none of them in error", False
    if code == 0 and checks:
        return f"{checks} checks, no errors", False
    if code == 1 and checks:
        return f"{checks} checks, some of them fail under it", True
    return f"skipped: it ended with status {code}", False
