"""The cores of the library against each other: which one is launched, which one is kept."""

from __future__ import annotations

from functools import partial

from benches.gpu import operations
from benches.gpu.probe import taps
from benches.gpu.probe.rungs import Rungs

LAUNCHED = "loss, forward + backward, launched"


def cores(rungs: Rungs) -> None:
    """The loss launched, by bytes of features (2); each operation as a graph (9).

    `auto` takes one core below a number of bytes and the other one above: the crossing is where
    their lines meet. An operation in which a core is never the faster one can be deleted.
    """
    for size in rungs.sizes.crossing:
        like = taps.case(rungs, size)
        variants = {
            core: partial(taps.loss, like, core, rungs.device.device) for core in rungs.cores
        }
        given = LAUNCHED, like.shape, like.dtype_name, variants
        rungs(*given, graph=False, features=like.feature_bytes)
    operations.cores(rungs.measure, rungs.sizes.scale, rungs.cores, set())
