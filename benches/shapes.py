"""Feature maps that look like an encoder's: half sparse, channels-last, sizes of real taps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import dpmmd
from dpmmd.functional import mmd_loss
from dpmmd.run import no_noise

# (channels, side at 32 px) of every tap; sides grow with the image's.
_TAPS = {
    "VGG19": [*[(64, 32)] * 2, *[(128, 16)] * 2, *[(256, 8)] * 4, *[(512, 4)] * 4, *[(512, 2)] * 4],
    "ResNet18": [(64, 16), *[(64, 8)] * 2, *[(128, 4)] * 2, *[(256, 2)] * 2, *[(512, 1)] * 2],
    "Tiny": [(8, 4), (16, 2)],  # of no network: for dry runs
}


@dataclass(frozen=True)
class Case:
    """Features and labels of one batch.

    Attributes:
        encoder, pixels: whose taps.
        n, classes, moments, dtype: as in `dpmmd.functional.mean_embedding`.
        compiled: whether torch.compile is measured too (compiling takes seconds a shape).
    """

    n: int = 64
    classes: int = 1
    moments: tuple[int, ...] = (1,)
    encoder: str = "VGG19"
    pixels: int = 32
    dtype: torch.dtype = torch.float32
    compiled: bool = False

    @property
    def shape(self) -> str:
        moments = "+".join(map(str, self.moments))
        return f"{self.encoder} {self.pixels} px, n={self.n}, K={self.classes}, moments {moments}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def tap_shapes(self) -> list[tuple[int, int, int]]:
        """(C, H, W) of every tap."""
        sides = [(c, s * self.pixels // 32) for c, s in _TAPS[self.encoder]]
        return [(c, side, side) for c, side in sides]

    @property
    def dim(self) -> int:
        return sum(c * h * w for c, h, w in self.tap_shapes)

    @property
    def feature_bytes(self) -> int:
        return self.n * self.dim * self.dtype.itemsize

    @property
    def d_vector_bytes(self) -> int:
        """One float32 vector of D for each moment and class."""
        return 4 * self.dim * self.classes * len(self.moments)

    def smaller(self) -> Case:
        """The same kind of batch, fit for a test."""
        return Case(2, min(self.classes, 3), self.moments, "ResNet18", 32, self.dtype)

    def features(self, device: torch.device | str = "cpu", seed: int = 0) -> list[Tensor]:
        """Drawn on the device: half zeros, channels-last."""
        rng = torch.Generator(device).manual_seed(seed)
        maps = []
        for shape in self.tap_shapes:
            like = {"dtype": self.dtype, "device": device, "memory_format": torch.channels_last}
            x = torch.empty((self.n, *shape), **like)
            maps.append(x.normal_(generator=rng).relu_())
        return maps

    def labels(self, device: torch.device | str = "cpu") -> Tensor | None:
        if self.classes == 1:
            return None
        return torch.arange(self.n, device=device) % self.classes

    def target(self, device: torch.device | str = "cpu") -> Tensor:
        """[M, K, D], of the size that class means of unit vectors have."""
        rng = torch.Generator(device).manual_seed(1)
        shape = len(self.moments), self.classes, self.dim
        return torch.rand(shape, generator=rng, device=device).mul_(2 / self.dim**0.5)


def gradients(
    embed: Callable[..., tuple[Tensor, Tensor]],
    features: list[Tensor],
    case: Case,
    target: Tensor,
    loss: Callable[[Tensor, Tensor, Tensor], Tensor] = mmd_loss,
) -> tuple[Tensor, ...]:
    """Of the squared MMD in the features."""
    means, counts = embed(features, case.labels(), case.classes, moments=case.moments)
    return torch.autograd.grad(loss(means, counts, target), features)


def small_release(encoder: dpmmd.encoders.Encoder, classes: int) -> dpmmd.Release:
    """Of a few random images, without noise: what a step costs depends on neither."""
    side = encoder.image_size[0]
    images = np.random.default_rng(0).integers(0, 256, (20, 3, side, side), dtype=np.uint8)
    return dpmmd.release(
        (images, np.arange(20) % classes),
        encoder,
        epsilon=1.0,
        delta=1e-5,
        adjacency="replace-one",
        num_classes=classes,
        moments=(1, 2),
        batch_size=20,
        progress=False,
        insecure_test_noise=no_noise,
    )
