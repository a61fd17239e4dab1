"""Checkpoints: what they are called, and how they are read."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dpmmd.files import expanded
from dpmmd.generators import build
from dpmmd.recipe import GeneratorSection

CHECKPOINT = "last.pt"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is corrupt, or belongs to another release or other settings."""


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained generator.

    Attributes:
        generator: in eval mode, with averaged weights if the settings ask for them.
        num_classes: K, or None if it takes no labels.
        selected_step: the step whose weights these are: the last, or the best by the release's
            selection block.
        private: False if the release was stamped NOT PRIVATE.
        step: steps done.
        seconds: spent on training, over all resumptions.
        class_names: of the classes 0..K-1, or None where the release has none.
    """

    generator: nn.Module
    num_classes: int | None
    private: bool
    step: int
    seconds: float
    selected_step: int
    class_names: tuple[str, ...] | None = None


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """The content of a checkpoint, nothing executed.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: truncated, corrupt or of another format.
    """
    path = expanded(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such checkpoint; make one with `dpmmd train`.")
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a parser of damaged bytes may raise anything
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path}: not a readable checkpoint ({reason}); remove it to start training again "
            "from the release, which costs no privacy."
        ) from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(
            f"{path}: not a checkpoint of this version of dpmmd; use the version that wrote it, "
            "or remove it to start training again, which costs no privacy."
        )
    return state


def load_into(module: nn.Module, state: Mapping[str, Any]) -> None:
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        raise CheckpointError(
            "checkpoint: its weights are not those of the generator given; pass the same "
            f"generator, or train in another folder. {' '.join(str(error).split())}"
        ) from None


def load_generator(path: str | Path, generator: nn.Module | None = None) -> Trained:
    """The trained generator of a checkpoint, ready to sample.

    Args:
        path: a checkpoint, or a run folder that holds one.
        generator: an untrained instance, for a generator of your own.

    Raises:
        FileNotFoundError: no such checkpoint.
        CheckpointError: it is corrupt, or its weights are not those of ``generator``.
    """
    path = expanded(path)
    if path.is_dir():
        path = path / "checkpoints" / CHECKPOINT
    state = load_checkpoint(path)
    if generator is None:
        record = state["generator_settings"]
        if set(record) != set(GeneratorSection.model_fields):
            raise CheckpointError(
                f"{path}: holds a generator of your own ({record.get('name')}); "
                "pass an instance as generator=..."
            )
        generator = build_generator(GeneratorSection(**record), state["num_classes"])
    averaged = AveragedModel(generator, use_buffers=True)
    kept = state["best"] or {"step": state["step"], "averaged": state["averaged"]}
    load_into(averaged, kept["averaged"])
    return Trained(
        averaged.module.eval(),
        state["num_classes"],
        bool(state["private"]),
        int(state["step"]),
        float(state["seconds"]),
        int(kept["step"]),
        None if (names := state.get("class_names")) is None else tuple(names),
    )


def build_generator(settings: GeneratorSection, num_classes: int | None) -> nn.Module:
    """The generator that a recipe's ``[generator]`` section describes."""
    if settings.name is None or settings.image_size is None or settings.channels is None:
        raise ValueError(
            f"settings: {settings}, expected a name, an image_size and channels; fill them in with "
            "settings.completed(release.metadata.image_shape)."
        )
    return build(
        settings.name,
        num_classes=num_classes,
        image_size=settings.image_size,
        channels=settings.channels,
        z_dim=settings.z_dim,
        base_channels=settings.base_channels,
    )
