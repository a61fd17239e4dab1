"""What follows of a call from its tensors' shapes, strides, dtypes and devices, and is found once.

A loss that is called again and again with tensors alike would be checked and laid out anew at every
call, which costs more than the arithmetic of a small batch. A `Plan` keeps what came of it. Nothing
that depends on values or addresses belongs into a plan, and no plan keeps a tensor.

Plans are for calls that nothing traces: `find` is given tensors of PyTorch's own classes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from operator import attrgetter
from typing import Any, TypeVar

from torch import Tensor

from dpmmd.bounds import Bound

MOST = 64  # plans that are kept; the oldest goes first

T = TypeVar("T")

_PLAIN = frozenset({int, float, str, type(None)})

_shape, _stride = Tensor.size, Tensor.stride
_dtype, _device, _layout = map(attrgetter, ("dtype", "device", "layout"))


def signature(tensors: Sequence[Tensor]) -> tuple[Hashable, ...]:
    """Shapes, strides, dtypes, devices and layouts."""
    return (
        *map(_shape, tensors),
        *map(_stride, tensors),
        *map(_dtype, tensors),
        *map(_device, tensors),
        *map(_layout, tensors),
    )


class Plan:
    """What is known of the features and labels of a call, which fit each other and the bound.

    Attributes:
        num_classes, bound: of the call.
        kept: what the cores have made of it.
    """

    def __init__(self, seen: tuple[Hashable, ...], num_classes: int, bound: Bound) -> None:
        self._seen, self.num_classes, self.bound = seen, num_classes, bound
        self.kept: dict[Hashable, Any] = {}

    def of(self, features: Iterable[Tensor]) -> Planned:
        """Features that have met this plan."""
        planned = Planned(features)
        planned.plan = self
        return planned

    def again(self, features: Sequence[Tensor], labels: Tensor | None) -> Sequence[Tensor]:
        """The same features later; as they are, without this plan, if they are others by now.

        Hooks on saved tensors may bring them back in another layout.
        """
        seen = signature(features if labels is None else [*features, labels])
        return self.of(features) if seen == self._seen else features

    def keep(self, key: Hashable, value: T) -> T:
        """Puts into `kept` what follows from the plan; returns it."""
        self.kept[key] = value
        return value


class Planned(tuple[Tensor, ...]):
    """Features with their plan."""

    plan: Plan


def plan_of(features: Sequence[Tensor]) -> Plan | None:
    """The plan that features come with."""
    return features.plan if type(features) is Planned else None


_plans: dict[Hashable, Plan] = {}


def find(
    features: Sequence[Tensor],
    labels: Tensor | None,
    num_classes: int,
    options: Sequence[Any],
    checked: Callable[[], Bound],
) -> Plan | None:
    """The plan of a call, made if it is the first of its kind; None if it cannot have one.

    Args:
        features, labels, num_classes: of the call.
        options: the rest of what ``checked`` depends on.
        checked: refuses what does not fit, or returns the bound. A call that is refused has no
            plan, and is refused again.
    """
    if not _PLAIN.issuperset(map(type, options)):  # two that are equal must mean the same
        return None
    try:
        seen = signature(features if labels is None else [*features, labels])
    except RuntimeError:  # a tensor without strides
        return None
    key = (*seen, labels is None, num_classes, *options)
    plan = _plans.get(key)
    if plan is None:
        plan = Plan(seen, num_classes, checked())
        _make_room()
        _plans[key] = plan
    return plan


def _make_room() -> None:
    while len(_plans) >= MOST:
        with suppress(KeyError, RuntimeError, StopIteration):  # another thread was faster
            del _plans[next(iter(_plans))]
