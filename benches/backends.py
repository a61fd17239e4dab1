"""The library's backends as the benchmarks know them; no other file of benches/ spells a name."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

PLAIN = "torch"  # the definition: no competitor, and no CUDA graph holds it
KERNELS = "triton"  # its kernels are timed one by one, and their launch parameters searched
ON_CPU = (PLAIN, "cpu")
ON_GPU = (PLAIN, KERNELS, "cuda")


def compiled(names: Iterable[str]) -> list[str]:
    """Those that are not plain torch."""
    return [name for name in names if name != PLAIN]


def on_this_cpu() -> list[str]:
    """Those of this build that run on a CPU; the last is the library's choice there."""
    return usable(ON_CPU)[0]


def usable(
    names: Iterable[str],
    device: torch.device | str = "cpu",
    describe: Callable[[Exception], str] = str,
) -> tuple[list[str], dict[str, str]]:
    """Which of these run on the device, in their order; why the others do not."""
    from dpmmd import functional

    found, missing = [], {}
    for name in names:
        try:
            functional.mean_embedding([torch.ones(2, 8, device=device)], backend=name)
            found.append(name)
        except Exception as error:  # a compiler may raise anything
            missing[name] = describe(error)
    return found, missing
