"""Private image sources: one interface over arrays, files and named data sets.

:func:`open_source` turns whatever holds the private images into an :class:`ImageSource`,
which yields batches of one fixed shape in one fixed order. An image that cannot be decoded is
an invalid row of zeros: it is never reported, never stops a run and never changes a shape.
"""

from dpmmd.data import inspect as inspect
from dpmmd.data.arrays import ArraySource
from dpmmd.data.fetch import fetch_fashion_mnist
from dpmmd.data.loader import prefetch
from dpmmd.data.npz import write_npz
from dpmmd.data.open import SOURCE_NAMES, open_source
from dpmmd.data.source import Batch, ImageSource, source_identity

__all__ = [
    "SOURCE_NAMES",
    "ArraySource",
    "Batch",
    "ImageSource",
    "fetch_fashion_mnist",
    "open_source",
    "prefetch",
    "source_identity",
    "write_npz",
]
