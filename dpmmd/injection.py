"""Gradient injection: the loss's gradient is added where the encoder's ReLUs make theirs.

In plain autograd the mean embedding writes a gradient for every feature, which is read again to be
added to what the next layer sends back, and once more by the ReLU. Here each tap's ReLU is ours:

    forward     f = max(x + bias, 0) and its image's sums of f^2 and f^4, in one pass over x
    backward    dx = (upstream + E) [f > 0] in one pass, E the loss's gradient for this tap

The mean embedding leaves E in a `Slot` as a function of f and returns no gradient for the feature;
autograd still runs the ReLU after it, for the ReLU's output was its input. A slot belongs to one
forward pass and is reached through that pass's graph alone: what becomes of one pass concerns no
other. Taps that are not the output of a `dpmmd.encoders.Rectified` stage, such as pooled ones and
linear bottlenecks, take the plain path beside those that are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpmmd import backends
from dpmmd._contract.capturing import is_captured
from dpmmd._contract.protocol import Core, Step
from dpmmd._contract.slot import Slot
from dpmmd._contract.taps import DTYPES
from dpmmd._cores import CORES, named
from dpmmd._fastest import EMBEDDING, TABLE
from dpmmd._ops import embedding, matching
from dpmmd._ops.arguments import checked
from dpmmd.bounds import Bound
from dpmmd.encoders import Encoder

BACKENDS = ("auto", *(name for name, core in CORES.items() if core.slot(Bound(), 1) is not None))

_INJECTING = {core for row in TABLE if row.captured and row.injects for core in row.cores}


def check(backend: str) -> None:
    """Refuses a backend that has no injection: a ValueError."""
    origin, chosen = backends.requested(backend)
    if chosen not in BACKENDS:
        raise ValueError(
            f"inject=True with {origin}={chosen!r}: expected one of "
            f"{', '.join(map(repr, BACKENDS))}; leave inject out, or the backend."
        )


def wanted(encoder: Encoder, images: Tensor, backend: str) -> bool:
    """Whether a loss that leaves injection to the library injects: captured ones on Triton's core.

    Arguments are those of `mean_embedding`.
    """
    if torch.compiler.is_compiling() or not is_captured() or not encoder.rectified:
        return False
    chosen = backends.requested(backend)[1]
    if chosen != "auto":
        return chosen in _INJECTING
    if images.device.type != "cuda" or dtype_of(encoder, images) not in DTYPES:
        return False
    return backends.fastest_on_cuda(EMBEDDING, True, False, None)[1]


def mean_embedding(
    encoder: Encoder,
    images: Tensor,
    labels: Tensor | None = None,
    num_classes: int = 1,
    *,
    moments: Sequence[int] = (1,),
    bound: str = "sphere",
    clip: float = 1.0,
    joint_weight: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`dpmmd.functional.mean_embedding` of an encoder's features, differentiable in the images.

    Its gradient cannot be differentiated again.

    Args:
        encoder, images: as in ``encoder(images)``.
        labels, num_classes, moments, bound, clip, joint_weight: as there.
        backend: "torch" (any floating dtype and device), "cpu" or "triton"; see `dpmmd.backends`.

    Returns:
        ``means`` [M, K, D] and ``counts`` [K].

    Raises:
        ValueError: ``backend`` has no injection; as there and as ``encoder(images)``.
    """
    folded = Bound.checked(moments, bound, clip, joint_weight)
    core, features, slots = _features(encoder, images, folded, backend)
    folded, taps = checked(features, labels, num_classes, moments, bound, clip, joint_weight)
    return embedding.mean_embedding(core, taps, labels, num_classes, folded, slots)


def loss(
    encoder: Encoder,
    images: Tensor,
    labels: Tensor | None,
    num_classes: int,
    bound: Bound,
    target: Tensor,
    step: Step,
    backend: str = "auto",
) -> Tensor:
    """The loss of an encoder's features, as `dpmmd._ops.matching.loss` computes it of features.

    Args:
        encoder, images, backend: as in `mean_embedding`.
        labels, num_classes, bound, target, step: as there.
    """
    core, features, slots = _features(encoder, images, bound, backend)
    return matching.loss(core, features, labels, num_classes, bound, target, step, slots)


def _features(
    encoder: Encoder, images: Tensor, bound: Bound, backend: str
) -> tuple[Core, list[Tensor], list[Slot | None]]:
    """An encoder's features, and the core and the slots that it has met."""
    check(backend)
    core = _core(backend, encoder, images)
    slots = {name: core.slot(bound, encoder.dim) for name in encoder.rectified}
    features = encoder(images, slots)
    core.check("backend", features[0].device.type, features[0].dtype)
    return core, features, [slots.get(tap.name) for tap in encoder.taps]


def _core(backend: str, encoder: Encoder, images: Tensor) -> Core:
    """The core that has injection: of ``"auto"`` the fastest, by the encoder's dtype."""
    chosen = backends.requested(backend)[1]
    if chosen != "auto":
        return named(chosen)
    return backends.core("auto", images.device.type, dtype_of(encoder, images), inject=True)


def dtype_of(encoder: Encoder, images: Tensor) -> torch.dtype:
    """The dtype that an encoder computes in, which without parameters is that of the images."""
    return next((p.dtype for p in encoder.parameters()), images.dtype)


# What torch.compiler.disable marks, whose import would take seconds: slots are no part of a graph.
mean_embedding._torchdynamo_disable = True  # type: ignore[attr-defined]
loss._torchdynamo_disable = True  # type: ignore[attr-defined]
