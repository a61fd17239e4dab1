"""The host's part: what a launched loss costs its caller, and loops as users write them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benches.gpu import steps
from benches.gpu.measure import Call
from benches.gpu.probe import taps
from benches.gpu.probe.rungs import Rungs
from benches.gpu.probe.step import INJECTED, Network, network_of
from benches.gpu.probe.variants import HALF, OURS

HOST, LOOP = "the host's time", "a user's loop, launched"
BARE, GRAPHED = "a node that does nothing", "graph = true"


def host(rungs: Rungs) -> None:
    """What the host takes for the loss over a bare node (7), and a loop with graphs in it (8)."""
    like = taps.case(rungs, rungs.sizes.deep[0])
    device = rungs.device.device
    for variant, make in _floors(like.features(device), device).items():
        rungs.host(HOST, like.shape, variant, make)
    for core in rungs.cores:
        rungs.host(HOST, like.shape, f"loss, {core}", partial(taps.loss, like, core, device))
    network = network_of(rungs, rungs.sizes.deep[0])
    for core in rungs.cores:
        for name in (core, core + INJECTED) if core == rungs.cores[0] else (core,):
            _loop(network, name, partial(network.loss, name))
        if network.device.type == "cuda":
            _loop(network, f"{core}, {GRAPHED}", partial(network.loss, core, graph=True))
    _trained(network)


class _Bare(torch.autograd.Function):
    """As many gradients as features, and nothing in them."""

    @staticmethod
    def forward(ctx: Any, *features: Tensor) -> Tensor:
        ctx.save_for_backward(*features)
        return features[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(f) for f in ctx.saved_tensors)


def _floors(features: list[Tensor], device: torch.device) -> dict[str, Callable[[], Call]]:
    """What PyTorch alone takes: the loss has as many outputs, and at least one node."""
    features = [f.requires_grad_() for f in features]
    one = torch.zeros(1, device=device)

    def bare() -> Any:
        return torch.autograd.grad(_Bare.apply(*features), features)

    return {
        "torch.empty": lambda: partial(torch.empty, 1000, device=device),
        "torch.empty_like of a map": lambda: partial(torch.empty_like, features[0]),
        "a launch": lambda: partial(one.add_, 1),
        BARE: lambda: bare,
    }


def _loop(network: Network, variant: str, loss: Callable[[], Any]) -> None:
    def make() -> Call:
        given = network.generator(), loss(), network.batch, network.scale.classes, False
        return steps.Step(*given)

    given = LOOP, network.shape, network.precision, {variant: make}
    network.rungs(*given, graph=False, items=network.batch)


def _trained(network: Network) -> None:
    """`dpmmd.train.train`: what the library's own loop makes of a captured step.

    Where cuDNN's search, which it makes before its capture, has not been forestalled by steps of
    the same shapes: in a training that is alone in its process it has not.
    """
    rungs = network.rungs
    if not rungs.cores or not rungs.budget.fits(steps.TRAIN):
        return
    scale = replace(network.scale, train_steps=rungs.sizes.train_steps)
    of = steps.Steps(rungs.measure, scale, (network.pixels, network.batch), network.precision)
    inject: dict[str, Any] = {"inject": True}
    for core in rungs.cores:
        ways = {f"{core}, {OURS}": {}, f"{core}{INJECTED}": inject}
        if HALF in rungs.sizes.precisions:
            ways[f"{core}{INJECTED}, generator {HALF}"] = inject | {"precision": HALF}
        rungs.search(partial(of.trained, core, ways))
