"""Several processes with Lightning Fabric: the statistic is that of the whole batch.

torchrun --nproc-per-node 2 examples/fabric.py runs/demo/release.safetensors --out generator.pt

The batch norms of the generator and the class means of the loss go over all processes, so the
training is that of one process with the whole batch, up to rounding.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from lightning.fabric import Fabric

import dpmmd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", help="a labelled release, e.g. runs/demo/release.safetensors")
    parser.add_argument("--out", default="generator.pt")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=200, help="of all processes together")
    arguments = parser.parse_args()

    processes = int(os.environ.get("WORLD_SIZE", "1"))
    fabric = Fabric(
        devices=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        num_nodes=max(1, processes // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        strategy="ddp" if processes > 1 else "auto",
    )
    fabric.launch()
    group = dist.group.WORLD if fabric.world_size > 1 else None

    release = dpmmd.Release.load(arguments.release)
    encoder = dpmmd.encoders.from_spec(release.metadata.encoder).to(fabric.device)
    loss_of = dpmmd.nn.MMDLoss(release, encoder, process_group=group)
    channels, side, _ = release.metadata.image_shape
    torch.manual_seed(0)  # the same weights everywhere
    generator = dpmmd.generators.build(
        "conv", num_classes=release.num_classes, image_size=side, channels=channels
    ).to(fabric.device)
    if group is not None:
        generator = dpmmd.distributed.synchronise_batch_norm(generator, group)
    z_dim = generator.z_dim
    model, optimizer = fabric.setup(generator, torch.optim.Adam(generator.parameters(), lr=3e-3))

    for step in range(1, arguments.steps + 1):
        z = torch.randn(arguments.batch_size, z_dim)  # the whole batch, the same everywhere
        y = torch.arange(arguments.batch_size) % release.num_classes
        mine = slice(fabric.global_rank, None, fabric.world_size)
        z, y = z[mine].to(fabric.device), y[mine].to(fabric.device)
        loss = loss_of(model(z, y), y)
        optimizer.zero_grad()
        fabric.backward(loss)
        optimizer.step()
        if step == 1 or step % 50 == 0:
            fabric.print(f"step {step}: loss {loss.item():.4f}")

    if fabric.global_rank == 0:
        torch.save(generator.state_dict(), arguments.out)
        print(f"{arguments.out}: trained by {fabric.world_size} process(es)")


if __name__ == "__main__":
    main()
