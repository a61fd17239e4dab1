"""Freed memory that stays with the process."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

SCRIPT = """
import re
import torch
from dpmmd._memory import keep_freed_memory, return_freed_memory

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) >> 10

{call}
before = resident()
block = torch.ones(50 << 20)
assert resident() - before > 190
del block
print(resident() - before)
return_freed_memory()
assert resident() - before < 20
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_stays() -> None:
    def kept(call: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT.format(call=call)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    assert kept("") < 20
    assert kept("keep_freed_memory()") > 190
