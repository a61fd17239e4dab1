"""Training a generator on a release, and sampling from it. Nothing here sees private data."""

from dpmmd.train.checkpoint import (
    CHECKPOINT,
    CheckpointError,
    Trained,
    build_generator,
    load_checkpoint,
    load_generator,
)
from dpmmd.train.graph import is_graphed
from dpmmd.train.loop import train
from dpmmd.train.pictures import sample_grid, save_png, tile
from dpmmd.train.sampling import balanced_labels, sample

__all__ = [
    "CHECKPOINT",
    "CheckpointError",
    "Trained",
    "balanced_labels",
    "build_generator",
    "is_graphed",
    "load_checkpoint",
    "load_generator",
    "sample",
    "sample_grid",
    "save_png",
    "tile",
    "train",
]
