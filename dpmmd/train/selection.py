"""Which step's weights are best, by a release's selection block."""

from __future__ import annotations

import torch
from torch import nn

from dpmmd.encoders import Encoder
from dpmmd.functional import mean_embedding
from dpmmd.nn import check_encoder
from dpmmd.privacy.release_file import Release
from dpmmd.train.plan import Limits
from dpmmd.train.sampling import sample

_AT_ONCE = 250


class Selection:
    """Squared MMD between generated images and the release's noised selection block."""

    def __init__(
        self, release: Release, encoder: Encoder, device: torch.device, limits: Limits
    ) -> None:
        check_encoder(release, encoder, selection=True)
        target = release.selection_target
        assert target is not None
        self.target, self.encoder = target[None].to(device), encoder  # [1, K, D']
        self.num_classes = release.num_classes
        self.labelled = release.metadata.labelled
        # Images through the encoder; twice as many through the generator.
        self.at_once = min(_AT_ONCE, limits.encoded or _AT_ONCE)

    @torch.no_grad()
    def score(self, generator: nn.Module, per_class: int = 200) -> float:
        """The same latent points at every call: differences are the generator's."""
        n = per_class * self.num_classes
        classes = self.num_classes if self.labelled else None
        images, y = sample(generator, n, classes, batch_size=2 * self.at_once, seed=1)
        labels = torch.zeros(n, dtype=torch.int64) if y is None else torch.from_numpy(y)
        sums, device = torch.zeros_like(self.target), self.target.device
        for x, part in zip(
            torch.from_numpy(images).split(self.at_once),
            labels.to(device).split(self.at_once),
            strict=True,
        ):
            features = self.encoder(x.to(device).float() / 255)
            means, counts = mean_embedding(features, part, self.num_classes)
            sums += means * counts[None, :, None]
        return float((self.target - sums / per_class).square().sum())
