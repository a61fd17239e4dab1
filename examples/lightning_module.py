"""The loss in a LightningModule.

python examples/lightning_module.py runs/demo/release.safetensors --out generator.pt
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader

import dpmmd


class PrivateGenerator(L.LightningModule):
    """Trains a generator on a release; its batches are latent points and labels."""

    def __init__(self, release: dpmmd.Release, lr: float = 3e-3) -> None:
        super().__init__()
        self.release, self.lr = release, lr
        channels, side, _ = release.metadata.image_shape
        self.generator = dpmmd.generators.build(
            "conv", num_classes=release.num_classes, image_size=side, channels=channels
        )
        self.loss_of: dpmmd.nn.MMDLoss | None = None

    def configure_model(self) -> None:
        """Here the processes of a strategy like "ddp" have been joined."""
        if self.loss_of is None:
            encoder = dpmmd.encoders.from_spec(self.release.metadata.encoder)
            joined = dist.is_available() and dist.is_initialized()
            self.loss_of = dpmmd.nn.MMDLoss(
                self.release, encoder, process_group=dist.group.WORLD if joined else None
            )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        z, y = batch
        assert self.loss_of is not None
        loss = self.loss_of(self.generator(z, y), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.generator.parameters(), lr=self.lr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", help="a labelled release, e.g. runs/demo/release.safetensors")
    parser.add_argument("--out", default="generator.pt")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=100)
    arguments = parser.parse_args()

    module = PrivateGenerator(dpmmd.Release.load(arguments.release))
    points = arguments.steps * arguments.batch_size
    latent = torch.randn(points, module.generator.z_dim)
    labels = torch.arange(points) % module.release.num_classes
    data = torch.utils.data.TensorDataset(latent, labels)
    trainer = L.Trainer(
        max_steps=arguments.steps, logger=False, enable_checkpointing=False, log_every_n_steps=1
    )
    trainer.fit(module, DataLoader(data, batch_size=arguments.batch_size))
    torch.save(module.generator.state_dict(), arguments.out)
    print(f"{arguments.out}: loss {float(trainer.callback_metrics['loss']):.4f}")


if __name__ == "__main__":
    main()
