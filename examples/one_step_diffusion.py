"""A one-step generator from a diffusers UNet, tuned on a release; Accelerate starts the processes.

accelerate launch examples/one_step_diffusion.py runs/demo/release.safetensors --out unet/
accelerate launch --cpu --num_processes 2 examples/one_step_diffusion.py ...  # without GPUs

With --pretrained FOLDER the UNet is loaded from there (one that was distilled to a single step, or
pre-trained on public images); without it, a small one starts from random weights.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import UNet2DModel
from torch import Tensor

import dpmmd


def small_unet(channels: int, side: int, num_classes: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=side,
        in_channels=channels,
        out_channels=channels,
        num_class_embeds=num_classes,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
    )


def one_step(unet: torch.nn.Module, noise: Tensor, y: Tensor, timestep: int) -> Tensor:
    """Images in [0, 1] from noise, in one evaluation at the noisiest time step."""
    sample = unet(noise, timestep, class_labels=y).sample
    return (sample.clamp(-1, 1) + 1) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("release", help="a labelled release, e.g. runs/demo/release.safetensors")
    parser.add_argument("--pretrained", help="folder of a UNet2DModel with class embeddings")
    parser.add_argument("--out", default="unet")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=50, help="a process")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--timestep", type=int, default=999)
    arguments = parser.parse_args()

    accelerator = Accelerator()
    set_seed(accelerator.process_index)  # every process makes other images
    release = dpmmd.Release.load(arguments.release)
    channels, side, _ = release.metadata.image_shape
    if arguments.pretrained:
        unet = UNet2DModel.from_pretrained(arguments.pretrained)
    else:
        unet = small_unet(channels, side, release.num_classes)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=arguments.lr)
    unet, optimizer = accelerator.prepare(unet, optimizer)
    encoder = dpmmd.encoders.from_spec(release.metadata.encoder).to(accelerator.device)
    loss_of = dpmmd.nn.MMDLoss(
        release,
        encoder,
        process_group=dist.group.WORLD if accelerator.num_processes > 1 else None,
    )

    for step in range(1, arguments.steps + 1):
        noise = torch.randn(arguments.batch_size, channels, side, side, device=accelerator.device)
        y = torch.arange(arguments.batch_size, device=accelerator.device) % release.num_classes
        loss = loss_of(one_step(unet, noise, y, arguments.timestep), y)
        optimizer.zero_grad()
        accelerator.backward(loss)
        optimizer.step()
        if step == 1 or step % 50 == 0:
            accelerator.print(f"step {step}: loss {loss.item():.4f}")

    if accelerator.is_main_process:
        accelerator.unwrap_model(unet).save_pretrained(arguments.out)
    accelerator.print(f"{arguments.out}: trained by {accelerator.num_processes} process(es)")
    accelerator.end_training()


if __name__ == "__main__":
    main()
