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
_IMAGES = 200  # of a class


class Selection:
    """Squared MMD between generated images and the release's noised selection block."""

    def __init__(
        self, release: Release, encoder: Encoder, device: torch.device, limits: Limits
    ) -> None:
        check_encoder(release, encoder, selection=True)
        target = release.selection_target
        assert target is not None
        self.target, self.encoder = target[None].to(device), encoder  # [1, A, D']
        self.rows = release.num_rows
        # Of each row: as many in all with modes as without.
        self.images = max(2, _IMAGES * release.num_classes // self.rows)
        self.modes = release.modes is not None
        self.labelled = release.metadata.labelled or self.modes
        # Images through the encoder; twice as many through the generator.
        self.at_once = min(_AT_ONCE, limits.encoded or _AT_ONCE)

    @torch.no_grad()
    def score(self, generator: nn.Module) -> float:
        """The same latent points at every call: differences are the generator's.

        With modes, of which each has few images, without the pairs of an image with itself, whose
        part would be the larger the more varied the images are.
        """
        n = self.images * self.rows
        rows = self.rows if self.labelled else None
        images, y = sample(generator, n, rows, batch_size=2 * self.at_once, seed=1)
        labels = torch.zeros(n, dtype=torch.int64) if y is None else torch.from_numpy(y)
        sums, device = torch.zeros_like(self.target), self.target.device
        for x, part in zip(
            torch.from_numpy(images).split(self.at_once),
            labels.to(device).split(self.at_once),
            strict=True,
        ):
            features = self.encoder(x.to(device).float() / 255)
            means, counts = mean_embedding(features, part, self.rows)
            sums += means * counts[None, :, None]
        means = sums / self.images
        score = (self.target - means).square().sum()
        if self.modes:  # features lie on a sphere of radius 1
            score += (means.square().sum(dim=2) - 1).sum() / (self.images - 1)
        return float(score)
