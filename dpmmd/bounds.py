"""The moments of a feature vector and the bounds on their norm, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence

BOUNDS = ("sphere", "ball", "sphere-per-tap", "ball-per-tap")
MOMENTS = ((1,), (2,), (1, 2))


def check_bound(
    moments: Sequence[int], bound: str, clip: float, joint_weight: float | None
) -> None:
    """Raises a ValueError that names the first of the arguments that is out of range."""
    if tuple(moments) not in MOMENTS:
        raise ValueError(f"moments={moments!r}: expected (1,), (2,) or (1, 2).")
    if bound not in BOUNDS:
        raise ValueError(f"bound={bound!r}: expected one of {', '.join(BOUNDS)}.")
    if not (math.isfinite(clip) and clip > 0):
        raise ValueError(f"clip={clip!r}: expected a finite number > 0.")
    if joint_weight is None:
        return
    if tuple(moments) != (1, 2) or bound.endswith("-per-tap"):
        raise ValueError(
            f"joint_weight={joint_weight!r} bounds both moments of all taps together, which needs "
            f"moments=(1, 2) and bound 'sphere' or 'ball'; got {tuple(moments)}, {bound!r}."
        )
    if not (math.isfinite(joint_weight) and joint_weight > 0):
        raise ValueError(f"joint_weight={joint_weight!r}: expected a finite number > 0.")
