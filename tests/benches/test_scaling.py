"""The model of scaling counts what is really sent, and the document holds its table."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from benches import scaling
from dpmmd.distributed import reduce_means

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "SCALING.md"


def test_bytes_of_a_step_are_those_that_are_reduced(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[int] = []

    def all_reduce(tensor: Tensor, group: object = None) -> None:
        sent.append(tensor.numel() * tensor.element_size())

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 8)
    dim = 1000
    means = torch.rand(scaling.MOMENTS, scaling.CLASSES, dim, requires_grad=True)
    total, _ = reduce_means(means, torch.ones(scaling.CLASSES), object())  # type: ignore[arg-type]
    total.sum().backward()
    work = scaling.Work(32, 0.0, dim, 0)
    machine = scaling.Machine(within=1.0)
    modelled = scaling.model(work, 8, 8, machine).reduced / (2 * 7 / 8)
    assert sum(sent) == modelled + 4 * scaling.CLASSES
    assert len(sent) == 2


def test_more_gpus_are_never_modelled_as_more_arithmetic() -> None:
    work = scaling.Work(32, 3e9, 303_104, 3_500_000)
    one, eight = (scaling.model(work, 2048, gpus, scaling.Machine()) for gpus in (1, 8))
    assert eight.arithmetic == one.arithmetic / 8
    assert eight.replicated == one.replicated
    assert one.reduced == one.gradients == 0
    assert one.total / 8 < eight.total < one.total


@pytest.mark.long
def test_the_document_is_generated() -> None:
    text = DOCUMENT.read_text()
    assert scaling.updated(text) == text
