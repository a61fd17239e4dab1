"""Estimates that a pending backward pass reads where they lie.

The gradient of an "adam" step's loss in the means is the estimate with its sign turned. A core that
reads the estimate itself writes no gradient, but the next step moves the estimate in place. So the
core lends it out. Before any core moves it, whoever has not finished gets a copy (`Step.settle`). A
loop that runs backward before the next forward makes no copies.
"""

from __future__ import annotations

from typing import NoReturn
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Lent:
    """An estimate as a step has left it.

    It is finished once its backward has run and cannot run again, or when nothing refers to it.
    """

    def __init__(self, estimate: Tensor, *, copied: bool = False) -> None:
        self._estimate: Tensor | None = estimate.clone() if copied else estimate.detach()
        # Once the step is marked; None: of a copy, which nobody moves.
        self._version: int | None = None if copied else estimate._version + 1
        self._captured = _capturing(estimate)

    def read(self) -> Tensor:
        """The estimate.

        Raises:
            RuntimeError: it is not as the step left it any more.
        """
        if self._estimate is None:
            _refuse("is gone: a CUDA graph was captured in between")
        if self._version is not None and self._version != self._estimate._version:
            _refuse("has been changed in place")
        return self._estimate

    def finish(self) -> None:
        """Ends the loan after a backward pass, unless its graph is kept for another."""
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            self._estimate = None

    def settle(self) -> None:
        """Takes a copy, unless finished, for the estimate is about to move."""
        if self._estimate is None or self._version != self._estimate._version:
            return  # finished, a copy, or changed by somebody else
        if self._captured != _capturing(self._estimate):
            # A copy would be made when the graph is replayed, or only now.
            self._estimate = None
            return
        self._estimate, self._version = self._estimate.clone(), None


# None of older versions of PyTorch, whose hooks nobody can ask for.
_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)


def is_lendable() -> bool:
    """Whether what a node saves comes back as it is, and not, perhaps, of another forward pass.

    Activation checkpointing runs forward again when a backward pass unpacks what was saved; a loan,
    which is not saved, would then be of the first pass and all else of the second.
    """
    return _hooks is None or _hooks(True) is None


def lend(estimate: Tensor) -> Lent:
    """Lends an estimate that has moved, before its step is marked."""
    address, capturing = estimate.data_ptr(), _capturing(estimate)
    if capturing:
        _replayed.add(address)
    lent = Lent(estimate, copied=address in _replayed and not capturing)
    _lent[address] = lent
    return lent


def settle(estimate: Tensor) -> None:
    """Settles with whom an estimate is lent to; it is about to move."""
    lent = _lent.pop(estimate.data_ptr(), None)
    if lent is not None:
        lent.settle()


# By address, for a caller may have another view of the same estimate at every step. One who has not
# finished keeps the memory, so that the address is nobody else's.
_lent: WeakValueDictionary[int, Lent] = WeakValueDictionary()

# Addresses of estimates that a CUDA graph has been told to move: its replays ask nobody, so that
# whoever is outside of it gets a copy at once. Another estimate at such an address costs copies.
_replayed: set[int] = set()


def _capturing(estimate: Tensor) -> bool:
    return estimate.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f"dpmmd.nn: backward needs the loss's estimate as forward left it, but the estimate {what} "
        "since. Run backward before the state is loaded, changed or moved by a CUDA graph."
    )
