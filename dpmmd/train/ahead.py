"""The plan of a recipe's training, before its release is there."""

from __future__ import annotations

import torch
from torch import nn

from dpmmd import encoders, generators
from dpmmd.bounds import Bound
from dpmmd.data.named import NAMED
from dpmmd.devices import device_of
from dpmmd.encoders import Encoder
from dpmmd.recipe import Recipe
from dpmmd.train import plan as planning
from dpmmd.train.plan import Plan, PlanError, Target


def of_recipe(settings: Recipe, memory: str, device: torch.device) -> Plan:
    """The plan of a recipe's training, without a look at its data.

    Args:
        settings: the recipe.
        memory: see `dpmmd.train.plan.parse`.
        device: where it would train.

    Raises:
        PlanError: as `dpmmd.train.plan.make`, or the recipe does not say which size the images
            have, or how many modes a class gets.
    """
    data = settings.data
    known = NAMED[data.source].shape if data.source in NAMED else None
    side = data.image_size if data.image_size is not None else known and known[1:]
    if settings.generator.image_size is None and side is None:
        raise PlanError(
            f"recipe: it does not say which size the images of {data.source!r} have, and a plan "
            "does not open them; set image_size in [generator] or [data]."
        )
    height, width = (side, side) if isinstance(side, int) else (side or (0, 0))
    shape = (data.channels or (known[0] if known else 3), height, width)
    per_class = 1
    if settings.modes is not None:
        if settings.modes.per_class is None:
            raise PlanError(
                "recipe: how many modes a class gets follows from the number of images, and a plan "
                "does not open them; set per_class in [modes]."
            )
        per_class = settings.modes.per_class
    encoder, selection = loaded(settings, device)
    look = settings.generator.completed(shape)
    rows = labels(settings, per_class)
    generator = generators.build(**look.arguments(), num_classes=rows).to(device)
    plan = before_release(settings, memory, encoder, generator, shape[0], per_class)
    del selection  # it is held beside the other while training runs
    return plan


def labels(settings: Recipe, per_class: int) -> int | None:
    """How many labels a recipe's generator takes at most, with so many modes a class; None: none.

    With modes it may take fewer, since those that do not stand out from their noise are merged.
    """
    classes = settings.data.num_classes
    return classes if per_class == 1 else (classes or 1) * per_class


def loaded(settings: Recipe, device: torch.device) -> tuple[Encoder, Encoder | None]:
    """A recipe's encoder and that of its selection block, if there is to be one."""
    encoder = encoders.load(**settings.encoder.arguments()).to(device)
    if settings.selection is None:
        return encoder, None
    return encoder, encoders.load(**settings.selection.arguments()).to(device)


def before_release(
    settings: Recipe,
    memory: str,
    encoder: Encoder,
    generator: nn.Module,
    channels: int,
    per_class: int = 1,
) -> Plan:
    """The plan of a recipe's training, beside releases that are not made yet.

    Args:
        settings: the recipe.
        memory: see `dpmmd.train.plan.parse`.
        encoder, generator: on their device.
        channels: of the private images.
        per_class: modes of a class.

    Raises:
        PlanError: as `dpmmd.train.plan.make`.
    """
    wanted, rows = settings.release, labels(settings, per_class)
    modes = per_class > 1
    target = Target(Bound.of(wanted), rows or 1, rows is not None, wanted.shared_taps, modes)
    numbers = target.numbers(encoder) * (2 if modes else 1)  # as released, and merged to rows
    if (small := wanted.pixel_moments) is not None:
        classes, pixels = settings.data.num_classes or 1, channels * small**2 + 1
        weights = wanted.weights or {}
        squares = (weights.get("products") != 0) + classes * bool(weights.get("class_products"))
        numbers += (classes + squares * pixels) * pixels
    held = 4 * numbers if device_of(generator).type == "cpu" else 0  # the releases
    return planning.make(memory, encoder, generator, target, settings.train, held=held)
