"""Training over the processes of a torch.distributed group: every batch counts as one.

Each process generates its part of a batch; `reduce_means` makes the class means of the whole batch
of them, so that the loss, its estimator's state and its gradient are those of one process that has
all images. Gradients are scaled for wrappers that average them over the processes, as
DistributedDataParallel, FSDP and Lightning do.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.parallel import DistributedDataParallel

from dpmmd._version import __version__
from dpmmd.devices import device_of

# Every process computes the same running statistics. PyTorch 2.13 gave the argument a new name.
BUFFERS_STAY: dict[str, Any] = (
    {"forward_sync_buffers": False}
    if "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
    else {"broadcast_buffers": False}
)


def reduce_means(means: Tensor, counts: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Class means and counts of all processes' images together.

    Sums M K D + K numbers over the group forward, and nothing backward: the gradient in this
    process's means is that in the whole's, times its share of the images, times the number of
    processes (see above).

    Args:
        means: [M, K, D] of this process's images, differentiable, from
            `dpmmd.functional.mean_embedding`.
        counts: [K], how many of them each class has.
        group: whose processes take part.

    Returns:
        The same shapes.

    Raises:
        RuntimeError: torch.distributed has no initialised process group.
    """
    require_group()
    return _ReduceMeans.apply(means, counts, group)


def require_group() -> None:
    """Raises a RuntimeError unless torch.distributed is initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            "process_group: torch.distributed is not initialised in this process; start it with "
            "torchrun and call torch.distributed.init_process_group() first, or leave the "
            "argument out."
        )


_T = TypeVar("_T")


class _ReduceMeans(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, means: Tensor, counts: Tensor, group: dist.ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        sums, whole = means * counts[None, :, None], counts.clone()
        dist.all_reduce(whole, group=group)
        dist.all_reduce(sums, group=group)
        present = whole.clamp(min=1)
        ctx.save_for_backward(counts / present * dist.get_world_size(group))
        ctx.mark_non_differentiable(whole)
        return sums.div_(present[None, :, None]), whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (share,) = ctx.saved_tensors
        return grad * share[None, :, None], None, None


class _AllReduce(torch.autograd.Function):
    """Sum over the processes; so is its gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _AllReduce.apply(grad, ctx.group), None


class _SyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the images of all processes, on devices that torch's SyncBatchNorm refuses.

    The whole batch's mean and (biased) variance in two passes, as nn.BatchNorm2d has them, and in
    float32 under autocast; in evaluation mode it is nn.BatchNorm2d.
    """

    group: dist.ProcessGroup

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        given = x.dtype
        if given in (torch.bfloat16, torch.float16):
            x = x.float()
        n = torch.tensor(float(x.numel() // x.shape[1]), dtype=x.dtype, device=x.device)
        dist.all_reduce(n, group=self.group)
        mean = _AllReduce.apply(x.sum(dim=(0, 2, 3)), self.group) / n
        centred = x - mean[:, None, None]
        variance = _AllReduce.apply(centred.square().sum(dim=(0, 2, 3)), self.group) / n
        self._remember(mean.detach(), variance.detach() * (n / (n - 1).clamp(min=1)))
        scale = torch.rsqrt(variance + self.eps)
        if self.weight is not None:
            scale = scale * self.weight
        out = centred * scale[:, None, None]
        return (out if self.bias is None else out + self.bias[:, None, None]).to(given)

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        rate = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean, rate)
        self.running_var.lerp_(variance, rate)


def synchronise_batch_norm(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """Makes every batch norm of a module take its statistics over all processes.

    On CUDA this is torch.nn.SyncBatchNorm, elsewhere (where that does not run) the same in plain
    operations, for nn.BatchNorm2d. Parameters, buffers and their names stay.

    Raises:
        RuntimeError: torch.distributed has no initialised process group.
        ValueError: not on CUDA, and with a batch norm that is not two-dimensional.
    """
    require_group()
    device = device_of(module).type
    if device == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(module, group)
    for name, layer in module.named_modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            if type(layer) is not nn.BatchNorm2d:
                raise ValueError(
                    f"module: its layer {name!r} is a {type(layer).__name__}; on {device} only "
                    "nn.BatchNorm2d can be synchronised. Use that, or CUDA devices."
                )
            layer.__class__ = _SyncedBatchNorm2d
            layer.group = group  # type: ignore[assignment]
    return module


def replicated(module: nn.Module, group: dist.ProcessGroup) -> nn.Module:
    """A module of equal weights in every process, as that of all together."""
    synchronise_batch_norm(module, group)
    return DistributedDataParallel(module, process_group=group, **BUFFERS_STAY)


def join(timeout: float = 600.0) -> dist.ProcessGroup | None:
    """The group of all processes that torchrun (or one like it) has started; None for one alone.

    Initialises torch.distributed if nobody has: over NCCL where PyTorch sees GPUs, of which this
    process then takes the one of its LOCAL_RANK, else over gloo.

    Args:
        timeout: seconds after which a process that waits for one that died gives up.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return None
    if not dist.is_initialized():
        on_gpus = torch.cuda.is_available()
        if on_gpus:
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("nccl" if on_gpus else "gloo", timeout=timedelta(seconds=timeout))
    return dist.group.WORLD


