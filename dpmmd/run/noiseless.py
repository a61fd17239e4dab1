"""Releases without noise, for comparison: ``epsilon = inf``, stamped NOT PRIVATE."""

from __future__ import annotations

import math

import numpy as np

from dpmmd.privacy import Release

# What they are calibrated to: accounting takes nothing larger. They are stamped like every release
# made with test noise, and their reports promise nothing.
NO_NOISE_EPSILON = 9999.0


def no_noise(n: int, sd: float) -> np.ndarray:
    """In place of the sampler, for ``epsilon = inf``: nothing is added, NOT PRIVATE."""
    return np.zeros(n, np.int64)


def stated_epsilon(released: Release) -> float:
    """The epsilon of a release; inf where there is no noise."""
    m = released.metadata
    return math.inf if not m.private and m.epsilon == NO_NOISE_EPSILON else m.epsilon
