"""Exceptions that several floors of the package raise."""

from __future__ import annotations


class RunError(ValueError):
    """A folder that cannot be used for this run."""
