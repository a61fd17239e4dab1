"""What a tap's ReLU and the mean embedding tell each other in one pass; see `dpmmd.injection`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from dpmmd._contract.taps import rows_of
from dpmmd.bounds import Bound


class Slot:
    """The slot of plain PyTorch, from which the other cores' slots are made.

    Args:
        bound: for whose moments squared norms are wanted.
        dim: D, of all taps.

    Attributes:
        adds_bias: whether `forward` adds the bias of the layer before, or gets it added.
        squares: for each moment the sums of f^2 or f^4, [n]; from the ReLU.
        left: what makes the gradient of x from the arguments of `backward`; from the mean
            embedding's backward, None where there was none.
    """

    adds_bias = True
    left: Callable[[Tensor, Tensor | None, float | None], Tensor] | None = None

    def __init__(self, bound: Bound, dim: int) -> None:
        self.bound, self.dim = bound, dim
        self.squares: list[Tensor] = []

    def __call__(self, x: Tensor, bias: Tensor | None, ceiling: float | None) -> Tensor:
        """f = min(max(x + bias, 0), ceiling), in the place of x."""
        if not x.is_contiguous(memory_format=torch.channels_last):
            x = x.contiguous(memory_format=torch.channels_last)
        return _Rectify.apply(x, bias, ceiling, self)

    def forward(self, x: Tensor, bias: Tensor | None, ceiling: float | None) -> None:
        """Overwrites x with f, and takes its statistics."""
        if bias is not None:
            x.add_(bias[:, None, None])
        x.relu_() if ceiling is None else x.clamp_(0, ceiling)
        f = rows_of(x).to(torch.promote_types(x.dtype, torch.float32))
        self.squares = [
            torch.linalg.vector_norm(f if m == 1 else f * f, dim=1).square()
            for m in self.bound.moments
        ]

    def backward(self, f: Tensor, incoming: Tensor | None, ceiling: float | None) -> Tensor | None:
        """The gradient of x: (incoming + E) where f is in (0, ceiling)."""
        if self.left is not None:
            left, self.left = self.left, None
            return left(f, incoming, ceiling)
        return None if incoming is None else gated(incoming, f, ceiling)


def gated(total: Tensor, f: Tensor, ceiling: float | None) -> Tensor:
    """``total`` where f is in (0, ceiling), else 0; in the dtype of f."""
    passes = f > 0 if ceiling is None else (f > 0) & (f < ceiling)
    return torch.where(passes, total, 0).to(f.dtype)


class _Rectify(torch.autograd.Function):
    """A ReLU that adds what its slot holds to its gradient. Saved for backward: f alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, bias: Tensor | None, ceiling: float | None, slot: Slot
    ) -> Tensor:
        ctx.set_materialize_grads(False)  # None: no layer behind has a gradient
        slot.forward(x, bias, ceiling)
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        ctx.ceiling, ctx.slot = ceiling, slot
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor | None) -> tuple[Tensor | None, None, None, None]:
        (f,) = ctx.saved_tensors
        return ctx.slot.backward(f, incoming, ctx.ceiling), None, None, None


def written(needed: Sequence[bool], slots: Sequence[Slot | None] | None) -> list[bool]:
    """For which taps a gradient is written: where it is needed and no ReLU makes it."""
    if slots is None:
        return list(needed)
    return [wanted and slot is None for wanted, slot in zip(needed, slots, strict=True)]
