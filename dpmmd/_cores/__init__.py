"""The implementations of the operations, one module each, of `dpmmd._contract.protocol.Core`."""

from dpmmd._contract.protocol import Core
from dpmmd._cores import cuda, matching, plain, triton

CORES: dict[str, Core] = {
    core.name: core for core in (plain.CORE, matching.CORE, triton.CORE, cuda.CORE)
}


def named(name: str) -> Core:
    """The core of a name in `dpmmd.backends.BACKENDS` other than ``"auto"``."""
    return CORES[name]
