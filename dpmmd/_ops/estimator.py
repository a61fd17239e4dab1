"""The estimators' losses: `dpmmd::squared_mmd`, `dpmmd::ema_step` and `dpmmd::adam_step`.

A step moves an estimator's state and says its loss with the loss's gradient in the means, which
`dpmmd::with_gradient` ties to them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpmmd._contract.protocol import Core, Step, times
from dpmmd._cores import named
from dpmmd._ops.once import Once, untraced

_DEVICES = ("cpu", "cuda")


def loss(core: Core, means: Tensor, counts: Tensor, target: Tensor, step: Step) -> Tensor:
    """The scalar that an estimator's step makes of the means, differentiable in them."""
    plainly = untraced(means, counts, target, *step.state().values())
    if not core.opaque:
        if plainly:
            step.settle()
        return core.estimate(means, counts, target, step)[0]
    if plainly:
        return _Loss.apply(core, means, counts, target, step)
    operator, fields = _OPERATORS[step.estimator]
    values = [getattr(step, field) for field in fields]
    value, gradient = operator(means.detach(), counts, target, *values, core.name)
    return torch.ops.dpmmd.with_gradient(means, value, gradient)


class _Loss(torch.autograd.Function):
    """What a core's estimator returns: its value, with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, core: Core, means: Tensor, counts: Tensor, target: Tensor, step: Step
    ) -> Tensor:
        step.settle()
        value, gradient = core.estimate(means.detach(), counts, target, step)
        step.mark()
        ctx.save_for_backward(means, gradient)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, _given(ctx, grad), None, None, None


@torch.library.custom_op("dpmmd::with_gradient", mutates_args=(), device_types=_DEVICES)
def _with_gradient(means: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    """``value``, as a function of ``means`` whose gradient is known."""
    return value.clone()


@_with_gradient.register_fake
def _(means: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    return value.new_empty(())


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[2])


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return _given(ctx, grad), None, None


def _given(ctx: Any, grad: Tensor) -> Tensor:
    """The gradient in the means, from what was saved."""
    means, gradient = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True
        return Once.apply(means, gradient * grad)
    return times(gradient, grad)


_with_gradient.register_autograd(_differentiate, setup_context=_save)


def _register(estimator: str, name: str, arguments: str) -> tuple[Any, tuple[str, ...]]:
    """The operator of an estimator, and which fields of `Step` it takes.

    ``arguments`` is the part of its schema that names these.
    """
    fields = {a.split()[-1]: "!" in a for a in arguments.split(",") if a.strip()}

    def run(means: Tensor, counts: Tensor, target: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *values, core = rest
        step = Step(estimator, **dict(zip(fields, values, strict=True)))
        value, gradient = named(core).estimate(means, counts, target, step)
        assert gradient is not None
        return value, gradient

    def fake(means: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return means.new_empty(()), means.new_empty(means.shape)

    torch.library.custom_op(
        f"dpmmd::{name}",
        run,
        mutates_args=[field for field, changed in fields.items() if changed],
        device_types=_DEVICES,
        schema=f"(Tensor means, Tensor counts, Tensor target, {arguments}str core)"
        " -> (Tensor, Tensor)",
    ).register_fake(fake)
    return getattr(torch.ops.dpmmd, name), tuple(fields)


_OPERATORS = {
    "batch": _register("batch", "squared_mmd", ""),
    "ema": _register(
        "ema", "ema_step", "Tensor(a3!) estimate, Tensor(a4!) steps, float decay, bool update, "
    ),
    "adam": _register(
        "adam",
        "adam_step",
        "Tensor(a3!) estimate, Tensor(a4!) first_moment, Tensor(a5!) second_moment, "
        "Tensor(a6!) steps, float lr, SymInt? numbers, bool update, ",
    ),
}
