"""dpmmd: differentially private image generation with pre-trained perceptual features.

    encoder = dpmmd.encoders.load("squeezenet1.1")
    release = dpmmd.release(dataset, encoder, epsilon=1, delta=1e-5, adjacency="replace-one",
                            num_classes=10)
    loss = dpmmd.nn.MMDLoss(release, encoder)

Importing it touches no accelerator, compiles nothing and downloads nothing. Each of its modules is
imported when it is first used.
"""

from typing import TYPE_CHECKING

from dpmmd._lazy import importer
from dpmmd._version import __version__ as __version__

if TYPE_CHECKING:
    from dpmmd import (
        align,
        backends,
        data,
        distributed,
        encoders,
        functional,
        generators,
        modes,
        nn,
        privacy,
        train,
    )
    from dpmmd.privacy import Modes, PrivacyError, Release, release
else:
    __getattr__ = importer(
        __name__,
        of_module={"dpmmd.privacy": ("Modes", "PrivacyError", "Release", "release")},
        modules=(
            *("align", "backends", "bounds", "data", "distributed", "encoders", "evaluate"),
            *("export", "functional", "generators", "injection", "metrics", "microbatch", "modes"),
            *("nn", "privacy", "recipe", "reference", "run", "train"),
        ),
    )

__all__ = [
    "Modes",
    "PrivacyError",
    "Release",
    "align",
    "backends",
    "data",
    "distributed",
    "encoders",
    "functional",
    "generators",
    "modes",
    "nn",
    "privacy",
    "release",
    "train",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
