"""The differentiable operations, stateless: class means of bounded features, and the squared MMD.

Both follow Harder et al. 2023 (arXiv 2205.12900), section 3: with the feature maps phi1 (the
features of an image at all taps, normalised) and phi2 (their squares, normalised), the squared MMD
of the kernel <phi(x), phi(x')> is the squared distance of the two mean embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dpmmd import backends
from dpmmd._contract.checks import brief
from dpmmd._contract.protocol import Step
from dpmmd._cores import named
from dpmmd._ops import embedding, estimator
from dpmmd._ops.arguments import check_target, checked


def mean_embedding(
    features: Sequence[Tensor],
    labels: Tensor | None = None,
    num_classes: int = 1,
    *,
    moments: Sequence[int] = (1,),
    bound: str = "sphere",
    clip: float = 1.0,
    joint_weight: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Class means of the bounded moments of per-image features, differentiable in the features.

    Per image, f is the concatenation of its taps (never formed), ``phi1 = B(f)``,
    ``phi2 = B(f * f)``, and B bounds the L2 norm:

    - ``"sphere"``: v c / \\|v\\| (the paper's);
    - ``"ball"``: v min(1, c / \\|v\\|);
    - ``"sphere-per-tap"``, ``"ball-per-tap"``: each of the L taps on its own, to c / sqrt(L).

    A vector that is zero or not finite becomes zero, with zero gradient. The gradient itself cannot
    be differentiated again.

    Args:
        features: L tensors [n, ...], one per tap, same floating dtype and device. Taps [n, C, H, W]
            are flattened in channels-last order (no copy where memory is channels-last).
        labels: int64 [n] with values in 0..num_classes-1, or None for one class.
        num_classes: K.
        moments: ``(1,)``, ``(2,)`` or ``(1, 2)``.
        bound: see above.
        clip: c > 0. With ``"sphere"`` and an encoder's features 1.0 is the paper's.
        joint_weight: None bounds each moment on its own. A number w > 0 bounds the vector
            (f, w f * f) once; needs ``moments=(1, 2)``.
        backend: see `dpmmd.backends`.

    Returns:
        ``means`` [M, K, D], zero where a class is absent, and ``counts`` [K], both in the features'
        dtype (float32 for half precision).

    Raises:
        TypeError, ValueError: an argument has the wrong type, shape, dtype or range.
    """
    folded, taps = checked(features, labels, num_classes, moments, bound, clip, joint_weight)
    first = taps[0]
    core = backends.core(backend, first.device.type, first.dtype)
    return embedding.mean_embedding(core, taps, labels, num_classes, folded)


def mmd_loss(means: Tensor, counts: Tensor, target: Tensor, *, backend: str = "auto") -> Tensor:
    """Squared MMD: the sum over moments and present classes of \\|target - means\\|^2.

    Args:
        means: [M, K, D], from `mean_embedding`.
        counts: [K]; classes with count 0 are left out.
        target: [M, K, D], e.g. ``release.target``.
        backend: see `dpmmd.backends`.

    Returns:
        Scalar, differentiable in ``means``.

    Raises:
        ValueError: shapes differ.
    """
    return _loss(means, counts, target, Step(), backend)


def ema_loss(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    *,
    estimate: Tensor,
    steps: Tensor,
    decay: float,
    update: bool = True,
    backend: str = "auto",
) -> Tensor:
    """<v, d> for d = target - means and its exponential moving average v over the steps.

    For classes that are present, ``estimate += (1 - decay) (d - estimate)``; v is the estimate
    divided by ``1 - decay^steps``. The gradient takes v as a constant.

    Args:
        means, counts, target, backend: as in `mmd_loss`.
        estimate: [M, K, D], zero at the start; changed in place.
        steps: [K] in the dtype of ``estimate``, zero at the start; changed in place.
        decay: in [0, 1).
        update: whether to move the state.

    Returns:
        Scalar, differentiable in ``means``.

    Raises:
        ValueError: shapes differ.
    """
    step = Step("ema", estimate, steps, decay=decay, update=update)
    return _loss(means, counts, target, step, backend)


def adam_loss(
    means: Tensor,
    counts: Tensor,
    target: Tensor,
    *,
    estimate: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    steps: Tensor,
    lr: float,
    numbers: int | None = None,
    update: bool = True,
    backend: str = "auto",
) -> Tensor:
    """<v, d> for d = target - means and a vector v that Adam trains on mean((v - d)^2).

    Harder et al. 2023, section 3.2, after Santos et al. 2019. Adam (betas 0.9, 0.999, eps 1e-8)
    takes one step for the classes that are present. The gradient takes v as a constant.

    Args:
        means, counts, target, backend: as in `mmd_loss`.
        estimate, first_moment, second_moment: [M, K, D], zero at the start; changed in place.
        steps: [K] in the dtype of ``estimate``, zero at the start; changed in place.
        lr: Adam's rate.
        numbers: over how many numbers the mean is taken; None for M K D. Give it where v is a part
            of a longer vector.
        update: whether to move the state.

    Returns:
        Scalar, differentiable in ``means``.

    Raises:
        ValueError: shapes differ.
    """
    states = estimate, steps, first_moment, second_moment
    step = Step("adam", *states, lr=lr, numbers=numbers, update=update)
    return _loss(means, counts, target, step, backend)


def mean_difference(means: Tensor, counts: Tensor, target: Tensor) -> Tensor:
    """``target - means`` [M, K, D], zero for classes with count 0; arguments as in `mmd_loss`."""
    check_target(means, counts, target)
    return torch.where(counts[None, :, None] > 0, target - means, 0)


def _loss(means: Tensor, counts: Tensor, target: Tensor, step: Step, backend: str) -> Tensor:
    """The loss of a step, by a core if all is float32 and the gradient is in the means alone."""
    check_target(means, counts, target)
    states = step.state().values()
    others = (counts, target, *states)
    for name, tensor in zip(("counts", "target", *["state"] * len(states)), others, strict=True):
        if tensor.device != means.device:
            raise ValueError(
                f"{name}: {brief(tensor)}, expected it on {means.device}, where the means are; "
                f"move it with .to({str(means.device)!r})."
            )
    odd = [t for t in (means, *others) if t.dtype != torch.float32]
    like = odd[0] if odd else means
    core = backends.core(backend, like.device.type, like.dtype)
    if odd or any(t.requires_grad for t in others):
        core = named("torch")
    return estimator.loss(core, means, counts, target, step)