def leave(code: int) -> None:
    """Ends what `join` began and then the process; does nothing where nothing was begun.

    The process ends without taking down the interpreter: a thread of gloo's may still be about to
    drop the tensors of its last message, and is aborted if it needs the interpreter for that.

    Args:
        code: the exit status.
    """
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Team:
    """This process's place among those of a group; without a group it is alone."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self.group, self.device = group, device
        self.rank, self.size = 0, 1
        if group is not None:
            require_group()
            self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def share(self, whole: Tensor) -> Tensor:
        """This process's rows, consecutive, of [n, ...]; sizes differ by at most one."""
        return whole.tensor_split(self.size)[self.rank]

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in one of the processes; all must ask."""
        if self.group is None:
            return flag
        number = torch.tensor(int(flag), device=self.device)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self.group)
        return bool(number)

    def from_first(self, make: Callable[[], _T]) -> _T:
        """What `make` returns, or raises, in the first process: in all of them."""
        if self.group is None:
            return make()
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [(make(), None)]
            except Exception as error:
                outcome = [(None, error)]
        dist.broadcast_object_list(outcome, dist.get_global_rank(self.group, 0), self.group)
        value, raised = outcome[0]
        if raised is not None:
            raise raised
        return value

    def each(self, make: Callable[[], _T]) -> _T:
        """What `make` returns here; where it raises in one process, all of them raise."""
        if self.group is None:
            return make()
        failed: Exception | None = None
        try:
            value = make()
        except Exception as error:
            failed = error
        told: list[str | None] = [None] * self.size
        dist.all_gather_object(told, None if failed is None else str(failed), group=self.group)
        if failed is not None:
            raise failed
        for rank, message in enumerate(told):
            if message is not None:
                raise RuntimeError(f"rank {rank} has stopped, and so do all: {message}")
        return value

    def wait(self) -> None:
        """Until all processes are here."""
        if self.group is not None:
            self.any(False)


def require_same(what: str, value: Any, group: dist.ProcessGroup) -> None:
    """Raises a ValueError in every process if they do not all have the same value.

    Args:
        what: its name in the message.
        value: anything that can be compared, shown and pickled.
    """
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    for rank, other in enumerate(values):
        if other != values[0]:
            theirs, first = _differing(other, values[0])
            raise ValueError(
                f"{what}: rank {rank} has {theirs}, rank 0 has {first}; start every process with "
                "the same arguments, files and version of dpmmd."
            )


def require_alike(group: dist.ProcessGroup, **values: Any) -> None:
    """Raises a ValueError in every process that says in what they differ, if they do.

    Args:
        group: whose processes are compared, all of which call this.
        **values: by name, as `require_same`; the version of dpmmd is compared before them.

    Raises:
        RuntimeError: torch.distributed has no initialised process group.
    """
    require_group()
    require_same("version", __version__, group)
    for what, value in values.items():
        require_same(what, value, group)


def _differing(a: Any, b: Any) -> tuple[str, str]:
    """Both values as text; of two mappings, the first entry that differs."""
    if isinstance(a, dict) and isinstance(b, dict):
        key = next(k for k in (*a, *b) if a.get(k) != b.get(k))
        return f"{key}={a.get(key)!r}", f"{key}={b.get(key)!r}"
    return repr(a), repr(b)
