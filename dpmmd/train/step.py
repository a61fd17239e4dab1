"""One step of a training after the other."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dpmmd import precision
from dpmmd.recipe import TrainSection
from dpmmd.train.sampling import batch_labels
from dpmmd.train.state import State, Task


def rate(settings: TrainSection, step: int) -> float:
    """Learning rate of a step (0-based): linear warm-up, then the schedule down to zero."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    factor = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
    }[settings.schedule]
    return settings.lr * factor


class Stepper:
    """Moves a state by one step each time that `advance` is called.

    Args:
        task: what is trained.
        state: what is moved.
        model: the state's generator, or what wraps it for several processes.
    """

    def __init__(self, task: Task, state: State, model: nn.Module) -> None:
        self.task, self.state, self.model = task, state, model
        n, device = task.settings.batch_size, task.team.device
        self.precision = precision.of_generator(task.settings.precision, device)
        whole = torch.zeros(n, int(state.generator.z_dim))  # type: ignore[arg-type]
        self.whole = whole.shape
        self.z = task.team.share(whole).to(device)
        self.y = None
        if (labels := self._labels(0)) is not None:
            self.y = task.team.share(labels).to(device)
        self.value = torch.zeros((), device=device)

    def advance(self) -> Tensor:
        """One step; returns the loss, on its device."""
        state = self.state
        for group in state.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate(self.task.settings, state.step))
            else:
                group["lr"] = rate(self.task.settings, state.step)
        self._fill(self.z, torch.randn(self.whole, generator=state.rng))
        if self.y is not None and (labels := self._labels(state.step)) is not None:
            self._fill(self.y, labels)
        state.averaged.begin(state.step)
        self._run()
        state.step += 1
        state.global_rng = torch.get_rng_state()
        return self.value

    def check(self) -> None:
        """Raises a ValueError if the last step's images are none; here every step has looked."""

    def _labels(self, step: int) -> Tensor | None:
        """Of the whole batch of a step."""
        task = self.task
        if task.num_rows is None:
            return None
        return batch_labels(task.settings.batch_size, task.num_rows, task.images_per_row, step)

    def _fill(self, place: Tensor, whole: Tensor) -> None:
        """Copies from the host without waiting: pinned memory is not reused before it is read."""
        values = self.task.team.share(whole)
        if place.is_cuda:
            values = values.pin_memory()
        place.copy_(values, non_blocking=True)

    def _run(self) -> None:
        """`_work`, in whichever way."""
        self._work()

    def _work(self) -> None:
        """What the device does in a step: the same kernels each time, and no reads by the host.

        Backward in two parts, cut at the images: the generator's has the generator's precision,
        the loss's follows PyTorch's settings.
        """
        state = self.state
        state.optimizer.zero_grad(set_to_none=True)
        images = self._generated()
        leaf = images.detach().requires_grad_()
        value = state.loss(leaf, self.y)
        (gradient,) = torch.autograd.grad(value, leaf)
        value = value.detach()  # what its graph still holds is not needed by the generator
        with precision.products(self.precision, self.z.device):
            images.backward(gradient)
        state.optimizer.step()
        self._average()
        self.value.copy_(value)

    def _generated(self) -> Tensor:
        """Differentiable images [n, C, H, W] of the latent points and labels of the step."""
        return precision.generated(self.model, self.z, self.y, self.precision, self.z.device)

    def _average(self) -> None:
        self.state.averaged.update_parameters(self.state.generator)
