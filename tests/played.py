"""CUDA graphs played on the CPU."""

from __future__ import annotations

import pytest
import torch

from dpmmd import _capture
from dpmmd._capture import Work


class Played:
    """Plays a graph on the CPU: what is recorded is run again at each replay, in place."""

    def __init__(self, warm_up_steps: int = 3) -> None:
        self.warm_up_steps, self.replays = warm_up_steps, 0
        self.fails: Exception | None = None

    def warm_up(self, work: Work, device: torch.device, steps: int) -> None:
        for _ in range(min(steps, self.warm_up_steps)):
            work()

    def record(self, work: Work, device: torch.device) -> Work:
        if self.fails is not None:
            work()  # what a CPU does while it is recorded, it has done
            try:
                raise self.fails
            finally:
                raise RuntimeError("failed due to a previous error")  # as torch.cuda.graph

        def replay() -> None:
            self.replays += 1
            work()

        return replay


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    it = Played()
    monkeypatch.setattr(_capture, "GRAPHED_ON", ("cpu",))
    monkeypatch.setattr(_capture, "warm_up", lambda *a: it.warm_up(*a))
    monkeypatch.setattr(_capture, "record", lambda *a: it.record(*a))
    return it
