"""The bound on a feature vector: which moments, how their norm is bounded, and what follows of it.

A `Bound` is the one value that says how an image's features f become the vector that is averaged
or summed. The public API takes its four parts as keywords (``moments``, ``bound``, ``clip``,
``joint_weight``) and folds them here, at the door; inside they travel together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

BOUNDS = ("sphere", "ball", "sphere-per-tap", "ball-per-tap")
MOMENTS = ((1,), (2,), (1, 2))
_PER_TAP = "-per-tap"


class _Statement(Protocol):
    """What says its bound in the keywords of the public API: a release's metadata, a recipe."""

    @property
    def moments(self) -> tuple[int, ...]: ...
    @property
    def bound(self) -> str: ...
    @property
    def clip(self) -> float: ...
    @property
    def joint_weight(self) -> float | None: ...


@dataclass(frozen=True)
class Bound:
    """Moments of a feature vector and the bound on their L2 norm.

    Constructing one checks nothing; `checked` is the door.

    Attributes:
        moments: ``(1,)``, ``(2,)`` or ``(1, 2)``.
        kind: one of BOUNDS.
        clip: c > 0, the radius.
        joint_weight: w of the vector (f, w f * f), bounded once; None: each moment on its own.
    """

    moments: tuple[int, ...] = (1,)
    kind: str = "sphere"
    clip: float = 1.0
    joint_weight: float | None = None

    @classmethod
    def checked(
        cls,
        moments: Sequence[int],
        bound: str,
        clip: float,
        joint_weight: float | None,
    ) -> Bound:
        """The bound that the public API's keywords describe.

        Raises:
            ValueError: names the first of the arguments that is out of range.
        """
        if tuple(moments) not in MOMENTS:
            raise ValueError(f"moments={moments!r}: expected (1,), (2,) or (1, 2).")
        if bound not in BOUNDS:
            raise ValueError(f"bound={bound!r}: expected one of {', '.join(BOUNDS)}.")
        if not (math.isfinite(clip) and clip > 0):
            raise ValueError(f"clip={clip!r}: expected a finite number > 0.")
        if joint_weight is not None:
            if tuple(moments) != (1, 2) or bound.endswith(_PER_TAP):
                raise ValueError(
                    f"joint_weight={joint_weight!r} bounds both moments of all taps together, "
                    "which needs moments=(1, 2) and bound 'sphere' or 'ball'; got "
                    f"{tuple(moments)}, {bound!r}."
                )
            if not (math.isfinite(joint_weight) and joint_weight > 0):
                raise ValueError(f"joint_weight={joint_weight!r}: expected a finite number > 0.")
        # Numbers that are equal may be of other types, which no core takes.
        canonical = MOMENTS[MOMENTS.index(tuple(moments))]
        weight = None if joint_weight is None else float(joint_weight)
        return cls(canonical, bound, float(clip), weight)

    @classmethod
    def of(cls, statement: _Statement) -> Bound:
        """The bound that a release's metadata or a recipe's [release] section states."""
        s = statement
        return cls(tuple(s.moments), s.bound, float(s.clip), s.joint_weight)

    @property
    def per_tap(self) -> bool:
        """Whether each tap is bounded on its own."""
        return self.kind.endswith(_PER_TAP)

    @property
    def ball(self) -> bool:
        """Whether vectors shorter than the radius stay as they are; else all have its length."""
        return self.kind.startswith("ball")

    @property
    def joint(self) -> bool:
        """Whether both moments are bounded as one vector."""
        return self.joint_weight is not None

    @property
    def weight(self) -> float:
        """What the second moment is multiplied with before it is bounded."""
        return 1.0 if self.joint_weight is None else self.joint_weight

    @property
    def bits(self) -> int:
        """The moments as the cores take them: 1, 2, or 3 for both."""
        return sum(self.moments)

    @property
    def norms(self) -> int:
        """N, how many norms are taken of an image (and block of taps)."""
        return 1 if self.joint else len(self.moments)

    def blocks(self, taps: int) -> int:
        """B, how many blocks of an encoder's taps have a norm of their own."""
        return taps if self.per_tap else 1

    def radius(self, taps: int) -> float:
        """The bound on each block of ``taps`` taps: c, or c / sqrt(L) of each tap."""
        return self.clip / math.sqrt(taps) if self.per_tap else self.clip

    def alone(self) -> tuple[Bound, ...]:
        """The bounds that a release applies one by one: this one if joint, else one a moment."""
        if self.joint:
            return (self,)
        return tuple(Bound((m,), self.kind, self.clip) for m in self.moments)
