"""The loss of a batch through chunks of its images: the same value and gradient, in less memory.

Class means are sums over images, and the gradient of the loss in one image's features needs no more
of the other images than these. So two sweeps over the chunks do:

    forward    each chunk's class means, without a graph; summed up, they are the batch's. The loss
               and its gradient g in the means, once, so that an estimator moves once.
    backward   each chunk's features again, with a graph; its share of g goes to its images.

The last chunk's graph is kept from the first sweep to the second, so that it is computed once. A
forward without gradients is one sweep.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpmmd._ops.once import Once

# images [m, C, H, W], labels [m] in 0..k-1 or None, k -> means [M, k, D], counts [k]
Embed = Callable[[Tensor, Tensor | None, int], tuple[Tensor, Tensor]]
# means [M, K, D], counts [K] -> scalar
Value = Callable[[Tensor, Tensor], Tensor]


@dataclass
class Chunk:
    """How many images go through the encoder at a time.

    Attributes:
        size: m.
        halved: whether memory ran out once. The second time is an error.
    """

    size: int
    halved: bool = False

    def halve(self, error: Exception) -> None:
        """Raises ``error`` if it is not about memory, or if there is nothing left to halve."""
        if not out_of_memory(error) or self.halved or self.size == 1:
            raise error
        warnings.warn(
            f"micro_batch={self.size}: out of memory; going on with {self.size // 2} images at a "
            "time. The result does not depend on it.",
            RuntimeWarning,
            stacklevel=2,
        )
        self.size //= 2
        self.halved = True


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a CUDA device or on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    told = str(error)
    return isinstance(error, RuntimeError) and any(
        words in told for words in ("can't allocate memory", "not enough memory", "bad_alloc")
    )


def micro_batched(
    images: Tensor,
    labels: Tensor | None,
    num_classes: int,
    *,
    embed: Embed,
    value: Value,
    chunk: Chunk,
) -> Tensor:
    """``value(*embed(images, labels, num_classes))``, a chunk of the images at a time.

    Images are taken in the order of their labels, so that a chunk has rows of D numbers for few
    classes only. Where labels are on a CUDA device the host waits for them.

    Args:
        images: [n, C, H, W], differentiable.
        labels: int64 [n] in 0..K-1 (not checked), or None with ``num_classes=1``.
        num_classes: K.
        embed: class means and counts of some images; a function of each image alone.
        value: called once, whatever it changes in place.
        chunk: its size; halved, once, if memory runs out in a chunk.

    Returns:
        Scalar, differentiable once in ``images``.
    """
    wanted = torch.is_grad_enabled() and images.requires_grad
    plan = _Order(labels, images.shape[0], num_classes, images.device)
    return _MicroBatched.apply(images, plan, embed, value, chunk, wanted)


class _Order:
    """In which order the images are taken, and which classes a range of them has."""

    def __init__(
        self, labels: Tensor | None, n: int, num_classes: int, device: torch.device
    ) -> None:
        self.device = device
        self.labels = None if labels is None else labels.cpu()
        if self.labels is None:
            self.counts = torch.tensor([n], dtype=torch.float64)
            return
        self.counts = torch.bincount(self.labels, minlength=num_classes).double()
        order = self.labels.argsort(stable=True)
        self.labels, self.order = self.labels[order], order.to(device)

    def of(self, start: int, stop: int) -> tuple[Tensor | None, Tensor, Tensor]:
        """Of a range: labels 0..k-1 or None, its k classes, and its share [k] of theirs."""
        if self.labels is None:
            return None, torch.tensor([0]), (stop - start) / self.counts
        classes, labels, counts = self.labels[start:stop].unique(
            return_inverse=True, return_counts=True
        )
        return labels.to(self.device), classes, counts / self.counts[classes]

    def take(self, images: Tensor, start: int, stop: int) -> Tensor:
        if self.labels is None:
            return images[start:stop]
        return images[self.order[start:stop]]

    def put(self, images: Tensor, start: int, stop: int, values: Tensor) -> None:
        if self.labels is None:
            images[start:stop] = values
        else:
            images[self.order[start:stop]] = values.to(images.dtype)


class _MicroBatched(torch.autograd.Function):
    """Saved for backward: images, the gradient in the means [M, K, D], the last chunk's graph."""

    @staticmethod
    def forward(
        ctx: Any,
        images: Tensor,
        order: _Order,
        embed: Embed,
        value: Value,
        chunk: Chunk,
        wanted: bool,
    ) -> Tensor:
        n = images.shape[0]
        means: Tensor | None = None
        ctx.kept = None
        start = 0
        while start < n:
            stop = _stop(start, n, chunk)
            failed: Exception | None = None
            try:
                labels, classes, share = order.of(start, stop)
                x = order.take(images, start, stop).detach()
                keep = wanted and stop == n
                with torch.set_grad_enabled(keep):
                    part, _ = embed(x.requires_grad_(keep), labels, len(classes))
                if keep:
                    ctx.kept = start, x, part
                part = part.detach()
                if start == 0 and stop == n and len(classes) == len(order.counts):
                    means = part
                elif means is None:
                    means = part.new_zeros(part.shape[0], len(order.counts), part.shape[2])
            except Exception as error:
                failed = error
            if failed is not None:
                ctx.kept = x = part = None  # type: ignore[assignment]
                _retry(failed, chunk)
                continue
            assert means is not None
            if means is not part:
                for column, k in enumerate(classes.tolist()):
                    means[:, k].add_(part[:, column], alpha=float(share[column]))
            del x, part
            start = stop
        assert means is not None
        counts = order.counts.to(means)
        if not wanted:
            return value(means, counts)
        means = means.detach().requires_grad_()
        with torch.enable_grad():
            loss = value(means, counts)
            (gradient,) = torch.autograd.grad(loss, means)
        ctx.save_for_backward(images, gradient)
        ctx.order, ctx.embed, ctx.chunk = order, embed, chunk
        device = images.device.type
        ctx.autocast = torch.autocast(
            device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        )
        return loss.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        images, gradient = ctx.saved_tensors
        with torch.no_grad():
            out = _second_sweep(ctx, images, gradient, grad)
        if torch.is_grad_enabled():  # create_graph=True
            out = Once.apply(images, out)
        return out, None, None, None, None, None


