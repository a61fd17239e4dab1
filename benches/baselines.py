"""The method as its authors describe it, in plain torch: what the library is compared with.

Harder et al. 2023 (arXiv 2205.12900), section 3 and appendix: the features of all layers are
concatenated, divided by their norm (and their squares by theirs), and averaged by class; a vector v
trained by Adam follows the difference to the target; the generator's loss is <v, difference>.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpmmd._torchvision import import_torchvision


def mean_embedding(
    features: Sequence[Tensor],
    labels: Tensor | None = None,
    num_classes: int = 1,
    *,
    moments: Sequence[int] = (1,),
) -> tuple[Tensor, Tensor]:
    """Means [M, K, D] and counts [K] by concatenation, norm, division and mean."""
    flat = [(f.permute(0, 2, 3, 1) if f.ndim == 4 else f).flatten(1) for f in features]  # views
    f = torch.cat(flat, dim=1).float()
    phis = [v / v.norm(dim=1, keepdim=True) for v in (f if m == 1 else f * f for m in moments)]
    if labels is None:
        return torch.stack([phi.mean(dim=0, keepdim=True) for phi in phis]), f.new_full(
            (1,), f.shape[0]
        )
    one_hot = F.one_hot(labels, num_classes).to(f.dtype)
    counts = one_hot.sum(dim=0)
    means = torch.stack([one_hot.T @ phi for phi in phis]) / counts.clamp(min=1)[:, None]
    return means, counts


def mmd_loss(means: Tensor, counts: Tensor, target: Tensor) -> Tensor:
    """Squared distance, summed over moments and the classes of the batch."""
    present = (counts > 0).to(means.dtype)[:, None]
    return ((target - means) * present).square().sum()


class AdamEstimator:
    """v, trained by Adam on the mean of (v - difference)^2."""

    def __init__(self, target: Tensor, lr: float = 1e-3) -> None:
        self.target = target
        self.v = nn.Parameter(torch.zeros_like(target))
        self._optimizer = torch.optim.Adam([self.v], lr=lr)

    def loss(self, means: Tensor) -> Tensor:
        """<v, target - means>, for the generator."""
        return (self.v.detach() * (self.target - means)).sum()

    def update(self, means: Tensor) -> None:
        self._optimizer.zero_grad()
        ((self.v - (self.target - means.detach())) ** 2).mean().backward()
        self._optimizer.step()


class AuthorsEncoder:
    """torchvision's whole VGG19, classifier included, read out after each of its 16 ReLUs."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        with torch.device(device):
            model = import_torchvision().models.vgg19(weights=None)
        self.model = model.eval().requires_grad_(False)
        self.mean = torch.tensor([0.485, 0.456, 0.406], device=device).view(1, 3, 1, 1)
        self.std = torch.tensor([0.229, 0.224, 0.225], device=device).view(1, 3, 1, 1)
        self._features: list[Tensor] = []
        for module in model.features:
            if isinstance(module, nn.ReLU):
                module.register_forward_hook(lambda m, x, y: self._features.append(y))

    def __call__(self, images: Tensor) -> list[Tensor]:
        self._features.clear()
        self.model((images - self.mean) / self.std)
        features = [f.flatten(1) for f in self._features]
        self._features.clear()
        return features


class AuthorsStep:
    """One training step: generator, encoder, both moments by class, and both Adams."""

    def __init__(
        self, generator: nn.Module, target: Tensor, batch: int, classes: int, lr: float = 1e-3
    ) -> None:
        self.generator, self.batch, self.classes = generator, batch, classes
        self.device = target.device
        self.encoder = AuthorsEncoder(self.device)
        self.estimator = AdamEstimator(target)
        self.optimizer = torch.optim.Adam(generator.parameters(), lr=lr)

    def __call__(self) -> None:
        z = torch.randn(self.batch, int(self.generator.z_dim), device=self.device)  # type: ignore[arg-type]
        y = torch.arange(self.batch, device=self.device) % self.classes
        means, _ = mean_embedding(
            self.encoder(self.generator(z, y)), y, self.classes, moments=(1, 2)
        )
        self.optimizer.zero_grad()
        self.estimator.loss(means).backward()
        self.optimizer.step()
        self.estimator.update(means)
