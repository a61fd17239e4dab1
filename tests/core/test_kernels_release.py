"""A whole release on Triton's core, under its interpreter: the integers of the definition."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dpmmd import backends
from dpmmd._cores import cpu
from tests.conftest import images, no_noise, nonnegative_encoder, small_encoder
from tests.core import interpreted
from tests.core.interpreted import small_blocks  # noqa: F401

RELEASES: dict[str, dict[str, Any]] = {
    "unlabelled": {"num_classes": None},
    "two moments": {"num_classes": 3, "moments": (1, 2), "bound": "ball", "clip": 1.7},
    "joint": {"num_classes": 3, "moments": (1, 2), "joint_weight": 0.3, "bound": "ball"},
    "hybrid": {"num_classes": 3, "shared_taps": 1, "bound": "sphere-per-tap"},
    "selection": {"num_classes": 3, "selection": nonnegative_encoder()},
    "groups": {"num_classes": 3, "group_by": "patient"},
}

if not interpreted.ACTIVE:
    test_interpreted = interpreted.whole(__file__)
else:
    import dpmmd

    pytestmark = pytest.mark.usefixtures("small_blocks")

    @pytest.mark.parametrize("options", RELEASES.values(), ids=RELEASES)
    def test_same_bits_on_every_core(options: dict[str, Any]) -> None:
        x, y = images(13)
        source: Any = (x, y, np.arange(13) // 2) if "group_by" in options else (x, y)
        found = {}
        for backend in ("torch", "triton", *(["cpu"] if cpu.missing is None else [])):
            with backends.use(backend):
                found[backend] = dpmmd.release(
                    source,
                    small_encoder(),
                    epsilon=1.0,
                    delta=1e-9,
                    adjacency="replace-one",
                    batch_size=5,
                    progress=False,
                    insecure_test_noise=no_noise,
                    **options,
                )
        truth = found.pop("torch")
        assert truth.sums.any()
        assert (truth.selection is None) == ("selection" not in options)
        for backend, release in found.items():
            assert release.metadata.array_sha256 == truth.metadata.array_sha256, backend
            assert torch.equal(release.sums, truth.sums)
