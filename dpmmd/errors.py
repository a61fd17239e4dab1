"""Exceptions that several floors of the package raise, and what is quoted of those of others."""

from __future__ import annotations


class RunError(ValueError):
    """A folder or a device that cannot be used for this run."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type where it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]
