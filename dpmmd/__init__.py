"""dpmmd: differentially private image generation with pre-trained perceptual features.

    encoder = dpmmd.encoders.load("squeezenet1.1")
    release = dpmmd.release(dataset, encoder, epsilon=1, delta=1e-5, adjacency="replace-one",
                            num_classes=10)
    loss = dpmmd.nn.MMDLoss(release, encoder)

Importing it touches no accelerator, compiles nothing and downloads nothing.
"""

from dpmmd import (
    align,
    backends,
    data,
    distributed,
    encoders,
    functional,
    generators,
    nn,
    privacy,
    train,
)
from dpmmd._version import __version__
from dpmmd.privacy import PrivacyError, Release, release

__all__ = [
    "PrivacyError",
    "Release",
    "__version__",
    "align",
    "backends",
    "data",
    "distributed",
    "encoders",
    "functional",
    "generators",
    "nn",
    "privacy",
    "release",
    "train",
]
