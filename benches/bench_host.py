"""The host's part of a loss: many small taps, where the arithmetic is next to nothing.

What autograd itself costs is that of a bare node: one that saves the features and returns as many
new gradients, unwritten.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benches import baselines
from benches.backends import on_this_cpu
from benches.harness import Measure, relative_error
from dpmmd import backends, functional, reference
from dpmmd._contract.protocol import Step
from dpmmd._ops import matching
from dpmmd.bounds import Bound

TAPS, NUMBERS, IMAGES, CLASSES = 16, 8, 2, 2
CALLS = 50  # a round, which otherwise would be as short as what disturbs it
BARE = "bare node"


class Bare(torch.autograd.Function):
    """Nothing but autograd and the memory of the gradients."""

    @staticmethod
    def forward(ctx: Any, *features: Tensor) -> Tensor:
        ctx.save_for_backward(*features)
        return torch.zeros(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return tuple([torch.empty_like(f) for f in ctx.saved_tensors])


def test_forward_and_backward(measure: Measure) -> None:
    rng = torch.Generator().manual_seed(0)
    drawn = (torch.rand(IMAGES, NUMBERS, 1, 1, generator=rng) for _ in range(TAPS))
    form = torch.channels_last
    features = [f.contiguous(memory_format=form).requires_grad_() for f in drawn]
    labels = torch.arange(IMAGES) % CLASSES
    target, bound = torch.rand(1, CLASSES, TAPS * NUMBERS, generator=rng), Bound()

    def one_node() -> Tensor:  # as `nn.MMDLoss` calls it
        core = backends.core("auto", features[0].device.type, features[0].dtype)
        return matching.loss(core, features, labels, CLASSES, bound, target, Step())

    def two_nodes() -> Tensor:
        return functional.mmd_loss(*functional.mean_embedding(features, labels, CLASSES), target)

    def eager() -> Tensor:
        means, counts = baselines.mean_embedding(features, labels, CLASSES)
        return baselines.mmd_loss(means, counts, target)

    def calls(loss: Callable[[], Tensor]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            for _ in range(1 if measure.smoke else CALLS):
                gradients = torch.autograd.grad(loss(), features)
            return gradients

        return run

    ours = on_this_cpu()[-1]
    losses = {ours: one_node, f"{ours}, two nodes": two_nodes, "eager": eager}
    variants = {name: calls(loss) for name, loss in losses.items()}
    doubles = [f.detach().double().requires_grad_() for f in features]
    means, counts = reference.mean_embedding(doubles, labels, CLASSES)
    truth = torch.autograd.grad(reference.mmd_loss(means, counts, target.double()), doubles)

    variants[BARE] = calls(lambda: Bare.apply(*features))
    gradients = measure(
        "host, forward + backward",
        f"{TAPS} taps of {NUMBERS}, n={IMAGES}, K={CLASSES}, {CALLS} calls",
        variants,
        ours=ours,
    )
    assert relative_error(gradients, truth) < 1e-5
