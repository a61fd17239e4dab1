"""What is summed of an image, and how many images at a time: decided before an image is read."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dpmmd.bounds import Bound
from dpmmd.devices import device_of
from dpmmd.encoders import Encoder
from dpmmd.encoders.pixels import pixel_moments as pixels_of
from dpmmd.privacy.blocks import Blocks, Features
from dpmmd.privacy.modes import Modes

NO_FEATURES = Bound(moments=())
BATCH_MEMORY = 1 << 30  # bytes of pixels and features that a release holds at once, by default


@dataclass(frozen=True)
class Asked:
    """What a caller asked to be summed; the arguments of `dpmmd.release` say what each is."""

    encoder: Encoder | None
    adjacency: str
    bound: Bound
    num_classes: int | None
    weights: Mapping[str, float] | None
    pixel_moments: int | None
    selection: Encoder | None
    shared_taps: int
    modes: Modes | None
    batch_size: int | None

    @property
    def labelled(self) -> bool:
        return self.num_classes is not None

    @property
    def public_n(self) -> bool:
        """Whether neighbouring data sets have the same number of units, so that it may be told."""
        return self.adjacency != "add-remove"

    def check(self, clip: float) -> Asked:
        """Returns itself, or raises a ValueError that names the argument out of range.

        Args:
            clip: as it was asked for.
        """
        self._check_kinds()
        classes, size = self.num_classes, self.batch_size
        taps = 1 if self.encoder is None else len(self.encoder.taps)
        if classes is not None and (not isinstance(classes, int) or classes < 1):
            raise ValueError(f"num_classes={classes!r}: expected None or an int >= 1.")
        if size is not None and (not isinstance(size, int) or size < 1):
            raise ValueError(f"batch_size={size!r}: expected None or an int >= 1.")
        if type(self.shared_taps) is not int or not 0 <= self.shared_taps < taps:
            raise ValueError(
                f"shared_taps={self.shared_taps!r}: expected how many of the encoder's first taps "
                f"all classes share, 0 to {taps - 1} of {taps}."
            )
        if not 2.0**-60 <= clip <= 2.0**60:
            raise ValueError(
                f"clip={clip!r}: expected a norm that float32 sums hold, 2^-60 to 2^60."
            )
        if self.shared_taps and classes is None:
            raise ValueError(
                f"shared_taps={self.shared_taps}: needs num_classes, classes that share them."
            )
        if self.modes is not None and self.modes.num_classes != (classes or 1):
            raise ValueError(
                f"modes: of {self.modes.num_classes} classes, num_classes={classes!r}; fit them to "
                "a release of the same classes. Nothing was spent."
            )
        return self

    def _check_kinds(self) -> None:
        """Refuses what goes with no encoder, and modes that are none."""
        if self.modes is not None and not isinstance(self.modes, Modes):
            raise TypeError(
                f"modes: a {type(self.modes).__name__}, expected dpmmd.Modes; make them with "
                "dpmmd.modes.fit(first_release, per_class). Nothing was spent."
            )
        if self.encoder is not None:
            return
        if self.pixel_moments is None:
            raise ValueError(
                "encoder=None: a release of moments of pixels alone needs pixel_moments=SIDE "
                "(--pixel-moments SIDE). For features give dpmmd.encoders.load(NAME)."
            )
        for name in ("selection", "modes"):
            if getattr(self, name) is not None:
                raise ValueError(
                    f"{name}: given with encoder=None, a release of moments of pixels alone; "
                    "leave it out, or give an encoder."
                )


def bound_of(
    encoder: Encoder | None,
    moments: int | Sequence[int],
    bound: str,
    clip: float,
    joint_weight: float | None,
) -> Bound:
    """`Bound.checked`, of one moment or several; without features that of no moments."""
    moments = (moments,) if isinstance(moments, int) else tuple(moments)
    checked = Bound.checked(moments, bound, clip, joint_weight)
    if encoder is None:
        if checked != Bound():
            raise ValueError(
                f"moments={moments!r}, bound={bound!r}, clip={clip!r}, joint_weight="
                f"{joint_weight!r}: they are of features; leave them out with encoder=None."
            )
        return NO_FEATURES
    return checked


@dataclass(frozen=True)
class Layout:
    """The blocks of a release, and the encoders that make them of images.

    Attributes:
        encoders: by their names in `Metadata`.
        modes: the rule by which a class is split; None: by none.
        labelled: whether labels are read; else all images are of class 0.
        device: where the encoder is, and the sums.
        batch_size: images a step.
    """

    blocks: Blocks
    encoders: Mapping[str, Encoder]
    modes: Modes | None
    labelled: bool
    device: torch.device
    batch_size: int


def lay_out(asked: Asked, image_shape: tuple[int, int, int], *, grouped: bool) -> Layout:
    """Lays out the blocks of what was asked for images of a shape.

    It sees no image, and no number that depends on one. What follows from the layout alone, such as
    the sensitivity, is therefore the same for neighbouring data sets.

    Raises:
        ValueError: ``weights`` or ``pixel_moments`` out of range, modes of other channels.
    """
    device, modes = torch.device("cpu"), asked.modes
    encoders: dict[str, Encoder] = {}
    if asked.encoder is not None:
        device, encoders["encoder"] = device_of(asked.encoder), asked.encoder
    if modes is not None and modes.channels != image_shape[0]:
        raise ValueError(
            f"modes: of images with {modes.channels} channels, the source's have {image_shape[0]}; "
            "fit them to a release of the same source. Nothing was spent."
        )
    if asked.pixel_moments is not None:
        pixels = pixels_of(asked.pixel_moments, image_shape[0])
        encoders["pixel_encoder"] = pixels.to(device)
    if asked.selection is not None:
        encoders["selection_encoder"] = asked.selection
    blocks = Blocks.of(
        {name: Features.of(used.spec()) for name, used in encoders.items()},
        asked.bound,
        classes=asked.num_classes or 1,
        shared_taps=asked.shared_taps,
        weights=asked.weights,
        with_counts=asked.labelled or not asked.public_n or modes is not None,
        grouped=grouped,
        per_class=1 if modes is None else modes.per_class,
    )
    size = asked.batch_size
    if size is None:
        size = default_batch_size(image_shape, list(encoders.values()), device)
    return Layout(blocks, encoders, modes, asked.labelled, device, size)


def default_batch_size(
    image_shape: tuple[int, int, int], encoders: Sequence[Encoder], device: torch.device
) -> int:
    """Images a step, so that pixels (read ahead: four batches) and features fit into memory."""
    distinct = {id(encoder): encoder for encoder in encoders}.values()
    numbers = 4 * math.prod(image_shape) + 3 * sum(encoder.dim for encoder in distinct)
    memory = BATCH_MEMORY
    if device.type == "cuda":
        memory = torch.cuda.get_device_properties(device).total_memory // 8
    return max(1, min(256, memory // (4 * numbers)))