def _second_sweep(ctx: Any, images: Tensor, gradient: Tensor, grad: Tensor) -> Tensor:
    """The gradient in the images, of that in the means [M, K, D] times the scalar ``grad``."""
    order, chunk = ctx.order, ctx.chunk
    out = torch.empty_like(images)
    start, end = 0, images.shape[0]
    while start < end:
        kept, ctx.kept = ctx.kept, None
        a, b = (kept[0], end) if kept is not None else (start, _stop(start, end, chunk))
        failed: Exception | None = None
        try:
            labels, classes, share = order.of(a, b)
            if kept is not None:
                _, x, part = kept
            else:
                x = order.take(images, a, b).detach().requires_grad_()
                with torch.enable_grad(), ctx.autocast:
                    part, _ = ctx.embed(x, labels, len(classes))
            upstream = gradient.index_select(1, classes.to(gradient.device))  # [M, k, D]
            upstream.mul_((share.to(gradient) * grad.to(gradient))[None, :, None])
            (dx,) = torch.autograd.grad(part, x, upstream)
            order.put(out, a, b, dx)
        except Exception as error:
            failed = error
        x = part = upstream = dx = None  # type: ignore[assignment]
        if failed is not None:  # what was kept is computed again
            kept = None
            _retry(failed, chunk)
        elif kept is not None:
            end = a
        else:
            start = b
    return out


def _stop(start: int, end: int, chunk: Chunk) -> int:
    """The end of the chunk at ``start``: what does not fill a chunk comes first."""
    return start + ((end - start) % chunk.size or chunk.size)


def _retry(error: Exception, chunk: Chunk) -> None:
    chunk.halve(error)
    error.__traceback__ = None  # which holds tensors
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
