"""Training a generator on a release, and sampling from it. Nothing here sees private data."""

from dpmmd.train.checkpoint import (
    CHECKPOINT,
    CheckpointError,
    load_checkpoint,
    load_generator,
)
from dpmmd.train.graph import is_graphed
from dpmmd.train.loop import train
from dpmmd.train.pictures import sample_grid, save_png, tile
from dpmmd.train.sampling import Mixture, balanced_labels, batch_labels, sample
from dpmmd.train.state import Trained

__all__ = [
    "CHECKPOINT",
    "CheckpointError",
    "Mixture",
    "Trained",
    "balanced_labels",
    "batch_labels",
    "is_graphed",
    "load_checkpoint",
    "load_generator",
    "sample",
    "sample_grid",
    "save_png",
    "tile",
    "train",
]
