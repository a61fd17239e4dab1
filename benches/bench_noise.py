"""The exact rounded Gaussian of a release."""

from __future__ import annotations

import numpy as np

from benches.harness import Measure
from dpmmd.privacy.noise import rounded_gaussian


def test_rounded_gaussian(measure: Measure) -> None:
    """A million variates at a release's noise level (sd about 2^32)."""
    count = 10_000 if measure.smoke else 1_000_000
    rng = np.random.default_rng(0)
    noise = measure(
        "release, exact noise",
        f"{count:,} variates",
        {
            "numpy, neither exact nor secret": lambda: np.rint(rng.standard_normal(count) * 4e9),
            "dpmmd": lambda: rounded_gaussian(count, 4.0e9),
        },
        ours="dpmmd",
        dtype="int64",
    )
    assert noise.std() > 3.9e9
