"""Class sums, the "adam" estimator and row dots in one pass, against a kernel for each."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

from benches.gpu.measure import Call, sets_of
from benches.gpu.probe import taps
from benches.gpu.probe.rungs import Rungs
from benches.gpu.probe.variants import OURS, patched
from benches.shapes import Case
from dpmmd._contract.protocol import Core
from dpmmd._cores import named

ONE_PASS = "loss, forward + backward, replayed"
SEPARATE = "a kernel for each"


def one_pass(rungs: Rungs) -> None:
    """Whether the kernels that do more in one pass are faster, and of a copy (5).

    The bytes are those of the one pass: features are read by the norms, by the pass and by the
    gradient, which writes as many; target and state are read, the state is written, and the
    gradient reads the estimate.
    """
    for size in rungs.sizes.deep:
        like = taps.case(rungs, size)
        count = sets_of(like.feature_bytes, rungs.device.cache_bytes)
        least = count * (4 * like.feature_bytes + 8 * like.d_vector_bytes)
        for core in rungs.cores:
            variants = {f"{core}, {OURS}": partial(_loss, rungs, like, core, count, False)}
            if _has_one_pass(core):
                variants[f"{core}, {SEPARATE}"] = partial(_loss, rungs, like, core, count, True)
            shape = f"{like.shape}, {count} of them"
            rungs(ONE_PASS, shape, like.dtype_name, variants, least=least)


def _has_one_pass(core: str) -> bool:
    return type(named(core)).match is not Core.match


def _loss(rungs: Rungs, like: Case, core: str, count: int, separate: bool) -> Call:
    """The loss of so many sets of features, which together exceed the L2."""
    calls = [taps.loss(like, core, rungs.device.device, seed) for seed in range(count)]

    def call() -> None:
        with _a_kernel_each(type(named(core))) if separate else contextlib.nullcontext():
            for loss in calls:
                loss()

    return call


@contextlib.contextmanager
def _a_kernel_each(core: Any) -> Iterator[None]:
    """Within the block the core does what every core does by itself."""
    with patched(core, "match", Core.match), patched(core, "match_backward", Core.match_backward):
        yield
