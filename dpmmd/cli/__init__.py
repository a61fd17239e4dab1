"""The command line."""

from dpmmd.cli.console import app, main

__all__ = ["app", "main"]
