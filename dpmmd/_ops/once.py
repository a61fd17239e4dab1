"""What both operations ask of autograd: whether anything traces, and gradients of first order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

_CLASSES = frozenset({Tensor, nn.Parameter, type(None)})


def untraced(*tensors: Tensor | None) -> bool:
    """Whether nothing stands between a call and its kernels but autograd."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch.jit.is_tracing() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    return of_torch(tensors)


def of_torch(tensors: Iterable[Tensor | None]) -> bool:
    """Whether all are of PyTorch's own classes, or None."""
    return _CLASSES.issuperset(map(type, tensors))


def refuse_double_backward(ctx: Any, *grads: Tensor) -> NoReturn:
    raise RuntimeError(
        "dpmmd.functional: its gradients cannot be differentiated again (the operations are "
        "once_differentiable); differentiate those of dpmmd.reference instead."
    )


class Once(torch.autograd.Function):
    """A gradient that is known as a number, not as a function of what it is the gradient in."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, gradient: Tensor) -> Tensor:
        return gradient.clone()

    backward = staticmethod(refuse_double_backward)


def of_first_order(
    compute: Callable[..., list[Tensor]], features: Sequence[Tensor], given: tuple[Any, ...]
) -> list[Tensor]:
    """What ``compute(*given)`` returns: the gradients in features, not to be differentiated."""
    if not torch.is_grad_enabled():
        return compute(*given)
    with torch.no_grad():  # create_graph=True
        gradients = compute(*given)
    return [Once.apply(f, g) for f, g in zip(features, gradients, strict=True)]
