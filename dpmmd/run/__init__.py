"""A recipe from private images to a report, in one folder, resumable at every stage.

The folder: ``recipe.toml``, ``release.safetensors``, with modes ``moments.safetensors``,
``privacy.json``, ``checkpoints/``, ``samples.png``, ``synthetic.npz``, ``README.md`` (the set's
card), ``report.json``; and ``NOT_PRIVATE`` where the release was made without noise or with test
noise.
"""

from dpmmd.errors import RunError
from dpmmd.run.evaluation import accuracies, compared, load_extractors, read_sets
from dpmmd.run.folder import MOMENTS, encoders_of, releases_of
from dpmmd.run.job import run
from dpmmd.run.noiseless import NO_NOISE_EPSILON, no_noise
from dpmmd.run.report import (
    EVALUATION_NOTE,
    accuracy_rows,
    metric_rows,
    summarise,
)
from dpmmd.run.samples import write_samples

__all__ = [
    "EVALUATION_NOTE",
    "MOMENTS",
    "NO_NOISE_EPSILON",
    "RunError",
    "accuracies",
    "accuracy_rows",
    "compared",
    "encoders_of",
    "load_extractors",
    "metric_rows",
    "no_noise",
    "read_sets",
    "releases_of",
    "run",
    "summarise",
    "write_samples",
]
