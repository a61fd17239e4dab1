"""A loss as a CUDA graph: its value and its gradient in the images, by one launch.

The loss is a scalar, so that its gradient in the images needs nothing of the caller's backward pass
but one factor. One graph holds both passes:

    images, labels -> buffers of the graph -> value, d value / d images -> copies for the caller

The copies let a caller hold several losses before their backward passes, whatever is replayed in
between. What the graph reads by its address (weights, target, the estimator's state) is looked at
before each replay: if any of it lies elsewhere, the graphs are captured again.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, cast

import torch
from torch import Tensor, nn

from dpmmd import _capture, backends
from dpmmd._contract.lending import settle
from dpmmd._ops.once import Once, untraced
from dpmmd._warn import warn
from dpmmd.precision import switched

MOST = 4  # graphs of one loss: each keeps the memory of a step

# images, labels -> scalar
Loss = Callable[[Tensor, Tensor | None], Tensor]


class Graphs:
    """The graphs of one module: one for each shape, dtype and device of images, and all settings.

    A copy of it, also a pickled one, starts without graphs.
    """

    def __init__(self) -> None:
        self._made: dict[Hashable, _Graph] = {}
        self._places: _Places | None = None
        self._warned = False

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    def __call__(
        self,
        module: nn.Module,
        launched: Loss,
        images: Tensor,
        labels: Tensor | None,
        options: Hashable,
    ) -> Tensor:
        """What ``launched(images, labels)`` returns; from a graph it is once differentiable.

        Args:
            module: whose parameters and buffers ``launched`` reads, and moves in place; its
                attribute ``encoder`` may be the caller's.
            launched: the loss.
            images, labels: as ``launched`` takes them, which refuses what does not fit.
            options: what else the loss depends on.

        Raises:
            RuntimeError: it cannot be a graph.
            Exception: whatever ``launched`` raises.
        """
        if not untraced(images, labels):
            return launched(images, labels)
        if _is_capturing(images.device):
            with backends.captured():  # the kernels of a warm-up that had a graph of ours
                return launched(images, labels)
        graph = None
        if module.training and _is_of_training(images, labels):
            graph = self._of(module, launched, images, labels, options)
        return launched(images, labels) if graph is None else _Replayed.apply(images, labels, graph)

    def _of(
        self,
        module: nn.Module,
        launched: Loss,
        images: Tensor,
        labels: Tensor | None,
        options: Hashable,
    ) -> _Graph | None:
        """The graph for such a call; None: it is to be launched."""
        if self._places is not None and not self._places.are_the_same():
            self._made.clear()
            self._places = None
        key = (
            (images.shape, images.dtype, images.device, labels is None, options),
            _autocast_of(images.device),
            backends.requested("auto"),
            switched(),
        )
        graph = self._made.get(key)
        if graph is None and self._may_be_made(module, images):
            graph = self._made[key] = _Graph(module, launched, images, labels)
            self._places = self._places or _Places(module)
        return graph

    def _may_be_made(self, module: nn.Module, images: Tensor) -> bool:
        if any(t.requires_grad for t in (*module.parameters(), *module.buffers())):
            return False  # a graph has no gradient for them
        if len(self._made) < MOST:
            return True
        if not self._warned:
            self._warned = True
            warn(
                f"graph=True: images {list(images.shape)}, {images.dtype}, would need more than "
                f"the {MOST} CUDA graphs that a loss keeps; calls of this kind are launched one "
                "kernel at a time, with the same result, but slower. Keep to one batch size, or "
                "drop the last, smaller batch of an epoch."
            )
        return False


class _Graph:
    """One graph, the buffers that it reads, and those that it writes."""

    def __init__(
        self, module: nn.Module, launched: Loss, images: Tensor, labels: Tensor | None
    ) -> None:
        self.images = images.detach().clone().requires_grad_()
        self.labels = None if labels is None else labels.clone()
        self.state = [
            t for name, t in module.state_dict().items() if not name.startswith("encoder.")
        ]
        autocast, encoder = _autocast(images.device), cast(nn.Module, module.encoder)

        def work() -> None:
            with torch.enable_grad(), autocast:
                value = launched(self.images, self.labels)
            (self.gradient,) = torch.autograd.grad(value, self.images)
            self.value = value.detach()

        forget = _capture.traced([*self.state, *encoder.buffers()])
        try:
            self.replay = _capture.recorded(work, images.device, forget, watched=encoder)
        except _capture.CaptureError as error:
            raise RuntimeError(
                f"graph=True: the loss cannot be a CUDA graph ({error}). Leave nothing of the "
                "encoder's forward pass to the host, or leave graph out."
            ) from error

    def __call__(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Value and gradient, which no other call writes to."""
        with torch.no_grad():
            self.images.copy_(images)
            if self.labels is not None and labels is not None:
                self.labels.copy_(labels)
            for state in self.state:
                settle(state)  # somebody's backward pass may still need it
            self.replay()
            for state in self.state:
                torch.autograd.graph.increment_version(state)
            return self.value.clone(), self.gradient.clone()


class _Replayed(torch.autograd.Function):
    """Saved for backward: the images and the gradient in them."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, labels: Tensor | None, graph: _Graph) -> Tensor:
        value, gradient = graph(images, labels)
        ctx.save_for_backward(images, gradient)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, gradient = ctx.saved_tensors
        gradient = gradient * grad
        if torch.is_grad_enabled():  # create_graph=True
            gradient = Once.apply(images, gradient)
        return gradient, None, None


class _Places:
    """Which tensors and modules a module is made of, and where in memory the tensors lie.

    It keeps that memory: so nothing else can come to lie there.
    """

    def __init__(self, module: nn.Module) -> None:
        tables: list[dict[str, Any]] = []
        for part in module.modules():
            tables += [part._parameters, part._buffers, part._modules]
        self.empty = [table for table in tables if not table]
        self.filled = [table for table in tables if table]
        self.parts = [part for table in self.filled for part in table.values()]
        self.names = list(map(id, self.parts))
        self.tensors = [part for part in self.parts if isinstance(part, Tensor)]
        self.memory = [t.detach() for t in self.tensors]
        self.addresses = [t.data_ptr() for t in self.tensors]

    def are_the_same(self) -> bool:
        """Whether all of it is as it was."""
        return (
            [id(part) for table in self.filled for part in table.values()] == self.names
            and not any(map(len, self.empty))
            and [t.data_ptr() for t in self.tensors] == self.addresses
            and not any(t.requires_grad for t in self.tensors)
        )


def _is_of_training(images: Tensor, labels: Tensor | None) -> bool:
    """Whether a call wants a gradient, and ``launched`` could take it."""
    if not (torch.is_grad_enabled() and images.requires_grad and images.numel()):
        return False
    device = images.device
    return device.type in _capture.GRAPHED_ON and (
        labels is None
        or (
            labels.dtype == torch.int64
            and labels.shape == images.shape[:1]
            and labels.device == device
        )
    )


def _is_capturing(device: torch.device) -> bool:
    """Whether the caller is capturing: then the loss's kernels go to the caller's graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _autocast_of(device: torch.device) -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)


def _autocast(device: torch.device) -> torch.autocast:
    """The caller's autocast, without its cache, whose tensors a graph would outlive."""
    enabled, dtype = _autocast_of(device)
    return torch.autocast(device.type, dtype, enabled, cache_enabled=False)
